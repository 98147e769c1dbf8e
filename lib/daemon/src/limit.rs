//! Descriptors of this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Connections, pods and segments are descriptors: as many as this process may have at all.
pub fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, limit = limit.current, "limit of open files stays");
    }
}
