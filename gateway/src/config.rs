//! What the gateway is told at its start. The supervisor passes it; no environment is read.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;

/// Configuration, each value with a default that fits a node of a few thousand clients.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Clients are asked to be heard of this often; one that is silent for half as long again counts as gone.
    pub heartbeat_ms: u64,
    /// An upload is not judged by its speed before; and one that sends nothing for so long is given up.
    pub upload_grace_ms: u64,
    /// Slower uploads than this on average give their slot back, bytes per second.
    pub upload_floor: u64,
    /// How long an upload waits for a free slot before it is sent away.
    pub slot_wait_ms: u64,
    /// Longest wait of a long poll.
    pub poll_max_ms: u64,
    /// Connections served at a time; more wait in the listener's backlog.
    pub max_connections: usize,
    /// A connection that sends no whole request head for so long is closed, idle ones included.
    pub header_timeout_ms: u64,
    /// Descriptors outstanding per receiver: what its receive buffer holds for certain.
    pub credits: u32,
    /// Downloads of a model that a newer one replaced may go on for so long: its slot is the top aggregator's.
    pub model_grace_ms: u64,
    /// Clients known per job at most.
    pub max_clients: usize,
    /// Bodies of control events held in memory at a time, bytes; a quarter of it is all that strangers may have.
    pub control_bytes: usize,
    /// Drain waits so long for requests under way.
    pub drain_ms: u64,
    /// Folder of the journals of jobs with `ackLevel: Disk`; without one such jobs are refused their updates.
    pub journal_dir: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            heartbeat_ms: 20_000,
            upload_grace_ms: 10_000,
            upload_floor: 8 << 10,
            slot_wait_ms: 2_000,
            poll_max_ms: 60_000,
            max_connections: 8_192,
            header_timeout_ms: 60_000,
            credits: 256,
            model_grace_ms: 10_000,
            max_clients: 100_000,
            control_bytes: 64 << 20,
            drain_ms: 20_000,
            journal_dir: None,
        }
    }
}

// === impl Config ===

impl Config {
    /// A client that is silent for longer is not alive.
    #[must_use]
    pub const fn silence(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms + self.heartbeat_ms / 2)
    }

    /// The heartbeat as clients are told.
    #[must_use]
    pub fn heartbeat(&self) -> String {
        lifl_api::quantity::Span(Duration::from_millis(self.heartbeat_ms)).to_string()
    }
}
