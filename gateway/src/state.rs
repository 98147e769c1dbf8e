//! The gateway's stores: chains, and the queues to its three neighbours. No await while a lock is held.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, atomic::Ordering},
};

use lifl_api::{node::FromGateway, pod::PodAsk};
use lifl_daemon::Child;
use lifl_ebpf::Descriptor;
use lifl_proxy::Limits;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use crate::{
    budget::Budget,
    chain::{Chain, Gone, Inner},
    config::Config,
    journal::Journals,
    metrics::Metrics,
    pods::Pods,
    watch::{agent::Agent, outbox::Outbox},
};

/// All that the tasks of this process share.
#[derive(Debug)]
pub(crate) struct Gateway {
    pub(crate) config: Config,
    pub(crate) child: Child,
    pub(crate) metrics: Metrics,
    pub(crate) agent: Agent,
    pub(crate) outbox: Outbox,
    pub(crate) pods: Pods,
    pub(crate) journals: Journals,
    /// Bodies of control events: of those who showed that they belong here, and of others.
    pub(crate) members: Budget,
    pub(crate) strangers: Budget,
    pub(crate) coordinator: mpsc::UnboundedSender<Word>,
    clients: mpsc::UnboundedSender<Option<OwnedFd>>,
    pub(crate) gone: mpsc::UnboundedSender<Gone>,
    pub(crate) draining: watch::Sender<bool>,
    chains: RwLock<Chains>,
    orphans: Mutex<Vec<Orphan>>,
}

/// A segment of a member of a chain whose job is not told yet: agent and coordinator speak on channels of their own.
#[derive(Debug)]
pub(crate) struct Orphan {
    pub(crate) chain: u32,
    pub(crate) segment: u32,
    pub(crate) writer: u32,
    pub(crate) fd: OwnedFd,
}

/// A word for the coordinator. Lost when it is away: it is told where things stand when it comes back.
#[derive(Debug)]
pub(crate) enum Word {
    /// As it is, with a descriptor beside.
    Say(FromGateway, Option<OwnedFd>),
    /// How far the chain's round is, as of when the word is sent.
    Progress(u32),
    /// The chain's first model, unless this coordinator was told of it.
    First(u32),
}

#[derive(Debug, Default)]
struct Chains {
    by_id: BTreeMap<u32, Arc<Chain>>,
    by_name: HashMap<String, Arc<Chain>>,
}

/// The far ends of the queues, for the tasks that empty them.
#[derive(Debug)]
pub(crate) struct Queues {
    pub(crate) coordinator: mpsc::UnboundedReceiver<Word>,
    pub(crate) agent: mpsc::UnboundedReceiver<crate::watch::agent::Order>,
    pub(crate) asks: mpsc::UnboundedReceiver<PodAsk>,
    /// The coordinator's listener for clients, or that there is none any more.
    pub(crate) clients: mpsc::UnboundedReceiver<Option<OwnedFd>>,
    pub(crate) gone: mpsc::UnboundedReceiver<Gone>,
}

// === impl Gateway ===

impl Gateway {
    pub(crate) fn new(config: Config, child: Child) -> Result<(Arc<Self>, Queues), prometheus::Error> {
        let metrics = Metrics::new(child.registry())?;
        let (coordinator, coordinator_queue) = mpsc::unbounded_channel();
        let (agent, agent_queue) = mpsc::unbounded_channel();
        let (gone, gone_queue) = mpsc::unbounded_channel();
        let (ask, asks) = mpsc::unbounded_channel();
        let (clients, clients_queue) = mpsc::unbounded_channel();
        let limits = Limits { connections: config.max_connections, ..Limits::default() };
        let gateway = Arc::new(Self {
            journals: Journals::new(config.journal_dir.clone()),
            members: Budget::new(config.control_bytes - config.control_bytes / 4),
            strangers: Budget::new(config.control_bytes / 4),
            config,
            child,
            metrics,
            agent: Agent::new(agent),
            outbox: Outbox::default(),
            pods: Pods::new(ask, limits),
            coordinator,
            clients,
            gone,
            draining: watch::Sender::new(false),
            chains: RwLock::default(),
            orphans: Mutex::default(),
        });
        let queues = Queues {
            coordinator: coordinator_queue,
            agent: agent_queue,
            asks,
            clients: clients_queue,
            gone: gone_queue,
        };
        Ok((gateway, queues))
    }

    /// Has clients accepted from the coordinator's listener too, or not any more.
    pub(crate) fn listen_for_coordinator(&self, listener: Option<OwnedFd>) {
        let _the_process_ends = self.clients.send(listener);
    }

    /// Changes a chain and carries out what that causes: descriptors in the order of the changes, slots, segments.
    pub(crate) fn with<R>(&self, chain: &Chain, change: impl FnOnce(&mut Inner, &mut Vec<Descriptor>) -> R) -> R {
        let mut inner = chain.lock();
        let mut out = Vec::new();
        let result = change(&mut inner, &mut out);
        self.outbox.push(&out);
        let (freed, dropped) = (std::mem::take(&mut inner.freed), std::mem::take(&mut inner.dropped));
        drop(inner);
        for _ in 0..freed {
            chain.slot_freed.notify_one();
        }
        for segment in dropped {
            self.agent.drop_segment(chain.id, segment);
        }
        result
    }

    /// Says something to the coordinator.
    pub(crate) fn tell(&self, word: FromGateway) {
        let _the_process_ends = self.coordinator.send(Word::Say(word, None));
    }

    /// Has the coordinator told how far the round is. One word speaks for all admissions until it is sent.
    pub(crate) fn tell_progress(&self, chain: &Chain) {
        if !chain.progress.swap(true, Ordering::AcqRel) {
            let _the_process_ends = self.coordinator.send(Word::Progress(chain.id));
        }
    }

    pub(crate) fn chain(&self, id: u32) -> Option<Arc<Chain>> {
        self.chains.read().unwrap_or_else(PoisonError::into_inner).by_id.get(&id).cloned()
    }

    pub(crate) fn chain_of(&self, namespace: &str, job: &str) -> Option<Arc<Chain>> {
        let chains = self.chains.read().unwrap_or_else(PoisonError::into_inner);
        chains.by_name.get(&format!("{namespace}/{job}")).cloned()
    }

    pub(crate) fn chains(&self) -> Vec<Arc<Chain>> {
        self.chains.read().unwrap_or_else(PoisonError::into_inner).by_id.values().cloned().collect()
    }

    pub(crate) fn insert(&self, chain: &Arc<Chain>) {
        let mut chains = self.chains.write().unwrap_or_else(PoisonError::into_inner);
        chains.by_id.insert(chain.id, Arc::clone(chain));
        chains.by_name.insert(format!("{}/{}", chain.namespace, chain.job), Arc::clone(chain));
    }

    /// A job is no more: it is not found, who waits for it is told, and what is under way for it comes to nothing.
    pub(crate) fn remove(&self, chain: &Chain) {
        chain.lock().meta.finish = Some((false, "the job is deleted".to_owned()));
        self.leave(chain);
        tracing::info!(chain = chain.id, namespace = chain.namespace, job = chain.job, "job is no more");
    }

    /// A chain's functions are no more, and its job goes on in another chain: whoever waits comes again.
    pub(crate) fn lose(&self, chain: &Chain) {
        chain.lost.store(true, Ordering::Release);
        self.leave(chain);
    }

    fn leave(&self, chain: &Chain) {
        {
            let mut chains = self.chains.write().unwrap_or_else(PoisonError::into_inner);
            chains.by_id.remove(&chain.id);
            // Another chain may serve a job of that name by now.
            let name = format!("{}/{}", chain.namespace, chain.job);
            if chains.by_name.get(&name).is_some_and(|of| of.id == chain.id) {
                chains.by_name.remove(&name);
            }
        }
        chain.removed.store(true, Ordering::Release);
        self.agent.forget(chain.id);
        chain.slot_freed.notify_waiters();
        chain.bump();
        self.orphans().retain(|orphan| orphan.chain != chain.id);
    }

    pub(crate) fn orphans(&self) -> MutexGuard<'_, Vec<Orphan>> {
        self.orphans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// What the admin page shows.
    pub(crate) fn status(&self) -> Value {
        let chains: Vec<Value> = self.chains().iter().map(|chain| status_of(chain)).collect();
        json!({
            "draining": self.is_draining(),
            "pods": self.pods.document(),
            "agent": self.agent.is_connected(),
            "descriptors": self.outbox.figures(),
            "chains": chains,
        })
    }
}

fn status_of(chain: &Chain) -> Value {
    let inner = chain.lock();
    let round = inner.ledger.round();
    let arena = inner.arena.as_ref();
    let shm: u64 = inner.own.values().map(|own| own.bytes).sum();
    json!({
        "chain": chain.id,
        "namespace": chain.namespace,
        "job": chain.job,
        "round": round.round,
        "open": round.open,
        "goal": round.goal,
        "admitted": inner.ledger.admitted(),
        "uploading": inner.uploading.len(),
        "waiting": inner.waiting.len(),
        "clients": inner.clients.len(),
        "modelRound": inner.meta.model.as_ref().map(|model| model.round),
        "slots": {"free": arena.map_or(0, lifl_shm::Arena::free_slots), "live": arena.map_or(0, lifl_shm::Arena::live_slots)},
        "shmBytes": shm,
        "totals": inner.totals,
    })
}
