//! Admission of pods: takes queue-proxy out of those that a node's gateway is to serve.
//!
//! ```text
//!   kube-apiserver ── AdmissionReview, HTTPS ──> serve ──> review ──> mutate
//!                  <── JSON patch ─────────────────────────────────────┘
//!
//!   Patch   queue-proxy out, its settings into an annotation, its readiness probe onto the user container
//!   Keep    the pod cannot be served without it: an annotation says why
//!   NotOurs nobody asked
//! ```
//!
//! Who asks: `lifl.dev/data-plane: node` on the pod (Knative carries labels and annotations of a Revision's template over) or on
//! its namespace. It writes nothing to the cluster, so `sideEffects: None` is true, and it must never be in anyone's way: with
//! `failurePolicy: Ignore`, and an answer without a patch for everything it does not understand, a pod starts with its sidecar.
#![forbid(unsafe_code)]

mod certificate;
mod config;
mod mutate;
mod review;
mod serve;

pub use certificate::{CertificateError, Certificates};
pub use config::{CertificateSource, Config};
pub use mutate::{Request, Verdict, mutate};
pub use review::{ReviewError, Reviewed, review};
pub use serve::{Bound, NAMESPACE_PATH, POD_PATH, WebhookError, build};
