//! Loading the object again over maps that exist.
//!
//! aya takes existing maps from a bpffs only. So they are pinned in a bpffs of our own that is mounted nowhere, reached
//! through the fd of its root, and gone when that fd is closed.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::PathBuf,
};

use aya::{Ebpf, EbpfLoader};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::{LoadError, maps::Maps};

pub(super) fn load_over(object: &[u8], maps: &Maps) -> Result<Ebpf, LoadError> {
    let root = private_bpffs().map_err(LoadError::Reuse)?;
    let root_path = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    for (name, map) in maps.each() {
        let path = root_path.join(name);
        map.pin(&path).map_err(|e| LoadError::Reuse(io::Error::other(e)))?;
        loader.map_pin_path(name, path);
    }
    loader.load(object).map_err(|source| LoadError::Object { source: Box::new(source) })
}

fn private_bpffs() -> io::Result<OwnedFd> {
    let context = fsopen("bpf", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}
