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
#![forbid(unsafe_code)]

pub mod admin;
mod channel;
mod child;
mod failpoint;
pub mod logs;
mod supervisor;

pub use channel::{Channel, ChannelError, Received, SyncChannel};
pub use child::{Child, ChildError, Deposit, Startup, TestSupervisor, take_stdin};
pub use failpoint::{arm_failpoint, failpoint};
pub use supervisor::{ChildSpec, Scrape, Supervisor, SupervisorError};
