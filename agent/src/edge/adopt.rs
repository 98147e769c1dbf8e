//! The beginning: a first life makes the path; a later one adopts what the supervisor kept.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex},
};

use lifl_api::node::FromAgent;
use lifl_cluster::Notices;
use lifl_daemon::{Channel, Child, Deposit, Epochs, Startup, failpoint};
use lifl_ebpf::Path;
use lifl_ebpf_common::{
    maps::{ANY_CHAIN, Member as Seat, RouteKey},
    role,
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::{Agent, AgentError, Event, counted, hear, segments::segments_of, tell};
use crate::{
    cgroup::Cgroups,
    config::Config,
    pods::Pods,
    process,
    state::{Chain, ChainMeta, GATEWAY_SEAT, Member, MemberMeta, Segment, SegmentMeta, State},
};

pub(super) const GATEWAY: Seat = Seat { chain: ANY_CHAIN, role: role::GATEWAY, counter: GATEWAY_SEAT, reserved: 0 };

/// What the supervisor kept, sorted.
#[derive(Default)]
struct Kept {
    path: BTreeMap<String, OwnedFd>,
    gateway_socket: Option<(OwnedFd, OwnedFd)>,
    chains: Vec<(u32, ChainMeta)>,
    segments: Vec<(u32, u32, SegmentMeta, Option<OwnedFd>)>,
    members: Vec<(MemberMeta, OwnedFd, OwnedFd, OwnedFd)>,
    pods: Vec<Deposit>,
    traffic: BTreeMap<String, OwnedFd>,
}

// === impl Kept ===

impl Kept {
    fn sort(deposits: Vec<Deposit>) -> Self {
        let mut kept = Self::default();
        let (pods, deposits) = deposits.into_iter().partition(|deposit| Pods::owns(&deposit.key));
        kept.pods = pods;
        let deposits: Vec<Deposit> = deposits;
        for Deposit { key, meta, fds } in deposits {
            let mut fds = fds.into_iter();
            let mut parts = key.split('/');
            let kind = parts.next().unwrap_or_default();
            let numbers: Vec<u32> = parts.filter_map(|part| part.parse().ok()).collect();
            match (kind, &numbers[..]) {
                ("path", _) => kept.path = read::<Vec<String>>(&key, meta).into_iter().flatten().zip(fds).collect(),
                (counted::DEPOSIT, _) => {
                    kept.traffic = read::<Vec<String>>(&key, meta).into_iter().flatten().zip(fds).collect();
                }
                ("gateway-socket", _) => kept.gateway_socket = fds.next().zip(fds.next()),
                ("chain", [chain]) => kept.chains.extend(read(&key, meta).map(|meta| (*chain, meta))),
                ("segment", [chain, id]) => {
                    kept.segments.extend(read(&key, meta).map(|meta| (*chain, *id, meta, fds.next())));
                }
                ("member", _) => {
                    if let (Some(meta), Some(control), Some(near), Some(pidfd)) =
                        (read(&key, meta), fds.next(), fds.next(), fds.next())
                    {
                        kept.members.push((meta, control, near, pidfd));
                    }
                }
                _ => tracing::warn!(key, "unknown deposit"),
            }
        }
        kept
    }
}

fn read<T: DeserializeOwned>(key: &str, meta: serde_json::Value) -> Option<T> {
    serde_json::from_value(meta).map_err(|error| tracing::error!(%error, key, "unreadable deposit")).ok()
}

// === impl Agent ===

impl Agent {
    pub(super) async fn begin(
        child: Arc<Child>,
        mut startup: Startup,
        events: mpsc::UnboundedSender<Event>,
        cgroups: Cgroups,
    ) -> Result<Self, AgentError> {
        let config: Config = serde_json::from_value(startup.config)?;
        let epochs = Epochs::take(&mut startup.restored);
        let mut kept = Kept::sort(startup.restored);
        let path = match kept.path.is_empty() {
            true => Self::load_path(&config)?,
            false => Path::adopt(std::mem::take(&mut kept.path)).map_err(|e| std::io::Error::other(e.to_string()))?,
        };
        path.hold(true)?;
        // All of it at once: half a path could neither be adopted nor be made anew.
        let (names, fds): (Vec<_>, Vec<_>) = path.fds()?.into_iter().unzip();
        if !names.is_empty() {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            child.deposit("path", &names, &fds).await?;
        }
        failpoint("agent.path_kept");
        // Kept before it is used, as every socket: a successor finds each seat that is taken.
        let (socket, near) = match kept.gateway_socket.take() {
            Some(pair) => pair,
            None => {
                let (socket, near) = lifl_ebpf::pair()?;
                child.deposit("gateway-socket", &(), &[socket.as_fd(), near.as_fd()]).await?;
                (socket, near)
            }
        };
        if path.register(None, near.as_fd(), GATEWAY).is_err() {
            path.register(Some(socket.as_fd()), near.as_fd(), GATEWAY)?;
        }
        failpoint("agent.registered");
        let folder = config.netns.clone();
        let mut pods = Pods::adopt(child.clone(), folder, std::mem::take(&mut kept.pods)).await?;
        let counted = counted::counted(&child, &config, std::mem::take(&mut kept.traffic)).await?;
        pods.count_by(counted.clone());
        let instance = config.node.as_ref().map(|node| node.name.clone()).unwrap_or_default();
        let (notices, crier) = Notices::new("lifl-agent", instance);
        let mut agent = Self {
            failpoint: config.function_failpoint.clone().filter(|_| startup.first),
            state: Arc::new(Mutex::new(State::new(config.shm_limit))),
            cgroups,
            child,
            config,
            path: Arc::new(path),
            gateway: None,
            gateway_epoch: 0,
            superseded: None,
            epochs,
            coordinator: None,
            gateway_socket: (socket, near),
            pods,
            counted,
            notices,
            crier: Some(crier),
            mounts: None,
            events,
            first: startup.first,
            early: Vec::new(),
        };
        agent.observe()?;
        agent.adopt(kept).await?;
        agent.path.hold(false)?;
        Ok(agent)
    }

    /// Takes back chains, segments and functions; those that were not settled are started anew.
    async fn adopt(&mut self, kept: Kept) -> Result<(), AgentError> {
        {
            let mut state = self.state();
            for (id, meta) in kept.chains {
                state.quota.set_chain(id, meta.quota);
                state.chains.insert(id, Chain::new(meta));
            }
            for (chain, id, meta, fd) in kept.segments {
                state.quota.adopt(chain, meta.bytes);
                if let Some(entry) = state.chains.get_mut(&chain) {
                    entry.segments.insert(id, Segment { meta, fd });
                }
            }
            state.note_peak();
        }
        for (meta, control, near, pidfd) in kept.members {
            self.adopt_member(meta, control, near, pidfd).await?;
        }
        let chains: Vec<u32> = {
            let state = self.state();
            for (id, entry) in &state.chains {
                self.path.set_route(RouteKey { chain: *id, dst: role::GATEWAY }, GATEWAY_SEAT)?;
                entry.members.iter().try_for_each(|(role, member)| {
                    self.path.set_route(RouteKey { chain: *id, dst: *role }, member.meta.seat)
                })?;
            }
            state.chains.keys().copied().collect()
        };
        for chain in chains {
            self.carry_out(chain).await?;
        }
        Ok(())
    }

    async fn adopt_member(
        &mut self,
        meta: MemberMeta,
        control: OwnedFd,
        near: OwnedFd,
        pidfd: OwnedFd,
    ) -> Result<(), AgentError> {
        let (seat, chain, role) = (meta.seat, meta.chain, meta.config.role);
        let member = Seat { chain, role, counter: seat, reserved: 0 };
        // Without a router's end A: the function has it. The kernel path has the socket already.
        let known = self.path.register(None, near.as_fd(), member);
        if !meta.settled || known.is_err() {
            tracing::info!(chain, role, "function was being set up when the agent died: started anew");
            process::kill(pidfd.as_fd());
            let _not_registered = self.path.unregister(seat);
            self.child.remove(&format!("member/{seat}")).await?;
            return self.orphan(chain, seat).await;
        }
        let channel = Arc::new(Channel::new(control)?);
        let pidfd = Arc::new(pidfd);
        let member = Member { meta, channel: channel.clone(), pidfd, socket: None, adopted: true, last_words: None };
        let segments = {
            let mut state = self.state();
            state.chains.get_mut(&chain).map_or_else(Vec::new, |entry| {
                entry.members.insert(role, member);
                segments_of(chain, entry)
            })
        };
        tell(Some(&channel), &FromAgent::Adopted, &[]).await;
        for (word, fd) in segments {
            tell(Some(&channel), &word, &[fd.as_fd()]).await;
        }
        hear(channel, self.events.clone(), move |word, fds| Event::Function(seat, word, fds), Some(Event::Ended(seat)));
        Ok(())
    }
}
