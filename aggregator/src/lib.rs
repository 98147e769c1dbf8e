//! The aggregator function: receive, fold, send; leaf, middle and top are one and the same.
//!
//! ```text
//!  data socket ── Update, Partial, Model, Close ──> round (what is held, what is still expected)
//!                                                     │ decide
//!                     inputs + current ── one pass ──> next ── seal ──> Release.. + Sealed to the gateway
//!                                                     │ complete
//!                             leaf, middle: Partial to the parent      top: divide once, Model to the gateway
//! ```
//!
//! Folding is a pure function from sealed slots into a free one: an aggregator that dies before it announced the new slot
//! has done nothing. Two slots take turns, so a round of any length needs two sums of memory.
//!
//! One thread, no runtime, no timer: it sleeps in `poll` until a descriptor or an order comes.
#![forbid(unsafe_code)]

mod decide;
mod divide;
mod memory;
mod serve;
mod sum;

pub use decide::{Held, Round, Step, decide};
pub use divide::{DivideError, divide};
pub use serve::{FunctionError, run};
pub use sum::{Accumulator, SumError, fold};
