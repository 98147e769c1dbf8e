//! Where requests of a split go: the ready addresses of a service's port, and which of them is next.
//!
//! Of the addresses on this node two are drawn and the one with fewer requests under way is taken: a hop over the network
//! is saved, and no address is flooded. Without more, a node that gets all the traffic would flood its own pods while
//! others idle; so a third is drawn from elsewhere, and taken when the local one has more than twice its requests and
//! [`SLACK`]. That holds the share of a local pod at about twice a remote one's. Where this node has no address, the two
//! are drawn from all.

use std::{
    any::Any,
    collections::HashMap,
    fmt,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use arc_swap::ArcSwap;
use lifl_cluster::Key;
use lifl_proxy::{Endpoint, Keep};

use super::metrics::Counters;

/// Requests that a local address may have more than twice of what a remote one has.
const SLACK: usize = 4;
/// Requests that an unreachable address seems to have.
const PENALTY: usize = 1 << 20;

/// A port of a service, as rules name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendName {
    /// Namespace of the service.
    pub namespace: String,
    /// The service.
    pub service: String,
    /// Its port.
    pub port: Port,
}

/// A port of a service, by number or by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Port {
    /// By number.
    Number(i32),
    /// By name.
    Name(String),
}

/// A port of a service, with its addresses. Lives as long as a rule names it; its addresses come and go.
#[derive(Debug)]
pub(super) struct Backend {
    pub(super) name: BackendName,
    pub(super) counters: Counters,
    choices: ArcSwap<Choices>,
}

/// An address, and how many requests are under way to it, whatever rule sent them there.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) endpoint: Endpoint,
    under_way: AtomicUsize,
    /// Its connections, kept as long as the address is: set at the first request, by whoever dials. Of no type here, so
    /// that rules and tables need not know who that is.
    kept: OnceLock<Box<dyn Any + Send + Sync>>,
}

/// A request that is under way to a target, until dropped.
#[derive(Debug)]
pub(super) struct Lease(Arc<Target>);

/// A target that could not be reached looks as busy as [`PENALTY`] requests until this is dropped: without it, failing
/// at once, it would look idle and draw all requests.
#[derive(Debug)]
pub(super) struct Penalty(Arc<Target>);

/// All addresses that some backend has, so that backends share the counts. The only writer is the table's.
#[derive(Debug, Default)]
pub(super) struct Targets(HashMap<Endpoint, Weak<Target>>);

/// What can be chosen from.
#[derive(Debug, Default)]
struct Choices {
    near: Vec<Arc<Target>>,
    far: Vec<Arc<Target>>,
}

/// One of `n` by 21 bits of a random number.
fn draw(random: u64, part: u32, n: usize) -> usize {
    let bits = (random >> (21 * part)) & 0x1f_ffff;
    usize::try_from((bits * n as u64) >> 21).unwrap_or_default()
}

/// The less busy one of two drawn; the first drawn when they are alike.
fn less_busy(from: &[Arc<Target>], random: u64) -> Option<&Arc<Target>> {
    let first = from.get(draw(random, 0, from.len()))?;
    // The second is another one than the first wherever there is another one.
    let step = 1 + draw(random, 1, from.len().saturating_sub(1).max(1));
    let second = &from[(draw(random, 0, from.len()) + step) % from.len()];
    Some(if second.under_way() < first.under_way() { second } else { first })
}

// === impl BackendName ===

impl BackendName {
    /// Its service.
    pub(super) fn of_service(&self) -> Key {
        Key { namespace: self.namespace.clone(), name: self.service.clone() }
    }
}

impl fmt::Display for BackendName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { namespace, service, port } = self;
        match port {
            Port::Number(port) => write!(f, "{namespace}/{service}:{port}"),
            Port::Name(port) => write!(f, "{namespace}/{service}:{port}"),
        }
    }
}

// === impl Backend ===

impl Backend {
    pub(super) fn new(name: BackendName, counters: Counters) -> Self {
        Self { name, counters, choices: ArcSwap::default() }
    }

    /// Replaces the addresses.
    pub(super) fn set(&self, near: Vec<Arc<Target>>, far: Vec<Arc<Target>>) {
        self.choices.store(Arc::new(Choices { near, far }));
    }

    /// Chooses by two draws; `None` when there is no address.
    pub(super) fn choose(&self, random: u64) -> Option<Lease> {
        let choices = self.choices.load();
        let Choices { near, far } = &**choices;
        let chosen = match less_busy(near, random) {
            None => less_busy(far, random)?,
            Some(local) => match far.get(draw(random, 2, far.len())) {
                Some(remote) if local.under_way() > 2 * remote.under_way() + SLACK => remote,
                _ => local,
            },
        };
        Some(Lease::new(Arc::clone(chosen)))
    }
}

// === impl Target ===

impl Target {
    fn under_way(&self) -> usize {
        self.under_way.load(Ordering::Relaxed)
    }

    /// What is kept with it; made now if nothing is. `None` if somebody else keeps something else.
    pub(super) fn kept<T: Send + Sync + 'static>(&self, make: impl FnOnce() -> T) -> Option<&T> {
        self.kept.get_or_init(|| Box::new(make())).downcast_ref()
    }
}

// === impl Lease ===

impl Lease {
    fn new(target: Arc<Target>) -> Self {
        target.under_way.fetch_add(1, Ordering::Relaxed);
        Self(target)
    }

    pub(super) fn target(&self) -> &Arc<Target> {
        &self.0
    }
}

impl Keep for Lease {}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Penalty ===

impl Penalty {
    /// The target could not be reached.
    pub(super) fn new(target: Arc<Target>) -> Self {
        target.under_way.fetch_add(PENALTY, Ordering::Relaxed);
        Self(target)
    }
}

impl Drop for Penalty {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(PENALTY, Ordering::Relaxed);
    }
}

// === impl Targets ===

impl Targets {
    /// The target of an address: the same one as long as anybody holds it.
    pub(super) fn get(&mut self, endpoint: &Endpoint) -> Arc<Target> {
        if let Some(target) = self.0.get(endpoint).and_then(Weak::upgrade) {
            return target;
        }
        let target = Arc::new(Target { endpoint: *endpoint, under_way: AtomicUsize::new(0), kept: OnceLock::new() });
        self.0.insert(*endpoint, Arc::downgrade(&target));
        target
    }

    /// Forgets addresses that nobody holds.
    pub(super) fn sweep(&mut self) {
        self.0.retain(|_, target| target.strong_count() > 0);
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use lifl_proxy::Protocol;

    use super::*;

    fn backend() -> Backend {
        let name = BackendName { namespace: "n".into(), service: "s".into(), port: Port::Number(80) };
        Backend::new(name, Counters::default())
    }

    fn targets(ports: std::ops::Range<u16>) -> Vec<Arc<Target>> {
        let mut all = Targets::default();
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        ports.map(|port| all.get(&Endpoint { addr: address(port), protocol: Protocol::H1, place: 0 })).collect()
    }

    #[test]
    fn nothing_is_chosen_from_nothing() {
        assert!(backend().choose(7).is_none());
    }

    #[test]
    fn two_draws_keep_targets_level() {
        let backend = backend();
        backend.set(Vec::new(), targets(1..11));
        let mut random = fastrand::Rng::with_seed(1);
        let held: Vec<Lease> = (0..1000).map(|_| backend.choose(random.u64(..)).unwrap()).collect();
        let counts: Vec<usize> = backend.choices.load().far.iter().map(|target| target.under_way()).collect();
        assert_eq!(counts.iter().sum::<usize>(), 1000);
        assert!(counts.iter().all(|count| (95..=105).contains(count)), "{counts:?}");
        drop(held);
        assert!(backend.choices.load().far.iter().all(|target| target.under_way() == 0));
    }

    #[test]
    fn two_draws_of_two_see_both() {
        let backend = backend();
        backend.set(Vec::new(), targets(1..3));
        let mut random = fastrand::Rng::with_seed(2);
        let held: Vec<Lease> = (0..10).map(|_| backend.choose(random.u64(..)).unwrap()).collect();
        assert!(backend.choices.load().far.iter().all(|target| target.under_way() == 5));
        drop(held);
    }

    #[test]
    fn local_addresses_come_first_but_are_not_flooded() {
        let backend = backend();
        let all = targets(1..11);
        backend.set(all[..1].to_vec(), all[1..].to_vec());
        let mut random = fastrand::Rng::with_seed(3);
        let mut held: Vec<Lease> = (0..SLACK + 1).map(|_| backend.choose(random.u64(..)).unwrap()).collect();
        assert_eq!(all[0].under_way(), SLACK + 1, "a little load stays at home");
        held.extend((0..100).map(|_| backend.choose(random.u64(..)).unwrap()));
        let local = all[0].under_way();
        assert!((15..=30).contains(&local), "{local} of 105 with ten addresses");
    }

    #[test]
    fn what_cannot_be_reached_draws_no_requests() {
        let backend = backend();
        let all = targets(1..3);
        backend.set(all[..1].to_vec(), all[1..].to_vec());
        let mut random = fastrand::Rng::with_seed(4);
        let failed = backend.choose(random.u64(..)).unwrap();
        assert_eq!(failed.target().endpoint, all[0].endpoint);
        let penalty = Penalty::new(Arc::clone(failed.target()));
        drop(failed);
        for _ in 0..100 {
            assert_eq!(backend.choose(random.u64(..)).unwrap().target().endpoint, all[1].endpoint);
        }
        drop(penalty);
        assert_eq!(backend.choose(random.u64(..)).unwrap().target().endpoint, all[0].endpoint);
    }

    #[test]
    fn an_address_keeps_its_count_over_a_change_of_the_set() {
        let mut all = Targets::default();
        let endpoint = Endpoint { addr: SocketAddr::from(([127, 0, 0, 1], 1)), protocol: Protocol::H1, place: 0 };
        let backend = backend();
        backend.set(vec![all.get(&endpoint)], Vec::new());
        let lease = backend.choose(0).unwrap();
        backend.set(vec![all.get(&endpoint)], Vec::new());
        assert_eq!(backend.choices.load().near[0].under_way(), 1);
        backend.set(Vec::new(), Vec::new());
        all.sweep();
        assert_eq!(all.0.len(), 1, "a request is still under way to it");
        drop(lease);
        all.sweep();
        assert_eq!(all.0.len(), 0);
    }
}
