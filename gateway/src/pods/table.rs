//! The pods that are served, and the one writer of them.

use std::{
    collections::{HashMap, HashSet},
    net::{Ipv4Addr, SocketAddr, TcpListener as StdListener},
    os::fd::OwnedFd,
    sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak},
    time::Duration,
};

use arc_swap::ArcSwap;
use futures_util::FutureExt as _;
use lifl_api::pod::{NodePod, PodAsk, PodPort, PodWord};
use lifl_cluster::Key;
use lifl_proxy::{
    Handle, Limits, Pool, PoolLimits, Server, Timeouts,
    queue::{Admin, Figures, Metrics, Probe, ProbeError, Queue, Settings, TUNNELS},
    tls::secured,
};
use rustix::net::{Shutdown, shutdown};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::sleep,
};

use super::Sockets;
use crate::{
    observe::Observers,
    secrets::{Known, Secrets},
    tls::{self, Certificate, TlsFault},
};

/// Connections to a pod's ports for probes, drain and figures: kubelet and autoscaler, and no crowd.
const SIDE_CONNECTIONS: usize = 64;
/// They are closed after so long without a request: whoever reaches the pod could hold all of them.
const SIDE_IDLE: Duration = Duration::from_secs(30);

/// The pods of this node, as requests find them. Clones share them.
#[derive(Clone, Debug)]
pub struct Pods {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pool: Pool<Sockets>,
    sockets: Sockets,
    limits: Limits,
    /// Where certificates of pods come from; nowhere without Kubernetes.
    secrets: OnceLock<Secrets>,
    /// What is to be seen of their requests; nothing without.
    observers: OnceLock<Observers>,
    table: RwLock<Table>,
    /// Who answers where. Requests read it, so it is replaced whole; whoever does that has the table.
    at: ArcSwap<HashMap<SocketAddr, Arc<Queue<Sockets>>>>,
}

#[derive(Debug, Default)]
struct Table {
    places: HashMap<u64, Served>,
    /// Places told of since the agent is the one that it is.
    told: HashSet<u64>,
}

#[derive(Debug)]
struct Served {
    pod: NodePod,
    /// None while another gateway accepts.
    listeners: Vec<Listening>,
    queue: Arc<Queue<Sockets>>,
    servers: Servers,
    /// Left when another gateway came; this one took over again, and they have connections still.
    former: Vec<Servers>,
}

/// What is served at the ports of a pod. Once told to drain they stay so.
#[derive(Clone, Debug)]
struct Servers {
    requests: Server<Queue<Sockets>>,
    figures: Server<Figures<Sockets>>,
    admin: Server<Admin<Sockets>>,
    /// None where nobody asks for them: a pod costs what it uses.
    metrics: Option<Server<Metrics<Sockets>>>,
}

/// A listener of a pod, and the task that accepts, if the port is served: it ends with this.
#[derive(Debug)]
struct Listening {
    port: PodPort,
    listener: Arc<TcpListener>,
    task: Option<AbortHandle>,
}

/// A pod that is served, and its listeners: for an agent that does not know it.
#[derive(Debug)]
pub struct Held {
    /// The pod.
    pub pod: NodePod,
    /// What each listener is for.
    pub ports: Vec<PodPort>,
    /// As the agent gave them.
    pub listeners: Vec<Arc<TcpListener>>,
}

/// Why a pod is not served.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("{0} listeners for {1} ports")]
    Count(usize, usize),
    #[error(transparent)]
    Probe(#[from] ProbeError),
    #[error("readiness probe: {0}")]
    Json(#[from] serde_json::Error),
    #[error("listener: {0}")]
    Io(#[from] std::io::Error),
    #[error("TLS: {0}")]
    Tls(#[from] TlsFault),
}

// === impl Pods ===

impl Pods {
    /// No pod yet. `ask` leads to the agent. Needs a tokio runtime around it when it is told of pods.
    #[must_use]
    pub fn new(ask: mpsc::UnboundedSender<PodAsk>, limits: Limits) -> Self {
        let sockets = Sockets::new(ask);
        let pool = Pool::new(sockets.clone(), PoolLimits { connect: Sockets::PATIENCE, ..PoolLimits::default() });
        let (secrets, observers) = (OnceLock::new(), OnceLock::new());
        let (table, at) = (RwLock::default(), ArcSwap::default());
        Self { shared: Arc::new(Shared { pool, sockets, limits, secrets, observers, table, at }) }
    }

    /// Connections to places, those of pods among them.
    #[must_use]
    pub fn pool(&self) -> &Pool<Sockets> {
        &self.shared.pool
    }

    /// Pods that ask for TLS get their certificates from here. To be called before they are told of.
    pub(crate) fn read_secrets(&self, secrets: Secrets) {
        let _once = self.shared.secrets.set(secrets);
    }

    /// Lines, spans and figures of their requests are made by these. To be called before pods are told of.
    pub fn observe(&self, observers: Observers) {
        let _once = self.shared.observers.set(observers);
    }

    /// The agent was started again, or this is the first one: it tells everything.
    pub fn agent_is_new(&self) {
        self.write().told.clear();
        self.shared.sockets.agent_is_new();
    }

    /// What this gateway accepts from, to be told to a new agent: it may be that of another pod of the agent's, and know nothing.
    #[must_use]
    pub fn held(&self) -> Vec<Held> {
        let table = self.read();
        let listening = table.places.values().filter(|served| !served.listeners.is_empty());
        listening.map(Served::held).collect()
    }

    /// Another gateway of this node serves the pods: what has come is answered, nothing more is accepted. The sockets are shared,
    /// so they are let go, not shut down. Who keeps a connection is sent there with its next answer, as each gateway counts a pod's
    /// requests for itself and two of them would let in twice as many; a connection without a request for a `lame_duck` time is
    /// closed then, for a request may be on its way now. Requests of this gateway's own ingress go there as to any pod elsewhere.
    /// Needs a tokio runtime around it.
    pub fn superseded(&self, lame_duck: Duration) {
        let left: Vec<Servers> = {
            let mut table = self.write();
            self.shared.at.store(Arc::default());
            let leave = |served: &mut Served| {
                served.listeners.clear();
                served.servers.begin_drain();
                served.servers.clone()
            };
            table.places.values_mut().map(leave).collect()
        };
        tokio::spawn(
            async move {
                sleep(lame_duck).await;
                left.iter().for_each(Servers::close);
            }
            .boxed(),
        );
    }

    /// Clients are told to go elsewhere with their next answers; what connects is served still.
    pub fn begin_drain(&self) {
        for served in self.read().places.values() {
            served.servers.begin_drain();
        }
    }

    /// The end: nothing more is accepted, what has come is answered. Who connects now waits for the next gateway.
    pub async fn drain(&self) {
        let mut ends = JoinSet::new();
        for served in self.write().places.values_mut() {
            served.listeners.clear();
            served.servers.close();
            let (all, queue) = (served.all_servers(), Arc::clone(&served.queue));
            ends.spawn(async move {
                for servers in all {
                    servers.closed().await;
                }
                queue.tunnels().end(TUNNELS).await;
            });
        }
        ends.join_all().await;
    }

    /// A word of the agent, with what came beside it.
    pub fn heed(&self, word: PodWord, fds: Vec<OwnedFd>) {
        match word {
            PodWord::Serve { place, pod, ports } => self.serve(place, *pod, &ports, fds),
            PodWord::Changed { place, pod } => self.changed(place, *pod),
            PodWord::Sockets { place } => self.shared.sockets.filled(place, fds),
            PodWord::NoSockets { place, reason } => {
                tracing::warn!(place, reason, "no sockets of a pod");
                self.shared.sockets.refused(place, &reason);
            }
            PodWord::Gone { place } => self.gone(place),
            PodWord::Synced => {
                let left: Vec<u64> = {
                    let table = self.read();
                    table.places.keys().filter(|place| !table.told.contains(place)).copied().collect()
                };
                left.into_iter().for_each(|place| self.gone(place));
            }
        }
    }

    /// All of them, for the admin page.
    #[must_use]
    pub fn document(&self) -> Value {
        let table = self.read();
        let one = |(place, served): (&u64, &Served)| {
            json!({
                "place": place,
                "namespace": served.pod.namespace,
                "pod": served.pod.name,
                "revision": served.pod.settings.revision,
                "address": served.pod.address,
                "draining": served.queue.drain().draining(),
                "requests": served.queue.depth(),
                "connections": served.connections(),
            })
        };
        Value::Array(table.places.iter().map(one).collect())
    }

    fn serve(&self, place: u64, pod: NodePod, ports: &[PodPort], fds: Vec<OwnedFd>) {
        let known = {
            let mut table = self.write();
            table.told.insert(place);
            table.places.contains_key(&place)
        };
        if known {
            // A new agent adopted the same sockets; ours listen already, unless another gateway had them meanwhile.
            self.listen_again(place, ports, fds);
            return self.changed(place, pod);
        }
        self.shared.sockets.open(place);
        match Served::new(&self.shared, place, pod, ports, fds) {
            Ok(served) => {
                let mut table = self.write();
                self.shared.answers(&served);
                table.places.insert(place, served);
            }
            Err(error) => {
                self.shared.sockets.close(place);
                tracing::error!(%error, place, "pod is not served");
            }
        }
    }

    fn listen_again(&self, place: u64, ports: &[PodPort], fds: Vec<OwnedFd>) {
        let mut table = self.write();
        let Some(served) = table.places.get_mut(&place).filter(|served| served.listeners.is_empty()) else { return };
        served.open_again(&self.shared);
        if let Err(error) = served.listen(&self.shared, ports, fds) {
            return tracing::error!(%error, place, "pod is not served again");
        }
        if served.pod.draining {
            served.end();
        }
        self.shared.answers(served);
    }

    /// Settings are read once, as queue-proxy reads its environment; but a pod that is to end is told so.
    fn changed(&self, place: u64, pod: NodePod) {
        let mut table = self.write();
        if let Some(served) = table.places.get_mut(&place) {
            let ends = pod.draining && !served.pod.draining;
            served.pod.draining = pod.draining;
            if ends {
                served.end();
            }
        }
    }

    fn gone(&self, place: u64) {
        let served = {
            let mut table = self.write();
            let served = table.places.remove(&place);
            served.inspect(|served| self.shared.answers_no_more(served))
        };
        self.shared.sockets.close(place);
        if let Some(served) = served {
            served.close();
        }
    }

    /// Who answers for the pod that listens at an address, if it is served here.
    pub(crate) fn queue(&self, at: &SocketAddr) -> Option<Arc<Queue<Sockets>>> {
        self.shared.at.load().get(at).cloned()
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.shared.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.shared.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Shared ===

impl Shared {
    /// Has requests to its address find a pod.
    fn answers(&self, served: &Served) {
        let mut at = HashMap::clone(&self.at.load());
        at.insert(served.at(), Arc::clone(&served.queue));
        self.at.store(Arc::new(at));
    }

    fn answers_no_more(&self, served: &Served) {
        let mut at = HashMap::clone(&self.at.load());
        // Its address may be that of another pod already.
        if at.get(&served.at()).is_some_and(|queue| Arc::ptr_eq(queue, &served.queue)) {
            at.remove(&served.at());
            self.at.store(Arc::new(at));
        }
    }
}

// === impl Served ===

impl Served {
    fn new(
        shared: &Shared,
        place: u64,
        pod: NodePod,
        ports: &[PodPort],
        fds: Vec<OwnedFd>,
    ) -> Result<Self, ServeError> {
        if fds.len() != ports.len() {
            return Err(ServeError::Count(fds.len(), ports.len()));
        }
        let user = SocketAddr::from((Ipv4Addr::LOCALHOST, pod.settings.user_port));
        let observe = shared.observers.get().map(|observers| observers.pod(&pod, &shared.pool, place));
        let queue = Queue::new(&shared.pool, user, place, settings(&pod)?).observed(observe.unwrap_or_default());
        let queue = Arc::new(queue);
        let servers = Servers::new(&queue, shared.limits, ports.contains(&PodPort::UserMetrics));
        let mut served = Self { pod, listeners: Vec::new(), queue, servers, former: Vec::new() };
        served.listen(shared, ports, fds)?;
        if served.pod.draining {
            served.end();
        }
        Ok(served)
    }

    fn listen(&mut self, shared: &Shared, ports: &[PodPort], fds: Vec<OwnedFd>) -> Result<(), ServeError> {
        for (port, fd) in ports.iter().zip(fds) {
            let listener = Arc::new(TcpListener::from_std(StdListener::from(fd))?);
            let task = match port {
                PodPort::Serving => Some(listen(&self.servers.requests, &listener)),
                PodPort::Stats => Some(listen(&self.servers.figures, &listener)),
                PodPort::Admin => Some(listen(&self.servers.admin, &listener)),
                PodPort::ServingTls => self.listen_tls(shared, Arc::clone(&listener))?,
                PodPort::UserMetrics => self.servers.metrics.as_ref().map(|metrics| listen(metrics, &listener)),
            };
            self.listeners.push(Listening { port: *port, listener, task });
        }
        Ok(())
    }

    /// Connections of requests: among what is open are the listeners, too.
    fn connections(&self) -> usize {
        let listening = self.listeners.iter().filter(|listening| listening.accepts_requests()).count();
        self.servers.requests.open().saturating_sub(listening)
    }

    /// New servers in place of those that were left; the queue, and so what is counted, stays the same.
    fn open_again(&mut self, shared: &Shared) {
        let servers = Servers::new(&self.queue, shared.limits, self.servers.metrics.is_some());
        self.former.push(std::mem::replace(&mut self.servers, servers));
        self.former.retain(Servers::are_open);
    }

    fn all_servers(&self) -> Vec<Servers> {
        self.former.iter().chain([&self.servers]).cloned().collect()
    }

    fn held(&self) -> Held {
        let of = |listening: &Listening| (listening.port, Arc::clone(&listening.listener));
        let (ports, listeners) = self.listeners.iter().map(of).unzip();
        Held { pod: self.pod.clone(), ports, listeners }
    }

    /// Where its requests come in.
    fn at(&self) -> SocketAddr {
        SocketAddr::from((self.pod.address, self.pod.settings.serving_port))
    }

    /// Serves the same over TLS, with the certificate of the pod's secret as it is at the time; without one handshakes fail.
    fn listen_tls(&self, shared: &Shared, listener: Arc<TcpListener>) -> Result<Option<AbortHandle>, ServeError> {
        let (Some(secrets), Some(settings)) = (shared.secrets.get(), &self.pod.settings.tls) else {
            tracing::warn!(pod = self.pod.name, "TLS of a pod without Kubernetes to read its secret from");
            return Ok(None);
        };
        let certificate = Arc::new(Certificate::default());
        let config = tls::of_pod(settings, Arc::clone(&certificate) as _)?;
        let key = Key { namespace: self.pod.namespace.clone(), name: settings.secret.clone() };
        let mut known = secrets.follow(key);
        let (server, secured) = (self.servers.requests.clone(), secured(config));
        let task = tokio::spawn(
            async move {
                let replaced = async {
                    loop {
                        if let Known::Is(secret) = &*known.borrow_and_update() {
                            match tls::read(secret) {
                                Ok(key) => certificate.set(key),
                                Err(error) => tracing::warn!(%error, "certificate of a pod"),
                            }
                        }
                        if known.changed().await.is_err() {
                            return;
                        }
                    }
                };
                tokio::select! {
                    () = server.listen_with(&listener, secured) => {}
                    () = replaced => {}
                }
            }
            .boxed(),
        );
        Ok(Some(task.abort_handle()))
    }

    /// The pod was told to end: drained when no request has come for a while, then closed. From then on connections are refused,
    /// and not left to wait in the kernel for somebody who accepts: the other holders of the listeners have no use for them.
    fn end(&self) {
        self.queue.terminate();
        let (queue, all) = (Arc::clone(&self.queue), self.all_servers());
        let listeners: Vec<_> = self.listeners.iter().filter_map(Listening::requests).collect();
        tokio::spawn(
            async move {
                queue.drain().done().await;
                // Those that were let go are of a gateway that has its own idea of when the pod is drained.
                for listener in listeners.iter().filter_map(Weak::upgrade) {
                    let _ended_already = shutdown(&listener, Shutdown::Both);
                }
                for servers in all {
                    servers.requests.close();
                    servers.requests.closed().await;
                }
                queue.tunnels().end(TUNNELS).await;
            }
            .boxed(),
        );
    }

    /// The pod is gone: whatever is still open leads nowhere.
    fn close(self) {
        self.servers.close();
        tokio::spawn(async move { self.queue.tunnels().end(Duration::ZERO).await }.boxed());
    }
}

// === impl Listening ===

impl Listening {
    /// The listener, if requests come in there.
    fn requests(&self) -> Option<Weak<TcpListener>> {
        self.is_of_requests().then(|| Arc::downgrade(&self.listener))
    }

    const fn is_of_requests(&self) -> bool {
        matches!(self.port, PodPort::Serving | PodPort::ServingTls)
    }

    fn accepts_requests(&self) -> bool {
        self.is_of_requests() && self.task.as_ref().is_some_and(|task| !task.is_finished())
    }
}

impl Drop for Listening {
    /// Accepts no more. What was accepted has a task of its own already.
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

// === impl Servers ===

impl Servers {
    fn new(queue: &Arc<Queue<Sockets>>, limits: Limits, metrics: bool) -> Self {
        let side = Limits { connections: SIDE_CONNECTIONS, idle: SIDE_IDLE, ..limits };
        Self {
            requests: Server::new(Arc::clone(queue), limits),
            figures: Server::new(Arc::new(Figures(Arc::clone(queue))), side),
            admin: Server::new(Arc::new(Admin(Arc::clone(queue))), side),
            metrics: metrics.then(|| Server::new(Arc::new(Metrics(Arc::clone(queue))), side)),
        }
    }

    fn begin_drain(&self) {
        self.requests.begin_drain();
        self.figures.begin_drain();
        self.admin.begin_drain();
        self.metrics.iter().for_each(Server::begin_drain);
    }

    fn close(&self) {
        self.requests.close();
        self.figures.close();
        self.admin.close();
        self.metrics.iter().for_each(Server::close);
    }

    /// Waits until all connections of those that matter are gone.
    async fn closed(&self) {
        tokio::join!(self.requests.closed(), self.figures.closed(), self.admin.closed());
    }

    fn are_open(&self) -> bool {
        self.requests.open() + self.figures.open() + self.admin.open() > 0
    }
}

fn listen<H: Handle>(server: &Server<H>, listener: &Arc<TcpListener>) -> AbortHandle {
    let (server, listener) = (server.clone(), Arc::clone(listener));
    tokio::spawn(async move { server.listen(&listener).await }.boxed()).abort_handle()
}

fn settings(pod: &NodePod) -> Result<Settings, ServeError> {
    let given = &pod.settings;
    let seconds = Duration::from_secs;
    let timeouts = Timeouts {
        start: seconds(given.timeouts.response_start),
        idle: seconds(given.timeouts.idle),
        total: seconds(given.timeouts.request),
    };
    let readiness = match given.readiness.is_empty() {
        true => Vec::new(),
        false => Probe::parse(&serde_json::to_string(&given.readiness)?)?,
    };
    Ok(Settings {
        pod_name: pod.name.clone(),
        concurrency: usize::try_from(given.container_concurrency).unwrap_or(usize::MAX),
        timeouts,
        readiness,
        http2_auto_detect: given.http2_auto_detect,
    })
}

#[cfg(test)]
mod tests;
