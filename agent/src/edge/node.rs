//! The pods of this node: what Kubernetes says of them, and the gateway's questions.

use std::{future::pending, time::Instant};

use k8s_openapi::api::core::v1::Pod;
use lifl_api::{
    node::FromAgent,
    pod::{NodePod, PodAsk, kept_reason},
};
use lifl_cluster::{Selection, Store, connect};
use tokio::sync::mpsc;

use super::{Agent, AgentError, Event, tell};
use crate::{config::Node, pods::Report};

/// A failed connection to the API server is tried again after this.
const PAUSE: std::time::Duration = std::time::Duration::from_secs(5);

/// Tells the loop of the node's pods whenever they change.
pub(super) async fn watch(node: Node, events: mpsc::UnboundedSender<Event>) {
    let client = loop {
        match connect(node.kubeconfig.as_deref()).await {
            Ok(client) => break client,
            Err(error) => tracing::error!(%error, "Kubernetes cannot be reached"),
        }
        tokio::time::sleep(PAUSE).await;
    };
    let selection = Selection { fields: Some(format!("spec.nodeName={}", node.name)), ..Selection::default() };
    let (mut store, keeper) = Store::<Pod>::open(&client, &selection).await;
    tokio::spawn(keeper.run());
    let mut pods = store.snapshot();
    loop {
        let served = pods.iter().filter_map(|(_, pod)| read(pod)).collect();
        if events.send(Event::Pods(served)).is_err() {
            return;
        }
        match store.changed().await {
            Ok(changed) => pods = changed,
            Err(_closed) => return,
        }
    }
}

fn read(pod: &Pod) -> Option<NodePod> {
    if let Some(reason) = kept_reason(pod) {
        tracing::debug!(pod = pod.metadata.name, reason, "pod has its sidecar");
    }
    match NodePod::of(pod) {
        Ok(pod) => pod,
        Err(error) => {
            tracing::error!(namespace = pod.metadata.namespace, pod = pod.metadata.name, %error, "pod is not served");
            None
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
    pub(super) async fn serve_pods(&mut self, pods: Vec<NodePod>) -> Result<(), AgentError> {
        let reports = self.pods.wish(pods, Instant::now()).await?;
        self.report_pods(reports).await;
        Ok(())
    }

    pub(super) async fn retry_pods(&mut self) -> Result<(), AgentError> {
        let reports = self.pods.step(Instant::now()).await?;
        self.report_pods(reports).await;
        Ok(())
    }

    pub(super) async fn answer_gateway(&mut self, ask: PodAsk) {
        let answer = self.pods.answer(ask).await;
        tell(self.gateway.as_ref(), &FromAgent::Pod(answer.word.clone()), &answer.fds()).await;
    }

    async fn report_pods(&self, reports: Vec<Report>) {
        for report in reports {
            match report {
                Report::Tell(telling) => {
                    tell(self.gateway.as_ref(), &FromAgent::Pod(telling.word.clone()), &telling.fds()).await;
                }
                Report::Cannot { pod, reason } => {
                    tracing::warn!(namespace = pod.namespace, pod = pod.name, reason, "pod is not served by this node");
                }
            }
        }
    }
}
