//! Where snapshots come from: whoever watches Kubernetes, or a folder of the same objects as files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use lifl_api::ingress::{CLASS, CLASS_ANNOTATION};
use lifl_cluster::Key;
use lifl_daemon::FolderWatch;
use rustix::fs::inotify::WatchFlags;
use serde::{Deserialize as _, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};

use super::{
    backend::Backend,
    metrics::Counters,
    snapshot::Snapshot,
    table::{Ingress, Report},
    translate::{Fault, Translated},
};

/// External names are resolved this often, as Envoy does.
const RESOLVE: Duration = Duration::from_secs(5);
/// A name that has not resolved after this stays as it was, until it does.
const PATIENCE: Duration = Duration::from_secs(5);
/// Names that are looked up at a time: each takes a thread for as long as the resolver takes.
const AT_ONCE: usize = 64;
/// Files written one after another are read together.
const SETTLE: Duration = Duration::from_millis(20);

/// A file of the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileFault {
    /// It cannot be read.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file or the folder.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It is not YAML.
    #[error("{}: {error}", path.display())]
    Yaml {
        /// The file.
        path: PathBuf,
        /// Why.
        error: serde_yaml_ng::Error,
    },
    /// One of its objects is not what its kind says.
    #[error("{}: {kind} '{object}': {at}: {error}", path.display())]
    Object {
        /// The file.
        path: PathBuf,
        /// Kind of the object.
        kind: String,
        /// Its name.
        object: String,
        /// The field, as `spec.rules[0].hosts`.
        at: String,
        /// Why.
        error: serde_json::Error,
    },
    /// One of its Ingresses says what cannot be served.
    #[error("{}: Ingress '{ingress}': {error}", path.display())]
    Rule {
        /// The file.
        path: PathBuf,
        /// The Ingress.
        ingress: Key,
        /// Why.
        error: Fault,
    },
}

/// Addresses of names.
type Names = BTreeMap<String, Vec<IpAddr>>;

/// Looks names up, each once at a time: a look-up that nobody waits for any more goes on, for a resolver cannot be interrupted.
#[derive(Debug)]
struct Resolver<L> {
    look_up: L,
    known: Names,
    asked: BTreeSet<String>,
    asking: JoinSet<(String, Vec<IpAddr>)>,
    places: Arc<Semaphore>,
}

/// A folder as it was last read: each file as it was when it had no fault.
#[derive(Debug, Default)]
struct Folder {
    files: BTreeMap<PathBuf, Snapshot>,
}

/// Puts each snapshot in force, and again whenever an external name resolves to something else. Ends with the sender.
///
/// `told` hears what became of each snapshot.
pub async fn follow(
    ingress: Ingress,
    snapshots: watch::Receiver<Snapshot>,
    told: impl FnMut(&Snapshot, &Report) + Send,
) {
    follow_by(ingress, snapshots, told, look_up).await;
}

async fn follow_by<F: Future<Output = Vec<IpAddr>> + Send + 'static>(
    ingress: Ingress,
    mut snapshots: watch::Receiver<Snapshot>,
    mut told: impl FnMut(&Snapshot, &Report) + Send,
    look_up: impl Fn(String) -> F + Send,
) {
    let mut resolver = Resolver::new(look_up);
    loop {
        let snapshot = Snapshot { names: resolver.known.clone(), ..snapshots.borrow_and_update().clone() };
        let mut report = ingress.apply(&snapshot);
        tokio::select! {
            () = resolver.resolve(&report.names) => {}
            // Names are not waited for then; those that the next one has, too, are looked up on.
            changed = snapshots.changed() => {
                told(&snapshot, &report);
                if changed.is_err() {
                    return;
                }
                continue;
            }
        }
        if resolver.known != snapshot.names {
            report = ingress.apply(&Snapshot { names: resolver.known.clone(), ..snapshot.clone() });
        }
        told(&snapshot, &report);
        tokio::select! {
            changed = snapshots.changed() => if changed.is_err() { return },
            () = resolver.changed(&report.names) => {}
        }
    }
}

/// Addresses of a name; none if it cannot be resolved now.
async fn look_up(name: String) -> Vec<IpAddr> {
    match tokio::net::lookup_host((name.as_str(), 0)).await {
        Ok(found) => found.map(|address| address.ip()).collect(),
        Err(error) => {
            tracing::debug!(name, %error, "external name");
            Vec::new()
        }
    }
}

/// Reads all `.yaml`, `.yml` and `.json` files of a folder, or one file. Objects of other kinds are passed over; an Ingress
/// that names no class is ours.
///
/// # Errors
/// All faults there are.
pub fn read(path: &Path) -> Result<Snapshot, Vec<FileFault>> {
    let mut folder = Folder::default();
    let faults = folder.read(path);
    if faults.is_empty() { Ok(folder.snapshot()) } else { Err(faults) }
}

/// Sends a snapshot of a folder whenever a file of it changes. A file with a fault counts as it was before, and its faults are
/// logged; the others go on. Ends when nobody listens.
///
/// # Errors
/// When the folder cannot be watched, or is gone.
pub async fn watch_folder(path: PathBuf, snapshots: watch::Sender<Snapshot>) -> io::Result<()> {
    let changes = WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO | WatchFlags::MOVED_FROM | WatchFlags::DELETE;
    let events = FolderWatch::new(&path, changes)?;
    let mut folder = Folder::default();
    let mut told = BTreeSet::new();
    loop {
        let faults: BTreeSet<String> = folder.read(&path).iter().map(ToString::to_string).collect();
        for fault in faults.difference(&told) {
            tracing::warn!(fault, "refused; what this file said before stays, and the others go on");
        }
        told = faults;
        let _nobody_yet = snapshots.send_replace(folder.snapshot());
        tokio::select! {
            () = snapshots.closed() => return Ok(()),
            changed = next(&events) => changed?,
        }
    }
}

/// Waits for a change, then until none has come for a moment.
async fn next(events: &FolderWatch) -> io::Result<()> {
    events.changed().await?;
    while let Ok(more) = tokio::time::timeout(SETTLE, events.changed()).await {
        more?;
    }
    Ok(())
}

fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut out = Vec::new();
    for entry in fs::read_dir(path)? {
        let path = entry?.path();
        // Kubernetes swaps mounted ConfigMaps behind names with a leading dot.
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let kind = path.extension().and_then(|end| end.to_str());
        if !hidden && matches!(kind, Some("yaml" | "yml" | "json")) && path.is_file() {
            out.push(path);
        }
    }
    out.sort_unstable();
    Ok(out)
}

fn read_file(path: &Path, snapshot: &mut Snapshot) -> Vec<FileFault> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => return vec![FileFault::Io { path: path.to_owned(), error }],
    };
    let mut faults = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(&text) {
        match Value::deserialize(document) {
            Ok(object) => take(path, object, snapshot, &mut faults),
            Err(error) => {
                faults.push(FileFault::Yaml { path: path.to_owned(), error });
                break;
            }
        }
    }
    faults.extend(snapshot.ingresses.iter().filter_map(|king| {
        let none = |name| Arc::new(Backend::new(name, Counters::default()));
        let error = Translated::new(king, none).err()?;
        Some(FileFault::Rule { path: path.to_owned(), ingress: Key::of(&**king), error })
    }));
    faults
}

/// Sorts an object, or those of a list, into the snapshot.
fn take(path: &Path, mut object: Value, snapshot: &mut Snapshot, faults: &mut Vec<FileFault>) {
    fn add<T: DeserializeOwned>(
        list: &mut Vec<Arc<T>>,
        object: &Value,
    ) -> Result<(), serde_path_to_error::Error<serde_json::Error>> {
        list.push(Arc::new(serde_path_to_error::deserialize(object)?));
        Ok(())
    }
    let word = |name: &str| object.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (group, kind) = (word("apiVersion"), word("kind"));
    if kind.ends_with("List")
        && let Some(Value::Array(items)) = object.get_mut("items").map(Value::take)
    {
        items.into_iter().for_each(|item| take(path, item, snapshot, faults));
        return;
    }
    let king = (group.as_str(), kind.as_str()) == ("networking.internal.knative.dev/v1alpha1", "Ingress");
    complete(&mut object, king);
    let added = match (group.as_str(), kind.as_str()) {
        _ if king => add(&mut snapshot.ingresses, &object),
        ("v1", "Service") => add(&mut snapshot.services, &object),
        ("v1", "Endpoints") => add(&mut snapshot.endpoints, &object),
        ("v1", "Secret") => add(&mut snapshot.secrets, &object),
        ("discovery.k8s.io/v1", "EndpointSlice") => add(&mut snapshot.slices, &object),
        _ => Ok(()),
    };
    if let Err(error) = added {
        let object = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let at = error.path().to_string();
        faults.push(FileFault::Object { path: path.to_owned(), kind, object, at, error: error.into_inner() });
    }
}

/// What `kubectl` and Knative would have filled in: the namespace, and the class of an Ingress.
fn complete(object: &mut Value, king: bool) {
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    metadata.entry("namespace").or_insert_with(|| "default".into());
    if king && let Some(annotations) = metadata.entry("annotations").or_insert_with(|| json!({})).as_object_mut() {
        annotations.entry(CLASS_ANNOTATION).or_insert_with(|| CLASS.into());
    }
}

// === impl Resolver ===

impl<L, F> Resolver<L>
where
    L: Fn(String) -> F,
    F: Future<Output = Vec<IpAddr>> + Send + 'static,
{
    fn new(look_up: L) -> Self {
        let places = Arc::new(Semaphore::new(AT_ONCE));
        Self { look_up, known: Names::new(), asked: BTreeSet::new(), asking: JoinSet::new(), places }
    }

    /// Looks names up, and forgets others; those that cannot be resolved now, or take too long, stay as they were.
    async fn resolve(&mut self, wanted: &BTreeSet<String>) {
        self.known.retain(|name, _| wanted.contains(name));
        for name in wanted {
            self.known.entry(name.clone()).or_default();
            if self.asked.insert(name.clone()) {
                let (found, places, name) = ((self.look_up)(name.clone()), Arc::clone(&self.places), name.clone());
                self.asking.spawn(async move {
                    let _place = places.acquire_owned().await;
                    (name, found.await)
                });
            }
        }
        let until = Instant::now() + PATIENCE;
        while wanted.iter().any(|name| self.asked.contains(name)) {
            let Ok(Some(done)) = timeout_at(until, self.asking.join_next()).await else { return };
            let Ok((name, mut ips)) = done else { continue };
            self.asked.remove(&name);
            ips.sort_unstable();
            ips.dedup();
            if let Some(known) = self.known.get_mut(&name).filter(|_| !ips.is_empty()) {
                *known = ips;
            }
        }
    }

    /// Waits until a name resolves to something else; forever, without work, where there are no names.
    async fn changed(&mut self, wanted: &BTreeSet<String>) {
        if wanted.is_empty() {
            return std::future::pending().await;
        }
        let before = self.known.clone();
        while self.known == before {
            sleep(RESOLVE).await;
            self.resolve(wanted).await;
        }
    }
}

// === impl Folder ===

impl Folder {
    /// Reads it again. Files that are gone are forgotten; those with a fault stay as they were.
    fn read(&mut self, path: &Path) -> Vec<FileFault> {
        let files = match files(path) {
            Ok(files) => files,
            Err(error) => return vec![FileFault::Io { path: path.to_owned(), error }],
        };
        let mut faults = Vec::new();
        let mut before = std::mem::take(&mut self.files);
        for file in files {
            let mut new = Snapshot::default();
            let of_file = read_file(&file, &mut new);
            let said = if of_file.is_empty() { Some(new) } else { before.remove(&file) };
            faults.extend(of_file);
            self.files.extend(said.map(|said| (file, said)));
        }
        faults
    }

    /// All files as one.
    fn snapshot(&self) -> Snapshot {
        let mut out = Snapshot::default();
        for file in self.files.values() {
            out.ingresses.extend(file.ingresses.iter().cloned());
            out.services.extend(file.services.iter().cloned());
            out.slices.extend(file.slices.iter().cloned());
            out.endpoints.extend(file.endpoints.iter().cloned());
            out.secrets.extend(file.secrets.iter().cloned());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use prometheus::Registry;
    use tokio::sync::Notify;

    use super::*;
    use crate::ingress::{Outcome, Settings};

    fn ip(last: u8) -> Vec<IpAddr> {
        vec![IpAddr::from([10, 0, 0, last])]
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// One name resolves at once; the others when they are told to.
    async fn resolved(name: String, word: Arc<Notify>) -> Vec<IpAddr> {
        if name != "quick" {
            word.notified().await;
        }
        ip(7)
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_hangs_holds_up_the_others_for_a_bounded_time_and_is_asked_for_once() {
        let word = Arc::new(Notify::new());
        let mut resolver = Resolver::new(|name| resolved(name, Arc::clone(&word)));
        let wanted = set(&["a", "b", "quick"]);
        resolver.known.insert("b".to_owned(), ip(1));
        let began = Instant::now();
        resolver.resolve(&wanted).await;
        assert_eq!(began.elapsed(), PATIENCE, "both at once");
        let found = Names::from([("a".into(), vec![]), ("b".into(), ip(1)), ("quick".into(), ip(7))]);
        assert_eq!(resolver.known, found);
        resolver.resolve(&wanted).await;
        assert_eq!(resolver.asking.len(), 2, "a look-up that hangs is not begun again");
        let began = Instant::now();
        resolver.resolve(&set(&["quick"])).await;
        assert_eq!(began.elapsed(), Duration::ZERO, "what nobody wants any more is not waited for");
        assert_eq!(resolver.known, Names::from([("quick".into(), ip(7))]));
        word.notify_waiters();
        resolver.resolve(&wanted).await;
        assert!(resolver.known.values().all(|found| *found == ip(7)), "{:?}", resolver.known);
    }

    fn snapshot(host: &str) -> Snapshot {
        let read = |object: Value| serde_json::from_value(object).unwrap();
        let split = json!({"serviceNamespace": "n", "serviceName": "s", "servicePort": 80, "percent": 100});
        let rule = json!({"hosts": [host], "http": {"paths": [{"splits": [split]}]}});
        let mut king = json!({
            "apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress",
            "metadata": {"namespace": "n", "name": host}, "spec": {"rules": [rule]},
        });
        complete(&mut king, true);
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "n", "name": "s"},
            "spec": {"type": "ExternalName", "externalName": "hangs", "ports": [{"name": "http", "port": 80}]}});
        Snapshot {
            ingresses: vec![Arc::new(serde_json::from_value(king).unwrap())],
            services: vec![Arc::new(read(service))],
            ..Snapshot::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_changes_while_a_name_hangs_is_put_in_force_at_once() {
        let ingress = Ingress::new(Settings::default(), &Registry::new()).unwrap();
        let (sender, receiver) = watch::channel(snapshot("first"));
        let (told, mut reports) = watch::channel(Report::default());
        let word = Arc::new(Notify::new());
        let telling = move |_: &Snapshot, report: &Report| drop(told.send_replace(report.clone()));
        let look_up = {
            let word = Arc::clone(&word);
            move |name| resolved(name, Arc::clone(&word))
        };
        let following = tokio::spawn(follow_by(ingress.clone(), receiver, telling, look_up));
        let of = |host: &str| Key { namespace: "n".into(), name: host.into() };
        let in_force = async |host: &str| {
            let began = Instant::now();
            while !ingress.report().ingresses.contains_key(&of(host)) && began.elapsed() < PATIENCE {
                sleep(Duration::from_millis(1)).await;
            }
            began.elapsed()
        };
        in_force("first").await;
        sender.send_replace(snapshot("second"));
        assert!(in_force("second").await < PATIENCE / 2, "it waited for the name");
        // ... and each is told of, with or without the name.
        reports.wait_for(|report| report.ingresses.contains_key(&of("second"))).await.unwrap();
        word.notify_waiters();
        let served = |report: &Report| report.ingresses.values().any(|(_, outcome)| *outcome == Outcome::Served);
        reports.wait_for(|report| served(report)).await.unwrap();
        following.abort();
    }
}
