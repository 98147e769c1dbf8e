//! What is seen of a pod's requests, as Prometheus, a log's reader and a collector of traces get it.
#![expect(clippy::unwrap_used, reason = "a test ends where its surroundings fail")]

mod collector;
mod lines;
mod metrics;
mod otlp;
mod rig;
mod traces;
