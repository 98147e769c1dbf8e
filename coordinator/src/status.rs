//! What the coordinator says of a job: conditions and documents.

use jiff::Timestamp;
use lifl_api::job::{FederatedJobStatus, JobCondition};
use lifl_cluster::Key;
use serde_json::{Value, json};

use crate::state::{JobState, Phase};

/// Types of conditions.
pub(crate) mod kind {
    /// The job is admitted and its aggregators run.
    pub(crate) const READY: &str = "Ready";
    /// Rounds come along.
    pub(crate) const PROGRESSING: &str = "Progressing";
    /// The job has succeeded.
    pub(crate) const SUCCEEDED: &str = "Succeeded";
    /// The newest checkpoint could be read back.
    pub(crate) const CHECKPOINT: &str = "CheckpointIntact";
    /// The latest change of the spec is followed.
    pub(crate) const SPEC: &str = "SpecAccepted";
}

/// Longest message of a condition, bytes: some quote what clients sent, and all of them are in every status.
const MAX_MESSAGE: usize = 2048;

/// Milliseconds since the Unix epoch as RFC 3339.
fn rfc3339(now: i64) -> String {
    Timestamp::from_millisecond(now).unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

/// Sets a condition; the time of its last transition stays while its status does. Tells whether anything changed.
pub(crate) fn set_condition(
    status: &mut FederatedJobStatus,
    kind: &str,
    value: bool,
    reason: &str,
    mut message: String,
    now: i64,
) -> bool {
    if message.len() > MAX_MESSAGE {
        message.truncate(message.floor_char_boundary(MAX_MESSAGE));
        message.push_str(" [...]");
    }
    let value = if value { "True" } else { "False" };
    let mut condition = JobCondition {
        kind: kind.to_owned(),
        status: value.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: rfc3339(now),
        observed_generation: Some(status.observed_generation).filter(|generation| *generation > 0),
    };
    match status.conditions.iter_mut().find(|c| c.kind == kind) {
        Some(old) => {
            if old.status == condition.status {
                condition.last_transition_time.clone_from(&old.last_transition_time);
            }
            let changed = *old != condition;
            *old = condition;
            changed
        }
        None => {
            status.conditions.push(condition);
            status.conditions.sort_by(|a, b| a.kind.cmp(&b.kind));
            true
        }
    }
}

/// Where the job of an API server was read, for people.
pub(crate) fn path(key: &Key) -> String {
    format!("federatedjob/{key}")
}

/// One job as the admin page shows it.
#[must_use]
pub(crate) fn document(job: &JobState) -> Value {
    let plan = job.plan.plan.as_ref();
    let over = matches!(job.phase, Phase::Succeeded | Phase::Failed);
    json!({
        "path": job.path,
        "job": job.document,
        "chain": job.chain,
        "leaves": plan.map_or(0, |p| p.tree.leaves.len()),
        "middle": plan.map_or(0, |p| u32::from(p.tree.middle.is_some())),
        "top": u32::from(plan.is_some()),
        "aggregatorsRun": plan.is_some() && !over,
        "aggregatorsReplaced": job.members_died,
        "rounds": job.history,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_transition_time_changes_with_the_status_only() {
        let mut status = FederatedJobStatus::default();
        assert!(set_condition(&mut status, "Ready", true, "Planned", "a".into(), 1_000));
        assert!(!set_condition(&mut status, "Ready", true, "Planned", "a".into(), 2_000));
        assert!(set_condition(&mut status, "Ready", true, "Planned", "b".into(), 3_000));
        assert_eq!(status.conditions[0].last_transition_time, "1970-01-01T00:00:01Z");
        assert!(set_condition(&mut status, "Ready", false, "Gone", "b".into(), 4_000));
        assert_eq!(status.conditions[0].last_transition_time, "1970-01-01T00:00:04Z");
        assert_eq!(status.conditions.len(), 1);
    }

    #[test]
    fn messages_are_cut_between_characters() {
        let mut status = FederatedJobStatus::default();
        set_condition(&mut status, "Ready", false, "Failed", "a".to_owned() + &"ä".repeat(1 << 20), 1_000);
        let message = &status.conditions[0].message;
        assert!(message.ends_with("ä [...]") && message.len() <= MAX_MESSAGE + 6, "{}", message.len());
    }
}
