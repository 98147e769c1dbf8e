//! The `FederatedJob` (`fl.lifl.dev/v1alpha1`): what a federated-learning team writes, and what it reads back.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::quantity::{Bytes, Span};

mod object;
mod validate;

pub use object::JobObject;
pub use validate::MAX_SELECTED;

/// A federated training job: rounds of client updates, aggregated to a model.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "fl.lifl.dev",
    version = "v1alpha1",
    kind = "FederatedJob",
    plural = "federatedjobs",
    shortname = "fj",
    namespaced,
    status = "FederatedJobStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Round","type":"integer","jsonPath":".status.round"}"#,
    printcolumn = r#"{"name":"Rounds","type":"integer","jsonPath":".spec.rounds"}"#,
    printcolumn = r#"{"name":"Clients","type":"integer","jsonPath":".status.clients.registered"}"#,
    printcolumn = r#"{"name":"Accuracy","type":"number","jsonPath":".status.metrics.accuracy"}"#,
    printcolumn = r#"{"name":"Note","type":"string","jsonPath":".status.conditions[?(@.status==\"False\")].message"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FederatedJobSpec {
    /// The model to train.
    pub model: ModelSpec,
    /// What clients send.
    #[serde(default)]
    pub update: UpdateSpec,
    /// Rounds to commit before the job has succeeded.
    #[schemars(range(min = 1))]
    pub rounds: u32,
    /// Updates that close a round.
    #[schemars(range(min = 1))]
    pub clients_per_round: u32,
    /// Updates below which a round is not closed at its deadline; default: `clientsPerRound`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_clients: Option<u32>,
    /// Factor of clients selected above `clientsPerRound`, against dropouts.
    #[serde(default = "default_over_provision")]
    #[schemars(range(min = 1.0))]
    pub over_provision: f64,
    /// How long a round waits for its updates.
    #[serde(default = "default_round_deadline")]
    pub round_deadline: Span,
    /// Largest weight that a client may claim in a round.
    #[serde(default = "default_max_weight")]
    #[schemars(range(min = 1))]
    pub max_weight: u64,
    /// How updates become a model.
    #[serde(default)]
    pub aggregation: AggregationSpec,
    /// When the job has succeeded before its last round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<StopSpec>,
    /// Where committed rounds are kept.
    pub checkpoint: CheckpointSpec,
    /// What a 202 promises.
    #[serde(default)]
    pub ack_level: AckLevel,
    /// Who may join.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<AuthSpec>,
}

/// The model of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelSpec {
    /// Its name.
    pub name: String,
    /// Where the first global model comes from.
    pub initial: InitialModel,
}

/// Where the first global model comes from: exactly one of the two.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InitialModel {
    /// A safetensors file: `file:///models/mlp.safetensors`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
    /// The first update of round 1 brings the tensors.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub from_first_client: bool,
}

/// What clients send.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UpdateSpec {
    /// Whole parameters or differences from the global model.
    #[serde(default)]
    pub kind: UpdateKind,
    /// Element types accepted for floating-point tensors.
    #[serde(default = "default_dtypes")]
    pub dtypes: Vec<FloatDtype>,
    /// Largest body accepted; default: the model's size in the widest accepted type, and its header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_size: Option<Bytes>,
}

/// Whole parameters or differences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum UpdateKind {
    /// The client's parameters.
    #[default]
    Full,
    /// The client's parameters less the global model's.
    Diff,
}

/// Element types of floating-point tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum FloatDtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
}

/// How updates become a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AggregationSpec {
    /// The rule.
    #[serde(default)]
    pub rule: Rule,
    /// Fold each update as it comes, or all at the end.
    #[serde(default)]
    pub timing: Timing,
    /// Updates per leaf (the paper's I).
    #[serde(default = "default_leaf_fan_in")]
    #[schemars(range(min = 1))]
    pub leaf_fan_in: u32,
    /// Identical bits for any order and any tree: sums in 64-bit fixed point, at twice the memory of a partial.
    #[serde(default)]
    pub reproducible: bool,
}

/// Aggregation rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Rule {
    /// Mean weighted by samples.
    #[default]
    FedAvg,
}

/// Eager or lazy aggregation (paper, section 5.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Timing {
    /// Each update is folded when it comes.
    #[default]
    Eager,
    /// Updates wait in shared memory until the round is closed.
    Lazy,
}

/// When a job has succeeded early.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StopSpec {
    /// A figure of `client.metrics.v1`.
    pub metric: String,
    /// Reached at this value.
    pub at_least: f64,
}

/// Where committed rounds are kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CheckpointSpec {
    /// A folder: `file:///var/lib/lifl/digits`.
    pub uri: String,
    /// Keep the model of every n-th round; receipts are kept for all.
    #[serde(default = "default_every")]
    #[schemars(range(min = 1))]
    pub every: u32,
    /// Models kept.
    #[serde(default = "default_keep")]
    #[schemars(range(min = 1))]
    pub keep: u32,
}

/// What a 202 promises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AckLevel {
    /// The update survives the death of any process of the platform.
    #[default]
    Memory,
    /// The update survives the machine: it is on disk.
    Disk,
}

/// Who may join.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthSpec {
    /// Secret that joining clients present.
    pub token_secret_ref: SecretRef,
}

/// A key of a Secret of the same namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecretRef {
    /// Name of the Secret.
    pub name: String,
    /// Its key.
    pub key: String,
}

/// What the platform says of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FederatedJobStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default)]
    pub observed_generation: i64,
    /// Where the job stands.
    #[serde(default)]
    pub phase: Phase,
    /// Last committed round.
    #[serde(default)]
    pub round: u32,
    /// `Ready`, `Progressing`, `Succeeded`; `CheckpointIntact` and `SpecAccepted` where there was something to say of them.
    #[serde(default)]
    pub conditions: Vec<JobCondition>,
    /// Clients of the round under way.
    #[serde(default)]
    pub clients: ClientCounts,
    /// The global model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelStatus>,
    /// Latest figures, by name.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Not begun.
    #[default]
    Pending,
    /// Rounds are under way.
    Running,
    /// All rounds are committed, or the stop condition is met.
    Succeeded,
    /// It cannot go on: the condition `Succeeded` says why.
    Failed,
}

/// One condition, as Kubernetes writes them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobCondition {
    /// `Ready`, `Progressing`, `Succeeded`, `CheckpointIntact` or `SpecAccepted`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// A word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
    /// RFC 3339.
    pub last_transition_time: String,
    /// Generation of the spec that it speaks of, where there are generations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// Clients of the round under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClientCounts {
    /// Known to the job.
    pub registered: u32,
    /// Selected for this round.
    pub selected: u32,
    /// Whose update is accepted in this round.
    pub reported: u32,
}

/// The global model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelStatus {
    /// Round that made it; 0 is the initial model.
    pub round: u32,
    /// Where it is kept.
    pub uri: String,
    /// Lower-case hex.
    pub sha256: String,
}

/// The fixed point of reproducible sums.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FixedPoint {
    /// Steps per unit, a power of two.
    pub scale: f64,
    /// Largest magnitude of an element that a client with the largest weight may send, a power of two.
    pub bound: f64,
}

/// A job that cannot be read or can never succeed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum JobError {
    /// Not a FederatedJob.
    #[error("{path}: {message}")]
    Parse {
        /// Path of the offending field, `.` for the document.
        path: String,
        /// What is wrong with it, with line and column where known.
        message: String,
    },
    /// A value that makes no sense.
    #[error("spec.{field}: {message}")]
    Invalid {
        /// Field below `spec`.
        field: &'static str,
        /// What is wrong, with the value.
        message: String,
    },
}

fn default_over_provision() -> f64 {
    1.3
}

fn default_round_deadline() -> Span {
    Span(std::time::Duration::from_secs(90))
}

fn default_max_weight() -> u64 {
    1_000_000
}

fn default_leaf_fan_in() -> u32 {
    2
}

fn default_dtypes() -> Vec<FloatDtype> {
    vec![FloatDtype::F32, FloatDtype::F16, FloatDtype::BF16]
}

fn default_every() -> u32 {
    1
}

fn default_keep() -> u32 {
    3
}

// === impl UpdateSpec ===

impl Default for UpdateSpec {
    fn default() -> Self {
        Self { kind: UpdateKind::default(), dtypes: default_dtypes(), max_size: None }
    }
}

// === impl AggregationSpec ===

impl Default for AggregationSpec {
    fn default() -> Self {
        Self {
            rule: Rule::default(),
            timing: Timing::default(),
            leaf_fan_in: default_leaf_fan_in(),
            reproducible: false,
        }
    }
}

// === impl FederatedJobSpec ===

impl FederatedJobSpec {
    /// Updates below which a round does not close at its deadline.
    #[must_use]
    pub fn min_clients(&self) -> u32 {
        self.min_clients.unwrap_or(self.clients_per_round)
    }

    /// Clients to select for a round.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a factor in 1..=100 of a u32, saturating"
    )]
    pub fn clients_to_select(&self) -> u32 {
        (f64::from(self.clients_per_round) * self.over_provision).ceil() as u32
    }

    /// The fixed point of a reproducible job; `None` when sums are floats.
    ///
    /// One product `x * weight * scale` stays within 2^51 (there a processor rounds in one step), the sum of a round
    /// within 2^62. An element may be as large as 2^15; where that would leave fewer than 2^20 steps per unit, as 2^10.
    ///
    /// # Errors
    /// [`JobError::Invalid`] when the weights leave fewer than 2^20 steps per unit.
    pub fn fixed_point(&self) -> Result<Option<FixedPoint>, JobError> {
        const STEPS: u32 = 20;
        if !self.aggregation.reproducible {
            return Ok(None);
        }
        let bits = |n: u128| n.max(1).next_power_of_two().trailing_zeros();
        let weight = bits(u128::from(self.max_weight));
        let sum = bits(u128::from(self.max_weight) * u128::from(self.clients_per_round));
        let room = 51u32.saturating_sub(weight).min(61u32.saturating_sub(sum));
        let bound = room.saturating_sub(STEPS).clamp(10, 15);
        let scale = room.saturating_sub(bound);
        if scale < STEPS {
            return Err(JobError::Invalid {
                field: "aggregation.reproducible",
                message: format!(
                    "maxWeight {} and clientsPerRound {} leave 2^{scale} fixed-point steps per unit for elements up to \
                     2^{bound}; at least 2^{STEPS} are needed: lower maxWeight",
                    self.max_weight, self.clients_per_round
                ),
            });
        }
        let power = |exponent: u32| f64::from(exponent).exp2();
        Ok(Some(FixedPoint { scale: power(scale), bound: power(bound) }))
    }
}

// === impl FederatedJob ===

impl FederatedJob {
    /// Reads one YAML document; unknown fields are refused with their path.
    ///
    /// # Errors
    /// [`JobError`] naming path and line, or the field that makes the job impossible.
    pub fn from_yaml(text: &str) -> Result<Self, JobError> {
        let document = serde_yaml_ng::Deserializer::from_str(text);
        let job: Self = serde_path_to_error::deserialize(document)
            .map_err(|e| JobError::Parse { path: e.path().to_string(), message: e.inner().to_string() })?;
        job.validate()?;
        Ok(job)
    }

    /// Namespace, `default` when none is written.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or("default")
    }

    /// Name; empty only for objects that [`FederatedJob::from_yaml`] refuses.
    #[must_use]
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const JOB: &str = "
apiVersion: fl.lifl.dev/v1alpha1
kind: FederatedJob
metadata: {name: digits, namespace: default}
spec:
  model: {name: mlp, initial: {uri: file:///models/mlp.safetensors}}
  update: {kind: Full, dtypes: [F32, F16, BF16], maxSize: 500Mi}
  rounds: 20
  clientsPerRound: 20
  minClients: 10
  overProvision: 1.3
  roundDeadline: 90s
  maxWeight: 1000000
  aggregation: {rule: FedAvg, timing: Eager, leafFanIn: 2, reproducible: false}
  stop: {metric: accuracy, atLeast: 0.95}
  checkpoint: {uri: file:///var/lib/lifl/digits, every: 1, keep: 3}
  ackLevel: Memory
  auth: {tokenSecretRef: {name: digits, key: token}}
";

    #[test]
    fn the_surface_example_is_read() {
        let job = FederatedJob::from_yaml(JOB).unwrap();
        assert_eq!(job.spec.clients_to_select(), 26);
        assert_eq!(job.spec.min_clients(), 10);
        assert_eq!(job.spec.update.max_size, Some(Bytes(500 << 20)));
    }

    #[test]
    fn unknown_fields_are_refused_with_their_path_and_line() {
        let text = JOB.replace("minClients: 10", "minClient: 10");
        let error = FederatedJob::from_yaml(&text).unwrap_err().to_string();
        assert!(error.starts_with("spec") && error.contains("minClient") && error.contains("line"), "{error}");
        let text = JOB.replace("roundDeadline: 90s", "roundDeadline: soon");
        let error = FederatedJob::from_yaml(&text).unwrap_err().to_string();
        assert!(error.contains("spec.roundDeadline") && error.contains("'soon'"), "{error}");
    }

    #[test]
    fn the_fixed_point_fits_products_and_sums() {
        let job = |max_weight: u64, goal: u32| {
            let mut spec = FederatedJob::from_yaml(JOB).unwrap().spec;
            (spec.max_weight, spec.clients_per_round, spec.aggregation.reproducible) = (max_weight, goal, true);
            spec.fixed_point()
        };
        for (max_weight, goal) in [(1, 1), (1000, 20), (1_000_000, 20), (1 << 16, 1000), (1 << 20, 1 << 11)] {
            let fixed = job(max_weight, goal).unwrap().unwrap();
            let product = max_weight as f64 * fixed.bound * fixed.scale;
            assert!(product <= f64::from(51).exp2() && product * f64::from(goal) < f64::from(62).exp2(), "{fixed:?}");
            assert!(fixed.scale >= f64::from(1 << 20) && (1024.0..=32768.0).contains(&fixed.bound), "{fixed:?}");
        }
        assert_eq!(job(1000, 20).unwrap().unwrap(), FixedPoint { scale: f64::from(1 << 26), bound: 32768.0 });
        let error = job(1 << 30, 20).unwrap_err().to_string();
        assert!(error.contains("1073741824") && error.contains("maxWeight"), "{error}");
        assert_eq!(FederatedJob::from_yaml(JOB).unwrap().spec.fixed_point(), Ok(None));
    }
}
