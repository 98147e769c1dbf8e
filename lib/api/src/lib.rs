//! Words: Kubernetes kinds, HTTP documents and node messages that more than one component speaks.
//!
//! | module | words of |
//! |---|---|
//! | [`job`] | the `FederatedJob` and its reading from YAML |
//! | [`quantity`] | durations (`90s`) and sizes (`500Mi`) |
//! | [`event`] | the fl-update profile: CloudEvents types and attributes |
//! | [`http`] | the JSON documents of the gateway |
//! | [`ingress`] | Knative's internal Ingress, and its hash |
//! | [`manifest`] | a model's tensors and where their floats lie in a flat vector |
//! | [`node`] | what agent, gateway, coordinator and functions say to each other |
//! | [`plan`] | where a job is aggregated and why, and what makes one plan of another |
//! | [`pod`] | Knative's pods served by a node: settings of queue-proxy, agent and gateway on listeners and sockets |
//!
//! No I/O, no async, no sibling.
#![forbid(unsafe_code)]

pub mod event;
pub mod http;
pub mod ingress;
pub mod job;
pub mod manifest;
pub mod node;
pub mod plan;
pub mod pod;
pub mod quantity;
