//! The ingress of a node: from Knative's internal Ingresses to requests on their way.
//!
//! ```text
//!  Kubernetes | files ── Snapshot ──> table (one writer) ── rules, backends, certificates (swapped whole)
//!                                       │                            │
//!                                       v                            v
//!                              status of each Ingress    listener ── decide ── choose ── forward ──> pod, activator
//! ```
//!
//! | module | is |
//! |---|---|
//! | `snapshot` | what the ingress is told: objects as Kubernetes has them |
//! | `translate`, `rules`, `hosts` | pure: an Ingress read; all of them as one table; a request's decision |
//! | `backend` | addresses of a service and the choice among them |
//! | `table` | the one writer: what is served, and what became of each Ingress |
//! | `serve` | listeners and the way of a request |
//! | `status` | conditions of an Ingress, and how answers to probes are judged |
//! | `feed` | snapshots from a folder, names that must be resolved |
//! | `kubernetes` | snapshots from Kubernetes |
//! | `publish`, `probe` | statuses: who writes them, when, and the questions to all gateways before |
//! | `entrance` | the ingress as a part of this process |
//! | `metrics` | counters |
//! | `observe` | the access log, spans |

mod backend;
pub(crate) mod entrance;
mod feed;
mod hosts;
mod kubernetes;
mod metrics;
mod observe;
mod probe;
mod publish;
mod rules;
mod serve;
mod snapshot;
mod status;
mod table;
mod translate;

pub use backend::{BackendName, Port};
pub use feed::{FileFault, follow, read, watch_folder};
pub use rules::Listener;
pub use serve::{Gate, Nearby, serve};
pub use snapshot::{Gateways, Snapshot};
pub use status::{Probed, ServiceHosts, judge, status};
pub use table::{Ingress, Outcome, Report, Settings};
pub use translate::Fault;
