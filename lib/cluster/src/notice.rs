//! Events: what people are told of an object, where they look first (`kubectl describe`, `kubectl get events`).
//!
//! An Event's name is made of what it says: the same is said once, whoever says it again, an agent that was restarted among them.
//! So creating is all that has to be permitted.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{Client, api::PostParams};
use tokio::{sync::mpsc, time::Instant};
use tracing::{debug, warn};

use crate::{read::is_refusal, watch::pause};

/// What waits while the API server is away; more is not said.
const WAITING: usize = 1024;
/// Longest message, in characters: what the newer form of Events allows.
const LONGEST: usize = 1024;
/// Longest name of an object.
const NAME: usize = 253;
/// What was refused may be said again after this: a permission may come, and whoever finds it missing is not to ask all the time.
const REFUSED: Duration = Duration::from_secs(600);

/// By uid: digests of what was said, and until when that holds if it was refused.
type Said = HashMap<String, HashMap<u64, Option<Instant>>>;

/// Something to be said of an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    /// Of which; namespace, name and uid are to be set, and what kind it is.
    pub about: ObjectReference,
    /// Something is not as it should be.
    pub warning: bool,
    /// One word, as programs read it: `PodNotServed`.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

/// Where notices are put. Clones share it.
#[derive(Clone, Debug)]
pub struct Notices {
    queue: mpsc::Sender<Notice>,
    said: Arc<Mutex<Said>>,
}

/// Sends notices as Events. It is to be run, and ends when nobody can put any more.
#[derive(Debug)]
#[must_use = "nothing is sent while it does not run"]
pub struct Crier {
    queue: mpsc::Receiver<Notice>,
    said: Arc<Mutex<Said>>,
    component: &'static str,
    instance: String,
}

// === impl Notices ===

impl Notices {
    /// Notices of this component; `instance` is which of them, its node say.
    pub fn new(component: &'static str, instance: impl Into<String>) -> (Self, Crier) {
        let (sender, queue) = mpsc::channel(WAITING);
        let said: Arc<Mutex<Said>> = Arc::default();
        (Self { queue: sender, said: said.clone() }, Crier { queue, said, component, instance: instance.into() })
    }

    /// Says it, unless that was said before; returns whether it does. Never waits: where too much does, it is not said, and may be
    /// later; so may what the API server has refused a while ago.
    pub fn say(&self, notice: Notice) -> bool {
        let mut said = lock(&self.said);
        let digest = notice.digest();
        let of = said.entry(notice.about.uid.clone().unwrap_or_default()).or_default();
        if of.get(&digest).is_some_and(|until| until.is_none_or(|until| Instant::now() < until)) {
            return false;
        }
        match self.queue.try_send(notice) {
            Ok(()) => {
                of.insert(digest, None);
                true
            }
            Err(error) => {
                debug!(%error, "not said");
                false
            }
        }
    }

    /// Forgets what was said of objects that are no more.
    pub fn keep(&self, is_there: impl Fn(&str) -> bool) {
        lock(&self.said).retain(|uid, _| is_there(uid));
    }
}

fn lock(said: &Mutex<Said>) -> MutexGuard<'_, Said> {
    said.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Notice ===

impl Notice {
    fn digest(&self) -> u64 {
        // Of the same program it is the same in every life.
        let mut digest = DefaultHasher::new();
        (&self.about.uid, self.reason, &self.message).hash(&mut digest);
        digest.finish()
    }

    fn event(&self, component: &str, instance: &str, now: Timestamp) -> Event {
        let suffix = format!(".{:016x}", self.digest());
        let of: String = self.about.name.iter().flat_map(|name| name.chars()).take(NAME - suffix.len()).collect();
        let message = match self.message.chars().count() {
            0..=LONGEST => self.message.clone(),
            _ => self.message.chars().take(LONGEST - 3).chain("...".chars()).collect(),
        };
        Event {
            metadata: ObjectMeta {
                name: Some(of.trim_end_matches(['.', '-']).to_owned() + &suffix),
                namespace: self.about.namespace.clone(),
                ..ObjectMeta::default()
            },
            involved_object: self.about.clone(),
            type_: Some(if self.warning { "Warning" } else { "Normal" }.to_owned()),
            reason: Some(self.reason.to_owned()),
            message: Some(message),
            source: Some(EventSource { component: Some(component.to_owned()), host: Some(instance.to_owned()) }),
            reporting_component: Some(component.to_owned()),
            reporting_instance: Some(instance.to_owned()),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            count: Some(1),
            ..Event::default()
        }
    }
}

// === impl Crier ===

impl Crier {
    /// Sends what is put, one after the other; while the API server is away it waits.
    pub async fn run(mut self, client: Client) {
        while let Some(notice) = self.queue.recv().await {
            let event = notice.event(self.component, &self.instance, Timestamp::now());
            let namespace = notice.about.namespace.as_deref().unwrap_or_default();
            let api = kube::Api::<Event>::namespaced(client.clone(), namespace);
            let params = PostParams { field_manager: Some(self.component.to_owned()), ..PostParams::default() };
            for failures in 1.. {
                match api.create(&params, &event).await {
                    Ok(_) => break,
                    Err(kube::Error::Api(status)) if status.code == 409 => break,
                    // Not permitted, no such namespace (any more): it will be no better for being said again at once.
                    Err(kube::Error::Api(status)) if is_refusal(status.code) => {
                        let uid = notice.about.uid.as_deref().unwrap_or_default();
                        if let Some(until) = lock(&self.said).get_mut(uid).and_then(|of| of.get_mut(&notice.digest())) {
                            *until = Some(Instant::now() + REFUSED);
                        }
                        warn!(reason = notice.reason, error = status.message, "Event refused");
                        break;
                    }
                    Err(error) => debug!(%error, "Event not sent"),
                }
                tokio::time::sleep(pause(failures)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(name: &str, message: &str) -> Notice {
        let about = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            namespace: Some("default".into()),
            name: Some(name.into()),
            uid: Some(format!("uid-{name}")),
            ..ObjectReference::default()
        };
        Notice { about, warning: true, reason: "PodNotServed", message: message.into() }
    }

    #[test]
    fn the_same_is_put_once_until_its_object_is_forgotten() {
        let (notices, mut crier) = Notices::new("lifl-agent", "node0");
        assert!(notices.say(notice("a", "one")));
        assert!(!notices.say(notice("a", "one")));
        notices.say(notice("a", "two"));
        notices.say(notice("a", "one"));
        notices.say(notice("b", "one"));
        let put: Vec<_> = std::iter::from_fn(|| crier.queue.try_recv().ok()).map(|one| one.message).collect();
        assert_eq!(put, ["one", "two", "one"]);
        notices.keep(|uid| uid == "uid-a");
        notices.say(notice("a", "one"));
        notices.say(notice("b", "one"));
        assert_eq!(std::iter::from_fn(|| crier.queue.try_recv().ok()).count(), 1);
    }

    #[test]
    fn what_is_too_much_is_not_waited_for() {
        let (notices, mut crier) = Notices::new("lifl-agent", "node0");
        for number in 0..=WAITING {
            notices.say(notice("a", &number.to_string()));
        }
        assert!(crier.queue.try_recv().is_ok());
        // There is room again, and it was not said yet.
        notices.say(notice("a", &WAITING.to_string()));
        assert_eq!(std::iter::from_fn(|| crier.queue.try_recv().ok()).count(), WAITING);
    }

    #[test]
    fn names_and_messages_are_as_long_as_they_may_be() {
        let now = Timestamp::UNIX_EPOCH;
        let long = notice(&"a-".repeat(126), &"\u{fc}".repeat(5000)).event("lifl-agent", "node0", now);
        let (name, message) = (long.metadata.name.unwrap(), long.message.unwrap());
        assert!(name.len() <= NAME && !name.contains("-."), "{name}");
        assert_eq!(message.chars().count(), LONGEST);
        let one = notice("a", "one").event("lifl-agent", "node0", now);
        let two = notice("a", "two").event("lifl-agent", "node0", now);
        assert_ne!(one.metadata.name, two.metadata.name);
        assert_eq!(one, notice("a", "one").event("lifl-agent", "node0", now));
        assert_eq!((one.type_.as_deref(), one.count), (Some("Warning"), Some(1)));
    }
}
