//! The lock-free part: one word per slot tells readers whether the generation they were promised is still there.
//!
//! The word is written by the segment's writer only. Odd: empty or being written. Even: sealed, and the value is the
//! generation in the key. A generation is never used twice.
//!
//! ```text
//!   1 ──publish(2)──> 2 ──retract(2)──> 3 ──publish(4)──> 4 ...
//! ```
//!
//! It is a seqlock whose readers may hold on to the data: honest parties recycle a slot only after its readers are
//! done (the ledger says when), so [`still`] finds what a dishonest or mistaken writer did. Generic over the word so
//! that `tests/loom.rs` explores the very functions that run in production.

use std::sync::atomic::{AtomicU64, Ordering};

/// An atomic 64-bit word and the fence that belongs to it.
pub trait Word {
    /// Atomic load.
    fn load(&self, order: Ordering) -> u64;
    /// Atomic store.
    fn store(&self, value: u64, order: Ordering);
    /// Fence.
    fn fence(order: Ordering);
}

/// The word of a slot that was never sealed.
pub const EMPTY: u64 = 1;

/// Whether a generation can name an object at all.
#[must_use]
pub const fn is_sealed(generation: u64) -> bool {
    generation != 0 && generation.is_multiple_of(2)
}

/// Writer: everything stored before is visible to whoever then sees `generation`.
pub fn publish<W: Word>(word: &W, generation: u64) {
    debug_assert!(is_sealed(generation));
    word.store(generation, Ordering::Release);
}

/// Writer: takes the slot back; nothing stored after is visible to a reader for whom [`still`] holds.
pub fn retract<W: Word>(word: &W, generation: u64) {
    word.store(generation + 1, Ordering::Relaxed);
    W::fence(Ordering::Release);
}

/// Reader, before reading: the slot holds `generation` and everything that was sealed with it is visible.
pub fn holds<W: Word>(word: &W, generation: u64) -> bool {
    is_sealed(generation) && word.load(Ordering::Acquire) == generation
}

/// Reader, after reading: nothing that was read came from a later generation.
pub fn still<W: Word>(word: &W, generation: u64) -> bool {
    W::fence(Ordering::Acquire);
    word.load(Ordering::Relaxed) == generation
}

// === impl AtomicU64 ===

impl Word for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        AtomicU64::load(self, order)
    }

    fn store(&self, value: u64, order: Ordering) {
        AtomicU64::store(self, value, order);
    }

    fn fence(order: Ordering) {
        std::sync::atomic::fence(order);
    }
}
