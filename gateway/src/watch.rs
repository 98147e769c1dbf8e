//! The edges to the other processes of the node: each feeds the stores and empties a queue.

pub(crate) mod agent;
pub(crate) mod coordinator;
pub(crate) mod data;
pub(crate) mod outbox;
pub(crate) mod restore;
pub(crate) mod worker;

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::{chain::Gone, state::Gateway};

/// Hands each new channel to the task of that sibling.
pub(crate) async fn peers(
    gateway: Arc<Gateway>,
    agent: mpsc::UnboundedSender<lifl_daemon::Channel>,
    coordinator: mpsc::UnboundedSender<lifl_daemon::Channel>,
) {
    while let Some((name, channel)) = gateway.child.next_peer().await {
        let sent = match name.as_str() {
            "agent" => agent.send(channel).is_ok(),
            "coordinator" => coordinator.send(channel).is_ok(),
            _ => false,
        };
        if !sent {
            tracing::warn!(name, "channel to a sibling that nobody waits for");
        }
    }
}

/// Releases models whose last download has ended.
pub(crate) async fn models(gateway: Arc<Gateway>, mut gone: mpsc::UnboundedReceiver<Gone>) {
    while let Some(model) = gone.recv().await {
        let Some(chain) = gateway.chain(model.chain) else { continue };
        gateway.with(&chain, |inner, out| inner.forget_model(model, out));
    }
}
