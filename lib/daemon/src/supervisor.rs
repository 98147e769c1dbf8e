//! The parent of components: starts them, pairs them, keeps their deposits, starts again what died.

use std::{
    collections::{BTreeMap, HashMap},
    future::pending,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt as _, future::join_all};
use rustix::{
    process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, wait},
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::Instant,
};

use crate::{
    Channel, ChannelError, Deposit,
    child::{FromChild, ToChild},
};

mod links;
#[cfg(test)]
mod tests;

use links::Link;

/// A life shorter than this counts as a failed start.
const SHORT_LIFE: Duration = Duration::from_secs(2);
/// Failed starts in a row after which the supervisor gives up.
const MAX_FAILED_STARTS: u32 = 8;
/// Longest pause before the next start.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// A child that does not answer a scrape within this is left out of it.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(2);
/// A sibling that does not take its new channel within this is stuck; the others are not to wait for it.
const PAIR_TIMEOUT: Duration = Duration::from_secs(2);

/// A child is asked so often whether it lives: seldom, as each time wakes two processes of an idle node.
const PING: Duration = Duration::from_secs(15);
/// After so many pings' time without an answer it is killed. More than one: a whole machine may have stood still.
const UNANSWERED: u32 = 2;

/// A component to keep alive.
#[derive(Debug)]
pub struct ChildSpec {
    /// Its name among its siblings.
    pub name: &'static str,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables of this process's environment that it is given; no others.
    pub environment: Vec<&'static str>,
    /// What [`crate::Startup::config`] will be.
    pub config: Value,
    /// Siblings it talks to.
    pub peers: Vec<&'static str>,
    /// User to run as, where the supervisor is root.
    pub uid: Option<u32>,
    /// Deposits that it finds in its first life.
    pub deposits: Vec<Deposit>,
    /// `name:n`: where its first life ends (tests).
    pub failpoint: Option<String>,
}

/// What a component said of itself.
#[derive(Clone, Debug)]
pub struct Scrape {
    /// The component.
    pub name: &'static str,
    /// Its process.
    pub pid: i32,
    /// How often it was started again.
    pub restarts: u32,
    /// Its status document.
    pub status: Value,
    /// Its metrics, Prometheus text.
    pub metrics: String,
}

/// Why the supervisor ended.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// A component could not be started.
    #[error("{name}: cannot be started: {source}")]
    Spawn {
        /// The component.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A component dies again and again.
    #[error("{name} ended {MAX_FAILED_STARTS} times within {SHORT_LIFE:?} of its start, last with {status}")]
    CrashLoop {
        /// The component.
        name: &'static str,
        /// Exit status or signal.
        status: String,
    },
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

#[derive(Debug)]
struct Life {
    channel: Arc<Channel>,
    pid: Pid,
    /// It was told its deposits and its configuration: it can be told of siblings.
    begun: bool,
    ready: bool,
    /// Pings' times that have passed since it was asked; 0 when it has answered.
    unanswered: u32,
}

#[derive(Debug, Default)]
struct Entry {
    life: Option<Life>,
    deposits: BTreeMap<String, Deposit>,
    peers: Vec<&'static str>,
    restarts: u32,
}

#[derive(Debug, Default)]
struct Table {
    entries: BTreeMap<&'static str, Entry>,
    exits: HashMap<i32, oneshot::Sender<String>>,
    scrapes: HashMap<u64, oneshot::Sender<(Value, String)>>,
    next_scrape: u64,
    links: Vec<Link>,
    next_link: u64,
    draining: bool,
}

// === impl Entry ===

impl Entry {
    /// The life that hears more than how to begin.
    fn begun(&self) -> Option<&Life> {
        self.life.as_ref().filter(|life| life.begun)
    }
}

/// Someone to be paired: a component of ours, or one behind a link.
#[derive(Debug)]
struct End {
    name: String,
    epoch: u64,
    channel: Arc<Channel>,
}

/// The parent of components. Lives in a runtime of one thread, whose thread must outlive the children: they die with it.
#[derive(Clone, Debug)]
pub struct Supervisor {
    table: Arc<Mutex<Table>>,
    ready: Arc<watch::Sender<bool>>,
    changed: mpsc::UnboundedSender<()>,
    /// Time since boot at which this supervisor began: no two of a node have the same, and a later one has a greater.
    epoch: u64,
    /// One pairing at a time: two siblings must hear of their channels in the same order, or each would keep another one.
    pairing: Arc<tokio::sync::Mutex<()>>,
}

// === impl Supervisor ===

impl Supervisor {
    /// Starts all of `specs` and keeps them alive. Returns the handle and a future that ends with the first hopeless
    /// component, or after [`Supervisor::drain`].
    ///
    /// # Errors
    /// When signals or the role of a subreaper cannot be had.
    pub fn start(
        specs: Vec<ChildSpec>,
    ) -> Result<(Self, impl Future<Output = Result<(), SupervisorError>>), SupervisorError> {
        // Functions outlive a dead agent; they become ours, so that they are reaped.
        set_child_subreaper(Some(getpid())).map_err(io::Error::from)?;
        let (changed, mut changes) = mpsc::unbounded_channel();
        let now = clock_gettime(ClockId::Boottime);
        let epoch = u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0);
        let ready = Arc::new(watch::Sender::new(false));
        let supervisor = Self { table: Arc::default(), ready, changed, epoch, pairing: Arc::default() };
        let mut exits = signal(SignalKind::child())?;
        for spec in &specs {
            supervisor.table().entries.insert(spec.name, Entry { peers: spec.peers.clone(), ..Entry::default() });
        }
        supervisor.update_ready();
        let mut tasks = JoinSet::new();
        for spec in specs {
            tasks.spawn(supervisor.clone().keep(spec));
        }
        let reaper = supervisor.clone();
        let run = async move {
            loop {
                tokio::select! {
                    _ = exits.recv() => reaper.reap(),
                    Some(()) = changes.recv() => reaper.update_ready(),
                    Some(done) = tasks.join_next() => match done {
                        Ok(Ok(())) => if tasks.is_empty() { return Ok(()) },
                        Ok(Err(error)) => return Err(error),
                        Err(error) => return Err(io::Error::other(error).into()),
                    },
                }
            }
        };
        Ok((supervisor, run))
    }

    /// Resolves when all components serve.
    pub async fn ready(&self) {
        let mut ready = self.ready.subscribe();
        let _sender_is_ours = ready.wait_for(|ready| *ready).await;
    }

    /// All components serve now, and are to go on.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// All components are told to end.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.table().draining
    }

    /// Processes of the components that live.
    #[must_use]
    pub fn pids(&self) -> Vec<(&'static str, i32)> {
        let table = self.table();
        table
            .entries
            .iter()
            .filter_map(|(name, e)| Some((*name, e.life.as_ref()?.pid.as_raw_nonzero().get())))
            .collect()
    }

    /// Components that do not answer; they are killed if that goes on.
    #[must_use]
    pub fn stuck(&self) -> Vec<&'static str> {
        let table = self.table();
        let stuck = |entry: &Entry| entry.life.as_ref().is_some_and(|life| life.unanswered > 1);
        table.entries.iter().filter(|(_, entry)| stuck(entry)).map(|(name, _)| *name).collect()
    }

    /// Asks all components for status and metrics.
    pub async fn scrape(&self) -> Vec<Scrape> {
        let mut asked = Vec::new();
        {
            let mut table = self.table();
            let lives: Vec<_> = table
                .entries
                .iter()
                .filter_map(|(name, e)| {
                    let life = e.begun()?;
                    Some((*name, life.channel.clone(), life.pid.as_raw_nonzero().get(), e.restarts))
                })
                .collect();
            for (name, channel, pid, restarts) in lives {
                let (answer, answered) = oneshot::channel();
                let id = table.next_scrape;
                table.next_scrape += 1;
                table.scrapes.insert(id, answer);
                asked.push((name, channel, pid, restarts, id, answered));
            }
        }
        let mut out = Vec::new();
        for (name, channel, pid, restarts, id, answered) in asked {
            let ask = async {
                channel.send(&ToChild::Scrape { id }, &[]).await.ok()?;
                answered.await.ok()
            };
            let (status, metrics) = tokio::time::timeout(SCRAPE_TIMEOUT, ask).await.ok().flatten().unwrap_or_default();
            self.table().scrapes.remove(&id);
            out.push(Scrape { name, pid, restarts, status, metrics });
        }
        out
    }

    /// Has all components end in order; those that do not within `patience` are killed.
    pub async fn drain(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        // Whoever has yet to begin is told as soon as it has.
        let begun: Vec<_> = {
            let mut table = self.table();
            table.draining = true;
            table.entries.values().filter_map(|e| Some(e.begun()?.channel.clone())).collect()
        };
        self.update_ready();
        let told = join_all(begun.iter().map(|channel| channel.send(&ToChild::Drain, &[])));
        let _gone_is_drained = tokio::time::timeout_at(deadline, told).await;
        let mut ready = self.ready.subscribe();
        while self.table().entries.values().any(|e| e.life.is_some()) {
            if tokio::time::timeout_at(deadline, ready.changed()).await.is_err() {
                for life in self.table().entries.values().filter_map(|e| e.life.as_ref()) {
                    let _ended_meanwhile = kill_process(life.pid, Signal::KILL);
                }
                return;
            }
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update_ready(&self) {
        let all = {
            let table = self.table();
            !table.draining && table.entries.values().all(|e| e.life.as_ref().is_some_and(|l| l.ready))
        };
        self.ready.send_replace(all);
    }

    /// Reaps every child that ended, orphans of a dead agent among them.
    fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let text = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (_, Some(signal)) => format!("signal {signal}"),
                _ => continue,
            };
            let pid = pid.as_raw_nonzero().get();
            let mut table = self.table();
            // Nobody waits for the functions of a dead agent.
            if let Some(waiter) = table.exits.remove(&pid) {
                let _keeper_left = waiter.send(text);
            }
        }
    }

    /// Keeps one component alive until it is hopeless or everything drains.
    async fn keep(self, mut spec: ChildSpec) -> Result<(), SupervisorError> {
        let name = spec.name;
        for deposit in spec.deposits.drain(..) {
            if let Some(entry) = self.table().entries.get_mut(name) {
                entry.deposits.insert(deposit.key.clone(), deposit);
            }
        }
        let (mut first, mut failed) = (true, 0);
        loop {
            let began = Instant::now();
            let (channel, exit) = self.spawn(&spec)?;
            tokio::select! {
                () = self.listen(name, &channel) => {}
                () = self.watch_over(name, &channel) => {}
                // It may never take its first words: it is heard and watched over meanwhile.
                () = self.begin(&spec, first, &channel).then(|()| pending()) => {}
            }
            let status = exit.await.unwrap_or_else(|_unknown| "unknown status".into());
            let draining = {
                let mut table = self.table();
                let draining = table.draining;
                if let Some(entry) = table.entries.get_mut(name) {
                    entry.life = None;
                    entry.restarts += u32::from(!draining);
                }
                draining
            };
            let _receiver_lives_as_long = self.changed.send(());
            if draining {
                return Ok(());
            }
            failed = if began.elapsed() < SHORT_LIFE { failed + 1 } else { 0 };
            tracing::warn!(component = name, status, "component ended; starting it again");
            if failed >= MAX_FAILED_STARTS {
                return Err(SupervisorError::CrashLoop { name, status });
            }
            if failed > 1 {
                tokio::time::sleep(MAX_PAUSE.min(Duration::from_millis(50) * 2u32.saturating_pow(failed))).await;
            }
            if self.is_draining() {
                return Ok(());
            }
            first = false;
        }
    }

    fn spawn(&self, spec: &ChildSpec) -> Result<(Arc<Channel>, oneshot::Receiver<String>), SupervisorError> {
        let name = spec.name;
        let (ours, theirs) = Channel::pair()?;
        let mut command = Command::new(&spec.program);
        command.args(&spec.args).stdin(Stdio::from(theirs)).stdout(Stdio::null()).env_clear();
        command.envs(spec.environment.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        // A group of its own: Ctrl-C reaches the supervisor, which drains.
        command.process_group(0);
        if let Some(uid) = spec.uid {
            command.uid(uid).gid(uid);
        }
        let child = command.spawn().map_err(|source| SupervisorError::Spawn { name, source })?;
        drop(command);
        let pid = Pid::from_child(&child);
        let channel = Arc::new(Channel::new(ours)?);
        let (exited, exit) = oneshot::channel();
        // Nothing is reaped between this and its start: both are in one step of one thread.
        let mut table = self.table();
        table.exits.insert(pid.as_raw_nonzero().get(), exited);
        if let Some(entry) = table.entries.get_mut(name) {
            entry.life = Some(Life { channel: channel.clone(), pid, begun: false, ready: false, unanswered: 0 });
        }
        Ok((channel, exit))
    }

    /// Tells a new life how to begin, that it is to end if everything drains already, and whom it has to do with.
    async fn begin(&self, spec: &ChildSpec, first: bool, channel: &Arc<Channel>) {
        self.restore(spec, first, channel).await;
        let draining = {
            let mut table = self.table();
            if let Some(life) = table.entries.get_mut(spec.name).and_then(|entry| entry.life.as_mut()) {
                life.begun = true;
            }
            table.draining
        };
        let _receiver_lives_as_long = self.changed.send(());
        if draining {
            let _its_end_will_tell = channel.send(&ToChild::Drain, &[]).await;
        }
        self.pair(End { name: spec.name.to_owned(), epoch: self.epoch, channel: channel.clone() }).await;
    }

    /// Tells a new life its deposits and its configuration; errors show as its end.
    async fn restore(&self, spec: &ChildSpec, first: bool, channel: &Channel) {
        let deposits: Vec<(String, Value, Vec<OwnedFd>)> = {
            let table = self.table();
            let entry = table.entries.get(spec.name).into_iter();
            let clone = |fds: &[OwnedFd]| fds.iter().filter_map(|fd| fd.try_clone().ok()).collect();
            entry.flat_map(|e| e.deposits.values()).map(|d| (d.key.clone(), d.meta.clone(), clone(&d.fds))).collect()
        };
        for (key, meta, fds) in deposits {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            let _its_end_will_tell = channel.send(&ToChild::Restored { key, meta }, &fds).await;
        }
        let failpoint = spec.failpoint.clone().filter(|_| first);
        let parent = getpid().as_raw_nonzero().get();
        let start = ToChild::Start { config: spec.config.clone(), first, parent, failpoint };
        let _its_end_will_tell = channel.send(&start, &[]).await;
    }

    /// Gives a new life and each living sibling of it the two ends of a new channel.
    async fn pair(&self, one: End) {
        let _one_pairing_at_a_time = self.pairing.lock().await;
        let siblings = self.siblings(&one.name);
        for other in siblings {
            let Ok((near, far)) = Channel::pair() else { continue };
            introduce(&one, &other, near).await;
            introduce(&other, &one, far).await;
        }
    }

    /// Our own first: what they do about a sibling comes before what others do who hear of it later.
    fn siblings(&self, name: &str) -> Vec<End> {
        let table = self.table();
        let own = table.entries.get(name).map(|entry| &entry.peers);
        let living = |(peer, entry): (&&'static str, &Entry)| {
            let wanted = own.map_or_else(|| entry.peers.contains(&name), |peers| peers.contains(peer));
            let life = entry.begun().filter(|_| wanted && *peer != name)?;
            Some(End { name: (*peer).to_owned(), epoch: self.epoch, channel: life.channel.clone() })
        };
        let mut siblings: Vec<End> = table.entries.iter().filter_map(living).collect();
        siblings.extend(table.linked(name));
        siblings
    }

    /// Kills a child that does not answer: its successor will. Never returns.
    async fn watch_over(&self, name: &'static str, channel: &Channel) {
        loop {
            tokio::time::sleep(PING).await;
            if !self.is_to_be_asked(name) {
                continue;
            }
            // Where its channel is full it is not to be waited for either.
            let _its_end_will_tell = tokio::time::timeout(PING, channel.send(&ToChild::Ping, &[])).await;
        }
    }

    /// Counts the time that a child has not answered, and kills one that has not for too long. One that drains has a time of its
    /// own to end in.
    fn is_to_be_asked(&self, name: &str) -> bool {
        let mut table = self.table();
        let draining = table.draining;
        let Table { entries, exits, .. } = &mut *table;
        let Some(life) = entries.get_mut(name).and_then(|entry| entry.life.as_mut()) else { return false };
        life.unanswered += 1;
        match life.unanswered {
            1 => return true,
            2 => tracing::error!(component = name, "component does not answer"),
            _ => {}
        }
        // One that was reaped has left its number to somebody else.
        if life.unanswered > UNANSWERED && !draining && exits.contains_key(&life.pid.as_raw_nonzero().get()) {
            tracing::error!(component = name, "component does not answer for {:?}: killed", PING * UNANSWERED);
            let _ended_meanwhile = kill_process(life.pid, Signal::KILL);
        }
        false
    }

    /// Hears a child until it is gone.
    async fn listen(&self, name: &'static str, channel: &Channel) {
        loop {
            match channel.recv::<FromChild>().await {
                Ok(Some((word, fds))) => self.hear(name, word, fds),
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, component = name, "channel");
                    return;
                }
            }
        }
    }

    fn hear(&self, name: &'static str, word: FromChild, fds: Vec<OwnedFd>) {
        let mut table = self.table();
        match word {
            FromChild::Scraped { id, status, metrics } => {
                if let Some(waiter) = table.scrapes.remove(&id) {
                    let _asker_left = waiter.send((status, metrics));
                }
            }
            FromChild::Ready => {
                if let Some(life) = table.entries.get_mut(name).and_then(|e| e.life.as_mut()) {
                    life.ready = true;
                }
                drop(table);
                let _receiver_lives_as_long = self.changed.send(());
            }
            FromChild::Pong => {
                if let Some(life) = table.entries.get_mut(name).and_then(|e| e.life.as_mut()) {
                    life.unanswered = 0;
                }
            }
            FromChild::Deposit { key, meta } => {
                if let Some(entry) = table.entries.get_mut(name) {
                    let old = entry.deposits.remove(&key);
                    let fds = if fds.is_empty() { old.map(|old| old.fds).unwrap_or_default() } else { fds };
                    entry.deposits.insert(key.clone(), Deposit { key, meta, fds });
                }
            }
            FromChild::Remove { key } => {
                if let Some(entry) = table.entries.get_mut(name) {
                    entry.deposits.remove(&key);
                }
            }
        }
    }
}

/// Tells `to` of its new sibling; errors show as its end.
async fn introduce(to: &End, sibling: &End, channel: OwnedFd) {
    let word = ToChild::Peer { name: sibling.name.clone(), epoch: sibling.epoch };
    if tokio::time::timeout(PAIR_TIMEOUT, to.channel.send(&word, &[channel.as_fd()])).await.is_err() {
        tracing::error!(name = to.name, sibling = sibling.name, "a component does not take its channel to a sibling");
    }
}
