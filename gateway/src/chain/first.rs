//! The first client's tensors on their way to becoming the job's model: at most one set of them, until it is served.

use std::os::fd::OwnedFd;

use lifl_api::node::FromGateway;

use super::Inner;

/// Tensors that were accepted as the job's first model.
#[derive(Debug)]
pub(crate) struct FirstModel {
    pub(crate) file: OwnedFd,
    pub(crate) length: u64,
    /// The supervisor has it: the coordinator may be told.
    pub(crate) kept: bool,
    /// The coordinator of today was told.
    pub(crate) told: bool,
}

// === impl Inner: the first model ===

impl Inner {
    /// Whether a first client may bring the model: its first set of tensors decides.
    pub(crate) fn wants_first(&self) -> bool {
        self.first.is_none() && self.meta.model.is_none() && self.meta.job.spec.model.initial.from_first_client
    }

    /// Makes these tensors the ones, unless others were faster.
    pub(crate) fn take_first(&mut self, file: OwnedFd, length: u64) -> bool {
        let wanted = self.wants_first();
        if wanted {
            self.first = Some(FirstModel { file, length, kept: false, told: false });
        }
        wanted
    }

    /// What the coordinator is to know of it, once; `again`: it is another coordinator.
    pub(crate) fn first_word(&mut self, again: bool) -> Option<(FromGateway, OwnedFd)> {
        let first = self.first.as_mut().filter(|first| first.kept && (again || !first.told))?;
        if self.meta.model.is_some() {
            return None;
        }
        let file = first.file.try_clone().inspect_err(|error| tracing::error!(%error, "first model")).ok()?;
        first.told = true;
        Some((FromGateway::FirstModel { chain: self.chain, offset: 0, length: first.length }, file))
    }

    /// The model is served, or there will be none: the tensors are no longer wanted.
    pub(crate) fn end_first(&mut self) -> Option<FirstModel> {
        let over = self.meta.model.is_some() || self.meta.finish.is_some();
        self.first.take_if(|_| over)
    }
}

/// Key of the deposit.
pub(crate) fn first_key(chain: u32) -> String {
    format!("first/{chain}")
}
