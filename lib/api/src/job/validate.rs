//! What the schema cannot say of a job: values that make no sense, alone or together.

use super::{FederatedJob, FederatedJobSpec, JobError, UpdateKind};
use crate::event::MAX_METRIC_NAME;

/// Clients selected for a round, at most (`clientsPerRound` times `overProvision`): the ledger sets aside up to eleven
/// records of 512 bytes for each of them before the first client joins, 563 MB for this many.
pub const MAX_SELECTED: u32 = 100_000;
/// Longest DNS-1123 label: names become parts of host names and of paths.
const MAX_LABEL: usize = 63;

// === impl FederatedJob ===

impl FederatedJob {
    /// Checks names and spec.
    ///
    /// # Errors
    /// The first field that makes the job impossible.
    pub fn validate(&self) -> Result<(), JobError> {
        label("metadata.name", self.name())?;
        label("metadata.namespace", self.namespace())?;
        self.spec.validate()
    }
}

// === impl FederatedJobSpec ===

impl FederatedJobSpec {
    /// Checks what the schema cannot: values that contradict each other.
    ///
    /// # Errors
    /// The first field that makes the job impossible.
    pub fn validate(&self) -> Result<(), JobError> {
        if self.rounds == 0 {
            return invalid("rounds", "0 rounds train nothing; at least 1".into());
        }
        self.validate_clients()?;
        if self.round_deadline.0.is_zero() {
            return invalid("roundDeadline", "0s leaves no time to train".into());
        }
        if self.max_weight == 0 {
            return invalid("maxWeight", "0 refuses every update".into());
        }
        if self.aggregation.leaf_fan_in == 0 {
            return invalid("aggregation.leafFanIn", "0 updates per leaf; at least 1".into());
        }
        if self.update.dtypes.is_empty() {
            return invalid("update.dtypes", "empty: no update could be accepted".into());
        }
        self.validate_stop()?;
        if self.checkpoint.every == 0 {
            return invalid("checkpoint.every", "0 is no step between rounds; 1 keeps the model of each".into());
        }
        if self.checkpoint.keep == 0 {
            return invalid("checkpoint.keep", "0 would delete the model that the job goes on with; at least 1".into());
        }
        self.fixed_point()?;
        match (&self.model.initial.uri, self.model.initial.from_first_client) {
            (Some(_), true) => invalid("model.initial", "both uri and fromFirstClient are set; choose one".into()),
            (None, false) => invalid("model.initial", "neither uri nor fromFirstClient is set; choose one".into()),
            (None, true) if self.update.kind == UpdateKind::Diff => {
                invalid("model.initial.fromFirstClient", "a Diff has no meaning without a first model".into())
            }
            _ => Ok(()),
        }
    }

    fn validate_clients(&self) -> Result<(), JobError> {
        let goal = self.clients_per_round;
        if goal == 0 {
            return invalid("clientsPerRound", "0 updates make no model; at least 1".into());
        }
        if goal > MAX_SELECTED {
            let message = format!(
                "{goal} is above {MAX_SELECTED}, which is what a round's ledger carries: a digit too many? It is the \
                 updates of one round, not the clients of the job"
            );
            return invalid("clientsPerRound", message);
        }
        let min = self.min_clients();
        if min == 0 || min > goal {
            return invalid("minClients", format!("{min} is not within 1..={goal} (clientsPerRound)"));
        }
        let factor = self.over_provision;
        if !(1.0..=100.0).contains(&factor) {
            let message = format!("{factor} is not within 1..=100: it is a factor of clientsPerRound (1.3: 30 % more)");
            return invalid("overProvision", message);
        }
        let selected = self.clients_to_select();
        if selected > MAX_SELECTED {
            let message = format!(
                "{factor} makes {selected} selected clients of clientsPerRound {goal}; a round's ledger carries \
                 {MAX_SELECTED}: lower one of the two"
            );
            return invalid("overProvision", message);
        }
        Ok(())
    }

    fn validate_stop(&self) -> Result<(), JobError> {
        let Some(stop) = &self.stop else { return Ok(()) };
        if stop.metric.is_empty() || stop.metric.len() > MAX_METRIC_NAME {
            let length = stop.metric.len();
            let message = format!(
                "a name of {length} bytes is not within 1..={MAX_METRIC_NAME}: no such figure is taken from clients"
            );
            return invalid("stop.metric", message);
        }
        if !stop.at_least.is_finite() {
            let message = format!(
                "{} is no finite number, and figures are: it could never be reached or compared; leave out stop to \
                 train all rounds",
                stop.at_least
            );
            return invalid("stop.atLeast", message);
        }
        Ok(())
    }
}

fn invalid(field: &'static str, message: String) -> Result<(), JobError> {
    Err(JobError::Invalid { field, message })
}

/// A DNS-1123 label, as Kubernetes and host names ask for.
fn label(path: &str, text: &str) -> Result<(), JobError> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let why = match text {
        "" => "is empty".to_owned(),
        _ if text.len() > MAX_LABEL => format!("has {} characters, at most {MAX_LABEL} are allowed", text.len()),
        _ if text.starts_with('-') || text.ends_with('-') => "begins or ends with '-'".to_owned(),
        _ => match text.chars().find(|c| !plain(*c)) {
            Some(c) => format!("holds {c:?}"),
            None => return Ok(()),
        },
    };
    let message = format!(
        "{text:?} {why}; a name is 1 to {MAX_LABEL} characters of a-z, 0-9 and '-', first and last no '-' (DNS-1123 \
         label)"
    );
    Err(JobError::Parse { path: path.to_owned(), message })
}

#[cfg(test)]
mod tests {
    use super::{super::tests::JOB, *};

    fn error(from: &str, to: &str) -> String {
        assert!(JOB.contains(from), "{from}");
        FederatedJob::from_yaml(&JOB.replace(from, to)).expect_err(to).to_string()
    }

    #[test]
    fn impossible_values_are_refused_by_name_and_value() {
        let long = format!("metric: {}", "x".repeat(129));
        for (from, to, field, value) in [
            ("rounds: 20", "rounds: 0", "spec.rounds", "0"),
            ("minClients: 10", "minClients: 21", "spec.minClients", "21"),
            ("overProvision: 1.3", "overProvision: 0.5", "spec.overProvision", "0.5"),
            ("overProvision: 1.3", "overProvision: .nan", "spec.overProvision", "NaN"),
            ("overProvision: 1.3", "overProvision: .inf", "spec.overProvision", "inf"),
            ("initial: {uri: file:///models/mlp.safetensors}", "initial: {}", "spec.model.initial", "neither"),
            ("atLeast: 0.95", "atLeast: .inf", "spec.stop.atLeast", "inf"),
            ("atLeast: 0.95", "atLeast: -.inf", "spec.stop.atLeast", "-inf"),
            ("atLeast: 0.95", "atLeast: .nan", "spec.stop.atLeast", "NaN"),
            ("metric: accuracy", "metric: ''", "spec.stop.metric", "0 bytes"),
            ("metric: accuracy", long.as_str(), "spec.stop.metric", "129 bytes"),
            ("clientsPerRound: 20", "clientsPerRound: 10000000", "spec.clientsPerRound", "10000000"),
            ("clientsPerRound: 20", "clientsPerRound: 4294967295", "spec.clientsPerRound", "4294967295"),
            ("clientsPerRound: 20", "clientsPerRound: 80000", "spec.overProvision", "104000"),
            ("every: 1", "every: 0", "spec.checkpoint.every", "0"),
            ("keep: 3", "keep: 0", "spec.checkpoint.keep", "0"),
        ] {
            let error = error(from, to);
            assert!(error.starts_with(&format!("{field}: ")) && error.contains(value), "{to}: {error}");
        }
        assert!(FederatedJob::from_yaml(&JOB.replace("clientsPerRound: 20", "clientsPerRound: 76923")).is_ok());
    }

    #[test]
    fn names_are_labels() {
        let long = "a".repeat(64);
        for bad in ["Digits", "---", "-a", "a-", "x/y z", "", "a.b", "a_b", "ä", "../x", long.as_str()] {
            let error = error("name: digits, namespace", &format!("name: {bad:?}, namespace"));
            assert!(error.starts_with("metadata.name: ") && error.contains(bad), "{bad}: {error}");
            let error = self::error("namespace: default", &format!("namespace: {bad:?}"));
            assert!(error.starts_with("metadata.namespace: ") && error.contains(bad), "{bad}: {error}");
        }
        for good in ["a", "0", "a-b", "7-of-9", &long[..63]] {
            let text = JOB.replace("digits, namespace: default", &format!("{good:?}, namespace: {good:?}"));
            FederatedJob::from_yaml(&text).unwrap();
        }
        let job = FederatedJob::from_yaml(&JOB.replace(", namespace: default", "")).unwrap();
        assert_eq!(job.namespace(), "default");
        let error = self::error("name: digits, namespace", "namespace");
        assert!(error.contains("metadata.name"), "{error}");
    }
}
