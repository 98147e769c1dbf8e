//! When which status is written to an API server. Pure: `now` is passed in.
//!
//! One write at a time for each job, and one a second: a status says where a job stands, not what happened. A change of
//! phase does not wait. What cannot be written is kept, only the newest of it.

use std::collections::BTreeMap;

use lifl_api::job::{FederatedJobStatus, Phase};
use lifl_cluster::Key;

use crate::backoff::{RETRY_MOST, backoff_up_to};

/// Writes of one status are so far apart.
const PAUSE: i64 = 1_000;

/// The statuses that are to be written.
#[derive(Debug, Default)]
pub(crate) struct Scribe {
    lines: BTreeMap<Key, Line>,
}

#[derive(Debug)]
struct Line {
    uid: String,
    wished: FederatedJobStatus,
    /// What was written last differs from it.
    unwritten: bool,
    /// Being written.
    busy: bool,
    /// Phase of the last write.
    phase: Option<Phase>,
    /// No write begins before; changes of phase are bound by `refused_until` only.
    not_before: i64,
    refused_until: i64,
    failures: u32,
}

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is there.
    Written,
    /// The object was changed meanwhile.
    Stale,
    /// The object is no more, or another of its name.
    Gone,
    /// The API server did not take it.
    Failed,
}

// === impl Scribe ===

impl Scribe {
    /// This is to be there.
    pub(crate) fn wish(&mut self, key: Key, uid: String, status: FederatedJobStatus) {
        match self.lines.get_mut(&key).filter(|line| line.uid == uid) {
            Some(line) => {
                line.unwritten |= line.wished != status;
                line.wished = status;
            }
            None => {
                let line = Line {
                    uid,
                    wished: status,
                    unwritten: true,
                    busy: false,
                    phase: None,
                    not_before: 0,
                    refused_until: 0,
                    failures: 0,
                };
                self.lines.insert(key, line);
            }
        }
    }

    /// Writes that may begin now.
    pub(crate) fn due(&mut self, now: i64) -> Vec<(Key, String, FederatedJobStatus)> {
        let mut due = Vec::new();
        for (key, line) in self.lines.iter_mut().filter(|(_, line)| line.at().is_some_and(|at| at <= now)) {
            (line.busy, line.unwritten, line.phase) = (true, false, Some(line.wished.phase));
            line.not_before = now + PAUSE;
            due.push((key.clone(), line.uid.clone(), line.wished.clone()));
        }
        due
    }

    /// When [`Scribe::due`] has something, if nothing else happens before.
    pub(crate) fn wake(&self) -> Option<i64> {
        self.lines.values().filter_map(Line::at).min()
    }

    /// How a write ended.
    pub(crate) fn ended(&mut self, key: &Key, uid: &str, outcome: Outcome, now: i64) {
        let Some(line) = self.lines.get_mut(key).filter(|line| line.uid == uid) else { return };
        line.busy = false;
        match outcome {
            Outcome::Written => line.failures = 0,
            Outcome::Gone => drop(self.lines.remove(key)),
            Outcome::Stale | Outcome::Failed => {
                line.unwritten = true;
                line.refused_until = now + backoff_up_to(RETRY_MOST, line.failures);
                line.failures = line.failures.saturating_add(1);
            }
        }
    }

    /// The object is not what it was: what its old form refused may be tried.
    pub(crate) fn seen_anew(&mut self, key: &Key) {
        if let Some(line) = self.lines.get_mut(key) {
            line.refused_until = 0;
        }
    }

    /// Of jobs that are no more nothing is written.
    pub(crate) fn retain(&mut self, is_there: impl Fn(&Key) -> bool) {
        self.lines.retain(|key, line| line.busy || is_there(key));
    }
}

// === impl Line ===

impl Line {
    fn at(&self) -> Option<i64> {
        let urgent = self.phase != Some(self.wished.phase);
        let at = if urgent { self.refused_until } else { self.not_before.max(self.refused_until) };
        (self.unwritten && !self.busy).then_some(at)
    }
}

/// What is written over `seen`: a condition's time is that of its last transition, whoever noted it, and figures of the
/// model that is still there are not forgotten by a coordinator that began anew.
pub(crate) fn over(seen: Option<&FederatedJobStatus>, mut status: FederatedJobStatus) -> FederatedJobStatus {
    let Some(seen) = seen else { return status };
    for condition in &mut status.conditions {
        let old = seen.conditions.iter().find(|old| (&old.kind, &old.status) == (&condition.kind, &condition.status));
        if let Some(old) = old {
            condition.last_transition_time.clone_from(&old.last_transition_time);
        }
    }
    if status.metrics.is_empty() && status.model == seen.model {
        status.metrics.clone_from(&seen.metrics);
    }
    status
}

#[cfg(test)]
mod tests {
    use lifl_api::job::JobCondition;

    use super::*;

    fn key() -> Key {
        Key { namespace: "fl".into(), name: "digits".into() }
    }

    fn status(phase: Phase, round: u32) -> FederatedJobStatus {
        FederatedJobStatus { phase, round, ..FederatedJobStatus::default() }
    }

    fn rounds(due: Vec<(Key, String, FederatedJobStatus)>) -> Vec<u32> {
        due.into_iter().map(|(_, _, status)| status.round).collect()
    }

    #[test]
    fn a_status_is_written_once_a_second_and_a_phase_at_once() {
        let mut scribe = Scribe::default();
        scribe.wish(key(), "u".into(), status(Phase::Running, 1));
        assert_eq!(rounds(scribe.due(100)), [1]);
        assert!(scribe.due(100).is_empty() && scribe.wake().is_none(), "one at a time");
        scribe.wish(key(), "u".into(), status(Phase::Running, 2));
        scribe.ended(&key(), "u", Outcome::Written, 150);
        scribe.wish(key(), "u".into(), status(Phase::Running, 3));
        assert_eq!((scribe.due(1_099).len(), scribe.wake()), (0, Some(1_100)));
        assert_eq!(rounds(scribe.due(1_100)), [3], "the newest only");
        scribe.ended(&key(), "u", Outcome::Written, 1_110);
        scribe.wish(key(), "u".into(), status(Phase::Running, 3));
        assert_eq!(scribe.wake(), None, "it is there");
        scribe.wish(key(), "u".into(), status(Phase::Succeeded, 3));
        assert_eq!(rounds(scribe.due(1_111)), [3]);
    }

    #[test]
    fn what_fails_is_kept_and_tried_ever_more_rarely() {
        let mut scribe = Scribe::default();
        scribe.wish(key(), "u".into(), status(Phase::Running, 1));
        let (mut now, mut waits) = (0, Vec::new());
        for _ in 0..8 {
            assert_eq!(scribe.due(now).len(), 1);
            scribe.ended(&key(), "u", Outcome::Failed, now);
            let at = scribe.wake().unwrap();
            waits.push(at - now);
            now = at;
        }
        assert_eq!(waits, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000, 30_000]);
        scribe.wish(key(), "u".into(), status(Phase::Succeeded, 9));
        assert_eq!(rounds(scribe.due(now)), [9]);
        scribe.ended(&key(), "u", Outcome::Written, now);
        assert_eq!(scribe.wake(), None);
    }

    #[test]
    fn a_conflict_is_tried_again_when_the_object_is_seen() {
        let mut scribe = Scribe::default();
        scribe.wish(key(), "u".into(), status(Phase::Running, 1));
        scribe.due(0);
        scribe.ended(&key(), "u", Outcome::Stale, 10);
        assert_eq!(scribe.wake(), Some(1_010));
        scribe.wish(key(), "u".into(), status(Phase::Failed, 1));
        scribe.seen_anew(&key());
        assert_eq!(rounds(scribe.due(11)), [1]);
    }

    #[test]
    fn jobs_that_are_gone_are_forgotten_and_their_successors_are_not_mistaken() {
        let mut scribe = Scribe::default();
        scribe.wish(key(), "u".into(), status(Phase::Running, 1));
        scribe.due(0);
        scribe.wish(key(), "v".into(), status(Phase::Pending, 0));
        scribe.ended(&key(), "u", Outcome::Gone, 5);
        assert_eq!(scribe.due(5).into_iter().map(|(_, uid, _)| uid).collect::<Vec<_>>(), ["v"]);
        scribe.ended(&key(), "v", Outcome::Gone, 6);
        assert!(scribe.lines.is_empty());
        scribe.wish(key(), "w".into(), status(Phase::Running, 1));
        scribe.retain(|_| false);
        assert!(scribe.lines.is_empty());
    }

    #[test]
    fn what_stands_there_keeps_its_times_and_its_figures() {
        let condition = |status: &str, at: &str| JobCondition {
            kind: "Ready".into(),
            status: status.into(),
            reason: "r".into(),
            message: "m".into(),
            last_transition_time: at.into(),
            observed_generation: None,
        };
        let mut seen = status(Phase::Running, 3);
        seen.conditions = vec![condition("True", "then")];
        seen.metrics = [("accuracy".to_owned(), 0.5)].into();
        for (value, at) in [("True", "then"), ("False", "now")] {
            let next = FederatedJobStatus { conditions: vec![condition(value, "now")], ..status(Phase::Running, 3) };
            let written = over(Some(&seen), next.clone());
            assert_eq!((written.conditions[0].last_transition_time.as_str(), &written.metrics), (at, &seen.metrics));
            assert_eq!(over(None, next.clone()), next);
        }
    }
}
