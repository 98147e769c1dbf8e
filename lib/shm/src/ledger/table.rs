//! The ledger's file: words, and nothing but single stores of words, each a valid step.
//!
//! ```text
//! 0      header: magic, version, chain, capacity; word 8: the round; word 16: the last committed round + 1
//! 4096   records of 512 bytes, 64 words each; word 0 is the state, stored last
//! ```
//!
//! Every store has release order: a process that dies leaves a prefix of its stores in program order.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::atomic::Ordering,
};

use lifl_ebpf_common::descriptor::ObjectKey;

use super::{LedgerError, RoundWord};
use crate::mapping::{self, FIXED_SIZE, Mapping};

/// "LIFLLED1", little-endian.
const MAGIC: u64 = u64::from_le_bytes(*b"LIFLLED1");
const VERSION: u64 = 1;

const WORD: usize = 8;
const HEADER: usize = 4096;
pub(super) const RECORD: usize = 512;

const ROUND: usize = 8;
const COMMITTED: usize = 16;

/// More records than this is a mistake.
const MAX_RECORDS: u32 = 1 << 24;

/// Words of a record.
pub(super) mod word {
    pub(in crate::ledger) const STATE: usize = 0;
    /// Index + 1 of the record whose object contains this one; 0 if none does.
    pub(in crate::ledger) const CONTAINED: usize = 1;
    /// Who holds it (lower half), whether it is final (bit 32): one store moves an object on.
    pub(in crate::ledger) const ROUTE: usize = 2;
    /// Round (lower half), count (upper half).
    pub(in crate::ledger) const ROUND: usize = 3;
    /// Kind of object (lower half), writer's role (upper half).
    pub(in crate::ledger) const KIND: usize = 4;
    /// Segment (lower half), slot (upper half).
    pub(in crate::ledger) const KEY: usize = 5;
    pub(in crate::ledger) const GENERATION: usize = 6;
    pub(in crate::ledger) const OFFSET: usize = 7;
    pub(in crate::ledger) const LENGTH: usize = 8;
    pub(in crate::ledger) const WEIGHT: usize = 9;
    /// Bytes of the client's name (lower half), of the event's id (upper half).
    pub(in crate::ledger) const TEXT: usize = 10;
    pub(in crate::ledger) const DIGEST: usize = 11;
    pub(in crate::ledger) const CLIENT: usize = 16;
    pub(in crate::ledger) const ID: usize = 32;
    pub(in crate::ledger) const END: usize = 57;
}

const _: () = assert!(word::END * WORD <= RECORD);
const _: () = assert!(word::CLIENT * WORD + super::MAX_CLIENT <= word::ID * WORD);
const _: () = assert!(word::ID * WORD + super::MAX_ID <= word::END * WORD);

/// State of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum State {
    /// Nothing here; its other words mean nothing.
    Free = 0,
    /// An update, promised to its client.
    Admitted = 1,
    /// A sum whose inputs are being marked: undone if its gateway dies now.
    Prepared = 2,
    /// A sum, or the round's model.
    Sealed = 3,
}

/// The mapped file.
#[derive(Debug)]
pub(super) struct Table {
    mapping: Mapping,
    capacity: u32,
    chain: u32,
    /// Sees the whole file after every single store.
    #[cfg(test)]
    pub(super) after_store: Option<super::tests::Watch>,
}

/// Splits a word into its lower and upper half.
pub(super) const fn halves(word: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

/// Joins a lower and an upper half.
pub(super) const fn join(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

// === impl State ===

impl State {
    pub(super) const fn from_word(word: u64) -> Option<Self> {
        Some(match word {
            0 => Self::Free,
            1 => Self::Admitted,
            2 => Self::Prepared,
            3 => Self::Sealed,
            _ => return None,
        })
    }
}

// === impl Table ===

impl Table {
    pub(super) fn create(chain: u32, capacity: u32) -> Result<(Self, OwnedFd), LedgerError> {
        let bytes = bytes(capacity).ok_or(LedgerError::Capacity(capacity))?;
        let fd = mapping::memfd("lifl-ledger", bytes)?;
        mapping::seal(&fd, FIXED_SIZE)?;
        let mapping = Mapping::read_write(&fd, bytes)?;
        mapping.populate()?;
        let header = [MAGIC, VERSION, chain.into(), capacity.into()];
        for (word, value) in header.into_iter().enumerate().rev() {
            mapping.store(word * WORD, value, Ordering::Release);
        }
        Ok((Self::over(mapping, chain, capacity), fd))
    }

    /// Maps a ledger that another process left.
    pub(super) fn open(fd: impl AsFd, chain: u32) -> Result<Self, LedgerError> {
        if !mapping::seals(&fd)?.contains(FIXED_SIZE) {
            return Err(LedgerError::Foreign("its size is not sealed"));
        }
        let (size, _) = mapping::size(&fd)?;
        let len = usize::try_from(size).ok().filter(|len| *len >= HEADER);
        let len = len.ok_or(LedgerError::Foreign("it is too small"))?;
        let mapping = Mapping::read_write(&fd, len)?;
        let load = |word: usize| mapping.load(word * WORD, Ordering::Acquire);
        if load(0) != MAGIC || load(1) != VERSION {
            return Err(LedgerError::Foreign("it has another magic or version"));
        }
        if load(2) != u64::from(chain) {
            return Err(LedgerError::Foreign("it belongs to another chain"));
        }
        let capacity = u32::try_from(load(3)).ok().filter(|capacity| bytes(*capacity) == Some(len));
        let capacity = capacity.ok_or(LedgerError::Foreign("its capacity is not that of its size"))?;
        Ok(Self::over(mapping, chain, capacity))
    }

    fn over(mapping: Mapping, chain: u32, capacity: u32) -> Self {
        Self {
            mapping,
            capacity,
            chain,
            #[cfg(test)]
            after_store: None,
        }
    }

    #[cfg(test)]
    pub(super) fn all(&self) -> &[u8] {
        self.mapping.bytes(0, self.mapping.len())
    }

    pub(super) const fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(super) const fn chain(&self) -> u32 {
        self.chain
    }

    fn store_at(&mut self, at: usize, value: u64) {
        self.mapping.store(at, value, Ordering::Release);
        #[cfg(test)]
        if let Some(watch) = &mut self.after_store {
            watch.0(self.mapping.bytes(0, self.mapping.len()));
        }
    }

    pub(super) fn round(&self) -> RoundWord {
        RoundWord::from_word(self.mapping.load(ROUND * WORD, Ordering::Acquire))
    }

    pub(super) fn set_round(&mut self, round: RoundWord) {
        self.store_at(ROUND * WORD, round.to_word());
    }

    /// The first round that is not committed: one more than the last committed one.
    pub(super) fn uncommitted(&self) -> u64 {
        self.mapping.load(COMMITTED * WORD, Ordering::Acquire)
    }

    pub(super) fn set_uncommitted(&mut self, first: u64) {
        self.store_at(COMMITTED * WORD, first);
    }

    /// One word of a record. `index` is below the capacity: it comes from this ledger's own indexes.
    pub(super) fn get(&self, index: u32, word: usize) -> u64 {
        self.mapping.load(at(index, word), Ordering::Acquire)
    }

    pub(super) fn set(&mut self, index: u32, word: usize, value: u64) {
        self.store_at(at(index, word), value);
    }

    pub(super) fn set_state(&mut self, index: u32, state: State) {
        self.set(index, word::STATE, state as u64);
    }

    pub(super) fn key(&self, index: u32) -> ObjectKey {
        let (segment, slot) = halves(self.get(index, word::KEY));
        ObjectKey { segment, slot, generation: self.get(index, word::GENERATION) }
    }

    /// Bytes of a text field, from whole words.
    pub(super) fn set_bytes(&mut self, index: u32, word: usize, bytes: &[u8]) {
        for (n, chunk) in bytes.chunks(WORD).enumerate() {
            let mut value = [0; WORD];
            value[..chunk.len()].copy_from_slice(chunk);
            self.set(index, word + n, u64::from_le_bytes(value));
        }
    }

    pub(super) fn bytes(&self, index: u32, word: usize, len: usize) -> Vec<u8> {
        let words = (0..len.div_ceil(WORD)).flat_map(|n| self.get(index, word + n).to_le_bytes());
        words.take(len).collect()
    }
}

const fn at(index: u32, word: usize) -> usize {
    HEADER + RECORD * index as usize + WORD * word
}

fn bytes(capacity: u32) -> Option<usize> {
    let fits = capacity > 0 && capacity <= MAX_RECORDS;
    fits.then(|| (HEADER + RECORD * capacity as usize).next_multiple_of(4096))
}
