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
mod pace;
pub mod pods;
mod problem;
mod serve;
mod state;
mod token;
mod watch;

use std::sync::Arc;

use lifl_daemon::{Child, ChildError, Startup};
use tokio::{net::TcpListener, sync::mpsc};

pub use config::Config;

use crate::{
    metrics::Metrics,
    state::Gateway,
    watch::{data::Command, restore},
};

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
}

/// Serves until told to drain, then until requests under way are answered.
///
/// # Errors
/// [`GatewayError`].
pub async fn run(child: Child, startup: Startup) -> Result<(), GatewayError> {
    let config = if startup.config.is_null() { Config::default() } else { serde_json::from_value(startup.config)? };
    tracing::info!(?config, first = startup.first, "gateway begins");
    let (gateway, queues) = Gateway::new(config, child)?;
    let restored = restore::take(&gateway, startup.restored);
    let listener = restored.listener.ok_or(GatewayError::NoListener)?;
    let listener = std::net::TcpListener::from(listener);
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;

    let (commands, command_queue) = mpsc::unbounded_channel();
    if let Some(socket) = restored.socket {
        let _queue_is_here = commands.send(Command::Socket(socket));
    }
    if restored.chains {
        let _queue_is_here = commands.send(Command::Recover);
    }
    let (agents, agent_channels) = mpsc::unbounded_channel();
    let (coordinators, coordinator_channels) = mpsc::unbounded_channel();
    tokio::spawn(watch::data::run(Arc::clone(&gateway), command_queue, restored.staged));
    tokio::spawn(watch::outbox::run(Arc::clone(&gateway), commands.clone()));
    tokio::spawn(watch::models(Arc::clone(&gateway), queues.gone));
    tokio::spawn(watch::agent::run(Arc::clone(&gateway), agent_channels, queues.agent, queues.asks, commands));
    tokio::spawn(watch::coordinator::run(Arc::clone(&gateway), coordinator_channels, queues.coordinator));
    tokio::spawn(watch::peers(Arc::clone(&gateway), agents, coordinators));

    Metrics::watch(&gateway)?;
    let weak = Arc::downgrade(&gateway);
    gateway.child.on_status(move || weak.upgrade().map(|gateway| gateway.status()).unwrap_or_default());
    gateway.child.ready().await?;
    serve::run(gateway, listener).await;
    Ok(())
}
