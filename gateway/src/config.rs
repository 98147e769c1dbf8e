//! What the gateway is told at its start. The supervisor passes it; no environment is read.

use std::{path::PathBuf, time::Duration};

use lifl_api::ingress::CLASS;
use serde::Deserialize;

/// Configuration, each value with a default that fits a node of a few thousand clients.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Clients are asked to be heard of this often; one that is silent for half as long again counts as gone.
    pub heartbeat_ms: u64,
    /// An upload is not judged by its speed before; and one that sends nothing for so long is given up.
    pub upload_grace_ms: u64,
    /// Slower uploads than this on average give their slot back, bytes per second.
    pub upload_floor: u64,
    /// How long an upload waits for a free slot before it is sent away.
    pub slot_wait_ms: u64,
    /// Longest wait of a long poll.
    pub poll_max_ms: u64,
    /// Connections served at a time; more wait in the listener's backlog.
    pub max_connections: usize,
    /// A connection that sends no whole request head for so long is closed, idle ones included.
    pub header_timeout_ms: u64,
    /// Descriptors outstanding per receiver: what its receive buffer holds for certain.
    pub credits: u32,
    /// Downloads of a model that a newer one replaced may go on for so long: its slot is the top aggregator's.
    pub model_grace_ms: u64,
    /// Clients known per job at most.
    pub max_clients: usize,
    /// Bodies of control events held in memory at a time, bytes; a quarter of it is all that strangers may have.
    pub control_bytes: usize,
    /// Drain waits so long for requests under way.
    pub drain_ms: u64,
    /// Folder of the journals of jobs with `ackLevel: Disk`; without one such jobs are refused their updates.
    pub journal_dir: Option<PathBuf>,
    /// What clients present when they join a job that has no secret of its own.
    pub join_secret: Option<Secret>,
    /// Requests to Knative's services; without it only federated clients are served.
    pub ingress: Option<IngressConfig>,
}

/// Something that logs do not show.
#[derive(Clone, Deserialize)]
pub struct Secret(pub String);

/// The ingress: where its rules come from, and how it ends. Its listeners are deposits: `ingress-http`, `ingress-https`,
/// `ingress-local-http`, `ingress-local-https`, each of them as it is needed.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IngressConfig {
    /// Rules are objects of Kubernetes.
    pub kubernetes: Option<KubernetesConfig>,
    /// Rules are the same objects in files of this folder.
    pub files: Option<PathBuf>,
    /// Class of the Ingresses that are served.
    pub class: String,
    /// Domain of the cluster.
    pub domain: String,
    /// This node's name; in Kubernetes it need not be told.
    pub node: String,
    /// Connections are accepted for so long after the order to end: those who send them have yet to hear of it.
    pub lame_duck_ms: u64,
    /// A line on standard output for each request.
    pub access_log: bool,
    /// Collector of traces, OTLP over HTTP: `http://HOST:PORT`, with a path if it is not `/v1/traces`.
    pub otlp: Option<String>,
    /// Of requests that say nothing of a trace, so many begin one: 0 to 1.
    pub trace_sample: f64,
}

/// How Kubernetes is reached, and as whom.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KubernetesConfig {
    /// Credentials; by default those of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of the services `lifl-gateway` and `lifl-gateway-local`.
    pub namespace: String,
    /// Name of this pod; by default the name of its host, which is the same.
    pub pod: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            heartbeat_ms: 20_000,
            upload_grace_ms: 10_000,
            upload_floor: 8 << 10,
            slot_wait_ms: 2_000,
            poll_max_ms: 60_000,
            max_connections: 8_192,
            header_timeout_ms: 60_000,
            credits: 256,
            model_grace_ms: 10_000,
            max_clients: 100_000,
            control_bytes: 64 << 20,
            drain_ms: 20_000,
            journal_dir: None,
            join_secret: None,
            ingress: None,
        }
    }
}

impl Default for IngressConfig {
    fn default() -> Self {
        Self {
            kubernetes: None,
            files: None,
            class: CLASS.to_owned(),
            domain: "cluster.local".to_owned(),
            node: String::new(),
            lame_duck_ms: 5_000,
            access_log: false,
            otlp: None,
            trace_sample: 1.0,
        }
    }
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self { kubeconfig: None, namespace: "lifl-system".to_owned(), pod: None }
    }
}

// === impl Secret ===

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

// === impl Config ===

impl Config {
    /// A client that is silent for longer is not alive.
    #[must_use]
    pub const fn silence(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms + self.heartbeat_ms / 2)
    }

    /// Connections are accepted for so long after the order to end.
    #[must_use]
    pub fn lame_duck(&self) -> Duration {
        Duration::from_millis(self.ingress.as_ref().map_or(0, |ingress| ingress.lame_duck_ms))
    }

    /// The heartbeat as clients are told.
    #[must_use]
    pub fn heartbeat(&self) -> String {
        lifl_api::quantity::Span(Duration::from_millis(self.heartbeat_ms)).to_string()
    }
}
