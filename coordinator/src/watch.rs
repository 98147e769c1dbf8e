//! The edges: hears agent, gateway and clock, has it decided, carries it out.

mod desk;
mod peer;

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use lifl_api::node::{FromGateway, NodeEvent, Order, ToGateway};
use lifl_daemon::{Channel, Child, ChildError, Deposit, Startup, failpoint};
use tokio::{
    runtime::Handle,
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    task::JoinSet,
    time::Instant,
};

use self::{
    desk::Desk,
    peer::{Heard, Peer},
};
use crate::{
    checkpoint::{Finished, Sealed, Source},
    config::{Config, ConfigError},
    metrics::Metrics,
    plan::{Refusal, Shape},
    round::{Action, Event, StoreFailure, decide, job_words, wake},
    state::{Done, JobState, Jobs, Model, Node, SavedRound},
};

/// Changes of a status are told to the gateway together.
const PUBLISH: Duration = Duration::from_millis(100);
/// Deposits of open rounds begin with this.
const DEPOSIT: &str = "round/";

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
}

/// What the loop hears.
enum Word {
    Agent(u64, Heard<NodeEvent>),
    Gateway(u64, Heard<FromGateway>),
    Stored(usize, u32, Result<Model, StoreFailure>),
    FirstStored(usize, Result<(Model, Sealed), StoreFailure>),
    EndStored(usize, Result<(), StoreFailure>),
}

struct Watch {
    child: Child,
    config: Config,
    jobs: Arc<Mutex<Jobs>>,
    desks: Vec<Option<Desk>>,
    metrics: Metrics,
    agent: Option<Peer<Order>>,
    gateway: Option<Peer<ToGateway>>,
    epoch: u64,
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
pub async fn run(child: Child, startup: Startup) -> Result<(), CoordinatorError> {
    let config = Config::read(startup.config)?;
    let metrics = Metrics::new(child.registry())?;
    let jobs = Arc::new(Mutex::new(Jobs::default()));
    let shown = jobs.clone();
    child.on_status(move || lock(&shown).document());
    let (loaded, desks) = load(&config, saved_rounds(startup.restored)).await;
    *lock(&jobs) = Jobs::new(loaded);
    child.ready().await?;
    let (words, heard) = mpsc::unbounded_channel();
    let watch = Watch {
        child,
        config,
        jobs,
        desks,
        metrics,
        agent: None,
        gateway: None,
        epoch: 0,
        words,
        stores: JoinSet::new(),
        retired: Vec::new(),
        publish_at: None,
    };
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

fn saved_rounds(restored: Vec<Deposit>) -> BTreeMap<String, SavedRound> {
    let rounds = restored.into_iter().filter(|deposit| deposit.key.starts_with(DEPOSIT));
    let read = |deposit: Deposit| match serde_json::from_value(deposit.meta) {
        Ok(saved) => Some((deposit.key, saved)),
        Err(error) => {
            tracing::warn!(key = deposit.key, %error, "deposit of an earlier life");
            None
        }
    };
    rounds.filter_map(read).collect()
}

/// Reads all checkpoints, each on a thread of its own: models are hashed.
async fn load(config: &Config, mut saved: BTreeMap<String, SavedRound>) -> (Vec<JobState>, Vec<Option<Desk>>) {
    let gathering = i64::try_from(config.gathering_ms).unwrap_or(i64::MAX / 4);
    let mut tasks = Vec::new();
    for (entry, conflict) in config.jobs.iter().zip(config.conflicts()) {
        let fallback = entry.clone();
        let key = format!("{DEPOSIT}{}/{}", entry.document.namespace(), entry.document.name());
        let (entry, saved, base) = (entry.clone(), saved.remove(&key), config.state_dir.clone());
        let runtime = Handle::current();
        let task = tokio::task::spawn_blocking(move || match conflict {
            Some(message) => {
                let refusal = Refusal { reason: "Conflict", message };
                (JobState::refused(entry.path, entry.document, &refusal, true, now()), None)
            }
            None => desk::load(entry, saved, base, gathering, &runtime, now()),
        });
        tasks.push((fallback, task));
    }
    let mut loaded = (Vec::new(), Vec::new());
    for (entry, task) in tasks {
        let (job, desk) = task.await.unwrap_or_else(|error| {
            let refusal = Refusal { reason: "Internal", message: format!("reading the checkpoint: {error}") };
            (JobState::refused(entry.path, entry.document, &refusal, false, now()), None)
        });
        let (path, phase, round) = (&job.path, job.phase(), job.committed());
        tracing::info!(path, ?phase, round, "job read");
        loaded.0.push(job);
        loaded.1.push(desk);
    }
    loaded
}

// === impl Watch ===

impl Watch {
    async fn serve(mut self, mut heard: UnboundedReceiver<Word>) -> Result<(), CoordinatorError> {
        loop {
            let tick = self.next_tick();
            let publish = self.publish_at;
            tokio::select! {
                peer = self.child.next_peer() => match peer {
                    Some((name, channel)) => self.connect(&name, channel),
                    None => break,
                },
                Some(word) = heard.recv() => self.hear(word).await,
                () = sleep(tick) => self.tick().await,
                () = sleep(publish) => self.publish(),
                () = self.child.draining() => break,
                Some(_ended) = self.stores.join_next() => {}
            }
            let dirty = self.gateway.is_some() && lock(&self.jobs).iter().any(|job| job.dirty);
            self.publish_at = dirty.then(|| self.publish_at.unwrap_or_else(|| Instant::now() + PUBLISH));
        }
        // What is being written is safe at any point; finished, it need not be written again.
        while self.stores.join_next().await.is_some() {}
        Ok(())
    }

    /// When the clock is needed next; never, while all jobs wait for others.
    fn next_tick(&self) -> Option<Instant> {
        let at = lock(&self.jobs).iter().filter_map(wake).min()?;
        // A floor, so that a deadline that cannot be met yet does not spin.
        let wait = u64::try_from(at - now()).unwrap_or(0).max(10);
        Some(Instant::now() + Duration::from_millis(wait))
    }

    fn connect(&mut self, name: &str, channel: Channel) {
        self.epoch += 1;
        let (epoch, words) = (self.epoch, self.words.clone());
        match name {
            "agent" => {
                let hear = move |heard| words.send(Word::Agent(epoch, heard)).is_ok();
                self.agent = Some(Peer::new(epoch, channel, hear));
            }
            "gateway" => {
                let hear = move |heard| words.send(Word::Gateway(epoch, heard)).is_ok();
                self.gateway = Some(Peer::new(epoch, channel, hear));
            }
            other => tracing::warn!(name = other, "unknown sibling"),
        }
    }

    async fn hear(&mut self, word: Word) {
        match word {
            Word::Agent(epoch, heard) if self.agent.as_ref().is_some_and(|a| a.epoch == epoch) => match heard {
                Some((event, _)) => self.hear_agent(event).await,
                None => {
                    self.agent = None;
                    self.tell_all(|_| Some(Event::AgentDown)).await;
                }
            },
            Word::Gateway(epoch, heard) if self.gateway.as_ref().is_some_and(|g| g.epoch == epoch) => match heard {
                Some((word, fds)) => self.hear_gateway(word, fds).await,
                None => {
                    self.gateway = None;
                    self.tell_all(|_| Some(Event::GatewayDown)).await;
                }
            },
            Word::Agent(..) | Word::Gateway(..) => {}
            Word::EndStored(index, result) => {
                self.complain(index, "the job's end", result.as_ref().err());
                self.tell(index, Event::EndStored(result)).await;
            }
            Word::Stored(index, round, result) => {
                self.complain(index, &format!("round {round}"), result.as_ref().err());
                if let (Ok(_), Some(desk)) = (&result, &mut self.desks[index]) {
                    (desk.model, desk.done) = (None, None);
                }
                self.tell(index, Event::Stored(round, result)).await;
            }
            Word::FirstStored(index, result) => {
                self.complain(index, "the first model", result.as_ref().err());
                if let Some(desk) = &mut self.desks[index] {
                    desk.first = None;
                }
                let result = result.map(|(model, sealed)| {
                    let shape = Shape::of(&sealed.manifest);
                    if let Some(desk) = &mut self.desks[index] {
                        desk.manifest = Some(Arc::new(sealed.manifest));
                        desk.model = Some((0, Arc::new(sealed.fd)));
                    }
                    (model, shape)
                });
                self.tell(index, Event::FirstStored(result)).await;
            }
        }
    }

    async fn hear_agent(&mut self, event: NodeEvent) {
        let (chain, event) = match event {
            NodeEvent::Hello { shm_limit, cores, path, chains } => {
                tracing::info!(shm_limit, cores, path, chains = chains.len(), "agent");
                self.remove_retired();
                let jobs = u64::try_from(self.config.jobs.len()).unwrap_or(1).max(1);
                let quota = self.config.shm_limit.unwrap_or(u64::MAX).min(shm_limit) / jobs;
                return self.tell_all(|_| Some(Event::AgentUp(Node { quota, cores }))).await;
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
            FromGateway::Hello { chains } => {
                let retired = lock(&self.jobs).assign(&chains);
                self.retired.extend(retired);
                self.remove_retired();
                self.keep_chains().await;
                let state = |job: &JobState| {
                    let chain = job.chain()?;
                    Some(Event::GatewayUp(chains.iter().find(|c| c.chain == chain).cloned()))
                };
                return self.tell_all(state).await;
            }
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

    fn desk_of(&mut self, chain: u32) -> Option<&mut Desk> {
        let index = lock(&self.jobs).of_chain(chain)?;
        self.desks.get_mut(index)?.as_mut()
    }

    /// Writes new chains into the checkpoints, so that they stay when gateway and coordinator die together.
    async fn keep_chains(&mut self) {
        let chains: Vec<Option<u32>> = lock(&self.jobs).iter().map(JobState::chain).collect();
        for (desk, chain) in self.desks.iter_mut().zip(chains) {
            let Some(desk) = desk.as_mut().filter(|desk| chain.is_some() && desk.identity.chain != chain) else {
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
    }

    /// Tells the gateway of all statuses that changed.
    fn publish(&mut self) {
        self.publish_at = None;
        let Some(gateway) = &self.gateway else { return };
        for (_, job) in lock(&self.jobs).iter_mut().filter(|(_, job)| job.dirty) {
            job.dirty = false;
            if job.gateway
                && let Some(Action::Gateway(words)) = job_words(job)
            {
                gateway.tell(words, None, None);
            }
        }
    }

    async fn carry_out(&mut self, index: usize, action: Action) {
        match action {
            Action::Agent(order) => {
                if let Some(agent) = &self.agent {
                    agent.tell(order, None, None);
                }
            }
            Action::Gateway(words) => self.tell_gateway(index, words).await,
            Action::Store { done, opened_at } => self.store(index, done, opened_at),
            Action::StoreFirst => self.store_first(index),
            Action::StoreEnd { reason } => self.store_end(index, reason),
            Action::Save(saved) => self.save(index, Some(saved)).await,
            Action::Forget => self.save(index, None).await,
            Action::Committed { .. }
            | Action::Unused { .. }
            | Action::FiguresDropped { .. }
            | Action::Failed { .. } => self.log(index, &action),
        }
    }

    async fn tell_gateway(&mut self, index: usize, words: ToGateway) {
        let mut fd = None;
        if let ToGateway::Model { round, .. } = &words {
            fd = self.model(index, *round).await;
            if fd.is_none() {
                return;
            }
        }
        let point = match &words {
            ToGateway::Open { .. } => Some("coordinator.opened"),
            ToGateway::Close { .. } => Some("coordinator.closed"),
            ToGateway::Commit { .. } => Some("coordinator.committed"),
            _ => None,
        };
        if let Some(gateway) = &self.gateway {
            gateway.tell(words, fd, point);
        }
    }

    /// The model of `round` in a sealed memfd; read back from the checkpoint when a restarted gateway needs it.
    async fn model(&mut self, index: usize, round: u32) -> Option<Arc<OwnedFd>> {
        let desk = self.desks.get_mut(index)?.as_mut()?;
        if let Some((_, fd)) = desk.model.as_ref().filter(|(of, _)| *of == round) {
            return Some(fd.clone());
        }
        let (checkpoint, runtime) = (desk.checkpoint.clone(), Handle::current());
        let read = tokio::task::spawn_blocking(move || runtime.block_on(checkpoint.model(round))).await;
        match read.map_err(|e| e.to_string()).flatten() {
            Ok(fd) => {
                let fd = Arc::new(fd);
                desk.model = Some((round, fd.clone()));
                Some(fd)
            }
            Err(error) => {
                tracing::error!(
                    round,
                    error,
                    "the committed model cannot be read back; the gateway goes on with its own"
                );
                None
            }
        }
    }

    fn store(&mut self, index: usize, done: Done, opened_at: i64) {
        #[expect(clippy::cast_precision_loss, reason = "milliseconds of a round")]
        let seconds = (now() - opened_at).max(0) as f64 / 1000.0;
        let round = done.round;
        let words = self.words.clone();
        let order = {
            let jobs = lock(&self.jobs);
            let document = jobs.iter().nth(index).map(JobState::document);
            document.and_then(|document| self.desks.get(index)?.as_ref()?.order(document, done, seconds))
        };
        let Some(order) = order else {
            let failure = StoreFailure::Storage("its descriptor is not here yet".into());
            drop(words.send(Word::Stored(index, round, Err(failure))));
            return;
        };
        let runtime = Handle::current();
        self.stores.spawn(async move {
            let stored = tokio::task::spawn_blocking(move || order.carry_out(&runtime)).await;
            let result = stored.unwrap_or_else(|error| Err(StoreFailure::Storage(error.to_string())));
            drop(words.send(Word::Stored(index, round, result)));
        });
    }

    fn store_first(&mut self, index: usize) {
        let Some(desk) = self.desks.get(index).and_then(Option::as_ref) else { return };
        let Some(source) = desk.first.clone() else { return };
        let (checkpoint, words, runtime) = (desk.checkpoint.clone(), self.words.clone(), Handle::current());
        self.stores.spawn(async move {
            let stored = tokio::task::spawn_blocking(move || desk::store_first(&checkpoint, &source, &runtime)).await;
            let result = stored.unwrap_or_else(|error| Err(StoreFailure::Storage(error.to_string())));
            drop(words.send(Word::FirstStored(index, result)));
        });
    }

    fn store_end(&mut self, index: usize, reason: String) {
        let finished = {
            let jobs = lock(&self.jobs);
            let job = jobs.iter().nth(index);
            job.and_then(|job| Some(Finished::new(&job.document().spec, job.model.as_ref()?, reason)))
        };
        let (Some(finished), Some(desk)) = (finished, self.desks.get(index).and_then(Option::as_ref)) else {
            let failure = StoreFailure::Storage("the job has no checkpoint".into());
            drop(self.words.send(Word::EndStored(index, Err(failure))));
            return;
        };
        let (checkpoint, words, runtime) = (desk.checkpoint.clone(), self.words.clone(), Handle::current());
        self.stores.spawn(async move {
            let write = move || runtime.block_on(checkpoint.write_finished(&finished));
            let stored = tokio::task::spawn_blocking(write).await;
            let result = stored.unwrap_or_else(|error| Err(StoreFailure::Storage(error.to_string())));
            drop(words.send(Word::EndStored(index, result)));
        });
    }

    /// One line per attempt that failed.
    fn complain(&self, index: usize, what: &str, failure: Option<&StoreFailure>) {
        let Some(StoreFailure::Storage(error) | StoreFailure::Rejected(error)) = failure else { return };
        let jobs = lock(&self.jobs);
        let Some(document) = jobs.iter().nth(index).map(JobState::document) else { return };
        let (namespace, job) = (document.namespace(), document.name());
        tracing::warn!(namespace, job, error, "{what} is not in the checkpoint");
    }

    async fn save(&self, index: usize, saved: Option<SavedRound>) {
        let Some(key) = lock(&self.jobs).iter().nth(index).map(deposit_key) else { return };
        let result = match saved {
            Some(saved) => self.child.deposit(&key, &saved, &[]).await,
            None => self.child.remove(&key).await,
        };
        if let Err(error) = result {
            tracing::warn!(key, %error, "deposit");
        }
    }

    fn log(&self, index: usize, action: &Action) {
        let jobs = lock(&self.jobs);
        let Some(document) = jobs.iter().nth(index).map(JobState::document) else { return };
        let (namespace, job) = (document.namespace(), document.name());
        match action {
            Action::Committed { round, updates, seconds } => {
                tracing::info!(namespace, job, round, updates, seconds, "round committed");
                self.metrics.ended(namespace, job, "committed");
                self.metrics.took(*seconds);
            }
            Action::Unused { round } => {
                tracing::info!(namespace, job, round, "round closed unused");
                self.metrics.ended(namespace, job, "unused");
            }
            Action::FiguresDropped { client, dropped } => {
                tracing::warn!(
                    namespace,
                    job,
                    ?client,
                    dropped,
                    "figures are left out: not finite, name too long, or too many names (said once)"
                );
            }
            Action::Failed { round, reason } => {
                tracing::error!(namespace, job, round, reason, "job failed");
                self.metrics.ended(namespace, job, "failed");
            }
            _ => {}
        }
    }
}

async fn sleep(until: Option<Instant>) {
    match until {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
