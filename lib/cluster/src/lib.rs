//! The one seam to Kubernetes objects: a client, stores kept by watch, and writes.
//!
//! ```text
//!                 list, then watch; again from the last version seen; from the start after 410 Gone
//!   API server ──────────────────────────────────────────────> Keeper ── one writer
//!       ^                                                        │  a whole snapshot at a time
//!       │  server-side apply; status where it differs            v
//!     Writer <── reconcile(snapshot, now) <── changed() ─────── Store ── many readers
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | `client` | a client from a kubeconfig or from within a pod |
//! | `discovery` | which kinds the API server knows |
//! | `notice` | [`Notices`]: Events, each said once |
//! | `objects` | a snapshot: objects by key, and what differs between two of them |
//! | `read` | [`get`]: single objects of kinds that are not to be listed |
//! | `watch` | the watch: what a failure means, how long to wait |
//! | `store` | [`Store`] and its [`Keeper`] |
//! | [`registration`] | the root of a webhook's certificate, in its own registration |
//! | `write` | [`Writer`]: apply, and status writes that happen only when there is something to write |
//!
//! Nothing limits the rate of requests: a request goes out when it is made. What is bounded is their cause: there is one watch
//! per store, and a write only for a difference.
#![forbid(unsafe_code)]

mod client;
mod discovery;
mod notice;
mod objects;
mod read;
pub mod registration;
mod store;
mod watch;
mod write;

pub use client::{ConnectError, connect};
pub use discovery::{DiscoveryError, knows};
pub use kube::Client;
pub use notice::{Crier, Notice, Notices};
pub use objects::{Key, Objects};
pub use read::{ReadError, get};
pub use store::{Closed, Keeper, Kind, Selection, Store};
pub use write::{StatusWrite, WriteError, Writer};

#[cfg(test)]
mod tests;
