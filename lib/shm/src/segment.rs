//! The writer's side: a segment of slots, each reserved, filled, sealed and, when the ledger says so, released.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use lifl_ebpf_common::{Descriptor, Kind, descriptor::ObjectKey};

use crate::{
    geometry::{Geometry, GeometryError},
    mapping::{self, At, Exclusive, FIXED_SIZE, Mapping, SINGLE_WRITER},
    object::{MetaError, ObjectKind, ObjectMeta},
    reader::SegmentReader,
    seqlock,
};

/// What a segment is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentSpec {
    /// Chain that may read it.
    pub chain: u32,
    /// Role of its writer in the chain.
    pub writer: u32,
    /// Objects it can hold at a time.
    pub slots: u32,
    /// Bytes for each, rounded up to whole pages.
    pub payload_bytes: u64,
    /// Runs that each can have.
    pub max_runs: u32,
}

/// A segment, mapped for writing by the process that made it. A handle: clones name the same segment.
///
/// Once the last handle and the last [`SlotWriter`] are gone it is unmapped; readers keep what they have mapped.
#[derive(Clone, Debug)]
pub struct Segment {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    mapping: Arc<Mapping>,
    geometry: Geometry,
    /// Given by the agent after the segment exists.
    id: OnceLock<u32>,
    table: Mutex<Table>,
}

/// What the writer believes of its slots; the shared words only follow it.
#[derive(Debug)]
struct Table {
    /// Used as a stack: the slot released last is the one whose pages are still in some cache.
    free: Vec<u32>,
    slots: Vec<Slot>,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// The word in shared memory: odd while empty or being written, even while live.
    word: u64,
}

/// A slot being written: owned, sendable, exclusive. Dropped unsealed, it goes back.
#[derive(Debug)]
pub struct SlotWriter {
    segment: Segment,
    slot: u32,
    payload: Exclusive,
    /// Sealed slots do not go back on drop.
    sealed: bool,
}

/// A sealed object, as its writer announces it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sealed {
    /// Its name.
    pub key: ObjectKey,
    /// Chain.
    pub chain: u32,
    /// What it is.
    pub kind: ObjectKind,
    /// Round of the job.
    pub round: u32,
    /// Client updates contained.
    pub count: u32,
    /// Sum of their weights.
    pub weight: f64,
    /// Offset of the payload within the segment, bytes.
    pub offset: u64,
    /// Bytes of the payload in use.
    pub length: u64,
}

/// Why there is no segment.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// Nonsense asked.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The kernel refused.
    #[error("cannot {what} a segment of {bytes} bytes")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Size of the segment.
        bytes: usize,
        /// Why not.
        source: io::Error,
    },
}

/// Why an object was not sealed; its slot went back.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum SealError {
    /// Objects are named by their segment's id, which is not set yet.
    #[error("the segment has no id yet")]
    NoId,
    /// A header that no reader would accept.
    #[error(transparent)]
    Meta(#[from] MetaError),
}

// === impl Segment ===

impl Segment {
    /// Makes a segment, takes all its pages, seals it. The file descriptor is what others map, read-only.
    ///
    /// Blocks while the kernel clears pages, about 0.5 ms per MB: not for an executor's thread.
    ///
    /// # Errors
    /// A spec that makes no sense, or what the kernel says (no memory, no descriptors).
    pub fn create(spec: SegmentSpec) -> Result<(Self, OwnedFd), SegmentError> {
        let geometry = Geometry::of(spec)?;
        let bytes = geometry.total();
        let io = |what| move |source| SegmentError::Io { what, bytes, source };
        let fd = mapping::memfd("lifl-segment", bytes).map_err(io("create"))?;
        // The size first: from here on no page of the mapping can vanish, not even by a mistake of this process.
        mapping::seal(&fd, FIXED_SIZE.difference(rustix::fs::SealFlags::SEAL)).map_err(io("seal"))?;
        let mapping = Mapping::read_write(&fd, bytes).map_err(io("map"))?;
        mapping.populate().map_err(io("populate"))?;
        geometry.write_header(&mapping);
        let word = seqlock::EMPTY;
        for slot in 0..spec.slots {
            mapping.store(geometry.state_at(slot), word, std::sync::atomic::Ordering::Release);
        }
        mapping::seal(&fd, SINGLE_WRITER).map_err(io("seal"))?;
        let table =
            Table { free: (0..spec.slots).rev().collect(), slots: (0..spec.slots).map(|_| Slot { word }).collect() };
        let inner = Inner { mapping: Arc::new(mapping), geometry, id: OnceLock::new(), table: Mutex::new(table) };
        Ok((Self { inner: Arc::new(inner) }, fd))
    }

    /// Bytes that a segment of `spec` takes: what to ask the agent for.
    ///
    /// # Errors
    /// A spec that makes no sense.
    pub fn bytes_of(spec: SegmentSpec) -> Result<u64, SegmentError> {
        Ok(Geometry::of(spec)?.total() as u64)
    }

    /// Sets the id that the agent gave. False if another one is set already.
    #[must_use]
    pub fn set_id(&self, id: u32) -> bool {
        *self.inner.id.get_or_init(|| id) == id
    }

    /// The id, once the agent gave one.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.inner.id.get().copied()
    }

    /// What it was made for; `payload_bytes` is what a slot has in fact.
    #[must_use]
    pub fn spec(&self) -> SegmentSpec {
        self.inner.geometry.spec
    }

    /// Takes a free slot, if there is one. Its bytes are what the object before it left there.
    #[must_use]
    pub fn reserve(&self) -> Option<SlotWriter> {
        let slot = self.table().free.pop()?;
        Some(SlotWriter { payload: self.inner.payload(slot), segment: self.clone(), slot, sealed: false })
    }

    /// Recycles a slot whose object nobody needs any more. False, and nothing happens, if `generation` is not the one
    /// that lives there: released already, never sealed, or not of this segment at all.
    #[must_use]
    pub fn release(&self, slot: u32, generation: u64) -> bool {
        let mut table = self.table();
        let Some(state) = usize::try_from(slot).ok().and_then(|slot| table.slots.get_mut(slot)) else {
            return false;
        };
        if !seqlock::is_sealed(generation) || state.word != generation {
            return false;
        }
        state.word += 1;
        seqlock::retract(&self.inner.word(slot), generation);
        table.free.push(slot);
        true
    }

    /// Slots that can be reserved.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        self.table().free.len()
    }

    /// Slots that hold a sealed object.
    #[must_use]
    pub fn live_slots(&self) -> usize {
        self.table().slots.iter().filter(|slot| seqlock::is_sealed(slot.word)).count()
    }

    /// Bytes of the file: what the segment costs.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.inner.geometry.total() as u64
    }

    /// Reads this segment through the writer's own mapping: no second one, no page faults. None until the id is set.
    #[must_use]
    pub fn reader(&self) -> Option<SegmentReader> {
        Some(SegmentReader::of_writer(Arc::clone(&self.inner.mapping), self.inner.geometry, self.id()?))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // No code can panic between two changes of the table, so what a panicking thread leaves is whole.
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Inner ===

impl Inner {
    fn word(&self, slot: u32) -> At<'_> {
        At { mapping: &self.mapping, at: self.geometry.state_at(slot) }
    }

    #[expect(unsafe_code, reason = "hands out the bytes of a slot that was just taken")]
    fn payload(&self, slot: u32) -> Exclusive {
        let (at, len) = (self.geometry.payload_at(slot), self.geometry.payload());
        // SAFETY: `slot` was taken from the free list under its lock and comes back only when the `SlotWriter` that owns
        // these bytes is dropped unsealed, or by `release` after sealing consumed it. Objects of earlier generations
        // were released by the ledger after their readers were done.
        unsafe { Exclusive::new(Arc::clone(&self.mapping), at, len) }
    }
}

// === impl SlotWriter ===

impl SlotWriter {
    /// The whole payload, page-aligned.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        self.payload.bytes()
    }

    /// The whole payload, page-aligned.
    #[must_use]
    pub fn payload_mut(&mut self) -> &mut [u8] {
        self.payload.bytes_mut()
    }

    /// The payload as 32-bit floats.
    #[must_use]
    pub fn payload_f32_mut(&mut self) -> &mut [f32] {
        self.payload.f32_mut()
    }

    /// The payload as 64-bit integers.
    #[must_use]
    pub fn payload_i64_mut(&mut self) -> &mut [i64] {
        self.payload.i64_mut()
    }

    /// The slot's index in its segment.
    #[must_use]
    pub const fn slot(&self) -> u32 {
        self.slot
    }

    /// The segment.
    #[must_use]
    pub const fn segment(&self) -> &Segment {
        &self.segment
    }

    /// Seals what was written: from here on it is an object, readable by everyone who has the segment.
    ///
    /// # Errors
    /// A header that readers would refuse; the slot then goes back.
    pub fn seal(mut self, meta: &ObjectMeta) -> Result<Sealed, SealError> {
        let inner = &self.segment.inner;
        let spec = inner.geometry.spec;
        let id = self.segment.id().ok_or(SealError::NoId)?;
        meta.check(spec.payload_bytes, u64::MAX)?;
        if meta.runs.len() as u64 > u64::from(spec.max_runs) {
            let found = meta.runs.len() as u64;
            return Err(MetaError::Runs { found, allowed: "no more than the segment has room for" }.into());
        }
        let generation = {
            let mut table = self.segment.table();
            let Some(state) = usize::try_from(self.slot).ok().and_then(|slot| table.slots.get_mut(slot)) else {
                return Err(SealError::NoId);
            };
            inner.geometry.write_meta(&inner.mapping, self.slot, meta);
            state.word += 1;
            seqlock::publish(&inner.word(self.slot), state.word);
            state.word
        };
        self.sealed = true;
        Ok(Sealed {
            key: ObjectKey { segment: id, slot: self.slot, generation },
            chain: spec.chain,
            kind: meta.kind,
            round: meta.round,
            count: meta.count,
            weight: meta.weight,
            offset: inner.geometry.payload_at(self.slot) as u64,
            length: meta.length,
        })
    }
}

impl Drop for SlotWriter {
    fn drop(&mut self) {
        if !self.sealed {
            self.segment.table().free.push(self.slot);
        }
    }
}

// === impl Sealed ===

impl Sealed {
    /// The descriptor that says `kind` of this object to `dst`.
    #[must_use]
    pub fn descriptor(&self, kind: Kind, dst: u32) -> Descriptor {
        Descriptor {
            round: self.round,
            count: self.count,
            offset: self.offset,
            length: self.length,
            weight_bits: self.weight.to_bits(),
            ..Descriptor::new(kind, self.chain, dst).with_key(self.key)
        }
    }
}
