//! The reader's side: a segment of a process that is not trusted.
//!
//! What is believed and why: the seals, for the kernel keeps them; the size, for the seals fix it; the segment's header,
//! once, as far as its arithmetic gives exactly that size; a slot's header, once, as far as its private copy passes every
//! check. Payload bytes are never believed: they are numbers to add, and a writer that changes them while they are read
//! spoils its own contribution and nothing else.

use std::{
    io,
    os::fd::AsFd,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use lifl_ebpf_common::{Descriptor, Kind, descriptor::ObjectKey};
use rustix::fs::SealFlags;

use crate::{
    geometry::{Geometry, GeometryError, MAGIC, VERSION, header},
    mapping::{self, At, Mapping, SINGLE_WRITER},
    object::{Element, MetaError, ObjectKind, ObjectMeta, Run},
    segment::SegmentSpec,
    seqlock,
};

/// A segment mapped read-only. A handle: clones and [`Object`]s share the mapping, the last one unmaps it.
#[derive(Clone, Debug)]
pub struct SegmentReader {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    mapping: Arc<Mapping>,
    geometry: Geometry,
    id: u32,
}

/// A sealed object whose header was checked. Keeps its segment mapped.
///
/// **Contract**: [`payload`](Self::payload) is memory that a dishonest writer can still change. Its address, its length and
/// the runs never change; the bytes may. Read each once, or copy; never take an index or a length from them.
#[derive(Clone, Debug)]
pub struct Object {
    segment: Arc<Inner>,
    key: ObjectKey,
    meta: ObjectMeta,
    at: usize,
    len: usize,
}

/// Why a file is not mapped as a segment.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Not a sealed memfd: it could shrink under the reader, or be written by anyone.
    #[error("segment lacks the seals {missing:?}: not made by a store, or not sealed")]
    Seals {
        /// What is missing.
        missing: SealFlags,
    },
    /// Header and size contradict each other.
    #[error("segment has {found} bytes, its header makes {expected}")]
    Size {
        /// Size of the file.
        found: u64,
        /// What the header's numbers make.
        expected: u64,
    },
    /// Reading would take pages in the reader's name.
    #[error("segment of {size} bytes has pages for {backed} only: its writer did not take them all")]
    Sparse {
        /// Size of the file.
        size: u64,
        /// Bytes with pages.
        backed: u64,
    },
    /// Not a segment, or of another version.
    #[error("segment header is not one: magic {magic:#x}, version {version}")]
    Header {
        /// What stands there.
        magic: u64,
        /// What stands there.
        version: u64,
    },
    /// A number beyond its type.
    #[error("segment header has {field} {value}")]
    Range {
        /// Which field.
        field: &'static str,
        /// What stands there.
        value: u64,
    },
    /// Another chain's.
    #[error("segment belongs to chain {found}, not {expected}")]
    Chain {
        /// The header's.
        found: u64,
        /// The reader's.
        expected: u32,
    },
    /// Numbers that make no segment.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The kernel refused.
    #[error("cannot map segment")]
    Io(#[from] io::Error),
}

/// Why there is no object behind a key or a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum ObjectError {
    /// The key names another segment.
    #[error("segment {asked} was asked of segment {this}")]
    Segment {
        /// The key's.
        asked: u32,
        /// This reader's.
        this: u32,
    },
    /// The key names a slot that the segment does not have.
    #[error("slot {slot} of {slots}")]
    Slot {
        /// The key's.
        slot: u32,
        /// The segment's.
        slots: u32,
    },
    /// Recycled, or never sealed.
    #[error("generation {asked} is gone or never was; the slot's word is {found}")]
    Generation {
        /// The key's.
        asked: u64,
        /// The slot's.
        found: u64,
    },
    /// The header is nonsense.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// A descriptor of this kind hands over no object.
    #[error("descriptor of kind {0} names no object to read")]
    Kind(u8),
    /// Descriptor and header contradict each other.
    #[error("descriptor and sealed header disagree about {field}: {descriptor} against {header}")]
    Disagree {
        /// About what.
        field: &'static str,
        /// What the descriptor says; of a weight the bits.
        descriptor: u64,
        /// What the header says; of a weight the bits.
        header: u64,
    },
}

// === impl SegmentReader ===

impl SegmentReader {
    /// Maps the segment that the agent numbered `id`, if it is one of `chain`.
    ///
    /// # Errors
    /// Whatever makes it unsafe or senseless to read.
    pub fn map(fd: impl AsFd, chain: u32, id: u32) -> Result<Self, MapError> {
        let seals = mapping::seals(&fd)?;
        if !seals.contains(SINGLE_WRITER) {
            return Err(MapError::Seals { missing: SINGLE_WRITER.difference(seals) });
        }
        let (size, backed) = mapping::size(&fd)?;
        let len = usize::try_from(size).ok().filter(|len| *len >= 64);
        let len = len.ok_or(MapError::Size { found: size, expected: 64 })?;
        if backed < size {
            return Err(MapError::Sparse { size, backed });
        }
        let mapping = Mapping::read_only(&fd, len)?;
        let geometry = read_geometry(&mapping, chain)?;
        if geometry.total() != len {
            return Err(MapError::Size { found: size, expected: geometry.total() as u64 });
        }
        Ok(Self::of_writer(Arc::new(mapping), geometry, id))
    }

    pub(crate) fn of_writer(mapping: Arc<Mapping>, geometry: Geometry, id: u32) -> Self {
        Self { inner: Arc::new(Inner { mapping, geometry, id }) }
    }

    /// Its number in the chain.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.inner.id
    }

    /// What the header says it was made for. `writer` is the writer's own word: compare it with who handed it over.
    #[must_use]
    pub fn spec(&self) -> SegmentSpec {
        self.inner.geometry.spec
    }

    /// Bytes of the file.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.inner.geometry.total() as u64
    }

    /// The object that `key` names, of a model of `elements` elements.
    ///
    /// # Errors
    /// No such object, or a header that makes no sense.
    pub fn object(&self, key: ObjectKey, elements: u64) -> Result<Object, ObjectError> {
        let Inner { mapping, geometry, id } = &*self.inner;
        if key.segment != *id {
            return Err(ObjectError::Segment { asked: key.segment, this: *id });
        }
        if key.slot >= geometry.spec.slots {
            return Err(ObjectError::Slot { slot: key.slot, slots: geometry.spec.slots });
        }
        let word = self.inner.word(key.slot);
        let gone = || ObjectError::Generation {
            asked: key.generation,
            found: mapping.load(geometry.state_at(key.slot), Ordering::Relaxed),
        };
        if !seqlock::holds(&word, key.generation) {
            return Err(gone());
        }
        let meta = geometry.read_meta(mapping, key.slot);
        if !seqlock::still(&word, key.generation) {
            return Err(gone());
        }
        let meta = meta?;
        meta.check(geometry.spec.payload_bytes, elements)?;
        // Checked to be no more than the slot's payload, which is a `usize`.
        let len = usize::try_from(meta.length).unwrap_or(0).min(geometry.payload());
        Ok(Object { segment: Arc::clone(&self.inner), key, meta, at: geometry.payload_at(key.slot), len })
    }

    /// The object that a descriptor hands over; descriptor and sealed header must agree.
    ///
    /// # Errors
    /// As [`Self::object`], and any contradiction between the two.
    pub fn described(&self, descriptor: &Descriptor, elements: u64) -> Result<Object, ObjectError> {
        let kind = Kind::from_u8(descriptor.kind).and_then(ObjectKind::of_descriptor);
        let kind = kind.ok_or(ObjectError::Kind(descriptor.kind))?;
        let object = self.object(descriptor.key(), elements)?;
        let meta = &object.meta;
        let agree: [(&str, u64, u64); 7] = [
            ("chain", descriptor.chain.into(), self.inner.geometry.spec.chain.into()),
            ("kind", kind as u64, meta.kind as u64),
            ("round", descriptor.round.into(), meta.round.into()),
            ("count", descriptor.count.into(), meta.count.into()),
            ("weight", descriptor.weight_bits, meta.weight.to_bits()),
            ("offset", descriptor.offset, object.at as u64),
            ("length", descriptor.length, meta.length),
        ];
        match agree.into_iter().find(|(_, said, is)| said != is) {
            Some((field, descriptor, header)) => Err(ObjectError::Disagree { field, descriptor, header }),
            None => Ok(object),
        }
    }
}

/// Copies the header, each word once, and lays it out anew.
fn read_geometry(mapping: &Mapping, chain: u32) -> Result<Geometry, MapError> {
    let load = |word: usize| mapping.load(word * 8, Ordering::Relaxed);
    let narrow = |field, value| u32::try_from(value).or(Err(MapError::Range { field, value }));
    let (magic, version) = (load(header::MAGIC), load(header::VERSION));
    if (magic, version) != (MAGIC, VERSION) {
        return Err(MapError::Header { magic, version });
    }
    let found = load(header::CHAIN);
    if found != u64::from(chain) {
        return Err(MapError::Chain { found, expected: chain });
    }
    let spec = SegmentSpec {
        chain,
        writer: narrow("writer", load(header::WRITER))?,
        slots: narrow("slots", load(header::SLOTS))?,
        payload_bytes: load(header::PAYLOAD),
        max_runs: narrow("max_runs", load(header::MAX_RUNS))?,
    };
    Ok(Geometry::of(spec)?)
}

// === impl Inner ===

impl Inner {
    fn word(&self, slot: u32) -> At<'_> {
        At { mapping: &self.mapping, at: self.geometry.state_at(slot) }
    }
}

// === impl Object ===

impl Object {
    /// The object that `descriptor` hands over, from the segment it names.
    ///
    /// # Errors
    /// As [`SegmentReader::described`].
    pub fn from_descriptor(
        segment: &SegmentReader,
        descriptor: &Descriptor,
        elements: u64,
    ) -> Result<Self, ObjectError> {
        segment.described(descriptor, elements)
    }

    /// Its name.
    #[must_use]
    pub const fn key(&self) -> ObjectKey {
        self.key
    }

    /// The private copy of its header.
    #[must_use]
    pub const fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    /// Where its elements are.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.meta.runs
    }

    /// Offset of the payload within the segment, bytes.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.at as u64
    }

    /// The bytes in use; see the contract above.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        self.segment.mapping.bytes(self.at, self.len)
    }

    /// The bytes of one of its runs; empty if `run` is not one of this object.
    #[must_use]
    pub fn run_bytes(&self, run: &Run) -> &[u8] {
        let range = || {
            let start = usize::try_from(run.offset).ok()?;
            let end = start.checked_add(usize::try_from(run.bytes()?).ok()?)?;
            self.payload().get(start..end)
        };
        range().unwrap_or_default()
    }

    /// The elements of a run of [`Element::F32`]; none if it is of another kind or not of this object.
    #[must_use]
    pub fn run_f32(&self, run: &Run) -> Option<&[f32]> {
        (run.dtype == Element::F32).then(|| mapping::as_f32(self.run_bytes(run))).filter(|all| !all.is_empty())
    }

    /// The elements of a run of [`Element::I64`]; none if it is of another kind or not of this object.
    #[must_use]
    pub fn run_i64(&self, run: &Run) -> Option<&[i64]> {
        (run.dtype == Element::I64).then(|| mapping::as_i64(self.run_bytes(run))).filter(|all| !all.is_empty())
    }

    /// The bits of a run of [`Element::F16`] or [`Element::Bf16`]; none if it is of another kind or not of this object.
    #[must_use]
    pub fn run_u16(&self, run: &Run) -> Option<&[u16]> {
        let half = matches!(run.dtype, Element::F16 | Element::Bf16);
        half.then(|| mapping::as_u16(self.run_bytes(run))).filter(|all| !all.is_empty())
    }

    /// Whether the slot still holds this object. Asked after reading: if so, an honest writer did not touch it meanwhile.
    #[must_use]
    pub fn still_valid(&self) -> bool {
        seqlock::still(&self.segment.word(self.key.slot), self.key.generation)
    }

    /// The payload as reference-counted bytes, uncopied: what an HTTP body is made of. Keeps the segment mapped.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Object {
    fn as_ref(&self) -> &[u8] {
        self.payload()
    }
}
