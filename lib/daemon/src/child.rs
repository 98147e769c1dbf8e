//! A component's side of its supervisor.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, OnceLock},
};

use futures_util::FutureExt as _;
use prometheus::{Registry, TextEncoder};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{Mutex, mpsc, watch};

use crate::{Channel, ChannelError};

/// Words of the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToChild {
    /// One deposit of an earlier life (descriptors beside).
    Restored { key: String, meta: Value },
    /// All deposits are told: begin.
    Start { config: Value, first: bool, parent: i32, failpoint: Option<String> },
    /// A channel to a sibling that (re)started (descriptor beside); a hub says the same over a link.
    Peer { name: String, epoch: u64 },
    /// Another supervisor's component of this name has taken this one's place among the siblings; a hub says so over a link.
    Superseded,
    /// Tell metrics and status.
    Scrape { id: u64 },
    /// Tell that it is alive.
    Ping,
    /// End in order.
    Drain,
}

/// Words of the child.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromChild {
    /// Keep this (descriptors beside, or those kept already); the same key replaces.
    Deposit { key: String, meta: Value },
    /// Forget it.
    Remove { key: String },
    /// The component serves.
    Ready,
    /// Answer to a scrape.
    Scraped { id: u64, status: Value, metrics: String },
    /// Answer to a ping.
    Pong,
}

/// Something that outlives the component: descriptors under a name.
#[derive(Debug)]
pub struct Deposit {
    /// Its name.
    pub key: String,
    /// What the component said of it.
    pub meta: Value,
    /// The descriptors.
    pub fds: Vec<OwnedFd>,
}

/// What a component begins with.
#[derive(Debug)]
pub struct Startup {
    /// Its configuration, written by whoever started the supervisor.
    pub config: Value,
    /// It is the first life: nothing is restored but what the supervisor put there itself.
    pub first: bool,
    /// The fd store.
    pub restored: Vec<Deposit>,
}

/// A component could not begin, or lost its supervisor.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// Standard input is no channel.
    #[error("standard input is not the channel of a supervisor ({0}): components are started by `lifl up`")]
    NoSupervisor(io::Error),
    /// The supervisor ended.
    #[error("the supervisor is gone")]
    Gone,
    /// The channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A deposit's meta data cannot be written.
    #[error("deposit '{key}': {source}")]
    Meta {
        /// Its key.
        key: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A sibling that (re)started, and the way to it.
#[derive(Debug)]
pub struct Sibling {
    /// Its name.
    pub name: String,
    /// Its supervisor's: another one than before says that nothing of what the sibling had kept is left.
    pub epoch: u64,
    /// Replaces an older channel to the same name.
    pub channel: Channel,
}

/// What a component hears of its siblings.
#[derive(Debug)]
pub enum Kin {
    /// One that (re)started.
    Sibling(Sibling),
    /// Another component of this one's own name has taken its place: it is not told of siblings any more, unless that one goes.
    Superseded,
}

type Status = Box<dyn Fn() -> Value + Send + Sync>;

/// A component's side of its supervisor.
#[derive(Debug)]
pub struct Child {
    channel: Arc<Channel>,
    peers: Mutex<mpsc::UnboundedReceiver<Kin>>,
    drain: watch::Receiver<bool>,
    shared: Arc<Shared>,
}

struct Shared {
    registry: Registry,
    status: OnceLock<Status>,
}

// === impl Shared ===

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    fn scraped(&self, id: u64) -> FromChild {
        let status = self.status.get().map_or(Value::Null, |status| status());
        let metrics = TextEncoder::new().encode_to_string(&self.registry.gather());
        FromChild::Scraped { id, status, metrics: metrics.unwrap_or_default() }
    }
}

// === impl Child ===

impl Child {
    /// Takes the channel from standard input, the deposits and the configuration.
    ///
    /// The process dies with its supervisor (`PR_SET_PDEATHSIG`).
    ///
    /// # Errors
    /// [`ChildError::NoSupervisor`] when started by hand.
    pub async fn from_stdin() -> Result<(Self, Startup), ChildError> {
        let fd = take_stdin().map_err(ChildError::NoSupervisor)?;
        let (child, startup, parent) = Self::from_fd(fd).await?;
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)?;
        // The supervisor may have died before the signal was set.
        if getppid() != Pid::from_raw(parent) {
            return Err(ChildError::Gone);
        }
        Ok((child, startup))
    }

    /// As [`Child::from_stdin`], for a component that has to clear up when its supervisor is gone: [`Child::draining`] tells.
    ///
    /// # Errors
    /// As [`Child::from_stdin`].
    pub async fn from_stdin_outliving() -> Result<(Self, Startup), ChildError> {
        let fd = take_stdin().map_err(ChildError::NoSupervisor)?;
        let (child, startup, _) = Self::from_fd(fd).await?;
        Ok((child, startup))
    }

    /// As [`Child::from_stdin`], from any end of a channel: for tests that play the supervisor.
    async fn from_fd(fd: OwnedFd) -> Result<(Self, Startup, i32), ChildError> {
        let channel = Arc::new(Channel::new(fd).map_err(ChildError::NoSupervisor)?);
        let mut restored = Vec::new();
        let (config, first, parent) = loop {
            match channel.recv::<ToChild>().await?.ok_or(ChildError::Gone)? {
                (ToChild::Restored { key, meta }, fds) => restored.push(Deposit { key, meta, fds }),
                (ToChild::Start { config, first, parent, failpoint }, _) => {
                    if let Some(text) = failpoint {
                        crate::arm_failpoint(&text);
                    }
                    break (config, first, parent);
                }
                (ToChild::Ping, _) => channel.send(&FromChild::Pong, &[]).await?,
                (other, _) => tracing::warn!(?other, "word before the start ignored"),
            }
        };
        let (peers_in, peers) = mpsc::unbounded_channel();
        let (drain_in, drain) = watch::channel(false);
        let shared = Arc::new(Shared { registry: Registry::new(), status: OnceLock::new() });
        tokio::spawn(listen(channel.clone(), shared.clone(), peers_in, drain_in).boxed());
        let child = Self { channel, peers: Mutex::new(peers), drain, shared };
        Ok((child, Startup { config, first, restored }, parent))
    }

    /// A child whose supervisor is the caller: for tests of components.
    ///
    /// # Errors
    /// As [`Child::from_stdin`].
    pub async fn for_test(
        supervisor: &TestSupervisor,
        fd: OwnedFd,
        startup: Startup,
    ) -> Result<(Self, Startup), ChildError> {
        for deposit in &startup.restored {
            let fds: Vec<_> = deposit.fds.iter().map(AsFd::as_fd).collect();
            let word = ToChild::Restored { key: deposit.key.clone(), meta: deposit.meta.clone() };
            supervisor.channel.send(&word, &fds).await?;
        }
        let word = ToChild::Start { config: startup.config, first: startup.first, parent: 0, failpoint: None };
        supervisor.channel.send(&word, &[]).await?;
        let (child, startup, _) = Self::from_fd(fd).await?;
        Ok((child, startup))
    }

    /// Has the supervisor keep descriptors beyond this process's life; the same key replaces. Without descriptors only what
    /// is said of them is replaced.
    ///
    /// When this returns, they are safe: what a dead process wrote into its channel is still read.
    ///
    /// # Errors
    /// [`ChildError`].
    pub async fn deposit(&self, key: &str, meta: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), ChildError> {
        let meta = serde_json::to_value(meta).map_err(|source| ChildError::Meta { key: key.to_owned(), source })?;
        Ok(self.channel.send(&FromChild::Deposit { key: key.to_owned(), meta }, fds).await?)
    }

    /// Has the supervisor forget a deposit.
    ///
    /// # Errors
    /// [`ChildError`].
    pub async fn remove(&self, key: &str) -> Result<(), ChildError> {
        Ok(self.channel.send(&FromChild::Remove { key: key.to_owned() }, &[]).await?)
    }

    /// The next sibling that (re)started. `None` when the supervisor is gone.
    pub async fn next_peer(&self) -> Option<Sibling> {
        loop {
            match self.next_kin().await? {
                Kin::Sibling(sibling) => return Some(sibling),
                Kin::Superseded => {}
            }
        }
    }

    /// As [`Child::next_peer`], for a component of which there may be two on a node.
    pub async fn next_kin(&self) -> Option<Kin> {
        self.peers.lock().await.recv().await
    }

    /// Tells that the component serves.
    ///
    /// # Errors
    /// [`ChildError`].
    pub async fn ready(&self) -> Result<(), ChildError> {
        Ok(self.channel.send(&FromChild::Ready, &[]).await?)
    }

    /// Resolves when the component shall end, or its supervisor is gone.
    pub async fn draining(&self) {
        let mut drain = self.drain.clone();
        let _gone_is_drain_too = drain.wait_for(|drain| *drain).await;
    }

    /// What the admin page shows of this component; the first caller wins.
    pub fn on_status(&self, status: impl Fn() -> Value + Send + Sync + 'static) {
        let _first_wins = self.shared.status.set(Box::new(status));
    }

    /// Metrics of this component.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.shared.registry
    }
}

/// The supervisor's end of a [`Child`] in a test.
#[derive(Debug)]
pub struct TestSupervisor {
    channel: Channel,
}

// === impl TestSupervisor ===

impl TestSupervisor {
    /// A supervisor, and the end for [`Child::for_test`].
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = Channel::pair()?;
        Ok((Self { channel: Channel::new(ours)? }, theirs))
    }

    /// Connects the child with a sibling that the test plays; returns the sibling's end.
    ///
    /// # Errors
    /// [`ChildError`].
    pub async fn peer(&self, name: &str) -> Result<Channel, ChildError> {
        self.peer_of(name, 0).await
    }

    /// As [`TestSupervisor::peer`], with the epoch of the sibling's supervisor.
    ///
    /// # Errors
    /// [`ChildError`].
    pub async fn peer_of(&self, name: &str, epoch: u64) -> Result<Channel, ChildError> {
        let (ours, theirs) = Channel::pair()?;
        self.channel.send(&ToChild::Peer { name: name.to_owned(), epoch }, &[theirs.as_fd()]).await?;
        Ok(Channel::new(ours)?)
    }

    /// Tells the child that another one has taken its place.
    ///
    /// # Errors
    /// [`ChildError`].
    pub async fn supersede(&self) -> Result<(), ChildError> {
        Ok(self.channel.send(&ToChild::Superseded, &[]).await?)
    }

    /// Has the child drain.
    ///
    /// # Errors
    /// [`ChildError`].
    pub async fn drain(&self) -> Result<(), ChildError> {
        Ok(self.channel.send(&ToChild::Drain, &[]).await?)
    }

    /// The child's next deposit (`Some`) or removal (`None`) by key; readiness and scrapes are passed over.
    ///
    /// # Errors
    /// [`ChildError::Gone`] when the child ended.
    pub async fn next_deposit(&self) -> Result<(String, Option<Deposit>), ChildError> {
        loop {
            match self.channel.recv::<FromChild>().await?.ok_or(ChildError::Gone)? {
                (FromChild::Deposit { key, meta }, fds) => return Ok((key.clone(), Some(Deposit { key, meta, fds }))),
                (FromChild::Remove { key }, _) => return Ok((key, None)),
                _ => {}
            }
        }
    }
}

async fn listen(
    channel: Arc<Channel>,
    shared: Arc<Shared>,
    peers: mpsc::UnboundedSender<Kin>,
    drain: watch::Sender<bool>,
) {
    loop {
        let word = match channel.recv::<ToChild>().await {
            Ok(Some(word)) => word,
            Ok(None) => break,
            Err(error) => {
                tracing::error!(%error, "word of the supervisor");
                break;
            }
        };
        match word {
            (ToChild::Peer { name, epoch }, fds) => {
                for fd in fds {
                    match Channel::new(fd) {
                        Ok(channel) => drop(peers.send(Kin::Sibling(Sibling { name: name.clone(), epoch, channel }))),
                        Err(error) => tracing::error!(%error, name, "channel to a sibling"),
                    }
                }
            }
            (ToChild::Superseded, _) => drop(peers.send(Kin::Superseded)),
            (ToChild::Scrape { id }, _) => {
                if let Err(error) = channel.send(&shared.scraped(id), &[]).await {
                    tracing::warn!(%error, "answer to a scrape");
                }
            }
            (ToChild::Ping, _) => {
                if let Err(error) = channel.send(&FromChild::Pong, &[]).await {
                    tracing::warn!(%error, "answer to a ping");
                }
            }
            (ToChild::Drain, _) => drop(drain.send_replace(true)),
            (other, _) => tracing::warn!(?other, "word after the start ignored"),
        }
    }
    drain.send_replace(true);
}

/// Moves standard input away, so that no library reads from it, and puts `/dev/null` there.
///
/// # Errors
/// When it is closed or no socket.
pub fn take_stdin() -> io::Result<OwnedFd> {
    let stdin = rustix::stdio::stdin();
    rustix::net::sockopt::socket_type(stdin)?;
    let fd = rustix::io::fcntl_dupfd_cloexec(stdin, 3)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(fd)
}
