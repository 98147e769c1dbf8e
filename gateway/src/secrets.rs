//! Secrets of Kubernetes, those that somebody names and no others: each is read by itself, again and again. To be told of
//! changes would take the right to read all of them, and this process parses strangers' bytes.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use k8s_openapi::api::core::v1::Secret;
use lifl_cluster::{Client, Key, get};
use tokio::sync::{Notify, watch};

/// A secret that is there is read again after this.
const PAUSE: Duration = Duration::from_secs(10);
/// However many there are, no more than one is read in this time on average.
const EACH: Duration = Duration::from_millis(50);
/// One that is not there, or cannot be read, is asked for again after this, then after twice as long, up to [`PAUSE`].
const AGAIN: Duration = Duration::from_millis(500);
/// The API server answers within this, or not at all.
const PATIENCE: Duration = Duration::from_secs(15);

/// Reads secrets as long as somebody wants them. Clones share their pace.
#[derive(Clone)]
pub(crate) struct Secrets {
    client: Client,
    count: Arc<AtomicUsize>,
    changed: Arc<Notify>,
}

/// What is known of a secret.
#[derive(Clone, Debug, Default)]
pub(crate) enum Known {
    /// Nothing: it was not answered for yet.
    #[default]
    Nothing,
    /// It is not there.
    Absent,
    /// It cannot be read; why.
    Refused(String),
    /// It is this.
    Is(Arc<Secret>),
}

// === impl Secrets ===

impl Secrets {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, count: Arc::default(), changed: Arc::default() }
    }

    /// What is known of a secret, until the receiver is dropped.
    pub(crate) fn follow(&self, key: Key) -> watch::Receiver<Known> {
        let (sender, receiver) = watch::channel(Known::Nothing);
        tokio::spawn(self.clone().read(key, sender).boxed());
        receiver
    }

    /// Waits until some secret has changed since this was called last.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    async fn read(self, key: Key, sender: watch::Sender<Known>) {
        self.count.fetch_add(1, Ordering::Relaxed);
        let mut failures = 0;
        loop {
            let read = tokio::select! {
                read = tokio::time::timeout(PATIENCE, get::<Secret>(&self.client, &key)) => read,
                () = sender.closed() => break,
            };
            let said = match read {
                Ok(Ok(Some(secret))) => Ok(Known::Is(Arc::new(secret))),
                Ok(Ok(None)) => Ok(Known::Absent),
                Ok(Err(error)) => Err(error.why()),
                Err(_late) => Err("the API server does not answer".to_owned()),
            };
            failures = if matches!(said, Ok(Known::Is(_))) { 0 } else { failures + 1 };
            if sender.send_if_modified(|known| known.learn(said, &key)) {
                self.changed.notify_one();
            }
            let pace = EACH.saturating_mul(u32::try_from(self.count.load(Ordering::Relaxed)).unwrap_or(u32::MAX));
            let pause = pause(failures).max(pace).mul_f64(0.8 + 0.4 * fastrand::f64());
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = sender.closed() => break,
            }
        }
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets").field("count", &self.count).finish_non_exhaustive()
    }
}

fn pause(failures: u32) -> Duration {
    if failures == 0 { PAUSE } else { AGAIN.saturating_mul(1 << (failures - 1).min(10)).min(PAUSE) }
}

// === impl Known ===

impl Known {
    /// Takes in what was read; tells whether that is new. A secret that was read once stays when it cannot be read.
    fn learn(&mut self, said: Result<Self, String>, key: &Key) -> bool {
        let next = match said {
            Ok(next) => next,
            Err(why) => {
                tracing::warn!(secret = %key, why, "secret cannot be read");
                if matches!(self, Self::Is(_)) {
                    return false;
                }
                Self::Refused(why)
            }
        };
        let same = match (&*self, &next) {
            (Self::Is(old), Self::Is(new)) => old.data == new.data,
            (Self::Absent, Self::Absent) => true,
            (Self::Refused(old), Self::Refused(new)) => old == new,
            _ => false,
        };
        if !same {
            *self = next;
        }
        !same
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(value: &str) -> Known {
        let read = serde_json::from_value(serde_json::json!({"metadata": {}, "data": {"tls.crt": value}}));
        Known::Is(Arc::new(read.unwrap()))
    }

    #[test]
    fn what_was_read_stands_until_something_else_is_read() {
        let key = Key { namespace: "n".into(), name: "s".into() };
        let mut known = Known::Nothing;
        assert!(known.learn(Err("forbidden".into()), &key));
        assert!(!known.learn(Err("forbidden".into()), &key));
        assert!(matches!(&known, Known::Refused(why) if why == "forbidden"));
        assert!(known.learn(Ok(secret("YQ==")), &key));
        assert!(!known.learn(Ok(secret("YQ==")), &key), "the same again is not new");
        assert!(!known.learn(Err("away".into()), &key));
        assert!(matches!(known, Known::Is(_)));
        assert!(known.learn(Ok(secret("Yg==")), &key));
        assert!(known.learn(Ok(Known::Absent), &key));
        assert!(!known.learn(Ok(Known::Absent), &key));
    }

    #[test]
    fn what_is_not_there_is_asked_for_sooner() {
        assert_eq!(pause(0), PAUSE);
        assert_eq!([1, 2, 3].map(pause), [500, 1000, 2000].map(Duration::from_millis));
        assert_eq!(pause(u32::MAX), PAUSE);
    }
}
