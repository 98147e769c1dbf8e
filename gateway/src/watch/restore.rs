//! A second life: chains, segments and sockets as the supervisor kept them.

use std::{collections::BTreeMap, os::fd::OwnedFd, sync::Arc};

use lifl_daemon::Deposit;
use lifl_ebpf::role;
use lifl_shm::{Ledger, SegmentReader};

use super::{data, worker};
use crate::{
    chain::{Chain, FirstModel, Inner, Meta, Own},
    ingress::Listener,
    state::Gateway,
};

/// What is restored besides the chains.
#[derive(Debug, Default)]
pub(crate) struct Restored {
    /// The public listener.
    pub(crate) listener: Option<OwnedFd>,
    /// The listeners of the ingress.
    pub(crate) ingress_listeners: Vec<(Listener, OwnedFd)>,
    /// The data socket.
    pub(crate) socket: Option<OwnedFd>,
    /// Releases whose group was not whole.
    pub(crate) staged: Vec<Vec<u8>>,
    /// Some chain is.
    pub(crate) chains: bool,
}

/// Takes over what the supervisor kept. What is unreadable is told and left out: the rest goes on.
pub(crate) fn take(gateway: &Arc<Gateway>, deposits: Vec<Deposit>) -> Restored {
    let mut restored = Restored::default();
    let mut ledgers = BTreeMap::new();
    let mut segments: BTreeMap<u32, Vec<(u32, u64, OwnedFd)>> = BTreeMap::new();
    let mut firsts = BTreeMap::new();
    for Deposit { key, meta, fds } in deposits {
        let mut fds = fds.into_iter();
        let mut path = key.split('/');
        match (path.next(), path.next().and_then(number), path.next().and_then(number), fds.next()) {
            (Some("listener"), _, _, Some(fd)) => restored.listener = Some(fd),
            (Some(name), None, None, Some(fd)) if let Some(listener) = Listener::of_deposit(name) => {
                restored.ingress_listeners.push((listener, fd));
            }
            (Some(data::SOCKET), _, _, Some(fd)) => restored.socket = Some(fd),
            (Some(data::STAGED), ..) => restored.staged = serde_json::from_value(meta).unwrap_or_default(),
            (Some("ledger"), Some(chain), None, Some(fd)) => drop(ledgers.insert(chain, (meta, fd))),
            (Some("segment"), Some(chain), Some(segment), Some(fd)) => {
                segments.entry(chain).or_default().push((segment, meta.as_u64().unwrap_or(0), fd));
            }
            (Some("first"), Some(chain), None, Some(file)) => {
                let length = meta.as_u64().unwrap_or(0);
                firsts.insert(chain, FirstModel { file, length, kept: true, told: false });
            }
            _ => tracing::warn!(key, "deposit that nobody knows"),
        }
    }
    for (chain, (meta, fd)) in ledgers {
        let own = segments.remove(&chain).unwrap_or_default();
        let first = firsts.remove(&chain);
        restored.chains |= self::chain(gateway, chain, meta, fd, own, first).is_some();
    }
    restored
}

fn number(text: &str) -> Option<u32> {
    text.parse().ok()
}

fn chain(
    gateway: &Arc<Gateway>,
    chain: u32,
    meta: serde_json::Value,
    fd: OwnedFd,
    segments: Vec<(u32, u64, OwnedFd)>,
    first: Option<FirstModel>,
) -> Option<Arc<Chain>> {
    let told = |error: &dyn std::fmt::Display| tracing::error!(chain, %error, "chain is lost");
    let meta: Meta = serde_json::from_value(meta).inspect_err(|error| told(error)).ok()?;
    let ledger = Ledger::open(&fd, chain).inspect_err(|error| told(error)).ok()?;
    let mut inner = Inner::new(chain, meta, ledger, gateway.config.credits)?;
    inner.first = first;
    for (segment, bytes, fd) in segments {
        match SegmentReader::map(&fd, chain, segment) {
            Ok(reader) if reader.spec().writer == role::GATEWAY => {
                inner.own.insert(segment, Own { fd, bytes, old: Some(reader) });
            }
            Ok(_) => tracing::error!(chain, segment, "kept segment is not ours"),
            Err(error) => tracing::error!(chain, segment, %error, "kept segment is not readable"),
        }
    }
    inner.resume(gateway);
    Some(worker::start(gateway, inner, fd))
}

// === impl Inner ===

impl Inner {
    /// Goes on where the ledger says that an earlier life was.
    fn resume(&mut self, gateway: &Gateway) {
        let round = self.ledger.round();
        // The model was named and kept, its round not yet retired: the coordinator has it stored.
        let named = self.meta.model.as_ref().is_some_and(|model| model.round == round.round && round.goal != 0);
        if named && !round.open && !self.is_between_rounds() {
            let mut releases = Vec::new();
            if let Err(error) = self.retire(round.round, &mut releases) {
                tracing::error!(chain = self.chain, %error, "round cannot be retired");
            }
        }
        // The round was kept as opened, and is not: nobody can have sent anything.
        if let Some(open) = self.meta.open.clone()
            && self.is_between_rounds()
            && self.ledger.committed().is_none_or(|committed| committed < open.round)
            && let Err(error) = self.ledger.begin(open.round, open.goal)
        {
            tracing::error!(chain = self.chain, round = open.round, %error, "round cannot be opened again");
        }
        self.serve_model(&gateway.gone);
    }
}
