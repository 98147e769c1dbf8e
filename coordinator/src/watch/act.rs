//! Carries out what was decided: words to the siblings, files, deposits, the log.

use std::{os::fd::OwnedFd, sync::Arc};

use lifl_api::node::ToGateway;
use tokio::runtime::Handle;

use super::{Watch, Word, deposit_key, desk, lock, now};
use crate::{
    checkpoint::Finished,
    round::{Action, StoreFailure},
    state::{Done, JobState, SavedRound},
};

// === impl Watch ===

impl Watch {
    pub(super) async fn carry_out(&mut self, index: usize, action: Action) {
        match action {
            Action::Agent(order) => {
                if let Some(agent) = &self.agent {
                    agent.tell(order, None, None);
                }
            }
            Action::Gateway(words) => self.tell_gateway(index, words).await,
            Action::Store { done, opened_at } => self.store(index, done, opened_at),
            Action::StoreFirst => self.store_first(index),
            Action::StoreEnd { reason } => self.store_end(index, reason),
            Action::Save(saved) => self.save(index, Some(saved)).await,
            Action::Forget => self.save(index, None).await,
            Action::Committed { .. }
            | Action::Unused { .. }
            | Action::FiguresDropped { .. }
            | Action::Failed { .. } => self.log(index, &action),
        }
    }

    async fn tell_gateway(&mut self, index: usize, words: ToGateway) {
        let mut fd = None;
        if let ToGateway::Model { round, .. } = &words {
            fd = self.model(index, *round).await;
            if fd.is_none() {
                return;
            }
        }
        let point = match &words {
            ToGateway::Open { .. } => Some("coordinator.opened"),
            ToGateway::Close { .. } => Some("coordinator.closed"),
            ToGateway::Commit { .. } => Some("coordinator.committed"),
            _ => None,
        };
        if let Some(gateway) = &self.gateway {
            gateway.tell(words, fd, point);
        }
    }

    /// The model of `round` in a sealed memfd; read back from the checkpoint when a restarted gateway needs it.
    async fn model(&mut self, index: usize, round: u32) -> Option<Arc<OwnedFd>> {
        let desk = self.desks.get_mut(&index)?;
        if let Some((_, fd)) = desk.model.as_ref().filter(|(of, _)| *of == round) {
            return Some(fd.clone());
        }
        let (checkpoint, runtime) = (desk.checkpoint.clone(), Handle::current());
        let read = tokio::task::spawn_blocking(move || runtime.block_on(checkpoint.model(round))).await;
        match read.map_err(|e| e.to_string()).flatten() {
            Ok(fd) => {
                let fd = Arc::new(fd);
                desk.model = Some((round, fd.clone()));
                Some(fd)
            }
            Err(error) => {
                tracing::error!(
                    round,
                    error,
                    "the committed model cannot be read back; the gateway goes on with its own"
                );
                None
            }
        }
    }

    fn store(&mut self, index: usize, done: Done, opened_at: i64) {
        #[expect(clippy::cast_precision_loss, reason = "milliseconds of a round")]
        let seconds = (now() - opened_at).max(0) as f64 / 1000.0;
        let round = done.round;
        let words = self.words.clone();
        let order = {
            let jobs = lock(&self.jobs);
            let document = jobs.get(index).map(JobState::document);
            document.and_then(|document| self.desks.get(&index)?.order(document, done, seconds))
        };
        let Some(order) = order else {
            let failure = StoreFailure::Storage("its descriptor is not here yet".into());
            drop(words.send(Word::Stored(index, round, Err(failure))));
            return;
        };
        let runtime = Handle::current();
        self.stores.spawn(async move {
            let stored = tokio::task::spawn_blocking(move || order.carry_out(&runtime)).await;
            let result = stored.unwrap_or_else(|error| Err(StoreFailure::Storage(error.to_string())));
            drop(words.send(Word::Stored(index, round, result)));
        });
    }

    fn store_first(&mut self, index: usize) {
        let Some(desk) = self.desks.get(&index) else { return };
        let Some(source) = desk.first.clone() else { return };
        let (checkpoint, words, runtime) = (desk.checkpoint.clone(), self.words.clone(), Handle::current());
        self.stores.spawn(async move {
            let stored = tokio::task::spawn_blocking(move || desk::store_first(&checkpoint, &source, &runtime)).await;
            let result = stored.unwrap_or_else(|error| Err(StoreFailure::Storage(error.to_string())));
            drop(words.send(Word::FirstStored(index, result)));
        });
    }

    fn store_end(&mut self, index: usize, reason: String) {
        let finished = {
            let jobs = lock(&self.jobs);
            let job = jobs.get(index);
            job.and_then(|job| Some(Finished::new(&job.document().spec, job.model.as_ref()?, reason)))
        };
        let (Some(finished), Some(desk)) = (finished, self.desks.get(&index)) else {
            let failure = StoreFailure::Storage("the job has no checkpoint".into());
            drop(self.words.send(Word::EndStored(index, Err(failure))));
            return;
        };
        let (checkpoint, words, runtime) = (desk.checkpoint.clone(), self.words.clone(), Handle::current());
        self.stores.spawn(async move {
            let write = move || runtime.block_on(checkpoint.write_finished(&finished));
            let stored = tokio::task::spawn_blocking(write).await;
            let result = stored.unwrap_or_else(|error| Err(StoreFailure::Storage(error.to_string())));
            drop(words.send(Word::EndStored(index, result)));
        });
    }

    /// One line per attempt that failed.
    pub(super) fn complain(&self, index: usize, what: &str, failure: Option<&StoreFailure>) {
        let Some(StoreFailure::Storage(error) | StoreFailure::Rejected(error)) = failure else { return };
        let jobs = lock(&self.jobs);
        let Some(document) = jobs.get(index).map(JobState::document) else { return };
        let (namespace, job) = (document.namespace(), document.name());
        tracing::warn!(namespace, job, error, "{what} is not in the checkpoint");
    }

    async fn save(&self, index: usize, saved: Option<SavedRound>) {
        let Some(key) = lock(&self.jobs).get(index).map(deposit_key) else { return };
        let result = match saved {
            Some(saved) => self.child.deposit(&key, &saved, &[]).await,
            None => self.child.remove(&key).await,
        };
        if let Err(error) = result {
            tracing::warn!(key, %error, "deposit");
        }
    }

    fn log(&self, index: usize, action: &Action) {
        let jobs = lock(&self.jobs);
        let Some(document) = jobs.get(index).map(JobState::document) else { return };
        let (namespace, job) = (document.namespace(), document.name());
        match action {
            Action::Committed { round, updates, seconds } => {
                tracing::info!(namespace, job, round, updates, seconds, "round committed");
                self.metrics.ended(namespace, job, "committed");
                self.metrics.took(*seconds);
            }
            Action::Unused { round } => {
                tracing::info!(namespace, job, round, "round closed unused");
                self.metrics.ended(namespace, job, "unused");
            }
            Action::FiguresDropped { client, dropped } => {
                tracing::warn!(
                    namespace,
                    job,
                    ?client,
                    dropped,
                    "figures are left out: not finite, name too long, or too many names (said once)"
                );
            }
            Action::Failed { round, reason } => {
                tracing::error!(namespace, job, round, reason, "job failed");
                self.metrics.ended(namespace, job, "failed");
            }
            _ => {}
        }
    }
}
