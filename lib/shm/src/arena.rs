//! The segments of one (writer, chain): grows by whole segments as far as the agent grants, shrinks by whole segments
//! that hold nothing.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lifl_ebpf_common::descriptor::ObjectKey;

use crate::segment::{Segment, SegmentError, SegmentSpec, SlotWriter};

/// A set of segments of one spec. A handle: clones name the same arena.
#[derive(Clone, Debug)]
pub struct Arena {
    spec: SegmentSpec,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    segments: Vec<Segment>,
    /// Bytes of the segments, and of those that still wait for their id.
    bytes: u64,
    limit: u64,
}

/// A segment that exists but has no id yet: hand [`Self::fd`] to the agent, then [`admit`](Self::admit) it under the id
/// the agent gave. Dropped, it is unmade.
#[derive(Debug)]
pub struct Growth {
    arena: Arena,
    segment: Segment,
    fd: OwnedFd,
    admitted: bool,
}

/// Why an arena does not grow.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The limit is reached.
    #[error("arena is full: {used} of {limit} bytes used, a segment takes {asked}")]
    Limit {
        /// Bytes of its segments.
        used: u64,
        /// Bytes allowed.
        limit: u64,
        /// Bytes of one more segment.
        asked: u64,
    },
    /// An id that another segment of this arena has.
    #[error("segment id {0} is taken")]
    Id(u32),
    /// No segment could be made.
    #[error(transparent)]
    Segment(#[from] SegmentError),
}

// === impl Arena ===

impl Arena {
    /// An empty arena that may hold `limit` bytes in segments of `spec`.
    #[must_use]
    pub fn new(spec: SegmentSpec, limit: u64) -> Self {
        Self { spec, state: Arc::new(Mutex::new(State { segments: Vec::new(), bytes: 0, limit })) }
    }

    /// Takes a free slot of any segment, the oldest segment first, so that younger ones can run empty.
    #[must_use]
    pub fn reserve(&self) -> Option<SlotWriter> {
        self.state().segments.iter().find_map(Segment::reserve)
    }

    /// Recycles the slot of an object that nobody needs any more. False if the object does not live here.
    #[must_use]
    pub fn release(&self, key: ObjectKey) -> bool {
        self.segment(key.segment).is_some_and(|segment| segment.release(key.slot, key.generation))
    }

    /// Makes one more segment. Blocks as [`Segment::create`] does.
    ///
    /// # Errors
    /// The limit, or the kernel.
    pub fn grow(&self) -> Result<Growth, ArenaError> {
        let asked = Segment::bytes_of(self.spec)?;
        {
            let mut state = self.state();
            let sum = state.bytes.checked_add(asked).filter(|sum| *sum <= state.limit);
            state.bytes = sum.ok_or(ArenaError::Limit { used: state.bytes, limit: state.limit, asked })?;
        }
        match Segment::create(self.spec) {
            Ok((segment, fd)) => Ok(Growth { arena: self.clone(), segment, fd, admitted: false }),
            Err(error) => {
                self.state().bytes -= asked;
                Err(error.into())
            }
        }
    }

    /// Drops the youngest segments that hold nothing until `keep` bytes remain, and says which: their ids go to the agent.
    /// A segment with an object, or with a slot being written, stays.
    #[must_use]
    pub fn trim(&self, keep: u64) -> Vec<u32> {
        let mut state = self.state();
        let mut dropped = Vec::new();
        for index in (0..state.segments.len()).rev() {
            let segment = &state.segments[index];
            let idle = segment.free_slots() == self.spec.slots as usize;
            let bytes = segment.bytes();
            if idle && state.bytes - bytes >= keep {
                dropped.extend(segment.id());
                state.bytes -= bytes;
                state.segments.remove(index);
            }
        }
        dropped
    }

    /// The segment of this arena with the id.
    #[must_use]
    pub fn segment(&self, id: u32) -> Option<Segment> {
        self.state().segments.iter().find(|segment| segment.id() == Some(id)).cloned()
    }

    /// What its segments are made for.
    #[must_use]
    pub const fn spec(&self) -> SegmentSpec {
        self.spec
    }

    /// Slots that can be reserved.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        self.state().segments.iter().map(Segment::free_slots).sum()
    }

    /// Slots that hold a sealed object.
    #[must_use]
    pub fn live_slots(&self) -> usize {
        self.state().segments.iter().map(Segment::live_slots).sum()
    }

    /// Bytes of all its segments.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.state().bytes
    }

    /// Bytes it may hold.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.state().limit
    }

    /// Sets what it may hold. Segments that exist stay.
    pub fn set_limit(&self, limit: u64) {
        self.state().limit = limit;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code can panic between two changes of the state, so what a panicking thread leaves is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Growth ===

impl Growth {
    /// What others map; the agent hands it on.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// What the segment costs.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.segment.bytes()
    }

    /// Adds the segment to its arena under the agent's id and returns it with its descriptor.
    ///
    /// # Errors
    /// The id is taken.
    pub fn admit(mut self, id: u32) -> Result<(Segment, OwnedFd), ArenaError> {
        let fd = self.fd.try_clone().map_err(|source| {
            let bytes = usize::try_from(self.segment.bytes()).unwrap_or(0);
            SegmentError::Io { what: "share", bytes, source }
        })?;
        let mut state = self.arena.state();
        if state.segments.iter().any(|segment| segment.id() == Some(id)) || !self.segment.set_id(id) {
            return Err(ArenaError::Id(id));
        }
        state.segments.push(self.segment.clone());
        drop(state);
        self.admitted = true;
        Ok((self.segment.clone(), fd))
    }
}

impl Drop for Growth {
    fn drop(&mut self) {
        if !self.admitted {
            self.arena.state().bytes -= self.segment.bytes();
        }
    }
}
