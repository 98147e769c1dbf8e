//! What the coordinator is started with; nothing else is read.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use lifl_api::job::FederatedJob;
use serde::Deserialize;

/// How long a round waits for more clients after the last one joined, once there are `minClients`.
const GATHERING: Duration = Duration::from_secs(2);

/// Configuration of the coordinator.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The jobs of the folder, in its order.
    #[serde(default)]
    pub jobs: Vec<JobEntry>,
    /// Where relative paths of `file:` URIs begin; absolute ones need no such folder.
    #[serde(default)]
    pub state_dir: Option<PathBuf>,
    /// Shared memory of all jobs, bytes; the agent's limit holds where it is smaller.
    #[serde(default)]
    pub shm_limit: Option<u64>,
    /// Milliseconds that a round waits for more clients after the last one joined, once there are `minClients`.
    #[serde(default = "default_gathering")]
    pub gathering_ms: u64,
}

/// One job.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobEntry {
    /// File that it was read from, for people.
    pub path: String,
    /// The job.
    pub document: FederatedJob,
    /// Value of the Secret that `auth.tokenSecretRef` names, or of `--join-token-file`.
    #[serde(default)]
    pub join_secret: Option<String>,
}

/// A configuration that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("configuration of the coordinator: {0}")]
pub struct ConfigError(#[from] serde_json::Error);

fn default_gathering() -> u64 {
    u64::try_from(GATHERING.as_millis()).unwrap_or(u64::MAX)
}

// === impl Config ===

impl Config {
    /// Reads the configuration.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field.
    pub fn read(value: serde_json::Value) -> Result<Self, ConfigError> {
        Ok(serde_json::from_value(value)?)
    }

    /// For each job, why it cannot stand beside an earlier one, if so: same name, or same checkpoint folder.
    #[must_use]
    pub fn conflicts(&self) -> Vec<Option<String>> {
        let mut names = BTreeMap::new();
        let mut folders = BTreeMap::new();
        self.jobs
            .iter()
            .map(|entry| {
                let job = &entry.document;
                let name = (job.namespace().to_owned(), job.name().to_owned());
                if let Some(other) = names.get(&name) {
                    return Some(format!("job {}/{} is in {other} already", name.0, name.1));
                }
                names.insert(name, entry.path.clone());
                let folder = job.spec.checkpoint.uri.trim_end_matches('/').to_owned();
                if let Some(other) = folders.get(&folder) {
                    return Some(format!("checkpoint {folder} is used by the job of {other} already"));
                }
                folders.insert(folder, entry.path.clone());
                None
            })
            .collect()
    }
}
