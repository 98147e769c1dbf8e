//! The path of a node, whichever kind it is.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use lifl_ebpf_common::maps::{Counters, Member, RouteKey};

use crate::{
    kernel::{Kernel, LoadError},
    router::Router,
};

/// What moves descriptors on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// The `sk_msg` program.
    Ebpf,
    /// The router in the agent.
    Userspace,
}

/// Why the path did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// No member is registered at this index, or it is beyond [`crate::MAX_MEMBERS`].
    #[error("no member at index {0}")]
    NoSeat(u32),
    /// A member is registered at this index.
    #[error("index {0} is taken")]
    SeatTaken(u32),
    /// The kernel refused an operation on a map.
    #[error("eBPF map: {0}")]
    Map(#[from] aya::maps::MapError),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// How often a program ran, and for how long; counted while `kernel.bpf_stats_enabled` is 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgramRuns {
    /// Runs.
    pub count: u64,
    /// Nanoseconds in all of them.
    pub ns: u64,
}

/// The path of a node.
///
/// In the kernel it is all in fds: whoever has them deposited elsewhere can [`Path::adopt`] it after a crash. A router's
/// state is the agent's to tell again: [`Path::register`] and [`Path::set_route`] on a new one; nothing that members
/// sent is lost, it waits in the ends B.
#[derive(Debug)]
pub struct Path {
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Kernel(Box<Mutex<Kernel>>),
    Router(Router),
}

/// To be called when all that a dead member sent is delivered.
pub(crate) struct Drained(pub(crate) Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Drained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Drained")
    }
}

// === impl ProgramRuns ===

impl ProgramRuns {
    pub(crate) fn of(program: BorrowedFd<'_>) -> io::Result<Self> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd()))?;
        let field = |name| {
            let value = text.lines().find_map(|line| line.strip_prefix(name))?;
            value.trim().parse().ok()
        };
        match (field("run_cnt:"), field("run_time_ns:")) {
            (Some(count), Some(ns)) => Ok(Self { count, ns }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not the fd of an eBPF program")),
        }
    }
}

// === impl Path ===

impl Path {
    /// Loads the program and makes its maps.
    pub fn load() -> Result<Self, LoadError> {
        Ok(Self::kernel(Kernel::load()?))
    }

    /// Takes over the maps and programs that [`Self::fds`] gave, by the same names: nothing is loaded, nothing changes for
    /// the members.
    pub fn adopt(fds: impl IntoIterator<Item = (String, OwnedFd)>) -> Result<Self, LoadError> {
        Ok(Self::kernel(Kernel::adopt(fds)?))
    }

    /// Starts a router, for where [`Self::load`] fails.
    pub fn userspace() -> io::Result<Self> {
        Ok(Self { inner: Inner::Router(Router::start()?) })
    }

    /// What moves descriptors.
    #[must_use]
    pub const fn kind(&self) -> PathKind {
        match self.inner {
            Inner::Kernel(_) => PathKind::Ebpf,
            Inner::Router(_) => PathKind::Userspace,
        }
    }

    /// Duplicates of what must be kept for [`Self::adopt`], by name. Of a router there is nothing to keep.
    pub fn fds(&self) -> io::Result<Vec<(&'static str, OwnedFd)>> {
        match &self.inner {
            Inner::Kernel(kernel) => {
                lock(kernel).fds().into_iter().map(|(name, fd)| Ok((name, fd.try_clone_to_owned()?))).collect()
            }
            Inner::Router(_) => Ok(Vec::new()),
        }
    }

    /// Makes a member of a socket, before its process starts: from now on what it sends is its member's.
    ///
    /// `socket` is end A, `near` end B of its [`crate::pair()`]; the path keeps a duplicate of `near`. After
    /// [`Self::adopt`] the kernel has the sockets already: then without `socket`, and it fails unless the member is the one
    /// that sits there.
    pub fn register(
        &self,
        socket: Option<BorrowedFd<'_>>,
        near: BorrowedFd<'_>,
        member: Member,
    ) -> Result<(), PathError> {
        match &self.inner {
            Inner::Kernel(kernel) => lock(kernel).register(socket, near, member),
            Inner::Router(router) => router.register(near, member),
        }
    }

    /// Has a router move nothing until it is told `false`: while an agent tells a new router the members and routes of the one
    /// before, what waits in the ends B would find no route. The kernel forgets no route: nothing to do there.
    pub fn hold(&self, held: bool) -> Result<(), PathError> {
        match &self.inner {
            Inner::Kernel(_) => Ok(()),
            Inner::Router(router) => router.hold(held),
        }
    }

    /// Gives the member at `index` another role in its chain: what is stamped from its next descriptor on.
    pub fn set_role(&self, index: u32, role: u32) -> Result<(), PathError> {
        match &self.inner {
            Inner::Kernel(kernel) => lock(kernel).set_role(index, role),
            Inner::Router(router) => router.set_role(index, role),
        }
    }

    /// Ends a membership: routes to it are gone; what its socket still sends is refused and counted as a stranger's.
    ///
    /// Its index may be used again; its socket is cut off when that happens.
    pub fn unregister(&self, index: u32) -> Result<(), PathError> {
        match &self.inner {
            Inner::Kernel(kernel) => lock(kernel).unregister(index),
            Inner::Router(router) => router.unregister(index),
        }
    }

    /// Sends (chain, dst) to the member at `index` from the next descriptor on, instead of whoever got it so far.
    pub fn set_route(&self, key: RouteKey, index: u32) -> Result<(), PathError> {
        match &self.inner {
            Inner::Kernel(kernel) => lock(kernel).set_route(key, index),
            Inner::Router(router) => router.set_route(key, index),
        }
    }

    /// Refuses (chain, dst) from the next descriptor on. A route that is not there is no error.
    pub fn remove_route(&self, key: RouteKey) -> Result<(), PathError> {
        match &self.inner {
            Inner::Kernel(kernel) => lock(kernel).remove_route(key),
            Inner::Router(router) => router.remove_route(key),
        }
    }

    /// What the member at `index` sent since it registered, or all strangers ([`crate::STRANGERS`]).
    pub fn counters(&self, index: u32) -> Result<Counters, PathError> {
        match &self.inner {
            Inner::Kernel(kernel) => lock(kernel).counters(index),
            Inner::Router(router) => router.counters(index),
        }
    }

    /// Calls when all that a dead member sent is delivered or refused: only then may its death be told to others.
    ///
    /// In the kernel that is so when `send` returns: the call comes at once, here. A router calls from its own thread, when
    /// it has read the end of the stream; so nobody may still hold end A.
    pub fn on_drained(&self, index: u32, call: impl FnOnce() + Send + 'static) {
        match &self.inner {
            Inner::Kernel(_) => call(),
            Inner::Router(router) => router.on_drained(index, Drained(Box::new(call))),
        }
    }

    /// Loads the program anew over the same maps and puts it in place between two messages. Nothing to do for a router.
    pub fn replace_program(&self) -> Result<(), LoadError> {
        match &self.inner {
            Inner::Kernel(kernel) => lock(kernel).replace_program(),
            Inner::Router(_) => Ok(()),
        }
    }

    /// Runs of the program; none for a router.
    pub fn program_runs(&self) -> io::Result<Option<ProgramRuns>> {
        match &self.inner {
            Inner::Kernel(kernel) => lock(kernel).runs().map(Some),
            Inner::Router(_) => Ok(None),
        }
    }

    fn kernel(kernel: Kernel) -> Self {
        Self { inner: Inner::Kernel(Box::new(Mutex::new(kernel))) }
    }
}

fn lock(kernel: &Mutex<Kernel>) -> MutexGuard<'_, Kernel> {
    kernel.lock().unwrap_or_else(PoisonError::into_inner)
}
