//! The counters of pods: loaded by a first life, adopted by a later one.

use std::{collections::BTreeMap, os::fd::AsFd, os::fd::OwnedFd, sync::Arc};

use lifl_daemon::Child;
use lifl_ebpf::Traffic;

use super::AgentError;
use crate::{config::Config, pods::Counted};

/// Key of their deposit.
pub(super) const DEPOSIT: &str = "traffic";

/// The counters, or none where the node serves no pods or the kernel will not: then that is said once, here.
pub(super) async fn counted(
    child: &Child,
    config: &Config,
    kept: BTreeMap<String, OwnedFd>,
) -> Result<Arc<Counted>, AgentError> {
    if config.node.is_none() {
        return Ok(Arc::new(Counted::new(None)));
    }
    let kernel = match load(config, kept) {
        Ok(kernel) => kernel,
        Err(reason) => {
            tracing::info!(reason, "connections of pods are not counted by the kernel");
            return Ok(Arc::new(Counted::new(None)));
        }
    };
    let (names, fds): (Vec<_>, Vec<_>) = kernel.fds()?.into_iter().unzip();
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    child.deposit(DEPOSIT, &names, &fds).await?;
    Ok(Arc::new(Counted::new(Some(kernel))))
}

fn load(config: &Config, kept: BTreeMap<String, OwnedFd>) -> Result<Traffic, String> {
    if config.userspace {
        return Err("no eBPF: asked for".to_owned());
    }
    if !kept.is_empty() {
        match Traffic::adopt(kept) {
            Ok(adopted) => return Ok(adopted),
            Err(error) => tracing::warn!(%error, "counters of pods begin anew"),
        }
    }
    Traffic::load().map_err(|error| error.to_string())
}
