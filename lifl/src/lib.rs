//! The one binary: `lifl up`, `lifl demo`, `lifl status`, `lifl plan` and every component.
//!
//! ```text
//!  lifl up DIR ── folder ──> platform: supervisor (this process)
//!                              ├── lifl agent ── lifl aggregator ..
//!                              ├── lifl gateway
//!                              └── lifl coordinator
//! ```
//!
//! On Kubernetes each component has a supervisor of its own, in a pod of its own; they are linked over a socket of the node:
//!
//! ```text
//!  lifl node agent ───────> lifl agent ── lifl aggregator ..
//!    ^  /run/lifl/node.sock
//!    ├── lifl node gateway ──────> lifl gateway
//!    └── lifl node coordinator ──> lifl coordinator
//! ```
//!
//! Components are started from this same binary; tests and benches start them as [`component::main_as`] does.
#![forbid(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("LIFL runs on Linux only: it stands on memfd seals, SCM_RIGHTS, pidfds and eBPF");

pub mod cli;
pub mod component;
mod cpu;
pub mod crd;
pub mod demo;
pub mod folder;
pub mod node;
pub mod nodes;
pub mod plan;
pub mod platform;
mod secret;
pub mod status;
pub mod up;
pub mod webhook;
