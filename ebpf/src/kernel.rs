//! The path in the kernel: the `sk_msg` program, its maps, and what user space writes into them.
//!
//! **A receiver that does not read.** The kernel queues what is redirected to a socket whatever `SO_RCVBUF` says, as long as
//! there is memory for TCP (`net.ipv4.tcp_mem`, or the limit of the receiver's cgroup): `send` neither waits nor fails, for
//! blocking sockets neither. A queued descriptor costs about 1 KiB of kernel memory. Without memory `send` fails with `ENOMEM`
//! at once, or returns how many whole descriptors went through before; the program, which ran already, has counted the one that
//! failed as passed. Nothing is half delivered: each descriptor is one piece of memory (see the program's `head`). So it is the
//! protocol above that bounds what is outstanding. [`crate::wire`] makes of it "each once and in order, or how many went".
//!
//! Nothing is pinned where a name could be found: whoever holds the fds holds the path. The map of programs refers to
//! the program that refers to the maps; the kernel breaks that circle by emptying it when its last fd is closed, so
//! nothing is left when agent and supervisor are both gone.

mod baseline;
mod maps;
mod replace;

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapError, PerCpuArray, ProgramArray, SkStorage, SockMap},
    programs::{ProgramError, SkMsg},
};
use lifl_ebpf_common::maps::{Counters, Identity, MAX_MEMBERS, Member, REFUSAL, RouteKey, Seat};
use rustix::net::{Shutdown, shutdown};

pub use self::baseline::Baseline;
use self::maps::Maps;
use crate::path::{PathError, ProgramRuns};

/// The object, as `ebpf/prog/build` makes it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/lifl.bpf.o"));

/// The program that is attached, and the one it jumps to.
const DISPATCHER: &str = "lifl";
const ROUTE: &str = "lifl_route";
/// Name of the dispatcher among [`Kernel::fds`].
const DISPATCHER_FD: &str = "bpf-dispatcher";
/// Names of both ends of [`Kernel::refusal`].
const REFUSAL_FDS: [&str; 2] = ["bpf-refusal-a", "bpf-refusal-b"];

/// Why there is no path in the kernel.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The maps or the object were refused.
    #[error("cannot load the eBPF object{}: {source}", hint(.source))]
    Object {
        /// What aya says.
        #[source]
        source: Box<aya::EbpfError>,
    },
    /// The verifier, or the kernel's configuration, refused a program.
    #[error("the kernel refuses the program {name}: {source}")]
    Program {
        /// Which one.
        name: &'static str,
        /// What aya says; holds the verifier's log.
        #[source]
        source: Box<ProgramError>,
    },
    /// The object or the set of fds lacks a part.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A map was refused.
    #[error("map {name}: {source}")]
    Map {
        /// Which one.
        name: &'static str,
        /// What aya says.
        #[source]
        source: MapError,
    },
    /// The connection that refuses could not be made.
    #[error("cannot make the socket that refuses: {0}")]
    Refusal(#[source] io::Error),
    /// The kernel does not describe its types, or they lack something.
    #[error("types of the kernel: {0}")]
    Types(#[source] io::Error),
    /// A loaded program cannot be put in its place.
    #[error("cannot attach: {0}")]
    Attach(#[source] io::Error),
    /// The maps could not be shown to a second load of the object.
    #[error("cannot reuse the maps: {0}")]
    Reuse(#[source] io::Error),
}

/// The loaded path.
#[derive(Debug)]
pub(crate) struct Kernel {
    maps: Maps,
    dispatcher: OwnedFd,
    /// Both ends of the connection at [`REFUSAL`]; shut, not closed, or they would leave the map.
    refusal: (OwnedFd, OwnedFd),
    /// Ends B of the members, by seat: shut when another member takes the seat.
    near: HashMap<u32, OwnedFd>,
}

// === impl LoadError ===

fn hint(error: &aya::EbpfError) -> &'static str {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = cause {
        if e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied) {
            return " (needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON)";
        }
        cause = e.source();
    }
    ""
}

impl LoadError {
    pub(crate) fn program(name: &'static str) -> impl FnOnce(ProgramError) -> Self {
        move |source| Self::Program { name, source: Box::new(source) }
    }
}

// === impl Kernel ===

impl Kernel {
    pub(crate) fn load() -> Result<Self, LoadError> {
        let mut ebpf =
            EbpfLoader::new().load(OBJECT).map_err(|source| LoadError::Object { source: Box::new(source) })?;
        let mut maps = Maps::take(&mut ebpf)?;
        set_route_program(&mut ebpf, &mut maps)?;
        let program = sk_msg(&mut ebpf, DISPATCHER)?;
        program.load().map_err(LoadError::program(DISPATCHER))?;
        let mut sockets: SockMap<_> = (&mut maps.sockets).try_into().map_err(maps::error("SOCKETS"))?;
        let link = program.attach(sockets.fd()).map_err(LoadError::program(DISPATCHER))?;
        let link = program.take_link(link).map_err(LoadError::program(DISPATCHER))?;
        let dispatcher = program.fd().map_err(LoadError::program(DISPATCHER))?;
        let dispatcher = dispatcher.as_fd().try_clone_to_owned().map_err(LoadError::Reuse)?;
        // Dropping the link would detach, and the path outlives the agent: the map keeps the program. Costs two fds per load.
        std::mem::forget(link);
        let refusal = crate::pair().map_err(LoadError::Refusal)?;
        sockets.set(REFUSAL, &refusal.0, 0).map_err(maps::error("SOCKETS"))?;
        shutdown(&refusal.0, Shutdown::Write).map_err(|e| LoadError::Refusal(e.into()))?;
        Ok(Self { maps, dispatcher, refusal, near: HashMap::new() })
    }

    pub(crate) fn adopt(fds: impl IntoIterator<Item = (String, OwnedFd)>) -> Result<Self, LoadError> {
        let mut fds: HashMap<String, OwnedFd> = fds.into_iter().collect();
        let dispatcher = fds.remove(DISPATCHER_FD).ok_or(LoadError::Missing(DISPATCHER_FD))?;
        let refusal = REFUSAL_FDS.map(|name| fds.remove(name).ok_or(LoadError::Missing(name)));
        let [Ok(a), Ok(b)] = refusal else {
            return Err(LoadError::Missing(REFUSAL_FDS[0]));
        };
        Ok(Self { maps: Maps::from_fds(fds)?, dispatcher, refusal: (a, b), near: HashMap::new() })
    }

    pub(crate) fn fds(&self) -> Vec<(&'static str, BorrowedFd<'_>)> {
        let mut fds = self.maps.fds();
        fds.push((DISPATCHER_FD, self.dispatcher.as_fd()));
        fds.extend(REFUSAL_FDS.into_iter().zip([self.refusal.0.as_fd(), self.refusal.1.as_fd()]));
        fds
    }

    pub(crate) fn replace_program(&mut self) -> Result<(), LoadError> {
        let mut ebpf = replace::load_over(OBJECT, &self.maps)?;
        set_route_program(&mut ebpf, &mut self.maps)
    }

    pub(crate) fn register(
        &mut self,
        socket: Option<BorrowedFd<'_>>,
        near: BorrowedFd<'_>,
        member: Member,
    ) -> Result<(), PathError> {
        let seat = self.seat(member.counter)?;
        let Some(socket) = socket else {
            if seat.live == 0 || (seat.chain, seat.role) != (member.chain, member.role) {
                return Err(PathError::NoSeat(member.counter));
            }
            self.near.insert(member.counter, near.try_clone_to_owned()?);
            return Ok(());
        };
        if seat.live != 0 {
            return Err(PathError::SeatTaken(member.counter));
        }
        let near = near.try_clone_to_owned()?;
        if let Some(old) = self.near.insert(member.counter, near) {
            // The seat's old socket leaves the map now; without this its bytes would go to an end B that nobody reads.
            let _gone = shutdown(old, Shutdown::Both);
        }
        let generation = seat.generation.wrapping_add(1);
        self.clear_counters(member.counter)?;
        let identity = Identity { index: member.counter, generation, ..Identity::default() };
        let mut identities: SkStorage<_, Identity> = (&mut self.maps.identity).try_into()?;
        identities.insert(&socket, identity, 0)?;
        let mut sockets: SockMap<_> = (&mut self.maps.sockets).try_into()?;
        sockets.set(member.counter, &socket, 0)?;
        self.set_seat(member.counter, Seat { chain: member.chain, role: member.role, generation, live: 1 })
    }

    pub(crate) fn set_role(&mut self, index: u32, role: u32) -> Result<(), PathError> {
        let seat = self.seat(index)?;
        if seat.live == 0 {
            return Err(PathError::NoSeat(index));
        }
        self.set_seat(index, Seat { role, ..seat })
    }

    pub(crate) fn unregister(&mut self, index: u32) -> Result<(), PathError> {
        let seat = self.seat(index)?;
        self.set_seat(index, Seat { live: 0, generation: seat.generation.wrapping_add(1), ..seat })?;
        let mut routes: aya::maps::HashMap<_, RouteKey, u32> = (&mut self.maps.routes).try_into()?;
        let here: Vec<RouteKey> =
            routes.iter().filter_map(Result::ok).filter(|&(_, to)| to == index).map(|(key, _)| key).collect();
        for key in here {
            routes.remove(&key)?;
        }
        Ok(())
    }

    pub(crate) fn set_route(&mut self, key: RouteKey, index: u32) -> Result<(), PathError> {
        if self.seat(index)?.live == 0 {
            return Err(PathError::NoSeat(index));
        }
        let mut routes: aya::maps::HashMap<_, RouteKey, u32> = (&mut self.maps.routes).try_into()?;
        Ok(routes.insert(key, index, 0)?)
    }

    pub(crate) fn remove_route(&mut self, key: RouteKey) -> Result<(), PathError> {
        let mut routes: aya::maps::HashMap<_, RouteKey, u32> = (&mut self.maps.routes).try_into()?;
        match routes.remove(&key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    pub(crate) fn counters(&self, index: u32) -> Result<Counters, PathError> {
        let counters: PerCpuArray<_, Counters> = (&self.maps.counters).try_into()?;
        let mut sum = Counters::default();
        for cpu in counters.get(&index, 0)?.iter() {
            sum.messages += cpu.messages;
            sum.bytes += cpu.bytes;
            sum.last_ns = sum.last_ns.max(cpu.last_ns);
            if cpu.first_ns != 0 && (sum.first_ns == 0 || cpu.first_ns < sum.first_ns) {
                sum.first_ns = cpu.first_ns;
            }
            for (sum, drops) in sum.drops.iter_mut().zip(cpu.drops) {
                *sum += drops;
            }
        }
        Ok(sum)
    }

    pub(crate) fn runs(&self) -> io::Result<ProgramRuns> {
        ProgramRuns::of(self.dispatcher.as_fd())
    }

    fn clear_counters(&mut self, index: u32) -> Result<(), PathError> {
        let mut counters: PerCpuArray<_, Counters> = (&mut self.maps.counters).try_into()?;
        let cpus = aya::util::nr_cpus().map_err(|(_, e)| e)?;
        let zero = aya::maps::PerCpuValues::try_from(vec![Counters::default(); cpus])?;
        Ok(counters.set(index, zero, 0)?)
    }

    fn seat(&self, index: u32) -> Result<Seat, PathError> {
        if index >= MAX_MEMBERS {
            return Err(PathError::NoSeat(index));
        }
        let seats: Array<_, Seat> = (&self.maps.seats).try_into()?;
        Ok(seats.get(&index, 0)?)
    }

    fn set_seat(&mut self, index: u32, seat: Seat) -> Result<(), PathError> {
        let mut seats: Array<_, Seat> = (&mut self.maps.seats).try_into()?;
        Ok(seats.set(index, seat, 0)?)
    }
}

fn sk_msg<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SkMsg, LoadError> {
    let program = ebpf.program_mut(name).ok_or(LoadError::Missing(name))?;
    program.try_into().map_err(LoadError::program(name))
}

/// Loads the object's routing program and puts it where the dispatcher jumps to: one store, between two messages.
fn set_route_program(ebpf: &mut Ebpf, maps: &mut Maps) -> Result<(), LoadError> {
    let program = sk_msg(ebpf, ROUTE)?;
    program.load().map_err(LoadError::program(ROUTE))?;
    let fd = program.fd().map_err(LoadError::program(ROUTE))?;
    let mut programs: ProgramArray<_> = (&mut maps.programs).try_into().map_err(maps::error("PROGRAMS"))?;
    programs.set(0, fd, 0).map_err(maps::error("PROGRAMS"))
}
