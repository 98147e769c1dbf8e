//! The one binary: `lifl up`, `lifl demo`, `lifl status` and every component.
//!
//! ```text
//!  lifl up DIR ── folder ──> platform: supervisor (this process)
//!                              ├── lifl agent ── lifl aggregator ..
//!                              ├── lifl gateway
//!                              └── lifl coordinator
//! ```
//!
//! Components are started from this same binary; tests and benches start them as [`component::main_as`] does.
#![forbid(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("LIFL runs on Linux only: it stands on memfd seals, SCM_RIGHTS, pidfds and eBPF");

pub mod cli;
pub mod component;
mod cpu;
pub mod demo;
pub mod folder;
pub mod platform;
pub mod status;
pub mod up;
