//! A store: the objects of a selection, kept up to date by a watch.

use std::{fmt::Debug, sync::Arc};

use kube::core::{ClusterResourceScope, DeserializeGuard, NamespaceResourceScope};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::sync::watch;

use crate::{objects::Objects, watch::Watch};

/// A kind that can be kept in a store. Every kind with a Rust type can: nothing is to be implemented.
pub trait Kind:
    Resource<DynamicType = (), Scope: Reach> + Clone + Debug + DeserializeOwned + Send + Sync + 'static
{
}

/// How objects of a scope are addressed.
pub trait Reach: Sized {
    /// The objects of `K` in this namespace, or in all.
    fn api<K: Resource<DynamicType = (), Scope = Self>>(client: Client, namespace: Option<&str>) -> Api<K>;
}

/// Which objects of a kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Only those of this namespace; no meaning for kinds without.
    pub namespace: Option<String>,
    /// Only those with these labels: `app=web,tier!=cache`.
    pub labels: Option<String>,
    /// Only those with these fields: `metadata.name=config-features`.
    pub fields: Option<String>,
}

/// A reader of the objects of a selection.
///
/// Who holds one holds a whole list: there is none before the first list is complete, and a later list appears at once or not at
/// all. Each clone notices changes for itself.
#[derive(Clone, Debug)]
pub struct Store<K> {
    current: watch::Receiver<Arc<Objects<K>>>,
}

/// The writer of a store: the task that watches. It is to be run, and ends when no reader is left.
#[derive(Debug)]
#[must_use = "a store changes only while its keeper runs"]
pub struct Keeper<K> {
    watch: Watch<K>,
    trim: fn(&mut K),
    current: watch::Sender<Arc<Objects<K>>>,
}

/// The keeper has ended: nothing will change any more.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the keeper of the store has ended")]
pub struct Closed;

impl<K> Kind for K where
    K: Resource<DynamicType = (), Scope: Reach> + Clone + Debug + DeserializeOwned + Send + Sync + 'static
{
}

// === impl Reach ===

impl Reach for NamespaceResourceScope {
    fn api<K: Resource<DynamicType = (), Scope = Self>>(client: Client, namespace: Option<&str>) -> Api<K> {
        namespace.map_or_else(|| Api::all(client.clone()), |namespace| Api::namespaced(client.clone(), namespace))
    }
}

impl Reach for ClusterResourceScope {
    fn api<K: Resource<DynamicType = (), Scope = Self>>(client: Client, _namespace: Option<&str>) -> Api<K> {
        Api::all(client)
    }
}

// === impl Selection ===

impl Selection {
    /// Those of one namespace.
    pub fn namespace(name: impl Into<String>) -> Self {
        Self { namespace: Some(name.into()), ..Self::default() }
    }
}

// === impl Store ===

impl<K: Kind> Store<K> {
    /// Lists the selection, however long it takes, and returns it with the keeper that has to run from now on.
    ///
    /// An API server that is away, or does not know the kind yet, is asked again until it answers: each failure is logged.
    pub async fn open(client: &Client, selection: &Selection) -> (Self, Keeper<K>) {
        Self::open_trimmed(client, selection, |_| ()).await
    }

    /// The same, of objects from which `trim` has taken what their readers do not look at: a store keeps all of them in memory.
    pub async fn open_trimmed(client: &Client, selection: &Selection, trim: fn(&mut K)) -> (Self, Keeper<K>) {
        let api = <K::Scope as Reach>::api::<DeserializeGuard<K>>(client.clone(), selection.namespace.as_deref());
        let mut watch = Watch::new(api, selection.labels.as_deref(), selection.fields.as_deref());
        let first = Objects::default().after(watch.next().await.trimmed(trim)).unwrap_or_default();
        let (sender, current) = watch::channel(Arc::new(first));
        (Self { current }, Keeper { watch, trim, current: sender })
    }
}

impl<K> Store<K> {
    /// The objects as they are now.
    pub fn snapshot(&self) -> Arc<Objects<K>> {
        Arc::clone(&self.current.borrow())
    }

    /// Waits until they differ from what this reader was given by `changed` last, or had when it was opened or cloned.
    ///
    /// # Errors
    /// When the keeper has ended.
    pub async fn changed(&mut self) -> Result<Arc<Objects<K>>, Closed> {
        self.current.changed().await.map_err(|_closed| Closed)?;
        Ok(Arc::clone(&self.current.borrow_and_update()))
    }
}

// === impl Keeper ===

impl<K: Kind> Keeper<K> {
    /// Keeps the store until no reader is left.
    pub async fn run(mut self) {
        loop {
            let update = tokio::select! {
                update = self.watch.next() => update,
                () = self.current.closed() => return,
            };
            // Built aside and swapped: readers see the old whole or the new whole.
            let next = self.current.borrow().after(update.trimmed(self.trim));
            if let Some(next) = next {
                self.current.send_replace(Arc::new(next));
            }
        }
    }
}
