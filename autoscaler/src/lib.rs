//! How many aggregators run, and where (LIFL, MLSys'24, section 5).
//!
//! ```text
//!  k, E of each node ──> Kinds ──> MC ──> Room (RC = MC - k·E) ──> place: which node takes which client's update
//!         │                                                          │ updates of each node
//!         │    Cycle: a round begins ──────────────────────────> plan::decide ──> Plan: clients, leaves, middle, top, why
//!         │    Cycle: two minutes are over                                                         │
//!         └──> Estimator ──> Q ────────────────────────────────> plan::resize ──> Plan             │
//!                                                                                                  v
//!                                                             each node: decide ──> convert, start, stop aggregators
//! ```
//!
//! Everything here is a pure function over what is passed to it, time included.
#![forbid(unsafe_code)]

mod capacity;
mod hierarchy;
mod placement;
pub mod plan;
mod reuse;

pub use capacity::{Kinds, Ramp};
pub use hierarchy::{Cycle, Estimator, HISTORY, Load, PERIOD, Shape, top};
pub use lifl_api::plan::Policy;
pub use placement::{Demand, Dimension, NoRoom, Room, place};
pub use reuse::{Action, Member, Role, Wanted, Warm, decide};
