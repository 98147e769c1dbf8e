//! The ingress as a part of this process: listeners from deposits, rules from Kubernetes or files, the end.

use std::{collections::BTreeMap, net::TcpListener as StdListener, os::fd::OwnedFd, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use lifl_cluster::{Client, Key, Writer};
use lifl_proxy::Limits;
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, time::sleep};

use super::{
    feed::{follow, watch_folder},
    kubernetes::{self, PRIVATE, PUBLIC, Scope},
    publish::{self, Me, Told},
    rules::Listener,
    serve::{Gate, serve},
    snapshot::Snapshot,
    status::ServiceHosts,
    table::{Ingress, Outcome, Report, Settings},
};
use crate::{
    GatewayError,
    config::{IngressConfig, KubernetesConfig},
    observe::Observe,
    pods::{Pods, Sockets},
    secrets::Secrets,
};

/// Name under which this process writes objects.
const MANAGER: &str = "lifl-gateway";
/// A folder that cannot be watched is tried again after this.
const AGAIN: Duration = Duration::from_secs(2);

/// Kubernetes, as this process reaches it.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) secrets: Secrets,
}

/// The ingress of this process.
#[derive(Debug)]
pub(crate) struct Entrance {
    gate: Gate<Sockets, Pods>,
    listeners: Vec<(Listener, TcpListener)>,
    limits: Limits,
    /// Some rules were put in force.
    synced: watch::Receiver<bool>,
}

/// Says what has become of each Ingress, when it is something else than before.
#[derive(Debug, Default)]
struct OutcomeLog(BTreeMap<Key, Outcome>);

// === impl Cluster ===

impl Cluster {
    /// Does not connect yet.
    pub(crate) async fn new(config: &KubernetesConfig) -> Result<Self, GatewayError> {
        let client = lifl_cluster::connect(config.kubeconfig.as_deref()).await?;
        Ok(Self { secrets: Secrets::new(client.clone()), client })
    }
}

// === impl Entrance ===

impl Entrance {
    /// Begins to follow the rules. Nothing is accepted before [`Entrance::run`]: what comes waits with the listeners.
    pub(crate) fn new(
        config: &IngressConfig,
        cluster: Option<Cluster>,
        listeners: Vec<(Listener, OwnedFd)>,
        pods: &Pods,
        limits: Limits,
        registry: &Registry,
        observe: Observe,
    ) -> Result<Self, GatewayError> {
        let settings =
            Settings { class: config.class.clone(), domain: config.domain.clone(), node: config.node.clone() };
        let ingress = Ingress::new(settings, registry)?;
        let listeners = listeners.into_iter().map(|(listener, fd)| {
            let socket = StdListener::from(fd);
            socket.set_nonblocking(true)?;
            Ok((listener, TcpListener::from_std(socket)?))
        });
        let listeners = listeners.collect::<std::io::Result<_>>()?;
        let gate = Gate::new(ingress.clone(), pods.pool().clone(), Arc::new(pods.clone())).observed(observe);
        let (snapshots, rules) = watch::channel(Snapshot::default());
        let (sync, synced) = watch::channel(false);
        let told = cluster.zip(config.kubernetes.clone()).map(|(cluster, kubernetes)| {
            let me = me(config, &kubernetes);
            let scope = Scope { class: config.class.clone(), namespace: kubernetes.namespace, pod: me.pod.clone() };
            let (told, changes) = watch::channel(Told::default());
            tokio::spawn(publish::run(Writer::new(cluster.client.clone(), MANAGER), me, changes).boxed());
            tokio::spawn(kubernetes::watch(cluster.client, cluster.secrets, scope, snapshots.clone()).boxed());
            told
        });
        if let (None, Some(folder)) = (&told, config.files.clone()) {
            tokio::spawn(async move {
                while let Err(error) = watch_folder(folder.clone(), snapshots.clone()).await {
                    tracing::error!(%error, folder = %folder.display(), "rules cannot be read (as this process's user)");
                    sleep(AGAIN).await;
                }
            }.boxed());
        }
        tokio::spawn(rule(ingress, rules, sync, told).boxed());
        Ok(Self { gate, listeners, limits, synced })
    }

    /// Resolves when the first rules are in force.
    pub(crate) async fn synced(&self) {
        wait(self.synced.clone()).await;
    }

    /// What the admin page shows.
    pub(crate) fn status(&self) -> impl Fn() -> Value + Send + Sync + 'static {
        let (gate, synced) = (self.gate.clone(), self.synced.clone());
        move || {
            let report = gate.report();
            let ingresses: BTreeMap<String, Value> = report
                .ingresses
                .iter()
                .map(|(name, (hash, outcome))| {
                    (name.to_string(), json!({"hash": hash, "state": outcome.label(), "why": outcome.why()}))
                })
                .collect();
            json!({"synced": *synced.borrow(), "tunnels": gate.tunnels(), "ingresses": ingresses})
        }
    }

    /// Serves until `end` and for a `lame_duck` time more, and what is under way then for `patience` more.
    pub(crate) async fn run(
        self,
        end: impl Future<Output = ()>,
        lame_duck: Duration,
        patience: Duration,
    ) -> Result<(), GatewayError> {
        let mut end = std::pin::pin!(end);
        tokio::select! {
            () = wait(self.synced) => {}
            () = &mut end => return Ok(()),
        }
        Ok(serve(self.gate, self.listeners, self.limits, end, lame_duck, patience).await?)
    }
}

async fn wait(mut synced: watch::Receiver<bool>) {
    if synced.wait_for(|synced| *synced).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn me(config: &IngressConfig, kubernetes: &KubernetesConfig) -> Me {
    let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    let name = |service: &str| format!("{service}.{}.svc.{}", kubernetes.namespace, config.domain);
    Me {
        pod: kubernetes.pod.clone().unwrap_or_else(host),
        hosts: ServiceHosts { public: name(PUBLIC), private: name(PRIVATE) },
    }
}

/// Puts snapshots in force from the first real one on, and tells of each.
async fn rule(
    ingress: Ingress,
    mut rules: watch::Receiver<Snapshot>,
    sync: watch::Sender<bool>,
    told: Option<watch::Sender<Told>>,
) {
    if rules.changed().await.is_err() {
        // Neither Kubernetes nor files: an ingress without rules.
        sync.send_replace(true);
        return;
    }
    rules.mark_changed();
    let mut log = OutcomeLog::default();
    follow(ingress, rules, move |snapshot, report| {
        log.tell(report);
        sync.send_replace(true);
        if let Some(told) = &told {
            let (kings, gateways) = (snapshot.ingresses.clone(), snapshot.gateways.clone());
            told.send_replace(Told { kings, gateways, report: report.clone() });
        }
    })
    .await;
}

// === impl OutcomeLog ===

impl OutcomeLog {
    fn tell(&mut self, report: &Report) {
        for (name, (_, outcome)) in &report.ingresses {
            if self.0.get(name) != Some(outcome) {
                let state = outcome.label();
                match outcome.why() {
                    Some(why) => tracing::warn!(ingress = %name, state, why, "ingress"),
                    None => tracing::info!(ingress = %name, state, "ingress"),
                }
            }
        }
        for name in self.0.keys().filter(|name| !report.ingresses.contains_key(name)) {
            tracing::info!(ingress = %name, "ingress is gone");
        }
        self.0 = report.ingresses.iter().map(|(name, (_, outcome))| (name.clone(), outcome.clone())).collect();
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("secrets", &self.secrets).finish_non_exhaustive()
    }
}
