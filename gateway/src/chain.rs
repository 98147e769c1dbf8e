//! One federated job on this node: its document, its ledger, its slots, its clients, the model that is served.
//!
//! Everything behind one mutex, no await below it. Descriptors that a change causes are pushed while it is held, so that
//! their order is that of the changes.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use lifl_api::{
    job::{FederatedJob, Timing},
    node::{ChainState, ToGateway, Tree},
};
use lifl_ebpf::{ObjectKey, role};
use lifl_shm::{Arena, Ledger, SegmentReader};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};

use crate::{clients::Clients, layout::Measure, token::Key};

mod data;
mod first;
mod model;
mod round;
mod slots;
mod task;

pub(crate) use data::Ignored;
pub(crate) use first::{FirstModel, first_key};
pub(crate) use model::{Gone, Served};
pub(crate) use round::{Claim, Known, Verdict, check_name};
pub(crate) use slots::{Slot, grow, reserve, segment_key};

/// One job. Shared by all who serve it.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) id: u32,
    pub(crate) namespace: String,
    pub(crate) job: String,
    /// The ledger's memory, deposited again with each change of [`Meta`].
    pub(crate) ledger_fd: OwnedFd,
    /// A slot came back, or a segment came.
    pub(crate) slot_freed: Notify,
    /// Long polls look again.
    pub(crate) changed: watch::Sender<u64>,
    /// A segment is being asked for.
    pub(crate) growing: AtomicBool,
    /// Its job is no more.
    pub(crate) removed: AtomicBool,
    /// ... here, in this chain; what its journal promises is another chain's to keep.
    pub(crate) lost: AtomicBool,
    /// The coordinator is about to be told of admissions.
    pub(crate) progress: AtomicBool,
    /// Words of the coordinator, worked off one after another.
    pub(crate) words: mpsc::UnboundedSender<(ToGateway, Vec<OwnedFd>)>,
    inner: Mutex<Inner>,
}

/// What a successor must know besides the ledger; deposited before its effect is visible.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Meta {
    pub(crate) job: FederatedJob,
    pub(crate) token_key: String,
    pub(crate) join_secret: Option<String>,
    pub(crate) slot_bytes: u64,
    pub(crate) model: Option<ModelMeta>,
    /// A model that was replaced, and may not be released yet.
    pub(crate) previous: Option<ModelMeta>,
    pub(crate) open: Option<OpenMeta>,
    /// Succeeded or not, and why.
    pub(crate) finish: Option<(bool, String)>,
}

/// A model object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ModelMeta {
    pub(crate) round: u32,
    pub(crate) sha256: String,
    pub(crate) segment: u32,
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) writer: u32,
}

/// The round that was opened last.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct OpenMeta {
    pub(crate) round: u32,
    pub(crate) selected: HashSet<String>,
    pub(crate) goal: u32,
    pub(crate) deadline_ms: i64,
    pub(crate) tree: Tree,
}

/// A segment of another member.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) reader: SegmentReader,
    pub(crate) fd: OwnedFd,
    pub(crate) writer: u32,
}

/// A segment of our own: new ones in the arena, those of an earlier life with a reader.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) fd: OwnedFd,
    pub(crate) bytes: u64,
    pub(crate) old: Option<SegmentReader>,
}

/// What the mutex guards.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) chain: u32,
    pub(crate) meta: Meta,
    pub(crate) key: Key,
    pub(crate) ledger: Ledger,
    pub(crate) measure: Option<Arc<Measure>>,
    pub(crate) arena: Option<Arena>,
    /// No segment is asked for before: the agent refused.
    pub(crate) refused_until: Option<(Instant, String)>,
    pub(crate) members: HashMap<u32, Member>,
    pub(crate) own: BTreeMap<u32, Own>,
    pub(crate) clients: Clients,
    /// Client to id of its upload under way: one at a time.
    pub(crate) uploading: HashMap<String, String>,
    /// Clients whose update is in the current round.
    pub(crate) reported: HashSet<String>,
    /// (client, id) of what a journal promises and the ledger may not have: it was lost with an earlier machine.
    pub(crate) journalled: HashMap<(String, String), Known>,
    /// What the journal has of the open round is being admitted again.
    pub(crate) readmitting: bool,
    /// Admitted, but every leaf has as much outstanding as it may.
    pub(crate) waiting: VecDeque<ObjectKey>,
    /// Updates sent and not yet contained, by role.
    pub(crate) outstanding: HashMap<u32, u32>,
    /// The leaf after which the search for the next begins.
    pub(crate) last_leaf: usize,
    pub(crate) close_sent: bool,
    pub(crate) served: Option<Arc<Served>>,
    pub(crate) first: Option<FirstModel>,
    pub(crate) credits: u32,
    pub(crate) totals: Totals,
    /// Effects for the caller: slots that came back, own segments to be dropped.
    pub(crate) freed: u32,
    pub(crate) dropped: Vec<u32>,
}

/// Figures since the start of this process, for people.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Totals {
    pub(crate) accepted: u64,
    pub(crate) duplicates: u64,
    pub(crate) committed: u64,
    pub(crate) shm_peak_bytes: u64,
}

// === impl ModelMeta ===

impl ModelMeta {
    pub(crate) const fn key(&self) -> ObjectKey {
        ObjectKey { segment: self.segment, slot: self.slot, generation: self.generation }
    }

    pub(crate) fn new(round: u32, sha256: String, key: ObjectKey, writer: u32) -> Self {
        Self { round, sha256, segment: key.segment, slot: key.slot, generation: key.generation, writer }
    }
}

// === impl Chain ===

impl Chain {
    pub(crate) fn new(
        inner: Inner,
        ledger_fd: OwnedFd,
        words: mpsc::UnboundedSender<(ToGateway, Vec<OwnedFd>)>,
    ) -> Self {
        Self {
            id: inner.chain,
            namespace: inner.meta.job.namespace().to_owned(),
            job: inner.meta.job.name().to_owned(),
            ledger_fd,
            slot_freed: Notify::new(),
            changed: watch::Sender::new(0),
            growing: AtomicBool::new(false),
            removed: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            progress: AtomicBool::new(false),
            words,
            inner: Mutex::new(inner),
        }
    }

    /// Taken for the length of a statement or a closure, never across an await. Prefer [`crate::state::Gateway::with`],
    /// which carries out what a change causes.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        // What a panicking thread leaves is no worse than what a dead process leaves, and the ledger survives that.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its job is no more: nothing is to be waited for.
    pub(crate) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    /// Has long polls look again.
    pub(crate) fn bump(&self) {
        self.changed.send_modify(|version| *version += 1);
    }
}

// === impl Inner ===

impl Inner {
    pub(crate) fn new(chain: u32, meta: Meta, ledger: Ledger, credits: u32) -> Option<Self> {
        Some(Self {
            chain,
            key: Key::new(&meta.token_key)?,
            meta,
            ledger,
            measure: None,
            arena: None,
            refused_until: None,
            members: HashMap::new(),
            own: BTreeMap::new(),
            clients: Clients::default(),
            uploading: HashMap::new(),
            reported: HashSet::new(),
            journalled: HashMap::new(),
            readmitting: false,
            waiting: VecDeque::new(),
            outstanding: HashMap::new(),
            last_leaf: 0,
            close_sent: false,
            served: None,
            first: None,
            credits,
            totals: Totals::default(),
            freed: 0,
            dropped: Vec::new(),
        })
    }

    /// Where the chain stands, for the coordinator.
    pub(crate) fn state(&self) -> ChainState {
        let round = self.ledger.round();
        ChainState {
            chain: self.chain,
            namespace: self.meta.job.namespace().to_owned(),
            job: self.meta.job.name().to_owned(),
            round: round.round,
            open: round.open,
            admitted: self.ledger.admitted(),
            model_round: self.meta.model.as_ref().map(|model| model.round),
        }
    }

    /// The document with what is known here and nowhere else.
    pub(crate) fn document(&self) -> FederatedJob {
        let mut job = self.meta.job.clone();
        let status = job.status.get_or_insert_default();
        let registered = u32::try_from(self.clients.len()).unwrap_or(u32::MAX);
        status.clients.registered = status.clients.registered.max(registered);
        if let Some(open) = self.meta.open.as_ref().filter(|_| !self.is_between_rounds()) {
            status.clients.selected = u32::try_from(open.selected.len()).unwrap_or(u32::MAX);
            status.clients.reported = self.ledger.admitted();
        }
        job
    }

    /// Between the commit of a round and the opening of the next.
    pub(crate) fn is_between_rounds(&self) -> bool {
        let round = self.ledger.round();
        round.goal == 0 || self.ledger.committed().is_some_and(|committed| committed >= round.round)
    }

    /// Updates outstanding per leaf, at most. A lazy leaf gives none back before its round is closed.
    pub(crate) fn credit(&self) -> u32 {
        match self.meta.job.spec.aggregation.timing {
            Timing::Eager => self.credits,
            Timing::Lazy => u32::MAX,
        }
    }

    /// Who takes updates.
    pub(crate) fn leaves(&self) -> Vec<u32> {
        match self.meta.open.as_ref().map(|open| &open.tree.leaves) {
            Some(leaves) if !leaves.is_empty() => leaves.clone(),
            _ => vec![role::TOP],
        }
    }

    /// To whom complete partials of `role` go.
    pub(crate) fn parent(&self, role: u32) -> u32 {
        let middle = self.meta.open.as_ref().and_then(|open| open.tree.middle);
        match middle {
            Some(middle) if role != middle && role != role::TOP => middle,
            _ => role::TOP,
        }
    }

    /// All aggregators of the round.
    pub(crate) fn aggregators(&self) -> Vec<u32> {
        let mut all = self.leaves();
        all.extend(self.meta.open.as_ref().and_then(|open| open.tree.middle));
        if !all.contains(&role::TOP) {
            all.push(role::TOP);
        }
        all
    }
}
