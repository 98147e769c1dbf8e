//! CloudEvents over HTTP, version 1.0, as the gateway reads them.
//!
//! ```text
//!  HeaderMap ── mode ──> binary ──────> Head: a borrowed view, for events whose data are streamed
//!                  │                     └──────────> Control: an owned event with small data
//!                  ├───> structured ─────────────────────^
//!                  └───> batch: refused by those who did not ask for it
//! ```
//!
//! [`Head`] never copies a header: a relay passes the bytes on as they came, and values are unquoted and percent-decoded
//! only where this program reads them. [`Control`] goes through `cloudevents-sdk`, and is checked for what that lets pass.
#![forbid(unsafe_code)]

mod control;
mod error;
mod head;
mod text;

pub use control::{Control, MAX_STRUCTURED};
pub use error::EventError;
pub use head::{Head, Mode, mode};
