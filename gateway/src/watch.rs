//! The edges to the other processes of the node: each feeds the stores and empties a queue.

pub(crate) mod agent;
pub(crate) mod coordinator;
pub(crate) mod data;
pub(crate) mod outbox;
pub(crate) mod restore;
pub(crate) mod worker;

use std::sync::Arc;

use futures_util::FutureExt as _;
use lifl_api::node::ToGateway;
use lifl_daemon::{Channel, Epochs, Kin, Sibling, Standing};
use tokio::sync::mpsc;

use crate::{chain::Gone, state::Gateway};

/// Hands each new channel to the task of that sibling; before that comes what follows from its supervisor being another one.
pub(crate) async fn peers(
    gateway: Arc<Gateway>,
    mut epochs: Epochs,
    agent: mpsc::UnboundedSender<Channel>,
    coordinator: mpsc::UnboundedSender<Channel>,
) {
    while let Some(kin) = gateway.child.next_kin().await {
        let Kin::Sibling(Sibling { name, epoch, channel }) = kin else {
            superseded(&gateway);
            continue;
        };
        let sent = match name.as_str() {
            "agent" => {
                // A coordinator that comes later is to find no chain of the agent before.
                if epochs.standing(&name, epoch) == Standing::New {
                    lose_chains(&gateway).await;
                }
                if let Err(error) = epochs.keep(&gateway.child, &name, epoch).await {
                    tracing::warn!(%error, "epoch of the agent");
                }
                agent.send(channel).is_ok()
            }
            "coordinator" => coordinator.send(channel).is_ok(),
            _ => false,
        };
        if !sent {
            tracing::warn!(name, "channel to a sibling that nobody waits for");
        }
    }
}

/// Another gateway of this node has taken this one's place. The agent says so, and the supervisor in case the agent was started
/// again and knows the other one only: a request that came in here would find no agent.
pub(crate) fn superseded(gateway: &Arc<Gateway>) {
    tracing::info!("another gateway of this node serves the pods: what has come is answered");
    gateway.pods.superseded(gateway.config.lame_duck());
    let gateway = Arc::clone(gateway);
    tokio::spawn(async move { lose_chains(&gateway).await }.boxed());
}

/// The agent of all chains is no more, and their functions with it: the coordinator has the jobs go on from their checkpoints, in
/// chains of their own. Journals are kept.
pub(crate) async fn lose_chains(gateway: &Arc<Gateway>) {
    let chains = gateway.chains();
    if !chains.is_empty() {
        tracing::warn!(chains = chains.len(), "the node's aggregators are gone: jobs go on from their checkpoints");
    }
    for chain in &chains {
        gateway.lose(chain);
    }
    gateway.orphans().clear();
    gateway.outbox.clear();
    for chain in chains {
        // Its worker finishes the word at hand; then its deposits are forgotten.
        drop(chain.words.send((ToGateway::Remove { chain: chain.id }, Vec::new())));
        chain.words.closed().await;
    }
}

/// Releases models whose last download has ended.
pub(crate) async fn models(gateway: Arc<Gateway>, mut gone: mpsc::UnboundedReceiver<Gone>) {
    while let Some(model) = gone.recv().await {
        let Some(chain) = gateway.chain(model.chain) else { continue };
        gateway.with(&chain, |inner, out| inner.forget_model(model, out));
    }
}
