//! The watch of one selection: a list, then changes from that list's version on.
//!
//! ## Unlisted => Listed
//! All pages of a list. Between pages it may expire (410): from the first page again.
//!
//! ## Listed => Watching
//! A watch from the last version seen.
//!
//! ## Watching => Listed
//! The watch ends: the API server ends each after some minutes, and any may break. Nothing is lost, it goes on from the last
//! version seen. A watch that is silent for longer than bookmarks are apart has lost its connection without knowing.
//!
//! ## Listed, Watching => Unlisted
//! The version is one that the API server cannot go on from: too old (410, as the answer or within the watch), or from before
//! its store was restored; or something was said that cannot be read, and so a change may be missed.

use std::{fmt, mem, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream::BoxStream};
use kube::{
    Api, Resource,
    api::{ListParams, WatchEvent, WatchParams},
    core::{DeserializeGuard, Status},
};
use serde::de::DeserializeOwned;
use thiserror::Error;
use tracing::{debug, warn};

use crate::objects::{Key, Said, Update};

/// Objects per page of a list: bounds what the API server holds at once.
const PAGE: u32 = 500;
/// Longest wait for a page: the API server answers within a minute or not at all.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest silence of a live watch: the API server sends a bookmark every minute.
const SILENCE: Duration = Duration::from_secs(150);
/// Changes taken at once: a burst becomes few snapshots, not one each.
const BATCH: usize = 256;
/// The first pause after a failure, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

type Events<K> = BoxStream<'static, Result<WatchEvent<DeserializeGuard<K>>, Failure>>;

/// The watch of one selection.
pub(crate) struct Watch<K> {
    api: Api<DeserializeGuard<K>>,
    list: ListParams,
    watch: WatchParams,
    state: State<K>,
    /// Failures in a row.
    failures: u32,
}

enum State<K> {
    Unlisted,
    Listed { version: String },
    Watching { version: String, events: Events<K> },
}

/// Why a list or a watch came to an end.
#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    Call(#[from] kube::Error),
    #[error("the API server says: {0}")]
    Said(Box<Status>),
    #[error("silence")]
    Silence,
    #[error("the watch has ended")]
    Ended,
}

/// What a failure leaves of the version that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// It can be gone on from.
    Resume,
    /// It cannot: everything is to be listed.
    Relist,
}

// === impl Watch ===

impl<K> Watch<K>
where
    K: Resource<DynamicType = ()> + Clone + fmt::Debug + DeserializeOwned + Send + 'static,
{
    pub(crate) fn new(api: Api<DeserializeGuard<K>>, labels: Option<&str>, fields: Option<&str>) -> Self {
        let (labels, fields) = (labels.map(str::to_owned), fields.map(str::to_owned));
        Self {
            api,
            list: ListParams {
                label_selector: labels.clone(),
                field_selector: fields.clone(),
                limit: Some(PAGE),
                ..ListParams::default()
            },
            watch: WatchParams { label_selector: labels, field_selector: fields, ..WatchParams::default() },
            state: State::Unlisted,
            failures: 0,
        }
    }

    /// What the API server says next, however often it has to be asked.
    pub(crate) async fn next(&mut self) -> Update<K> {
        loop {
            match mem::replace(&mut self.state, State::Unlisted) {
                State::Unlisted => match pages(&self.api, self.list.clone()).await {
                    Ok((said, version)) => {
                        self.state = State::Listed { version };
                        return Update::Whole(said);
                    }
                    Err(failure) => self.failed("list", &failure).await,
                },
                State::Listed { version } => match begin(&self.api, &self.watch, &version).await {
                    Ok(events) => self.state = State::Watching { version, events },
                    Err(failure) => {
                        self.keep(version, failure.then());
                        self.failed("watch", &failure).await;
                    }
                },
                State::Watching { version, events } => {
                    if let Some(update) = self.events(version, events).await {
                        return update;
                    }
                }
            }
        }
    }

    /// Changes, as many as have come; none where the watch has ended without one.
    async fn events(&mut self, mut version: String, mut events: Events<K>) -> Option<Update<K>> {
        let mut said = Vec::new();
        let mut end = None;
        while said.len() < BATCH {
            let next = if said.is_empty() {
                tokio::time::timeout(SILENCE, events.next()).await.unwrap_or(Some(Err(Failure::Silence)))
            } else if let Some(next) = events.next().now_or_never() {
                next
            } else {
                break;
            };
            let (reached, one) = match next {
                Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object))) => {
                    (version_of(&object), Some(is(object)))
                }
                Some(Ok(WatchEvent::Deleted(object))) => (version_of(&object), Some(Said::Gone(Key::of(&object)))),
                Some(Ok(WatchEvent::Bookmark(mark))) => (mark.metadata.resource_version, None),
                Some(Ok(WatchEvent::Error(status))) => {
                    end = Some(Failure::Said(status));
                    break;
                }
                Some(Err(failure)) => {
                    end = Some(failure);
                    break;
                }
                None => {
                    end = Some(Failure::Ended);
                    break;
                }
            };
            self.failures = 0;
            said.extend(one);
            if !reached.is_empty() {
                version = reached;
            }
        }
        let Some(failure) = end else {
            self.state = State::Watching { version, events };
            return Some(Update::Part(said));
        };
        self.keep(version, failure.then());
        if said.is_empty() {
            self.failed("watch", &failure).await;
            return None;
        }
        Some(Update::Part(said))
    }

    fn keep(&mut self, version: String, then: Then) {
        self.state = match then {
            Then::Resume => State::Listed { version },
            Then::Relist => State::Unlisted,
        };
    }

    /// Logs a failure, and pauses the longer the more there were.
    async fn failed(&mut self, call: &str, failure: &Failure) {
        self.failures = self.failures.saturating_add(1);
        let kind = K::kind(&());
        if matches!(failure, Failure::Ended) || failure.then() == Then::Relist {
            debug!(%kind, %failure, "{call} goes on");
        } else {
            warn!(%kind, %failure, failures = self.failures, "{call} failed");
        }
        // Many watch the same API server: they do not come back in step.
        tokio::time::sleep(pause(self.failures).mul_f64(0.5 + 0.5 * fastrand::f64())).await;
    }
}

impl<K> fmt::Debug for Watch<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Unlisted => "unlisted",
            State::Listed { version } | State::Watching { version, .. } => version,
        };
        f.debug_struct("Watch").field("state", &state).field("failures", &self.failures).finish_non_exhaustive()
    }
}

/// All pages of a list, and its version.
async fn pages<K>(api: &Api<DeserializeGuard<K>>, mut params: ListParams) -> Result<(Vec<Said<K>>, String), Failure>
where
    K: Resource + Clone + fmt::Debug + DeserializeOwned,
{
    let mut said = Vec::new();
    loop {
        let page = tokio::time::timeout(PATIENCE, api.list(&params)).await.map_err(|_late| Failure::Silence)??;
        said.extend(page.items.into_iter().map(is));
        params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        if params.continue_token.is_none() {
            return Ok((said, page.metadata.resource_version.unwrap_or_default()));
        }
    }
}

/// A watch from this version on.
async fn begin<K>(api: &Api<DeserializeGuard<K>>, params: &WatchParams, version: &str) -> Result<Events<K>, Failure>
where
    K: Resource + Clone + fmt::Debug + DeserializeOwned + Send + 'static,
{
    let begun = tokio::time::timeout(PATIENCE, api.watch(params, version)).await;
    Ok(begun.map_err(|_late| Failure::Silence)??.map_err(Failure::Call).boxed())
}

fn is<K: Resource>(object: DeserializeGuard<K>) -> Said<K> {
    let key = Key::of(&object);
    match object.0 {
        Ok(object) => Said::Is(object),
        Err(invalid) => {
            warn!(%key, error = invalid.error, "an object cannot be read; its last form stands");
            Said::Unreadable(key)
        }
    }
}

fn version_of<K: Resource>(object: &K) -> String {
    object.meta().resource_version.clone().unwrap_or_default()
}

/// The pause after this many failures in a row.
pub(crate) fn pause(failures: u32) -> Duration {
    let doubled = 2_u32.saturating_pow(failures.saturating_sub(1).min(16));
    PAUSES.0.saturating_mul(doubled).min(PAUSES.1)
}

// === impl Failure ===

impl Failure {
    fn then(&self) -> Then {
        let status = match self {
            Self::Call(kube::Error::Api(status)) | Self::Said(status) => status,
            Self::Call(kube::Error::SerdeError(_)) => return Then::Relist,
            Self::Call(_) | Self::Silence | Self::Ended => return Then::Resume,
        };
        let causes = status.details.iter().flat_map(|details| &details.causes);
        let too_new = causes.into_iter().any(|cause| cause.reason == "ResourceVersionTooLarge");
        // kube takes a line that it cannot read for a status, an empty one.
        if matches!(status.code, 0 | 410) || too_new { Then::Relist } else { Then::Resume }
    }
}

#[cfg(test)]
mod tests {
    use kube::core::response::{StatusCause, StatusDetails};

    use super::*;

    #[test]
    fn a_version_that_cannot_be_gone_on_from_is_given_up() {
        let said = |code| Status { code, ..Status::default() };
        assert_eq!(Failure::Said(Box::new(said(410))).then(), Then::Relist);
        assert_eq!(Failure::Call(kube::Error::Api(Box::new(said(410)))).then(), Then::Relist);
        for code in [401, 403, 429, 500, 503, 504] {
            assert_eq!(Failure::Call(kube::Error::Api(Box::new(said(code)))).then(), Then::Resume, "{code}");
        }
        assert_eq!(Failure::Silence.then(), Then::Resume);
        let cause =
            StatusCause { reason: "ResourceVersionTooLarge".into(), message: String::new(), field: String::new() };
        let details = serde_json::from_value::<StatusDetails>(serde_json::json!({})).unwrap();
        let details = Some(StatusDetails { causes: vec![cause], ..details });
        assert_eq!(Failure::Said(Box::new(Status { details, ..said(504) })).then(), Then::Relist);
    }

    #[test]
    fn pauses_double_up_to_a_limit() {
        assert_eq!([1, 2, 3].map(pause), [100, 200, 400].map(Duration::from_millis));
        assert_eq!([10, 100, u32::MAX].map(pause), [Duration::from_secs(30); 3]);
    }
}
