//! The router's links, routes and counters, and one step of moving descriptors between links.

use std::{
    collections::{BTreeSet, HashMap},
    mem,
    os::fd::OwnedFd,
};

use lifl_ebpf_common::{
    descriptor::{DESCRIPTOR_BYTES, Descriptor},
    maps::{Counters, DropReason, Member, RouteKey},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll::EventFlags, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown},
    time::{ClockId, clock_gettime},
};

use super::decide;
use crate::{
    path::{Drained, PathError},
    wire::BATCH,
};

/// What the thread and the handle share.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) stop: bool,
    /// Nothing is moved: routes are still being told.
    pub(super) held: bool,
    links: HashMap<u64, Link>,
    last_token: u64,
    /// Which link sits at an index.
    seats: HashMap<u32, u64>,
    routes: HashMap<RouteKey, u32>,
    counters: HashMap<u32, Counters>,
    /// Sources that may have something to read.
    ready: BTreeSet<u64>,
}

/// One member's end B.
#[derive(Debug)]
struct Link {
    near: OwnedFd,
    /// None once unregistered: what still comes is a stranger's.
    member: Option<Member>,
    /// As a source: the link whose buffer must empty first.
    blocked_on: Option<u64>,
    /// The member closed; there may still be something to read.
    hung_up: bool,
    /// All that the member sent is dealt with, and no more will come.
    ended: bool,
    /// Rest of a descriptor that the kernel took a part of: goes before anything else.
    cut: Vec<u8>,
    watchers: Vec<Drained>,
}

/// What became of a step.
pub(super) enum Pumped {
    /// Nothing to tell.
    Went,
    /// The source has ended: to be called without the lock.
    Ended(Vec<Drained>),
}

/// What a write to a destination came to.
enum Written {
    All,
    /// This many whole descriptors; for the next one there is no room.
    Blocked(usize),
    Gone,
}

// === impl Link ===

impl Link {
    /// Sends the rest of a cut descriptor, if there is one and there is room.
    fn flush_cut(&mut self) {
        if self.cut.is_empty() {
            return;
        }
        if let Ok(sent) = send(&self.near, &self.cut, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            self.cut.drain(..sent);
        }
    }
}

// === impl State ===

impl State {
    pub(super) fn seat(&mut self, near: OwnedFd, member: Member) -> Result<u64, PathError> {
        let index = member.counter;
        if let Some(token) = self.seats.get(&index).copied() {
            if self.links.get(&token).is_some_and(|link| link.member.is_some()) {
                return Err(PathError::SeatTaken(index));
            }
            if let Some(old) = self.links.remove(&token) {
                let _gone = shutdown(&old.near, Shutdown::Both);
            }
        }
        self.last_token += 1;
        let link = Link {
            near,
            member: Some(member),
            blocked_on: None,
            hung_up: false,
            ended: false,
            cut: Vec::new(),
            watchers: Vec::new(),
        };
        self.links.insert(self.last_token, link);
        self.seats.insert(index, self.last_token);
        self.counters.insert(index, Counters::default());
        Ok(self.last_token)
    }

    pub(super) fn set_role(&mut self, index: u32, role: u32) -> Result<(), PathError> {
        let link = self.seats.get(&index).and_then(|token| self.links.get_mut(token));
        let member = link.and_then(|link| link.member.as_mut());
        member.ok_or(PathError::NoSeat(index))?.role = role;
        Ok(())
    }

    pub(super) fn unseat(&mut self, index: u32) -> Result<(), PathError> {
        let link = self.seats.get(&index).and_then(|token| self.links.get_mut(token));
        link.ok_or(PathError::NoSeat(index))?.member = None;
        self.routes.retain(|_, to| *to != index);
        Ok(())
    }

    pub(super) fn set_route(&mut self, key: RouteKey, index: u32) -> Result<(), PathError> {
        let link = self.seats.get(&index).and_then(|token| self.links.get(token));
        if link.is_none_or(|link| link.member.is_none()) {
            return Err(PathError::NoSeat(index));
        }
        self.routes.insert(key, index);
        Ok(())
    }

    pub(super) fn remove_route(&mut self, key: RouteKey) {
        self.routes.remove(&key);
    }

    pub(super) fn counters(&self, index: u32) -> Counters {
        self.counters.get(&index).copied().unwrap_or_default()
    }

    pub(super) fn near(&self, token: u64) -> Option<&OwnedFd> {
        self.links.get(&token).map(|link| &link.near)
    }

    /// Keeps the call until the member has ended; gives it back when that is so already.
    pub(super) fn watch(&mut self, index: u32, call: Drained) -> Option<Drained> {
        let link = self.seats.get(&index).and_then(|token| self.links.get_mut(token));
        match link.filter(|link| !link.ended) {
            Some(link) => {
                link.watchers.push(call);
                None
            }
            None => Some(call),
        }
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.held && !self.ready.is_empty()
    }

    pub(super) fn take_ready(&mut self) -> BTreeSet<u64> {
        if self.held { BTreeSet::new() } else { mem::take(&mut self.ready) }
    }

    /// Routes changed: whoever waits for room may have another receiver now.
    pub(super) fn unblock_all(&mut self) {
        self.unblock(|_| true);
    }

    pub(super) fn event(&mut self, token: u64, flags: EventFlags) {
        let Some(link) = self.links.get_mut(&token) else {
            return;
        };
        let hung_up = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        link.hung_up |= hung_up;
        if flags.contains(EventFlags::OUT) {
            link.flush_cut();
        }
        if hung_up || flags.contains(EventFlags::OUT) {
            self.unblock(|on| on == token);
        }
        self.ready.insert(token);
    }

    fn unblock(&mut self, which: impl Fn(u64) -> bool) {
        for (token, link) in &mut self.links {
            if link.blocked_on.is_some_and(&which) {
                link.blocked_on = None;
                self.ready.insert(*token);
            }
        }
    }

    /// Moves one batch from a source.
    pub(super) fn pump(&mut self, token: u64) -> Pumped {
        let Some(link) = self.links.get_mut(&token) else {
            return Pumped::Went;
        };
        if link.ended || link.blocked_on.is_some() {
            return Pumped::Went;
        }
        let mut bytes = [0; BATCH * DESCRIPTOR_BYTES];
        let got = match recv(&link.near, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((got, _)) => got,
            Err(Errno::AGAIN) => return Pumped::Went,
            Err(Errno::INTR) => {
                self.ready.insert(token);
                return Pumped::Went;
            }
            Err(_) => 0,
        };
        let (whole, _) = bytes[..got].as_chunks::<DESCRIPTOR_BYTES>();
        if whole.is_empty() {
            // Less than a descriptor is the end too when no more can come.
            if got != 0 && !link.hung_up {
                return Pumped::Went;
            }
            link.ended = true;
            return Pumped::Ended(mem::take(&mut link.watchers));
        }
        let done = self.forward(token, whole);
        if self.consume(token, done) && done == whole.len() {
            self.ready.insert(token);
        }
        Pumped::Went
    }

    /// Writes descriptors to their receivers, in order; returns how many are dealt with.
    fn forward(&mut self, token: u64, whole: &[[u8; DESCRIPTOR_BYTES]]) -> usize {
        let member = self.links.get(&token).and_then(|link| link.member);
        let mut done = 0;
        while let Some(first) = whole.get(done) {
            let (target, stamped) = match decide::decide(member.as_ref(), &self.routes, &Descriptor::from_bytes(first))
            {
                Ok(ok) => ok,
                Err(refused) => {
                    self.drop_one(refused);
                    done += 1;
                    continue;
                }
            };
            let mut run = vec![stamped];
            for next in &whole[done + 1..] {
                match decide::decide(member.as_ref(), &self.routes, &Descriptor::from_bytes(next)) {
                    Ok((to, stamped)) if to == target => run.push(stamped),
                    _ => break,
                }
            }
            let counter = member.map_or(0, |member| member.counter);
            let to = self.seats.get(&target).copied();
            match self.write(to, &run) {
                Written::All => {
                    self.count(counter, &run);
                    done += run.len();
                }
                Written::Blocked(n) => {
                    self.count(counter, &run[..n]);
                    if let Some(link) = self.links.get_mut(&token) {
                        link.blocked_on = to;
                    }
                    return done + n;
                }
                Written::Gone => {
                    self.drop_one((counter, DropReason::Route));
                    done += 1;
                }
            }
        }
        done
    }

    fn write(&mut self, to: Option<u64>, run: &[Descriptor]) -> Written {
        let Some(link) = to.and_then(|token| self.links.get_mut(&token)) else {
            return Written::Gone;
        };
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut polled = [PollFd::new(&link.near, PollFlags::OUT | PollFlags::RDHUP)];
        if poll(&mut polled, Some(&zero)).is_err() {
            return Written::Blocked(0);
        }
        let flags = polled[0].revents();
        if link.hung_up || flags.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
            return Written::Gone;
        }
        if !flags.contains(PollFlags::OUT) {
            return Written::Blocked(0);
        }
        let cut = link.cut.len();
        let mut bytes = mem::take(&mut link.cut);
        bytes.extend(run.iter().flat_map(Descriptor::to_bytes));
        let sent = match send(&link.near, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) => sent,
            Err(Errno::PIPE | Errno::CONNRESET) => return Written::Gone,
            Err(_) => 0,
        };
        if sent == bytes.len() {
            return Written::All;
        }
        if sent < cut {
            link.cut = bytes[sent..cut].to_vec();
            return Written::Blocked(0);
        }
        // A descriptor that is cut counts as written: its rest goes first.
        let taken = (sent - cut).div_ceil(DESCRIPTOR_BYTES);
        link.cut = bytes[sent..cut + taken * DESCRIPTOR_BYTES].to_vec();
        Written::Blocked(taken)
    }

    /// Takes from the source what is dealt with.
    fn consume(&self, token: u64, descriptors: usize) -> bool {
        let Some(link) = self.links.get(&token) else {
            return false;
        };
        let mut bytes = [0; BATCH * DESCRIPTOR_BYTES];
        let mut left = descriptors * DESCRIPTOR_BYTES;
        while left > 0 {
            match recv(&link.near, &mut bytes[..left], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return false,
                Ok((got, _)) => left -= got,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        true
    }

    fn count(&mut self, index: u32, run: &[Descriptor]) {
        let now = clock_gettime(ClockId::MonotonicCoarse);
        let now_ns = u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0);
        let counters = self.counters.entry(index).or_default();
        for descriptor in run {
            decide::count(counters, descriptor, now_ns);
        }
    }

    fn drop_one(&mut self, (index, reason): (u32, DropReason)) {
        self.counters.entry(index).or_default().drops[reason as usize] += 1;
    }
}
