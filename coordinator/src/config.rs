//! What the coordinator is started with; nothing else is read.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use lifl_api::job::FederatedJob;
use serde::{Deserialize, Serialize, de::Error as _};

/// How long a round waits for more clients after the last one joined, once there are `minClients`.
const GATHERING: Duration = Duration::from_secs(2);

/// Configuration of the coordinator.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The jobs of the folder, in its order.
    #[serde(default)]
    pub jobs: Vec<JobEntry>,
    /// Or the jobs of a Kubernetes.
    #[serde(default)]
    pub kubernetes: Option<Kubernetes>,
    /// Shared memory of all jobs, bytes; the agent's limit holds where it is smaller.
    #[serde(default)]
    pub shm_limit: Option<u64>,
    /// Milliseconds that a round waits for more clients after the last one joined, once there are `minClients`.
    #[serde(default = "default_gathering")]
    pub gathering_ms: u64,
}

/// Where FederatedJobs come from while the coordinator runs.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kubernetes {
    /// Credentials; default: `KUBECONFIG`, or the pod's service account.
    #[serde(default)]
    pub kubeconfig: Option<PathBuf>,
    /// Jobs that run at the same time: shared memory is divided into so many equal shares, and further jobs wait. How many
    /// there will be is not known, and a share that is promised to a tree of aggregators is not taken from it again.
    #[serde(default = "default_jobs_at_once")]
    pub jobs_at_once: u32,
}

/// One job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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

fn default_jobs_at_once() -> u32 {
    4
}

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
        let config: Self = serde_json::from_value(value)?;
        if config.kubernetes.is_some() && !config.jobs.is_empty() {
            return Err(serde_json::Error::custom("jobs: with kubernetes, jobs are its objects").into());
        }
        Ok(config)
    }

    /// Into how many shares the memory is divided.
    #[must_use]
    pub fn shares(&self) -> u64 {
        let jobs = u64::try_from(self.jobs.len()).unwrap_or(1);
        self.kubernetes.as_ref().map_or(jobs, |kubernetes| u64::from(kubernetes.jobs_at_once)).max(1)
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
