//! Knative's pods of this node: what queue-proxy was, without a process beside each.
//!
//! ```text
//!   agent ── PodWord, listeners ──> table ── one Queue a pod ──> user's port, by a socket of the pod's own namespace
//!     ^                                                              │
//!     └──────────────── PodAsk: more sockets ────────────────────────┘
//! ```
//!
//! Listeners lie in the pod and belong to the agent's store: when this process is started again, connections wait in their
//! queues meanwhile. A pod costs three listening tasks and no timer while nobody calls.

mod sockets;
mod table;

pub use sockets::Sockets;
pub use table::{Held, Pods};
