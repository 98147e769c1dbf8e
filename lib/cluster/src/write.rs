//! Writes: whole objects by server-side apply, and their status.

use kube::{
    Client,
    api::{Patch, PatchParams, PostParams},
    core::object::HasStatus,
};
use serde::Serialize;
use thiserror::Error;

use crate::{
    objects::Key,
    store::{Kind, Reach},
};

/// Who writes, under the name by which the API server keeps apart the fields of different writers.
#[derive(Clone)]
pub struct Writer {
    client: Client,
    manager: &'static str,
}

/// What became of a status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatusWrite<K> {
    /// It was so already: nothing was sent.
    Unchanged,
    /// It is written; the object as it is now.
    Written(K),
    /// The object has changed since it was seen, or is no more: its store will say so, and then is the time to decide again.
    Stale,
}

/// A write that failed.
#[derive(Debug, Error)]
#[error("{kind} {key}: {source}")]
pub struct WriteError {
    /// The kind of the object.
    pub kind: String,
    /// Which object.
    pub key: Key,
    /// What the API server, or the way to it, says.
    #[source]
    pub source: Box<kube::Error>,
}

// === impl Writer ===

impl Writer {
    /// A writer of this name.
    pub fn new(client: Client, manager: &'static str) -> Self {
        Self { client, manager }
    }

    /// Makes the object have the fields that are set here, and no longer those that were set by the last apply and are not now.
    /// Fields of other writers stay, except where both set the same: the last one has it.
    ///
    /// # Errors
    /// When the API server refuses or cannot be reached.
    pub async fn apply<K: Kind + Serialize>(&self, object: &K) -> Result<K, WriteError> {
        let mut wanted = object.clone();
        let meta = wanted.meta_mut();
        // What the API server keeps for itself: an object from a store has it, an apply must not.
        meta.managed_fields = None;
        meta.resource_version = None;
        let key = Key::of(object);
        let params = PatchParams::apply(self.manager).force();
        let applied = self.api(&key).patch(&key.name, &params, &Patch::Apply(&wanted)).await;
        applied.map_err(|source| error::<K>(key, source))
    }

    /// Writes the status if it differs from that of the object as it was seen.
    ///
    /// It replaces the whole status, of the version that was seen only: nobody's write is lost, and a reconciler that works from
    /// an old snapshot writes nothing.
    ///
    /// # Errors
    /// When the API server refuses or cannot be reached.
    pub async fn status<K>(&self, seen: &K, status: K::Status) -> Result<StatusWrite<K>, WriteError>
    where
        K: Kind + Serialize + HasStatus<Status: PartialEq>,
    {
        if seen.status() == Some(&status) {
            return Ok(StatusWrite::Unchanged);
        }
        let mut next = seen.clone();
        *next.status_mut() = Some(status);
        next.meta_mut().managed_fields = None;
        let key = Key::of(seen);
        let params = PostParams { field_manager: Some(self.manager.to_owned()), ..PostParams::default() };
        match self.api(&key).replace_status(&key.name, &params, &next).await {
            Ok(written) => Ok(StatusWrite::Written(written)),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(StatusWrite::Stale),
            Err(source) => Err(error::<K>(key, source)),
        }
    }

    fn api<K: Kind>(&self, key: &Key) -> kube::Api<K> {
        <K::Scope as Reach>::api(self.client.clone(), Some(&key.namespace))
    }
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("manager", &self.manager).finish_non_exhaustive()
    }
}

fn error<K: Kind>(key: Key, source: kube::Error) -> WriteError {
    WriteError { kind: K::kind(&()).into_owned(), key, source: Box::new(source) }
}
