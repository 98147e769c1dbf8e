//! Where committed rounds are kept, and how a job goes on from there.
//!
//! ```text
//! <uri>/lock                             locked while a coordinator writes here
//! <uri>/job.json                         whose folder it is, chain, key of the tokens (0600)
//! <uri>/rounds/000003/model.safetensors  written first,
//!                     receipt.json       second: (source, id, weight, digest) of every update,
//!                     commit.json        last: the hashes of both; without it the round does not exist
//! <uri>/finished.json                    the stop condition was met: by which model, and which condition
//! <uri>/damaged/                         rounds that could not be read back, for people
//! ```
//!
//! Every file is synced and renamed into place before the next is begun, so a crash between any two steps leaves the
//! last committed round as it was. Pruning takes models only; receipts and commits of all rounds stay.

mod end;
mod identity;
mod lock;
mod model;

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use lifl_api::{http::schema, manifest::Manifest, node::ReceiptEntry};
use object_store::{ObjectStore as _, ObjectStoreExt as _, local::LocalFileSystem, path::Path as Key};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use self::model::{CHUNK, Inspector, hex};
pub use self::{
    end::Finished,
    identity::Identity,
    model::{Sealed, Source, initial},
};
use crate::{round::StoreFailure, state::Done};

/// A checkpoint folder.
#[derive(Debug)]
pub struct Checkpoint {
    store: LocalFileSystem,
    root: PathBuf,
    uri: String,
    /// Rounds whose model is kept.
    models: Mutex<BTreeSet<u32>>,
    /// Held, not read: the kernel frees it with the process.
    lock: Option<std::fs::File>,
    #[cfg(test)]
    pub(crate) steps_left: std::sync::atomic::AtomicU32,
}

/// `commit.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Commit {
    /// `lifl.dev/commit/v1`.
    pub schema: String,
    /// Round.
    pub round: u32,
    /// Of `model.safetensors`, lower-case hex.
    pub model_sha256: String,
    /// Its length.
    pub model_bytes: u64,
    /// Of `receipt.json`, lower-case hex.
    pub receipt_sha256: String,
    /// Updates in it.
    pub count: u32,
    /// Sum of their weights.
    pub weight: f64,
    /// From its opening to its commit.
    pub seconds: f64,
}

/// `receipt.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Receipts {
    /// `lifl.dev/receipts/v1`.
    pub schema: String,
    /// Round.
    pub round: u32,
    /// Every update in it.
    pub updates: Vec<ReceiptEntry>,
}

/// What a folder holds.
#[derive(Debug)]
pub struct Newest {
    /// The newest round that could be read back, and its model.
    pub committed: Option<(Commit, Sealed)>,
    /// All commits up to it, ascending.
    pub history: Vec<Commit>,
    /// What was wrong with newer rounds, which were set aside.
    pub warning: Option<String>,
}

/// A checkpoint that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Not a folder on this machine.
    #[error("'{0}' is not a file: URI of an absolute path")]
    Uri(String),
    /// The operating system said no.
    #[error("{path}: {source}")]
    Io {
        /// File or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The store said no.
    #[error("{}", chain(.0))]
    Store(#[from] object_store::Error),
    /// The folder is another job's.
    #[error("{path} is the checkpoint of job {owner}: give each job a folder of its own")]
    Foreign {
        /// Folder.
        path: PathBuf,
        /// Its job.
        owner: String,
    },
    /// Another coordinator writes into it.
    #[error("{path} is in use by {holder}: stop that one, or give this job a checkpoint folder of its own")]
    Locked {
        /// Folder.
        path: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// Rounds are committed, and none can be read back.
    #[error("{path}: none of the committed rounds can be read back: {why}; move the folder away to begin anew")]
    Damaged {
        /// Folder.
        path: PathBuf,
        /// What is wrong with each.
        why: String,
    },
    /// Not a model.
    #[error("{path}: {why}")]
    Model {
        /// File.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A test had the process crash here.
    #[cfg(test)]
    #[error("crashed")]
    Crashed,
}

/// The message of an error with those of its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// The path of a `file:` URI.
///
/// # Errors
/// [`CheckpointError::Uri`] for other schemes and hosts, and for what is no URI.
pub fn path_of(uri: &str) -> Result<PathBuf, CheckpointError> {
    let fail = || CheckpointError::Uri(uri.to_owned());
    let url = url::Url::parse(uri).map_err(|_not_a_uri| fail())?;
    let local = url.scheme() == "file" && uri.starts_with("file:///");
    local.then(|| url.to_file_path().ok()).flatten().ok_or_else(fail)
}

fn key(round: u32, file: &str) -> Key {
    Key::from(format!("rounds/{round:06}/{file}"))
}

const MODEL: &str = "model.safetensors";
const RECEIPT: &str = "receipt.json";
const COMMIT: &str = "commit.json";

// === impl CheckpointError ===

impl From<CheckpointError> for StoreFailure {
    fn from(error: CheckpointError) -> Self {
        match error {
            CheckpointError::Model { .. } => Self::Rejected(error.to_string()),
            other => Self::Storage(other.to_string()),
        }
    }
}

// === impl Checkpoint ===

impl Checkpoint {
    /// Opens the folder, creates it where it is missing.
    ///
    /// # Errors
    /// [`CheckpointError`].
    pub fn open(uri: &str) -> Result<Self, CheckpointError> {
        let root = path_of(uri)?;
        std::fs::create_dir_all(&root).map_err(|source| CheckpointError::Io { path: root.clone(), source })?;
        let store = LocalFileSystem::new_with_prefix(&root)?.with_fsync(true);
        Ok(Self {
            store,
            root,
            uri: uri.trim_end_matches('/').to_owned(),
            models: Mutex::default(),
            lock: None,
            #[cfg(test)]
            steps_left: u32::MAX.into(),
        })
    }

    /// URI of a round's model.
    #[must_use]
    pub fn model_uri(&self, round: u32) -> String {
        format!("{}/{}", self.uri, key(round, MODEL))
    }

    /// Writes a round: model, receipt, commit. The round is committed when this returns.
    ///
    /// # Errors
    /// `Rejected` when model or receipt are not those of the round, `Storage` when the disk failed.
    pub async fn write(
        &self,
        done: &Done,
        seconds: f64,
        source: &Source,
        manifest: &Manifest,
    ) -> Result<Commit, StoreFailure> {
        check_receipt(done).map_err(StoreFailure::Rejected)?;
        let model_sha256 = self.put_model(done.round, source, Some(manifest)).await?;
        let receipts = Receipts { schema: schema("receipts"), round: done.round, updates: done.receipt.clone() };
        let receipt = json(&receipts)?;
        let commit = Commit {
            schema: schema("commit"),
            round: done.round,
            model_sha256,
            model_bytes: source.length,
            receipt_sha256: hex(&Sha256::digest(&receipt)),
            count: done.count,
            weight: done.weight,
            seconds,
        };
        self.step()?;
        self.put(&key(done.round, RECEIPT), receipt).await?;
        self.step()?;
        self.put(&key(done.round, COMMIT), json(&commit)?).await?;
        self.step()?;
        self.models.lock().unwrap_or_else(PoisonError::into_inner).insert(done.round);
        Ok(commit)
    }

    /// Writes the first client's tensors as round 0.
    ///
    /// # Errors
    /// As [`Checkpoint::write`].
    pub async fn write_first(&self, source: &Source) -> Result<Commit, StoreFailure> {
        let model_sha256 = self.put_model(0, source, None).await?;
        let receipt = json(&Receipts { schema: schema("receipts"), round: 0, updates: Vec::new() })?;
        let commit = Commit {
            schema: schema("commit"),
            round: 0,
            model_sha256,
            model_bytes: source.length,
            receipt_sha256: hex(&Sha256::digest(&receipt)),
            count: 0,
            weight: 0.0,
            seconds: 0.0,
        };
        self.put(&key(0, RECEIPT), receipt).await?;
        self.put(&key(0, COMMIT), json(&commit)?).await?;
        self.models.lock().unwrap_or_else(PoisonError::into_inner).insert(0);
        Ok(commit)
    }

    /// Copies the model chunk by chunk, hashes and inspects it on the way: each byte is read once.
    async fn put_model(
        &self,
        round: u32,
        source: &Source,
        manifest: Option<&Manifest>,
    ) -> Result<String, StoreFailure> {
        let rejected = |why: String| StoreFailure::Rejected(format!("model of round {round}: {why}"));
        if let Some(manifest) = manifest.filter(|m| m.file_bytes() != source.length) {
            return Err(rejected(format!("{} bytes instead of {}", source.length, manifest.file_bytes())));
        }
        let mut inspector = Inspector::new(source, manifest).map_err(rejected)?;
        let mut hash = Sha256::new();
        let mut upload = self.store.put_multipart(&key(round, MODEL)).await.map_err(CheckpointError::from)?;
        let mut at = 0;
        while at < source.length {
            let chunk = match source.read(at, CHUNK) {
                Ok(chunk) => chunk,
                Err(error) => {
                    drop(upload.abort().await);
                    return Err(rejected(format!("its segment cannot be read at byte {at}: {error}")));
                }
            };
            if let Err(why) = inspector.inspect(at, &chunk) {
                drop(upload.abort().await);
                return Err(rejected(why));
            }
            hash.update(&chunk);
            at += chunk.len() as u64;
            self.step()?;
            upload.put_part(Bytes::from(chunk).into()).await.map_err(CheckpointError::from)?;
        }
        self.step()?;
        upload.complete().await.map_err(CheckpointError::from)?;
        Ok(hex(&hash.finalize()))
    }

    async fn put(&self, key: &Key, bytes: Vec<u8>) -> Result<(), CheckpointError> {
        self.store.put(key, bytes.into()).await?;
        Ok(())
    }

    /// Finds the newest round that can be read back, and sets newer ones aside.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] when there are commits and none can be.
    pub async fn newest(&self) -> Result<Newest, CheckpointError> {
        let mut commits = self.commits().await?;
        let mut complaints = Vec::new();
        let mut aside = Vec::new();
        while let Some((round, commit)) = commits.pop_last() {
            let read = match commit {
                Ok(commit) => self.read_back(&commit).await.map(|sealed| (commit, sealed)),
                Err(why) => Err(why),
            };
            match read {
                Ok(found) => {
                    for round in aside {
                        self.set_aside(round)?;
                    }
                    let mut history: Vec<Commit> = commits.into_values().filter_map(Result::ok).collect();
                    history.push(found.0.clone());
                    let warning = (!complaints.is_empty()).then(|| {
                        format!(
                            "went back to round {round}; newer ones are in {}/damaged: {}",
                            self.uri,
                            complaints.join("; ")
                        )
                    });
                    return Ok(Newest { committed: Some(found), history, warning });
                }
                Err(why) => {
                    complaints.push(format!("round {round}: {why}"));
                    aside.push(round);
                }
            }
        }
        if complaints.is_empty() {
            return Ok(Newest { committed: None, history: Vec::new(), warning: None });
        }
        Err(CheckpointError::Damaged { path: self.root.clone(), why: complaints.join("; ") })
    }

    /// All rounds that have a `commit.json`, readable or not; notes which models are kept.
    async fn commits(&self) -> Result<BTreeMap<u32, Result<Commit, String>>, CheckpointError> {
        let listed = self.store.list_with_delimiter(Some(&Key::from("rounds"))).await?;
        let mut commits = BTreeMap::new();
        for folder in listed.common_prefixes {
            let Some(round) = folder.filename().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            if self.store.head(&key(round, MODEL)).await.is_ok() {
                self.models.lock().unwrap_or_else(PoisonError::into_inner).insert(round);
            }
            let bytes = match self.store.get(&key(round, COMMIT)).await {
                Ok(found) => found.bytes().await?,
                Err(object_store::Error::NotFound { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            let commit =
                serde_json::from_slice::<Commit>(&bytes).map_err(|error| format!("commit.json: {error}")).and_then(
                    |c| if c.round == round { Ok(c) } else { Err(format!("commit.json is of round {}", c.round)) },
                );
            commits.insert(round, commit);
        }
        Ok(commits)
    }

    /// Reads a round's receipt and model back into a sealed memfd and compares the hashes.
    ///
    /// # Errors
    /// What does not fit.
    pub async fn read_back(&self, commit: &Commit) -> Result<Sealed, String> {
        let read = |file: &'static str| move |error: object_store::Error| format!("{file}: {}", chain(&error));
        let receipt = self.store.get(&key(commit.round, RECEIPT)).await.map_err(read(RECEIPT))?;
        let receipt = receipt.bytes().await.map_err(read(RECEIPT))?;
        if hex(&Sha256::digest(&receipt)) != commit.receipt_sha256 {
            return Err("receipt.json has another SHA-256 than its commit".into());
        }
        let location = key(commit.round, MODEL);
        let length = self.store.head(&location).await.map_err(read(MODEL))?.size;
        if length != commit.model_bytes {
            return Err(format!("model.safetensors has {length} bytes instead of {}", commit.model_bytes));
        }
        let mut memfd = model::Memfd::new("lifl-model").map_err(|e| e.to_string())?;
        let mut at = 0;
        while at < length {
            let end = length.min(at + CHUNK);
            let chunk = self.store.get_range(&location, at..end).await.map_err(read(MODEL))?;
            memfd.write(&chunk).map_err(|e| format!("memory for the model: {e}"))?;
            at = end;
        }
        let sealed = memfd.seal()?;
        if sealed.sha256 != commit.model_sha256 {
            return Err("model.safetensors has another SHA-256 than its commit".into());
        }
        Ok(sealed)
    }

    /// The model of a committed round, read back.
    ///
    /// # Errors
    /// What is wrong with it.
    pub async fn model(&self, round: u32) -> Result<OwnedFd, String> {
        let found = self.store.get(&key(round, COMMIT)).await.map_err(|e| chain(&e))?;
        let bytes = found.bytes().await.map_err(|e| chain(&e))?;
        let commit: Commit = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        Ok(self.read_back(&commit).await?.fd)
    }

    fn set_aside(&self, round: u32) -> Result<(), CheckpointError> {
        let from = self.root.join(format!("rounds/{round:06}"));
        let folder = self.root.join("damaged");
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| CheckpointError::Io { path, source }
        };
        std::fs::create_dir_all(&folder).map_err(io(&folder))?;
        let free = (0..).map(|n| folder.join(format!("{round:06}-{n}"))).find(|to| !to.exists());
        let to = free.unwrap_or_else(|| folder.join("last"));
        std::fs::rename(&from, &to).map_err(io(&from))?;
        self.models.lock().unwrap_or_else(PoisonError::into_inner).remove(&round);
        Ok(())
    }

    /// Deletes models beyond the newest, and the `keep` newest of every `every`-th round.
    ///
    /// # Errors
    /// [`CheckpointError`]; nothing that is to be kept is lost by it.
    pub async fn prune(&self, every: u32, keep: u32) -> Result<(), CheckpointError> {
        let models = self.models.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let keep = usize::try_from(keep.max(1)).unwrap_or(usize::MAX);
        let mut kept: BTreeSet<u32> =
            models.iter().rev().filter(|r| **r % every.max(1) == 0).take(keep).copied().collect();
        kept.extend(models.last());
        for round in models.difference(&kept) {
            self.step()?;
            match self.store.delete(&key(*round, MODEL)).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            self.models.lock().unwrap_or_else(PoisonError::into_inner).remove(round);
        }
        Ok(())
    }

    /// One step of the order that crash safety rests on; tests crash here.
    #[cfg_attr(not(test), expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests crash here"))]
    fn step(&self) -> Result<(), CheckpointError> {
        #[cfg(test)]
        if self.steps_left.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) == 0 {
            self.steps_left.store(0, std::sync::atomic::Ordering::Relaxed);
            return Err(CheckpointError::Crashed);
        }
        Ok(())
    }
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, StoreFailure> {
    serde_json::to_vec_pretty(value).map_err(|e| StoreFailure::Storage(e.to_string()))
}

/// A receipt names each update once, and its weights are the round's.
fn check_receipt(done: &Done) -> Result<(), String> {
    if done.count == 0 || u32::try_from(done.receipt.len()) != Ok(done.count) {
        return Err(format!("{} updates in the model, {} in the receipt", done.count, done.receipt.len()));
    }
    let ids: BTreeSet<_> = done.receipt.iter().map(|e| (&e.source, &e.id)).collect();
    if ids.len() != done.receipt.len() {
        return Err("the receipt names an update twice".into());
    }
    let sum: f64 = done.receipt.iter().map(|e| e.weight).sum();
    let near = (sum - done.weight).abs() <= 1e-6 * done.weight.abs();
    if !(near && done.weight.is_finite() && done.weight > 0.0) {
        return Err(format!("weights of the receipt sum to {sum}, those of the model to {}", done.weight));
    }
    Ok(())
}
