//! What any `sk_msg` program costs, for a bench to subtract.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::SockMap,
    programs::{ProgramError, SkMsg},
};

use super::{LoadError, OBJECT, maps};
use crate::path::{PathError, ProgramRuns};

const EMPTY: &str = "lifl_empty";
const SOCKETS: &str = "SOCKETS";

/// A program that lets everything pass, attached to sockets of its own. Dropping it detaches it.
#[derive(Debug)]
pub struct Baseline {
    ebpf: Ebpf,
    next: u32,
}

// === impl Baseline ===

impl Baseline {
    /// Loads and attaches it.
    pub fn load() -> Result<Self, LoadError> {
        let mut ebpf = EbpfLoader::new()
            .btf(None)
            .load(OBJECT)
            .map_err(|source| LoadError::Object { source: Box::new(source) })?;
        let sockets: SockMap<_> =
            ebpf.map(SOCKETS).ok_or(LoadError::Missing(SOCKETS))?.try_into().map_err(maps::error(SOCKETS))?;
        let sockets = sockets.fd().try_clone().map_err(LoadError::Reuse)?;
        let program = super::sk_msg(&mut ebpf, EMPTY)?;
        program.load().map_err(LoadError::program(EMPTY))?;
        program.attach(&sockets).map_err(LoadError::program(EMPTY))?;
        Ok(Self { ebpf, next: 0 })
    }

    /// From now on the program runs on what this socket sends.
    pub fn insert(&mut self, socket: BorrowedFd<'_>) -> Result<(), PathError> {
        let map = self.ebpf.map_mut(SOCKETS).ok_or(io::Error::from(io::ErrorKind::NotFound))?;
        let mut sockets: SockMap<_> = map.try_into()?;
        sockets.set(self.next, &socket, 0)?;
        self.next += 1;
        Ok(())
    }

    /// Runs of the program.
    pub fn program_runs(&self) -> io::Result<ProgramRuns> {
        let program: Result<&SkMsg, ProgramError> =
            self.ebpf.program(EMPTY).ok_or(io::Error::from(io::ErrorKind::NotFound))?.try_into();
        let program = program.map_err(io::Error::other)?;
        ProgramRuns::of(program.fd().map_err(io::Error::other)?.as_fd())
    }
}
