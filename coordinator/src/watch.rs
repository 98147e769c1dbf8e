//! The edges: hears agent, gateway and clock, has it decided, carries it out.

mod act;
mod cluster;
mod desk;
mod peer;
mod roster;

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use lifl_api::node::{ChainState, FromGateway, NodeEvent, Order, ToGateway};
use lifl_cluster::Key;
use lifl_daemon::{Channel, Child, ChildError, Sibling, Startup, failpoint};
use tokio::{
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    task::JoinSet,
    time::Instant,
};

use self::{
    desk::Desk,
    peer::{Heard, Peer},
    roster::{Read, Roster},
};
use crate::{
    checkpoint::{Sealed, Source},
    config::{Config, ConfigError, JobEntry},
    metrics::Metrics,
    plan::Shape,
    round::{Action, Event, StoreFailure, decide, job_words, wake},
    state::{Done, JobState, Jobs, Model, Node},
    wish::Wish,
};

/// Changes of a status are told to the gateway together.
const PUBLISH: Duration = Duration::from_millis(100);
/// Deposits of open rounds begin with this.
const DEPOSIT: &str = "round/";
/// Deposits of jobs of an API server: it may be away when the next life of this process begins.
const JOB: &str = "job/";
/// Deposit of the supervisor's: a listener for clients.
const CLIENTS: &str = "clients";

/// The coordinator cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its supervisor.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// Its metrics.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The pod of a sibling was replaced: all that it had is gone, and a new life finds that out for every job.
    #[error(
        "the {0} is another one than before, with nothing of what that had: every job begins again at its checkpoint"
    )]
    Replaced(String),
}

/// What the loop hears.
enum Word {
    Agent(u64, Heard<NodeEvent>),
    Gateway(u64, Heard<FromGateway>),
    Stored(usize, u32, Result<Model, StoreFailure>),
    FirstStored(usize, Result<(Model, Sealed), StoreFailure>),
    EndStored(usize, Result<(), StoreFailure>),
    Wished(BTreeMap<Key, Wish>),
    Read(Box<JobEntry>, Read),
}

struct Watch {
    child: Child,
    config: Config,
    jobs: Arc<Mutex<Jobs>>,
    desks: BTreeMap<usize, Desk>,
    roster: Roster,
    /// Listener for clients in this pod: for the gateway that has the jobs.
    clients: Option<Arc<OwnedFd>>,
    metrics: Metrics,
    agent: Option<Peer<Order>>,
    gateway: Option<Peer<ToGateway>>,
    /// Number of the last connection.
    connection: u64,
    /// Epochs of the siblings' supervisors, by name.
    siblings: BTreeMap<String, u64>,
    /// What the agent said of its node when it connected.
    node: Option<Node>,
    /// Chains that it had then.
    at_agent: Vec<u32>,
    /// Chains that the gateway had when it was asked last; `None`: this connection's gateway has not said.
    at_gateway: Option<Vec<ChainState>>,
    /// The gateway can keep journals.
    journal: bool,
    words: UnboundedSender<Word>,
    /// Checkpoints being written.
    stores: JoinSet<()>,
    /// Chains that the agent shall remove.
    retired: Vec<u32>,
    publish_at: Option<Instant>,
}

/// Coordinates the jobs of its configuration until it is drained.
///
/// # Errors
/// [`CoordinatorError`] when the configuration is unreadable or the supervisor is gone.
pub fn run(child: Child, startup: Startup) -> BoxFuture<'static, Result<(), CoordinatorError>> {
    // A future that is not boxed is compiled where it is polled, and there once for each kind of runtime.
    Box::pin(work(child, startup))
}

async fn work(child: Child, mut startup: Startup) -> Result<(), CoordinatorError> {
    let config = Config::read(startup.config)?;
    let metrics = Metrics::new(child.registry())?;
    let jobs = Arc::new(Mutex::new(Jobs::default()));
    let shown = jobs.clone();
    child.on_status(move || lock(&shown).document());
    let (words, heard) = mpsc::unbounded_channel();
    let clients = startup.restored.iter().position(|deposit| deposit.key == CLIENTS);
    let clients = clients.and_then(|at| startup.restored.remove(at).fds.pop()).map(Arc::new);
    let roster = Roster::new(&config, startup.restored);
    let mut watch = Watch {
        child,
        config,
        jobs,
        desks: BTreeMap::new(),
        roster,
        clients,
        metrics,
        agent: None,
        gateway: None,
        connection: 0,
        siblings: BTreeMap::new(),
        node: None,
        at_agent: Vec::new(),
        at_gateway: None,
        journal: false,
        words,
        stores: JoinSet::new(),
        retired: Vec::new(),
        publish_at: None,
    };
    watch.read_known().await;
    watch.child.ready().await?;
    watch.roster.open(&watch.config, &watch.words);
    watch.serve(heard).await
}

fn lock(jobs: &Mutex<Jobs>) -> MutexGuard<'_, Jobs> {
    jobs.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> i64 {
    Timestamp::now().as_millisecond()
}

fn deposit_key(job: &JobState) -> String {
    format!("{DEPOSIT}{}/{}", job.document().namespace(), job.document().name())
}

// === impl Watch ===

impl Watch {
    async fn serve(mut self, mut heard: UnboundedReceiver<Word>) -> Result<(), CoordinatorError> {
        loop {
            let tick = self.next_tick();
            let publish = self.publish_at;
            tokio::select! {
                peer = self.child.next_peer() => match peer {
                    Some(sibling) => self.meet(sibling)?,
                    None => break,
                },
                Some(word) = heard.recv() => self.hear(word).await,
                () = sleep(tick) => self.tick().await,
                () = sleep(publish) => self.publish(),
                () = self.child.draining() => break,
                Some(_ended) = self.stores.join_next() => {}
            }
            self.make_room().await;
            let unsaid = lock(&self.jobs).iter().any(|job| self.is_to_be_told(job));
            self.publish_at = unsaid.then(|| self.publish_at.unwrap_or_else(|| Instant::now() + PUBLISH));
        }
        // What is being written is safe at any point; finished, it need not be written again.
        while self.stores.join_next().await.is_some() {}
        Ok(())
    }

    /// When the clock is needed next; never, while all jobs wait for others.
    fn next_tick(&self) -> Option<Instant> {
        let at = {
            let jobs = lock(&self.jobs);
            jobs.iter().filter_map(wake).chain(self.roster.next_retry(&jobs.absent)).min()?
        };
        // A floor, so that a deadline that cannot be met yet does not spin.
        let wait = u64::try_from(at - now()).unwrap_or(0).max(10);
        Some(Instant::now() + Duration::from_millis(wait))
    }

    fn meet(&mut self, sibling: Sibling) -> Result<(), CoordinatorError> {
        let Sibling { name, epoch, channel } = sibling;
        let before = self.siblings.insert(name.clone(), epoch);
        if before.is_some_and(|before| before != epoch) {
            return Err(CoordinatorError::Replaced(name));
        }
        self.connect(&name, channel);
        Ok(())
    }

    fn connect(&mut self, name: &str, channel: Channel) {
        self.connection += 1;
        let (connection, words) = (self.connection, self.words.clone());
        match name {
            "agent" => {
                let hear = move |heard| words.send(Word::Agent(connection, heard)).is_ok();
                self.agent = Some(Peer::new(connection, channel, hear));
                self.node = None;
            }
            "gateway" => {
                let hear = move |heard| words.send(Word::Gateway(connection, heard)).is_ok();
                let gateway = Peer::new(connection, channel, hear);
                if let Some(listener) = &self.clients {
                    gateway.tell(ToGateway::Clients, Some(listener.clone()), None);
                }
                self.gateway = Some(gateway);
                self.at_gateway = None;
            }
            other => tracing::warn!(name = other, "unknown sibling"),
        }
    }

    async fn hear(&mut self, word: Word) {
        match word {
            Word::Agent(connection, heard) if self.agent.as_ref().is_some_and(|a| a.connection == connection) => {
                match heard {
                    Some((event, _)) => self.hear_agent(event).await,
                    None => {
                        (self.agent, self.node) = (None, None);
                        self.tell_all(|_| Some(Event::AgentDown)).await;
                    }
                }
            }
            Word::Gateway(connection, heard) if self.gateway.as_ref().is_some_and(|g| g.connection == connection) => {
                match heard {
                    Some((word, fds)) => self.hear_gateway(word, fds).await,
                    None => {
                        (self.gateway, self.at_gateway) = (None, None);
                        self.tell_all(|_| Some(Event::GatewayDown)).await;
                    }
                }
            }
            Word::Agent(..) | Word::Gateway(..) => {}
            Word::EndStored(index, result) => {
                self.complain(index, "the job's end", result.as_ref().err());
                self.tell(index, Event::EndStored(result)).await;
            }
            Word::Stored(index, round, result) => {
                self.complain(index, &format!("round {round}"), result.as_ref().err());
                if let (Ok(_), Some(desk)) = (&result, self.desks.get_mut(&index)) {
                    (desk.model, desk.done) = (None, None);
                }
                self.tell(index, Event::Stored(round, result)).await;
            }
            Word::FirstStored(index, result) => {
                self.complain(index, "the first model", result.as_ref().err());
                if let Some(desk) = self.desks.get_mut(&index) {
                    desk.first = None;
                }
                let result = result.map(|(model, sealed)| {
                    let shape = Shape::of(&sealed.manifest);
                    if let Some(desk) = self.desks.get_mut(&index) {
                        desk.manifest = Some(Arc::new(sealed.manifest));
                        desk.model = Some((0, Arc::new(sealed.fd)));
                    }
                    (model, shape)
                });
                self.tell(index, Event::FirstStored(result)).await;
            }
            Word::Wished(wishes) => self.wished(wishes).await,
            Word::Read(entry, read) => self.read(entry, read).await,
        }
    }

    async fn hear_agent(&mut self, event: NodeEvent) {
        let (chain, event) = match event {
            NodeEvent::Hello { shm_limit, cores, path, chains } => {
                tracing::info!(shm_limit, cores, path, chains = chains.len(), "agent");
                self.at_agent = chains;
                self.remove_retired();
                let quota = self.config.shm_limit.unwrap_or(u64::MAX).min(shm_limit) / self.config.shares();
                let node = Node { quota, cores };
                self.node = Some(node);
                self.tell_all(|_| Some(Event::AgentUp(node))).await;
                return self.remove_strays();
            }
            NodeEvent::Planned { chain, revision } => (chain, Event::Planned(revision)),
            NodeEvent::PlanFailed { chain, revision, reason } => {
                tracing::warn!(chain, revision, reason, "aggregators cannot be started");
                (chain, Event::PlanFailed(revision, reason))
            }
            NodeEvent::MemberDied { chain, role, reason } => {
                tracing::warn!(chain, role, reason, "aggregator died and is replaced");
                (chain, Event::MemberDied)
            }
        };
        self.tell_chain(chain, event).await;
    }

    fn remove_retired(&mut self) {
        if let Some(agent) = &self.agent {
            for chain in self.retired.drain(..) {
                agent.tell(Order::Remove { chain }, None, None);
            }
        }
    }

    async fn hear_gateway(&mut self, word: FromGateway, fds: Vec<OwnedFd>) {
        let (chain, event) = match word {
            FromGateway::Hello { chains, journal } => return self.hear_hello(chains, journal).await,
            FromGateway::Joined { chain, client, evaluator } => (chain, Event::Joined { client, evaluator }),
            FromGateway::AliveClients { chain, clients } => (chain, Event::Alive(clients)),
            FromGateway::Metrics { chain, client, evaluator, data } => {
                (chain, Event::Metrics { client, evaluator, data })
            }
            FromGateway::Progress { chain, round, admitted } => (chain, Event::Progress { round, admitted }),
            FromGateway::Closed { chain, round, admitted } => (chain, Event::Closed { round, admitted }),
            FromGateway::RoundDone { chain, round, count, weight, offset, length, receipt } => {
                failpoint("coordinator.round_done");
                let Some(desk) = self.desk_of(chain) else { return };
                let Some(fd) = fds.into_iter().next() else {
                    tracing::error!(chain, round, "model of a round without its descriptor");
                    return;
                };
                desk.done = Some((round, Arc::new(Source::new(fd, offset, length))));
                (chain, Event::RoundDone(Done { round, count, weight, length, receipt }))
            }
            FromGateway::FirstModel { chain, offset, length } => {
                let Some(desk) = self.desk_of(chain) else { return };
                let Some(fd) = fds.into_iter().next() else {
                    tracing::error!(chain, "first model without its descriptor");
                    return;
                };
                desk.adopt(Source::new(fd, offset, length));
                (chain, Event::FirstModel)
            }
        };
        self.tell_chain(chain, event).await;
    }

    /// Where the gateway stands: a new one, or one that was asked again.
    async fn hear_hello(&mut self, chains: Vec<ChainState>, journal: bool) {
        let again = self.at_gateway.is_some();
        self.journal = journal;
        let retired = {
            let mut jobs = lock(&self.jobs);
            jobs.iter_mut().for_each(|(_, job)| job.journal = journal);
            jobs.assign(&chains)
        };
        self.retire(&retired);
        self.keep_chains().await;
        let state = |job: &JobState| {
            let chain = job.chain()?;
            let known = again && job.gateway;
            (!known).then(|| Event::GatewayUp(chains.iter().find(|c| c.chain == chain).cloned()))
        };
        self.tell_all(state).await;
        self.at_gateway = Some(chains.into_iter().filter(|state| !retired.contains(&state.chain)).collect());
        self.remove_strays();
    }

    /// Chains that serve no job any more.
    fn retire(&mut self, chains: &[u32]) {
        for chain in chains.iter().copied() {
            if let Some(gateway) = &self.gateway {
                gateway.tell(ToGateway::Remove { chain }, None, None);
            }
            self.at_gateway.iter_mut().for_each(|all| all.retain(|state| state.chain != chain));
            self.at_agent.retain(|of| *of != chain);
            self.retired.push(chain);
        }
        self.remove_retired();
    }

    fn desk_of(&mut self, chain: u32) -> Option<&mut Desk> {
        let index = lock(&self.jobs).of_chain(chain)?;
        self.desks.get_mut(&index)
    }

    /// Writes new chains into the checkpoints, so that they stay when gateway and coordinator die together.
    async fn keep_chains(&mut self) {
        let chains: Vec<_> = lock(&self.jobs).numbered().map(|(index, job)| (index, job.chain())).collect();
        for (index, chain) in chains {
            let desk = self.desks.get_mut(&index);
            let Some(desk) = desk.filter(|desk| chain.is_some() && desk.identity.chain != chain) else {
                continue;
            };
            desk.identity.chain = chain;
            let (checkpoint, identity) = (desk.checkpoint.clone(), desk.identity.clone());
            let saved = tokio::task::spawn_blocking(move || checkpoint.save_identity(&identity)).await;
            match saved {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "chain not written"),
                Err(error) => tracing::warn!(%error, "chain not written"),
            }
        }
    }

    async fn tell_all(&mut self, event: impl Fn(&JobState) -> Option<Event>) {
        let actions: Vec<(usize, Action)> = {
            let (mut jobs, now) = (lock(&self.jobs), now());
            let decided = jobs.iter_mut().filter_map(|(index, job)| {
                let event = event(job)?;
                Some(decide(job, event, now).into_iter().map(move |action| (index, action)))
            });
            decided.flatten().collect()
        };
        for (index, action) in actions {
            self.carry_out(index, action).await;
        }
    }

    async fn tell_chain(&mut self, chain: u32, event: Event) {
        let index = lock(&self.jobs).of_chain(chain);
        match index {
            Some(index) => self.tell(index, event).await,
            None => tracing::debug!(chain, ?event, "word about no job's chain"),
        }
    }

    async fn tell(&mut self, index: usize, event: Event) {
        let actions = match lock(&self.jobs).get_mut(index) {
            Some(job) => decide(job, event, now()),
            None => return,
        };
        for action in actions {
            self.carry_out(index, action).await;
        }
    }

    async fn tick(&mut self) {
        let now = now();
        self.tell_all(|job| wake(job).filter(|at| *at <= now).map(|_| Event::Tick)).await;
        let retry = lock(&self.jobs).absent.values().any(|absent| absent.retry_at.is_some_and(|at| at <= now));
        if retry {
            self.reconcile().await;
        }
    }

    fn is_to_be_told(&self, job: &JobState) -> bool {
        (job.dirty && self.gateway.is_some()) || self.roster.hears_of(job)
    }

    /// Tells gateway and API server of all statuses that changed.
    fn publish(&mut self) {
        self.publish_at = None;
        for (_, job) in lock(&self.jobs).iter_mut() {
            if let Some(gateway) = self.gateway.as_ref().filter(|_| job.dirty) {
                job.dirty = false;
                if job.gateway
                    && let Some(Action::Gateway(words)) = job_words(job)
                {
                    gateway.tell(words, None, None);
                }
            }
            self.roster.publish(job, now());
        }
    }
}

async fn sleep(until: Option<Instant>) {
    match until {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
