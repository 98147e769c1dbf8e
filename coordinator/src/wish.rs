//! What an API server wishes against what is here: which jobs begin, change and end. Pure, from the whole of both.
//!
//! ```text
//!  wish --- readable, Secret here, room ---> loading ---> job --- spec differs ---> change, or why not
//!    |                                          |          `---- wish gone ------> end
//!    `--> absent: its status says why  <--------'  tried again, where what is missing is not in the spec
//! ```

use std::collections::{BTreeMap, BTreeSet};

use lifl_api::job::{FederatedJob, FederatedJobSpec, FederatedJobStatus, Phase as Shown};
use lifl_cluster::Key;

use crate::{
    backoff::{RETRY_MOST, backoff_up_to},
    plan::Refusal,
    state::{Absent, JobState, Jobs, key_of},
    status::{kind, set_condition},
};

/// One FederatedJob of an API server.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wish {
    pub(crate) uid: String,
    pub(crate) generation: i64,
    /// RFC 3339: who came first begins first.
    pub(crate) created: String,
    /// The job, or what is wrong with it.
    pub(crate) document: Result<FederatedJob, String>,
    pub(crate) secret: Secret,
    pub(crate) status: Option<FederatedJobStatus>,
}

/// The value of `auth.tokenSecretRef`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Secret {
    /// None is asked for.
    None,
    /// It is being read.
    Unknown,
    /// It is this.
    Here(String),
    /// It cannot be had: why.
    Missing(String),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    /// Read its checkpoint, then it is a job.
    TakeOn(Key),
    /// Tell the job of its new spec or Secret.
    Change(usize, Key),
    /// End the job.
    End(usize),
    /// Say why it does not run.
    Refuse(Key, Absent),
    /// Nothing is to be said of it any more.
    Forget(Key),
}

/// All that [`steps`] looks at.
#[derive(Debug)]
pub(crate) struct Look<'a> {
    pub(crate) wishes: &'a BTreeMap<Key, Wish>,
    pub(crate) jobs: &'a Jobs,
    /// Jobs whose checkpoints are being read.
    pub(crate) loading: &'a BTreeSet<Key>,
    pub(crate) at_once: usize,
    pub(crate) now: i64,
}

/// What brings jobs to wishes. Each step is one that is still right when those before it are done.
pub(crate) fn steps(look: &Look<'_>) -> Vec<Step> {
    let (mut steps, mut candidates) = (Vec::new(), Vec::new());
    let mut running = look.loading.len();
    let mut held = BTreeSet::new();
    for (index, job) in look.jobs.numbered() {
        let Some(uid) = job.document().metadata.uid.as_deref() else { continue };
        let key = key_of(job.document());
        let wish = look.wishes.get(&key).filter(|wish| wish.uid == uid);
        // What it could not follow, because of a Secret say, it is told again: it may by now.
        let differs = |wish: &Wish| wish.generation != job.followed() || wish.turns_secret_of(job);
        let differs = wish.is_some_and(differs);
        match wish {
            // One that is over begins anew with another spec, from its checkpoint.
            Some(wish) if !(job.is_over() && wish.generation != job.generation()) => {
                running += usize::from(!job.is_over());
                if differs && !job.is_over() && wish.secret != Secret::Unknown {
                    steps.push(Step::Change(index, key.clone()));
                }
                held.insert(key);
            }
            _ => steps.push(Step::End(index)),
        }
    }
    for (key, wish) in look.wishes {
        if !held.contains(key) && !look.loading.contains(key) {
            candidates.push((&wish.created, key, wish));
        }
    }
    candidates.sort_by_key(|(created, key, _)| (*created, *key));
    for (_, key, wish) in candidates {
        let known =
            look.jobs.absent.get(key).filter(|a| (a.uid.as_str(), a.generation) == (&wish.uid, wish.generation));
        if known.and_then(|absent| absent.retry_at).is_some_and(|at| look.now < at) {
            continue;
        }
        match candidate(wish, running >= look.at_once, look) {
            None => {}
            Some(Ok(())) => {
                running += usize::from(!wish.was(Shown::Succeeded));
                steps.push(Step::TakeOn(key.clone()));
            }
            Some(Err(absent)) if known.is_none_or(|known| !same(&known.status, &absent.status)) => {
                steps.push(Step::Refuse(key.clone(), absent));
            }
            Some(Err(_said_already)) => {}
        }
    }
    let unwished = look.jobs.absent.keys().filter(|key| !look.wishes.contains_key(*key) || held.contains(*key));
    steps.extend(unwished.cloned().map(Step::Forget));
    steps
}

/// When [`steps`] has something to try again. What is being read already has passed its time, and would be waited for at every tick.
pub(crate) fn next_retry(absent: &BTreeMap<Key, Absent>, loading: &BTreeSet<Key>) -> Option<i64> {
    let waiting = absent.iter().filter(|(key, _)| !loading.contains(*key));
    waiting.filter_map(|(_, absent)| absent.retry_at).min()
}

/// Whether a job that is not here can begin; `None`: that is not known yet.
fn candidate(wish: &Wish, full: bool, look: &Look<'_>) -> Option<Result<(), Absent>> {
    if let Err(message) = &wish.document {
        return Some(Err(wish.failed("Invalid", message, look.now)));
    }
    // What has failed once is not tried again with every life of this process: its spec must change.
    if let Some(status) = wish.status.as_ref().filter(|_| wish.was(Shown::Failed)) {
        return Some(Err(wish.absent(status.clone())));
    }
    match &wish.secret {
        Secret::Unknown => return None,
        Secret::Missing(why) => return Some(Err(wish.waiting("SecretMissing", why, look.now))),
        Secret::None | Secret::Here(_) => {}
    }
    // One that has succeeded is only served.
    if full && !wish.was(Shown::Succeeded) {
        let message = format!(
            "{} jobs run already, into so many shares the node's memory is divided: it begins when one of them has ended",
            look.at_once
        );
        return Some(Err(wish.waiting("NodeFull", &message, look.now)));
    }
    Some(Ok(()))
}

/// Equal but for the times.
fn same(a: &FederatedJobStatus, b: &FederatedJobStatus) -> bool {
    let timeless = |status: &FederatedJobStatus| {
        let mut status = status.clone();
        status.conditions.iter_mut().for_each(|condition| condition.last_transition_time.clear());
        status
    };
    timeless(a) == timeless(b)
}

/// Paths of the fields that a running job cannot follow: its ledger, its aggregators and its clients rest on them.
pub(crate) fn fixed(old: &FederatedJobSpec, new: &FederatedJobSpec) -> Vec<&'static str> {
    let weights = !old.aggregation.reproducible || old.max_weight == new.max_weight;
    let fields = [
        ("spec.model.name", old.model.name == new.model.name),
        ("spec.model.initial", old.model.initial == new.model.initial),
        ("spec.update", old.update == new.update),
        ("spec.clientsPerRound", old.clients_per_round == new.clients_per_round),
        ("spec.overProvision", old.over_provision.total_cmp(&new.over_provision).is_eq()),
        ("spec.maxWeight", weights),
        ("spec.aggregation", old.aggregation == new.aggregation),
        ("spec.checkpoint.uri", old.checkpoint.uri == new.checkpoint.uri),
        ("spec.ackLevel", old.ack_level == new.ack_level),
    ];
    fields.into_iter().filter(|(_, same)| !same).map(|(path, _)| path).collect()
}

// === impl Secret ===

impl Secret {
    /// What it holds, if it is asked for and here.
    pub(crate) fn value(&self) -> Option<String> {
        match self {
            Self::Here(value) => Some(value.clone()),
            _ => None,
        }
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Unknown => f.write_str("Unknown"),
            Self::Here(_) => f.write_str("Here"),
            Self::Missing(why) => f.debug_tuple("Missing").field(why).finish(),
        }
    }
}

// === impl Wish ===

impl Wish {
    /// Its status, as far as it speaks of this very spec, has this phase.
    pub(crate) fn was(&self, phase: Shown) -> bool {
        let now = |status: &FederatedJobStatus| status.observed_generation == self.generation && status.phase == phase;
        self.status.as_ref().is_some_and(now)
    }

    fn turns_secret_of(&self, job: &JobState) -> bool {
        matches!(&self.secret, Secret::Here(value) if job.join_secret.as_ref() != Some(value))
    }

    fn absent(&self, status: FederatedJobStatus) -> Absent {
        Absent { uid: self.uid.clone(), generation: self.generation, status, retry_at: None, failures: 0 }
    }

    /// It can never run so.
    pub(crate) fn failed(&self, reason: &str, message: &str, now: i64) -> Absent {
        self.refused(Shown::Failed, &[kind::READY, kind::PROGRESSING, kind::SUCCEEDED], reason, message, now)
    }

    /// It cannot run yet.
    fn waiting(&self, reason: &str, message: &str, now: i64) -> Absent {
        self.refused(Shown::Pending, &[kind::READY, kind::PROGRESSING], reason, message, now)
    }

    fn refused(&self, phase: Shown, kinds: &[&str], reason: &str, message: &str, now: i64) -> Absent {
        let mut status = self.status.clone().unwrap_or_default();
        (status.observed_generation, status.phase) = (self.generation, phase);
        status.conditions.clear();
        for kind in kinds {
            set_condition(&mut status, kind, false, reason, message.to_owned(), now);
        }
        self.absent(status)
    }

    /// Its checkpoint or its first model cannot be read: a volume may come, another coordinator may go.
    pub(crate) fn unreadable(&self, refusal: &Refusal, before: Option<&Absent>, now: i64) -> Absent {
        if refusal.reason == "Invalid" {
            return self.failed(refusal.reason, &refusal.message, now);
        }
        let failures =
            before.filter(|a| (&a.uid, a.generation) == (&self.uid, self.generation)).map_or(0, |a| a.failures);
        let message = format!("{} (paths are those of the coordinator's container)", refusal.message);
        let mut absent = self.waiting(refusal.reason, &message, now);
        (absent.retry_at, absent.failures) = (Some(now + backoff_up_to(RETRY_MOST, failures)), failures + 1);
        absent
    }

    /// It succeeded, and its checkpoint does not say so: it is not trained again.
    pub(crate) fn lost(&self) -> Option<Absent> {
        self.status.clone().filter(|_| self.was(Shown::Succeeded)).map(|status| self.absent(status))
    }
}

#[cfg(test)]
mod tests;
