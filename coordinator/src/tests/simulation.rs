//! Whole jobs against a fake world: everyone dies at any time, messages are cut, clients come and go.
//!
//! The world keeps what really survives: the gateway's ledger, the disk, the supervisor's deposit. What is checked:
//! rounds are committed in order and once, each commit holds exactly what was acknowledged, and once the faults end
//! and `minClients` are alive, the job succeeds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use lifl_api::{
    event::MetricsData,
    job::FederatedJob,
    node::{ChainState, Order, ReceiptEntry, ToGateway},
};

use super::{chain_state, job};
use crate::{
    plan::Shape,
    round::{Action, Event, StoreFailure, decide, wake},
    state::{Done, JobState, Jobs, Loaded, Model, Node, Phase, RoundSummary, SavedRound},
};

const SHAPE: Shape = Shape { elements: 1000, file_bytes: 4200, float_tensors: 2, other_bytes: 0 };

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

/// The gateway: its ledger survives, its memory does not.
#[derive(Default)]
struct Gateway {
    up: bool,
    chain: u32,
    round: u32,
    open: bool,
    goal: u32,
    admitted: BTreeSet<String>,
    ready: bool,
    committed: u32,
    selected: BTreeSet<String>,
    model: Option<u32>,
    finished: Option<bool>,
}

struct World {
    rng: Rng,
    now: i64,
    document: FederatedJob,
    jobs: Jobs,
    coordinator: bool,
    agent: bool,
    members: bool,
    gateway: Gateway,
    to_gateway: VecDeque<ToGateway>,
    from_gateway: VecDeque<Event>,
    to_agent: VecDeque<Order>,
    from_agent: VecDeque<Event>,
    /// Stores begun by the living coordinator.
    stores: VecDeque<Done>,
    /// An end being stored by the living coordinator.
    end: Option<String>,
    disk: BTreeMap<u32, BTreeSet<String>>,
    /// The end on disk: last committed round, reason.
    ended: Option<(u32, String)>,
    deposit: Option<SavedRound>,
    alive: BTreeSet<String>,
    everyone: Vec<String>,
    acknowledged: BTreeMap<u32, BTreeSet<String>>,
    faults: bool,
    stops_at: Option<u32>,
    commits: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let goal = 1 + rng.below(6);
        let min = 1 + rng.below(goal);
        let rounds = 1 + rng.below(6);
        let stops = rng.chance(30).then(|| u32::try_from(1 + rng.below(4)).unwrap());
        let more = if stops.is_some() { "  stop: {metric: accuracy, atLeast: 0.9}\n" } else { "" };
        let as_u32 = |n: usize| u32::try_from(n).unwrap();
        let document = job(as_u32(rounds), as_u32(goal), as_u32(min), "file:///c", "file:///m", more);
        let everyone = (0..min + rng.below(10)).map(|i| format!("c{i}")).collect();
        let mut world = Self {
            rng,
            now: 1_000_000,
            document,
            jobs: Jobs::default(),
            coordinator: false,
            agent: false,
            members: false,
            gateway: Gateway::default(),
            to_gateway: VecDeque::new(),
            from_gateway: VecDeque::new(),
            to_agent: VecDeque::new(),
            from_agent: VecDeque::new(),
            stores: VecDeque::new(),
            end: None,
            disk: BTreeMap::new(),
            ended: None,
            deposit: None,
            alive: BTreeSet::new(),
            everyone,
            acknowledged: BTreeMap::new(),
            faults: true,
            stops_at: stops,
            commits: 0,
        };
        world.start_coordinator();
        world
    }

    fn job(&mut self) -> &mut JobState {
        self.jobs.get_mut(0).unwrap()
    }

    fn hash(round: u32, ids: &BTreeSet<String>) -> String {
        format!("{round}:{}", ids.iter().cloned().collect::<Vec<_>>().join(","))
    }

    fn model(&self, round: u32) -> Model {
        let sha256 = self.disk.get(&round).map_or("initial".into(), |ids| Self::hash(round, ids));
        Model { round, sha256, length: SHAPE.file_bytes, uri: String::new() }
    }

    // --- deaths and births

    fn start_coordinator(&mut self) {
        let committed = self.disk.keys().max().copied().unwrap_or(0);
        let summary =
            |round: &u32| RoundSummary { round: *round, count: 1, weight: 1.0, seconds: 0.0, sha256: String::new() };
        let loaded = Loaded {
            token_key: "ab".into(),
            model: Some((self.model(committed), SHAPE)),
            history: self.disk.keys().map(summary).collect(),
            saved: self.deposit.clone(),
            ended: self.ended.clone().filter(|(round, _)| *round == committed).map(|(_, reason)| reason),
            ..Loaded::default()
        };
        self.jobs = Jobs::new(vec![JobState::new("j".into(), self.document.clone(), None, 2000, loaded, self.now)]);
        self.coordinator = true;
        if self.agent {
            self.connect_agent();
        }
        if self.gateway.up {
            self.connect_gateway();
        }
    }

    fn kill_coordinator(&mut self) {
        self.coordinator = false;
        self.from_gateway.clear();
        self.from_agent.clear();
        // What it wrote into its sockets is still read; a store may have ended or not.
        let keep = self.rng.below(self.to_gateway.len() + 1);
        self.to_gateway.truncate(keep);
        while let Some(words) = self.to_gateway.pop_front() {
            if self.gateway.up {
                self.gateway_hears(words);
            }
        }
        self.from_gateway.clear();
        self.to_agent.clear();
        if let Some(done) = self.stores.pop_front()
            && self.rng.chance(50)
        {
            self.write(&done);
        }
        self.stores.clear();
        if let Some(reason) = self.end.take()
            && self.rng.chance(50)
        {
            self.write_end(reason);
        }
    }

    fn write_end(&mut self, reason: String) {
        self.ended = Some((self.disk.keys().max().copied().unwrap_or(0), reason));
    }

    fn connect_agent(&mut self) {
        self.agent = true;
        self.to_agent.clear();
        self.from_agent.clear();
        self.from_agent.push_back(Event::AgentUp(Node { quota: 1 << 30, cores: 2 }));
    }

    fn connect_gateway(&mut self) {
        self.gateway.up = true;
        self.to_gateway.clear();
        self.from_gateway.clear();
        let state = (self.gateway.chain > 0).then(|| ChainState {
            open: self.gateway.open,
            admitted: u32::try_from(self.gateway.admitted.len()).unwrap(),
            model_round: self.gateway.model,
            ..chain_state(self.gateway.chain, "digits", self.gateway.round)
        });
        let hello: Vec<_> = state.iter().cloned().collect();
        assert!(self.jobs.assign(&hello).is_empty(), "a chain is given up");
        self.from_gateway.push_back(Event::GatewayUp(state));
        self.say_done();
    }

    fn kill_gateway(&mut self) {
        self.gateway.up = false;
        (self.gateway.selected, self.gateway.model) = (BTreeSet::new(), None);
        self.to_gateway.clear();
        self.from_gateway.clear();
        self.from_gateway.push_back(Event::GatewayDown);
    }

    // --- what the others do

    fn say_done(&mut self) {
        let g = &self.gateway;
        if !g.ready || g.committed >= g.round {
            return;
        }
        let entry =
            |id: &String| ReceiptEntry { source: "s".into(), id: id.clone(), weight: 1.0, digest: String::new() };
        self.from_gateway.push_back(Event::RoundDone(Done {
            round: g.round,
            count: u32::try_from(g.admitted.len()).unwrap(),
            weight: g.admitted.len() as f64,
            length: SHAPE.file_bytes,
            receipt: g.admitted.iter().map(entry).collect(),
        }));
    }

    fn say_closed(&mut self) {
        let admitted = u32::try_from(self.gateway.admitted.len()).unwrap();
        self.from_gateway.push_back(Event::Closed { round: self.gateway.round, admitted });
    }

    fn gateway_hears(&mut self, words: ToGateway) {
        match words {
            ToGateway::Job { chain, .. } => self.gateway.chain = chain,
            ToGateway::Model { round, .. } => self.gateway.model = Some(round),
            ToGateway::Open { round, selected, goal, .. } => {
                let g = &mut self.gateway;
                if round > g.round {
                    assert!(
                        g.admitted.is_empty() || g.committed == g.round,
                        "round {round} buries updates of {}",
                        g.round
                    );
                    assert_eq!(round, g.round + 1);
                    (g.round, g.open, g.goal, g.ready) = (round, true, goal, false);
                    g.admitted.clear();
                }
                if round == g.round && g.open {
                    g.selected = selected.into_iter().collect();
                }
            }
            ToGateway::Extend { round, selected, .. } => {
                if round == self.gateway.round && self.gateway.open {
                    self.gateway.selected = selected.into_iter().collect();
                }
            }
            ToGateway::Close { round, .. } if round != self.gateway.round => {}
            ToGateway::Close { .. } => {
                self.gateway.open = false;
                self.say_closed();
                self.say_done();
            }
            ToGateway::Commit { round, sha256, .. } => {
                let ids = self.disk.get(&round).expect("committed before it was stored");
                assert_eq!(sha256, Self::hash(round, ids));
                let g = &mut self.gateway;
                if round == g.round {
                    assert!(!g.open);
                    assert_eq!(&g.admitted, ids, "the commit is not what was acknowledged");
                    (g.committed, g.model) = (round, Some(round));
                }
            }
            ToGateway::Finish { succeeded, .. } => self.gateway.finished = Some(succeeded),
            other @ (ToGateway::Remove { .. } | ToGateway::Greet | ToGateway::Clients) => panic!("{other:?}"),
            ToGateway::Alive { .. } => {
                self.from_gateway.push_back(Event::Alive(self.alive.iter().cloned().collect()));
            }
        }
    }

    fn agent_hears(&mut self, order: Order) {
        let Order::Plan { revision, members, .. } = order else { return };
        if self.faults && !members.is_empty() && self.rng.chance(5) {
            self.from_agent.push_back(Event::PlanFailed(revision, "no process".into()));
            return;
        }
        // New members: the gateway replays to them, and the model is made again.
        if !self.members && !members.is_empty() && self.gateway.committed < self.gateway.round {
            self.gateway.ready = false;
        }
        self.members = !members.is_empty();
        self.from_agent.push_back(Event::Planned(revision));
    }

    fn submit(&mut self) {
        let g = &mut self.gateway;
        let ready = g.up && g.open && g.model == Some(g.round - 1);
        let candidates: Vec<_> = g.selected.intersection(&self.alive).filter(|c| !g.admitted.contains(*c)).collect();
        if !ready || candidates.is_empty() {
            return;
        }
        let client = candidates[self.rng.below(candidates.len())].clone();
        g.admitted.insert(client.clone());
        self.acknowledged.entry(g.round).or_default().insert(client);
        let admitted = u32::try_from(g.admitted.len()).unwrap();
        if admitted >= g.goal {
            g.open = false;
            self.say_closed();
        } else {
            self.from_gateway.push_back(Event::Progress { round: g.round, admitted });
        }
    }

    fn fold(&mut self) {
        let g = &mut self.gateway;
        if g.up && self.members && !g.open && !g.ready && !g.admitted.is_empty() && g.committed < g.round {
            g.ready = true;
            self.say_done();
        }
    }

    fn measure(&mut self) {
        let round = self.gateway.model.unwrap_or(0);
        let value = if self.stops_at.is_some_and(|at| round >= at) { 0.95 } else { 0.5 };
        let data = MetricsData { round, samples: 10, metrics: [("accuracy".to_owned(), value)].into() };
        self.from_gateway.push_back(Event::Metrics { client: "judge".into(), evaluator: true, data });
    }

    fn come_or_go(&mut self) {
        let client = self.everyone[self.rng.below(self.everyone.len())].clone();
        if !self.alive.remove(&client) {
            self.alive.insert(client.clone());
            if self.gateway.up {
                self.from_gateway.push_back(Event::Joined { client, evaluator: false });
            }
        }
    }

    fn write(&mut self, done: &Done) {
        let ids: BTreeSet<String> = done.receipt.iter().map(|e| e.id.clone()).collect();
        assert_eq!(self.disk.len() + 1, usize::try_from(done.round).unwrap(), "rounds are not consecutive, or twice");
        assert_eq!(ids, self.acknowledged[&done.round], "the commit is not what was acknowledged");
        let finishing = self.stops_at.is_some();
        let min = usize::try_from(self.document.spec.min_clients()).unwrap();
        assert!(ids.len() >= min || finishing, "{} updates are too few", ids.len());
        assert!(self.disk.insert(done.round, ids).is_none());
    }

    fn store(&mut self) {
        if let Some(reason) = self.end.take() {
            let result = if self.faults && self.rng.chance(30) {
                Err(StoreFailure::Storage("no space left on device".into()))
            } else {
                self.write_end(reason);
                Ok(())
            };
            return self.decide(Event::EndStored(result));
        }
        let Some(done) = self.stores.pop_front() else { return };
        let round = done.round;
        let result = if self.faults && self.rng.chance(15) {
            Err(StoreFailure::Storage("no space left on device".into()))
        } else if self.faults && self.rng.chance(5) {
            Err(StoreFailure::Rejected("not finite".into()))
        } else {
            self.write(&done);
            Ok(self.model(round))
        };
        self.decide(Event::Stored(round, result));
    }

    // --- the coordinator

    fn decide(&mut self, event: Event) {
        if !self.coordinator {
            return;
        }
        let now = self.now;
        let actions = decide(self.job(), event, now);
        assert!(actions.len() < 30, "a flood of actions: {actions:?}");
        for action in actions {
            match action {
                Action::Gateway(words) if self.gateway.up => self.to_gateway.push_back(words),
                Action::Agent(order) if self.agent => self.to_agent.push_back(order),
                Action::Store { done, .. } => self.stores.push_back(done),
                Action::StoreEnd { reason } => assert_eq!(self.end.replace(reason), None, "two ends at once"),
                Action::Save(saved) => self.deposit = Some(saved),
                Action::Forget => self.deposit = None,
                Action::Committed { round, .. } => {
                    assert_eq!(self.disk.keys().max(), Some(&round));
                    self.commits += 1;
                }
                _ => {}
            }
        }
        assert!(self.stores.len() + usize::from(self.end.is_some()) <= 1, "two stores at once");
    }

    fn tick(&mut self) {
        if self.coordinator
            && let Some(at) = wake(self.job())
            && at <= self.now
        {
            self.decide(Event::Tick);
            let next = wake(self.job());
            assert!(next.is_none_or(|next| next > self.now), "the clock would spin: {:?}", self.job());
        }
    }

    fn deliver(&mut self) {
        match self.rng.below(4) {
            0 => {
                if let (true, Some(words)) = (self.gateway.up, self.to_gateway.pop_front()) {
                    self.gateway_hears(words);
                }
            }
            1 => {
                if let Some(event) = self.from_gateway.pop_front() {
                    self.decide(event);
                }
            }
            2 => {
                if let (true, Some(order)) = (self.agent, self.to_agent.pop_front()) {
                    self.agent_hears(order);
                }
            }
            _ => {
                if let Some(event) = self.from_agent.pop_front() {
                    self.decide(event);
                }
            }
        }
    }

    fn step(&mut self) {
        self.now += i64::try_from(self.rng.below(400)).unwrap();
        match self.rng.below(if self.faults { 100 } else { 84 }) {
            0..48 => self.deliver(),
            48..60 => self.submit(),
            60..66 => self.fold(),
            66..74 => self.store(),
            74..81 => self.tick(),
            81..84 if self.gateway.up => self.measure(),
            84..92 => self.come_or_go(),
            92..94 if self.coordinator => self.kill_coordinator(),
            94..96 if self.gateway.up => self.kill_gateway(),
            96..97 if self.agent => {
                self.agent = false;
                self.to_agent.clear();
                self.from_agent.clear();
                self.from_agent.push_back(Event::AgentDown);
            }
            92..100 => self.revive(),
            _ => {}
        }
    }

    fn revive(&mut self) {
        if !self.coordinator {
            self.start_coordinator();
        }
        if !self.gateway.up {
            self.connect_gateway();
        }
        if !self.agent {
            self.connect_agent();
        }
    }
}

impl World {
    /// Everything dies but the disk: the job is over as before, and nothing more is trained.
    fn comes_back_as_it_ended(&mut self) {
        let reason = |job: &JobState| {
            let conditions = &job.document().status.as_ref().unwrap().conditions;
            conditions.iter().find(|c| c.kind == "Succeeded").unwrap().message.clone()
        };
        let (before, rounds) = (reason(self.job()), self.disk.len());
        (self.deposit, self.agent, self.gateway) = (None, false, Gateway::default());
        self.kill_coordinator();
        self.revive();
        for _ in 0..200 {
            self.deliver();
        }
        assert_eq!((self.job().phase(), self.disk.len()), (Phase::Succeeded, rounds), "{:?}", self.job());
        assert_eq!(reason(self.job()), before);
    }
}

/// Runs one world; returns how many rounds it committed.
fn run(seed: u64) -> u32 {
    let mut world = World::new(seed);
    for _ in 0..600 {
        world.step();
    }
    world.faults = false;
    world.revive();
    let min = usize::try_from(world.document.spec.min_clients()).unwrap();
    // Only as many as needed live on, and not those who were selected last.
    let skip = world.rng.below(world.everyone.len() - min + 1);
    world.alive = world.everyone[skip..skip + min].iter().cloned().collect();
    for _ in 0..60_000 {
        let over = matches!(world.job().phase(), Phase::Succeeded | Phase::Failed);
        if over && world.to_gateway.is_empty() && world.from_gateway.is_empty() {
            break;
        }
        world.step();
    }
    let (phase, rounds) = (world.job().phase(), world.document.spec.rounds);
    if phase == Phase::Failed {
        // The only ways: eight failed plans, or eight refused models.
        let text = format!("{:?}", world.job().document().status);
        assert!(text.contains("attempt 8 of 8"), "seed {seed}: {text}");
        return world.commits;
    }
    assert_eq!(phase, Phase::Succeeded, "seed {seed}: no progress: {:?}", world.job());
    assert_eq!(world.gateway.finished, Some(true), "seed {seed}");
    let last = world.disk.keys().max().copied().unwrap_or(0);
    let stopped = world.stops_at.is_some_and(|at| last >= at);
    assert!(last == rounds || stopped, "seed {seed}: {last} of {rounds}");
    assert_eq!(last < rounds, world.ended.as_ref().is_some_and(|(round, _)| *round == last), "seed {seed}");
    world.comes_back_as_it_ended();
    for (round, ids) in &world.acknowledged {
        assert_eq!(world.disk.get(round), Some(ids), "seed {seed}: acknowledged updates of round {round} are lost");
    }
    world.commits
}

#[test]
fn rounds_are_committed_once_and_whole_whoever_dies() {
    let commits: u32 = (1..=1000).map(run).sum();
    assert!(commits > 1000, "only {commits} commits: the worlds are too hostile to test anything");
}
