//! Where snapshots come from: whoever watches Kubernetes, or a folder of the same objects as files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use serde::{Deserialize as _, de::DeserializeOwned};
use serde_json::Value;
use tokio::{
    io::unix::AsyncFd,
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use super::{
    snapshot::Snapshot,
    table::{Ingress, Report},
};

/// External names are resolved this often, as Envoy does.
const RESOLVE: Duration = Duration::from_secs(5);
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
    #[error("{}: {kind}: {error}", path.display())]
    Object {
        /// The file.
        path: PathBuf,
        /// Kind of the object.
        kind: String,
        /// Why.
        error: serde_json::Error,
    },
}

/// Puts each snapshot in force, and again whenever an external name resolves to something else. Ends with the sender.
pub async fn follow(ingress: Ingress, mut snapshots: watch::Receiver<Snapshot>, mut told: impl FnMut(&Report) + Send) {
    let mut tick = interval(RESOLVE);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut names = BTreeMap::new();
    loop {
        let snapshot = Snapshot { names: names.clone(), ..snapshots.borrow_and_update().clone() };
        let mut report = ingress.apply(&snapshot);
        let resolved = resolve(&report.names, &names).await;
        if resolved != names {
            names = resolved;
            report = ingress.apply(&Snapshot { names: names.clone(), ..snapshot });
        }
        told(&report);
        tokio::select! {
            changed = snapshots.changed() => if changed.is_err() { return },
            () = changed_names(&mut tick, &report.names, &names) => {}
        }
    }
}

/// Waits until a name resolves to something else; forever, without work, where there are no names.
async fn changed_names(
    tick: &mut tokio::time::Interval,
    wanted: &BTreeSet<String>,
    known: &BTreeMap<String, Vec<IpAddr>>,
) {
    if wanted.is_empty() {
        return std::future::pending().await;
    }
    tick.reset();
    loop {
        tick.tick().await;
        if resolve(wanted, known).await != *known {
            return;
        }
    }
}

/// Addresses of names; those that cannot be resolved now stay as they were.
async fn resolve(wanted: &BTreeSet<String>, known: &BTreeMap<String, Vec<IpAddr>>) -> BTreeMap<String, Vec<IpAddr>> {
    let mut out = BTreeMap::new();
    for name in wanted {
        let mut ips: Vec<IpAddr> = match tokio::net::lookup_host((name.as_str(), 0)).await {
            Ok(found) => found.map(|address| address.ip()).collect(),
            Err(error) => {
                tracing::debug!(name, %error, "external name");
                Vec::new()
            }
        };
        ips.sort_unstable();
        ips.dedup();
        if ips.is_empty() {
            ips = known.get(name).cloned().unwrap_or_default();
        }
        out.insert(name.clone(), ips);
    }
    out
}

/// Reads all `.yaml`, `.yml` and `.json` files of a folder, or one file. Objects of other kinds are passed over.
///
/// # Errors
/// All faults there are; nothing of a folder with a fault is used.
pub fn read(path: &Path) -> Result<Snapshot, Vec<FileFault>> {
    let mut snapshot = Snapshot::default();
    let mut faults = Vec::new();
    match files(path) {
        Ok(files) => {
            for file in files {
                faults.extend(read_file(&file, &mut snapshot));
            }
        }
        Err(error) => faults.push(FileFault::Io { path: path.to_owned(), error }),
    }
    if faults.is_empty() { Ok(snapshot) } else { Err(faults) }
}

/// Sends a snapshot of a folder whenever a file of it changes; a folder with a fault changes nothing, and its faults are
/// logged. Ends when nobody listens.
///
/// # Errors
/// When the folder cannot be watched.
pub async fn watch_folder(folder: PathBuf, snapshots: watch::Sender<Snapshot>) -> io::Result<()> {
    let events = changes_of(&folder)?;
    loop {
        match read(&folder) {
            Ok(snapshot) => {
                let _nobody_yet = snapshots.send_replace(snapshot);
            }
            Err(faults) => {
                faults.iter().for_each(|fault| tracing::warn!(%fault, "rules of the ingress stay as they are"))
            }
        }
        tokio::select! {
            () = snapshots.closed() => return Ok(()),
            changed = next(&events) => changed?,
        }
    }
}

#[expect(deprecated, reason = "its successor is unsafe for types that lie about their descriptor; an OwnedFd does not")]
fn changes_of(folder: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let changes = WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO | WatchFlags::MOVED_FROM | WatchFlags::DELETE;
    inotify::add_watch(&events, folder, changes)?;
    AsyncFd::new(events)
}

/// Waits for a change, then until none has come for a moment.
async fn next(events: &AsyncFd<OwnedFd>) -> io::Result<()> {
    drain(events).await?;
    while let Ok(more) = tokio::time::timeout(SETTLE, drain(events)).await {
        more?;
    }
    Ok(())
}

async fn drain(events: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    loop {
        let mut ready = events.readable().await?;
        let mut reader = inotify::Reader::new(events.get_ref(), &mut buffer);
        let mut seen = false;
        loop {
            match reader.next() {
                Ok(_) => seen = true,
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        ready.clear_ready();
        if seen {
            return Ok(());
        }
    }
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
    faults
}

/// Sorts an object, or those of a list, into the snapshot.
fn take(path: &Path, mut object: Value, snapshot: &mut Snapshot, faults: &mut Vec<FileFault>) {
    fn add<T: DeserializeOwned>(list: &mut Vec<Arc<T>>, object: Value) -> Result<(), serde_json::Error> {
        list.push(Arc::new(serde_json::from_value(object)?));
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
    let added = match (group.as_str(), kind.as_str()) {
        ("networking.internal.knative.dev/v1alpha1", "Ingress") => add(&mut snapshot.ingresses, object),
        ("v1", "Service") => add(&mut snapshot.services, object),
        ("v1", "Endpoints") => add(&mut snapshot.endpoints, object),
        ("v1", "Secret") => add(&mut snapshot.secrets, object),
        ("discovery.k8s.io/v1", "EndpointSlice") => add(&mut snapshot.slices, object),
        _ => Ok(()),
    };
    if let Err(error) = added {
        faults.push(FileFault::Object { path: path.to_owned(), kind, error });
    }
}
