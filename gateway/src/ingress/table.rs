//! The one writer: from snapshots to what is served, and what became of each Ingress.
//!
//! A snapshot is put in force so that no request falls between two: addresses that are new come first, then the rules
//! that may need them, then addresses that are gone. An Ingress whose new version cannot be served yet (a backend without
//! an address, a certificate that is missing) keeps its old one, for objects arrive in any order.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::{ArcSwap, Guard};
use k8s_openapi::api::core::v1::Secret;
use lifl_api::ingress::{CLASS, KIngress};
use lifl_cluster::Key;
use prometheus::Registry;
use rustls::sign::CertifiedKey;

use super::{
    backend::{Backend, BackendName, Targets},
    metrics::{Counters, Metrics},
    rules::Rules,
    snapshot::{Addresses, Catalog, Snapshot, same},
    translate::Translated,
};
use crate::tls::{self, ByHost, Certificates};

/// What the ingress is told once.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Class of the Ingresses that are served.
    pub class: String,
    /// Domain of the cluster, for short forms of hosts.
    pub domain: String,
    /// This node's name: addresses on it come first. [`Snapshot::node`] wins.
    pub node: String,
}

/// The ingress of a node: rules, backends, certificates. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Ingress {
    pub(super) shared: Arc<Shared>,
}

/// What became of an Ingress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is served as it stands.
    Served,
    /// A backend has no address yet. The version before goes on being served; where there is none, requests get a 503.
    Waiting(BackendName),
    /// The service of a backend is not there (yet); as [`Outcome::Waiting`] otherwise.
    Missing(BackendName),
    /// Another one has one of its hosts; it is not served.
    Conflict(Key),
    /// It cannot be read, or a certificate is missing. The version before goes on being served.
    Failed(String),
}

/// What became of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Of each Ingress of our class, with the hash of its latest version where it has one.
    pub ingresses: BTreeMap<Key, (Option<String>, Outcome)>,
    /// External names that rules lead to: whoever resolves them tells them in [`Snapshot::names`].
    pub names: BTreeSet<String>,
}

/// What requests read, and the writer beside.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) settings: Settings,
    pub(super) metrics: Metrics,
    rules: ArcSwap<Rules>,
    /// For clients outside and inside.
    pub(super) certificates: [Arc<Certificates>; 2],
    writer: Mutex<Writer>,
}

#[derive(Debug, Default)]
struct Writer {
    targets: Targets,
    backends: HashMap<BackendName, (Arc<Backend>, Addresses)>,
    /// The latest version of each Ingress as it was read.
    latest: BTreeMap<Key, Version>,
    /// What the rules are made of, in order of precedence.
    candidates: Vec<Arc<Translated>>,
    conflicts: BTreeMap<Key, Key>,
    secrets: HashMap<Key, Pair>,
    report: Report,
}

#[derive(Debug)]
struct Version {
    king: Arc<KIngress>,
    read: Result<Arc<Translated>, String>,
}

/// A certificate and its key, as far as they were ever readable: a bad or vanished secret does not end what is served.
#[derive(Debug)]
struct Pair {
    secret: Option<Arc<Secret>>,
    last_good: Option<Arc<CertifiedKey>>,
    fault: Option<String>,
}

// === impl Settings ===

impl Default for Settings {
    fn default() -> Self {
        Self { class: CLASS.to_owned(), domain: "cluster.local".to_owned(), node: String::new() }
    }
}

// === impl Outcome ===

impl Outcome {
    pub(super) const fn label(&self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Waiting(_) | Self::Missing(_) => "waiting",
            Self::Conflict(_) => "conflict",
            Self::Failed(_) => "failed",
        }
    }

    /// Why it is not served; a word for people.
    pub(super) fn why(&self) -> Option<String> {
        match self {
            Self::Served => None,
            Self::Waiting(backend) => Some(format!("{backend} has no ready address")),
            Self::Missing(backend) => Some(format!("there is no Service {}", backend.of_service())),
            Self::Conflict(other) => Some(format!("{other} has one of its hosts")),
            Self::Failed(why) => Some(why.clone()),
        }
    }
}

// === impl Ingress ===

impl Ingress {
    /// An ingress without rules; its metrics go to `registry`.
    ///
    /// # Errors
    /// When its metrics are registered already.
    pub fn new(settings: Settings, registry: &Registry) -> Result<Self, prometheus::Error> {
        let shared = Arc::new(Shared {
            settings,
            metrics: Metrics::new(registry)?,
            rules: ArcSwap::default(),
            certificates: Default::default(),
            writer: Mutex::default(),
        });
        Metrics::watch(registry, Arc::downgrade(&shared))?;
        Ok(Self { shared })
    }

    /// Puts a snapshot in force. Requests under way are not touched.
    pub fn apply(&self, snapshot: &Snapshot) -> Report {
        let mut writer = self.shared.writer();
        writer.read(snapshot, &self.shared.settings.class);
        let node = snapshot.node.as_deref().unwrap_or(&self.shared.settings.node);
        let gone = writer.bring(snapshot, node);
        writer.read_secrets(snapshot);
        let candidates = writer.choose();
        if !same(&candidates, &writer.candidates) {
            let (rules, conflicts) = Rules::compile(&candidates, &self.shared.settings.domain);
            writer.conflicts = conflicts.into_iter().map(|(own, other)| (own.clone(), other.clone())).collect();
            self.shared.rules.store(Arc::new(rules));
            writer.candidates = candidates;
        }
        let served = writer.served();
        for (certificates, of_listener) in self.shared.certificates.iter().zip(writer.certificates(&served)) {
            certificates.set(of_listener);
        }
        for backend in gone {
            backend.set(Vec::new(), Vec::new());
        }
        writer.sweep();
        writer.report = writer.judge(snapshot, node);
        self.shared.metrics.show(&writer.report);
        writer.report.clone()
    }

    /// What became of the last snapshot.
    #[must_use]
    pub fn report(&self) -> Report {
        self.shared.writer().report.clone()
    }
}

// === impl Shared ===

impl Shared {
    /// The rules as they are now.
    pub(super) fn rules(&self) -> Guard<Arc<Rules>> {
        self.rules.load()
    }

    pub(super) fn backends(&self) -> Vec<Arc<Backend>> {
        self.writer().backends.values().map(|(backend, _)| Arc::clone(backend)).collect()
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Writer ===

impl Writer {
    /// Reads what has changed, forgets what is gone.
    fn read(&mut self, snapshot: &Snapshot, class: &str) {
        let mut old = std::mem::take(&mut self.latest);
        for king in snapshot.ingresses.iter().filter(|king| king.class() == Some(class)) {
            let metadata = &king.metadata;
            let (Some(namespace), Some(name)) = (metadata.namespace.clone(), metadata.name.clone()) else { continue };
            let name = Key { namespace, name };
            let alike = |version: &Version| {
                version.king.spec == king.spec
                    && version.king.metadata.creation_timestamp == king.metadata.creation_timestamp
            };
            let version = old.remove(&name).filter(alike).unwrap_or_else(|| {
                let read = Translated::new(king, |backend| self.backend(backend));
                Version { king: Arc::clone(king), read: read.map(Arc::new).map_err(|fault| fault.to_string()) }
            });
            self.latest.insert(name, version);
        }
    }

    fn backend(&mut self, name: BackendName) -> Arc<Backend> {
        let new = || (Arc::new(Backend::new(name.clone(), Counters::default())), Addresses::default());
        Arc::clone(&self.backends.entry(name.clone()).or_insert_with(new).0)
    }

    /// Gives backends their addresses; those that have none any more are returned, to be emptied last.
    fn bring(&mut self, snapshot: &Snapshot, node: &str) -> Vec<Arc<Backend>> {
        let catalog = Catalog::new(snapshot, node);
        let mut gone = Vec::new();
        for (name, (backend, old)) in &mut self.backends {
            let new = catalog.addresses(name);
            if new == *old {
                continue;
            }
            if new.is_empty() {
                gone.push(Arc::clone(backend));
            } else {
                let near = new.near.iter().map(|endpoint| self.targets.get(endpoint)).collect();
                backend.set(near, new.far.iter().map(|endpoint| self.targets.get(endpoint)).collect());
            }
            *old = new;
        }
        gone
    }

    /// Reads secrets that Ingresses name and that have changed.
    fn read_secrets(&mut self, snapshot: &Snapshot) {
        let read = self.latest.values().filter_map(|version| version.read.as_ref().ok());
        let named = read.chain(&self.candidates).flat_map(|ingress| ingress.tls.iter().flatten());
        let named: BTreeSet<Key> = named.map(|certificate| certificate.secret.clone()).collect();
        let there: HashMap<Key, &Arc<Secret>> =
            snapshot.secrets.iter().map(|secret| (Key::of(&**secret), secret)).collect();
        let mut old = std::mem::take(&mut self.secrets);
        for name in named {
            let old = old.remove(&name);
            let refused = snapshot.refused.get(&name).map(String::as_str);
            let new = Pair::new(old, there.get(&name).copied(), refused);
            self.secrets.insert(name, new);
        }
    }

    /// The version of each Ingress that is to be served, the first in precedence first.
    fn choose(&self) -> Vec<Arc<Translated>> {
        let before: HashMap<&Key, &Arc<Translated>> =
            self.candidates.iter().map(|ingress| (&ingress.name, ingress)).collect();
        let mut candidates = Vec::with_capacity(self.latest.len());
        for (name, version) in &self.latest {
            let before = before.get(name).copied();
            let chosen = match &version.read {
                Err(_) => before,
                Ok(new) if self.fault(new).is_some() => before,
                Ok(new) if self.wanting(new).is_some() => before.or(Some(new)),
                Ok(new) => Some(new),
            };
            candidates.extend(chosen.cloned());
        }
        candidates.sort_by(|left, right| left.precedence(right));
        candidates
    }

    /// The first backend that has a share of the requests and nobody to answer them.
    fn wanting<'a>(&self, ingress: &'a Translated) -> Option<&'a BackendName> {
        let nobody = |name: &BackendName| self.backends.get(name).is_none_or(|(_, addresses)| addresses.is_empty());
        ingress.sharing().find(|name| nobody(name))
    }

    /// The first certificate that is not there or of no use.
    fn fault(&self, ingress: &Translated) -> Option<String> {
        ingress.tls.iter().flatten().find_map(|certificate| {
            let fault = self.secrets.get(&certificate.secret)?.fault.as_ref()?;
            Some(format!("secret '{}': {fault}", certificate.secret))
        })
    }

    fn served(&self) -> Vec<Arc<Translated>> {
        let served = self.candidates.iter().filter(|ingress| !self.conflicts.contains_key(&ingress.name));
        served.cloned().collect()
    }

    /// Certificates by host, for clients outside and inside. The first in precedence has a host.
    fn certificates(&self, served: &[Arc<Translated>]) -> [ByHost; 2] {
        let mut out = [ByHost::new(), ByHost::new()];
        for ingress in served {
            for (by_host, certificates) in out.iter_mut().zip(&ingress.tls) {
                for certificate in certificates {
                    let pair = self.secrets.get(&certificate.secret);
                    let Some(key) = pair.and_then(|pair| pair.last_good.as_ref()) else { continue };
                    for host in &certificate.hosts {
                        by_host.entry(host.clone()).or_insert_with(|| Arc::clone(key));
                    }
                }
            }
        }
        out
    }

    /// Forgets backends that no rule names any more.
    fn sweep(&mut self) {
        let read = self.latest.values().filter_map(|version| version.read.as_ref().ok());
        let named: BTreeSet<&BackendName> =
            read.chain(&self.candidates).flat_map(|ingress| ingress.backends()).collect();
        self.backends.retain(|name, _| named.contains(name));
        self.targets.sweep();
    }

    fn judge(&self, snapshot: &Snapshot, node: &str) -> Report {
        let mut report = Report::default();
        let catalog = Catalog::new(snapshot, node);
        report.names = self.backends.keys().filter_map(|name| catalog.external_name(name)).map(str::to_owned).collect();
        for (name, version) in &self.latest {
            let (hash, outcome) = match &version.read {
                Err(fault) => (None, Outcome::Failed(fault.clone())),
                Ok(read) => (Some(read.hash.clone()), self.outcome(name, read, &catalog)),
            };
            report.ingresses.insert(name.clone(), (hash, outcome));
        }
        report
    }

    fn outcome(&self, name: &Key, read: &Translated, catalog: &Catalog<'_>) -> Outcome {
        if let Some(fault) = self.fault(read) {
            return Outcome::Failed(fault);
        }
        if let Some(other) = self.conflicts.get(name) {
            return Outcome::Conflict(other.clone());
        }
        match self.wanting(read) {
            Some(backend) if !catalog.has(backend) => Outcome::Missing(backend.clone()),
            Some(backend) => Outcome::Waiting(backend.clone()),
            None => Outcome::Served,
        }
    }
}

// === impl Pair ===

impl Pair {
    /// `refused` is why the secret was not told.
    fn new(old: Option<Self>, secret: Option<&Arc<Secret>>, refused: Option<&str>) -> Self {
        let last_good = old.as_ref().and_then(|old| old.last_good.clone());
        let Some(secret) = secret else {
            let fault = Some(refused.unwrap_or("it is not there").to_owned());
            return Self { secret: None, last_good, fault };
        };
        let alike = |before: &Arc<Secret>| {
            Arc::ptr_eq(before, secret) || (before.data == secret.data && before.string_data == secret.string_data)
        };
        if let Some(old) = old
            && old.secret.as_ref().is_some_and(alike)
        {
            return old;
        }
        match tls::read(secret) {
            Ok(key) => Self { secret: Some(Arc::clone(secret)), last_good: Some(key), fault: None },
            Err(fault) => Self { secret: Some(Arc::clone(secret)), last_good, fault: Some(fault.to_string()) },
        }
    }
}
