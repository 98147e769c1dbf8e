//! The pods that are served, and the one writer of them.

use std::{
    collections::{HashMap, HashSet},
    net::{Ipv4Addr, SocketAddr, TcpListener as StdListener},
    os::fd::OwnedFd,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use lifl_api::pod::{NodePod, PodAsk, PodPort, PodWord};
use lifl_proxy::{
    Handle, Limits, Pool, PoolLimits, Server, Timeouts,
    queue::{Admin, Figures, Probe, ProbeError, QUIET, Queue, Settings, TUNNELS},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc};

use super::Sockets;
use crate::ingress::Nearby;

/// Connections to a pod's ports for probes, drain and figures: kubelet and autoscaler, and no crowd.
const SIDE_CONNECTIONS: usize = 64;

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
    table: RwLock<Table>,
}

#[derive(Debug, Default)]
struct Table {
    places: HashMap<u64, Served>,
    at: HashMap<SocketAddr, Arc<Queue<Sockets>>>,
    /// Places told of since the agent is the one that it is.
    told: HashSet<u64>,
}

#[derive(Debug)]
struct Served {
    pod: NodePod,
    queue: Arc<Queue<Sockets>>,
    requests: Server<Queue<Sockets>>,
    figures: Server<Figures<Sockets>>,
    admin: Server<Admin<Sockets>>,
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
}

// === impl Pods ===

impl Pods {
    /// No pod yet. `ask` leads to the agent. Needs a tokio runtime around it when it is told of pods.
    #[must_use]
    pub fn new(ask: mpsc::UnboundedSender<PodAsk>, limits: Limits) -> Self {
        let sockets = Sockets::new(ask);
        let pool = Pool::new(sockets.clone(), PoolLimits::default());
        Self { shared: Arc::new(Shared { pool, sockets, limits, table: RwLock::default() }) }
    }

    /// Connections to places, those of pods among them.
    #[must_use]
    pub fn pool(&self) -> &Pool<Sockets> {
        &self.shared.pool
    }

    /// The agent was started again, or this is the first one: it tells everything.
    pub fn agent_is_new(&self) {
        self.write().told.clear();
        self.shared.sockets.agent_is_new();
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
                "connections": served.requests.open(),
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
            // A new agent adopted the same sockets; ours listen already.
            return self.changed(place, pod);
        }
        self.shared.sockets.open(place);
        match Served::new(&self.shared, place, pod, ports, fds) {
            Ok(served) => {
                let mut table = self.write();
                table.at.insert(served.at(), Arc::clone(&served.queue));
                table.places.insert(place, served);
            }
            Err(error) => {
                self.shared.sockets.close(place);
                tracing::error!(%error, place, "pod is not served");
            }
        }
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
            if let Some(served) = &served {
                table.at.remove(&served.at());
            }
            served
        };
        self.shared.sockets.close(place);
        if let Some(served) = served {
            served.close();
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.shared.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.shared.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Nearby for Pods {
    type Pod = Queue<Sockets>;

    fn pod(&self, at: &SocketAddr) -> Option<Arc<Self::Pod>> {
        self.read().at.get(at).cloned()
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
        let queue = Arc::new(Queue::new(&shared.pool, user, place, settings(&pod)?));
        let side = Limits { connections: SIDE_CONNECTIONS, ..shared.limits };
        let served = Self {
            requests: Server::new(Arc::clone(&queue), shared.limits),
            figures: Server::new(Arc::new(Figures(Arc::clone(&queue))), side),
            admin: Server::new(Arc::new(Admin(Arc::clone(&queue))), side),
            queue,
            pod,
        };
        for (port, fd) in ports.iter().zip(fds) {
            let listener = TcpListener::from_std(StdListener::from(fd))?;
            match port {
                PodPort::Serving => listen(&served.requests, listener),
                PodPort::Stats => listen(&served.figures, listener),
                PodPort::Admin => listen(&served.admin, listener),
                PodPort::ServingTls | PodPort::UserMetrics => {
                    tracing::warn!(pod = served.pod.name, ?port, "port is not served yet");
                }
            }
        }
        if served.pod.draining {
            served.end();
        }
        Ok(served)
    }

    /// Where its requests come in.
    fn at(&self) -> SocketAddr {
        SocketAddr::from((self.pod.address, self.pod.settings.serving_port))
    }

    /// The pod was told to end: drained when no request has come for a while, then closed.
    fn end(&self) {
        self.queue.terminate();
        let (queue, requests) = (Arc::clone(&self.queue), self.requests.clone());
        tokio::spawn(async move {
            queue.drain().done().await;
            requests.close();
            requests.closed().await;
            queue.tunnels().end(TUNNELS).await;
        });
    }

    /// The pod is gone: whatever is still open leads nowhere.
    fn close(self) {
        self.requests.close();
        self.figures.close();
        self.admin.close();
        tokio::spawn(async move { self.queue.tunnels().end(Duration::ZERO).await });
    }
}

fn listen<H: Handle>(server: &Server<H>, listener: TcpListener) {
    let server = server.clone();
    tokio::spawn(async move { server.listen(&listener).await });
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
        quiet: QUIET,
    })
}
