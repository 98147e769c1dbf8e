//! The object store of a chain: sealed memfd segments, slots with generations, and the ledger.
//!
//! One process writes a segment, others of the same chain map it read-only; an object is a sealed slot, named by
//! [`ObjectKey`] (segment, slot, generation). The bytes never travel: a 64-byte descriptor names them.
//!
//! ```text
//!  writer                                              reader
//!  Arena ── Segment ── reserve ─> SlotWriter           SegmentReader::map(fd)   seals, size, geometry: once
//!    ^                               │ fill                   │
//!    │                               v seal                   v object(key)     header copied once, then checked
//!    └── release(key) <── gateway ── Sealed ── descriptor ─> Object ── payload, runs, still_valid
//!                            │
//!                          Ledger: who holds what, what contains what, which round; survives the gateway
//! ```
//!
//! A segment's file holds `header | slot headers with their runs | payloads`, each payload on pages of its own.
//! Its pages are touched by the writer when it is made (fresh pages cost 4 to 6 times the addition that reads them) and
//! slots are recycled. Four seals make it safe to read for those who do not trust the writer: it can neither shrink
//! (no `SIGBUS`) nor grow, nobody but the writer can write, and the set of seals is closed. What a hostile writer can
//! still do is change bytes under a reader: so geometry is copied once and checked, and only payload bytes may change.

const _: () = assert!(
    usize::BITS == 64 && cfg!(target_endian = "little"),
    "the layouts are those of 64-bit little-endian machines"
);

mod arena;
mod geometry;
pub mod ledger;
mod mapping;
mod object;
mod quota;
mod reader;
mod segment;
#[doc(hidden)]
pub mod seqlock;

pub use arena::{Arena, ArenaError, Growth};
pub use geometry::GeometryError;
pub use ledger::{Ledger, LedgerError, LiveObject, RecordIndex, Released, RoundWord, UpdateRecord};
pub use lifl_ebpf_common::descriptor::ObjectKey;
pub use object::{Element, MetaError, ObjectKind, ObjectMeta, RUN_ALIGN, Run};
pub use quota::{Limit, Quota, QuotaError};
pub use reader::{MapError, Object, ObjectError, SegmentReader};
pub use segment::{SealError, Sealed, Segment, SegmentError, SegmentSpec, SlotWriter};
