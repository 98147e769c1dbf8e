//! An object's way through a segment, with honest parties; and headers of every kind of nonsense.
#![expect(clippy::unwrap_used, reason = "clippy knows tests, not the functions that they share")]

use std::os::fd::OwnedFd;

use lifl_ebpf_common::{Descriptor, Kind, role};
use lifl_shm::{
    Arena, ArenaError, Element, MapError, MetaError, Object, ObjectError, ObjectKey, ObjectKind, ObjectMeta, Run,
    SealError, Segment, SegmentError, SegmentReader, SegmentSpec,
};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};

const CHAIN: u32 = 5;
const SPEC: SegmentSpec = SegmentSpec { chain: CHAIN, writer: role::LEAF, slots: 3, payload_bytes: 5000, max_runs: 4 };

fn segment(id: u32) -> (Segment, OwnedFd) {
    let (segment, fd) = Segment::create(SPEC).unwrap();
    assert!(segment.set_id(id));
    (segment, fd)
}

fn update(runs: Vec<Run>, length: u64) -> ObjectMeta {
    ObjectMeta { kind: ObjectKind::Update, round: 9, count: 1, weight: 2.5, length, runs }
}

fn run(first: u64, elements: u64, offset: u64, dtype: Element) -> Run {
    Run { first, elements, offset, dtype }
}

#[test]
fn what_is_sealed_is_what_is_read() {
    let (segment, fd) = segment(4);
    assert_eq!(segment.spec().payload_bytes, 8192, "whole pages");
    let reader = SegmentReader::map(&fd, CHAIN, 4).unwrap();
    assert_eq!((reader.id(), reader.bytes(), reader.spec()), (4, segment.bytes(), segment.spec()));

    let mut slot = segment.reserve().unwrap();
    assert!(slot.payload_mut().as_ptr().cast::<[u8; 4096]>().is_aligned());
    slot.payload_f32_mut()[..3].copy_from_slice(&[1.5, -2.0, f32::NAN]);
    slot.payload_i64_mut()[8..10].copy_from_slice(&[i64::MIN, 7]);
    slot.payload_mut()[128..132].copy_from_slice(&[1, 2, 3, 4]);
    let runs = vec![run(0, 3, 0, Element::F32), run(3, 2, 64, Element::I64), run(9, 2, 128, Element::Bf16)];
    let meta = update(runs, 132);
    let sealed = slot.seal(&meta).unwrap();
    assert_eq!(sealed.key, ObjectKey { segment: 4, slot: 0, generation: 2 });

    for reader in [reader, segment.reader().unwrap()] {
        let object = Object::from_descriptor(&reader, &sealed.descriptor(Kind::Update, role::TOP), 11).unwrap();
        assert_eq!((object.meta(), object.key(), object.offset()), (&meta, sealed.key, sealed.offset));
        assert_eq!((object.payload().len(), object.meta().covered()), (132, 7));
        let [floats, fixed, halves] = object.runs() else { panic!("three runs") };
        assert_eq!(object.run_f32(floats).unwrap()[..2], [1.5, -2.0]);
        assert!(object.run_f32(floats).unwrap()[2].is_nan());
        assert_eq!(object.run_i64(fixed).unwrap(), [i64::MIN, 7]);
        assert_eq!(object.run_u16(halves).unwrap(), [0x0201, 0x0403]);
        assert_eq!((object.run_i64(floats), object.run_f32(&run(0, 99, 0, Element::F32))), (None, None));
        assert!(object.still_valid());
        assert_eq!(object.into_bytes()[128..], [1, 2, 3, 4]);
    }
}

#[test]
fn slots_come_back_once() {
    let (segment, fd) = segment(1);
    let reader = SegmentReader::map(&fd, CHAIN, 1).unwrap();
    let meta = update(vec![Run::whole(4, Element::F32)], 16);
    let writers: Vec<_> = std::iter::from_fn(|| segment.reserve()).collect();
    assert_eq!((writers.len(), segment.free_slots(), segment.live_slots()), (3, 0, 0));
    drop(writers);
    assert_eq!((segment.free_slots(), segment.live_slots()), (3, 0));

    let sealed = segment.reserve().unwrap().seal(&meta).unwrap();
    let object = reader.object(sealed.key, 4).unwrap();
    let ObjectKey { slot, generation, .. } = sealed.key;
    for (slot, generation) in [(slot, generation + 2), (slot, 1), (slot, 0), (slot + 1, generation), (u32::MAX, 2)] {
        assert!(!segment.release(slot, generation), "{slot} {generation}");
    }
    assert!(object.still_valid());
    assert!(segment.release(slot, generation));
    assert!(!segment.release(slot, generation), "twice");
    assert!(!segment.release(slot, generation + 1), "the word of an empty slot is no generation");
    assert!(!object.still_valid());
    let error = reader.object(sealed.key, 4).unwrap_err();
    assert_eq!(error, ObjectError::Generation { asked: 2, found: 3 });

    let again = segment.reserve().unwrap().seal(&meta).unwrap();
    assert_eq!(again.key, ObjectKey { generation: 4, ..sealed.key }, "warm slot, new name");
    assert!(reader.object(again.key, 4).is_ok() && reader.object(sealed.key, 4).is_err());
    assert!(!segment.release(slot, generation), "the old name does not release the new object");
}

#[test]
fn a_writer_cannot_seal_what_no_reader_accepts() {
    let (unnamed, _fd) = Segment::create(SPEC).unwrap();
    let fine = update(vec![Run::whole(4, Element::F32)], 16);
    assert_eq!(unnamed.reserve().unwrap().seal(&fine), Err(SealError::NoId));
    assert!(unnamed.set_id(3) && unnamed.set_id(3) && !unnamed.set_id(4));
    let refuse = |meta: &ObjectMeta| match unnamed.reserve().unwrap().seal(meta) {
        Err(SealError::Meta(error)) => error,
        other => panic!("{other:?}"),
    };
    for weight in [0.0, -1.0, f64::INFINITY] {
        assert_eq!(refuse(&ObjectMeta { weight, ..fine.clone() }), MetaError::Weight(weight));
    }
    assert_eq!(refuse(&ObjectMeta { count: 2, ..fine.clone() }), MetaError::Count(2));
    assert_eq!(refuse(&ObjectMeta { kind: ObjectKind::Partial, count: 0, ..fine.clone() }), MetaError::Count(0));
    assert!(matches!(refuse(&ObjectMeta { length: 8193, ..fine.clone() }), MetaError::Length { .. }));
    assert!(matches!(refuse(&update(vec![], 16)), MetaError::Runs { found: 0, .. }));
    assert!(matches!(refuse(&ObjectMeta { kind: ObjectKind::Model, ..fine.clone() }), MetaError::Runs { .. }));
    let many = (0..5).map(|n| run(n, 1, n * 64, Element::F32)).collect();
    assert!(matches!(refuse(&update(many, 1000)), MetaError::Runs { found: 5, .. }));
    let bad_runs = [
        vec![run(0, 0, 0, Element::F32)],
        vec![run(0, 1, 4, Element::F32)],
        vec![run(0, 5, 0, Element::F32)],
        vec![run(0, u64::MAX, 0, Element::I64)],
        vec![run(u64::MAX, 2, 0, Element::F32)],
        vec![run(0, 1, u64::MAX - 63, Element::F32)],
        vec![run(1, 1, 0, Element::F16), run(0, 1, 0, Element::F16)],
        vec![run(0, 2, 0, Element::F16), run(1, 1, 0, Element::F16)],
    ];
    for runs in bad_runs {
        assert!(matches!(refuse(&update(runs, 16)), MetaError::Run { .. }));
    }
    assert_eq!((unnamed.free_slots(), unnamed.live_slots()), (3, 0), "refused slots went back");
    let start = ObjectMeta { kind: ObjectKind::Model, count: 0, weight: 0.0, runs: vec![], ..fine };
    assert!(unnamed.reserve().unwrap().seal(&start).is_ok(), "the model that starts a job contains no update");
}

#[test]
fn descriptor_and_header_must_agree() {
    let (segment, fd) = segment(2);
    let reader = SegmentReader::map(&fd, CHAIN, 2).unwrap();
    let meta = update(vec![Run::whole(4, Element::F32)], 16);
    let good = segment.reserve().unwrap().seal(&meta).unwrap().descriptor(Kind::Update, role::TOP);
    assert!(reader.described(&good, 4).is_ok());
    let lies = [
        Descriptor { chain: 6, ..good },
        Descriptor { kind: Kind::Partial as u8, ..good },
        Descriptor { round: 8, ..good },
        Descriptor { count: 2, ..good },
        Descriptor { weight_bits: 2.0_f64.to_bits(), ..good },
        Descriptor { offset: 0, ..good },
        Descriptor { length: 12, ..good },
    ];
    let fields = lies.map(|lie| match reader.described(&lie, 4) {
        Err(ObjectError::Disagree { field, .. }) => field,
        other => panic!("{other:?}"),
    });
    assert_eq!(fields, ["chain", "kind", "round", "count", "weight", "offset", "length"]);
    for kind in [0, 5, 6, 255] {
        let error = reader.described(&Descriptor { kind, ..good }, 4).unwrap_err();
        assert_eq!(error, ObjectError::Kind(kind));
    }
    let error = reader.described(&Descriptor { segment: 3, ..good }, 4).unwrap_err();
    assert_eq!(error, ObjectError::Segment { asked: 3, this: 2 });
    let error = reader.described(&Descriptor { slot: 3, ..good }, 4).unwrap_err();
    assert_eq!(error, ObjectError::Slot { slot: 3, slots: 3 });
    let error = reader.described(&good, 3).unwrap_err();
    assert_eq!(error.to_string(), "run 0 exceeds the model's elements");
}

#[test]
fn an_arena_grows_to_its_limit_and_shrinks_by_what_is_empty() {
    let bytes = Segment::bytes_of(SPEC).unwrap();
    let arena = Arena::new(SPEC, 2 * bytes);
    assert!(arena.reserve().is_none());
    let first = arena.grow().unwrap();
    let second = arena.grow().unwrap();
    assert!(matches!(arena.grow(), Err(ArenaError::Limit { used, .. }) if used == 2 * bytes));
    drop(second);
    assert_eq!(arena.bytes(), bytes, "what was not admitted is unmade");
    first.admit(10).unwrap();
    assert!(matches!(arena.grow().unwrap().admit(10), Err(ArenaError::Id(10))));
    arena.grow().unwrap().admit(11).unwrap();
    assert_eq!((arena.free_slots(), arena.bytes()), (6, 2 * bytes));

    let meta = update(vec![Run::whole(4, Element::F32)], 16);
    let keys: Vec<_> = (0..4).map(|_| arena.reserve().unwrap().seal(&meta).unwrap().key).collect();
    assert_eq!(keys.iter().map(|key| key.segment).collect::<Vec<_>>(), [10, 10, 10, 11]);
    assert_eq!(arena.trim(0), [0; 0], "both hold something");
    assert!(!arena.release(ObjectKey { segment: 12, ..keys[0] }) && arena.release(keys[3]));
    assert_eq!(arena.live_slots(), 3);
    let writing = arena.reserve().unwrap();
    assert_eq!(arena.trim(0), [0; 0], "one is being written");
    drop(writing);
    assert_eq!(arena.trim(2 * bytes), [0; 0]);
    assert_eq!(arena.trim(0), [11]);
    assert!(!arena.release(keys[3]) && arena.segment(11).is_none() && arena.bytes() == bytes);
}

#[test]
fn a_spec_that_overflows_is_refused_before_anything_is_made() {
    let huge = [
        SegmentSpec { slots: 0, ..SPEC },
        SegmentSpec { slots: u32::MAX, ..SPEC },
        SegmentSpec { max_runs: u32::MAX, ..SPEC },
        SegmentSpec { payload_bytes: 0, ..SPEC },
        SegmentSpec { payload_bytes: u64::MAX, ..SPEC },
        SegmentSpec { payload_bytes: u64::MAX / 2, ..SPEC },
        SegmentSpec { payload_bytes: 1 << 62, slots: 1 << 16, ..SPEC },
    ];
    for spec in huge {
        assert!(matches!(Segment::create(spec), Err(SegmentError::Geometry(_))), "{spec:?}");
        assert!(Segment::bytes_of(spec).is_err());
    }
}

/// A sealed memfd with these bytes: what a writer that follows no rule can hand over.
fn forged(bytes: &[u8]) -> OwnedFd {
    let fd = rustix::fs::memfd_create("forged", MemfdFlags::ALLOW_SEALING).unwrap();
    assert_eq!(rustix::io::pwrite(&fd, bytes, 0).unwrap(), bytes.len());
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL | SealFlags::FUTURE_WRITE;
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

/// The bytes of an honest segment with one object.
fn honest() -> (Vec<u8>, ObjectKey) {
    let (segment, fd) = segment(1);
    let runs = vec![run(0, 100, 0, Element::F32), run(100, 50, 448, Element::I64)];
    let key = segment.reserve().unwrap().seal(&update(runs, 1000)).unwrap().key;
    let mut bytes = vec![0; usize::try_from(segment.bytes()).unwrap()];
    assert_eq!(rustix::io::pread(&fd, &mut bytes, 0).unwrap(), bytes.len());
    (bytes, key)
}

/// All that may be relied on holds for whatever is accepted; reading all of it touches only memory that is there.
fn check(object: &Object, elements: u64) {
    let mut next = 0;
    for run in object.runs() {
        assert!(run.first >= next && run.elements > 0 && run.offset % 64 == 0);
        next = run.first + run.elements;
        assert!(next <= elements);
        let bytes = object.run_bytes(run);
        assert_eq!(bytes.len() as u64, run.bytes().unwrap());
        std::hint::black_box(bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)));
    }
    let meta = object.meta();
    assert!(meta.weight.is_finite() && (meta.weight > 0.0 || meta.kind == ObjectKind::Model));
    assert!(meta.length <= 8192 && object.payload().len() as u64 == meta.length);
}

#[test]
fn forged_files_are_read_if_they_are_whole() {
    let (bytes, key) = honest();
    let reader = SegmentReader::map(forged(&bytes), CHAIN, 1).unwrap();
    check(&reader.object(key, 150).unwrap(), 150);
    let mut longer = bytes.clone();
    longer.resize(bytes.len() + 4096, 0);
    for wrong in [&bytes[..4096], &bytes[..64], &longer] {
        assert!(matches!(SegmentReader::map(forged(wrong), CHAIN, 1), Err(MapError::Size { .. })));
    }
    assert!(matches!(SegmentReader::map(forged(&bytes[..8]), CHAIN, 1), Err(MapError::Size { .. })));
    assert!(matches!(SegmentReader::map(forged(&bytes), CHAIN + 1, 1), Err(MapError::Chain { found: 5, .. })));
    assert!(matches!(SegmentReader::map(forged(&[0; 8192]), CHAIN, 1), Err(MapError::Header { .. })));
}

#[test]
fn runs_end_where_the_slot_header_ends() {
    let (mut bytes, key) = honest();
    let mut set = |word: usize, value: u64| bytes[word * 8..word * 8 + 8].copy_from_slice(&value.to_le_bytes());
    // Slot 0's header starts at word 8, its runs at word 16; a fifth run would be slot 1's header.
    set(8 + 6, 5);
    for n in 0..5_usize {
        for (at, value) in [n as u64, 1, 0, Element::F32 as u64].into_iter().enumerate() {
            set(16 + n * 4 + at, value);
        }
    }
    let reader = SegmentReader::map(forged(&bytes), CHAIN, 1).unwrap();
    let error = reader.object(key, 150).unwrap_err();
    assert!(matches!(error, ObjectError::Meta(MetaError::Runs { found: 5, .. })), "{error}");
}

/// Numbers that have gone wrong elsewhere before, besides any.
fn word() -> impl Strategy<Value = u64> {
    let odd =
        prop::sample::select(vec![0, 1, 2, 3, 4, 63, 64, 448, 1000, 4096, 8192, 1 << 31, 1 << 32, 1 << 63, u64::MAX]);
    prop_oneof![odd, any::<u64>(), 0_u64..256]
}

proptest! {
    #[test]
    fn any_header_of_a_segment_maps_or_is_refused(words in prop::collection::vec((0_usize..8, word()), 1..4)) {
        let (mut bytes, key) = honest();
        for (at, value) in words {
            bytes[at * 8..at * 8 + 8].copy_from_slice(&value.to_le_bytes());
        }
        if let Ok(reader) = SegmentReader::map(forged(&bytes), CHAIN, 1) {
            prop_assert_eq!(reader.bytes(), bytes.len() as u64);
            if let Ok(object) = reader.object(key, 150) {
                check(&object, 150);
            }
        }
    }

    #[test]
    fn any_header_of_a_slot_is_sound_or_refused(words in prop::collection::vec((8_usize..32, word()), 1..4)) {
        let (mut bytes, key) = honest();
        for (at, value) in words {
            bytes[at * 8..at * 8 + 8].copy_from_slice(&value.to_le_bytes());
        }
        let reader = SegmentReader::map(forged(&bytes), CHAIN, 1).unwrap();
        for generation in [key.generation, 4, u64::MAX - 1] {
            if let Ok(object) = reader.object(ObjectKey { generation, ..key }, 150) {
                check(&object, 150);
            }
        }
    }

    #[test]
    fn any_descriptor_names_an_object_or_none(bytes in any::<[u8; 32]>(), slot in 0_u32..5, generation in 0_u64..6) {
        let (segment, key) = honest();
        let reader = SegmentReader::map(forged(&segment), CHAIN, 1).unwrap();
        let mut raw = [0; 64];
        raw[..32].copy_from_slice(&bytes);
        raw[32..].copy_from_slice(&bytes);
        prop_assert!(reader.described(&Descriptor::from_bytes(&raw), 150).is_err());
        let named = ObjectKey { segment: 1, slot, generation };
        prop_assert_eq!(reader.object(named, 150).is_ok(), named == key);
    }
}
