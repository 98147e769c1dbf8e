//! The edge to an API server: wishes come from there, statuses go there. It may be away for as long as it likes.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use k8s_openapi::api::core::v1;
use lifl_api::job::{FederatedJobStatus, JobObject};
use lifl_cluster::{Client, Key, Objects, ReadError, Selection, StatusWrite, Store, Writer, connect, get};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender},
    task::JoinSet,
    time::Instant,
};

use super::{Word, now, sleep};
use crate::{
    config::Kubernetes,
    scribe::{Outcome, Scribe, over},
    secrets::{Reading, Secrets, Unread},
    wish::Wish,
};

/// Credentials that do not serve are read again after this.
const PAUSE: Duration = Duration::from_secs(5);
/// An answer that does not come within this counts as none.
const PATIENCE: Duration = Duration::from_secs(15);
/// Under this name the API server notes what is written.
const MANAGER: &str = "lifl-coordinator";

/// A status that is to be written: of which object.
pub(super) type Told = (Key, String, FederatedJobStatus);

/// The end of a call.
enum Done {
    Written(Key, String, Outcome, Option<Box<JobObject>>),
    Read(Reading, Result<String, Unread>),
}

struct Edge {
    client: Client,
    writer: Writer,
    objects: Arc<Objects<JobObject>>,
    /// What was written since the store last said something of it.
    written: BTreeMap<Key, Arc<JobObject>>,
    wishes: BTreeMap<Key, Wish>,
    secrets: Secrets,
    scribe: Scribe,
    calls: JoinSet<Done>,
}

/// Serves as long as the coordinator does.
pub(super) async fn run(config: Kubernetes, words: UnboundedSender<Word>, mut told: UnboundedReceiver<Told>) {
    let client = loop {
        match connect(config.kubeconfig.as_deref()).await {
            Ok(client) => break client,
            Err(error) => tracing::error!(%error, "no way to the API server; jobs that are here go on"),
        }
        tokio::time::sleep(PAUSE).await;
    };
    let (mut store, keeper) = Store::<JobObject>::open(&client, &Selection::default()).await;
    tokio::spawn(keeper.run().boxed());
    let mut edge = Edge {
        writer: Writer::new(client.clone(), MANAGER),
        client,
        objects: Arc::default(),
        written: BTreeMap::new(),
        wishes: BTreeMap::new(),
        secrets: Secrets::default(),
        scribe: Scribe::default(),
        calls: JoinSet::new(),
    };
    edge.look(store.snapshot());
    loop {
        // The first one also tells that the list is whole.
        if words.send(Word::Wished(edge.wishes.clone())).is_err() {
            return;
        }
        loop {
            edge.begin();
            let wake = [edge.scribe.wake(), edge.secrets.wake()].into_iter().flatten().min();
            let wake = wake.map(|at| Instant::now() + Duration::from_millis(u64::try_from(at - now()).unwrap_or(0)));
            let another = tokio::select! {
                changed = store.changed() => match changed {
                    Ok(objects) => {
                        edge.look(objects);
                        true
                    }
                    Err(_closed) => return,
                },
                status = told.recv() => match status {
                    Some((key, uid, status)) => {
                        edge.scribe.wish(key, uid, status);
                        false
                    }
                    None => return,
                },
                Some(done) = edge.calls.join_next() => done.is_ok_and(|done| edge.ended(done)),
                () = sleep(wake) => false,
            };
            if another {
                break;
            }
        }
    }
}

// === impl Edge ===

impl Edge {
    /// What the store says now.
    fn look(&mut self, objects: Arc<Objects<JobObject>>) {
        let changed: Vec<Key> = objects.changed_since(&self.objects).cloned().collect();
        for key in changed {
            self.written.remove(&key);
            self.scribe.seen_anew(&key);
            match objects.get(&key) {
                Some(object) => {
                    let wish = self.read(&key, object);
                    self.wishes.insert(key, wish);
                }
                None => {
                    self.wishes.remove(&key);
                    self.secrets.forget(&key);
                }
            }
        }
        self.scribe.retain(|key| objects.get(key).is_some());
        self.objects = objects;
    }

    fn read(&mut self, key: &Key, object: &JobObject) -> Wish {
        let document = object.read().map_err(|error| error.to_string());
        let generation = object.metadata.generation.unwrap_or(0);
        match document.as_ref().ok().and_then(|job| job.spec.auth.as_ref()) {
            Some(auth) => self.secrets.want(key, generation, &auth.token_secret_ref),
            None => self.secrets.forget(key),
        }
        Wish {
            uid: object.metadata.uid.clone().unwrap_or_default(),
            generation,
            created: object.metadata.creation_timestamp.as_ref().map(|at| at.0.to_string()).unwrap_or_default(),
            document,
            secret: self.secrets.of(key),
            status: object.status.clone(),
        }
    }

    /// Begins the calls that are due.
    fn begin(&mut self) {
        let now = now();
        for (key, uid, status) in self.scribe.due(now) {
            let seen = self.written.get(&key).or_else(|| self.objects.get(&key));
            let seen = seen.filter(|seen| seen.metadata.uid.as_deref() == Some(uid.as_str())).cloned();
            let writer = self.writer.clone();
            self.calls.spawn(async move {
                let (outcome, object) = match seen {
                    Some(seen) => write(&writer, &seen, status).await,
                    None => (Outcome::Gone, None),
                };
                Done::Written(key, uid, outcome, object)
            });
        }
        for reading in self.secrets.due(now) {
            let client = self.client.clone();
            self.calls.spawn(async move {
                let found = tokio::time::timeout(PATIENCE, secret(&client, &reading)).await;
                let found =
                    found.unwrap_or_else(|_late| Err(Unread::Away("the API server does not answer".to_owned())));
                Done::Read(reading, found)
            });
        }
    }

    /// The end of a call; whether something else is wished by it.
    fn ended(&mut self, done: Done) -> bool {
        match done {
            Done::Written(key, uid, outcome, object) => {
                self.scribe.ended(&key, &uid, outcome, now());
                // What was written is what is stale, if the store had heard of something newer before its answer came.
                if outcome == Outcome::Stale {
                    self.written.remove(&key);
                }
                self.written.extend(object.map(|object| (key, Arc::new(*object))));
                false
            }
            Done::Read(reading, found) => {
                let changed = self.secrets.read(&reading, found, now());
                if let Some(wish) = self.wishes.get_mut(&reading.job).filter(|_| changed) {
                    wish.secret = self.secrets.of(&reading.job);
                }
                changed
            }
        }
    }
}

async fn write(writer: &Writer, seen: &JobObject, status: FederatedJobStatus) -> (Outcome, Option<Box<JobObject>>) {
    let status = over(seen.status.as_ref(), status);
    match tokio::time::timeout(PATIENCE, writer.status(seen, status)).await {
        Ok(Ok(StatusWrite::Written(object))) => (Outcome::Written, Some(Box::new(object))),
        Ok(Ok(StatusWrite::Unchanged)) => (Outcome::Written, None),
        Ok(Ok(StatusWrite::Stale)) => (Outcome::Stale, None),
        Ok(Err(error)) => {
            tracing::warn!(%error, "status is not written; it will be");
            (Outcome::Failed, None)
        }
        Err(_late) => {
            tracing::warn!(job = %Key::of(seen), "status is not written; it will be: the API server does not answer");
            (Outcome::Failed, None)
        }
    }
}

async fn secret(client: &Client, reading: &Reading) -> Result<String, Unread> {
    let Reading { job, reference, .. } = reading;
    let key = Key { namespace: job.namespace.clone(), name: reference.name.clone() };
    let named = format!("spec.auth.tokenSecretRef: Secret {key}");
    let failed = |error: ReadError| {
        let kind = if error.is_refusal() { Unread::Missing } else { Unread::Away };
        kind(format!("{named} cannot be read: {error}"))
    };
    let found = get::<v1::Secret>(client, &key).await.map_err(failed)?;
    let data = found.ok_or_else(|| Unread::Missing(format!("{named} is not there")))?.data.unwrap_or_default();
    let value = data.get(&reference.key);
    let value = value.ok_or_else(|| Unread::Missing(format!("{named} has no key '{}'", reference.key)))?;
    let text = String::from_utf8(value.0.clone());
    text.map_err(|_binary| Unread::Missing(format!("{named}: key '{}' is no text", reference.key)))
}

impl std::fmt::Debug for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Edge").field("wishes", &self.wishes.len()).finish_non_exhaustive()
    }
}
