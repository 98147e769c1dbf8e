//! Publish, validate, recycle: every interleaving and every reordering that the memory model allows, of the very functions
//! that run in production. `RUSTFLAGS="--cfg loom" cargo test --release -p lifl-shm --test loom`
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "clippy knows tests, not the functions that they share")]

use std::sync::atomic::Ordering::{self, Relaxed};

use lifl_shm::seqlock::{self, EMPTY, Word};
use loom::sync::{Arc, atomic::AtomicU64};

struct Checked(AtomicU64);

/// Forgets the fences: what the models must catch.
struct Unfenced(AtomicU64);

struct Slot<W> {
    word: W,
    header: AtomicU64,
    payload: AtomicU64,
}

impl Word for Checked {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, order);
    }

    fn fence(order: Ordering) {
        loom::sync::atomic::fence(order);
    }
}

impl Word for Unfenced {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, order);
    }

    fn fence(_: Ordering) {}
}

impl<W: Word> Slot<W> {
    fn new(word: fn(AtomicU64) -> W) -> Self {
        Self { word: word(AtomicU64::new(EMPTY)), header: AtomicU64::new(0), payload: AtomicU64::new(0) }
    }

    fn seal(&self, generation: u64) {
        self.payload.store(generation, Relaxed);
        self.header.store(generation, Relaxed);
        seqlock::publish(&self.word, generation);
    }

    fn read(&self, generation: u64) -> Option<(u64, u64)> {
        if !seqlock::holds(&self.word, generation) {
            return None;
        }
        let read = (self.header.load(Relaxed), self.payload.load(Relaxed));
        seqlock::still(&self.word, generation).then_some(read)
    }
}

/// A reader that was told of generation 2 while the writer, mistaken or dishonest, recycles the slot.
fn recycled_under_a_reader<W: Word + Send + Sync + 'static>(word: fn(AtomicU64) -> W) {
    loom::model(move || {
        let slot = Arc::new(Slot::new(word));
        slot.seal(2);
        let reader = {
            let slot = Arc::clone(&slot);
            loom::thread::spawn(move || slot.read(2))
        };
        seqlock::retract(&slot.word, 2);
        slot.seal(4);
        let read = reader.join().unwrap();
        assert!(read.is_none_or(|read| read == (2, 2)), "a mixture passed for generation 2: {read:?}");
    });
}

#[test]
fn a_recycled_slot_is_noticed() {
    recycled_under_a_reader(Checked);
}

#[test]
#[should_panic(expected = "a mixture passed")]
fn without_fences_it_is_not() {
    recycled_under_a_reader(Unfenced);
}

#[test]
fn what_is_seen_sealed_is_seen_whole() {
    loom::model(|| {
        let slot = Arc::new(Slot::new(Checked));
        let readers = [2, 4].map(|generation| {
            let slot = Arc::clone(&slot);
            loom::thread::spawn(move || (generation, slot.read(generation)))
        });
        slot.seal(2);
        seqlock::retract(&slot.word, 2);
        slot.seal(4);
        for reader in readers {
            let (generation, read) = reader.join().unwrap();
            assert!(read.is_none_or(|read| read == (generation, generation)));
        }
        assert_eq!((slot.read(2), slot.read(4)), (None, Some((4, 4))));
    });
}

#[test]
fn an_odd_or_zero_generation_is_never_held() {
    loom::model(|| {
        let slot = Slot::new(Checked);
        assert_eq!((slot.read(0), slot.read(EMPTY)), (None, None));
        slot.seal(2);
        seqlock::retract(&slot.word, 2);
        assert_eq!((slot.read(2), slot.read(3)), (None, None));
    });
}
