//! The coordinator of federated jobs: which clients train, when a round closes, what is committed and stored.
//!
//! ```text
//!  agent ---- NodeEvent ---> watch ---- Event ---> round::decide (pure, takes `now`)
//!        <--- Order --------   |   <--- Action ---   |         uses plan, select
//!  gateway -- FromGateway ->   |                     |
//!        <--- ToGateway ----   |---> checkpoint      `--> state: jobs, clients, status
//!                              |---> metrics
//!  API server: FederatedJobs --|---> wish::steps (pure): jobs begin, change, end
//!        <--- their statuses --|<--- scribe (pure): which, and when
//!  supervisor: config, deposits (the open round; jobs of an API server; a listener for clients), drain
//! ```
//!
//! It moves no payload: updates go from the gateway to the aggregators, the model comes back as a descriptor, is hashed
//! and written once. All it knows lies in the checkpoint, in the gateway's ledger and in one deposit per job; so it may
//! die at any time.
#![forbid(unsafe_code)]

mod backoff;
pub mod checkpoint;
pub mod config;
mod figures;
mod metrics;
pub mod plan;
pub mod round;
mod scribe;
mod secrets;
pub mod select;
pub mod state;
mod status;
mod watch;
mod wish;

#[cfg(test)]
mod tests;

pub use watch::{CoordinatorError, run};
