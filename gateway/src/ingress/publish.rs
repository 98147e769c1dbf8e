//! Statuses of Ingresses: what is to be probed, and what is to be written. [`decide`] is pure; [`run`] carries out.
//!
//! One gateway writes: of those that take requests the one whose pod has the lowest name, as the EndpointSlices have it that
//! every gateway watches anyway. It needs no lease, and so neither a right to write leases nor a write every few seconds. Two
//! that believe it for a moment come to the same words, and the API server takes a write of the version that was seen only. A
//! gateway that is cut off loses its place as it loses its traffic: its node's readiness ends, and with it that of its pods.
//!
//! An Ingress is ready when every gateway has told its hash; then it stays so until its spec changes. A gateway that comes
//! later takes no requests before it has all rules, and an address that goes is no matter of the rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use lifl_api::ingress::{CLUSTER_LOCAL, EXTERNAL_IP, IngressPath, IngressStatus, KIngress};
use lifl_cluster::{Key, StatusWrite, Writer};
use tokio::{
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinSet},
    time::sleep,
};

use super::{
    probe::{Target, all_ready},
    snapshot::Gateways,
    status::{ServiceHosts, status},
    table::{Outcome, Report},
};

/// Probes and writes under way at a time.
const AT_ONCE: usize = 16;
/// A write that failed is tried again after this.
const AGAIN: Duration = Duration::from_secs(1);

/// What became of the last snapshot, and of what it was made.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    pub(super) kings: Vec<Arc<KIngress>>,
    pub(super) gateways: Gateways,
    pub(super) report: Report,
}

/// Who writes, and what is said of where clients find the gateways.
#[derive(Clone, Debug, Default)]
pub(super) struct Me {
    /// Name of this gateway's pod.
    pub(super) pod: String,
    pub(super) hosts: ServiceHosts,
}

/// How far the latest version of an Ingress has come.
#[derive(Debug, Default)]
struct Standing {
    hash: Option<String>,
    probed: bool,
    probing: Option<BTreeSet<Target>>,
    /// The version of the object that a status was written over: nothing more is to be said of that one.
    written: Option<String>,
}

/// All Ingresses of our class.
#[derive(Debug, Default)]
pub(super) struct Standings(BTreeMap<Key, Standing>);

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Action {
    /// Ask these until all have told this hash; in place of what is asked for that Ingress now.
    Probe { name: Key, hash: String, targets: BTreeSet<Target> },
    /// Ask no more.
    Stop(Key),
    /// Write a status.
    Write { king: Arc<KIngress>, status: Box<IngressStatus> },
}

// === impl Gateways ===

impl Gateways {
    /// Who writes statuses.
    pub(super) fn writer(&self) -> Option<&str> {
        self.public.keys().chain(self.private.keys()).min().map(String::as_str)
    }
}

// === impl Standings ===

impl Standings {
    /// All gateways have told this hash.
    pub(super) fn probed(&mut self, name: &Key, hash: &str) {
        if let Some(standing) = self.0.get_mut(name)
            && standing.hash.as_deref() == Some(hash)
        {
            (standing.probed, standing.probing) = (true, None);
        }
    }

    /// A status was not written.
    pub(super) fn unwritten(&mut self, name: &Key) {
        if let Some(standing) = self.0.get_mut(name) {
            standing.written = None;
        }
    }

    /// What is to be done now.
    pub(super) fn decide(&mut self, told: &Told, me: &Me, now: Timestamp) -> Vec<Action> {
        let mut out = Vec::new();
        let writes = told.gateways.writer() == Some(me.pod.as_str());
        let stays = |name: &Key| writes && told.report.ingresses.contains_key(name);
        for (name, standing) in &self.0 {
            if !stays(name) && standing.probing.is_some() {
                out.push(Action::Stop(name.clone()));
            }
        }
        self.0.retain(|name, _| stays(name));
        for king in told.kings.iter().filter(|_| writes) {
            let name = Key::of(&**king);
            let Some((hash, outcome)) = told.report.ingresses.get(&name) else { continue };
            let standing = self.0.entry(name.clone()).or_default();
            standing.step(name, king, (hash, outcome), told, me, now, &mut out);
        }
        out
    }
}

// === impl Standing ===

impl Standing {
    #[expect(clippy::too_many_arguments, reason = "one call, and each of them is another thing")]
    fn step(
        &mut self,
        name: Key,
        king: &Arc<KIngress>,
        (hash, outcome): (&Option<String>, &Outcome),
        told: &Told,
        me: &Me,
        now: Timestamp,
        out: &mut Vec<Action>,
    ) {
        if self.hash != *hash {
            if self.probing.is_some() {
                out.push(Action::Stop(name.clone()));
            }
            *self = Self { hash: hash.clone(), written: self.written.take(), ..Self::default() };
        }
        let settled = is_settled(king, &me.hosts);
        let probed = self.probed || settled;
        match (outcome, hash) {
            (Outcome::Served, Some(hash)) if !probed => {
                let targets = targets(king, &told.gateways);
                if !targets.is_empty() && self.probing.as_ref() != Some(&targets) {
                    self.probing = Some(targets.clone());
                    out.push(Action::Probe { name, hash: hash.clone(), targets });
                }
            }
            _ if self.probing.take().is_some() => out.push(Action::Stop(name)),
            _ => {}
        }
        // Its addresses have gone: requests get a 503, and the rules are what they were.
        if settled && matches!(outcome, Outcome::Waiting(_) | Outcome::Missing(_)) {
            return;
        }
        let status = status(king, outcome, probed, &me.hosts, now);
        let version = &king.metadata.resource_version;
        if king.status.as_ref() != Some(&status) && (self.written.is_none() || self.written != *version) {
            self.written.clone_from(version);
            out.push(Action::Write { king: Arc::clone(king), status: Box::new(status) });
        }
    }
}

/// Whether it was said of this version that it is ready, by us: another class may have had it before.
fn is_settled(king: &KIngress, hosts: &ServiceHosts) -> bool {
    king.status.as_ref().is_some_and(|status| {
        let ours = |balancer: &Option<lifl_api::ingress::LoadBalancer>, name: &str| {
            balancer.iter().flat_map(|balancer| &balancer.ingress).any(|entry| entry.domain_internal == name)
        };
        Some(status.observed_generation) == king.metadata.generation
            && status.conditions.iter().any(|condition| condition.kind == "Ready" && condition.status == "True")
            && ours(&status.public_load_balancer, &hosts.public)
            && ours(&status.private_load_balancer, &hosts.private)
    })
}

/// Whom to ask for the hash of an Ingress: each gateway, at the port of each visibility that it has rules of. None when a port
/// has no gateway (yet). The rules of a gateway change all at once, so one of each visibility speaks for all.
fn targets(king: &KIngress, gateways: &Gateways) -> BTreeSet<Target> {
    let mut out = BTreeSet::new();
    let mut king = king.clone();
    king.set_defaults();
    for (visibility, of) in [(EXTERNAL_IP, &gateways.public), (CLUSTER_LOCAL, &gateways.private)] {
        let rules = king.spec.rules.iter().filter(|rule| rule.visibility == visibility);
        let question = rules.filter_map(|rule| {
            let paths = rule.http.iter().flat_map(|http| &http.paths).filter(|path| !path.splits.is_empty());
            // One that asks for headers only if there is no other.
            let path = paths.min_by_key(|path| !path.headers.is_empty())?;
            Some((rule.hosts.first().map_or("any.invalid", String::as_str), path))
        });
        let Some((host, path)) = question.into_iter().next() else { continue };
        if of.is_empty() {
            return BTreeSet::new();
        }
        out.extend(of.values().map(|address| Target::new(*address, host, path)));
    }
    out
}

/// Keeps statuses until nothing is told any more.
pub(super) async fn run(writer: Writer, me: Me, mut told: watch::Receiver<Told>) {
    let mut standings = Standings::default();
    let mut probes: BTreeMap<Key, AbortHandle> = BTreeMap::new();
    let mut probing = JoinSet::new();
    let mut writing = JoinSet::new();
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        probes.retain(|_, probe| !probe.is_finished());
        let actions = standings.decide(&told.borrow_and_update(), &me, Timestamp::now());
        for action in actions {
            match action {
                Action::Stop(name) => stop(&mut probes, &name),
                Action::Probe { name, hash, targets } => {
                    stop(&mut probes, &name);
                    let places = Arc::clone(&places);
                    let asking = {
                        let name = name.clone();
                        async move {
                            all_ready(&targets, &hash, &places).await;
                            (name, hash)
                        }
                    };
                    probes.insert(name, probing.spawn(asking));
                }
                Action::Write { king, status } => {
                    writing.spawn(write(writer.clone(), king, *status, Arc::clone(&places)));
                }
            }
        }
        tokio::select! {
            changed = told.changed() => if changed.is_err() { return },
            Some(done) = probing.join_next() => if let Ok((name, hash)) = done {
                standings.probed(&name, &hash);
            },
            Some(done) = writing.join_next() => if let Ok(Some(name)) = done {
                standings.unwritten(&name);
            },
        }
    }
}

fn stop(probes: &mut BTreeMap<Key, AbortHandle>, name: &Key) {
    if let Some(probe) = probes.remove(name) {
        probe.abort();
    }
}

/// Writes a status; the name of its Ingress is returned, after a while, if that failed.
async fn write(writer: Writer, king: Arc<KIngress>, status: IngressStatus, places: Arc<Semaphore>) -> Option<Key> {
    let name = Key::of(&*king);
    let written = {
        let _place = places.acquire_owned().await.ok()?;
        writer.status(&*king, status).await
    };
    match written {
        Ok(StatusWrite::Written(_) | StatusWrite::Unchanged) => None,
        Ok(StatusWrite::Stale) => {
            tracing::debug!(ingress = %name, "status of a version that is no more");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "status is not written");
            sleep(AGAIN).await;
            Some(name)
        }
    }
}

// === impl Target ===

impl Target {
    fn new(address: std::net::SocketAddr, host: &str, path: &IngressPath) -> Self {
        // A name that a wildcard stands for.
        let host = host.strip_prefix('*').map_or_else(|| host.to_owned(), |rest| format!("any{rest}"));
        let headers = path.headers.iter().map(|(name, wanted)| {
            let value = if wanted.exact.is_empty() { "any" } else { &wanted.exact };
            (name.clone(), value.to_owned())
        });
        Self { address, host, path: path.path.clone(), headers: headers.collect() }
    }
}

#[cfg(test)]
mod tests;
