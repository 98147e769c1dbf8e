//! A snapshot: all objects of a selection, by key.

use std::{collections::BTreeMap, fmt, sync::Arc};

use kube::Resource;

/// Which object of a kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Empty for kinds without namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// All objects of a selection as they were at one moment.
///
/// Objects are shared: an object that did not change between two snapshots is the same `Arc` in both, through relists too.
#[derive(Debug)]
pub struct Objects<K> {
    by_key: BTreeMap<Arc<Key>, Arc<K>>,
}

/// What the API server says of one object.
#[derive(Debug)]
pub(crate) enum Said<K> {
    /// It is so.
    Is(K),
    /// It is there, in a form that this program cannot read: its last readable form stands.
    Unreadable(Key),
    /// It is no more.
    Gone(Key),
}

/// What the API server says of the selection.
#[derive(Debug)]
pub(crate) enum Update<K> {
    /// Everything, from a list.
    Whole(Vec<Said<K>>),
    /// Changes, from the watch.
    Part(Vec<Said<K>>),
}

// === impl Update ===

impl<K> Update<K> {
    /// The same with `trim` applied to each object.
    pub(crate) fn trimmed(mut self, trim: fn(&mut K)) -> Self {
        let (Self::Whole(said) | Self::Part(said)) = &mut self;
        for one in said {
            if let Said::Is(object) = one {
                trim(object);
            }
        }
        self
    }
}

// === impl Key ===

impl Key {
    /// The key of this object.
    pub fn of<K: Resource>(object: &K) -> Self {
        let meta = object.meta();
        Self { namespace: meta.namespace.clone().unwrap_or_default(), name: meta.name.clone().unwrap_or_default() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

// === impl Objects ===

impl<K> Objects<K> {
    /// The object of this key.
    pub fn get(&self, key: &Key) -> Option<&Arc<K>> {
        self.by_key.get(key)
    }

    /// All of them, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Arc<K>)> {
        self.by_key.iter().map(|(key, object)| (&**key, object))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Keys of what was added, changed or removed since `before`.
    pub fn changed_since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a Key> {
        let same = |key: &Key, object: &Arc<K>| before.get(key).is_some_and(|old| Arc::ptr_eq(old, object));
        let set = self.iter().filter(move |(key, object)| !same(key, object)).map(|(key, _)| key);
        set.chain(before.iter().filter(|(key, _)| self.get(key).is_none()).map(|(key, _)| key))
    }
}

impl<K: Resource> Objects<K> {
    /// The snapshot after `update`, if it differs.
    pub(crate) fn after(&self, update: Update<K>) -> Option<Self> {
        let (mut next, said) = match update {
            Update::Whole(said) => (Self::default(), said),
            Update::Part(said) => (Self { by_key: self.by_key.clone() }, said),
        };
        for one in said {
            match one {
                Said::Is(object) => next.set(object, self),
                Said::Unreadable(key) => {
                    if let Some((key, last)) = self.by_key.get_key_value(&key) {
                        next.by_key.insert(Arc::clone(key), Arc::clone(last));
                    }
                }
                Said::Gone(key) => drop(next.by_key.remove(&key)),
            }
        }
        (next.len() != self.len() || next.changed_since(self).next().is_some()).then_some(next)
    }

    /// Enters `object`, as the one of `before` if it is the same version of the same object.
    fn set(&mut self, object: K, before: &Self) {
        let key = Key::of(&object);
        let version = |object: &K| (object.meta().uid.clone(), object.meta().resource_version.clone());
        match before.by_key.get_key_value(&key) {
            Some((key, old)) if version(old) == version(&object) => {
                self.by_key.insert(Arc::clone(key), Arc::clone(old));
            }
            Some((key, _)) => drop(self.by_key.insert(Arc::clone(key), Arc::new(object))),
            None => drop(self.by_key.insert(Arc::new(key), Arc::new(object))),
        }
    }
}

impl<K> Default for Objects<K> {
    fn default() -> Self {
        Self { by_key: BTreeMap::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{key, map};

    fn names(objects: &Objects<k8s_openapi::api::core::v1::ConfigMap>) -> Vec<String> {
        objects.iter().map(|(key, _)| key.to_string()).collect()
    }

    #[test]
    fn a_list_replaces_everything_and_keeps_what_did_not_change() {
        let old =
            Objects::default().after(Update::Whole(vec![Said::Is(map("a", "1")), Said::Is(map("b", "2"))])).unwrap();
        let list = vec![Said::Is(map("b", "2")), Said::Is(map("c", "3"))];
        let new = old.after(Update::Whole(list)).unwrap();
        assert_eq!(names(&new), ["default/b", "default/c"]);
        assert!(Arc::ptr_eq(old.get(&key("b")).unwrap(), new.get(&key("b")).unwrap()));
        let changed: Vec<String> = new.changed_since(&old).map(Key::to_string).collect();
        assert_eq!(changed, ["default/c", "default/a"]);
    }

    #[test]
    fn what_says_nothing_new_is_no_new_snapshot() {
        let old = Objects::default().after(Update::Whole(vec![Said::Is(map("a", "1"))])).unwrap();
        assert!(old.after(Update::Whole(vec![Said::Is(map("a", "1"))])).is_none());
        assert!(old.after(Update::Part(vec![Said::Is(map("a", "1")), Said::Gone(key("z"))])).is_none());
        assert!(old.after(Update::Part(vec![Said::Is(map("b", "2")), Said::Gone(key("b"))])).is_none());
        assert!(old.after(Update::Part(vec![Said::Is(map("a", "2"))])).is_some());
    }

    #[test]
    fn an_object_made_again_under_its_name_is_another() {
        let old = Objects::default().after(Update::Whole(vec![Said::Is(map("a", "1"))])).unwrap();
        let mut again = map("a", "1");
        again.metadata.uid = Some("other".into());
        assert!(old.after(Update::Whole(vec![Said::Is(again)])).is_some());
    }

    #[test]
    fn the_last_readable_form_stands() {
        let old = Objects::default().after(Update::Whole(vec![Said::Is(map("a", "1"))])).unwrap();
        assert!(old.after(Update::Part(vec![Said::Unreadable(key("a"))])).is_none());
        assert!(old.after(Update::Whole(vec![Said::Unreadable(key("a"))])).is_none());
        assert!(old.after(Update::Part(vec![Said::Unreadable(key("b"))])).is_none(), "never readable: not there");
        assert!(old.after(Update::Whole(vec![])).unwrap().is_empty());
    }
}
