//! What belongs to a job but cannot be decided about: its checkpoint, the descriptors of its models.

use std::{os::fd::OwnedFd, sync::Arc};

use lifl_api::{job::FederatedJob, manifest::Manifest};

use crate::{
    checkpoint::{self, Checkpoint, CheckpointError, Identity, Newest, Sealed, Source},
    config::JobEntry,
    plan::{Refusal, Shape},
    round::StoreFailure,
    state::{Done, JobState, Loaded, Model, RoundSummary, SavedRound},
};

/// A job's checkpoint and descriptors.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) checkpoint: Arc<Checkpoint>,
    pub(super) identity: Identity,
    pub(super) manifest: Option<Arc<Manifest>>,
    /// The model in a sealed memfd, with the round that made it. A committed one is read back only when a gateway asks.
    pub(super) model: Option<(u32, Arc<OwnedFd>)>,
    /// The sealed model of the round under way, in its segment.
    pub(super) done: Option<(u32, Arc<Source>)>,
    /// The first client's tensors, in their segment.
    pub(super) first: Option<Arc<Source>>,
}

/// Reads a job's checkpoint or initial model. Blocking: call it off the async threads.
pub(super) fn load(
    entry: JobEntry,
    saved: Option<SavedRound>,
    gathering: i64,
    runtime: &tokio::runtime::Handle,
    now: i64,
) -> Result<(JobState, Desk), Refusal> {
    let JobEntry { path, document, join_secret } = entry;
    let (loaded, desk) = begin(&document, saved, runtime)?;
    Ok((JobState::new(path, document, join_secret, gathering, loaded, now), desk))
}

fn begin(
    document: &FederatedJob,
    saved: Option<SavedRound>,
    runtime: &tokio::runtime::Handle,
) -> Result<(Loaded, Desk), Refusal> {
    let uri = &document.spec.checkpoint.uri;
    let unusable = |error: CheckpointError| Refusal {
        reason: "CheckpointUnusable",
        message: format!("spec.checkpoint.uri {uri}: {error}"),
    };
    document.validate().map_err(|e| Refusal { reason: "Invalid", message: e.to_string() })?;
    let mut checkpoint = Checkpoint::open(&document.spec.checkpoint.uri).map_err(unusable)?;
    checkpoint.lock().map_err(unusable)?;
    let finished = runtime.block_on(checkpoint.finished()).map_err(unusable)?;
    let identity = checkpoint.identity(document.namespace(), document.name()).map_err(unusable)?;
    let Newest { committed, history, warning } = runtime.block_on(checkpoint.newest()).map_err(unusable)?;
    let found = match (committed, &document.spec.model.initial.uri) {
        (Some((commit, sealed)), _) => Some((commit.round, checkpoint.model_uri(commit.round), sealed)),
        (None, Some(uri)) => Some((0, uri.clone(), initial(uri)?)),
        (None, None) => None,
    };
    let mut loaded =
        Loaded { token_key: identity.token_key.clone(), chain: identity.chain, warning, saved, ..Loaded::default() };
    loaded.history = history
        .into_iter()
        .filter(|c| c.round > 0)
        .map(|c| RoundSummary {
            round: c.round,
            count: c.count,
            weight: c.weight,
            seconds: c.seconds,
            sha256: c.model_sha256,
        })
        .collect();
    let mut desk =
        Desk { checkpoint: Arc::new(checkpoint), identity, manifest: None, model: None, done: None, first: None };
    if let Some((round, uri, Sealed { fd, sha256, manifest })) = found {
        let model = Model { round, sha256, length: manifest.file_bytes(), uri };
        let finished = finished.filter(|finished| finished.holds(&document.spec, &model));
        loaded.ended = finished.map(|finished| finished.reason);
        loaded.model = Some((model, Shape::of(&manifest)));
        desk.manifest = Some(Arc::new(manifest));
        desk.model = Some((round, Arc::new(fd)));
    }
    Ok((loaded, desk))
}

fn initial(uri: &str) -> Result<Sealed, Refusal> {
    let read = || checkpoint::initial(&checkpoint::path_of(uri)?);
    read().map_err(|error| Refusal {
        reason: "InitialModelUnreadable",
        message: format!("spec.model.initial.uri {uri}: {error}"),
    })
}

// === impl Desk ===

impl Desk {
    /// Keeps the first client's tensors until they are stored; what others bring meanwhile or later is no model any more.
    pub(super) fn adopt(&mut self, source: Source) {
        if self.manifest.is_none() && self.first.is_none() {
            self.first = Some(Arc::new(source));
        }
    }

    /// What [`store`] needs, if the round's model is here.
    pub(super) fn order(&self, document: &FederatedJob, done: Done, seconds: f64) -> Option<StoreOrder> {
        let (_, source) = self.done.as_ref().filter(|(round, _)| *round == done.round)?;
        Some(StoreOrder {
            checkpoint: self.checkpoint.clone(),
            source: source.clone(),
            manifest: self.manifest.clone()?,
            every: document.spec.checkpoint.every,
            keep: document.spec.checkpoint.keep,
            done,
            seconds,
        })
    }
}

/// A round to be stored.
pub(super) struct StoreOrder {
    checkpoint: Arc<Checkpoint>,
    source: Arc<Source>,
    manifest: Arc<Manifest>,
    every: u32,
    keep: u32,
    done: Done,
    seconds: f64,
}

// === impl StoreOrder ===

impl StoreOrder {
    /// Writes the round, then deletes what need not be kept. Blocking.
    pub(super) fn carry_out(self, runtime: &tokio::runtime::Handle) -> Result<Model, StoreFailure> {
        let write = self.checkpoint.write(&self.done, self.seconds, &self.source, &self.manifest);
        let commit = runtime.block_on(write)?;
        lifl_daemon::failpoint("coordinator.checkpoint_written");
        if let Err(error) = runtime.block_on(self.checkpoint.prune(self.every, self.keep)) {
            tracing::warn!(%error, "old models are not deleted");
        }
        let uri = self.checkpoint.model_uri(commit.round);
        Ok(Model { round: commit.round, sha256: commit.model_sha256, length: commit.model_bytes, uri })
    }
}

/// Writes the first client's tensors. Blocking.
pub(super) fn store_first(
    checkpoint: &Checkpoint,
    source: &Source,
    runtime: &tokio::runtime::Handle,
) -> Result<(Model, Sealed), StoreFailure> {
    let commit = runtime.block_on(checkpoint.write_first(source))?;
    let sealed = runtime.block_on(checkpoint.read_back(&commit)).map_err(StoreFailure::Storage)?;
    let uri = checkpoint.model_uri(0);
    Ok((Model { round: 0, sha256: commit.model_sha256, length: commit.model_bytes, uri }, sealed))
}
