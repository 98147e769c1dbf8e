//! Connections to endpoints, and the bodies that travel on them.
//!
//! ```text
//!  request ── Upstream::send ──> shelf: an idle HTTP/1.1 connection, or a new one
//!                                   │       └── driven by the request itself, then by the response's body
//!                                   └── HTTP/2: the connection with the fewest streams, driven by a task of its own
//! ```
//!
//! An HTTP/1.1 connection has no task: whoever has taken it from the shelf polls it, first while waiting for the
//! response's head, then from the body's `poll_frame`. That saves two hand-overs between tasks, often between cores, per
//! request; the price is that nobody notices the end of an idle connection until it is taken or swept. A response that
//! begins before its request has been sent to the end (full duplex) gets a task after all: otherwise a client that does
//! not read would stop its own upload.

mod body;
mod h1;
mod h2;
mod pool;
mod shelf;

/// Head of a response, in bytes.
const HEAD: u32 = 256 << 10;

pub use body::{Body, BodyError, Keep};
pub use h1::Broken;
pub(crate) use h1::Continue;
pub use pool::{Pool, PoolLimits, SendError, Sent, Switch, Upstream};
