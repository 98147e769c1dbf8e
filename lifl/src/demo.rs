//! `lifl demo`: a hundred clients learn to read handwritten digits with nothing but this machine.
//!
//! | module | what it holds |
//! |---|---|
//! | [`digits`] | the images, and those held out |
//! | [`split`] | which client holds which |
//! | [`train`] | the network and its SGD |
//! | [`job`] | the FederatedJob and its first model |
//! | [`client`] | the clients, over HTTP like anybody's |
//! | [`run()`] | the platform, the clients against it, and the screen between them |
//! | [`ui`] | bar, lines, closing table, plot and JSON |
//!
//! The clients know the platform by its public surface alone; whoever runs the platform hands its figures to [`ui`].

pub mod client;
pub mod digits;
pub mod job;
mod run;
#[cfg(test)]
mod simulation;
pub mod split;
pub mod train;
pub mod ui;

pub use run::run;
