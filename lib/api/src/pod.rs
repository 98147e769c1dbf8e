//! Knative's pods as a node serves them: no process beside the function.
//!
//! ```text
//!   queue-proxy's environment ── webhook ──> annotation lifl.dev/pod-settings ── agent ──> NodePod ── gateway
//! ```
//!
//! [`PodSettings`] is what queue-proxy would have read from its environment; [`NodePod`] is one pod of this node;
//! [`PodWord`] and [`PodAsk`] are what agent and gateway say to each other of it.

mod queue_env;
mod settings;

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

pub use settings::{
    Exporter, Logging, PodPort, PodSettings, Protocol, RequestLog, RevisionTimeouts, SettingsError, TlsSettings,
    Tracing,
};

/// Annotation (or label) of a pod, label of a namespace: who serves it. [`DATA_PLANE_NODE`], or anything else for the sidecar.
pub const DATA_PLANE: &str = "lifl.dev/data-plane";
/// Value of [`DATA_PLANE`]: the node's gateway.
pub const DATA_PLANE_NODE: &str = "node";
/// Annotation that holds a pod's [`PodSettings`]: queue-proxy was removed, the node serves the pod.
pub const SETTINGS_ANNOTATION: &str = "lifl.dev/pod-settings";
/// Annotation that says why a pod that asked for the node kept its sidecar. Whoever watches pods makes an Event of it: while
/// a pod is being admitted it has no name yet that an Event could refer to.
pub const KEPT_ANNOTATION: &str = "lifl.dev/sidecar-kept";

/// Name of the container that Knative adds to each pod.
pub const QUEUE_PROXY: &str = "queue-proxy";
/// Requests of an HTTP/1 revision.
pub const HTTP1_PORT: u16 = 8012;
/// Requests of an h2c revision.
pub const H2C_PORT: u16 = 8013;
/// Requests over TLS.
pub const HTTPS_PORT: u16 = 8112;
/// `/wait-for-drain`, which the user container's preStop hook calls.
pub const ADMIN_PORT: u16 = 8022;
/// Statistics for the autoscaler.
pub const STATS_PORT: u16 = 9090;
/// Metrics for Prometheus.
pub const USER_METRICS_PORT: u16 = 9091;
/// All of them. Knative itself keeps users from all but [`HTTPS_PORT`].
pub const RESERVED_PORTS: [u16; 6] = [HTTP1_PORT, H2C_PORT, ADMIN_PORT, HTTPS_PORT, STATS_PORT, USER_METRICS_PORT];

/// Sockets in one [`PodWord::Sockets`], at most: what fits beside one message of the channel, with room to spare.
pub const MAX_SOCKETS: u32 = 32;

/// A pod that this node serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodePod {
    /// Its identity: a name may be used again.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its address, by which its network namespace is found.
    pub address: IpAddr,
    /// It is being deleted: what is SIGTERM to queue-proxy.
    pub draining: bool,
    /// How it is to be served.
    pub settings: PodSettings,
}

/// Words of the agent to the gateway.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PodWord {
    /// Serve this pod: its listeners are beside, in the order of `ports`; each is bound, listens and does not block. The same
    /// place again replaces.
    Serve {
        /// Key of the pod's network namespace.
        place: u64,
        /// The pod.
        pod: Box<NodePod>,
        /// What each descriptor listens for.
        ports: Vec<PodPort>,
    },
    /// Other settings, or it drains; listeners stay.
    Changed {
        /// Key of the pod's network namespace.
        place: u64,
        /// The pod as it is now.
        pod: Box<NodePod>,
    },
    /// Sockets (beside), made in the pod's network namespace, IPv4, not connected, not blocking: for its loopback.
    Sockets {
        /// Key of the pod's network namespace.
        place: u64,
    },
    /// [`PodAsk::Sockets`] cannot be had.
    NoSockets {
        /// Key of the pod's network namespace.
        place: u64,
        /// Why.
        reason: String,
    },
    /// The pod is gone: close all that belongs to it, or its network namespace stays.
    Gone {
        /// Key of the pod's network namespace.
        place: u64,
    },
    /// After a (re)connection and the gateway's `HoldsAll`: every pod is told; what was not told is gone.
    Synced,
}

/// Words of the gateway to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodAsk {
    /// More sockets to dial a pod's loopback with; answered by [`PodWord::Sockets`].
    Sockets {
        /// Key of the pod's network namespace.
        place: u64,
        /// How many, [`MAX_SOCKETS`] at most.
        count: u32,
    },
}

// === impl NodePod ===

impl NodePod {
    /// Reads a pod; `None` when the node has nothing to serve there (yet): another's pod, no address, ended, or its sidecar is
    /// there whatever the annotation says.
    ///
    /// # Errors
    /// [`SettingsError`] for a pod that asks to be served in a way that cannot be understood.
    pub fn of(pod: &Pod) -> Result<Option<Self>, SettingsError> {
        let Some(text) = annotation(pod, SETTINGS_ANNOTATION) else { return Ok(None) };
        let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
        if containers.into_iter().any(|container| container.name == QUEUE_PROXY) {
            return Ok(None);
        }
        let status = pod.status.as_ref();
        let ended = matches!(status.and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed"));
        let address = status.and_then(|s| s.pod_ip.as_deref()).filter(|ip| !ip.is_empty());
        let (Some(address), false) = (address, ended) else { return Ok(None) };
        let wrong = |key: &str, value: &str, why: &str| SettingsError::Value {
            key: key.to_owned(),
            value: value.to_owned(),
            why: why.to_owned(),
        };
        let settings = PodSettings::from_annotation(text)?;
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        // Whoever may create pods may write annotations: a pod speaks for revisions of its own namespace only.
        if settings.namespace != namespace {
            return Err(wrong("namespace", &settings.namespace, "is not the pod's own"));
        }
        let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or_default();
        if host_network {
            return Err(wrong("spec.hostNetwork", "true", "leaves no network namespace to serve it in"));
        }
        Ok(Some(Self {
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            namespace,
            name: pod.metadata.name.clone().unwrap_or_default(),
            address: address.parse().map_err(|_why| wrong("status.podIP", address, "is no address"))?,
            draining: pod.metadata.deletion_timestamp.is_some(),
            settings,
        }))
    }
}

/// Why a pod that asked for the node has its sidecar still, if it is such a pod.
#[must_use]
pub fn kept_reason(pod: &Pod) -> Option<&str> {
    annotation(pod, KEPT_ANNOTATION)
}

fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        let settings = settings::tests::settings().to_annotation();
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "golden", "uid": "u1", "annotations": {SETTINGS_ANNOTATION: settings}},
            "spec": {"containers": []},
            "status": {"phase": "Running", "podIP": "10.244.0.46"},
        }))
        .unwrap()
    }

    #[test]
    fn a_pod_with_settings_and_an_address_is_served_until_it_has_ended() {
        let served = NodePod::of(&pod()).unwrap().unwrap();
        assert_eq!((served.uid.as_str(), served.name.as_str(), served.draining), ("u1", "p", false));
        assert_eq!(served.address, "10.244.0.46".parse::<IpAddr>().unwrap());

        let mut early = pod();
        early.status.as_mut().unwrap().pod_ip = None;
        assert_eq!(NodePod::of(&early).unwrap(), None);

        let mut ended = pod();
        ended.status.as_mut().unwrap().phase = Some("Failed".into());
        assert_eq!(NodePod::of(&ended).unwrap(), None);

        let mut anothers = pod();
        anothers.metadata.annotations = None;
        assert_eq!(NodePod::of(&anothers).unwrap(), None);

        let mut with_sidecar = pod();
        let sidecar = serde_json::from_value(json!([{"name": QUEUE_PROXY}])).unwrap();
        with_sidecar.spec.as_mut().unwrap().containers = sidecar;
        assert_eq!(NodePod::of(&with_sidecar).unwrap(), None);
    }

    #[test]
    fn a_deleted_pod_drains() {
        let mut value = serde_json::to_value(pod()).unwrap();
        value["metadata"]["deletionTimestamp"] = json!("2026-11-23T01:13:39Z");
        assert!(NodePod::of(&serde_json::from_value(value).unwrap()).unwrap().unwrap().draining);
    }

    #[test]
    fn a_pod_speaks_for_its_own_namespace_only() {
        let mut foreign = pod();
        foreign.metadata.namespace = Some("other".into());
        assert_eq!(NodePod::of(&foreign).unwrap_err().to_string(), "namespace: 'golden' is not the pod's own");
        let mut host = pod();
        host.spec.as_mut().unwrap().host_network = Some(true);
        assert!(NodePod::of(&host).unwrap_err().to_string().starts_with("spec.hostNetwork: 'true'"));
    }

    #[test]
    fn words_survive_the_wire() {
        let served = NodePod::of(&pod()).unwrap().unwrap();
        let ports = served.settings.ports().into_iter().map(|(kind, _)| kind).collect();
        let word = PodWord::Serve { place: u64::MAX, pod: Box::new(served), ports };
        let text = serde_json::to_string(&word).unwrap();
        assert_eq!(serde_json::from_str::<PodWord>(&text).unwrap(), word);
    }
}
