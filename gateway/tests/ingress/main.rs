//! The ingress over real sockets, with real backends.
#![expect(clippy::unwrap_used, reason = "a test ends where its surroundings fail")]

mod observe;
mod reload;
mod requests;
mod world;
