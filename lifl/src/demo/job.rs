//! The job that the demo runs: its manifest and its first model.

use super::train::{Mlp, ModelError};

/// Namespace of the demo's job.
pub const NAMESPACE: &str = "default";
/// Name of the demo's job.
pub const NAME: &str = "digits";
/// Updates that make a round.
pub const CLIENTS_PER_ROUND: u32 = 20;
/// Accuracy on the held-out images at which the job is done.
pub const GOAL: f64 = 0.95;
/// Rounds after which it ends even so. The slowest of 40 simulated deals took 28.
pub const ROUNDS: u32 = 40;

/// The FederatedJob, as a person would write it. Four leaves, so that the whole tree is seen at work.
#[must_use]
pub fn job_manifest(model_uri: &str, checkpoint_uri: &str) -> String {
    // A JSON string is a YAML string: whatever is in a path stays in it.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let (model, checkpoint) = (quoted(model_uri), quoted(checkpoint_uri));
    format!(
        "\
apiVersion: fl.lifl.dev/v1alpha1
kind: FederatedJob
metadata: {{name: {NAME}, namespace: {NAMESPACE}}}
spec:
  model: {{name: mlp, initial: {{uri: {model}}}}}
  update: {{kind: Full, dtypes: [F32], maxSize: 1Mi}}
  rounds: {ROUNDS}
  clientsPerRound: {CLIENTS_PER_ROUND}
  minClients: 10
  overProvision: 1.3
  roundDeadline: 30s
  maxWeight: 10000
  aggregation: {{rule: FedAvg, timing: Eager, leafFanIn: 5, reproducible: false}}
  stop: {{metric: accuracy, atLeast: {GOAL}}}
  checkpoint: {{uri: {checkpoint}, every: 1, keep: 3}}
  ackLevel: Memory
"
    )
}

/// The model of round 0, as a safetensors file.
pub fn initial_model(seed: u64) -> Result<Vec<u8>, ModelError> {
    Mlp::new(Mlp::HIDDEN, seed).to_safetensors()
}

#[cfg(test)]
mod tests {
    use lifl_api::job::FederatedJob;

    use super::*;

    #[test]
    fn the_manifest_is_a_valid_job_whatever_the_paths() {
        let uri = "file:///a \"b\"/m: #1.safetensors";
        let job = FederatedJob::from_yaml(&job_manifest(uri, "file:///tmp/x")).expect("valid");
        assert_eq!((job.namespace(), job.name()), (NAMESPACE, NAME));
        let json = serde_json::to_value(&job.spec).expect("JSON");
        assert_eq!(json["model"]["initial"]["uri"], uri);
        assert_eq!(json["stop"]["atLeast"], GOAL);
        assert_eq!(job.spec.clients_to_select(), 26);
        // Four leaves.
        assert_eq!(json["clientsPerRound"].as_u64().expect("number").div_ceil(5), 4);
        assert_eq!(json["aggregation"]["leafFanIn"], 5);
    }

    #[test]
    fn the_first_model_knows_nothing() {
        let file = initial_model(2).expect("written");
        assert!(file.len() < 40_000, "{}", file.len());
        let model = Mlp::from_safetensors(&file).expect("read");
        assert!(model.accuracy(&crate::demo::digits::images()) < 0.3);
    }
}
