//! The edge to the coordinator: its words go to the worker of their chain; it is told what happened.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, atomic::Ordering},
};

use lifl_api::{
    event::ClientRole,
    node::{FromGateway, ToGateway},
};
use lifl_daemon::{Channel, ChannelError};
use lifl_shm::Ledger;
use tokio::sync::mpsc;

use super::{agent, worker};
use crate::{
    chain::{Chain, Inner, Meta},
    state::{Gateway, Orphan, Word},
};

enum Event {
    Channel(Option<Channel>),
    Word(Result<Option<(ToGateway, Vec<OwnedFd>)>, ChannelError>),
    Out(Option<Word>),
}

/// Serves the channel to the coordinator, whichever coordinator it is.
pub(crate) async fn run(
    gateway: Arc<Gateway>,
    mut channels: mpsc::UnboundedReceiver<Channel>,
    mut words: mpsc::UnboundedReceiver<Word>,
) {
    let mut channel: Option<Channel> = None;
    loop {
        let event = tokio::select! {
            biased;
            new = channels.recv() => Event::Channel(new),
            word = receive(channel.as_ref()), if channel.is_some() => Event::Word(word),
            word = words.recv() => Event::Out(word),
        };
        let kept = match event {
            Event::Channel(None) | Event::Out(None) => return,
            Event::Channel(Some(new)) => {
                gateway.listen_for_coordinator(None);
                let greeted = greet(&gateway, &new).await;
                channel = Some(new);
                greeted
            }
            Event::Word(Ok(Some((ToGateway::Greet, _)))) => match channel.as_ref() {
                Some(channel) => greet(&gateway, channel).await,
                None => Ok(()),
            },
            Event::Word(Ok(Some((ToGateway::Clients, fds)))) => {
                gateway.listen_for_coordinator(fds.into_iter().next());
                Ok(())
            }
            Event::Word(Ok(Some((word, fds)))) => {
                heed(&gateway, word, fds);
                Ok(())
            }
            Event::Word(Ok(None)) => Err(None),
            Event::Word(Err(ChannelError::Words { source, text })) => {
                tracing::error!(error = %source, text, "word of the coordinator is not understood");
                Ok(())
            }
            Event::Word(Err(error)) => Err(Some(error)),
            Event::Out(Some(word)) => say(&gateway, channel.as_ref(), word).await,
        };
        if let Err(error) = kept {
            tracing::info!(error = error.map(|e| e.to_string()), "coordinator is gone; the open rounds go on");
            // Its supervisor has the listener: who connects there waits for the next coordinator, or learns that its pod is gone.
            gateway.listen_for_coordinator(None);
            channel = None;
        }
    }
}

async fn receive(channel: Option<&Channel>) -> Result<Option<(ToGateway, Vec<OwnedFd>)>, ChannelError> {
    match channel {
        Some(channel) => channel.recv().await,
        None => std::future::pending().await,
    }
}

/// A new coordinator: where everything stands.
async fn greet(gateway: &Arc<Gateway>, channel: &Channel) -> Result<(), Option<ChannelError>> {
    let chains = gateway.chains();
    let states = chains.iter().map(|chain| chain.lock().state()).collect();
    let journal = gateway.config.journal_dir.is_some();
    channel.send(&FromGateway::Hello { chains: states, journal }, &[]).await.map_err(Some)?;
    for chain in &chains {
        let joined: Vec<_> = chain.lock().clients.iter().map(|(name, role)| joined(chain.id, name, role)).collect();
        for word in joined {
            channel.send(&word, &[]).await.map_err(Some)?;
        }
        let closed = chain.lock().closed();
        if let Some(closed) = closed {
            channel.send(&closed, &[]).await.map_err(Some)?;
        }
        let first = chain.lock().first_word(true);
        if let Some((word, file)) = first {
            channel.send(&word, &[file.as_fd()]).await.map_err(Some)?;
        }
        tell_round_done(gateway, chain);
    }
    Ok(())
}

/// The word of a client that is here.
pub(crate) fn joined(chain: u32, client: &str, role: ClientRole) -> FromGateway {
    FromGateway::Joined { chain, client: client.to_owned(), evaluator: role == ClientRole::Evaluator }
}

async fn say(gateway: &Arc<Gateway>, channel: Option<&Channel>, word: Word) -> Result<(), Option<ChannelError>> {
    let (word, fd) = match word {
        Word::Say(word, fd) => (word, fd),
        Word::Progress(chain) => {
            let Some(chain) = gateway.chain(chain) else { return Ok(()) };
            // Before the reading: what is admitted from here on asks for a word of its own.
            chain.progress.store(false, Ordering::Release);
            let inner = chain.lock();
            let (round, admitted) = (inner.ledger.round().round, inner.ledger.admitted());
            (FromGateway::Progress { chain: chain.id, round, admitted }, None)
        }
        Word::First(id) => {
            // Who comes later is told when it comes.
            let Some(chain) = gateway.chain(id).filter(|_| channel.is_some()) else { return Ok(()) };
            let first = chain.lock().first_word(false);
            let Some((word, file)) = first else { return Ok(()) };
            (word, Some(file))
        }
    };
    let Some(channel) = channel else { return Ok(()) };
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    channel.send(&word, &fds).await.map_err(Some)
}

fn heed(gateway: &Arc<Gateway>, word: ToGateway, fds: Vec<OwnedFd>) {
    let id = match &word {
        ToGateway::Job { chain, .. }
        | ToGateway::Model { chain, .. }
        | ToGateway::Open { chain, .. }
        | ToGateway::Extend { chain, .. }
        | ToGateway::Close { chain, .. }
        | ToGateway::Commit { chain, .. }
        | ToGateway::Finish { chain, .. }
        | ToGateway::Alive { chain }
        | ToGateway::Remove { chain } => *chain,
        ToGateway::Greet | ToGateway::Clients => return,
    };
    let chain = gateway.chain(id).or_else(|| create(gateway, &word));
    if matches!(word, ToGateway::Remove { .. }) {
        let Some(chain) = &chain else { return };
        // At once: its worker may be waiting for memory that it will not get any more.
        gateway.remove(chain);
    }
    match chain {
        Some(chain) => drop(chain.words.send((word, fds))),
        None => tracing::error!(chain = id, "word of the coordinator for a chain that is not here"),
    }
}

/// The secret of a job, or the one for jobs without.
pub(crate) fn secret(gateway: &Gateway, of_the_job: Option<String>) -> Option<String> {
    of_the_job.or_else(|| gateway.config.join_secret.as_ref().map(|secret| secret.0.clone()))
}

/// A new job.
fn create(gateway: &Arc<Gateway>, word: &ToGateway) -> Option<Arc<Chain>> {
    let ToGateway::Job { chain, job, token_key, join_secret, slot_bytes } = word else { return None };
    let goal = job.spec.clients_to_select().max(job.spec.clients_per_round);
    let aggregators = goal.div_ceil(job.spec.aggregation.leaf_fan_in.max(1)).saturating_add(2);
    let made = Ledger::create(*chain, Ledger::capacity_for(goal, aggregators));
    let (ledger, fd) = made.inspect_err(|error| tracing::error!(chain, %error, "no ledger")).ok()?;
    let meta = Meta {
        job: (**job).clone(),
        token_key: token_key.clone(),
        join_secret: secret(gateway, join_secret.clone()),
        slot_bytes: *slot_bytes,
        model: None,
        previous: None,
        open: None,
        finish: None,
    };
    let inner = Inner::new(*chain, meta, ledger, gateway.config.credits)?;
    tracing::info!(chain, namespace = job.namespace(), job = job.name(), "job is served");
    Some(worker::start(gateway, inner, fd))
}

/// Keeps a member's segment until its job is told.
pub(crate) fn keep_orphan(gateway: &Gateway, chain: u32, segment: u32, writer: u32, fd: OwnedFd) {
    gateway.orphans().push(Orphan { chain, segment, writer, fd });
}

/// Maps what was kept for a chain that is here now.
pub(crate) fn adopt_orphans(gateway: &Arc<Gateway>, chain: &Arc<Chain>) {
    let all = std::mem::take(&mut *gateway.orphans());
    let (ours, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|orphan| orphan.chain == chain.id);
    gateway.orphans().extend(others);
    for Orphan { segment, writer, fd, .. } in ours {
        agent::add_segment(gateway, chain, segment, writer, fd);
    }
}

/// Tells of the round's model, if it is sealed and readable. Again and again: the coordinator knows what it has.
pub(crate) fn tell_round_done(gateway: &Gateway, chain: &Chain) {
    let word = {
        let inner = chain.lock();
        let Some((done, segment)) = inner.round_done() else { return };
        let fd = inner.members.get(&segment).and_then(|member| member.fd.try_clone().ok());
        fd.map(|fd| Word::Say(done, Some(fd)))
    };
    if let Some(word) = word {
        let _the_process_ends = gateway.coordinator.send(word);
    }
}
