//! `finished.json`: the stop condition was met, and the job ended with the last committed model.
//!
//! It counts only beside that model and under the manifest that it was written for: with more rounds, or another
//! condition, the job goes on.

use lifl_api::{http::schema, job::FederatedJobSpec};
use object_store::{ObjectStoreExt as _, path::Path as Key};
use serde::{Deserialize, Serialize};

use super::{Checkpoint, CheckpointError, json};
use crate::{round::StoreFailure, state::Model};

const FINISHED: &str = "finished.json";

/// `finished.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    /// `lifl.dev/finished/v1`.
    pub schema: String,
    /// Round of the last committed model; 0 is the initial model.
    pub round: u32,
    /// Of that model, lower-case hex.
    pub model_sha256: String,
    /// `rounds` of the manifest.
    pub rounds: u32,
    /// The condition, as text: two readings of one number are equal, whatever its last bit.
    pub stop: String,
    /// How it was met, for people.
    pub reason: String,
}

// === impl Finished ===

impl Finished {
    /// The end by `spec.stop` with this model.
    #[must_use]
    pub fn new(spec: &FederatedJobSpec, model: &Model, reason: String) -> Self {
        Self {
            schema: schema("finished"),
            round: model.round,
            model_sha256: model.sha256.clone(),
            rounds: spec.rounds,
            stop: condition(spec),
            reason,
        }
    }

    /// It speaks of this model and of what `spec` asks for.
    #[must_use]
    pub fn holds(&self, spec: &FederatedJobSpec, model: &Model) -> bool {
        self.schema == schema("finished")
            && (self.round, &self.model_sha256) == (model.round, &model.sha256)
            && spec.stop.is_some()
            && self.stop == condition(spec)
            && spec.rounds <= self.rounds
    }
}

fn condition(spec: &FederatedJobSpec) -> String {
    spec.stop.as_ref().map(|stop| format!("{} at least {}", stop.metric, stop.at_least)).unwrap_or_default()
}

// === impl Checkpoint ===

impl Checkpoint {
    /// Writes the end of the job, whole or not at all.
    ///
    /// # Errors
    /// `Storage` when the disk failed.
    pub async fn write_finished(&self, finished: &Finished) -> Result<(), StoreFailure> {
        let bytes = json(finished)?;
        self.step()?;
        self.put(&Key::from(FINISHED), bytes).await?;
        self.step()?;
        Ok(())
    }

    /// The end that an earlier life wrote. An unreadable one is none: then the job goes on, and ends again.
    ///
    /// # Errors
    /// The store.
    pub async fn finished(&self) -> Result<Option<Finished>, CheckpointError> {
        let bytes = match self.store.get(&Key::from(FINISHED)).await {
            Ok(found) => found.bytes().await?,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match serde_json::from_slice(&bytes) {
            Ok(finished) => Ok(Some(finished)),
            Err(error) => {
                tracing::warn!(uri = self.uri, %error, "finished.json is not readable: the job goes on");
                Ok(None)
            }
        }
    }
}
