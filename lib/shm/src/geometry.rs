//! Where things are in a segment's file: one computation, used by the writer to lay out and by the reader to check.
//!
//! ```text
//! 0        header: 8 words
//! 64       slot headers, `stride` bytes each: 8 words, then max_runs runs of 4 words
//! pages    payloads, `payload` bytes each
//! ```

use std::sync::atomic::Ordering;

use crate::{
    mapping::Mapping,
    object::{Element, MetaError, ObjectKind, ObjectMeta, Run},
    segment::SegmentSpec,
};

/// "LIFLSEG1", little-endian.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"LIFLSEG1");
/// Version of the layout below.
pub(crate) const VERSION: u64 = 1;

const PAGE: usize = 4096;
const WORD: usize = 8;
const HEADER: usize = 8 * WORD;
const RUN_WORDS: usize = 4;
const LINE: usize = 64;

/// More slots than this in one segment is a mistake: segments are added, not stretched.
const MAX_SLOTS: u32 = 1 << 16;
/// More runs than this is a mistake: a model of 65,536 tensors of alternating dtypes.
const MAX_RUNS: u32 = 1 << 16;

/// Words of a segment's header.
pub(crate) mod header {
    pub(crate) const MAGIC: usize = 0;
    pub(crate) const VERSION: usize = 1;
    pub(crate) const CHAIN: usize = 2;
    pub(crate) const WRITER: usize = 3;
    pub(crate) const SLOTS: usize = 4;
    pub(crate) const PAYLOAD: usize = 5;
    pub(crate) const MAX_RUNS: usize = 6;
}

/// Words of a slot's header. Each number has a word of its own: a wrong one is seen, not truncated.
mod slot {
    pub(super) const STATE: usize = 0;
    pub(super) const KIND: usize = 1;
    pub(super) const ROUND: usize = 2;
    pub(super) const COUNT: usize = 3;
    pub(super) const WEIGHT: usize = 4;
    pub(super) const LENGTH: usize = 5;
    pub(super) const RUNS: usize = 6;
    pub(super) const WORDS: usize = 8;
}

/// The numbers of a spec are nonsense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("segment of {} slots of {} bytes with {} runs: {what}", spec.slots, spec.payload_bytes, spec.max_runs)]
pub struct GeometryError {
    /// The spec.
    pub spec: SegmentSpec,
    /// What is wrong with it.
    pub what: &'static str,
}

/// The layout of one segment. A private copy: shared memory is never asked again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) spec: SegmentSpec,
    stride: usize,
    payload: usize,
    base: usize,
    total: usize,
}

// === impl Geometry ===

impl Geometry {
    /// Lays `spec` out, its payload rounded up to whole pages.
    pub(crate) fn of(spec: SegmentSpec) -> Result<Self, GeometryError> {
        let fail = |what| GeometryError { spec, what };
        if spec.slots == 0 || spec.slots > MAX_SLOTS {
            return Err(fail("slots must be 1 to 65536"));
        }
        if spec.max_runs > MAX_RUNS {
            return Err(fail("at most 65536 runs"));
        }
        if spec.payload_bytes == 0 {
            return Err(fail("a slot needs a payload"));
        }
        Self::arithmetic(spec).ok_or_else(|| fail("sizes overflow"))
    }

    fn arithmetic(mut spec: SegmentSpec) -> Option<Self> {
        let payload = usize::try_from(spec.payload_bytes).ok()?.checked_next_multiple_of(PAGE)?;
        spec.payload_bytes = u64::try_from(payload).ok()?;
        let slots = usize::try_from(spec.slots).ok()?;
        let runs = usize::try_from(spec.max_runs).ok()?.checked_mul(RUN_WORDS)?;
        let stride = slot::WORDS.checked_add(runs)?.checked_mul(WORD)?.checked_next_multiple_of(LINE)?;
        let base = stride.checked_mul(slots)?.checked_add(HEADER)?.checked_next_multiple_of(PAGE)?;
        let total = payload.checked_mul(slots)?.checked_add(base)?;
        isize::try_from(total).ok()?;
        Some(Self { spec, stride, payload, base, total })
    }

    /// Bytes of the file.
    pub(crate) const fn total(&self) -> usize {
        self.total
    }

    /// Bytes of one payload.
    pub(crate) const fn payload(&self) -> usize {
        self.payload
    }

    /// Where the payload of `index` starts. `index` is below `spec.slots`: callers have checked it.
    pub(crate) const fn payload_at(&self, index: u32) -> usize {
        self.base + self.payload * index as usize
    }

    /// Where the state word of `index` is.
    pub(crate) const fn state_at(&self, index: u32) -> usize {
        self.slot_at(index, slot::STATE)
    }

    const fn slot_at(&self, index: u32, word: usize) -> usize {
        HEADER + self.stride * index as usize + word * WORD
    }

    /// Writes the header of the segment.
    pub(crate) fn write_header(&self, mapping: &Mapping) {
        let words = [
            (header::MAGIC, MAGIC),
            (header::VERSION, VERSION),
            (header::CHAIN, self.spec.chain.into()),
            (header::WRITER, self.spec.writer.into()),
            (header::SLOTS, self.spec.slots.into()),
            (header::PAYLOAD, self.spec.payload_bytes),
            (header::MAX_RUNS, self.spec.max_runs.into()),
        ];
        for (word, value) in words {
            mapping.store(word * WORD, value, Ordering::Relaxed);
        }
    }

    /// Writes all of a slot's header but its state.
    pub(crate) fn write_meta(&self, mapping: &Mapping, index: u32, meta: &ObjectMeta) {
        let words = [
            (slot::KIND, meta.kind as u64),
            (slot::ROUND, meta.round.into()),
            (slot::COUNT, meta.count.into()),
            (slot::WEIGHT, meta.weight.to_bits()),
            (slot::LENGTH, meta.length),
            (slot::RUNS, meta.runs.len() as u64),
        ];
        for (word, value) in words {
            mapping.store(self.slot_at(index, word), value, Ordering::Relaxed);
        }
        for (n, run) in meta.runs.iter().enumerate() {
            let at = slot::WORDS + n * RUN_WORDS;
            for (word, value) in [run.first, run.elements, run.offset, run.dtype as u64].into_iter().enumerate() {
                mapping.store(self.slot_at(index, at + word), value, Ordering::Relaxed);
            }
        }
    }

    /// Copies a slot's header, each word once. Only what has no meaning at all is refused here; the copy is then checked.
    pub(crate) fn read_meta(&self, mapping: &Mapping, index: u32) -> Result<ObjectMeta, MetaError> {
        let load = |word| mapping.load(self.slot_at(index, word), Ordering::Relaxed);
        let narrow = |field, value| u32::try_from(value).or(Err(MetaError::Range { field, value }));
        let kind = load(slot::KIND);
        let found = load(slot::RUNS);
        if found > u64::from(self.spec.max_runs) {
            return Err(MetaError::Runs { found, allowed: "no more than the segment has room for" });
        }
        let count = usize::try_from(found).unwrap_or(0);
        let mut runs = Vec::with_capacity(count);
        for n in 0..count {
            let at = slot::WORDS + n * RUN_WORDS;
            let code = load(at + 3);
            let dtype = Element::from_code(code).ok_or(MetaError::Dtype { run: n, code })?;
            runs.push(Run { first: load(at), elements: load(at + 1), offset: load(at + 2), dtype });
        }
        Ok(ObjectMeta {
            kind: ObjectKind::from_code(kind).ok_or(MetaError::Kind(kind))?,
            round: narrow("round", load(slot::ROUND))?,
            count: narrow("count", load(slot::COUNT))?,
            weight: f64::from_bits(load(slot::WEIGHT)),
            length: load(slot::LENGTH),
            runs,
        })
    }
}
