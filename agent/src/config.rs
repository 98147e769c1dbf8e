//! What the agent is told at its start.

use std::path::PathBuf;

use lifl_daemon::logs::Format;
use serde::{Deserialize, Serialize};

/// Configuration of an agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Shared memory that all chains of the node may use, bytes.
    pub shm_limit: u64,
    /// Use the router in user space even where eBPF could be loaded.
    #[serde(default)]
    pub userspace: bool,
    /// First user id of functions, where the agent is root: each runs as one of its own.
    #[serde(default = "default_uid_base")]
    pub uid_base: u32,
    /// Memory of a function beside its sums (its cgroup's limit is the two together), bytes.
    #[serde(default = "default_function_overhead")]
    pub function_overhead: u64,
    /// What functions log.
    #[serde(default = "default_log_level")]
    pub log_level: String,
    /// How that looks.
    #[serde(default)]
    pub log: Format,
    /// Where the network namespaces of pods are mounted.
    #[serde(default = "default_netns")]
    pub netns: PathBuf,
    /// Serve the pods of this Kubernetes node.
    #[serde(default)]
    pub node: Option<Node>,
    /// `role:name:n`: where the first function in this role is to die (tests).
    #[serde(default)]
    pub function_failpoint: Option<String>,
}

/// A node of a Kubernetes cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// How to reach the API server; none: as a pod of the cluster does.
    #[serde(default)]
    pub kubeconfig: Option<PathBuf>,
}

fn default_netns() -> PathBuf {
    "/run/netns".into()
}

fn default_uid_base() -> u32 {
    // Above what distributions give to people and services, below what user namespaces map.
    61_000
}

fn default_log_level() -> String {
    "info".into()
}

fn default_function_overhead() -> u64 {
    128 << 20
}
