//! Carries out what [`decide`] says: opens, keeps, hands on.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use lifl_api::pod::{MAX_SOCKETS, NodePod, PodAsk, PodPort, PodWord};
use lifl_daemon::{Child, ChildError, Deposit, failpoint};
use rustix::net::{
    Shutdown, shutdown,
    sockopt::{socket_acceptconn, socket_cookie},
};
use serde::{Deserialize, Serialize};

use super::{
    counted::Counted,
    namespace::{self, Namespace, Opened},
    plan::{Action, SAID_AFTER, Standing, decide, pause},
};

/// The pods of this node.
#[derive(Debug)]
pub struct Pods {
    child: Arc<Child>,
    /// Where network namespaces are mounted.
    folder: PathBuf,
    known: BTreeMap<String, Entry>,
    /// The pods as last listed; none before the first list, so that what was adopted is served until then.
    wanted: Option<Vec<NodePod>>,
    /// Versions of their objects, by uid.
    versions: BTreeMap<String, String>,
    /// What a gateway holds of an earlier agent's, as far as it has told.
    held: Vec<Held>,
    /// Nothing is opened before: a gateway may hold it.
    not_before: Option<Instant>,
    counted: Arc<Counted>,
}

/// A pod that a gateway serves, and its listeners.
#[derive(Debug)]
struct Held {
    pod: NodePod,
    ports: Vec<PodPort>,
    listeners: Vec<OwnedFd>,
}

/// What came of a step.
#[derive(Debug)]
pub enum Report {
    /// For the gateway.
    Tell(Telling),
    /// This pod is not served, and nobody else serves it: worth an Event. Said once for each reason, when it has stood for a
    /// while, and not of pods that are about to end.
    Cannot {
        /// The pod.
        pod: Box<NodePod>,
        /// Why.
        reason: String,
    },
}

/// A word for the gateway and what goes beside it.
#[derive(Clone, Debug)]
pub struct Telling {
    /// The word.
    pub word: PodWord,
    fds: Arc<Vec<OwnedFd>>,
}

#[derive(Debug)]
enum Entry {
    Open(Open),
    /// Its namespace has gone while its object had this version.
    Left {
        pod: NodePod,
        version: Option<String>,
    },
    Cannot {
        pod: NodePod,
        reason: String,
        tries: u32,
        again: Instant,
        said: bool,
    },
}

#[derive(Debug)]
struct Open {
    pod: NodePod,
    place: u64,
    namespace: Namespace,
    ports: Vec<PodPort>,
    listeners: Arc<Vec<OwnedFd>>,
    /// Version of its object when its namespace was last seen mounted.
    seen: Option<String>,
}

/// What is deposited of an open pod, beside its namespace and its listeners.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    pod: NodePod,
    mount: String,
    ports: Vec<PodPort>,
}

// === impl Pods ===

impl Pods {
    /// Key of a pod's deposit: `pod/UID`.
    pub const DEPOSIT: &str = "pod";

    /// Whether a deposit is one of these.
    #[must_use]
    pub fn owns(key: &str) -> bool {
        key.split_once('/').is_some_and(|(kind, _)| kind == Self::DEPOSIT)
    }

    /// Takes back what an earlier agent had open: the same sockets, with whatever waits in them.
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub async fn adopt(child: Arc<Child>, folder: PathBuf, kept: Vec<Deposit>) -> Result<Self, ChildError> {
        let mut known = BTreeMap::new();
        for Deposit { key, meta, fds } in kept {
            match Open::adopt(meta, fds) {
                Ok(open) => drop(known.insert(open.pod.uid.clone(), Entry::Open(open))),
                Err(error) => {
                    tracing::error!(%error, key, "deposit of a pod: opened anew");
                    child.remove(&key).await?;
                }
            }
        }
        Ok(Self {
            child,
            folder,
            known,
            wanted: None,
            versions: BTreeMap::new(),
            held: Vec::new(),
            not_before: None,
            counted: Arc::new(Counted::new(None)),
        })
    }

    /// Has the connections of these pods counted, and of those that come.
    pub fn count_by(&mut self, counted: Arc<Counted>) {
        self.counted = counted;
        self.open_pods().for_each(|open| self.counted.open(open.place, &open.pod, open.sockets()));
        self.counted.forget_others();
    }

    /// Serves these pods and no others; beside each the version of its object.
    ///
    /// # Errors
    /// When the supervisor is gone: what is not kept must not be used.
    pub async fn wish(&mut self, pods: Vec<(NodePod, String)>, now: Instant) -> Result<Vec<Report>, ChildError> {
        self.versions = pods.iter().map(|(pod, version)| (pod.uid.clone(), version.clone())).collect();
        self.wanted = Some(pods.into_iter().map(|(pod, _)| pod).collect());
        self.step(now).await
    }

    /// Tries again what could not be opened, when its time has come ([`Pods::next_try`]), and notices namespaces that are gone.
    ///
    /// # Errors
    /// As [`Pods::wish`].
    pub async fn step(&mut self, now: Instant) -> Result<Vec<Report>, ChildError> {
        if self.not_before.is_some_and(|then| now < then) {
            return Ok(Vec::new());
        }
        self.not_before = None;
        let Some(wanted) = &self.wanted else { return Ok(Vec::new()) };
        let standings = self.standings();
        let actions = decide(wanted, &standings, now);
        for (uid, standing) in standings {
            if let (Standing::Open { mounted: true, .. }, Some(Entry::Open(open))) =
                (standing, self.known.get_mut(&uid))
            {
                open.seen = self.versions.get(&uid).cloned();
            }
        }
        let (mut out, mut opening) = (Vec::new(), Vec::new());
        for action in actions {
            match action {
                Action::Close { uid } => out.extend(self.close(&uid).await?.map(Report::Tell)),
                Action::Leave { pod } => out.extend(self.leave(pod).await?.map(Report::Tell)),
                Action::Open { pod, tries } => opening.push((pod, tries)),
                Action::Refuse { pod, tries, reason } => out.extend(self.cannot(pod, tries, reason, now)),
                Action::Tell { pod } => out.extend(self.changed(pod).await?.map(Report::Tell)),
            }
        }
        if !opening.is_empty() {
            out.append(&mut self.open(opening, now).await?);
        }
        Ok(out)
    }

    /// When [`Pods::step`] has something to do.
    #[must_use]
    pub fn next_try(&self) -> Option<Instant> {
        let again = |entry: &Entry| match entry {
            Entry::Cannot { again, .. } => Some(*again),
            Entry::Open(_) | Entry::Left { .. } => None,
        };
        self.not_before.or_else(|| self.known.values().filter_map(again).min())
    }

    /// Opens nothing before `then`, or before [`Pods::take_held`]: what a gateway holds must not be opened beside it.
    pub fn expect_held(&mut self, then: Instant) {
        self.not_before = Some(then);
    }

    /// Still waits for what a gateway holds.
    #[must_use]
    pub fn expects_held(&self) -> bool {
        self.not_before.is_some()
    }

    /// Notes what a gateway holds, until [`Pods::take_held`].
    pub fn hold(&mut self, pod: NodePod, ports: Vec<PodPort>, listeners: Vec<OwnedFd>) {
        self.held.push(Held { pod, ports, listeners });
    }

    /// Forgets what a gateway that is gone has told.
    pub fn forget_held(&mut self) {
        self.held.clear();
    }

    /// Takes over what a gateway holds and nobody here knows: the same sockets, with whatever waits in them.
    ///
    /// # Errors
    /// As [`Pods::wish`].
    pub async fn take_held(&mut self) -> Result<(), ChildError> {
        self.not_before = None;
        let mut held = std::mem::take(&mut self.held);
        // What an agent has shut down since is nobody's to adopt.
        let listens = |fd: &OwnedFd| socket_acceptconn(fd).unwrap_or(false);
        let unknown = |uid: &str| !matches!(self.known.get(uid), Some(Entry::Open(_)));
        held.retain(|held| unknown(&held.pod.uid) && held.listeners.iter().all(listens));
        if held.is_empty() {
            return Ok(());
        }
        let places: BTreeSet<u64> = self.open_pods().map(|open| open.namespace.inode).collect();
        let port = |held: &Held| held.pod.settings.ports().first().map_or(0, |(_, port)| *port);
        let wanted: Vec<_> = held.iter().map(|held| (held.pod.address, port(held))).collect();
        let found = match namespace::taken(self.folder.clone(), wanted, places).await {
            Ok(found) => found,
            Err(error) => held.iter().map(|_| Err(error.to_string())).collect(),
        };
        for (Held { pod, ports, listeners }, namespace) in held.into_iter().zip(found) {
            let open = namespace.and_then(|namespace| {
                Open::of(pod.clone(), ports, namespace, listeners).map_err(|error| error.to_string())
            });
            match open {
                Ok(open) => {
                    open.deposit(&self.child, true).await?;
                    tracing::info!(namespace = pod.namespace, pod = pod.name, "pod taken over from the gateway");
                    self.counted.open(open.place, &pod, open.sockets());
                    self.known.insert(pod.uid, Entry::Open(open));
                }
                Err(reason) => tracing::info!(namespace = pod.namespace, pod = pod.name, reason, "pod not taken over"),
            }
        }
        Ok(())
    }

    /// Everything, for a gateway that (re)started.
    #[must_use]
    pub fn all(&self) -> Vec<Telling> {
        let mut out: Vec<Telling> = self.open_pods().map(Open::serve).collect();
        out.push(Telling::bare(PodWord::Synced));
        out
    }

    /// Does what the gateway asks for.
    pub async fn answer(&self, ask: PodAsk) -> Telling {
        let PodAsk::Sockets { place, count } = ask;
        let made = match self.open_pods().find(|open| open.place == place) {
            Some(open) => namespace::sockets(open.namespace.fd.clone(), count.min(MAX_SOCKETS)).await,
            None => Err(io::Error::new(io::ErrorKind::NotFound, "no such pod")),
        };
        match made {
            Ok(fds) => {
                self.counted.dialling(place, &fds);
                Telling { word: PodWord::Sockets { place }, fds: Arc::new(fds) }
            }
            Err(error) => Telling::bare(PodWord::NoSockets { place, reason: error.to_string() }),
        }
    }

    fn open_pods(&self) -> impl Iterator<Item = &Open> {
        self.known.values().filter_map(|entry| match entry {
            Entry::Open(open) => Some(open),
            Entry::Cannot { .. } | Entry::Left { .. } => None,
        })
    }

    fn standings(&self) -> BTreeMap<String, Standing> {
        let version = |pod: &NodePod| self.versions.get(&pod.uid);
        let standing = |entry: &Entry| match entry {
            Entry::Open(open) => Standing::Open {
                pod: open.pod.clone(),
                mounted: namespace::is_mounted(&self.folder, &open.namespace),
                renewed: open.seen.is_some() && open.seen.as_ref() != version(&open.pod),
            },
            Entry::Left { pod, version: then } => {
                Standing::Left { pod: pod.clone(), renewed: then.as_ref() != version(pod) }
            }
            Entry::Cannot { pod, tries, again, .. } => {
                Standing::Cannot { pod: pod.clone(), tries: *tries, again: *again }
            }
        };
        self.known.iter().map(|(uid, entry)| (uid.clone(), standing(entry))).collect()
    }

    async fn open(&mut self, opening: Vec<(NodePod, u32)>, now: Instant) -> Result<Vec<Report>, ChildError> {
        let held: BTreeSet<u64> = self.open_pods().map(|open| open.namespace.inode).collect();
        let ports = |pod: &NodePod| pod.settings.ports().into_iter().map(|(_, port)| port).collect();
        let wanted = opening.iter().map(|(pod, _)| (pod.address, ports(pod))).collect();
        let opened = match namespace::open(self.folder.clone(), wanted, held).await {
            Ok(opened) => opened,
            Err(error) => {
                let reason = format!("network namespaces under {}: {error}", self.folder.display());
                opening.iter().map(|_| Err(reason.clone())).collect()
            }
        };
        let mut out = Vec::new();
        for ((pod, tries), opened) in opening.into_iter().zip(opened) {
            match opened.and_then(|opened| Open::new(pod.clone(), opened).map_err(|e| e.to_string())) {
                Ok(open) => {
                    // Kept before it is used, as every socket.
                    open.deposit(&self.child, true).await?;
                    failpoint("agent.pod_kept");
                    tracing::info!(namespace = pod.namespace, pod = pod.name, address = %pod.address, "pod opened");
                    self.counted.open(open.place, &pod, open.sockets());
                    out.push(Report::Tell(open.serve()));
                    self.known.insert(pod.uid, Entry::Open(open));
                }
                Err(reason) => out.extend(self.cannot(pod, tries, reason, now)),
            }
        }
        Ok(out)
    }

    fn cannot(&mut self, pod: NodePod, tries: u32, reason: String, now: Instant) -> Option<Report> {
        let again = now + pause(tries);
        let before = self.known.remove(&pod.uid);
        let said = matches!(before, Some(Entry::Cannot { reason: ref before, said: true, .. }) if *before == reason);
        let say = !said && tries >= SAID_AFTER && !pod.draining;
        let entry =
            Entry::Cannot { pod: pod.clone(), reason: reason.clone(), tries: tries + 1, again, said: said || say };
        self.known.insert(pod.uid.clone(), entry);
        tracing::debug!(namespace = pod.namespace, pod = pod.name, reason, tries, "pod cannot be served");
        say.then(|| Report::Cannot { pod: Box::new(pod), reason })
    }

    async fn changed(&mut self, pod: NodePod) -> Result<Option<Telling>, ChildError> {
        let Some(Entry::Open(open)) = self.known.get_mut(&pod.uid) else { return Ok(None) };
        open.pod = pod;
        open.deposit(&self.child, false).await?;
        Ok(Some(Telling::bare(PodWord::Changed { place: open.place, pod: Box::new(open.pod.clone()) })))
    }

    async fn leave(&mut self, pod: NodePod) -> Result<Option<Telling>, ChildError> {
        let telling = self.close(&pod.uid).await?;
        let version = self.versions.get(&pod.uid).cloned();
        self.known.insert(pod.uid.clone(), Entry::Left { pod, version });
        Ok(telling)
    }

    async fn close(&mut self, uid: &str) -> Result<Option<Telling>, ChildError> {
        let Some(Entry::Open(open)) = self.known.remove(uid) else { return Ok(None) };
        self.child.remove(&key(uid)).await?;
        self.counted.close(open.place);
        // The gateway has the same sockets: it is not waited for, connections are refused and the ports are free from here on.
        for listener in open.listeners.iter() {
            let _ended_already = shutdown(listener, Shutdown::Both);
        }
        tracing::info!(namespace = open.pod.namespace, pod = open.pod.name, "pod closed");
        Ok(Some(Telling::bare(PodWord::Gone { place: open.place })))
    }
}

fn key(uid: &str) -> String {
    format!("{}/{uid}", Pods::DEPOSIT)
}

// === impl Open ===

impl Open {
    fn new(pod: NodePod, opened: Opened) -> io::Result<Self> {
        let ports = pod.settings.ports().into_iter().map(|(kind, _)| kind).collect();
        Self::of(pod, ports, opened.namespace, opened.listeners)
    }

    fn of(pod: NodePod, ports: Vec<PodPort>, namespace: Namespace, listeners: Vec<OwnedFd>) -> io::Result<Self> {
        if ports.len() != listeners.len() || listeners.is_empty() {
            return Err(io::Error::other(format!("{} listeners for {} ports", listeners.len(), ports.len())));
        }
        // The kernel gives each socket of its life another number: a place that is opened anew is another place, and an adopted
        // one is the same, without a counter to be kept.
        let place = socket_cookie(&listeners[0])?;
        Ok(Self { pod, place, namespace, ports, listeners: Arc::new(listeners), seen: None })
    }

    fn adopt(meta: serde_json::Value, fds: Vec<OwnedFd>) -> io::Result<Self> {
        let kept: Kept = serde_json::from_value(meta)?;
        let mut fds = fds.into_iter();
        let fd = fds.next().ok_or_else(|| io::Error::other("no descriptors"))?;
        let namespace = Namespace { inode: namespace::inode(fd.as_fd())?, fd: Arc::new(fd), mount: kept.mount };
        Self::of(kept.pod, kept.ports, namespace, fds.collect())
    }

    async fn deposit(&self, child: &Child, with_fds: bool) -> Result<(), ChildError> {
        let meta = Kept { pod: self.pod.clone(), mount: self.namespace.mount.clone(), ports: self.ports.clone() };
        let fds: Vec<BorrowedFd<'_>> = match with_fds {
            true => std::iter::once(self.namespace.fd.as_fd()).chain(self.listeners.iter().map(AsFd::as_fd)).collect(),
            false => Vec::new(),
        };
        child.deposit(&key(&self.pod.uid), &meta, &fds).await
    }

    fn sockets(&self) -> impl Iterator<Item = (&PodPort, &OwnedFd)> {
        self.ports.iter().zip(self.listeners.iter())
    }

    fn serve(&self) -> Telling {
        let word = PodWord::Serve { place: self.place, pod: Box::new(self.pod.clone()), ports: self.ports.clone() };
        Telling { word, fds: self.listeners.clone() }
    }
}

// === impl Telling ===

impl Telling {
    fn bare(word: PodWord) -> Self {
        Self { word, fds: Arc::default() }
    }

    /// What goes beside the word.
    #[must_use]
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd).collect()
    }
}
