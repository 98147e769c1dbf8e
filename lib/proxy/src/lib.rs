//! HTTP machinery of the node gateway, on hyper: a proxy's parts, and queue-proxy's behaviour made of them.
//!
//! ```text
//!  client ─ serve ─ connection ─> queue (one pod) ── timeouts ── breaker ── forward ── upstream ─> endpoint
//!                                   │  probes, drain, readiness     │          └── tunnel (after a 101)
//!                                   └── stats ── 9090               └── a place until the body has ended
//! ```
//!
//! | module | is |
//! |---|---|
//! | `serve` | listeners and connections: HTTP/1.1 and h2c, bounded heads, time, streams |
//! | `tls` | the handshake, as a part of a connection |
//! | `queue` | what Knative's queue-proxy does for one pod, as one service |
//! | `forward` | one request to an endpoint and back: heads, trailers, upgrades, cancelling |
//! | `upstream` | connections to endpoints, shared by all threads; the one body type |
//! | `breaker`, `timeouts`, `stats`, `head` | rules, told the time and asked |
//! | `observe` | figures, lines and traces of requests; costs nothing where nobody asks for them |
//! | `endpoint` | where requests go, and who dials |
//! | `reply` | answers of our own |
#![forbid(unsafe_code)]

pub mod breaker;
pub mod endpoint;
pub mod forward;
pub mod head;
pub mod observe;
mod progress;
pub mod queue;
pub mod reply;
pub mod serve;
pub mod stats;
pub mod timeouts;
pub mod tls;
pub mod upstream;

pub use endpoint::{Dial, Direct, Endpoint, Protocol};
pub use forward::{ForwardError, Ride, Tunnels, carry, forward};
pub use head::Peer;
pub use serve::{Handle, Limits, Server};
pub use timeouts::Timeouts;
pub use upstream::{Body, BodyError, Keep, Pool, PoolLimits, Upstream};
