//! The Secrets that jobs name: which is read when. Pure: `now` is passed in.
//!
//! They are read one by one, by name: whoever may list Secrets has all of them. So nobody says when one changes, and they
//! are read again now and then.

use std::collections::BTreeMap;

use lifl_api::job::SecretRef;
use lifl_cluster::Key;

use crate::{
    backoff::{RETRY_MOST, backoff_up_to},
    wish::Secret,
};

/// One that was read is read again after this.
const AGAIN: i64 = 60_000;

/// The Secrets of all jobs, by job.
#[derive(Debug, Default)]
pub(crate) struct Secrets {
    by_job: BTreeMap<Key, Entry>,
}

#[derive(Debug)]
struct Entry {
    reference: SecretRef,
    generation: i64,
    value: Secret,
    busy: bool,
    at: i64,
    failures: u32,
}

/// A key of a Secret that is to be read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reading {
    pub(crate) job: Key,
    pub(crate) reference: SecretRef,
    /// Of the spec that asks for it: what an older one asked for may be the value before.
    generation: i64,
}

/// Why a Secret was not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unread {
    /// It is not there, or not for us.
    Missing(String),
    /// Nobody could tell.
    Away(String),
}

// === impl Secrets ===

impl Secrets {
    /// The job names this Secret. A new spec has it read at once: who changed both changed the Secret first.
    pub(crate) fn want(&mut self, job: &Key, generation: i64, reference: &SecretRef) {
        let entry = self.by_job.entry(job.clone()).or_insert_with(|| Entry {
            reference: reference.clone(),
            generation,
            value: Secret::Unknown,
            busy: false,
            at: 0,
            failures: 0,
        });
        let another = entry.reference != *reference;
        if another {
            (entry.value, entry.reference) = (Secret::Unknown, reference.clone());
        }
        if another || entry.generation != generation {
            (entry.generation, entry.busy, entry.at, entry.failures) = (generation, false, 0, 0);
        }
    }

    /// The job names none.
    pub(crate) fn forget(&mut self, job: &Key) {
        self.by_job.remove(job);
    }

    /// What the job's Secret holds.
    pub(crate) fn of(&self, job: &Key) -> Secret {
        self.by_job.get(job).map_or(Secret::None, |entry| entry.value.clone())
    }

    /// What is to be read now.
    pub(crate) fn due(&mut self, now: i64) -> Vec<Reading> {
        let due = self.by_job.iter_mut().filter(|(_, entry)| !entry.busy && entry.at <= now);
        let reading = |(job, entry): (&Key, &mut Entry)| {
            entry.busy = true;
            Reading { job: job.clone(), reference: entry.reference.clone(), generation: entry.generation }
        };
        due.map(reading).collect()
    }

    /// When [`Secrets::due`] has something.
    pub(crate) fn wake(&self) -> Option<i64> {
        self.by_job.values().filter(|entry| !entry.busy).map(|entry| entry.at).min()
    }

    /// What was read, or why not; whether the job has another Secret by it.
    pub(crate) fn read(&mut self, reading: &Reading, found: Result<String, Unread>, now: i64) -> bool {
        let is_asked = |entry: &&mut Entry| {
            entry.busy && (entry.generation, &entry.reference) == (reading.generation, &reading.reference)
        };
        let Some(entry) = self.by_job.get_mut(&reading.job).filter(is_asked) else { return false };
        entry.busy = false;
        let value = match found {
            Ok(value) => {
                (entry.at, entry.failures) = (now + AGAIN, 0);
                Secret::Here(value)
            }
            Err(why) => {
                entry.at = now + backoff_up_to(RETRY_MOST, entry.failures);
                entry.failures = entry.failures.saturating_add(1);
                // A job that has its Secret keeps it: an API server that is away takes nothing from it.
                match (&entry.value, why) {
                    (Secret::Here(value), Unread::Away(_)) => Secret::Here(value.clone()),
                    (_, Unread::Missing(why) | Unread::Away(why)) => Secret::Missing(why),
                }
            }
        };
        let changed = entry.value != value;
        entry.value = value;
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Key {
        Key { namespace: "fl".into(), name: "digits".into() }
    }

    fn reference(key: &str) -> SecretRef {
        SecretRef { name: "s".into(), key: key.into() }
    }

    #[test]
    fn a_missing_secret_is_looked_for_until_it_is_there() {
        let mut secrets = Secrets::default();
        assert_eq!(secrets.of(&job()), Secret::None);
        secrets.want(&job(), 1, &reference("token"));
        assert_eq!(secrets.of(&job()), Secret::Unknown);
        let mut now = 0;
        for wait in [1_000, 2_000, 4_000] {
            let reading = secrets.due(now).remove(0);
            assert!(secrets.due(now).is_empty() && secrets.wake().is_none());
            secrets.read(&reading, Err(Unread::Missing("it is not there".into())), now);
            assert_eq!(
                (secrets.of(&job()), secrets.wake()),
                (Secret::Missing("it is not there".into()), Some(now + wait))
            );
            now += wait;
        }
        let reading = secrets.due(now).remove(0);
        assert!(secrets.read(&reading, Ok("hunter2".into()), now));
        assert_eq!((secrets.of(&job()), secrets.wake()), (Secret::Here("hunter2".into()), Some(now + AGAIN)));
        // What is there is not lost by an API server that is not; and another value is seen.
        now += AGAIN;
        let reading = secrets.due(now).remove(0);
        assert!(!secrets.read(&reading, Err(Unread::Away("away".into())), now));
        assert_eq!(secrets.of(&job()), Secret::Here("hunter2".into()));
        let reading = secrets.due(now + 1_000).remove(0);
        assert!(secrets.read(&reading, Ok("*******".into()), now));
    }

    #[test]
    fn a_secret_that_is_taken_away_is_missing_although_it_was_here() {
        let mut secrets = Secrets::default();
        secrets.want(&job(), 1, &reference("token"));
        let reading = secrets.due(0).remove(0);
        secrets.read(&reading, Ok("hunter2".into()), 0);
        let reading = secrets.due(AGAIN).remove(0);
        assert!(secrets.read(&reading, Err(Unread::Missing("it is not there".into())), AGAIN));
        assert_eq!(
            (secrets.of(&job()), secrets.wake()),
            (Secret::Missing("it is not there".into()), Some(AGAIN + 1_000))
        );
    }

    #[test]
    fn another_reference_is_another_secret_and_a_new_spec_has_it_read() {
        let mut secrets = Secrets::default();
        secrets.want(&job(), 1, &reference("token"));
        let first = secrets.due(0).remove(0);
        secrets.want(&job(), 2, &reference("other"));
        assert!(!secrets.read(&first, Ok("of the old one".into()), 0), "an answer that comes too late");
        let second = secrets.due(0).remove(0);
        assert_eq!(second.reference, reference("other"));
        secrets.read(&second, Ok("a".into()), 0);
        assert!(secrets.due(1).is_empty());
        secrets.want(&job(), 3, &reference("other"));
        assert_eq!(secrets.of(&job()), Secret::Here("a".into()));
        let third = secrets.due(1).remove(0);
        // The spec changes again before the answer comes: it is read again at once, and the answer may be the old value.
        secrets.want(&job(), 4, &reference("other"));
        let fourth = secrets.due(1).remove(0);
        assert!(!secrets.read(&third, Ok("of the old one".into()), 1));
        assert!(secrets.read(&fourth, Ok("b".into()), 1));
        assert_eq!(secrets.of(&job()), Secret::Here("b".into()));
        secrets.forget(&job());
        assert_eq!((secrets.of(&job()), secrets.wake()), (Secret::None, None));
    }
}
