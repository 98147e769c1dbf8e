//! Connections of pods, counted by the kernel: what the gateway does with a pod, whoever the gateway is.
//!
//! Nothing is done per request in user space, and nothing at all while nobody opens or closes a connection. What is counted is
//! there when it is asked for; connections that stand are asked then, too.
//!
//! As with the descriptor path, whoever has the fds has it all: they are deposited, and a successor adopts them. Without any
//! of them open the kernel forgets it.

mod layout;
mod syscall;

use std::{
    collections::{BTreeSet, HashMap},
    io::{self, Read as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Map, MapData, MapError, SkStorage},
    programs::{BtfTracePoint, Iter},
};
use lifl_ebpf_common::traffic::{Connections, Mark};

use self::layout::Types;
use crate::{
    kernel::LoadError,
    path::{PathError, ProgramRuns},
};

/// The object, as `ebpf/prog/build` makes it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/traffic.bpf.o"));

const TYPES: &str = "/sys/kernel/btf/vmlinux";
const STATE: &str = "lifl_state";
const ASK: &str = "lifl_ask";
const MARKS: &str = "MARKS";
const CONNECTIONS: &str = "CONNECTIONS";
/// Names of [`Traffic::fds`], in this order.
const FDS: [&str; 5] =
    ["traffic-marks", "traffic-connections", "traffic-program", "traffic-attached", "traffic-iterator"];

/// Fields of the kernel's `struct tcp_sock`, and the program's words for where they are.
const FIELDS: [&str; 6] = [
    "inet_conn.icsk_inet.sk.__sk_common.skc_flags",
    "bytes_received",
    "bytes_acked",
    "bytes_sent",
    "bytes_retrans",
    "total_retrans",
];
const OFFSETS: [&str; 6] =
    ["AT_FLAGS", "AT_BYTES_RECEIVED", "AT_BYTES_ACKED", "AT_BYTES_SENT", "AT_BYTES_RETRANS", "AT_TOTAL_RETRANS"];

/// The counters of this node's places.
#[derive(Debug)]
pub struct Traffic {
    maps: Mutex<Maps>,
    /// As in [`FDS`]: both maps, the program that runs at each change of a socket's state (as long as the next is open), and what
    /// has the other run.
    fds: [OwnedFd; 5],
}

#[derive(Debug)]
struct Maps {
    marks: Map,
    connections: Map,
}

// === impl Traffic ===

impl Traffic {
    /// Loads the programs and has them run.
    ///
    /// # Errors
    /// Where the kernel has no description of its types, lacks a part (5.9 has all), or does not permit it.
    pub fn load() -> Result<Self, LoadError> {
        let bytes = std::fs::read(TYPES).map_err(LoadError::Types)?;
        let offsets =
            Types::read(&bytes).and_then(|types| types.offsets("tcp_sock", FIELDS)).map_err(LoadError::Types)?;
        drop(bytes);
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        for (name, offset) in OFFSETS.into_iter().zip(&offsets) {
            loader.override_global(name, offset, true);
        }
        let mut ebpf = loader.load(OBJECT).map_err(|source| LoadError::Object { source: Box::new(source) })?;
        let btf = Btf::from_sys_fs().map_err(|e| LoadError::Types(io::Error::other(e)))?;
        let take = |ebpf: &mut Ebpf, name| ebpf.take_map(name).ok_or(LoadError::Missing(name));
        let maps = Maps { marks: take(&mut ebpf, MARKS)?, connections: take(&mut ebpf, CONNECTIONS)? };

        let program: &mut Iter = program(&mut ebpf, ASK)?.try_into().map_err(LoadError::program(ASK))?;
        program.load("bpf_sk_storage_map", &btf).map_err(LoadError::program(ASK))?;
        let asking = program.fd().map_err(LoadError::program(ASK))?;
        let [marks, connections] = [data(&maps.marks, MARKS)?, data(&maps.connections, CONNECTIONS)?];
        let iterator = syscall::iterator(asking.as_fd(), marks.as_fd()).map_err(LoadError::Attach)?;

        let program: &mut BtfTracePoint =
            self::program(&mut ebpf, STATE)?.try_into().map_err(LoadError::program(STATE))?;
        program.load("inet_sock_set_state", &btf).map_err(LoadError::program(STATE))?;
        let program = program.fd().map_err(LoadError::program(STATE))?;
        let program = program.as_fd().try_clone_to_owned().map_err(LoadError::Attach)?;
        let attached = syscall::attach(program.as_fd()).map_err(LoadError::Attach)?;
        Ok(Self { fds: [marks, connections, program, attached, iterator], maps: Mutex::new(maps) })
    }

    /// Takes over what [`Self::fds`] gave, by the same names: nothing is lost of what was counted, nor of what stands.
    ///
    /// # Errors
    /// When one is missing, or is something else.
    pub fn adopt(fds: impl IntoIterator<Item = (String, OwnedFd)>) -> Result<Self, LoadError> {
        let mut fds: HashMap<String, OwnedFd> = fds.into_iter().collect();
        let [marks, connections, program, attached, iterator] =
            FDS.map(|name| fds.remove(name).ok_or(LoadError::Missing(name)));
        let fds = [marks?, connections?, program?, attached?, iterator?];
        let map = |fd: &OwnedFd, name| {
            let fd = fd.try_clone().map_err(LoadError::Reuse)?;
            let error = |source| LoadError::Map { name, source };
            MapData::from_fd(fd).and_then(Map::from_map_data).map_err(error)
        };
        let maps = Maps { marks: map(&fds[0], MARKS)?, connections: map(&fds[1], CONNECTIONS)? };
        Ok(Self { maps: Mutex::new(maps), fds })
    }

    /// Duplicates of what must be kept for [`Self::adopt`], by name.
    ///
    /// # Errors
    /// When this process can have no more descriptors.
    pub fn fds(&self) -> io::Result<Vec<(&'static str, OwnedFd)>> {
        FDS.into_iter().zip(&self.fds).map(|(name, fd)| Ok((name, fd.try_clone()?))).collect()
    }

    /// Counts for this place from now on; one that is there already keeps what it has counted.
    ///
    /// # Errors
    /// When there are [`lifl_ebpf_common::traffic::MAX_PLACES`] already.
    pub fn open(&self, place: u64) -> Result<(), PathError> {
        const IF_NEW: u64 = 1;
        match self.lock().connections()?.insert(place, Connections::default(), IF_NEW) {
            Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => Ok(other?),
        }
    }

    /// Forgets a place. Connections that stand are counted no more.
    pub fn close(&self, place: u64) {
        let _was_not_there = self.lock().connections().and_then(|mut all| all.remove(&place));
    }

    /// Forgets all other places: those that an agent did not live to forget.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn keep(&self, places: &BTreeSet<u64>) -> Result<(), PathError> {
        let mut maps = self.lock();
        let mut all = maps.connections()?;
        let others: Vec<u64> = all.keys().filter_map(Result::ok).filter(|place| !places.contains(place)).collect();
        Ok(others.iter().try_for_each(|place| all.remove(place))?)
    }

    /// Has a socket counted: a listener ([`lifl_ebpf_common::traffic::side::ACCEPTED`]), and what comes over it, or one that is not
    /// connected yet ([`lifl_ebpf_common::traffic::side::DIALLED`]).
    ///
    /// # Errors
    /// When the kernel has no memory for it.
    pub fn mark(&self, socket: BorrowedFd<'_>, place: u64, side: u32) -> Result<(), PathError> {
        let mut maps = self.lock();
        let mut marks: SkStorage<_, Mark> = (&mut maps.marks).try_into()?;
        Ok(marks.insert(&socket.as_raw_fd(), Mark { place, side, ..Mark::default() }, 0)?)
    }

    /// Brings the counters up to date with the connections that stand (of their last bytes a few are missing until they end).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn settle(&self) -> io::Result<()> {
        let mut run = std::fs::File::from(syscall::iterate(self.fds[4].as_fd())?);
        // The program writes nothing: to read to the end is to have it run for each socket.
        let mut nothing = [0; 64];
        loop {
            match run.read(&mut nothing) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // It has seen a million sockets and wants to be asked again.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// What was counted for a place.
    ///
    /// # Errors
    /// When it is not open.
    pub fn connections(&self, place: u64) -> Result<Connections, PathError> {
        Ok(self.lock().connections()?.get(&place, 0)?)
    }

    /// Runs of the program.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn program_runs(&self) -> io::Result<ProgramRuns> {
        ProgramRuns::of(self.fds[2].as_fd())
    }

    fn lock(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Maps ===

impl Maps {
    fn connections(&mut self) -> Result<aya::maps::HashMap<&mut MapData, u64, Connections>, MapError> {
        (&mut self.connections).try_into()
    }
}

/// A duplicate of a map's descriptor.
fn data(map: &Map, name: &'static str) -> Result<OwnedFd, LoadError> {
    match map {
        Map::SkStorage(data) | Map::HashMap(data) => data.fd().as_fd().try_clone_to_owned().map_err(LoadError::Reuse),
        _ => Err(LoadError::Missing(name)),
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut aya::programs::Program, LoadError> {
    ebpf.program_mut(name).ok_or(LoadError::Missing(name))
}
