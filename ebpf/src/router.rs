//! The path in user space: one thread that does what the `sk_msg` program does, where the kernel will not.
//!
//! It reads the members' ends B and writes to other members' ends B; the members notice nothing. What it does *not* share
//! with the kernel's path:
//! - a refused descriptor was already taken from the sender: it is counted the same, but `send` cannot fail;
//! - a full receiver holds back whoever sends to it (his own buffer fills, then his `send` waits), in order, for all he
//!   sends; the kernel's path refuses instead;
//! - how a stream is cut into writes is not visible here: no write is refused for its framing;
//! - a router that dies between writing a descriptor and taking it from its source leaves it there: the next router
//!   sends it again. So descriptors come at least once, which is what their readers are made for. Writes begin only where
//!   a third of the buffer is free, so that they are whole; short of memory the kernel may still cut one, and a router
//!   killed then leaves a stream that its receiver cannot read further.
//!
//! Idle costs nothing: edge-triggered epoll, no timer.

mod decide;
mod state;

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use lifl_ebpf_common::maps::{Counters, MAX_MEMBERS, Member, RouteKey};
use rustix::event::{EventfdFlags, epoll, eventfd};

use self::state::{Pumped, State};
use crate::path::{Drained, PathError};

/// Token of [`Shared::wake`]; links have others.
const WAKE: u64 = 0;
const EVENTS: usize = 64;

/// The router's handle; dropping it ends its thread.
#[derive(Debug)]
pub(crate) struct Router {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    epoll: OwnedFd,
    /// Makes the thread look at the state again.
    wake: OwnedFd,
}

// === impl Router ===

impl Router {
    pub(crate) fn start() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        let shared = Arc::new(Shared { state: Mutex::new(State::default()), epoll, wake });
        let thread = std::thread::Builder::new().name("lifl-router".into()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.run()
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub(crate) fn register(&self, near: BorrowedFd<'_>, member: Member) -> Result<(), PathError> {
        if member.counter >= MAX_MEMBERS {
            return Err(PathError::NoSeat(member.counter));
        }
        let mut state = self.shared.state();
        let token = state.seat(near.try_clone_to_owned()?, member)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&self.shared.epoll, near_of(&state, token)?, epoll::EventData::new_u64(token), flags)
            .map_err(io::Error::from)?;
        drop(state);
        self.shared.wake()
    }

    pub(crate) fn set_role(&self, index: u32, role: u32) -> Result<(), PathError> {
        self.shared.state().set_role(index, role)
    }

    pub(crate) fn hold(&self, held: bool) -> Result<(), PathError> {
        self.shared.state().held = held;
        self.shared.wake()
    }

    pub(crate) fn unregister(&self, index: u32) -> Result<(), PathError> {
        self.shared.state().unseat(index)?;
        self.shared.wake()
    }

    pub(crate) fn set_route(&self, key: RouteKey, index: u32) -> Result<(), PathError> {
        self.shared.state().set_route(key, index)?;
        self.shared.wake()
    }

    pub(crate) fn remove_route(&self, key: RouteKey) -> Result<(), PathError> {
        self.shared.state().remove_route(key);
        self.shared.wake()
    }

    pub(crate) fn counters(&self, index: u32) -> Result<Counters, PathError> {
        if index > MAX_MEMBERS {
            return Err(PathError::NoSeat(index));
        }
        Ok(self.shared.state().counters(index))
    }

    pub(crate) fn on_drained(&self, index: u32, call: Drained) {
        let now = self.shared.state().watch(index, call);
        if let Some(call) = now {
            call.0();
        }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        let woken = self.shared.wake();
        if let (Ok(()), Some(thread)) = (woken, self.thread.take()) {
            let _panicked = thread.join();
        }
    }
}

// === impl Shared ===

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) -> Result<(), PathError> {
        match rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(e) => Err(PathError::Io(e.into())),
        }
    }

    fn run(&self) {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let mut state = self.state();
            if state.stop {
                return;
            }
            let idle = !state.has_ready();
            drop(state);
            let timeout = if idle { None } else { Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 }) };
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the descriptor router cannot wait for its sockets and ends");
                    return;
                }
            }
            state = self.state();
            for event in &events {
                match event.data.u64() {
                    WAKE => {
                        let _empty = rustix::io::read(&self.wake, &mut [0; 8]);
                        state.unblock_all();
                    }
                    token => state.event(token, event.flags),
                }
            }
            drop(state);
            self.pump_ready();
        }
    }

    /// One batch of each source that has something; the state is free in between.
    fn pump_ready(&self) {
        let ready = self.state().take_ready();
        for token in ready {
            let pumped = self.state().pump(token);
            if let Pumped::Ended(calls) = pumped {
                for call in calls {
                    call.0();
                }
            }
        }
    }
}

fn near_of(state: &State, token: u64) -> Result<BorrowedFd<'_>, PathError> {
    state.near(token).map(|fd| fd.as_fd()).ok_or_else(|| PathError::Io(io::ErrorKind::NotFound.into()))
}
