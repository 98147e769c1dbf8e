//! What the coordinator knows: jobs, their clients, the round under way. No await.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use lifl_api::{
    job::{FederatedJob, FederatedJobStatus},
    node::{ChainState, ReceiptEntry},
};
use lifl_cluster::Key;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    figures::Figures,
    plan::{Plan, Refusal, Shape},
    status,
};

/// Rounds that the status shows.
const HISTORY: usize = 100;

/// All jobs.
#[derive(Debug, Default)]
pub struct Jobs {
    /// By number; a number is given once.
    jobs: BTreeMap<usize, JobState>,
    next: usize,
    by_chain: BTreeMap<u32, usize>,
    /// Chains that are being removed: their numbers are not given again, or one side would take the old for the new.
    removed: BTreeSet<u32>,
    /// Jobs that are wished and do not run.
    pub(crate) absent: BTreeMap<Key, Absent>,
}

/// A job that is wished and not run: why.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Absent {
    pub(crate) uid: String,
    pub(crate) generation: i64,
    pub(crate) status: FederatedJobStatus,
    /// When it is tried again; `None`: when something changes.
    pub(crate) retry_at: Option<i64>,
    pub(crate) failures: u32,
}

/// One job.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "facts about three independent peers, not a state machine")]
pub struct JobState {
    pub(crate) path: String,
    pub(crate) document: FederatedJob,
    pub(crate) join_secret: Option<String>,
    pub(crate) token_key: String,
    /// Milliseconds of quiet after a join before a round opens with fewer than it could select.
    pub(crate) gathering: i64,
    pub(crate) chain: Option<u32>,
    /// Another job has its name: nothing may be said of it to the gateway.
    pub(crate) mute: bool,
    pub(crate) shape: Option<Shape>,
    pub(crate) model: Option<Model>,
    /// The first client's tensors are being stored as its model.
    pub(crate) adopting: bool,
    pub(crate) committed: u32,
    pub(crate) node: Option<Node>,
    pub(crate) agent: bool,
    pub(crate) gateway: bool,
    /// The gateway of this connection has the model.
    pub(crate) served: bool,
    /// Where the gateway stood when it was first heard of.
    pub(crate) ledger: Option<ChainState>,
    /// The round of an earlier life of the coordinator.
    pub(crate) saved: Option<SavedRound>,
    pub(crate) plan: Planning,
    pub(crate) phase: Phase,
    pub(crate) round: Option<Round>,
    pub(crate) clients: Clients,
    pub(crate) figures: Figures,
    /// It was logged that figures are left out.
    pub(crate) figures_dropped: bool,
    /// Why the job ends after the round under way.
    pub(crate) finishing: Option<String>,
    /// Its end by the stop condition, while that is being stored.
    pub(crate) ending: Option<Ending>,
    /// Why an earlier life of the coordinator ended the job.
    pub(crate) ended: Option<String>,
    pub(crate) history: VecDeque<RoundSummary>,
    pub(crate) members_died: u32,
    /// The gateway can keep journals.
    pub(crate) journal: bool,
    /// When it was read, milliseconds since the Unix epoch.
    pub(crate) begun: i64,
    /// The status changed since the gateway was told.
    pub(crate) dirty: bool,
    /// The status changed since the API server was told.
    pub(crate) unsaid: bool,
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Waits for agent and gateway.
    Pending,
    /// Waits for its aggregators.
    Planning,
    /// Waits for enough clients.
    Gathering,
    /// Clients train and send.
    Open,
    /// No update is accepted any more; the model is being made.
    Closing,
    /// The model, or the end of the job, is being stored.
    Committing,
    /// All rounds are committed, or the stop condition is met.
    Succeeded,
    /// It cannot go on.
    Failed,
}

/// What a job begins with: its checkpoint, read.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Key of the job's tokens.
    pub token_key: String,
    /// Chain of an earlier life.
    pub chain: Option<u32>,
    /// The model to go on with: of the last committed round, or the initial one; `None`: the first client's.
    pub model: Option<(Model, Shape)>,
    /// Committed rounds, ascending.
    pub history: Vec<RoundSummary>,
    /// What was wrong with newer rounds.
    pub warning: Option<String>,
    /// Deposit of an earlier life.
    pub saved: Option<SavedRound>,
    /// The stop condition was met by the model: why.
    pub ended: Option<String>,
}

/// The global model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// Round that made it; 0 is the initial model.
    pub round: u32,
    /// Lower-case hex.
    pub sha256: String,
    /// Length of the file, bytes.
    pub length: u64,
    /// Where it is kept.
    pub uri: String,
}

/// What the agent said of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Shared memory of this job, bytes.
    pub quota: u64,
    /// Processors.
    pub cores: u32,
}

/// The aggregators wished for, and how far the agent is.
#[derive(Debug, Default)]
pub(crate) struct Planning {
    pub(crate) plan: Option<Plan>,
    pub(crate) revision: u64,
    pub(crate) state: PlanState,
    pub(crate) failures: u32,
}

/// How far the agent is with a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum PlanState {
    /// Not sent to this agent.
    #[default]
    Wanted,
    /// Not answered.
    Sent,
    /// All members run.
    Done,
    /// Sent again at this time.
    Failed(i64),
}

/// The round under way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Round {
    pub(crate) number: u32,
    pub(crate) opened_at: i64,
    pub(crate) deadline: i64,
    pub(crate) selected: BTreeSet<String>,
    pub(crate) admitted: u32,
    /// Its first deadline passed with too few updates: closes as soon as there are enough.
    pub(crate) overdue: bool,
    /// It is not known who was selected: everyone alive may send.
    pub(crate) everyone: bool,
    /// Updates in it, once the gateway has closed it.
    pub(crate) closed: Option<u32>,
    pub(crate) done: Option<Done>,
    /// When the aggregators are started afresh if no model came.
    pub(crate) watchdog: i64,
    pub(crate) patience: i64,
    pub(crate) rejections: u32,
    pub(crate) failures: u32,
    /// When a failed checkpoint is tried again; `None`: it is being written.
    pub(crate) retry_at: Option<i64>,
}

/// The end of a job by its stop condition, on its way to the checkpoint: told when it is there.
#[derive(Clone, Debug)]
pub(crate) struct Ending {
    pub(crate) message: String,
    pub(crate) failures: u32,
    /// When a failed attempt is repeated; `None`: it is being written.
    pub(crate) retry_at: Option<i64>,
}

/// The gateway's word that a round's model is sealed.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// Round.
    pub round: u32,
    /// Updates in it.
    pub count: u32,
    /// Sum of their weights.
    pub weight: f64,
    /// Length of the file, bytes.
    pub length: u64,
    /// Every update in it.
    pub receipt: Vec<ReceiptEntry>,
}

/// What the supervisor keeps of the open round for the coordinator's next life.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SavedRound {
    /// Round.
    pub number: u32,
    /// Milliseconds since the Unix epoch.
    pub opened_at: i64,
    /// Milliseconds since the Unix epoch.
    pub deadline: i64,
    /// It was extended.
    pub overdue: bool,
    /// Clients whose updates are accepted.
    pub selected: BTreeSet<String>,
    /// How often each client was selected.
    pub picked: BTreeMap<String, u32>,
    /// Why the job ends after it.
    pub finishing: Option<String>,
}

/// A committed round, for the status.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundSummary {
    /// Round.
    pub round: u32,
    /// Updates in it.
    pub count: u32,
    /// Sum of their weights.
    pub weight: f64,
    /// From its opening to its commit.
    pub seconds: f64,
    /// Of the model file.
    pub sha256: String,
}

/// Who could train.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    pub(crate) registered: BTreeSet<String>,
    /// Who measures the model, as far as it is heard of.
    pub(crate) evaluators: BTreeSet<String>,
    pub(crate) alive: BTreeSet<String>,
    pub(crate) picked: BTreeMap<String, u32>,
    /// When the gateway last told who is alive.
    pub(crate) alive_at: Option<i64>,
    pub(crate) asked_at: Option<i64>,
    pub(crate) last_join: i64,
    /// When the wait for this round began.
    pub(crate) since: i64,
}

pub(crate) fn key_of(job: &FederatedJob) -> Key {
    Key { namespace: job.namespace().to_owned(), name: job.name().to_owned() }
}

// === impl Jobs ===

impl Jobs {
    /// All of these, numbered from 0.
    #[must_use]
    pub fn new(jobs: Vec<JobState>) -> Self {
        let mut all = Self::default();
        for job in jobs {
            all.insert(job);
        }
        all
    }

    /// One more; its number.
    pub(crate) fn insert(&mut self, job: JobState) -> usize {
        let index = self.next;
        self.next += 1;
        self.jobs.insert(index, job);
        index
    }

    /// One less. Its chain's number is not given again.
    pub(crate) fn remove(&mut self, index: usize) -> Option<JobState> {
        let job = self.jobs.remove(&index)?;
        self.by_chain.retain(|_, of| *of != index);
        self.removed.extend(job.chain);
        Some(job)
    }

    /// Jobs, mutable, with their numbers.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut JobState)> {
        self.jobs.iter_mut().map(|(index, job)| (*index, job))
    }

    /// Jobs with their numbers.
    pub(crate) fn numbered(&self) -> impl Iterator<Item = (usize, &JobState)> {
        self.jobs.iter().map(|(index, job)| (*index, job))
    }

    /// Jobs.
    pub fn iter(&self) -> impl Iterator<Item = &JobState> {
        self.jobs.values()
    }

    /// The job of this number.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&JobState> {
        self.jobs.get(&index)
    }

    /// The job of this number.
    pub fn get_mut(&mut self, index: usize) -> Option<&mut JobState> {
        self.jobs.get_mut(&index)
    }

    /// The number of the job with this chain.
    #[must_use]
    pub fn of_chain(&self, chain: u32) -> Option<usize> {
        self.by_chain.get(&chain).copied()
    }

    /// Gives every job its chain: the gateway's word first, then the checkpoint's, then the next free number from 1.
    ///
    /// A job whose chain at the gateway is ahead of its checkpoint (which was deleted or damaged) begins a new chain:
    /// aggregators do not go back in rounds. Returns the chains that are to be removed.
    pub fn assign(&mut self, hello: &[ChainState]) -> Vec<u32> {
        let known: BTreeMap<(&str, &str), &ChainState> =
            hello.iter().map(|c| ((c.namespace.as_str(), c.job.as_str()), c)).collect();
        let mut taken: BTreeSet<u32> = hello.iter().map(|c| c.chain).collect();
        taken.extend(self.by_chain.keys());
        taken.extend(&self.removed);
        let mut retired = Vec::new();
        for (index, job) in &mut self.jobs {
            let proposed = job.chain.take_if(|chain| self.by_chain.get(chain) != Some(index));
            if job.chain.is_some() || job.mute {
                continue;
            }
            let at_gateway = known.get(&(job.document.namespace(), job.document.name()));
            let chain = match at_gateway {
                Some(state) if state.round <= job.committed + 1 && !self.removed.contains(&state.chain) => state.chain,
                other => {
                    retired.extend(other.map(|state| state.chain));
                    let next = || (1..).find(|n| !taken.contains(n));
                    proposed.filter(|chain| *chain > 0 && !taken.contains(chain)).or_else(next).unwrap_or(u32::MAX)
                }
            };
            taken.insert(chain);
            job.chain = Some(chain);
            self.by_chain.insert(chain, *index);
        }
        self.removed.extend(&retired);
        retired
    }

    /// Chains that gateway or agent have and nobody wishes: their jobs ended while nobody here heard it.
    #[must_use]
    pub(crate) fn strays(&self, gateway: &[ChainState], agent: &[u32], wished: impl Fn(&Key) -> bool) -> Vec<u32> {
        let ours = |chain: &u32| self.by_chain.contains_key(chain);
        let key = |state: &ChainState| Key { namespace: state.namespace.clone(), name: state.job.clone() };
        // A job that has its chain needs no other one.
        let served: BTreeSet<Key> =
            self.by_chain.values().filter_map(|index| Some(key_of(self.get(*index)?.document()))).collect();
        let needless = |key: &Key| !wished(key) || served.contains(key);
        let unwished = gateway.iter().filter(|state| !ours(&state.chain) && needless(&key(state)));
        let known = |chain: &u32| ours(chain) || gateway.iter().any(|state| state.chain == *chain);
        let lone = agent.iter().copied().filter(|chain| !known(chain));
        unwished.map(|state| state.chain).chain(lone).collect()
    }

    /// All of it, for the admin page.
    #[must_use]
    pub fn document(&self) -> Value {
        let absent = self.absent.iter().map(|(key, absent)| {
            let metadata = json!({"namespace": key.namespace, "name": key.name});
            json!({"path": status::path(key), "job": {"metadata": metadata, "status": absent.status}})
        });
        json!({
            "schema": "lifl.dev/coordinator-status/v1",
            "jobs": self.iter().map(status::document).chain(absent).collect::<Vec<_>>(),
        })
    }
}

// === impl JobState ===

impl JobState {
    /// A job that goes on from what was loaded.
    #[must_use]
    pub fn new(
        path: String,
        document: FederatedJob,
        join_secret: Option<String>,
        gathering: i64,
        loaded: Loaded,
        now: i64,
    ) -> Self {
        let (model, shape) = loaded.model.unzip();
        let mut job = Self {
            path,
            document,
            join_secret,
            token_key: loaded.token_key,
            gathering,
            chain: loaded.chain,
            mute: false,
            shape,
            committed: model.as_ref().map_or(0, |m| m.round),
            model,
            adopting: false,
            node: None,
            agent: false,
            gateway: false,
            served: false,
            ledger: None,
            saved: loaded.saved,
            plan: Planning::default(),
            phase: Phase::Pending,
            round: None,
            clients: Clients { last_join: now, since: now, ..Clients::default() },
            figures: Figures::default(),
            figures_dropped: false,
            finishing: None,
            ending: None,
            ended: loaded.ended,
            history: loaded.history.into(),
            members_died: 0,
            journal: true,
            begun: now,
            dirty: true,
            unsaid: true,
        };
        if let Some(saved) = &job.saved {
            job.clients.picked.clone_from(&saved.picked);
        }
        let status = job.document.status.get_or_insert_default();
        status.observed_generation = job.document.metadata.generation.unwrap_or(0);
        status.round = job.committed;
        if job.committed > 0 || job.saved.is_some() {
            status.phase = lifl_api::job::Phase::Running;
        }
        if let Some(message) = loaded.warning {
            status::set_condition(status, status::kind::CHECKPOINT, false, "CheckpointDamaged", message, now);
        }
        job.say_waiting("Starting", "waits for the agent and the gateway of its node".to_owned(), now);
        job.trim_history();
        job.show_model();
        job
    }

    /// A job that cannot even begin.
    #[must_use]
    pub fn refused(path: String, document: FederatedJob, refusal: &Refusal, mute: bool, now: i64) -> Self {
        let mut job = Self::new(path, document, None, 0, Loaded::default(), now);
        job.mute = mute;
        job.phase = Phase::Failed;
        job.say_failed(refusal.reason, &refusal.message, now);
        job
    }

    /// The job with its status.
    #[must_use]
    pub const fn document(&self) -> &FederatedJob {
        &self.document
    }

    /// The newest generation of its spec that was looked at, followed or not.
    pub(crate) fn generation(&self) -> i64 {
        self.document.status.as_ref().map_or(0, |status| status.observed_generation)
    }

    /// The generation of its spec that is followed.
    pub(crate) fn followed(&self) -> i64 {
        self.document.metadata.generation.unwrap_or(0)
    }

    /// Nothing is trained any more, or will not be, because its checkpoint says so.
    pub(crate) const fn is_over(&self) -> bool {
        let done = self.committed >= self.document.spec.rounds || self.ended.is_some();
        matches!(self.phase, Phase::Succeeded | Phase::Failed) || (matches!(self.phase, Phase::Pending) && done)
    }

    /// Its chain, once it has one.
    #[must_use]
    pub const fn chain(&self) -> Option<u32> {
        self.chain
    }

    /// Where it stands.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// The last committed round.
    #[must_use]
    pub const fn committed(&self) -> u32 {
        self.committed
    }

    /// The status may differ from what others were told.
    pub(crate) const fn touch(&mut self, changed: bool) {
        self.dirty |= changed;
        self.unsaid |= changed;
    }

    pub(crate) fn condition(&mut self, kind: &str, value: bool, reason: &str, message: String, now: i64) {
        let status = self.document.status.get_or_insert_default();
        let changed = status::set_condition(status, kind, value, reason, message, now);
        self.touch(changed);
    }

    /// Why nothing can be aggregated yet.
    pub(crate) fn say_waiting(&mut self, reason: &str, message: String, now: i64) {
        self.condition(status::kind::READY, false, reason, message, now);
    }

    pub(crate) fn say_failed(&mut self, reason: &str, message: &str, now: i64) {
        self.document.status.get_or_insert_default().phase = lifl_api::job::Phase::Failed;
        for kind in [status::kind::READY, status::kind::PROGRESSING, status::kind::SUCCEEDED] {
            self.condition(kind, false, reason, message.to_owned(), now);
        }
        self.touch(true);
    }

    pub(crate) fn show_model(&mut self) {
        let model = self.model.as_ref().map(|m| lifl_api::job::ModelStatus {
            round: m.round,
            uri: m.uri.clone(),
            sha256: m.sha256.clone(),
        });
        self.document.status.get_or_insert_default().model = model;
        self.touch(true);
    }

    pub(crate) fn show_clients(&mut self) {
        let counts = lifl_api::job::ClientCounts {
            registered: saturate(self.clients.registered.len()),
            selected: self.round.as_ref().map_or(0, |r| saturate(r.selected.len())),
            reported: self.round.as_ref().map_or(0, |r| r.admitted),
        };
        let status = self.document.status.get_or_insert_default();
        let changed = status.clients != counts;
        status.clients = counts;
        self.touch(changed);
    }

    pub(crate) fn remember(&mut self, summary: RoundSummary) {
        self.history.push_back(summary);
        self.trim_history();
    }

    fn trim_history(&mut self) {
        let excess = self.history.len().saturating_sub(HISTORY);
        self.history.drain(..excess);
    }
}

fn saturate(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
