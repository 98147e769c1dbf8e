//! How far the end of a server has come.

use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::watch;

/// Only goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Open,
    /// Clients are told to go elsewhere.
    Draining,
    Closing,
}

/// The word to end, for all connections and listeners.
#[derive(Debug)]
pub(super) struct End {
    /// Its receivers are the connections and listeners.
    told: watch::Sender<Phase>,
    /// The same, to be asked at no cost.
    now: AtomicU8,
}

// === impl End ===

impl End {
    pub(super) fn new() -> Self {
        Self { told: watch::Sender::new(Phase::Open), now: AtomicU8::new(Phase::Open as u8) }
    }

    pub(super) fn reach(&self, phase: Phase) {
        self.now.fetch_max(phase as u8, Ordering::AcqRel);
        self.told.send_modify(|now| *now = phase.max(*now));
    }

    pub(super) fn has_reached(&self, phase: Phase) -> bool {
        self.now.load(Ordering::Acquire) >= phase as u8
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Phase> {
        self.told.subscribe()
    }

    pub(super) async fn all_gone(&self) {
        self.told.closed().await;
    }

    pub(super) fn open(&self) -> usize {
        self.told.receiver_count()
    }
}

/// Waits for a phase.
pub(super) async fn reached(told: &mut watch::Receiver<Phase>, phase: Phase) {
    let _gone_is_closed_too = told.wait_for(|now| *now >= phase).await;
}
