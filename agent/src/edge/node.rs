//! The pods of this node: what Kubernetes says of them, and the gateway's questions.

use std::{
    collections::HashSet,
    future::pending,
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, PodStatus};
use lifl_api::{
    node::FromAgent,
    pod::{NodePod, PodWord},
};
use lifl_cluster::{Crier, Notice, Notices, Selection, Store, connect};
use lifl_daemon::FolderWatch;
use tokio::{sync::mpsc, task::JoinHandle};

use super::{Agent, AgentError, Event, notices, tell};
use crate::{
    config::Node,
    pods::{LEAVES, Report, Telling},
};

/// A failed connection to the API server is tried again after this.
const PAUSE: Duration = Duration::from_secs(5);
/// A gateway that is superseded and does not take a word within this is told nothing more: the agent is not to wait for it.
const SUPERSEDED_TAKES: Duration = Duration::from_secs(1);

/// Tells the loop of the node's pods whenever they change.
pub(super) async fn watch(node: Node, events: mpsc::UnboundedSender<Event>, notices: Notices, crier: Option<Crier>) {
    let client = loop {
        match connect(node.kubeconfig.as_deref()).await {
            Ok(client) => break client,
            Err(error) => tracing::error!(%error, "Kubernetes cannot be reached"),
        }
        tokio::time::sleep(PAUSE).await;
    };
    if let Some(crier) = crier {
        tokio::spawn(crier.run(client.clone()).boxed());
    }
    let selection = Selection { fields: Some(format!("spec.nodeName={}", node.name)), ..Selection::default() };
    let (mut store, keeper) = Store::<Pod>::open_trimmed(&client, &selection, trim).await;
    tokio::spawn(keeper.run().boxed());
    let mut pods = store.snapshot();
    loop {
        let uids: HashSet<&str> = pods.iter().filter_map(|(_, pod)| pod.metadata.uid.as_deref()).collect();
        notices.keep(|uid| uids.contains(uid));
        let served = pods.iter().filter_map(|(_, pod)| {
            let (served, notice) = notices::read(pod);
            if let Some(notice) = notice {
                say(&notices, notice);
            }
            Some((served?, pod.metadata.resource_version.clone().unwrap_or_default()))
        });
        let served = served.collect();
        if events.send(Event::Pods(served)).is_err() {
            return;
        }
        match store.changed().await {
            Ok(changed) => pods = changed,
            Err(_closed) => return,
        }
    }
}

/// Leaves of a pod what [`notices::read`] looks at: a small part of it.
fn trim(pod: &mut Pod) {
    pod.metadata.managed_fields = None;
    if let Some(PodSpec { containers, host_network, .. }) = pod.spec.take() {
        let named = |container: Container| Container { name: container.name, ..Container::default() };
        let containers = containers.into_iter().map(named).collect();
        pod.spec = Some(PodSpec { containers, host_network, ..PodSpec::default() });
    }
    if let Some(PodStatus { phase, pod_ip, .. }) = pod.status.take() {
        pod.status = Some(PodStatus { phase, pod_ip, ..PodStatus::default() });
    }
}

/// Says it to people of the cluster and to those of the node, once.
fn say(notices: &Notices, notice: Notice) {
    let (namespace, pod) = (notice.about.namespace.clone(), notice.about.name.clone());
    let (reason, why) = (notice.reason, notice.message.clone());
    if notices.say(notice) {
        tracing::warn!(namespace, pod, reason, "{why}");
    }
}

/// Tells the loop when network namespaces are gone, as long as their folder is there.
async fn watch_mounts(mounts: FolderWatch, events: mpsc::UnboundedSender<Event>) {
    while mounts.changed().await.is_ok() {
        if events.send(Event::Unmounted).is_err() {
            return;
        }
    }
}

/// Sleeps until then; for ever if there is nothing to wait for.
pub(super) async fn until(then: Option<Instant>) {
    match then {
        Some(then) => tokio::time::sleep_until(then.into()).await,
        None => pending().await,
    }
}

// === impl Agent ===

impl Agent {
    pub(super) async fn serve_pods(&mut self, pods: Vec<(NodePod, String)>) -> Result<(), AgentError> {
        // The folder is made with the first pod.
        if self.mounts.as_ref().is_none_or(JoinHandle::is_finished) {
            let mounts = FolderWatch::new(&self.config.netns, LEAVES).ok();
            self.mounts = mounts.map(|mounts| tokio::spawn(watch_mounts(mounts, self.events.clone()).boxed()));
        }
        let reports = self.pods.wish(pods, Instant::now()).await?;
        self.report_pods(reports).await;
        Ok(())
    }

    pub(super) async fn retry_pods(&mut self) -> Result<(), AgentError> {
        let reports = self.pods.step(Instant::now()).await?;
        self.report_pods(reports).await;
        Ok(())
    }

    pub(super) async fn report_pods(&mut self, reports: Vec<Report>) {
        for report in reports {
            match report {
                Report::Tell(telling) => {
                    tell(self.gateway.as_ref(), &FromAgent::Pod(telling.word.clone()), &telling.fds()).await;
                    // What becomes of a pod is also for the gateway that answers what it still has of it: its sockets keep the pod's
                    // network namespace alive.
                    if matches!(telling.word, PodWord::Gone { .. } | PodWord::Changed { .. }) {
                        self.tell_superseded(&telling).await;
                    }
                }
                Report::Cannot { pod, reason } => say(&self.notices, notices::not_served(&pod, &reason)),
            }
        }
    }

    /// Tells the gateway that is superseded; one that does not take a word is told nothing more.
    pub(super) async fn tell_superseded(&mut self, telling: &Telling) {
        let Some((_, channel)) = &self.superseded else { return };
        let (word, fds) = (FromAgent::Pod(telling.word.clone()), telling.fds());
        let told = tell(Some(channel), &word, &fds);
        if tokio::time::timeout(SUPERSEDED_TAKES, told).await.is_err() {
            tracing::warn!("the gateway that is superseded takes no words");
            self.superseded = None;
        }
    }
}
