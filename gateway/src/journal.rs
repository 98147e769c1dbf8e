//! Journals of jobs with `ackLevel: Disk`.

use std::{path::PathBuf, sync::Arc};

use lifl_api::job::AckLevel;
use lifl_shm::ObjectMeta;

use crate::{
    chain::{Chain, Claim, Slot},
    problem::{Code, Refusal},
    state::Gateway,
};

/// The journals of this node.
#[derive(Debug)]
pub(crate) struct Journals {
    dir: Option<PathBuf>,
}

// === impl Journals ===

impl Journals {
    pub(crate) fn new(dir: Option<PathBuf>) -> Self {
        Self { dir }
    }

    /// Refuses updates that cannot be made as safe as their job promises.
    pub(crate) fn check(&self, level: AckLevel) -> Result<(), Refusal> {
        if level == AckLevel::Disk {
            return Err(Code::JournalFailed.with("journal unavailable"));
        }
        Ok(())
    }

    /// Makes an update safe as its job promises, before anyone is told.
    pub(crate) async fn record(
        &self,
        _chain: &Arc<Chain>,
        _claim: &Claim,
        _meta: &ObjectMeta,
        _digest: [u8; 32],
        slot: Slot,
    ) -> Result<Slot, Refusal> {
        Ok(slot)
    }
}

/// Admits again what the journal has of a round.
pub(crate) async fn readmit(_gateway: &Arc<Gateway>, _chain: &Arc<Chain>, _round: u32) {}

/// Forgets a round.
pub(crate) async fn retire(_gateway: &Arc<Gateway>, _chain: &Arc<Chain>, _round: u32) {}
