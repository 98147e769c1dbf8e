//! What the webhook is told at its start.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Configuration of the webhook.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where it listens.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Its certificate.
    pub certificate: CertificateSource,
    /// Runtime classes whose pods have their network in the node's kernel. Others are taken for sandboxes (gVisor has a network
    /// stack of its own, Kata a kernel of its own): a listener opened from outside would hear nothing.
    #[serde(default = "default_plain_runtimes")]
    pub plain_runtimes: BTreeSet<String>,
    /// Milliseconds within which a client is to say its TLS hello, its request's head, its body; and one that asks nothing for
    /// as long is let go.
    #[serde(default = "default_patience")]
    pub patience_ms: u64,
}

/// Where the certificate comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum CertificateSource {
    /// PEM files, a mounted Secret for one; read again when they change.
    Files {
        /// The chain.
        certificate: PathBuf,
        /// The private key.
        key: PathBuf,
    },
    /// Made at start, renewed before it ends, by a root that lives as long as the process. Whoever registers the webhook takes
    /// the root from [`crate::Certificates::root`]. For one replica.
    SelfMade {
        /// DNS names, `NAME.NAMESPACE.svc` of its Service first.
        names: Vec<String>,
    },
}

// === impl Config ===

impl Config {
    /// With defaults for everything but the certificate.
    #[must_use]
    pub fn new(certificate: CertificateSource) -> Self {
        Self {
            listen: default_listen(),
            certificate,
            plain_runtimes: default_plain_runtimes(),
            patience_ms: default_patience(),
        }
    }
}

fn default_listen() -> SocketAddr {
    ([0, 0, 0, 0], 8443).into()
}

fn default_plain_runtimes() -> BTreeSet<String> {
    ["runc", "crun", "youki", "nvidia"].map(str::to_owned).into()
}

fn default_patience() -> u64 {
    10_000
}
