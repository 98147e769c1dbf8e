//! `job.json`: whose folder it is, its chain, and the key of its tokens.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
};

use lifl_api::http::schema;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use super::{Checkpoint, CheckpointError, model::hex};

/// `job.json`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// `lifl.dev/job-identity/v1`.
    pub schema: String,
    /// Namespace of the job.
    pub namespace: String,
    /// The job.
    pub job: String,
    /// Its chain, once it had one.
    pub chain: Option<u32>,
    /// Key of its tokens, hex: whoever has it can make tokens.
    pub token_key: String,
}

// === impl Identity ===

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { schema: _, namespace, job, chain, token_key: _ } = self;
        f.debug_struct("Identity")
            .field("namespace", namespace)
            .field("job", job)
            .field("chain", chain)
            .finish_non_exhaustive()
    }
}

// === impl Checkpoint ===

impl Checkpoint {
    /// The folder's identity; a new folder becomes this job's.
    ///
    /// # Errors
    /// [`CheckpointError::Foreign`] when it is another job's.
    pub fn identity(&self, namespace: &str, job: &str) -> Result<Identity, CheckpointError> {
        let path = self.root.join("job.json");
        let found = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice::<Identity>(&bytes)
                .map_err(|e| {
                    io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("{e}; without it clients must join again: delete it to go on"),
                    )
                })
                .map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        };
        if let Some(identity) = found.map_err(|source| CheckpointError::Io { path, source })? {
            if (identity.namespace.as_str(), identity.job.as_str()) != (namespace, job) {
                let owner = format!("{}/{}", identity.namespace, identity.job);
                return Err(CheckpointError::Foreign { path: self.root.clone(), owner });
            }
            return Ok(identity);
        }
        let mut key = [0; 32];
        let io = |e: rustix::io::Errno| CheckpointError::Io { path: "getrandom".into(), source: e.into() };
        if getrandom(&mut key, GetRandomFlags::empty()).map_err(io)? != key.len() {
            return Err(io(rustix::io::Errno::IO));
        }
        let identity = Identity {
            schema: schema("job-identity"),
            namespace: namespace.to_owned(),
            job: job.to_owned(),
            chain: None,
            token_key: hex(&key),
        };
        self.save_identity(&identity)?;
        Ok(identity)
    }

    /// Writes `job.json`, readable by its owner only, from its first byte on.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn save_identity(&self, identity: &Identity) -> Result<(), CheckpointError> {
        let (path, new) = (self.root.join("job.json"), self.root.join(".job.json.new"));
        let write = || -> io::Result<()> {
            match std::fs::remove_file(&new) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(identity)?)?;
            file.sync_all()?;
            std::fs::rename(&new, &path)?;
            File::open(&self.root)?.sync_all()
        };
        write().map_err(|source| CheckpointError::Io { path: path.clone(), source })
    }
}
