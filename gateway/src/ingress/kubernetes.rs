//! Snapshots from Kubernetes: Ingresses of our class, and only what they name of everything else.
//!
//! ```text
//!  API server ── watch ──> Ingresses, Services, EndpointSlices ──┐
//!       │                                                        ├── picture ──> Snapshot, when it differs
//!       └── one by one ──> Secrets that those name ──────────────┘
//! ```
//!
//! What comes in a burst becomes one snapshot. An API server that is lost leaves the last one.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt as _;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use lifl_api::ingress::KIngress;
use lifl_cluster::{Client, Closed, Keeper, Key, Kind, Objects, Selection, Store, knows};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::snapshot::{SERVICE_LABEL, Snapshot, same};
use crate::secrets::{Known, Secrets};

/// What follows a change within this belongs to it.
const SETTLE: Duration = Duration::from_millis(5);
/// Snapshots are this far apart, at least.
const APART: Duration = Duration::from_millis(50);
/// A secret that is named for the first time is waited for so long: without it, its Ingress would seem to be at fault.
const FIRST: Duration = Duration::from_secs(2);
/// A cluster without Knative is asked again after this whether it has it now.
const LATER: Duration = Duration::from_secs(3);
/// Name of the port at which gateways are asked.
const PORT: &str = "http";

/// Services before the gateways: for clients outside, and inside.
pub(super) const PUBLIC: &str = "lifl-gateway";
/// For clients inside.
pub(super) const PRIVATE: &str = "lifl-gateway-local";

/// What is looked for.
#[derive(Clone, Debug)]
pub(super) struct Scope {
    /// Class of the Ingresses.
    pub(super) class: String,
    /// Namespace of the gateways and their services.
    pub(super) namespace: String,
    /// Name of this gateway's pod.
    pub(super) pod: String,
}

/// Everything that is watched.
struct Stores {
    /// None while the API server does not know the kind.
    kings: Option<Store<KIngress>>,
    services: Store<Service>,
    slices: Store<EndpointSlice>,
}

type Opening = Pin<Box<dyn Future<Output = (Store<KIngress>, Keeper<KIngress>)> + Send>>;

/// The secrets that are named now.
#[derive(Debug)]
struct Named {
    secrets: Secrets,
    followed: Followed,
}

/// What is known of them.
#[derive(Debug, Default)]
struct Followed {
    known: BTreeMap<Key, watch::Receiver<Known>>,
    /// Those that nobody waits for again: an API server that does not tell of one is not to hold up all others at each change.
    waited: BTreeSet<Key>,
}

/// Sends snapshots until nobody listens. The first one is sent when everything was listed.
pub(super) async fn watch(client: Client, secrets: Secrets, scope: Scope, snapshots: watch::Sender<Snapshot>) {
    let (mut stores, mut opening) = open(&client).await;
    let mut named = Named { secrets, followed: Followed::default() };
    let mut sent: Option<Snapshot> = None;
    loop {
        let kings = stores.kings.as_ref().map(Store::snapshot).unwrap_or_default();
        let (mut next, wanted) = picture(&scope, &kings, &stores.services.snapshot(), &stores.slices.snapshot());
        named.follow(wanted);
        named.followed.wait().await;
        named.followed.add_to(&mut next);
        if !sent.as_ref().is_some_and(|sent| alike(sent, &next)) {
            sent = Some(next.clone());
            let _nobody_yet = snapshots.send_replace(next);
        }
        let then = Instant::now() + APART;
        let changed = tokio::select! {
            changed = stores.changed() => changed,
            (store, keeper) = opened(&mut opening) => {
                tokio::spawn(keeper.run().boxed());
                (stores.kings, opening) = (Some(store), None);
                Ok(())
            }
            () = named.secrets.changed() => Ok(()),
            () = snapshots.closed() => return,
        };
        if changed.is_err() {
            return;
        }
        sleep_until(then.max(Instant::now() + SETTLE)).await;
    }
}

/// Opens all stores. Ingresses are not waited for where Knative is not installed: then what comes back opens them when it is.
async fn open(client: &Client) -> (Stores, Option<Opening>) {
    async fn kept<K: Kind>(client: &Client) -> Store<K> {
        let (store, keeper) = Store::open(client, &Selection::default()).await;
        tokio::spawn(keeper.run().boxed());
        store
    }
    let (services, slices) = tokio::join!(kept(client), kept(client));
    let mut stores = Stores { kings: None, services, slices };
    let without_knative = without_knative(client).await;
    let owned = client.clone();
    let opening: Opening = Box::pin(async move {
        let mut without_knative = without_knative;
        while without_knative {
            sleep(LATER).await;
            without_knative = self::without_knative(&owned).await;
        }
        Store::open(&owned, &Selection::default()).await
    });
    if without_knative {
        tracing::info!("the cluster has no Ingresses of Knative; they are served when it has");
        return (stores, Some(opening));
    }
    let (store, keeper) = opening.await;
    tokio::spawn(keeper.run().boxed());
    stores.kings = Some(store);
    (stores, None)
}

/// Whether it is certain that the API server does not know Ingresses.
async fn without_knative(client: &Client) -> bool {
    match knows::<KIngress>(client).await {
        Ok(known) => !known,
        Err(error) => {
            tracing::debug!(%error, "kinds of the cluster");
            false
        }
    }
}

async fn opened(opening: &mut Option<Opening>) -> (Store<KIngress>, Keeper<KIngress>) {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
}

/// Everything that matters of what there is, and the secrets that it names.
fn picture(
    scope: &Scope,
    kings: &Objects<KIngress>,
    services: &Objects<Service>,
    slices: &Objects<EndpointSlice>,
) -> (Snapshot, BTreeSet<Key>) {
    let mut out = Snapshot::default();
    let (mut named, mut secrets) = (BTreeSet::new(), BTreeSet::new());
    for (key, king) in kings.iter().filter(|(_, king)| king.class() == Some(scope.class.as_str())) {
        let paths = king.spec.rules.iter().flat_map(|rule| &rule.http).flat_map(|http| &http.paths);
        for split in paths.flat_map(|path| &path.splits) {
            named.insert((split.service_namespace.as_str(), split.service_name.as_str()));
        }
        for tls in &king.spec.tls {
            let namespace = if tls.secret_namespace.is_empty() { &key.namespace } else { &tls.secret_namespace };
            secrets.insert(Key { namespace: namespace.clone(), name: tls.secret_name.clone() });
        }
        out.ingresses.push(Arc::clone(king));
    }
    let key = |(namespace, name): &(&str, &str)| Key { namespace: (*namespace).into(), name: (*name).into() };
    out.services.extend(named.iter().filter_map(|name| services.get(&key(name)).cloned()));
    for (key, slice) in slices.iter() {
        let labels = slice.metadata.labels.as_ref();
        let Some(service) = labels.and_then(|labels| labels.get(SERVICE_LABEL)) else { continue };
        if key.namespace == scope.namespace && matches!(service.as_str(), PUBLIC | PRIVATE) {
            note(scope, slice, service == PUBLIC, &mut out);
        }
        if named.contains(&(key.namespace.as_str(), service.as_str())) {
            out.slices.push(Arc::clone(slice));
        }
    }
    (out, secrets)
}

/// Notes the gateways of a slice, and this one's node.
fn note(scope: &Scope, slice: &EndpointSlice, public: bool, out: &mut Snapshot) {
    let mut ports = slice.ports.iter().flatten();
    let port = ports.find(|port| port.name.as_deref() == Some(PORT)).and_then(|port| u16::try_from(port.port?).ok());
    for endpoint in slice.endpoints.iter().flatten() {
        let pod = endpoint.target_ref.as_ref().and_then(|target| target.name.as_deref());
        let Some(pod) = pod else { continue };
        if pod == scope.pod {
            out.node.clone_from(&endpoint.node_name);
        }
        let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) != Some(false);
        let ip = endpoint.addresses.first().and_then(|address| address.parse::<IpAddr>().ok());
        if let (true, Some(ip), Some(port)) = (ready, ip, port) {
            let gateways = if public { &mut out.gateways.public } else { &mut out.gateways.private };
            gateways.insert(pod.to_owned(), SocketAddr::new(ip, port));
        }
    }
}

fn alike(left: &Snapshot, right: &Snapshot) -> bool {
    same(&left.ingresses, &right.ingresses)
        && same(&left.services, &right.services)
        && same(&left.slices, &right.slices)
        && same(&left.secrets, &right.secrets)
        && (&left.refused, &left.gateways, &left.node) == (&right.refused, &right.gateways, &right.node)
}

// === impl Stores ===

impl Stores {
    async fn changed(&mut self) -> Result<(), Closed> {
        let kings = async {
            match &mut self.kings {
                Some(kings) => kings.changed().await.map(drop),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = kings => changed,
            changed = self.services.changed() => changed.map(drop),
            changed = self.slices.changed() => changed.map(drop),
        }
    }
}

// === impl Named ===

impl Named {
    /// Follows these and no others.
    fn follow(&mut self, wanted: BTreeSet<Key>) {
        let Self { secrets, followed } = self;
        let mut before = std::mem::take(&mut followed.known);
        followed.waited.retain(|name| wanted.contains(name));
        for name in wanted {
            let known = before.remove(&name).unwrap_or_else(|| secrets.follow(name.clone()));
            followed.known.insert(name, known);
        }
    }
}

// === impl Followed ===

impl Followed {
    /// Waits until each was asked for once, for a while; and for none of them a second time.
    async fn wait(&mut self) {
        let Self { known, waited } = self;
        let all = async {
            for (_, known) in known.iter_mut().filter(|(name, _)| !waited.contains(*name)) {
                let _reader_is_alive = known.wait_for(|known| !matches!(known, Known::Nothing)).await;
            }
        };
        let _late_is_told_later = timeout(FIRST, all).await;
        waited.extend(known.keys().cloned());
    }

    fn add_to(&self, snapshot: &mut Snapshot) {
        for (name, known) in &self.known {
            match &*known.borrow() {
                Known::Is(secret) => snapshot.secrets.push(Arc::clone(secret)),
                Known::Refused(why) => drop(snapshot.refused.insert(name.clone(), why.clone())),
                Known::Nothing => drop(snapshot.refused.insert(name.clone(), "it was not read yet".to_owned())),
                Known::Absent => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> Key {
        Key { namespace: "n".into(), name: name.into() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_secret_that_nobody_tells_of_is_waited_for_once() {
        let mut followed = Followed::default();
        let (_silent, known) = watch::channel(Known::Nothing);
        followed.known.insert(name("silent"), known);
        let waits = async |followed: &mut Followed| {
            let began = Instant::now();
            followed.wait().await;
            began.elapsed()
        };
        assert_eq!(waits(&mut followed).await, FIRST);
        assert_eq!(waits(&mut followed).await, Duration::ZERO, "the same again");
        let (told, known) = watch::channel(Known::Nothing);
        followed.known.insert(name("told"), known);
        let then = FIRST / 4;
        tokio::spawn(async move {
            sleep(then).await;
            told.send_replace(Known::Absent);
            told.closed().await;
        });
        assert_eq!(waits(&mut followed).await, then, "another one is waited for, and no longer than it takes");
        let mut snapshot = Snapshot::default();
        followed.add_to(&mut snapshot);
        assert_eq!(snapshot.refused.keys().collect::<Vec<_>>(), [&name("silent")]);
    }
}
