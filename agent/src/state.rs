//! What the agent knows: chains, their members, their segments. No await here.

use std::{collections::BTreeMap, os::fd::OwnedFd, sync::Arc};

use lifl_api::node::RoleConfig;
use lifl_daemon::Channel;
use lifl_ebpf_common::maps::{Counters, DropReason};
use lifl_shm::Quota;
use serde::{Deserialize, Serialize};

/// Seat of the gateway in the path.
pub(crate) const GATEWAY_SEAT: u32 = 0;

/// A chain on this node.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) meta: ChainMeta,
    /// By role.
    pub(crate) members: BTreeMap<u32, Member>,
    pub(crate) segments: BTreeMap<u32, Segment>,
    /// Deaths since the plan was last complete: many mean that it cannot be carried out.
    pub(crate) deaths: u32,
    pub(crate) folded_ns: u64,
}

/// What is deposited of a chain.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ChainMeta {
    pub(crate) namespace: String,
    pub(crate) job: String,
    pub(crate) quota: u64,
    pub(crate) next_segment: u32,
    pub(crate) revision: u64,
    pub(crate) plan: Vec<RoleConfig>,
}

/// A function in a role.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) meta: MemberMeta,
    pub(crate) channel: Arc<Channel>,
    pub(crate) pidfd: Arc<OwnedFd>,
    /// End A of its data socket, until it is handed over.
    pub(crate) socket: Option<OwnedFd>,
    /// An earlier agent started it.
    pub(crate) adopted: bool,
    /// What it said before it ended.
    pub(crate) last_words: Option<String>,
}

/// What is deposited of a function.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MemberMeta {
    pub(crate) chain: u32,
    /// Index of its counters, and its seat in the path.
    pub(crate) seat: u32,
    pub(crate) pid: i32,
    pub(crate) config: RoleConfig,
    /// It has its socket and took its role.
    pub(crate) settled: bool,
}

/// A segment of a chain.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) meta: SegmentMeta,
    pub(crate) fd: Option<OwnedFd>,
}

/// What is deposited of a segment.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct SegmentMeta {
    pub(crate) writer: u32,
    /// Seat of the process that writes it.
    pub(crate) seat: u32,
    pub(crate) bytes: u64,
    /// Its writer is dead; dropped after so many more rounds of the top.
    pub(crate) orphan: Option<u8>,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) chains: BTreeMap<u32, Chain>,
    pub(crate) quota: Quota,
    pub(crate) shm_peak: u64,
    /// Descriptors, bytes and drops of members that are gone.
    pub(crate) gone: (u64, u64, [u64; DropReason::COUNT]),
}

// === impl State ===

impl State {
    pub(crate) fn new(shm_limit: u64) -> Self {
        Self {
            chains: BTreeMap::new(),
            quota: Quota::new(shm_limit),
            shm_peak: 0,
            gone: (0, 0, [0; DropReason::COUNT]),
        }
    }

    /// Where the function on a seat works: chain and role.
    pub(crate) fn find(&self, seat: u32) -> Option<(u32, u32)> {
        self.chains.iter().find_map(|(id, chain)| {
            let (role, _) = chain.members.iter().find(|(_, member)| member.meta.seat == seat)?;
            Some((*id, *role))
        })
    }

    /// The function on a seat.
    pub(crate) fn member(&mut self, seat: u32) -> Option<&mut Member> {
        let (chain, role) = self.find(seat)?;
        self.chains.get_mut(&chain)?.members.get_mut(&role)
    }

    /// A seat that nobody has; the gateway's is never given.
    pub(crate) fn free_seat(&self, seats: u32) -> Option<u32> {
        let taken: std::collections::BTreeSet<u32> =
            self.chains.values().flat_map(|chain| chain.members.values().map(|member| member.meta.seat)).collect();
        (GATEWAY_SEAT + 1..seats).find(|seat| !taken.contains(seat))
    }

    /// Bytes of all segments.
    pub(crate) fn shm_bytes(&self) -> u64 {
        self.chains.keys().map(|chain| self.quota.used_by(*chain)).sum()
    }

    /// Keeps what a member's counters said before its seat is used again.
    pub(crate) fn remember(&mut self, counters: Counters) {
        self.gone.0 += counters.messages;
        self.gone.1 += counters.bytes;
        self.gone.2.iter_mut().zip(counters.drops).for_each(|(sum, one)| *sum += one);
    }

    /// Notes the largest amount of shared memory so far.
    pub(crate) fn note_peak(&mut self) {
        self.shm_peak = self.shm_peak.max(self.shm_bytes());
    }
}

// === impl Chain ===

impl Chain {
    pub(crate) fn new(meta: ChainMeta) -> Self {
        Self { meta, members: BTreeMap::new(), segments: BTreeMap::new(), deaths: 0, folded_ns: 0 }
    }

    /// All planned functions run in their roles.
    pub(crate) fn is_settled(&self) -> bool {
        self.members.len() == self.meta.plan.len()
            && self.meta.plan.iter().all(|config| {
                self.members
                    .get(&config.role)
                    .is_some_and(|member| member.meta.settled && member.meta.config == *config)
            })
    }
}
