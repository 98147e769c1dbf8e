//! Who was heard of: the clients of one job.

use std::{collections::HashMap, time::Duration};

use lifl_api::event::ClientRole;
use tokio::time::Instant;

/// The clients of a job. A long poll under way counts as being heard of all the time.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    by_name: HashMap<String, Client>,
}

#[derive(Debug)]
struct Client {
    role: ClientRole,
    heard: Instant,
    polls: u32,
}

/// What hearing of a client changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It is new here: the coordinator is to know.
    New,
    /// It was known, and is what it was.
    Known,
    /// There are as many as there may be.
    TooMany,
}

// === impl Clients ===

impl Clients {
    /// A client called, authenticated.
    pub(crate) fn heard(&mut self, name: &str, role: ClientRole, now: Instant, max: usize, silence: Duration) -> Heard {
        if let Some(client) = self.by_name.get_mut(name) {
            client.heard = now;
            let changed = std::mem::replace(&mut client.role, role) != role;
            return if changed { Heard::New } else { Heard::Known };
        }
        if self.by_name.len() >= max {
            // Names cost a stranger nothing where a job has no secret: those that fell silent make room.
            self.by_name.retain(|_, client| client.is_alive(now, silence));
        }
        if self.by_name.len() >= max {
            return Heard::TooMany;
        }
        self.by_name.insert(name.to_owned(), Client { role, heard: now, polls: 0 });
        Heard::New
    }

    /// A long poll begins (`true`) or ends.
    pub(crate) fn poll(&mut self, name: &str, begins: bool, now: Instant) {
        if let Some(client) = self.by_name.get_mut(name) {
            client.polls = if begins { client.polls + 1 } else { client.polls.saturating_sub(1) };
            client.heard = now;
        }
    }

    /// Trainers that are alive, sorted.
    pub(crate) fn alive(&self, now: Instant, silence: Duration) -> Vec<String> {
        let alive = |client: &Client| client.role == ClientRole::Trainer && client.is_alive(now, silence);
        let mut names: Vec<_> = self.by_name.iter().filter(|(_, c)| alive(c)).map(|(name, _)| name.clone()).collect();
        names.sort_unstable();
        names
    }

    /// All of them with their roles.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, ClientRole)> {
        self.by_name.iter().map(|(name, client)| (name.as_str(), client.role))
    }

    pub(crate) fn len(&self) -> usize {
        self.by_name.len()
    }
}

// === impl Client ===

impl Client {
    fn is_alive(&self, now: Instant, silence: Duration) -> bool {
        self.polls > 0 || now.saturating_duration_since(self.heard) <= silence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_ends_life_and_polls_hold_it() {
        let (start, silence) = (Instant::now(), Duration::from_secs(30));
        let mut clients = Clients::default();
        assert_eq!(clients.heard("b", ClientRole::Trainer, start, 3, silence), Heard::New);
        assert_eq!(clients.heard("a", ClientRole::Trainer, start, 3, silence), Heard::New);
        assert_eq!(clients.heard("e", ClientRole::Evaluator, start, 3, silence), Heard::New);
        assert_eq!(clients.heard("a", ClientRole::Trainer, start, 3, silence), Heard::Known);
        assert_eq!(clients.heard("c", ClientRole::Trainer, start, 3, silence), Heard::TooMany);
        assert_eq!(clients.alive(start, silence), ["a", "b"]);
        clients.poll("b", true, start);
        let late = start + Duration::from_secs(31);
        assert_eq!(clients.alive(late, silence), ["b"]);
        clients.poll("b", false, late);
        assert_eq!(clients.alive(late + silence, silence), ["b"]);
        assert_eq!(clients.heard("c", ClientRole::Trainer, late, 3, silence), Heard::New);
        assert_eq!(clients.len(), 2);
    }
}
