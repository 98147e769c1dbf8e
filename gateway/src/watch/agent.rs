//! The edge to the agent: segments in both directions, deaths of aggregators, the data socket.

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use lifl_api::{
    node::{FromAgent, ToAgent},
    pod::PodAsk,
};
use lifl_daemon::{Channel, ChannelError};
use tokio::sync::{mpsc, oneshot};

use super::{coordinator, data::Command};
use crate::{
    chain::{Chain, segment_key},
    pods::Held,
    state::Gateway,
};

/// What goes to the agent. Kept while it is away.
#[derive(Debug)]
pub(crate) struct Order {
    word: ToAgent,
    fd: Option<OwnedFd>,
}

/// The agent as the rest of the gateway sees it.
#[derive(Debug)]
pub(crate) struct Agent {
    out: mpsc::UnboundedSender<Order>,
    grants: Mutex<Grants>,
    connected: AtomicBool,
}

#[derive(Debug, Default)]
struct Grants {
    last: u64,
    waiting: HashMap<u64, Grant>,
    /// Segments that the agent does not keep yet: (chain, segment).
    unkept: HashMap<(u32, u32), oneshot::Sender<()>>,
}

#[derive(Debug)]
struct Grant {
    chain: u32,
    bytes: u64,
    answer: oneshot::Sender<Result<u32, String>>,
}

// === impl Agent ===

impl Agent {
    pub(crate) fn new(out: mpsc::UnboundedSender<Order>) -> Self {
        Self { out, grants: Mutex::default(), connected: AtomicBool::new(false) }
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Asks for a segment; its number, or why not. Waits for an agent that is away.
    pub(crate) async fn grant(&self, chain: u32, bytes: u64) -> Result<u32, String> {
        let (answer, granted) = oneshot::channel();
        let request = {
            let mut grants = self.grants();
            grants.last += 1;
            let request = grants.last;
            grants.waiting.insert(request, Grant { chain, bytes, answer });
            request
        };
        self.say(ToAgent::Grant { request, chain, bytes }, None);
        granted.await.unwrap_or_else(|_gone| Err("the gateway or the job ends".to_owned()))
    }

    /// Has a new segment handed to the members; returns when all were told. Waits for an agent that is away.
    pub(crate) async fn share(&self, chain: u32, segment: u32, bytes: u64, fd: OwnedFd) {
        let (keeper, kept) = oneshot::channel();
        self.grants().unkept.insert((chain, segment), keeper);
        self.say(ToAgent::Segment { chain, segment, bytes }, Some(fd));
        let _the_process_ends = kept.await;
    }

    pub(crate) fn drop_segment(&self, chain: u32, segment: u32) {
        self.say(ToAgent::DropSegment { chain, segment }, None);
    }

    /// Nobody waits any more for what was asked for this chain.
    pub(crate) fn forget(&self, chain: u32) {
        let mut grants = self.grants();
        grants.waiting.retain(|_, grant| grant.chain != chain);
        grants.unkept.retain(|(of, _), _| *of != chain);
    }

    fn say(&self, word: ToAgent, fd: Option<OwnedFd>) {
        let _the_process_ends = self.out.send(Order { word, fd });
    }

    fn answered(&self, request: u64, answer: Result<u32, String>) {
        let grant = self.grants().waiting.remove(&request);
        if let Some(Grant { answer: waiting, .. }) = grant {
            let _asker_gave_up = waiting.send(answer);
        }
    }

    fn kept(&self, chain: u32, segment: u32) {
        let keeper = self.grants().unkept.remove(&(chain, segment));
        if let Some(keeper) = keeper {
            let _asker_gave_up = keeper.send(());
        }
    }

    fn grants(&self) -> MutexGuard<'_, Grants> {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unanswered(&self) -> Vec<ToAgent> {
        let grants = self.grants();
        let again = |(request, grant): (&u64, &Grant)| ToAgent::Grant {
            request: *request,
            chain: grant.chain,
            bytes: grant.bytes,
        };
        grants.waiting.iter().map(again).collect()
    }
}

/// Serves the channel to the agent, whichever agent it is.
pub(crate) async fn run(
    gateway: Arc<Gateway>,
    mut channels: mpsc::UnboundedReceiver<Channel>,
    mut orders: mpsc::UnboundedReceiver<Order>,
    mut asks: mpsc::UnboundedReceiver<PodAsk>,
    data: mpsc::UnboundedSender<Command>,
) {
    let mut channel: Option<Channel> = None;
    loop {
        let connected = channel.is_some();
        let event = tokio::select! {
            biased;
            new = channels.recv() => Event::Channel(new),
            word = receive(channel.as_ref()), if connected => Event::Word(word),
            order = orders.recv(), if connected => Event::Order(order),
            ask = asks.recv(), if connected => Event::Ask(ask),
        };
        let kept = match event {
            Event::Channel(None) | Event::Order(None) | Event::Ask(None) => return,
            Event::Channel(Some(new)) => {
                // What the one before was asked for is asked for again as far as it is wanted still.
                while asks.try_recv().is_ok() {}
                gateway.pods.agent_is_new();
                let replayed = match replay(&gateway, &new).await {
                    Ok(()) => tell_held(&gateway, &new).await,
                    failed => failed,
                };
                channel = Some(new);
                replayed
            }
            Event::Word(Ok(Some((word, fds)))) => {
                if matches!(word, FromAgent::Adopted) {
                    match channel.as_ref() {
                        Some(channel) => replay(&gateway, channel).await,
                        None => Ok(()),
                    }
                } else {
                    heed(&gateway, word, fds, &data);
                    Ok(())
                }
            }
            Event::Word(Ok(None)) => Err(None),
            Event::Word(Err(ChannelError::Words { source, text })) => {
                tracing::error!(error = %source, text, "word of the agent is not understood");
                Ok(())
            }
            Event::Word(Err(error)) => Err(Some(error)),
            Event::Ask(Some(ask)) => match channel.as_ref() {
                Some(channel) => channel.send(&ToAgent::Pod(ask), &[]).await.map_err(Some),
                None => Ok(()),
            },
            Event::Order(Some(order)) => match channel.as_ref() {
                Some(channel) => carry_out(&gateway, channel, order).await,
                None => Ok(()),
            },
        };
        if let Err(error) = kept {
            tracing::info!(error = error.map(|e| e.to_string()), "agent is gone; updates are still taken");
            channel = None;
        }
        gateway.agent.connected.store(channel.is_some(), Ordering::Relaxed);
    }
}

enum Event {
    Channel(Option<Channel>),
    Word(Result<Option<(FromAgent, Vec<OwnedFd>)>, ChannelError>),
    Order(Option<Order>),
    Ask(Option<PodAsk>),
}

async fn receive(channel: Option<&Channel>) -> Result<Option<(FromAgent, Vec<OwnedFd>)>, ChannelError> {
    match channel {
        Some(channel) => channel.recv().await,
        None => std::future::pending().await,
    }
}

/// A new agent, or a new channel to it: what it may not know.
async fn replay(gateway: &Arc<Gateway>, channel: &Channel) -> Result<(), Option<ChannelError>> {
    for chain in gateway.chains() {
        let own: Vec<_> = {
            let inner = chain.lock();
            inner.own.iter().filter_map(|(id, own)| Some((*id, own.bytes, own.fd.try_clone().ok()?))).collect()
        };
        for (segment, bytes, fd) in own {
            let word = ToAgent::Segment { chain: chain.id, segment, bytes };
            channel.send(&word, &[fd.as_fd()]).await.map_err(Some)?;
        }
    }
    for word in gateway.agent.unanswered() {
        channel.send(&word, &[]).await.map_err(Some)?;
    }
    Ok(())
}

/// Pods as they are served, with their listeners: this agent may not know them, and is to go on with them.
async fn tell_held(gateway: &Gateway, channel: &Channel) -> Result<(), Option<ChannelError>> {
    for Held { pod, ports, listeners } in gateway.pods.held() {
        let fds: Vec<_> = listeners.iter().map(|listener| listener.as_fd()).collect();
        channel.send(&ToAgent::Holds { pod: Box::new(pod), ports }, &fds).await.map_err(Some)?;
    }
    channel.send(&ToAgent::HoldsAll, &[]).await.map_err(Some)
}

async fn carry_out(gateway: &Arc<Gateway>, channel: &Channel, order: Order) -> Result<(), Option<ChannelError>> {
    if let ToAgent::DropSegment { chain, segment } = order.word {
        // Ours is the later knowledge: a deposit without a segment would only be mapped in vain.
        if let Err(error) = gateway.child.remove(&segment_key(chain, segment)).await {
            tracing::warn!(%error, "deposit of a segment");
        }
    }
    let fds: Vec<_> = order.fd.iter().map(|fd| fd.as_fd()).collect();
    let result = channel.send(&order.word, &fds).await;
    drop(fds);
    if result.is_err() {
        // The next agent gets it.
        let _the_process_ends = gateway.agent.out.send(order);
    }
    result.map_err(Some)
}

fn heed(gateway: &Arc<Gateway>, word: FromAgent, fds: Vec<OwnedFd>, data: &mpsc::UnboundedSender<Command>) {
    if let FromAgent::Pod(word) = word {
        return gateway.pods.heed(word, fds);
    }
    let fd = fds.into_iter().next();
    match (word, fd) {
        (FromAgent::Granted { request, segment, .. }, _) => gateway.agent.answered(request, Ok(segment)),
        (FromAgent::Kept { chain, segment }, _) => gateway.agent.kept(chain, segment),
        (FromAgent::Refused { request, reason, .. }, _) => gateway.agent.answered(request, Err(reason)),
        (FromAgent::Segment { chain, segment, writer }, Some(fd)) => match gateway.chain(chain) {
            Some(chain) => add_segment(gateway, &chain, segment, writer, fd),
            None => coordinator::keep_orphan(gateway, chain, segment, writer, fd),
        },
        (FromAgent::SegmentGone { chain, segment }, _) => {
            if let Some(chain) = gateway.chain(chain) {
                chain.lock().members.remove(&segment);
            }
        }
        (FromAgent::DataSocket, Some(fd)) => drop(data.send(Command::Socket(fd))),
        (FromAgent::Replaced { chain, role }, _) => drop(data.send(Command::Resend { chain, role })),
        (FromAgent::Superseded, _) => super::superseded(gateway),
        (FromAgent::Synced { path }, _) => tracing::info!(path, "agent is in step"),
        (other, _) => tracing::warn!(?other, "word of the agent ignored"),
    }
}

/// A segment of a member of the chain.
pub(crate) fn add_segment(gateway: &Arc<Gateway>, chain: &Arc<Chain>, segment: u32, writer: u32, fd: OwnedFd) {
    let done = gateway.with(chain, |inner, out| inner.add_member(segment, writer, fd, &gateway.gone, out));
    if done {
        coordinator::tell_round_done(gateway, chain);
        chain.bump();
    }
}
