//! The node agent: eBPF, segments, sockets and function processes of a node.
//!
//! ```text
//!   coordinator ── orders (chains, plans) ──┐              ┌── descriptors: sk_msg, or the router here
//!                                           v              v
//!   gateway ── segments, sockets ──────>  agent ── Path: members, routes, counters
//!                                           │
//!                       private channel each│  data socket, segments, role
//!                                           v
//!                                functions (own uid, own cgroup)
//! ```
//!
//! It is privileged, has no network port, and parses no stranger's bytes. Everything it must not lose is deposited with the
//! supervisor: a new agent adopts running functions and restarts none. When the supervisor is gone it ends the functions,
//! removes their cgroups and ends.
#![forbid(unsafe_code)]

mod cgroup;
mod config;
mod edge;
mod metrics;
mod plan;
pub mod pods;
mod process;
mod state;

pub use config::{Config, Node};
pub use edge::{AgentError, run};
pub use plan::{Change, changes};
