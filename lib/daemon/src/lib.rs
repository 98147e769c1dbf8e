//! The skeleton of a process: logs, metrics, the channel to its parent, readiness, drain.
//!
//! ```text
//!              supervisor (lifl up)          keeps listener and fd store, serves the admin port,
//!            /        |          \           pairs its children, starts again what died
//!   channel /         |           \
//!      agent ---- gateway ---- coordinator   each: `Child::from_stdin`, deposits what must outlive it
//! ```
//!
//! A component holds nothing that its death would lose: what matters lies in memfds, sockets and kernel maps whose
//! descriptors it *deposits* with its supervisor, and gets back when it is started again (the idea of systemd's
//! `FDSTORE=1`).
//!
//! Where each component has a supervisor of its own (pods of a node), the supervisors are *linked* over a socket of the node:
//! one of them is the hub, which pairs components over links as it pairs its own. A supervisor's *epoch* tells its lives apart:
//! what a component deposited is gone when its epoch is another ([`Epochs`]).
//!
//! ```text
//!   supervisor of agent = hub ── /run/lifl/node.sock ──┬── supervisor of gateway
//!          |                                           └── supervisor of coordinator
//!        agent ─────────────── channel ─────────────────── gateway, coordinator
//! ```
#![forbid(unsafe_code)]

pub mod admin;
mod channel;
mod child;
mod epochs;
mod failpoint;
mod folder;
mod limit;
pub mod logs;
mod socket;
mod supervisor;

pub use channel::{Channel, ChannelError, Received, SyncChannel};
pub use child::{Child, ChildError, Deposit, Kin, Sibling, Startup, TestSupervisor, take_stdin};
pub use epochs::{Epochs, Standing};
pub use failpoint::{arm_failpoint, failpoint};
pub use folder::FolderWatch;
pub use limit::raise_limit;
pub use socket::{COORDINATOR_UID, GATEWAY_UID, NodeSocket, SocketError};
pub use supervisor::{ChildSpec, Scrape, Supervisor, SupervisorError};
