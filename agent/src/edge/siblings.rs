//! The agent's siblings: what one that (re)started is told, and what follows when its supervisor is another one.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use lifl_api::{
    node::{FromAgent, NodeEvent, ToAgent},
    pod::PodAsk,
};
use lifl_daemon::{Channel, Sibling, Standing, failpoint};

use super::{Agent, AgentError, Event, adopt::GATEWAY, hear, tell};
use crate::state::GATEWAY_SEAT;

/// By then a gateway that lives has found the new agent: its supervisor looks ten times a second.
pub(super) const GATEWAY_COMES: Duration = Duration::from_secs(1);
/// By then it has told what it holds.
const GATEWAY_TELLS: Duration = Duration::from_secs(10);

// === impl Agent ===

impl Agent {
    /// A sibling (re)started: tells it everything, which it may know already.
    pub(super) async fn meet(&mut self, sibling: Sibling) -> Result<(), AgentError> {
        let Sibling { name, epoch, channel } = sibling;
        let channel = Arc::new(channel);
        match name.as_str() {
            "coordinator" => self.meet_coordinator(channel).await,
            "gateway" => {
                if self.epochs.standing(&name, epoch) == Standing::New {
                    self.supersede(epoch).await?;
                }
                self.epochs.keep(&self.child, &name, epoch).await?;
                self.meet_gateway(epoch, channel).await;
            }
            other => tracing::warn!(name = other, "unknown sibling"),
        }
        Ok(())
    }

    async fn meet_coordinator(&mut self, channel: Arc<Channel>) {
        hear(channel.clone(), self.events.clone(), |order, _| Event::Order(order), None);
        let hello = NodeEvent::Hello {
            shm_limit: self.config.shm_limit,
            cores: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1)),
            path: self.path_name().to_owned(),
            chains: self.state().chains.keys().copied().collect(),
        };
        tell(Some(&channel), &hello, &[]).await;
        self.coordinator = Some(channel);
        self.report_settled().await;
    }

    async fn meet_gateway(&mut self, epoch: u64, channel: Arc<Channel>) {
        let word = move |word, fds| Event::Gateway(epoch, word, fds);
        hear(channel.clone(), self.events.clone(), word, None);
        // It asks again, and tells again what it holds; its pods are told when it has.
        self.early.clear();
        self.pods.forget_held();
        if self.pods.expects_held() {
            self.pods.expect_held(Instant::now() + GATEWAY_TELLS);
        }
        tell(Some(&channel), &FromAgent::DataSocket, &[self.gateway_socket.0.as_fd()]).await;
        for (word, fd) in self.all_segments() {
            tell(Some(&channel), &word, &[fd.as_fd()]).await;
        }
        tell(Some(&channel), &FromAgent::Synced { path: self.path_name().to_owned() }, &[]).await;
        for (chain, role) in self.successors() {
            tell(Some(&channel), &FromAgent::Replaced { chain, role }, &[]).await;
        }
        self.gateway_epoch = epoch;
        self.gateway = Some(channel);
    }

    /// Another gateway of this node: what its predecessor wrote down of the chains is not known to it, so they end. The one before
    /// may live on for a while, to answer what it has; it is to accept no more.
    async fn supersede(&mut self, epoch: u64) -> Result<(), AgentError> {
        tracing::info!(epoch, before = self.gateway_epoch, "another gateway: chains end");
        tell(self.gateway.as_ref(), &FromAgent::Superseded, &[]).await;
        self.superseded = self.gateway.take().map(|channel| (self.gateway_epoch, channel));
        let chains: Vec<u32> = self.state().chains.keys().copied().collect();
        for chain in chains {
            self.remove_chain(chain).await?;
        }
        failpoint("agent.superseding");
        // The one before reads its end of this pair.
        let (socket, near) = lifl_ebpf::pair()?;
        let _not_registered = self.path.unregister(GATEWAY_SEAT);
        self.child.deposit("gateway-socket", &(), &[socket.as_fd(), near.as_fd()]).await?;
        self.path.register(Some(socket.as_fd()), near.as_fd(), GATEWAY)?;
        self.gateway_socket = (socket, near);
        Ok(())
    }

    /// Functions that this life started where an earlier one may have had others: that one may have died before it said so.
    fn successors(&self) -> Vec<(u32, u32)> {
        if self.first {
            return Vec::new();
        }
        let state = self.state();
        let of = |(id, chain): (&u32, &crate::state::Chain)| {
            let ours = chain.members.iter().filter(|(_, member)| !member.adopted);
            ours.map(|(role, _)| (*id, *role)).collect::<Vec<_>>()
        };
        state.chains.iter().flat_map(of).collect()
    }

    /// A word of a gateway. One that is superseded has a say about its pods' connections only.
    pub(super) async fn gateway_word(
        &mut self,
        epoch: u64,
        word: ToAgent,
        fds: Vec<OwnedFd>,
    ) -> Result<(), AgentError> {
        if let ToAgent::Pod(ask) = word {
            self.answer_gateway(epoch, ask).await;
            return Ok(());
        }
        if epoch != self.gateway_epoch {
            tracing::debug!(?word, "word of a gateway that is superseded");
            return Ok(());
        }
        match word {
            ToAgent::Holds { pod, ports } => self.pods.hold(*pod, ports, fds),
            ToAgent::HoldsAll => {
                self.pods.take_held().await?;
                for telling in self.pods.all() {
                    tell(self.gateway.as_ref(), &FromAgent::Pod(telling.word.clone()), &telling.fds()).await;
                }
                self.retry_pods().await?;
            }
            word => self.segment_word(None, word, fds).await?,
        }
        Ok(())
    }

    async fn answer_gateway(&mut self, epoch: u64, ask: PodAsk) {
        let answer = self.pods.answer(ask).await;
        if epoch == self.gateway_epoch {
            tell(self.gateway.as_ref(), &FromAgent::Pod(answer.word.clone()), &answer.fds()).await;
        } else if self.superseded.as_ref().is_some_and(|(superseded, _)| *superseded == epoch) {
            self.tell_superseded(&answer).await;
        }
    }
}
