//! A hostile peer as a real other process: this binary again, with a socket as its standard input over which descriptors
//! of files pass. Whatever it does, this process gets a clear error or a sound object, and no signal.
#![expect(unsafe_code, reason = "the peer maps and writes memory as no honest party would")]
#![expect(clippy::unwrap_used, reason = "a test without the harness that clippy knows")]

mod peer;
mod wire;

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    process::{Child, Command, ExitCode, Stdio},
};

use libtest_mimic::{Arguments, Trial};
use lifl_ebpf_common::role;
use lifl_shm::{
    Element, MapError, Object, ObjectError, ObjectKey, ObjectKind, ObjectMeta, Run, Segment, SegmentReader, SegmentSpec,
};
use wire::{receive, send};

const CHAIN: u32 = 5;
const ID: u32 = 1;
const ELEMENTS: u64 = 150;
const SPEC: SegmentSpec = SegmentSpec { chain: CHAIN, writer: role::LEAF, slots: 2, payload_bytes: 8192, max_runs: 4 };

/// The peer; killed when dropped.
struct Peer {
    child: Child,
    socket: OwnedFd,
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some("--peer") {
        peer::run(&words.next().unwrap());
        return ExitCode::SUCCESS;
    }
    let tests: [(&str, fn()); 11] = [
        ("unsealed_and_half_sealed_files_are_refused", unsealed_and_half_sealed_files_are_refused),
        ("files_that_are_no_memfd_are_refused", files_that_are_no_memfd_are_refused),
        ("files_too_small_or_without_pages_are_refused", files_too_small_or_without_pages_are_refused),
        ("headers_that_overflow_are_refused", headers_that_overflow_are_refused),
        ("a_sealed_segment_cannot_shrink", a_sealed_segment_cannot_shrink),
        ("a_writer_that_never_stops_spoils_only_bytes", a_writer_that_never_stops_spoils_only_bytes),
        ("a_writer_that_dies_leaves_whole_objects", a_writer_that_dies_leaves_whole_objects),
        ("a_reader_cannot_write", a_reader_cannot_write),
        ("a_reader_that_dies_holds_nothing", a_reader_that_dies_holds_nothing),
        ("releases_by_strangers_change_nothing", releases_by_strangers_change_nothing),
        ("mappings_end_with_their_last_handle", mappings_end_with_their_last_handle),
    ];
    let trials = tests.map(|(name, test)| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.into()).exit_code()
}

// === impl Peer ===

impl Peer {
    fn start(role: &str) -> Self {
        let (socket, theirs) = wire::pair();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--peer", role])
            .stdin(Stdio::from(theirs))
            .spawn()
            .unwrap();
        Self { child, socket }
    }

    fn receive(&self) -> (String, Option<OwnedFd>) {
        receive(&self.socket).expect("the peer died")
    }

    fn segment(&self) -> Result<SegmentReader, MapError> {
        let (_, fd) = self.receive();
        SegmentReader::map(fd.unwrap(), CHAIN, ID)
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn update() -> ObjectMeta {
    let runs = vec![
        Run { first: 0, elements: 100, offset: 0, dtype: Element::F32 },
        Run { first: 100, elements: 50, offset: 448, dtype: Element::I64 },
    ];
    ObjectMeta { kind: ObjectKind::Update, round: 9, count: 1, weight: 2.5, length: 1000, runs }
}

fn key(slot: u32, generation: u64) -> ObjectKey {
    ObjectKey { segment: ID, slot, generation }
}

/// A segment of this process, with one object full of sevens.
fn honest() -> (Segment, OwnedFd, ObjectKey) {
    let (segment, fd) = Segment::create(SPEC).unwrap();
    assert!(segment.set_id(ID));
    let mut slot = segment.reserve().unwrap();
    slot.payload_mut().fill(7);
    let key = slot.seal(&update()).unwrap().key;
    (segment, fd, key)
}

/// Reads every byte that the object offers, where it offers it.
fn read_all(object: &Object) -> u64 {
    let mut sum = 0_u64;
    let mut next = 0;
    for run in object.runs() {
        assert!(run.first >= next && run.first + run.elements <= ELEMENTS && run.offset % 64 == 0);
        next = run.first + run.elements;
        let bytes = object.run_bytes(run);
        assert_eq!(bytes.len() as u64, run.bytes().unwrap());
        sum = bytes.iter().fold(sum, |sum, byte| sum.wrapping_add(u64::from(*byte)));
    }
    let meta = object.meta();
    assert!(meta.weight.is_finite() && meta.weight >= 0.0 && meta.length <= SPEC.payload_bytes);
    assert_eq!(object.payload().len() as u64, meta.length);
    object.payload().iter().fold(sum, |sum, byte| sum.wrapping_add(u64::from(*byte)))
}

fn unsealed_and_half_sealed_files_are_refused() {
    let peer = Peer::start("half-sealed");
    for _ in 0..peer::SEALS {
        let (missing, fd) = peer.receive();
        let error = SegmentReader::map(fd.unwrap(), CHAIN, ID).unwrap_err();
        let MapError::Seals { missing: found } = error else { panic!("{error}") };
        assert_eq!(found.bits().to_string(), missing);
    }
    assert!(peer.segment().is_ok(), "with all four, the same bytes are a segment");
}

fn files_that_are_no_memfd_are_refused() {
    let peer = Peer::start("no-memfd");
    for _ in 0..3 {
        let (what, fd) = peer.receive();
        let error = SegmentReader::map(fd.unwrap(), CHAIN, ID).unwrap_err();
        assert!(matches!(error, MapError::Seals { .. } | MapError::Io(_)), "{what}: {error}");
    }
}

fn files_too_small_or_without_pages_are_refused() {
    let peer = Peer::start("small");
    for _ in 0..4 {
        let error = peer.segment().unwrap_err();
        assert!(matches!(error, MapError::Size { .. }), "{error}");
    }
    for _ in 0..2 {
        let error = peer.segment().unwrap_err();
        assert!(matches!(error, MapError::Sparse { .. }), "{error}");
    }
}

fn headers_that_overflow_are_refused() {
    let peer = Peer::start("overflow");
    loop {
        let (what, fd) = peer.receive();
        let Some(fd) = fd else { break };
        let error = SegmentReader::map(fd, CHAIN, ID).unwrap_err();
        assert!(!error.to_string().is_empty(), "{what}");
        let expected = matches!(
            error,
            MapError::Geometry(_) | MapError::Range { .. } | MapError::Size { .. } | MapError::Header { .. }
        );
        assert!(expected || matches!(error, MapError::Chain { .. }), "{what}: {error}");
    }
}

fn a_sealed_segment_cannot_shrink() {
    let peer = Peer::start("shrink");
    let reader = peer.segment().unwrap();
    let object = reader.object(key(0, 2), ELEMENTS).unwrap();
    let before = read_all(&object);
    send(&peer.socket, "shrink now", None);
    for _ in 0..peer::SHRINKS {
        let (what, _) = peer.receive();
        assert!(what.ends_with(": refused"), "{what}");
        assert_eq!(read_all(&object), before);
    }
}

fn a_writer_that_never_stops_spoils_only_bytes() {
    let peer = Peer::start("scribble");
    let reader = peer.segment().unwrap();
    let spec = reader.spec();
    let (mut sound, mut refused, mut changed) = (0, 0, 0);
    // Not a number of rounds but of outcomes: all three must have happened, however the two processes are scheduled.
    while sound < 2000 || refused < 2000 || changed < 20 {
        match reader.object(key(0, 2), ELEMENTS) {
            Ok(object) => {
                sound += 1;
                changed += u32::from(read_all(&object) != read_all(&object));
                std::hint::black_box(object.still_valid());
            }
            Err(error) => {
                refused += 1;
                assert!(matches!(error, ObjectError::Meta(_) | ObjectError::Generation { .. }), "{error}");
            }
        }
    }
    assert_eq!(reader.spec(), spec, "geometry was copied once");
    let (again, _) = (reader.bytes(), peer.kill());
    assert_eq!(again, Segment::bytes_of(SPEC).unwrap());
}

fn a_writer_that_dies_leaves_whole_objects() {
    let mut peer = Peer::start("die-mid-write");
    let reader = peer.segment().unwrap();
    assert!(!peer.child.wait().unwrap().success(), "killed by its own signal");
    let object = reader.object(key(0, 2), ELEMENTS).unwrap();
    assert!(object.payload().iter().all(|byte| *byte == 7) && object.still_valid());
    for generation in [0, 1, 2, 3, 4] {
        let error = reader.object(key(1, generation), ELEMENTS).unwrap_err();
        assert_eq!(error, ObjectError::Generation { asked: generation, found: 1 }, "half an object is none");
    }
}

fn a_reader_cannot_write() {
    let (segment, fd, key) = honest();
    let peer = Peer::start("reader");
    send(&peer.socket, "yours to read", Some(fd.as_fd()));
    for _ in 0..peer::WRITES {
        let (what, _) = peer.receive();
        assert!(what.ends_with(": refused"), "{what}");
    }
    let (sum, _) = peer.receive();
    let object = segment.reader().unwrap().object(key, ELEMENTS).unwrap();
    assert_eq!(sum, read_all(&object).to_string(), "it could read");
    assert!(object.payload().iter().all(|byte| *byte == 7), "and changed nothing");
}

fn a_reader_that_dies_holds_nothing() {
    let (segment, fd, key) = honest();
    let peer = Peer::start("reader");
    send(&peer.socket, "yours to read", Some(fd.as_fd()));
    for _ in 0..peer::WRITES {
        peer.receive();
    }
    peer.kill();
    // The ledger's keeper says that the object is no longer needed; what readers there were does not matter.
    assert!(segment.release(key.slot, key.generation));
    assert_eq!(segment.free_slots(), 2);
    let again = segment.reserve().unwrap().seal(&update()).unwrap();
    assert_eq!((again.key.slot, again.key.generation), (key.slot, 4));
}

fn releases_by_strangers_change_nothing() {
    let (segment, fd, _) = honest();
    let reader = SegmentReader::map(fd, CHAIN, ID).unwrap();
    let peer = Peer::start("release");
    let (mut true_ones, mut all) = (0, 0);
    loop {
        let (text, _) = peer.receive();
        let mut numbers = text.split(' ');
        let (Some(slot), Some(generation)) = (numbers.next(), numbers.next()) else { break };
        let (slot, generation) = (slot.parse().unwrap(), generation.parse().unwrap());
        all += 1;
        if segment.release(slot, generation) {
            true_ones += 1;
            assert_eq!((slot, generation), (0, 2), "only the live one, and that once");
        }
    }
    assert!(all > 1000 && true_ones == 1, "{true_ones} of {all}");
    assert_eq!((segment.free_slots(), segment.live_slots()), (2, 0));
    let writers: Vec<_> = std::iter::from_fn(|| segment.reserve()).collect();
    let mut slots: Vec<_> = writers.iter().map(|writer| writer.slot()).collect();
    slots.sort_unstable();
    assert_eq!(slots, [0, 1], "each is handed out, none twice");
    assert!(reader.object(key(0, 2), ELEMENTS).is_err());
}

fn mappings_end_with_their_last_handle() {
    let (segment, fd, key) = honest();
    let inode = rustix::fs::fstat(&fd).unwrap().st_ino.to_string();
    let mapped = || {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(&inode)).count()
    };
    assert_eq!(mapped(), 1);
    let reader = SegmentReader::map(&fd, CHAIN, ID).unwrap();
    let object = reader.object(key, ELEMENTS).unwrap();
    let slot = segment.reserve().unwrap();
    assert_eq!(mapped(), 2);
    drop((segment, reader));
    assert_eq!(mapped(), 2, "an object and a slot being written keep their segment");
    drop(slot);
    let bytes = object.into_bytes();
    assert_eq!((mapped(), bytes[0]), (1, 7), "and so do bytes on their way to a socket");
    drop(bytes);
    assert_eq!(mapped(), 0);
}
