//! The plan of a job, from its nodes: clients placed, aggregators counted, the top given its node (paper, 5.1 and 5.2).

use std::time::Duration;

use lifl_api::{
    job::{FederatedJob, Timing},
    plan::{
        ACCUMULATORS, GATEWAY_MODELS, LEAST_SLOTS, LEAVES_PER_CORE, NodeShare, Plan, Policy, SCHEMA, TOP_MODELS, Why,
    },
    quantity::Bytes,
};

use crate::{Demand, Dimension, Load, NoRoom, Room, Shape, place, top};

/// Models that a node holds besides.
const MODELS: u64 = TOP_MODELS + GATEWAY_MODELS;

/// A node as it is before the job.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Its name, unique.
    pub name: String,
    /// `MC`: updates that it aggregates at once before each takes longer.
    pub capacity: f64,
    /// Bytes of shared memory that it has for the job; `u64::MAX`: no bound is known.
    pub memory: u64,
    /// Bytes a second of its link; `u64::MAX`: no bound is known.
    pub bandwidth: u64,
    /// Its processors; none: no bound is known.
    pub cores: Option<u32>,
    /// `k` and `E` of what it aggregates already.
    pub load: Load,
}

/// What counts of a job.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Updates that close a round.
    pub goal: u32,
    /// Clients that are selected for a round.
    pub clients: u32,
    /// Updates to a leaf: the paper's `I`.
    pub fan_in: u32,
    /// How long a round waits for its updates.
    pub deadline: Duration,
    /// Bytes of an update; none: not known, and then memory and links are no bound.
    pub update: Option<u64>,
    /// Sums take twice the bytes of a model.
    pub reproducible: bool,
    /// Updates are kept until the round is closed, not folded as they come.
    pub lazy: bool,
}

/// Why a job cannot be planned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// There is nothing to place it on.
    #[error("no nodes: at least one is needed to aggregate a job")]
    NoNodes,
    /// Two nodes have one name.
    #[error("node {0} is there twice: each node has a name of its own")]
    Twice(String),
    /// A node without capacity.
    #[error(
        "node {node} has a capacity of {capacity}: it is the number of updates that the node aggregates at once, at least 1 and \
         finite (the paper's machines have 20); leave the node out if it is not to take part"
    )]
    Capacity {
        /// The node.
        node: String,
        /// What was said of it.
        capacity: f64,
    },
    /// More updates than clients, or none.
    #[error(
        "a goal of {goal} updates cannot be met by {clients} clients: each sends one update a round; a goal is at least 1 and at \
         most the number of clients"
    )]
    Goal {
        /// Updates that close a round.
        goal: u32,
        /// Clients selected.
        clients: u32,
    },
    /// One update alone is too large for every node.
    #[error(
        "an update of {update} bytes is too large for every node: with {ACCUMULATORS} accumulators and {MODELS} models beside it it \
         needs {needs} bytes, and node {node}, the largest, has {memory}; raise the nodes' memory, or lower update.maxSize if updates \
         are smaller than that"
    )]
    TooLarge {
        /// Bytes of an update.
        update: u64,
        /// Bytes of memory for one update and an aggregator.
        needs: u64,
        /// The node with most memory.
        node: String,
        /// Bytes that it has.
        memory: u64,
    },
    /// Not all clients find room.
    #[error(
        "{clients} clients may send at once (clientsPerRound {goal} times overProvision), but the nodes have room for {fits} \
         ({nodes} {}; what is lacking is {lacks}): add nodes or {}, or lower clientsPerRound or overProvision",
        if *nodes == 1 { "node" } else { "nodes" },
        remedy(*lacks)
    )]
    NoRoom {
        /// Updates that close a round.
        goal: u32,
        /// Clients selected.
        clients: u32,
        /// How many of them find room.
        fits: u32,
        /// How many nodes there are.
        nodes: usize,
        /// What the roomiest node lacks.
        lacks: Dimension,
    },
}

/// Who is where.
#[derive(Debug)]
struct Placed {
    /// Clients of each node.
    clients: Vec<u32>,
    /// Memory holds all updates of a node at once; otherwise clients wait for each other.
    at_once: bool,
}

/// A job's memory on a node that takes part: it is linear in updates and aggregators.
#[derive(Clone, Copy, Debug)]
struct Memory {
    /// Of an update.
    update: u64,
    /// Of an aggregator.
    aggregator: u64,
    /// Of models, whatever the updates.
    models: u64,
}

/// Plans a job's rounds over the nodes, as they stand when a round begins and its clients are known.
///
/// All selected clients find room, in `RC = MC - k·E` updates at once, in memory (an update each, an aggregator, three models), and in
/// the link (each update within the round's deadline). If memory does not hold all of them at once, updates that are folded as they
/// come (eager) may wait for each other on nodes that hold two; lazy ones may not. A node's `Q` is its share of the goal: its
/// clients without those that are selected against dropouts. Leaves are `Q / I`, rounded up, as many as processors (four each)
/// and memory bear; the top is where most clients are. Nodes are taken by name, so that the plan is the same in whatever order
/// they are told.
///
/// O(n log b + b log b) for n clients on b nodes.
///
/// # Errors
/// [`Refusal`], with the figures.
pub fn decide(job: &Job, nodes: &[Node], policy: Policy) -> Result<Plan, Refusal> {
    if job.goal == 0 || job.goal > job.clients {
        return Err(Refusal::Goal { goal: job.goal, clients: job.clients });
    }
    let nodes = checked(nodes)?;
    let memory = Memory::of(job);
    let rooms: Vec<Room> = nodes.iter().map(|node| room(node, memory)).collect();
    let placed = placed(job, &nodes, &rooms, memory, policy)?;
    let top = top(&placed.clients);
    let shares = nodes.iter().zip(&rooms).zip(&placed.clients).enumerate().map(|(at, ((node, room), clients))| {
        let queue = f64::from(*clients) * f64::from(job.goal) / f64::from(job.clients);
        let beside = if placed.at_once { u64::from(*clients) } else { LEAST_SLOTS };
        let most = memory.most_leaves(node, beside);
        let shape = Shape::new(queue, job.fan_in, most.unwrap_or(u32::MAX));
        let why = Why {
            capacity: node.capacity,
            arrivals: node.load.arrivals,
            execution_seconds: node.load.execution,
            residual: room.updates,
            queue,
            most_leaves: most,
            slots: memory.slots(node, shape.leaves).filter(|_| *clients > 0),
        };
        let share =
            NodeShare { clients: *clients, leaves: shape.leaves, middle: shape.middle, top: top == Some(at), why };
        (node.name.clone(), share)
    });
    Ok(Plan {
        schema: SCHEMA.to_owned(),
        namespace: job.namespace.clone(),
        job: job.name.clone(),
        policy,
        goal: job.goal,
        clients: job.clients,
        leaf_fan_in: job.fan_in,
        update_size: job.update.map(Bytes),
        nodes: shares.collect(),
    })
}

/// The plan for another load, while a round runs: clients and top stay where they are, leaves follow the smoothed `Q` of the job on
/// each node ([`crate::Estimator`]). A node of which nothing was measured stays as it is, one with clients keeps a leaf, and where
/// clients wait for memory no further leaf takes of it.
#[must_use]
pub fn resize(plan: &Plan, queue: impl Fn(&str) -> Option<f64>) -> Plan {
    let mut plan = plan.clone();
    for (name, share) in plan.nodes.iter_mut().filter(|(_, share)| share.clients > 0) {
        if let Some(queue) = queue(name).filter(|queue| queue.is_finite()) {
            let waiting = share.why.slots.is_some_and(|slots| slots < share.clients);
            let most = if waiting { share.leaves } else { share.why.most_leaves.unwrap_or(u32::MAX) };
            let shape = Shape::new(queue.max(1.0), plan.leaf_fan_in, most);
            (share.leaves, share.middle, share.why.queue) = (shape.leaves, shape.middle, queue.max(0.0));
        }
    }
    plan
}

/// By name, and each possible.
fn checked(nodes: &[Node]) -> Result<Vec<Node>, Refusal> {
    let mut nodes = nodes.to_vec();
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    if nodes.is_empty() {
        return Err(Refusal::NoNodes);
    }
    if let Some([first, _]) = nodes.array_windows().find(|[first, second]| first.name == second.name) {
        return Err(Refusal::Twice(first.name.clone()));
    }
    if let Some(node) = nodes.iter().find(|node| !(1.0..f64::INFINITY).contains(&node.capacity)) {
        return Err(Refusal::Capacity { node: node.name.clone(), capacity: node.capacity });
    }
    // Counters that say nonsense say nothing: no job is refused for them, and none is printed.
    let sane = |value: f64| value.is_finite() && value >= 0.0;
    for node in &mut nodes {
        if !(sane(node.load.arrivals) && sane(node.load.execution) && sane(node.load.arrivals * node.load.execution)) {
            node.load = Load::default();
        }
    }
    Ok(nodes)
}

fn room(node: &Node, memory: Memory) -> Room {
    let updates = (node.capacity - node.load.queue()).max(0.0);
    let fixed = memory.models + memory.aggregator;
    Room { updates, memory: node.memory.saturating_sub(fixed), bandwidth: node.bandwidth }
}

fn placed(job: &Job, nodes: &[Node], rooms: &[Room], memory: Memory, policy: Policy) -> Result<Placed, Refusal> {
    let needs = memory.models + memory.aggregator + memory.update;
    if let Some(largest) = nodes.iter().max_by_key(|node| node.memory).filter(|node| node.memory < needs) {
        return Err(Refusal::TooLarge {
            update: memory.update,
            needs,
            node: largest.name.clone(),
            memory: largest.memory,
        });
    }
    let a_second = (u128::from(memory.update) * 1000).div_ceil(job.deadline.as_millis().max(1));
    let demand = Demand { memory: memory.update, bandwidth: u64::try_from(a_second).unwrap_or(u64::MAX) };
    let full = match filled(job, rooms, demand, policy) {
        Ok(clients) => return Ok(Placed { clients, at_once: true }),
        Err(full) => full,
    };
    if job.lazy || full.lacks != Dimension::Memory {
        return Err(refused(job, full));
    }
    let holds_two = |room: &Room| room.memory >= LEAST_SLOTS * memory.update;
    let roomy: Vec<Room> =
        rooms.iter().map(|room| if holds_two(room) { *room } else { Room { updates: 0.0, ..*room } }).collect();
    match filled(job, &roomy, Demand { memory: 0, ..demand }, policy) {
        Ok(clients) => Ok(Placed { clients, at_once: false }),
        // Memory has put nodes aside: it is what is lacking, whatever the others lack.
        Err(_) if !rooms.iter().all(holds_two) => Err(refused(job, full)),
        Err(other) => Err(refused(job, other)),
    }
}

/// Clients of each room.
fn filled(job: &Job, rooms: &[Room], demand: Demand, policy: Policy) -> Result<Vec<u32>, NoRoom> {
    let mut clients = vec![0; rooms.len()];
    let placed = place(rooms, &vec![demand; job.clients as usize], policy)?;
    placed.into_iter().for_each(|node| clients[node] += 1);
    Ok(clients)
}

fn refused(job: &Job, full: NoRoom) -> Refusal {
    Refusal::NoRoom {
        goal: job.goal,
        clients: job.clients,
        fits: u32::try_from(full.at).unwrap_or(u32::MAX),
        nodes: full.nodes,
        lacks: full.lacks,
    }
}

fn remedy(lacks: Dimension) -> &'static str {
    match lacks {
        Dimension::Updates => "raise their capacity",
        Dimension::Memory => "memory",
        Dimension::Bandwidth => "give them faster links or the round a later deadline",
    }
}

// === impl Job ===

impl Job {
    /// Of its manifest; `update` is how many bytes an update takes, where that is known.
    #[must_use]
    pub fn of(job: &FederatedJob, update: Option<u64>) -> Self {
        Self {
            namespace: job.namespace().to_owned(),
            name: job.name().to_owned(),
            goal: job.spec.clients_per_round,
            clients: job.spec.clients_to_select(),
            fan_in: job.spec.aggregation.leaf_fan_in,
            deadline: job.spec.round_deadline.0,
            update,
            reproducible: job.spec.aggregation.reproducible,
            lazy: job.spec.aggregation.timing == Timing::Lazy,
        }
    }
}

// === impl Memory ===

impl Memory {
    fn of(job: &Job) -> Self {
        // A size that is nonsense is too large for every node, and no overflow.
        let update = job.update.unwrap_or(0).min(1 << 56);
        let accumulator = if job.reproducible { 2 * update } else { update };
        Self { update, aggregator: ACCUMULATORS * accumulator, models: MODELS * update }
    }

    /// Leaves that processors and memory bear beside so many updates; the first one's memory is set aside for whoever takes part.
    fn most_leaves(self, node: &Node, updates: u64) -> Option<u32> {
        let cores = node.cores.map(|cores| cores.max(1).saturating_mul(LEAVES_PER_CORE));
        let taken = self.update.saturating_mul(updates).saturating_add(self.models + self.aggregator);
        let further = share(node, taken, self.aggregator);
        [cores, further.map(|further| further.saturating_add(1))].into_iter().flatten().min()
    }

    /// Updates that memory holds at once beside so many leaves.
    fn slots(self, node: &Node, leaves: u32) -> Option<u32> {
        share(node, self.aggregator.saturating_mul(leaves.into()).saturating_add(self.models), self.update)
    }
}

/// How often `size` goes into what a node's memory has beyond `taken`; none: no bound is known.
fn share(node: &Node, taken: u64, size: u64) -> Option<u32> {
    let times = node.memory.saturating_sub(taken).checked_div(size).filter(|_| node.memory < u64::MAX)?;
    Some(u32::try_from(times).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests;
