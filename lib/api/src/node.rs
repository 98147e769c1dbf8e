//! What the processes of a node say to each other: JSON over private SEQPACKET sockets, fds beside it.
//!
//! Every order is a wish for a state, so that repeating it after a restart changes nothing.

use serde::{Deserialize, Serialize};

use crate::{
    event::MetricsData,
    job::FederatedJob,
    pod::{NodePod, PodAsk, PodPort, PodWord},
};

/// What an aggregator is to be. Roles change by message, without restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoleConfig {
    /// Its number in the chain (`ebpf/common`'s `role`).
    pub role: u32,
    /// To whom complete partials go; `None` for the top.
    pub parent: Option<u32>,
    /// Length of the flat vector of floats.
    pub elements: u64,
    /// Bytes of a model file.
    pub model_bytes: u64,
    /// Upper bound of the runs of an object.
    pub max_runs: u32,
    /// Scale of the fixed-point sums; `None`: sums in `f32`.
    pub fixed_scale: Option<f64>,
    /// Fold as inputs come, or all when the round is closed.
    pub eager: bool,
    /// Inputs folded before a partial is sealed, at most.
    pub batch: u32,
    /// The model is the base plus the mean (updates are differences).
    pub diff: bool,
}

/// Who aggregates a round.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// Leaves; the top alone when there is only one aggregator.
    pub leaves: Vec<u32>,
    /// The middle of this node, if any.
    pub middle: Option<u32>,
}

/// Segments: words of writers (gateway, functions) to the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToAgent {
    /// May I have a segment of so many bytes in this chain?
    Grant {
        /// Number of the request, chosen by the writer.
        request: u64,
        /// Chain.
        chain: u32,
        /// Size of the memfd.
        bytes: u64,
    },
    /// Here it is (fd beside): hand it to the members.
    Segment {
        /// Chain.
        chain: u32,
        /// Its number, as granted.
        segment: u32,
        /// Size of the memfd.
        bytes: u64,
    },
    /// No object of it lives any more.
    DropSegment {
        /// Chain.
        chain: u32,
        /// Segment.
        segment: u32,
    },
    /// A function has begun (its first word).
    Ready {
        /// Layout of descriptors that it speaks.
        layout: u8,
    },
    /// What a function did for a round that it has completed.
    Folded {
        /// Round.
        round: u32,
        /// Inputs folded.
        inputs: u64,
        /// Their bytes.
        bytes: u64,
        /// Time in the kernels, nanoseconds.
        ns: u64,
    },
    /// A function changed its role as told.
    RoleTaken {
        /// Its role now.
        role: u32,
    },
    /// A function cannot do its work.
    Failed {
        /// Why.
        reason: String,
    },
    /// The gateway, of a pod that it serves.
    Pod(PodAsk),
    /// The gateway, after a (re)connection: a pod that it serves (listeners beside, in the order of `ports`). An agent whose
    /// predecessor was replaced goes on with these: nothing that waits in them is lost.
    Holds {
        /// The pod.
        pod: Box<NodePod>,
        /// What each descriptor listens for.
        ports: Vec<PodPort>,
    },
    /// The gateway: all that it holds is told.
    HoldsAll,
}

/// Words of the agent to writers and members.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromAgent {
    /// A request for a segment is granted.
    Granted {
        /// The request.
        request: u64,
        /// Chain.
        chain: u32,
        /// Number of the segment to create.
        segment: u32,
    },
    /// It is not: the quota of `limit` is used up.
    Refused {
        /// The request.
        request: u64,
        /// Chain.
        chain: u32,
        /// Why, with figures.
        reason: String,
    },
    /// To the writer of a segment: it is kept, and all members were told of it. What is sealed in it outlives its writer.
    Kept {
        /// Chain.
        chain: u32,
        /// Segment.
        segment: u32,
    },
    /// A segment of a member (fd beside), read-only.
    Segment {
        /// Chain.
        chain: u32,
        /// Its number.
        segment: u32,
        /// Role of its writer.
        writer: u32,
    },
    /// A segment is gone: unmap it.
    SegmentGone {
        /// Chain.
        chain: u32,
        /// Segment.
        segment: u32,
    },
    /// Data socket of the receiver (fd beside).
    DataSocket,
    /// To a function: be this. The first one starts it.
    Role {
        /// Chain.
        chain: u32,
        /// What to be.
        config: RoleConfig,
        /// `name:n`: where it is to die (tests).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failpoint: Option<String>,
    },
    /// To the gateway: `role` of `chain` is served by another process than before; send again what it had not contained.
    Replaced {
        /// Chain.
        chain: u32,
        /// Role.
        role: u32,
    },
    /// To the gateway, after a (re)connection: all segments and sockets are told.
    Synced {
        /// `ebpf` or `userspace`.
        path: String,
    },
    /// To the gateway: of the node's pods.
    Pod(PodWord),
    /// The agent was restarted: ask again what was not answered.
    Adopted,
    /// To a gateway: another one of this node serves the pods from now on. Accept no more of their connections, answer what there
    /// is; the chains are gone.
    Superseded,
    /// End after the current work.
    Drain,
}

/// Orders of the coordinator to the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Order {
    /// The chain shall exist, with at most so many bytes of segments.
    Chain {
        /// Chain.
        chain: u32,
        /// Namespace of its job.
        namespace: String,
        /// Its job.
        job: String,
        /// Quota of shared memory, bytes.
        quota: u64,
    },
    /// These members shall run. Running ones are reused, their role changed where it differs.
    Plan {
        /// Chain.
        chain: u32,
        /// Revision of the plan; answered by [`NodeEvent::Planned`].
        revision: u64,
        /// All aggregators of the chain on this node.
        members: Vec<RoleConfig>,
    },
    /// The chain shall be gone, its members and its memory.
    Remove {
        /// Chain.
        chain: u32,
    },
}

/// What the agent tells the coordinator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum NodeEvent {
    /// After each (re)connection.
    Hello {
        /// Shared memory that all chains of the node may use, bytes.
        shm_limit: u64,
        /// Processors.
        cores: u32,
        /// `ebpf` or `userspace`.
        path: String,
        /// Chains that run here.
        chains: Vec<u32>,
    },
    /// All members of the plan run and are routed.
    Planned {
        /// Chain.
        chain: u32,
        /// Revision of the plan.
        revision: u64,
    },
    /// A member died and is replaced.
    MemberDied {
        /// Chain.
        chain: u32,
        /// Role.
        role: u32,
        /// Exit status or signal.
        reason: String,
    },
    /// The plan cannot be carried out.
    PlanFailed {
        /// Chain.
        chain: u32,
        /// Revision of the plan.
        revision: u64,
        /// Why.
        reason: String,
    },
}

/// Words of the coordinator to the gateway.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToGateway {
    /// The job shall be served (again with each change of its status).
    Job {
        /// Chain.
        chain: u32,
        /// Spec and status, as `GET job` shows it.
        job: Box<FederatedJob>,
        /// Key of the job's tokens, hex; kept with the checkpoint, so that tokens outlive everything.
        token_key: String,
        /// Secret that joining clients present, if any.
        join_secret: Option<String>,
        /// Bytes of shared memory for the gateway's slots of this chain, at most.
        slot_bytes: u64,
    },
    /// The global model (fd of a memfd or file beside, from offset 0): the base of what follows.
    Model {
        /// Chain.
        chain: u32,
        /// Round that made it.
        round: u32,
        /// Length of the safetensors file.
        length: u64,
        /// Lower-case hex.
        sha256: String,
    },
    /// Open this round.
    Open {
        /// Chain.
        chain: u32,
        /// Round.
        round: u32,
        /// Clients whose updates are accepted.
        selected: Vec<String>,
        /// Updates that close it.
        goal: u32,
        /// Milliseconds since the Unix epoch.
        deadline_ms: i64,
        /// Who aggregates it.
        tree: Tree,
    },
    /// Later deadline, more clients; what was accepted stays.
    Extend {
        /// Chain.
        chain: u32,
        /// Round.
        round: u32,
        /// Clients whose updates are accepted.
        selected: Vec<String>,
        /// Milliseconds since the Unix epoch.
        deadline_ms: i64,
    },
    /// Close this round with what was accepted; answered by [`FromGateway::Closed`].
    Close {
        /// Chain.
        chain: u32,
        /// Round.
        round: u32,
    },
    /// The round's model and receipt are stored: serve the model, forget the round's objects.
    Commit {
        /// Chain.
        chain: u32,
        /// Round.
        round: u32,
        /// Of the model file, lower-case hex.
        sha256: String,
    },
    /// The job is over; polls answer `done` or `failed`.
    Finish {
        /// Chain.
        chain: u32,
        /// It succeeded.
        succeeded: bool,
        /// Why.
        reason: String,
    },
    /// Which clients are alive?
    Alive {
        /// Chain.
        chain: u32,
    },
    /// The job is no more: nothing of it is served or kept.
    Remove {
        /// Chain.
        chain: u32,
    },
    /// Say again where everything stands, as after a connection: a job has come, whose chain may be known there.
    Greet,
    /// Take federated clients from here too (a listener beside), until the end of this connection. It is in the coordinator's own
    /// pod: whoever calls that finds the one gateway that has its jobs.
    Clients,
}

/// Words of the gateway to the coordinator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromGateway {
    /// After each (re)connection, and when asked: where each known chain stands.
    Hello {
        /// All of them.
        chains: Vec<ChainState>,
        /// It has a folder for the journals of jobs with `ackLevel: Disk`.
        #[serde(default)]
        journal: bool,
    },
    /// A client joined, or was heard of again after a restart.
    Joined {
        /// Chain.
        chain: u32,
        /// Client.
        client: String,
        /// Never selected.
        evaluator: bool,
    },
    /// Answer to [`ToGateway::Alive`]: trainers heard of within one and a half heartbeats.
    AliveClients {
        /// Chain.
        chain: u32,
        /// Their names.
        clients: Vec<String>,
    },
    /// `client.metrics.v1`.
    Metrics {
        /// Chain.
        chain: u32,
        /// Client.
        client: String,
        /// It is an evaluator.
        evaluator: bool,
        /// What it measured.
        data: MetricsData,
    },
    /// So many updates are accepted in this round; coalesced.
    Progress {
        /// Chain.
        chain: u32,
        /// Round.
        round: u32,
        /// Updates accepted.
        admitted: u32,
    },
    /// The round is closed: exactly these many updates are in it.
    Closed {
        /// Chain.
        chain: u32,
        /// Round.
        round: u32,
        /// Updates accepted.
        admitted: u32,
    },
    /// The round's model is sealed (fd of its segment beside).
    RoundDone {
        /// Chain.
        chain: u32,
        /// Round.
        round: u32,
        /// Updates contained in it.
        count: u32,
        /// Sum of their weights.
        weight: f64,
        /// Where the file begins in the segment, bytes.
        offset: u64,
        /// Length of the file, bytes.
        length: u64,
        /// Every update in it.
        receipt: Vec<ReceiptEntry>,
    },
    /// With `initial: {fromFirstClient: true}`: the first client's tensors (fd of the segment beside).
    FirstModel {
        /// Chain.
        chain: u32,
        /// Where the file begins, bytes.
        offset: u64,
        /// Length of the file, bytes.
        length: u64,
    },
}

/// Where a chain stands in the gateway's ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainState {
    /// Chain.
    pub chain: u32,
    /// Namespace of its job.
    pub namespace: String,
    /// Its job.
    pub job: String,
    /// Round in the ledger; 0 before the first.
    pub round: u32,
    /// It accepts updates.
    pub open: bool,
    /// Updates accepted in it.
    pub admitted: u32,
    /// Round of the model that is served.
    pub model_round: Option<u32>,
}

/// One update of a committed round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReceiptEntry {
    /// `source` of the event.
    pub source: String,
    /// `id` of the event.
    pub id: String,
    /// Its weight.
    pub weight: f64,
    /// `sha256-<hex>` or `crc32c-<hex>` of its body.
    pub digest: String,
}
