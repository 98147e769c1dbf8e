//! The maps of the object, by name.

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use aya::{
    Ebpf,
    maps::{Map, MapData, MapError},
};

use super::LoadError;

/// Names in the object, and under which [`Maps::fds`] gives them.
pub(super) const NAMES: [(&str, &str); 6] = [
    ("PROGRAMS", "bpf-programs"),
    ("SOCKETS", "bpf-sockets"),
    ("IDENTITY", "bpf-identity"),
    ("SEATS", "bpf-seats"),
    ("ROUTES", "bpf-routes"),
    ("COUNTERS", "bpf-counters"),
];

/// What `ebpf/prog/src/route.rs` describes.
#[derive(Debug)]
pub(super) struct Maps {
    pub(super) programs: Map,
    pub(super) sockets: Map,
    pub(super) identity: Map,
    pub(super) seats: Map,
    pub(super) routes: Map,
    pub(super) counters: Map,
}

pub(super) fn error(name: &'static str) -> impl FnOnce(MapError) -> LoadError {
    move |source| LoadError::Map { name, source }
}

// === impl Maps ===

impl Maps {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        Self::build(|(name, _)| ebpf.take_map(name).ok_or(LoadError::Missing(name)))
    }

    pub(super) fn from_fds(mut fds: HashMap<String, OwnedFd>) -> Result<Self, LoadError> {
        Self::build(|(name, key)| {
            let fd = fds.remove(key).ok_or(LoadError::Missing(key))?;
            MapData::from_fd(fd).and_then(Map::from_map_data).map_err(error(name))
        })
    }

    fn build(mut get: impl FnMut((&'static str, &'static str)) -> Result<Map, LoadError>) -> Result<Self, LoadError> {
        let [programs, sockets, identity, seats, routes, counters] = NAMES;
        Ok(Self {
            programs: get(programs)?,
            sockets: get(sockets)?,
            identity: get(identity)?,
            seats: get(seats)?,
            routes: get(routes)?,
            counters: get(counters)?,
        })
    }

    pub(super) fn each(&self) -> [(&'static str, &Map); 6] {
        let maps = [&self.programs, &self.sockets, &self.identity, &self.seats, &self.routes, &self.counters];
        let mut each = maps.map(|map| ("", map));
        for ((slot, _), (name, _)) in each.iter_mut().zip(NAMES) {
            *slot = name;
        }
        each
    }

    pub(super) fn fds(&self) -> Vec<(&'static str, BorrowedFd<'_>)> {
        let keys = NAMES.map(|(_, key)| key);
        keys.into_iter().zip(self.each()).filter_map(|(key, (_, map))| Some((key, data(map)?.fd().as_fd()))).collect()
    }
}

/// aya gives a map's fd by its kind only.
fn data(map: &Map) -> Option<&MapData> {
    match map {
        Map::ProgramArray(data)
        | Map::SockMap(data)
        | Map::SkStorage(data)
        | Map::Array(data)
        | Map::HashMap(data)
        | Map::PerCpuArray(data) => Some(data),
        _ => None,
    }
}
