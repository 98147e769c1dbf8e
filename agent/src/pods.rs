//! Pods without a process beside the function: sockets inside their network namespaces.
//!
//! ```text
//!   pods of this node ──> decide ──> open / close / tell        (plan.rs, pure)
//!                                      │
//!      /run/netns/*  ── by address ────┤                        (namespace.rs, a thread that ends)
//!                                      v
//!                 listeners 8012|8013, 8112, 8022, 9090, 9091  ── kept by the supervisor, served by the gateway
//!                 sockets for the pod's loopback               ── made as asked, connected by the gateway
//! ```
//!
//! A listener that lies in the pod's own namespace needs no redirect: probes, client addresses and network policies are what
//! they were with queue-proxy. The agent never accepts and never reads: it opens, keeps and hands on. While no gateway lives,
//! connections wait in the listener's queue.
//!
//! Beside that the kernel counts the pods' connections (`counted.rs`), and a namespace that vanishes without its pod is missed at
//! once, for its mount's name leaves the folder (`LEAVES`).

use rustix::fs::inotify::WatchFlags;

mod counted;
mod edge;
mod namespace;
mod plan;

pub use counted::{Counted, Shown};
pub use edge::{Pods, Report, Telling};
pub use plan::{Action, SAID_AFTER, Standing, decide, pause};

/// What the folder of mounts is watched for. Who takes a namespace away unmounts it first, then removes the file on which it was.
pub(crate) const LEAVES: WatchFlags = WatchFlags::DELETE.union(WatchFlags::MOVED_FROM).union(WatchFlags::ONLYDIR);
