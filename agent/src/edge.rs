//! The agent's loop: what comes from coordinator, gateway and functions, and what it does about it.

mod adopt;
mod counted;
mod functions;
mod node;
mod notices;
mod segments;
mod siblings;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use lifl_api::{
    node::{NodeEvent, Order, ToAgent},
    pod::NodePod,
};
use lifl_cluster::{Crier, Notices};
use lifl_daemon::{Channel, ChannelError, Child, ChildError, Epochs, Sibling, Startup};
use lifl_ebpf::{Path, PathError, PathKind};
use lifl_ebpf_common::{maps::RouteKey, role};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinHandle,
};

use crate::{
    cgroup::Cgroups,
    config::Config,
    metrics,
    pods::{Counted, Pods, Shown},
    state::{Chain, ChainMeta, GATEWAY_SEAT, State},
};

/// Deaths of functions within one plan after which the plan is given up.
const MAX_DEATHS: u32 = 12;

/// Why the agent ended.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its configuration is unreadable.
    #[error("configuration of the agent: {0}")]
    Config(#[from] serde_json::Error),
    /// The supervisor is gone, or a deposit failed.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// The path failed.
    #[error("descriptor path: {0}")]
    Path(#[from] PathError),
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What the loop hears.
#[derive(Debug)]
enum Event {
    Peer(Sibling),
    Order(Order),
    /// From a gateway, by the epoch of its supervisor.
    Gateway(u64, ToAgent, Vec<OwnedFd>),
    /// From the function on a seat.
    Function(u32, ToAgent, Vec<OwnedFd>),
    /// The function on a seat closed its channel: it has ended, or is to.
    Ended(u32),
    /// ... and all that it sent is delivered.
    Drained(u32, String),
    /// The pods that this node is to serve, and the versions of their objects.
    Pods(Vec<(NodePod, String)>),
    /// Network namespaces are gone.
    Unmounted,
    Drain,
}

/// The agent at work.
#[derive(Debug)]
struct Agent {
    child: Arc<Child>,
    config: Config,
    path: Arc<Path>,
    state: Arc<Mutex<State>>,
    cgroups: Cgroups,
    gateway: Option<Arc<Channel>>,
    /// Of the gateway that is, or was last.
    gateway_epoch: u64,
    /// The gateway before this one: it answers what it has, and dials for that.
    superseded: Option<(u64, Arc<Channel>)>,
    /// Lives of the siblings' supervisors.
    epochs: Epochs,
    coordinator: Option<Arc<Channel>>,
    /// The gateway's data socket: end A, given to each of its lives, and end B.
    gateway_socket: (OwnedFd, OwnedFd),
    pods: Pods,
    counted: Arc<Counted>,
    notices: Notices,
    /// Sends them; taken by the watch of the pods.
    crier: Option<Crier>,
    /// Watches the folder of network namespaces.
    mounts: Option<JoinHandle<()>>,
    events: mpsc::UnboundedSender<Event>,
    failpoint: Option<String>,
    /// No agent was here before.
    first: bool,
    /// The gateway's requests (request, chain, bytes) for chains that the coordinator has not told of yet.
    early: Vec<(u64, u32, u64)>,
}

/// Runs the agent until it is told to drain or its supervisor is gone.
///
/// # Errors
/// [`AgentError`]; the supervisor starts a successor that adopts what runs.
pub fn run(child: Child, startup: Startup) -> BoxFuture<'static, Result<(), AgentError>> {
    // A future that is not boxed is compiled where it is polled, and there once for each kind of runtime.
    Box::pin(work(child, startup))
}

async fn work(child: Child, startup: Startup) -> Result<(), AgentError> {
    let (events, mut heard) = mpsc::unbounded_channel();
    let child = Arc::new(child);
    let supervisor = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    let cgroups = Cgroups::new(supervisor);
    let begun = Agent::begin(child.clone(), startup, events.clone(), cgroups.clone()).await;
    let mut agent = begun.inspect_err(|error| {
        if matches!(error, AgentError::Child(_)) {
            cgroups.remove_all();
        }
    })?;
    tokio::spawn(forward_peers(child.clone(), events.clone()).boxed());
    // Functions that this process started are its children; waiting for them by descriptor needs no handler, but the
    // default action of SIGCHLD must not be "ignore", or their exit codes would be lost.
    let _kept = signal(SignalKind::child())?;
    let result = agent.serve(&child, &mut heard).await;
    // A deposit that fails is how the supervisor's death is learnt in the middle of something.
    if matches!(result, Ok(()) | Err(AgentError::Child(_))) {
        agent.end();
    }
    result
}

async fn forward_peers(child: Arc<Child>, events: mpsc::UnboundedSender<Event>) {
    loop {
        tokio::select! {
            peer = child.next_peer() => match peer {
                Some(sibling) => drop(events.send(Event::Peer(sibling))),
                None => break,
            },
            () = child.draining() => break,
        }
    }
    let _agent_ended = events.send(Event::Drain);
}

/// Hears a channel in a task of its own until it ends.
fn hear<T: DeserializeOwned + Send + 'static>(
    channel: Arc<Channel>,
    events: mpsc::UnboundedSender<Event>,
    word: impl Fn(T, Vec<OwnedFd>) -> Event + Send + 'static,
    end: Option<Event>,
) {
    tokio::spawn(
        async move {
            loop {
                match channel.recv::<T>().await {
                    Ok(Some((message, fds))) => drop(events.send(word(message, fds))),
                    Ok(None) => break,
                    Err(error @ ChannelError::Words { .. }) => tracing::error!(%error, "word not understood"),
                    Err(error) => {
                        tracing::warn!(%error, "channel");
                        break;
                    }
                }
            }
            end.map(|end| events.send(end))
        }
        .boxed(),
    );
}

/// Sends, and leaves a failure to the end that the channel's reader will see.
async fn tell<T: Serialize>(channel: Option<&Arc<Channel>>, message: &T, fds: &[std::os::fd::BorrowedFd<'_>]) {
    if let Some(channel) = channel
        && let Err(error) = channel.send(message, fds).await
    {
        tracing::debug!(%error, "message not sent");
    }
}

// === impl Agent ===

impl Agent {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path_name(&self) -> &'static str {
        match self.path.kind() {
            PathKind::Ebpf => "ebpf",
            PathKind::Userspace => "userspace",
        }
    }

    /// Loads the path, or goes on in user space and says why.
    fn load_path(config: &Config) -> Result<Path, AgentError> {
        if config.userspace {
            tracing::info!("descriptors go over the userspace router: asked for");
            return Ok(Path::userspace()?);
        }
        match Path::load() {
            Ok(path) => {
                tracing::info!("descriptors go over eBPF (sk_msg)");
                Ok(path)
            }
            Err(error) => {
                tracing::info!(%error, "descriptors go over the userspace router: eBPF cannot be loaded");
                Ok(Path::userspace()?)
            }
        }
    }

    fn observe(&self) -> Result<(), AgentError> {
        let (state, path, name) = (self.state.clone(), self.path.clone(), self.path_name());
        let collector = metrics::Collector::new(state.clone(), path.clone(), name);
        if let Err(error) = self.child.registry().register(Box::new(collector)) {
            tracing::error!(%error, "metrics");
        }
        if self.config.node.is_some()
            && let Err(error) = self.child.registry().register(Box::new(Shown(self.counted.clone())))
        {
            tracing::error!(%error, "metrics of pods");
        }
        self.child
            .on_status(move || metrics::status(&state.lock().unwrap_or_else(PoisonError::into_inner), &path, name));
        Ok(())
    }

    async fn serve(&mut self, child: &Child, heard: &mut mpsc::UnboundedReceiver<Event>) -> Result<(), AgentError> {
        if self.first && self.config.node.is_some() {
            // A gateway may serve pods whose listeners an earlier agent of this node opened.
            self.pods.expect_held(Instant::now() + siblings::GATEWAY_COMES);
        }
        child.ready().await?;
        if let Some(node) = self.config.node.clone() {
            tokio::spawn(node::watch(node, self.events.clone(), self.notices.clone(), self.crier.take()).boxed());
        }
        loop {
            let event = tokio::select! {
                event = heard.recv() => event,
                () = node::until(self.pods.next_try()) => {
                    self.retry_pods().await?;
                    continue;
                }
            };
            match event {
                None | Some(Event::Drain) => return Ok(()),
                Some(event) => self.handle(event).await?,
            }
        }
    }

    async fn handle(&mut self, event: Event) -> Result<(), AgentError> {
        match event {
            Event::Peer(sibling) => self.meet(sibling).await?,
            Event::Order(order) => self.obey(order).await?,
            Event::Pods(pods) => self.serve_pods(pods).await?,
            Event::Unmounted => self.retry_pods().await?,
            Event::Gateway(epoch, word, fds) => self.gateway_word(epoch, word, fds).await?,
            Event::Function(seat, word, fds) => self.function_word(seat, word, fds).await?,
            Event::Ended(seat) => self.ended(seat),
            Event::Drained(seat, reason) => self.replace(seat, &reason).await?,
            Event::Drain => {}
        }
        Ok(())
    }

    async fn obey(&mut self, order: Order) -> Result<(), AgentError> {
        match order {
            Order::Chain { chain, namespace, job, quota } => {
                let meta = {
                    let mut state = self.state();
                    state.quota.set_chain(chain, quota);
                    let meta = ChainMeta { namespace, job, quota, next_segment: 1, revision: 0, plan: Vec::new() };
                    let entry = state.chains.entry(chain).or_insert_with(|| Chain::new(meta));
                    entry.meta.quota = quota;
                    entry.meta.clone()
                };
                self.child.deposit(&format!("chain/{chain}"), &meta, &[]).await?;
                self.path.set_route(RouteKey { chain, dst: role::GATEWAY }, GATEWAY_SEAT)?;
                let (now, early) = std::mem::take(&mut self.early).into_iter().partition(|(_, of, _)| *of == chain);
                self.early = early;
                for (request, chain, bytes) in now {
                    self.grant(None, request, chain, role::GATEWAY, bytes).await?;
                }
            }
            Order::Plan { chain, revision, members } => {
                let meta = {
                    let mut state = self.state();
                    let Some(entry) = state.chains.get_mut(&chain) else {
                        tracing::warn!(chain, "plan for an unknown chain");
                        return Ok(());
                    };
                    entry.meta.revision = revision;
                    entry.meta.plan = members;
                    entry.deaths = 0;
                    entry.meta.clone()
                };
                self.child.deposit(&format!("chain/{chain}"), &meta, &[]).await?;
                self.carry_out(chain).await?;
                self.report_settled().await;
            }
            Order::Remove { chain } => self.remove_chain(chain).await?,
        }
        Ok(())
    }

    /// Tells the coordinator of every plan that is complete; it knows revisions, so repeating is harmless.
    async fn report_settled(&self) {
        let settled: Vec<NodeEvent> = {
            let state = self.state();
            let done = state.chains.iter().filter(|(_, chain)| chain.meta.revision > 0 && chain.is_settled());
            done.map(|(id, chain)| NodeEvent::Planned { chain: *id, revision: chain.meta.revision }).collect()
        };
        for event in settled {
            tell(self.coordinator.as_ref(), &event, &[]).await;
        }
    }

    /// Ends all functions and removes what the kernel would keep.
    fn end(&mut self) {
        let pidfds: Vec<Arc<OwnedFd>> = {
            let state = self.state();
            state.chains.values().flat_map(|chain| chain.members.values().map(|member| member.pidfd.clone())).collect()
        };
        for pidfd in &pidfds {
            crate::process::kill(pidfd.as_fd());
        }
        for pidfd in &pidfds {
            crate::process::reap(pidfd);
        }
        self.cgroups.remove_all();
    }
}
