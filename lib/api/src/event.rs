//! The fl-update profile: what a model update says of itself, as CloudEvents types and attributes.
//!
//! Attribute names are those of the wire without `ce-`. Values that CloudEvents cannot hold (64-bit numbers, floats)
//! travel as decimal strings.

use std::collections::BTreeMap;

use crate::plan::{Change, Plan};

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
    /// A job's aggregators are to be others than before; its data are [`super::PlanChangedData`].
    pub const PLAN_CHANGED: &str = "dev.lifl.autoscaling.plan.changed.v1";
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

/// `source` of what the platform says of a job.
#[must_use]
pub fn job_source(namespace: &str, job: &str) -> String {
    format!("/namespaces/{namespace}/jobs/{job}")
}

/// Data of [`types::METRICS`].
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MetricsData {
    /// Round whose model was measured: 0 is the initial model.
    pub round: u32,
    /// On how many samples: the weight of these figures in the job's mean.
    pub samples: u64,
    /// Figure by name.
    pub metrics: BTreeMap<String, f64>,
}

/// Data of [`types::AVAILABLE`]; all of it may be absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AvailableData {
    /// `trainer` (default) or `evaluator`: never selected, its metrics alone decide.
    #[serde(default)]
    pub role: ClientRole,
}

/// Data of [`types::PLAN_CHANGED`]. Its event has [`attributes::JOB`] and [`attributes::ROUND`]; `source` is [`job_source`].
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PlanChangedData {
    /// Counts the plans of this job.
    pub revision: u64,
    /// What made the autoscaler plan.
    pub cause: PlanCause,
    /// As it is to be from now on.
    pub plan: Plan,
    /// Against the plan of the revision before; all of it for the first one.
    pub changes: Vec<Change>,
}

/// What makes the autoscaler plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum PlanCause {
    /// A round has begun: its clients are known.
    RoundStarted,
    /// The time between two plans is over.
    Period,
    /// A node joined or left.
    Nodes,
}

// === impl PlanChangedData ===

impl PlanChangedData {
    /// What is to be told when `newer` takes the place of `older`; nothing, if it only has other figures behind it.
    #[must_use]
    pub fn of(older: Option<&Plan>, newer: &Plan, revision: u64, cause: PlanCause) -> Option<Self> {
        let empty = Plan { nodes: BTreeMap::new(), ..newer.clone() };
        let diff = older.unwrap_or(&empty).diff(newer);
        diff.decides().then(|| Self { revision, cause, plan: newer.clone(), changes: diff.changes })
    }

    /// `id` of the event: the same for the same revision, so that who hears it twice knows.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}.plan.{}", self.plan.job, self.revision)
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::plan;

    #[test]
    fn a_plan_is_told_when_it_decides_something_else() {
        let first = PlanChangedData::of(None, &plan(), 1, PlanCause::RoundStarted).unwrap();
        assert_eq!(first.id(), "digits.plan.1");
        assert_eq!(first.changes.len(), plan().nodes.len(), "every node has come: {:?}", first.changes);
        let json = serde_json::to_value(&first).unwrap();
        assert_eq!((&json["cause"], &json["plan"]["goal"]), (&"RoundStarted".into(), &20.into()));
        assert_eq!(serde_json::from_value::<PlanChangedData>(json).unwrap(), first);
        let mut newer = plan();
        newer.nodes.values_mut().for_each(|share| share.why.arrivals += 1.0);
        assert_eq!(PlanChangedData::of(Some(&plan()), &newer, 2, PlanCause::Period), None);
        newer.nodes.remove("n2");
        let told = PlanChangedData::of(Some(&plan()), &newer, 2, PlanCause::Nodes).unwrap();
        assert!(told.changes.iter().any(|change| change.path == "/nodes/n2" && change.after.is_none()));
    }

    #[test]
    fn sources_are_one_below_the_other() {
        assert!(client_source("default", "digits", "alice").starts_with(&job_source("default", "digits")));
    }
}
