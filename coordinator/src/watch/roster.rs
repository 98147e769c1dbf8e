//! Which jobs there are: those of the configuration from the beginning, those of an API server as they come and go.

use std::collections::{BTreeMap, BTreeSet};

use lifl_api::{
    job::{FederatedJobStatus, Phase as Shown},
    node::ToGateway,
};
use lifl_cluster::Key;
use lifl_daemon::Deposit;
use tokio::{
    runtime::Handle,
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    task::JoinSet,
};

use super::{
    DEPOSIT, JOB, Watch, Word,
    cluster::{self, Told},
    deposit_key,
    desk::{self, Desk},
    lock, now,
};
use crate::{
    config::{Config, JobEntry},
    plan::Refusal,
    round::{Change, Event},
    state::{Absent, JobState, Phase, SavedRound, key_of},
    status,
    wish::{Look, Secret, Step, Wish, next_retry, steps},
};

/// A job that only begins again says nothing before it stands where it stood, for so long at most.
const GRACE: i64 = 10_000;

/// A job as it was read, or why it was not.
pub(super) type Read = Result<Box<(JobState, Desk)>, Refusal>;

/// What is known of jobs beside the jobs.
#[derive(Debug)]
pub(super) struct Roster {
    /// Jobs that are read before anyone is heard.
    known: Vec<(JobEntry, Option<String>)>,
    /// Rounds of an earlier life, of jobs that are not read yet.
    saved: BTreeMap<String, SavedRound>,
    /// The way to the API server, if jobs are its objects, and its end until that is opened.
    told: Option<UnboundedSender<Told>>,
    telling: Option<UnboundedReceiver<Told>>,
    edge: JoinSet<()>,
    /// What the API server wishes; `None` before its first word.
    wishes: Option<BTreeMap<Key, Wish>>,
    loading: BTreeSet<Key>,
    /// Jobs that ran when it was counted last.
    running: usize,
}

fn job_key(key: &Key) -> String {
    format!("{JOB}{key}")
}

/// The deposits of an earlier life: rounds under way, and jobs of an API server.
fn restored(deposits: Vec<Deposit>) -> (BTreeMap<String, SavedRound>, Vec<JobEntry>) {
    let (mut rounds, mut jobs) = (BTreeMap::new(), Vec::new());
    for Deposit { key, meta, .. } in deposits {
        let read = if key.starts_with(DEPOSIT) {
            serde_json::from_value(meta).map(|saved| drop(rounds.insert(key.clone(), saved)))
        } else if key.starts_with(JOB) {
            serde_json::from_value(meta).map(|entry| jobs.push(entry))
        } else {
            continue;
        };
        if let Err(error) = read {
            tracing::warn!(key, %error, "deposit of an earlier life");
        }
    }
    (rounds, jobs)
}

// === impl Roster ===

impl Roster {
    pub(super) fn new(config: &Config, deposits: Vec<Deposit>) -> Self {
        let (saved, jobs) = restored(deposits);
        let (told, telling) = mpsc::unbounded_channel();
        let kubernetes = config.kubernetes.is_some();
        let known = if kubernetes {
            jobs.into_iter().map(|entry| (entry, None)).collect()
        } else {
            config.jobs.iter().cloned().zip(config.conflicts()).collect()
        };
        Self {
            known,
            saved,
            told: kubernetes.then_some(told),
            telling: kubernetes.then_some(telling),
            edge: JoinSet::new(),
            wishes: None,
            loading: BTreeSet::new(),
            running: 0,
        }
    }

    /// Begins to hear the API server, if there is one.
    pub(super) fn open(&mut self, config: &Config, words: &UnboundedSender<Word>) {
        if let (Some(kubernetes), Some(telling)) = (config.kubernetes.clone(), self.telling.take()) {
            self.edge.spawn(cluster::run(kubernetes, words.clone(), telling));
        }
    }

    /// When one that could not be read is tried again.
    pub(super) fn next_retry(&self, absent: &BTreeMap<Key, Absent>) -> Option<i64> {
        next_retry(absent, &self.loading)
    }

    /// The API server is to be told of the job's status.
    pub(super) fn hears_of(&self, job: &JobState) -> bool {
        job.unsaid && self.wishes.is_some() && self.told.is_some()
    }

    /// Tells the API server of the job's status, if it changed.
    pub(super) fn publish(&self, job: &mut JobState, now: i64) {
        if !self.hears_of(job) {
            return;
        }
        let key = key_of(job.document());
        let wish = self.wishes.as_ref().and_then(|wishes| wishes.get(&key));
        let stood =
            wish.is_some_and(|wish| [Shown::Running, Shown::Succeeded].into_iter().any(|phase| wish.was(phase)));
        let begins = job.phase() == Phase::Pending && now < job.begun + GRACE;
        if stood && begins {
            return;
        }
        job.unsaid = false;
        let uid = job.document().metadata.uid.clone().unwrap_or_default();
        self.tell(key, uid, job.document().status.clone().unwrap_or_default());
    }

    fn tell(&self, key: Key, uid: String, status: FederatedJobStatus) {
        if let Some(told) = &self.told {
            let _it_ends_with_us = told.send((key, uid, status));
        }
    }
}

// === impl Watch ===

impl Watch {
    /// Reads all jobs that are known from the beginning.
    pub(super) async fn read_known(&mut self) {
        let known = std::mem::take(&mut self.roster.known);
        let mut tasks = Vec::new();
        for (entry, conflict) in known {
            let task = conflict.is_none().then(|| self.load(&entry));
            tasks.push((entry, conflict, task));
        }
        for (entry, conflict, task) in tasks {
            let read = match (conflict, task) {
                (Some(message), _) => Err(Refusal { reason: "Conflict", message }),
                (None, Some(task)) => task.await.unwrap_or_else(|error| Err(crashed(&error))),
                (None, None) => continue,
            };
            let path = &entry.path;
            match read {
                Ok(read) => drop(self.enter(*read)),
                // Its object says what is to become of it.
                Err(refusal) if self.config.kubernetes.is_some() => {
                    tracing::warn!(path, reason = refusal.reason, message = refusal.message, "job is not read");
                }
                Err(refusal) => {
                    tracing::warn!(path, reason = refusal.reason, message = refusal.message, "job is refused");
                    let mute = refusal.reason == "Conflict";
                    let job = JobState::refused(entry.path, entry.document, &refusal, mute, now());
                    lock(&self.jobs).insert(job);
                }
            }
        }
    }

    /// Reads a job on a thread of its own: models are hashed.
    fn load(&mut self, entry: &JobEntry) -> tokio::task::JoinHandle<Read> {
        let gathering = i64::try_from(self.config.gathering_ms).unwrap_or(i64::MAX / 4);
        let key = format!("{DEPOSIT}{}", key_of(&entry.document));
        let (entry, saved) = (entry.clone(), self.roster.saved.remove(&key));
        let runtime = Handle::current();
        tokio::task::spawn_blocking(move || desk::load(entry, saved, gathering, &runtime, now()).map(Box::new))
    }

    fn enter(&mut self, (job, desk): (JobState, Desk)) -> usize {
        let (path, phase, round) = (&job.path, job.phase(), job.committed());
        tracing::info!(path, ?phase, round, "job read");
        let index = lock(&self.jobs).insert(job);
        self.desks.insert(index, desk);
        index
    }

    /// The API server's word.
    pub(super) async fn wished(&mut self, wishes: BTreeMap<Key, Wish>) {
        self.roster.wishes = Some(wishes);
        self.reconcile().await;
    }

    /// A job has ended: another one may wait for its place.
    pub(super) async fn make_room(&mut self) {
        let running = lock(&self.jobs).iter().filter(|job| !job.is_over()).count();
        let before = std::mem::replace(&mut self.roster.running, running);
        if running < before && !lock(&self.jobs).absent.is_empty() {
            self.reconcile().await;
        }
    }

    /// Brings jobs to wishes.
    pub(super) async fn reconcile(&mut self) {
        let (Some(wishes), Some(kubernetes)) = (&self.roster.wishes, &self.config.kubernetes) else { return };
        let todo = {
            let jobs = lock(&self.jobs);
            let at_once = usize::try_from(kubernetes.jobs_at_once).unwrap_or(usize::MAX).max(1);
            steps(&Look { wishes, jobs: &jobs, loading: &self.roster.loading, at_once, now: now() })
        };
        for step in todo {
            match step {
                Step::TakeOn(key) => self.take_on(key),
                Step::Change(index, key) => self.change(index, &key).await,
                Step::End(index) => self.end(index).await,
                Step::Refuse(key, absent) => self.refuse(key, absent),
                Step::Forget(key) => drop(lock(&self.jobs).absent.remove(&key)),
            }
        }
        self.remove_strays();
    }

    fn wish(&self, key: &Key) -> Option<&Wish> {
        self.roster.wishes.as_ref()?.get(key)
    }

    fn take_on(&mut self, key: Key) {
        let Some(wish) = self.wish(&key) else { return };
        let Ok(document) = wish.document.clone() else { return };
        let entry = Box::new(JobEntry { path: status::path(&key), document, join_secret: wish.secret.value() });
        self.roster.loading.insert(key);
        let (task, words) = (self.load(&entry), self.words.clone());
        self.stores.spawn(async move {
            let read = task.await.unwrap_or_else(|error| Err(crashed(&error)));
            drop(words.send(Word::Read(entry, read)));
        });
    }

    /// A job is read, if it is still wished.
    pub(super) async fn read(&mut self, entry: Box<JobEntry>, read: Read) {
        let key = key_of(&entry.document);
        self.roster.loading.remove(&key);
        let wish = self.wish(&key).filter(|wish| entry.document.metadata.uid.as_deref() == Some(wish.uid.as_str()));
        if let Some(wish) = wish.cloned() {
            let before = lock(&self.jobs).absent.remove(&key);
            match read {
                Err(refusal) => {
                    tracing::warn!(
                        path = entry.path,
                        reason = refusal.reason,
                        message = refusal.message,
                        "job is not read"
                    );
                    self.refuse(key, wish.unreadable(&refusal, before.as_ref(), now()));
                }
                Ok(read) => match wish.lost().filter(|_| !read.0.is_over()) {
                    Some(absent) => {
                        tracing::warn!(
                            path = entry.path,
                            "job has succeeded, and its checkpoint is gone: it is not trained again"
                        );
                        self.refuse(key, absent);
                    }
                    None => self.begin(&entry, read).await,
                },
            }
        }
        self.reconcile().await;
    }

    async fn begin(&mut self, entry: &JobEntry, mut read: Box<(JobState, Desk)>) {
        read.0.journal = self.journal;
        self.deposit(&key_of(&entry.document), entry).await;
        let index = self.enter(*read);
        if let Some(node) = self.node {
            self.tell(index, Event::AgentUp(node)).await;
        }
        // Its chain may be there, from an earlier pod of this process.
        if let Some(gateway) = self.gateway.as_ref().filter(|_| self.at_gateway.is_some()) {
            gateway.tell(ToGateway::Greet, None, None);
        }
    }

    async fn deposit(&self, key: &Key, entry: &JobEntry) {
        if let Err(error) = self.child.deposit(&job_key(key), entry, &[]).await {
            tracing::warn!(%key, %error, "deposit");
        }
    }

    fn refuse(&self, key: Key, absent: Absent) {
        self.roster.tell(key.clone(), absent.uid.clone(), absent.status.clone());
        lock(&self.jobs).absent.insert(key, absent);
    }

    async fn change(&mut self, index: usize, key: &Key) {
        let Some(wish) = self.wish(key) else { return };
        let generation = wish.generation;
        let change = match (&wish.document, &wish.secret) {
            (Err(error), _) | (_, Secret::Missing(error)) => Err(error.clone()),
            (Ok(job), secret) => Ok(Change { document: Box::new(job.clone()), join_secret: secret.value() }),
        };
        let entry = |watch: &Self| {
            let jobs = lock(&watch.jobs);
            let job = jobs.get(index)?;
            let mut document = job.document().clone();
            document.status = None;
            Some(JobEntry { path: job.path.clone(), document, join_secret: job.join_secret.clone() })
        };
        let before = entry(self);
        self.tell(index, Event::Changed { generation, change }).await;
        if let Some(entry) = entry(self).filter(|entry| before.as_ref() != Some(entry)) {
            self.deposit(key, &entry).await;
        }
    }

    /// Ends a job. What is in its checkpoint stays.
    async fn end(&mut self, index: usize) {
        let Some(job) = lock(&self.jobs).remove(index) else { return };
        self.desks.remove(&index);
        let key = key_of(job.document());
        self.retire(job.chain().as_slice());
        for deposit in [deposit_key(&job), job_key(&key)] {
            if let Err(error) = self.child.remove(&deposit).await {
                tracing::warn!(deposit, %error, "deposit of a job that is no more");
            }
        }
        self.metrics.forget(&key.namespace, &key.name);
        let round = job.committed();
        tracing::info!(path = job.path, round, "job is no more; its checkpoint stays");
    }

    /// Removes the chains of jobs that went while nobody here heard of it; only when all that is wished is known.
    pub(super) fn remove_strays(&mut self) {
        let (Some(wishes), Some(gateway)) = (&self.roster.wishes, &self.at_gateway) else { return };
        if !self.roster.loading.is_empty() {
            return;
        }
        let strays = lock(&self.jobs).strays(gateway, &self.at_agent, |key| wishes.contains_key(key));
        if !strays.is_empty() {
            tracing::info!(chains = ?strays, "chains of jobs that are no more");
            self.retire(&strays);
        }
    }
}

fn crashed(error: &tokio::task::JoinError) -> Refusal {
    Refusal { reason: "Internal", message: format!("reading the checkpoint: {error}") }
}
