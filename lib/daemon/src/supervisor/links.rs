//! Supervisors of one node, linked: a component behind a link is paired as one of our own.

use std::{path::PathBuf, sync::Arc};

use super::*;
use crate::socket::{self, Caller, NodeSocket};

/// A hub that is away is tried again after this: the connection costs it microseconds, and pods wait for it.
const RECONNECT: Duration = Duration::from_millis(100);
/// A connection that has not said who it is by then is closed.
const HELLO: Duration = Duration::from_secs(2);
/// A new hub waits so long for the one that has superseded another: both look for the hub ten times a second.
const SUPERSEDER: Duration = Duration::from_secs(5);
/// Links at once; a node has three supervisors, and a fourth while one is replaced.
const MAX_LINKS: usize = 16;

/// Words of a supervisor over its link. The hub's are [`ToChild::Peer`] and [`ToChild::Superseded`], passed on as they are.
#[derive(Debug, Serialize, Deserialize)]
enum FromLink {
    /// Whose supervisor this is: the first word. `superseded`: another one of the name has taken its place, as a hub said.
    Hello {
        name: String,
        epoch: u64,
        #[serde(default)]
        superseded: bool,
    },
    /// Its component lives, as this process, and serves or does not yet; again with each change.
    Life { pid: i32, ready: bool },
    /// It does not live.
    Down,
}

/// A supervisor behind a link.
#[derive(Debug)]
pub(super) struct Link {
    id: u64,
    name: String,
    epoch: u64,
    channel: Arc<Channel>,
    life: Option<Remote>,
    /// A newer one of the name has taken its place.
    superseded: bool,
    /// That one has yet to find this hub.
    waits: bool,
}

/// A component behind a link: its process, which is another one after each start, and whether it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Remote {
    pid: i32,
    ready: bool,
}

// === impl Table ===

impl Table {
    /// The one of this name that is paired. There are two while a pod is being replaced: then it is the newer one from when on it
    /// serves. The older one's place is taken then, whoever is started again meanwhile, unless the newer one's supervisor goes.
    fn chosen(&self, name: &str) -> Option<&Link> {
        let named = || self.links.iter().filter(|link| link.name == name);
        let alone = named().all(|link| link.superseded);
        let may = |link: &&Link| link.life.is_some() && (!link.superseded || alone && !link.waits);
        named().filter(may).max_by_key(|link| (link.life.is_some_and(|life| life.ready), link.epoch, link.id))
    }

    /// Notes whose place is taken now: they are to be told.
    fn supersede(&mut self, name: &str) -> Vec<Arc<Channel>> {
        let chosen = self.chosen(name).filter(|link| link.life.is_some_and(|life| life.ready));
        let Some(epoch) = chosen.map(|link| link.epoch) else { return Vec::new() };
        let older = |link: &&mut Link| link.name == name && link.epoch < epoch && !link.superseded;
        let told = self.links.iter_mut().filter(older).map(|link| {
            link.superseded = true;
            link.channel.clone()
        });
        told.collect()
    }

    /// Those behind links that are to be paired with `name`; each other name once.
    pub(super) fn linked(&self, name: &str) -> Vec<End> {
        let wanted = |link: &Link| match self.entries.get(name) {
            Some(entry) => entry.peers.contains(&link.name.as_str()),
            None => link.name != name,
        };
        let is_chosen = |link: &&Link| self.chosen(&link.name).is_some_and(|chosen| chosen.id == link.id);
        self.links.iter().filter(is_chosen).filter(|link| wanted(link)).map(Link::end).collect()
    }
}

// === impl Link ===

impl Link {
    fn end(&self) -> End {
        End { name: self.name.clone(), epoch: self.epoch, channel: self.channel.clone() }
    }
}

// === impl Supervisor ===

impl Supervisor {
    /// Makes this supervisor the node's hub: takes links until the task is dropped.
    pub async fn take_links(self, socket: NodeSocket) {
        loop {
            match socket.accept().await {
                Ok(caller) => drop(tokio::spawn(self.clone().hear_link(caller).boxed())),
                Err(error) => {
                    tracing::warn!(%error, "socket of the node");
                    tokio::time::sleep(RECONNECT).await;
                }
            }
        }
    }

    async fn hear_link(self, caller: Caller) {
        let (name, epoch, superseded) = match tokio::time::timeout(HELLO, caller.channel.recv()).await {
            Ok(Ok(Some((FromLink::Hello { name, epoch, superseded }, _)))) => (name, epoch, superseded),
            other => return tracing::warn!(?other, "a link without a name"),
        };
        if !caller.may_be(&name) {
            return tracing::error!(
                uid = caller.uid(),
                name,
                "link refused: this user may not be a component of this name"
            );
        }
        let channel = Arc::new(caller.channel);
        let id = {
            let mut table = self.table();
            if table.links.len() >= MAX_LINKS || table.entries.contains_key(name.as_str()) {
                return tracing::error!(name, links = table.links.len(), "link refused: too many, or of our own name");
            }
            table.next_link += 1;
            let id = table.next_link;
            let (name, channel) = (name.clone(), channel.clone());
            table.links.push(Link { id, name, epoch, channel, life: None, superseded, waits: superseded });
            id
        };
        tracing::info!(name, epoch, superseded, "linked");
        let waited = tokio::time::sleep(SUPERSEDER);
        tokio::pin!(waited);
        let mut waits = superseded;
        let of_this = |link: &&mut Link| link.id == id;
        loop {
            let word = tokio::select! {
                word = channel.recv::<FromLink>() => word,
                () = &mut waited, if waits => {
                    waits = false;
                    let over = |table: &mut Table| table.links.iter_mut().filter(of_this).for_each(|link| link.waits = false);
                    self.set_link(&name, over).await;
                    continue;
                }
            };
            let life = match word {
                Ok(Some((FromLink::Life { pid, ready }, _))) => Some(Remote { pid, ready }),
                Ok(Some((FromLink::Down, _))) => None,
                Ok(Some((FromLink::Hello { .. }, _))) => continue,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, name, "link");
                    break;
                }
            };
            self.set_link(&name, |table| {
                table.links.iter_mut().filter(of_this).for_each(|link| link.life = life);
            })
            .await;
        }
        tracing::info!(name, epoch, "link ended");
        self.set_link(&name, |table| table.links.retain(|link| link.id != id)).await;
    }

    /// Changes a link, and pairs who is to be paired now: a component that was started again, the newer of two, or the older
    /// when the newer has gone.
    async fn set_link(&self, name: &str, change: impl FnOnce(&mut Table)) {
        let (chosen, superseded) = {
            let mut table = self.table();
            let who = |link: &Link| (link.id, link.life.map(|life| life.pid));
            let before = table.chosen(name).map(who);
            change(&mut table);
            let superseded = table.supersede(name);
            let chosen = table.chosen(name).filter(|link| before != Some(who(link))).map(Link::end);
            // It has its place again, as the last of its name.
            let channel = chosen.as_ref().map(|end| &end.channel);
            let again = table.links.iter_mut().filter(|link| channel.is_some_and(|c| Arc::ptr_eq(c, &link.channel)));
            again.for_each(|link| link.superseded = false);
            (chosen, superseded)
        };
        // By their supervisors: the agent may be another one than theirs was.
        for channel in superseded {
            let told = tokio::time::timeout(PAIR_TIMEOUT, channel.send(&ToChild::Superseded, &[])).await;
            if told.is_err() {
                tracing::error!(name, "a supervisor does not take the word that its place is taken");
            }
        }
        if let Some(end) = chosen {
            self.pair(end).await;
        }
    }

    /// Links this supervisor's component `name` to the node's hub, again and again, until the task is dropped.
    pub async fn keep_link(self, path: PathBuf, name: &'static str) {
        let (mut last, mut superseded) = (None, false);
        loop {
            let why = match socket::reach(&path) {
                Ok(channel) => {
                    tracing::info!(path = %path.display(), "linked to the node's agent");
                    match self.linked(name, &channel, &mut superseded).await {
                        Ok(()) => "the node's agent is away".to_owned(),
                        Err(error) => error.to_string(),
                    }
                }
                Err(error) => error.to_string(),
            };
            // Said once, not ten times a second.
            if last.as_ref() != Some(&why) {
                tracing::warn!(why, "not linked to the node's agent: trying again until it is there");
                last = Some(why);
            }
            tokio::time::sleep(RECONNECT).await;
        }
    }

    async fn linked(&self, name: &'static str, hub: &Channel, superseded: &mut bool) -> Result<(), ChannelError> {
        let hello = FromLink::Hello { name: name.to_owned(), epoch: self.epoch, superseded: *superseded };
        hub.send(&hello, &[]).await?;
        let mut changes = self.ready.subscribe();
        let mut told = None;
        loop {
            let now = self.life(name);
            if now != told {
                let word = now.map_or(FromLink::Down, |Remote { pid, ready }| FromLink::Life { pid, ready });
                hub.send(&word, &[]).await?;
                told = now;
            }
            tokio::select! {
                // The sender is this supervisor's.
                _ = changes.changed() => {}
                word = hub.recv::<ToChild>() => match word? {
                    Some((word @ (ToChild::Peer { .. } | ToChild::Superseded), fds)) => {
                        *superseded = matches!(word, ToChild::Superseded);
                        self.pass_on(name, &word, &fds).await;
                    }
                    Some((other, _)) => tracing::warn!(?other, "word of the hub ignored"),
                    None => return Ok(()),
                }
            }
        }
    }

    fn life(&self, name: &str) -> Option<Remote> {
        let table = self.table();
        let life = table.entries.get(name)?.begun()?;
        // One that drains gives way to whoever is there.
        Some(Remote { pid: life.pid.as_raw_nonzero().get(), ready: life.ready && !table.draining })
    }

    async fn pass_on(&self, name: &str, word: &ToChild, fds: &[OwnedFd]) {
        let channel = self.table().entries.get(name).and_then(|entry| Some(entry.begun()?.channel.clone()));
        if let Some(channel) = channel {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            let _its_end_will_tell = channel.send(word, &fds).await;
        }
    }
}
