//! The fl-update profile: what a model update says of itself, as CloudEvents types and attributes.
//!
//! Attribute names are those of the wire without `ce-`. Values that CloudEvents cannot hold (64-bit numbers, floats)
//! travel as decimal strings.

/// Figures in an event of metrics, and of a model, at most: each stands in every status.
pub const MAX_METRICS: usize = 64;
/// Bytes of a figure's name, at most.
pub const MAX_METRIC_NAME: usize = 128;

/// Event types.
pub mod types {
    /// A client is here, and asks for its token.
    pub const AVAILABLE: &str = "dev.lifl.fl.client.available.v1";
    /// What a client or an evaluator measured of a model.
    pub const METRICS: &str = "dev.lifl.fl.client.metrics.v1";
    /// A client's update; its data are the tensors.
    pub const UPDATE: &str = "dev.lifl.fl.update.submitted.v1";
}

/// Extension attributes.
pub mod attributes {
    /// Name of the job.
    pub const JOB: &str = "fljob";
    /// Round, Integer.
    pub const ROUND: &str = "flround";
    /// Client.
    pub const CLIENT: &str = "flclient";
    /// FedAvg's weight numerator, decimal.
    pub const SAMPLES: &str = "flsamples";
    /// Weight that overrides [`SAMPLES`], decimal.
    pub const WEIGHT: &str = "flweight";
    /// `full` or `diff`.
    pub const KIND: &str = "flkind";
    /// `f32`, `f16`, `bf16` or `mixed`; the tensors' own header decides.
    pub const DTYPE: &str = "fldtype";
    /// `sha256-<hex>` of the body.
    pub const DIGEST: &str = "fldigest";
    /// Content coding of the tensors; only absent or `none` is understood.
    pub const ENCODING: &str = "flencoding";
}

/// Media type of updates and models.
pub const SAFETENSORS: &str = "application/vnd.safetensors";

/// `source` of a client of a job.
#[must_use]
pub fn client_source(namespace: &str, job: &str, client: &str) -> String {
    format!("/namespaces/{namespace}/jobs/{job}/clients/{client}")
}

/// Data of [`types::METRICS`].
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MetricsData {
    /// Round whose model was measured: 0 is the initial model.
    pub round: u32,
    /// On how many samples: the weight of these figures in the job's mean.
    pub samples: u64,
    /// Figure by name.
    pub metrics: std::collections::BTreeMap<String, f64>,
}

/// Data of [`types::AVAILABLE`]; all of it may be absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AvailableData {
    /// `trainer` (default) or `evaluator`: never selected, its metrics alone decide.
    #[serde(default)]
    pub role: ClientRole,
}

/// What a client does for its job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientRole {
    /// Trains and sends updates.
    #[default]
    Trainer,
    /// Only measures models.
    Evaluator,
}
