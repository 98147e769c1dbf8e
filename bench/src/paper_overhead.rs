//! What orchestration costs: placement, and a node's estimate and plan (paper, 6.1, "orchestration overhead").
//!
//! Nodes and clients are figures here, as they are for whoever plans: nothing is started. Nodes have the capacity of the paper's, 20
//! updates at once. Times are on the wall, of one thread, median of some runs, so that a busy machine disturbs them little; growth is in
//! processor time, as its runs are long. Beside them stands what the paper reports of its own implementation, which is Python on 64
//! cores of 2.8 GHz.
//!
//! | figure | what it is | the paper |
//! |---|---|---|
//! | `place_10k_ms` | BestFit of 10,000 clients over 500 nodes, which are all full then | < 17 ms |
//! | `plan_us` | a node: its capacity and EWMA take in an interval, leaves and middle, what becomes of its 20 aggregators | 200 us for the estimate alone |
//! | `plan_allocs` | allocations of 1,000 of these | - |
//!
//! Raw series: the paper's own algorithm (a scan of all nodes for each client) compiled as ours is; the whole plan of such a job as an
//! object with names; clients that differ in memory and bandwidth; the growth of each policy up to a million clients over 50,000 nodes,
//! and the exponent that fits it (1 is linear; O(n log n) lies a little above it, and memory that leaves the cache adds to it); how many
//! nodes each policy uses, and the load of the fullest one, at the paper's 20, 60 and 100 updates on 5 nodes and at 6,000 on 500.
//! What is timed has been compared with the scan before.

use std::{hint::black_box, time::Duration};

use anyhow::{Context as _, ensure};
use lifl_autoscaler::{
    Action, Demand, Estimator, Kinds, Load, Member, Policy, Role, Room, Shape, Wanted, Warm, decide, place,
    plan::{self, Job, Node},
};
use mockalloc::record_allocs;

use crate::{
    Args,
    measure::{Cost, Rounds, cost},
    report::{Report, median},
};

/// Updates at once of a node of the paper's testbed.
const CAPACITY: u32 = 20;
/// Clients and nodes of the paper's measurement.
const TEN_THOUSAND: (usize, usize) = (10_000, 500);
/// Clients up to a hundred times as many; nodes grow with them.
const GROWTH: [usize; 4] = [1_000, 10_000, 100_000, 1_000_000];
/// Placements that make one value.
const PLACEMENTS: usize = 20;
/// Fewer of large ones.
const LARGE_PLACEMENTS: usize = 5;
/// Plans of a node that are timed together.
const PLANS: u32 = 1_000;
/// Times of these that make one value.
const PLAN_BATCHES: usize = 100;
/// Plans whose allocations are counted.
const COUNTED: u32 = 1_000;
/// Aggregators of a full node: ten leaves for the paper's 20 updates, and as many that are idle.
const MEMBERS: u64 = 20;
/// The paper's figures, milliseconds and microseconds.
const PAPER: (f64, f64) = (17.0, 200.0);

/// A node's planner, as an agent's or coordinator's loop has it.
struct Planner {
    kinds: Kinds,
    estimator: Estimator,
    /// In the order of their ids, and not in the one that planning makes of it.
    told: Vec<Member>,
    members: Vec<Member>,
    actions: Vec<Action>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Report> {
    check()?;
    let mut rounds = Rounds::default();
    turn(&mut Rounds::default())?;
    for _ in 0..args.rounds {
        turn(&mut rounds)?;
    }
    report(&rounds)
}

/// One round: everything once.
fn turn(rounds: &mut Rounds) -> anyhow::Result<()> {
    let (clients, nodes) = TEN_THOUSAND;
    let (rooms, demands) = (rooms(nodes), vec![Demand::default(); clients]);
    let best = || place(black_box(&rooms), black_box(&demands), Policy::BestFit);
    rounds.push("place_10k_ms", milliseconds(PLACEMENTS, best)?);
    rounds.push("10k clients, a scan for each as the paper's", milliseconds(2, || scan(&rooms, &demands))?);
    let (narrow, mixed) = mixed(clients, nodes);
    rounds.push(
        "10k clients, of differing memory and bandwidth",
        milliseconds(PLACEMENTS, || place(black_box(&narrow), black_box(&mixed), Policy::BestFit))?,
    );
    let (job, named) = job(u32::try_from(clients)?, nodes);
    let whole = || plan::decide(black_box(&job), black_box(&named), Policy::BestFit);
    rounds.push("10k clients, the whole plan as an object", milliseconds(PLACEMENTS, whole)?);
    for policy in Policy::ALL {
        growth(policy, rounds)?;
    }
    let mut planner = Planner::new();
    let mut batches = Vec::with_capacity(PLAN_BATCHES);
    for _ in 0..PLAN_BATCHES {
        let (_, spent) = cost(|| (0..PLANS).for_each(|step| planner.plan(black_box(step))))?;
        batches.push(spent.wall_ms() * 1e3 / f64::from(PLANS));
    }
    rounds.push("plan_us", median(&batches));
    let counted = record_allocs(|| (0..COUNTED).for_each(|step| planner.plan(black_box(step))));
    rounds.push("plan_allocs", counted.num_allocs() as f64);
    Ok(())
}

/// Time for a client of each number of clients, and the exponent of n that fits them best.
fn growth(policy: Policy, rounds: &mut Rounds) -> anyhow::Result<()> {
    let mut points = Vec::new();
    for clients in GROWTH {
        let (rooms, demands) = (rooms(clients.div_ceil(CAPACITY as usize)), vec![Demand::default(); clients]);
        let times = (PLACEMENTS * 10_000 / clients).clamp(LARGE_PLACEMENTS, PLACEMENTS);
        // Reading the clocks takes as long as placing a thousand: small ones are placed several times between two readings.
        let repeats = (TEN_THOUSAND.0 / clients).max(1);
        let each = median_of(times, Cost::cpu_ms, || {
            (0..repeats).try_for_each(|_| place(black_box(&rooms), black_box(&demands), policy).map(drop))
        })?;
        let each = each / repeats as f64;
        let ns = each * 1e6 / clients as f64;
        rounds.push(format!("{policy}, {clients} clients"), ns);
        points.push(((clients as f64).ln(), each.ln()));
    }
    rounds.push(format!("{policy}, growth from 1,000 to 1,000,000"), slope(&points));
    Ok(())
}

fn report(rounds: &Rounds) -> anyhow::Result<Report> {
    let mut report = Report::new("paper-overhead");
    let (placed, planned) = (median(rounds.series("place_10k_ms")?), median(rounds.series("plan_us")?));
    let (paper_ms, paper_us) = PAPER;
    report.note(
        "paper, placement of 10,000 clients",
        format!("{paper_ms} ms; ours {placed:.3} ms, {:.0} times as fast", paper_ms / placed),
    );
    report.note(
        "paper, estimate of a node",
        format!("{paper_us} us; ours, with the plan, {planned:.3} us, {:.0} times as fast", paper_us / planned),
    );
    report.note("nodes", format!("figures, not machines: a capacity of {CAPACITY} updates at once each"));
    report.series("paper: place_10k", "ms", vec![paper_ms]);
    report.series("paper: estimate of a node", "us", vec![paper_us]);
    for (name, series) in rounds.iter() {
        let series = series.to_vec();
        match name {
            "place_10k_ms" => report.figure(name, "ms", series),
            "plan_us" => report.figure(name, "us", series),
            "plan_allocs" => report.figure(name, "allocations", series),
            _ if name.contains("growth") => report.series(name, "power of n", series),
            _ if name.starts_with("10k") => report.series(name, "ms", series),
            _ => report.series(name, "ns a client", series),
        }
    }
    for (clients, nodes) in [(20, 5), (60, 5), (100, 5), (6_000, 500)] {
        for policy in Policy::ALL {
            let placed = place(&rooms(nodes), &vec![Demand::default(); clients], policy)?;
            let loads = loads(&placed, nodes);
            let (used, most) = (loads.iter().filter(|load| **load > 0).count(), loads.iter().max());
            let name = format!("{clients} on {nodes} nodes, {policy}");
            report.series(&format!("{name}: used"), "nodes", vec![used as f64]);
            report.series(&format!("{name}: fullest"), "updates", vec![f64::from(*most.context("no nodes")?)]);
        }
    }
    Ok(report)
}

/// What is timed must find what the scan finds, or no number of this run counts.
fn check() -> anyhow::Result<()> {
    let (clients, nodes) = TEN_THOUSAND;
    let full = vec![Demand::default(); clients];
    let (narrow, differing) = mixed(clients, nodes);
    for (rooms, demands) in [(rooms(nodes), full), (narrow, differing)] {
        let placed = place(&rooms, &demands, Policy::BestFit)?;
        ensure!(placed == scan(&rooms, &demands)?, "BestFit is not what a scan of all nodes finds");
    }
    for policy in Policy::ALL {
        let placed = place(&rooms(nodes), &vec![Demand::default(); clients], policy)?;
        ensure!(loads(&placed, nodes).iter().all(|load| *load == CAPACITY), "{policy} did not fill the nodes");
    }
    let (job, named) = job(u32::try_from(clients)?, nodes);
    let plan = plan::decide(&job, &named, Policy::BestFit)?;
    ensure!(plan.leaves() as usize == clients / 2 && plan.middles() as usize == nodes, "the plan is not the paper's");
    Ok(())
}

/// BestFit as the authors' script has it: for each client the fullest node that has room, among all of them.
fn scan(rooms: &[Room], demands: &[Demand]) -> anyhow::Result<Vec<usize>> {
    let mut left = rooms.to_vec();
    let mut placed = Vec::with_capacity(demands.len());
    for demand in demands {
        let fits =
            |room: &Room| room.updates >= 1.0 && room.memory >= demand.memory && room.bandwidth >= demand.bandwidth;
        let open = left.iter().enumerate().filter(|(_, room)| fits(room));
        let best = open.min_by(|(_, a), (_, b)| a.updates.total_cmp(&b.updates));
        let (node, _) = best.context("no room")?;
        let room = &mut left[node];
        room.updates -= 1.0;
        room.memory -= demand.memory;
        room.bandwidth -= demand.bandwidth;
        placed.push(node);
    }
    Ok(placed)
}

fn rooms(nodes: usize) -> Vec<Room> {
    vec![Room { updates: f64::from(CAPACITY), memory: u64::MAX, bandwidth: u64::MAX }; nodes]
}

/// Four sizes of client over nodes that have enough of all for a little more than their share.
fn mixed(clients: usize, nodes: usize) -> (Vec<Room>, Vec<Demand>) {
    let room = |node: usize| Room {
        updates: f64::from(CAPACITY) * 1.25,
        memory: 80 + node as u64 % 7,
        bandwidth: 80 + node as u64 % 5,
    };
    let demand = |client: usize| Demand { memory: 1 + client as u64 % 4, bandwidth: 1 + client as u64 / 4 % 4 };
    ((0..nodes).map(room).collect(), (0..clients).map(demand).collect())
}

fn job(clients: u32, nodes: usize) -> (Job, Vec<Node>) {
    let node = |number| Node {
        name: format!("node-{number:05}"),
        capacity: f64::from(CAPACITY),
        memory: 64 << 30,
        bandwidth: 10_000_000_000 / 8,
        cores: Some(64),
        load: Load::default(),
    };
    let job = Job {
        namespace: "default".to_owned(),
        name: "resnet-18".to_owned(),
        goal: clients,
        clients,
        fan_in: 2,
        deadline: Duration::from_secs(90),
        update: Some(46_758_048),
        reproducible: false,
        lazy: false,
    };
    (job, (0..nodes).map(node).collect())
}

fn loads(placed: &[usize], nodes: usize) -> Vec<u32> {
    let mut loads = vec![0; nodes];
    placed.iter().for_each(|node| loads[*node] += 1);
    loads
}

/// Median of so many runs, on the wall.
fn milliseconds<T, E: Into<anyhow::Error>>(times: usize, work: impl Fn() -> Result<T, E>) -> anyhow::Result<f64> {
    median_of(times, Cost::wall_ms, work)
}

fn median_of<T, E: Into<anyhow::Error>>(
    times: usize,
    of: fn(&Cost) -> f64,
    work: impl Fn() -> Result<T, E>,
) -> anyhow::Result<f64> {
    let mut runs = Vec::with_capacity(times);
    for _ in 0..times {
        let (done, spent) = cost(&work)?;
        black_box(done.map_err(Into::into)?);
        runs.push(of(&spent));
    }
    Ok(median(&runs))
}

/// Slope of the line that lies closest to the points (least squares).
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0 / n, y + point.1 / n));
    let over: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    over / points.iter().map(|point| (point.0 - x).powi(2)).sum::<f64>()
}

// === impl Planner ===

impl Planner {
    fn new() -> Self {
        let idle = |id: u64| id.is_multiple_of(2).then(|| Duration::from_secs(id));
        let members: Vec<Member> = (0..MEMBERS).map(|id| Member { id, role: Role::Leaf, idle: idle(id) }).collect();
        let mut kinds = Kinds::new(f64::from(CAPACITY));
        kinds.observe("64 cores", Load { arrivals: 1.0, execution: 0.5 });
        let actions = Vec::with_capacity(64);
        Self { kinds, estimator: Estimator::default(), told: members.clone(), members, actions }
    }

    /// What an interval's counters come to.
    fn plan(&mut self, step: u32) {
        let warm = Warm { limit: Duration::from_secs(60), start: Duration::from_millis(10), gap: None };
        let load = Load { arrivals: f64::from(step % 64), execution: if step.is_multiple_of(7) { 2.0 } else { 0.5 } };
        self.kinds.observe("64 cores", load);
        let queue = self.estimator.observe(load).min(self.kinds.capacity("64 cores"));
        let wanted = Wanted { shape: Shape::new(queue, 2, 64), top: step.is_multiple_of(5) };
        self.members.copy_from_slice(&self.told);
        decide(&mut self.members, wanted, warm, Duration::from_secs(step.into()), &mut self.actions);
        black_box(&self.actions);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_timed_is_what_is_meant() {
        check().unwrap();
        let mut planner = Planner::new();
        let acted: usize = (0..COUNTED)
            .map(|step| {
                planner.plan(step);
                planner.actions.len()
            })
            .sum();
        assert!(acted > COUNTED as usize, "there is something to do: {acted}");
    }

    #[test]
    fn the_exponent_of_a_power_is_found() {
        let power = |x: f64| (x.ln(), (3.0 * x.powf(1.25)).ln());
        assert!((slope(&[1e3, 1e4, 1e6].map(power)) - 1.25).abs() < 1e-9);
    }
}
