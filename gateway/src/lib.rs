//! The node gateway: the only network endpoint of a node, and the only process that parses strangers' bytes.
//!
//! ```text
//!  clients ── HTTP ──> serve ── head judged ─> slot filled ─> ledger ── descriptor ──> leaves, middle, top
//!                        │                                      ^                            │
//!                        │ model, task, job                     │ contained in               │
//!                        └────────── chain (one per job) ───────┴──────── data socket <──────┘
//!                                      ^        ^
//!  coordinator ── rounds, commits ─────┘        └── segments, deaths ── agent
//! ```
//!
//! | module | is |
//! |---|---|
//! | `serve` | the public port: routes, uploads, polls, models |
//! | `chain` | one job: round, slots, containment, the model that is served |
//! | `watch` | the edges to agent, coordinator and aggregators; what survives this process |
//! | `layout`, `intake`, `pace`, `budget`, `token`, `clients` | pure parts of an upload |
//! | `problem` | the one table of refusals |
//! | [`ingress`] | requests to Knative's services |
//! | [`observe`] | lines, spans and figures of requests to Knative's services |
//! | `tls`, `secrets` | certificates, and where they come from |
//!
//! This process may die at any instant: ledger, segments, sockets and the state of each chain are deposited with the
//! supervisor before anyone can see their effect, and whatever is read from aggregators is read again.
#![forbid(unsafe_code)]

mod budget;
mod chain;
mod clients;
mod config;
pub mod ingress;
mod intake;
mod journal;
mod layout;
mod metrics;
pub mod observe;
mod pace;
pub mod pods;
mod problem;
mod secrets;
mod serve;
mod state;
mod tls;
mod token;
mod watch;

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use lifl_daemon::{Child, ChildError, Epochs, Startup};
use lifl_proxy::Limits;
use tokio::{net::TcpListener, sync::mpsc};

pub use config::{Config, IngressConfig, KubernetesConfig};

use crate::{
    ingress::entrance::{Cluster, Entrance},
    metrics::Metrics,
    observe::{ObserveError, Observers},
    state::Gateway,
    watch::{data::Command, restore},
};

/// A connection to the ingress is closed after so long without a request: connections are bounded, and silent ones are not to keep
/// others out.
const IDLE: Duration = Duration::from_secs(120);

/// The gateway cannot begin, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The configuration is unreadable.
    #[error("configuration of the gateway: {0}")]
    Config(#[from] serde_json::Error),
    /// The supervisor deposited no listener.
    #[error("no listener among the deposits: the supervisor binds it and deposits it under 'listener'")]
    NoListener,
    /// A metric cannot be registered.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The supervisor is gone.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// The listener cannot be used.
    #[error("listener: {0}")]
    Listener(#[from] std::io::Error),
    /// Requests cannot be observed as configured.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// There is no way to Kubernetes.
    #[error(transparent)]
    Cluster(#[from] lifl_cluster::ConnectError),
    /// TLS cannot be spoken.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// Serves until told to drain, then until requests under way are answered.
///
/// # Errors
/// [`GatewayError`].
pub fn run(child: Child, startup: Startup) -> BoxFuture<'static, Result<(), GatewayError>> {
    // A future that is not boxed is compiled where it is polled, and there once for each kind of runtime.
    Box::pin(work(child, startup))
}

async fn work(child: Child, mut startup: Startup) -> Result<(), GatewayError> {
    let config = if startup.config.is_null() { Config::default() } else { serde_json::from_value(startup.config)? };
    tracing::info!(?config, first = startup.first, "gateway begins");
    let (gateway, queues) = Gateway::new(config, child)?;
    let epochs = Epochs::take(&mut startup.restored);
    let restored = restore::take(&gateway, startup.restored);
    let listener = restored.listener.ok_or(GatewayError::NoListener)?;
    let listener = std::net::TcpListener::from(listener);
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let observers = Observers::new(gateway.config.ingress.as_ref(), gateway.child.registry())?;
    gateway.pods.observe(observers.clone());
    let entrance = entrance(&gateway, restored.ingress_listeners, observers.ingress()).await?;

    let (commands, command_queue) = mpsc::unbounded_channel();
    if let Some(socket) = restored.socket {
        let _queue_is_here = commands.send(Command::Socket(socket));
    }
    if restored.chains {
        let _queue_is_here = commands.send(Command::Recover);
    }
    let (agents, agent_channels) = mpsc::unbounded_channel();
    let (coordinators, coordinator_channels) = mpsc::unbounded_channel();
    tokio::spawn(watch::data::run(Arc::clone(&gateway), command_queue, restored.staged).boxed());
    tokio::spawn(watch::outbox::run(Arc::clone(&gateway), commands.clone()).boxed());
    tokio::spawn(watch::models(Arc::clone(&gateway), queues.gone).boxed());
    tokio::spawn(watch::agent::run(Arc::clone(&gateway), agent_channels, queues.agent, queues.asks, commands).boxed());
    tokio::spawn(watch::coordinator::run(Arc::clone(&gateway), coordinator_channels, queues.coordinator).boxed());
    tokio::spawn(watch::peers(Arc::clone(&gateway), epochs, agents, coordinators).boxed());

    Metrics::watch(&gateway)?;
    let weak = Arc::downgrade(&gateway);
    let ingress = entrance.as_ref().map(Entrance::status);
    gateway.child.on_status(move || {
        let mut status = weak.upgrade().map(|gateway| gateway.status()).unwrap_or_default();
        if let Some(ingress) = &ingress {
            status["ingress"] = ingress();
        }
        status
    });
    let synced = async {
        if let Some(entrance) = &entrance {
            entrance.synced().await;
        }
    };
    // Whoever sends traffic here is told so when there are rules for it; clients of jobs need not wait for that.
    let (ready, end) = (gateway.child.ready(), end(&gateway));
    let serving =
        async { tokio::join!(serve::run(Arc::clone(&gateway), listener, queues.clients, end), pods(&gateway)) };
    tokio::pin!(serving);
    tokio::select! {
        () = synced => ready.await?,
        _ended = &mut serving => return Ok(()),
    }
    let patience = Duration::from_millis(gateway.config.drain_ms);
    match entrance {
        None => drop(serving.await),
        Some(entrance) => {
            let ends = entrance.run(gateway.child.draining(), gateway.config.lame_duck(), patience);
            let (_ended, served) = tokio::join!(serving, ends);
            served?;
        }
    }
    observers.flush().await;
    Ok(())
}

/// Resolves when nothing more is to be accepted: some time after the order to end, for those who send traffic here have yet to
/// hear of it.
async fn end(gateway: &Gateway) {
    gateway.child.draining().await;
    tokio::time::sleep(gateway.config.lame_duck()).await;
}

/// Answers what has come to the pods before the end.
async fn pods(gateway: &Gateway) {
    gateway.child.draining().await;
    gateway.pods.begin_drain();
    tokio::time::sleep(gateway.config.lame_duck()).await;
    let patience = Duration::from_millis(gateway.config.drain_ms);
    if tokio::time::timeout(patience, gateway.pods.drain()).await.is_err() {
        tracing::warn!("requests to pods under way are cut off");
    }
}

/// The ingress, if there is to be one.
async fn entrance(
    gateway: &Arc<Gateway>,
    listeners: Vec<(ingress::Listener, OwnedFd)>,
    observe: observe::Observe,
) -> Result<Option<Entrance>, GatewayError> {
    let Some(config) = &gateway.config.ingress else { return Ok(None) };
    let cluster = match &config.kubernetes {
        Some(kubernetes) => Some(Cluster::new(kubernetes).await?),
        None => None,
    };
    if let Some(cluster) = &cluster {
        gateway.pods.read_secrets(cluster.secrets.clone());
    }
    let limits = Limits { connections: gateway.config.max_connections, idle: IDLE, ..Limits::default() };
    let registry = gateway.child.registry();
    Entrance::new(config, cluster, listeners, &gateway.pods, limits, registry, observe).map(Some)
}
