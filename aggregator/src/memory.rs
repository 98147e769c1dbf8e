//! The memory an aggregator sees: its own slots, and the segments of its chain's members.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use lifl_api::node::{RoleConfig, ToAgent};
use lifl_daemon::{ChannelError, SyncChannel};
use lifl_ebpf_common::{Descriptor, descriptor::ObjectKey, role};
use lifl_shm::{Arena, Growth, MapError, Object, ObjectError, Segment, SegmentReader, SegmentSpec, SlotWriter};

/// Sums that take turns.
const SUM_SLOTS: u64 = 2;
/// The top also writes a model while the one before it is still served.
const MODEL_SLOTS: u64 = 2;

/// Rounds after a change of role in which something written before may still be read.
const RETIRED_ROUNDS: u32 = 2;

/// What the aggregator can read and write.
#[derive(Debug)]
pub(crate) struct Memory {
    arena: Arena,
    asked: Option<u64>,
    next_request: u64,
    /// The agent refused the last request.
    pub(crate) refused: bool,
    segments: HashMap<u32, SegmentReader>,
    /// A new segment that the agent does not keep yet: what is sealed in it could die with this process.
    pending: Option<(u32, Growth)>,
    /// Own segments and their bytes, to be told again to a restarted agent.
    own: BTreeMap<u32, (OwnedFd, u64)>,
    /// Segments written in an earlier role, and the round from which on nothing in them is needed.
    retired: Vec<(u32, u32)>,
    elements: u64,
}

/// An object that a descriptor named cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// Its segment is not known (yet).
    #[error("segment {0} is not known")]
    Segment(u32),
    /// It is not what the descriptor says.
    #[error(transparent)]
    Object(#[from] ObjectError),
}

// === impl Memory ===

impl Memory {
    /// Memory for the role; nothing is taken before it is needed.
    pub(crate) fn new(chain: u32, config: &RoleConfig) -> Self {
        let element = if config.fixed_scale.is_some() { 8 } else { 4 };
        let spec = SegmentSpec {
            chain,
            writer: config.role,
            slots: 1,
            payload_bytes: (config.elements * element).max(config.model_bytes),
            max_runs: config.max_runs.max(1),
        };
        let slots = SUM_SLOTS + if config.role == role::TOP { MODEL_SLOTS } else { 0 };
        let each = Segment::bytes_of(spec).unwrap_or(u64::MAX);
        Self {
            arena: Arena::new(spec, each.saturating_mul(slots)),
            asked: None,
            next_request: 1,
            refused: false,
            segments: HashMap::new(),
            pending: None,
            own: BTreeMap::new(),
            retired: Vec::new(),
            elements: config.elements,
        }
    }

    /// Another role, or other bounds. Segments belong to the role that they were written in: what is sealed there stays
    /// readable, new objects lie in new ones.
    pub(crate) fn resize(&mut self, chain: u32, config: &RoleConfig, round: u32) {
        let fresh = Self::new(chain, config);
        if self.arena.spec() == fresh.arena.spec() {
            self.arena.set_limit(fresh.arena.limit());
        } else {
            self.arena = fresh.arena;
            self.pending = None;
            // A model of the last round is served until the next one is committed, a partial not so long.
            let known = |retired: &[(u32, u32)], id| retired.iter().any(|(old, _)| *old == id);
            let new: Vec<u32> = self.own.keys().copied().filter(|id| !known(&self.retired, *id)).collect();
            self.retired.extend(new.into_iter().map(|id| (id, round.saturating_add(RETIRED_ROUNDS))));
        }
        self.elements = fresh.elements;
    }

    /// Gives back segments of an earlier role that nobody needs in this round.
    pub(crate) fn drop_retired(&mut self, round: u32, agent: &SyncChannel) -> Result<(), ChannelError> {
        let chain = self.arena.spec().chain;
        let (over, kept) = std::mem::take(&mut self.retired).into_iter().partition(|(_, from)| *from <= round);
        self.retired = kept;
        let over: Vec<(u32, u32)> = over;
        for (segment, _) in over {
            self.own.remove(&segment);
            agent.send(&ToAgent::DropSegment { chain, segment }, &[])?;
        }
        Ok(())
    }

    /// A free slot, if there is one: the agent is asked for nothing.
    pub(crate) fn free_slot(&self) -> Option<SlotWriter> {
        self.arena.reserve()
    }

    /// A free slot; without one the agent is asked for a segment, and there will be one when it answers or when an object
    /// is released.
    pub(crate) fn reserve(&mut self, agent: &SyncChannel) -> Result<Option<SlotWriter>, ChannelError> {
        if let Some(slot) = self.arena.reserve() {
            return Ok(Some(slot));
        }
        let spec = self.arena.spec();
        let bytes = Segment::bytes_of(spec).unwrap_or(u64::MAX);
        if self.asked.is_none() && self.pending.is_none() && self.arena.bytes() + bytes <= self.arena.limit() {
            let request = self.next_request;
            self.next_request += 1;
            self.asked = Some(request);
            self.refused = false;
            agent.send(&ToAgent::Grant { request, chain: spec.chain, bytes }, &[])?;
        }
        Ok(None)
    }

    /// The agent granted a segment: makes it and hands it over.
    pub(crate) fn granted(&mut self, request: u64, id: u32, agent: &SyncChannel) -> Result<(), ChannelError> {
        if self.asked.take_if(|asked| *asked == request).is_none() {
            return Ok(());
        }
        let chain = self.arena.spec().chain;
        let made = self.arena.grow().map_err(io::Error::other);
        match made.and_then(|growth| Ok((growth.fd().try_clone_to_owned()?, growth))) {
            Ok((fd, growth)) => {
                let bytes = growth.bytes();
                agent.send(&ToAgent::Segment { chain, segment: id, bytes }, &[growth.fd()])?;
                self.own.insert(id, (fd, bytes));
                self.pending = Some((id, growth));
            }
            Err(error) => {
                tracing::error!(%error, "segment granted but not made");
                agent.send(&ToAgent::DropSegment { chain, segment: id }, &[])?;
                self.refused = true;
            }
        }
        Ok(())
    }

    /// The agent keeps the segment: its slots may be used.
    pub(crate) fn kept(&mut self, id: u32) {
        if let Some((_, growth)) = self.pending.take_if(|(pending, _)| *pending == id)
            && let Err(error) = growth.admit(id)
        {
            tracing::error!(%error, segment = id, "granted segment");
        }
    }

    /// The agent refused: its quota is used up for now.
    pub(crate) fn was_refused(&mut self, request: u64) {
        if self.asked.take_if(|asked| *asked == request).is_some() {
            self.refused = true;
        }
    }

    /// The agent was restarted: it may have died with a segment in its hands, and forgot what it was asked.
    pub(crate) fn tell_again(&mut self, agent: &SyncChannel) -> Result<(), ChannelError> {
        self.asked = None;
        let chain = self.arena.spec().chain;
        for (segment, (fd, bytes)) in &self.own {
            agent.send(&ToAgent::Segment { chain, segment: *segment, bytes: *bytes }, &[fd.as_fd()])?;
        }
        Ok(())
    }

    /// Maps a member's segment.
    pub(crate) fn map(&mut self, chain: u32, id: u32, fd: OwnedFd) -> Result<(), MapError> {
        if self.arena.segment(id).is_none() && !self.segments.contains_key(&id) {
            self.segments.insert(id, SegmentReader::map(fd, chain, id)?);
        }
        Ok(())
    }

    /// Unmaps a member's segment.
    pub(crate) fn unmap(&mut self, id: u32) {
        self.segments.remove(&id);
    }

    /// Recycles an own slot.
    pub(crate) fn release(&self, key: ObjectKey) -> bool {
        self.arena.release(key)
    }

    /// The object that a descriptor hands over, checked.
    pub(crate) fn described(&self, descriptor: &Descriptor) -> Result<Object, ReadError> {
        Ok(self.reader(descriptor.segment)?.described(descriptor, self.elements)?)
    }

    /// An object by its name.
    pub(crate) fn object(&self, key: ObjectKey) -> Result<Object, ReadError> {
        Ok(self.reader(key.segment)?.object(key, self.elements)?)
    }

    fn reader(&self, id: u32) -> Result<SegmentReader, ReadError> {
        let own = self.arena.segment(id).and_then(|segment| segment.reader());
        own.or_else(|| self.segments.get(&id).cloned()).ok_or(ReadError::Segment(id))
    }
}
