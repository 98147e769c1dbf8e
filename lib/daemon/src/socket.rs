//! The socket of a node, over which supervisors are linked.
//!
//! Descriptors of everything that a node serves pass over it, so it asks the kernel who connects: only root, the users of
//! unprivileged components and the user that made it are let in. Those of components may be these components only: who takes a
//! gateway over is not to command the agent as its coordinator.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with},
    process::{Uid, geteuid},
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::Channel;

/// User of the gateway where its supervisor is root: it parses strangers' bytes and owns nothing.
pub const GATEWAY_UID: u32 = 65_532;
/// User of the coordinator in a pod of its own.
pub const COORDINATOR_UID: u32 = 65_533;
/// Users of components that need no rights of their own, one each.
const UNPRIVILEGED: [(u32, &str); 2] = [(GATEWAY_UID, "gateway"), (COORDINATOR_UID, "coordinator")];
/// Supervisors of a node are few.
const BACKLOG: i32 = 16;
/// Another hub of the node is looked after so often.
const TAKEN_PAUSE: Duration = Duration::from_millis(100);

/// The hub's end: others connect to it.
#[derive(Debug)]
pub struct NodeSocket {
    fd: AsyncFd<OwnedFd>,
    path: PathBuf,
    /// Held as long as this hub lives, whatever its end: a second one on the node waits for it.
    _lock: File,
}

/// Somebody who is let in.
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) channel: Channel,
    uid: Uid,
}

/// The node's socket cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("socket of the node {}: {source}{}", path.display(), hint(source))]
pub struct SocketError {
    path: PathBuf,
    source: io::Error,
}

fn hint(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => " (is the node's folder mounted there? see --socket)".to_owned(),
        io::ErrorKind::PermissionDenied => format!(
            " (the agent needs root, the gateway user {GATEWAY_UID} or root, the coordinator {COORDINATOR_UID} or root)"
        ),
        _ => String::new(),
    }
}

// === impl NodeSocket ===

impl NodeSocket {
    /// Makes the socket, in place of one that a dead hub has left. Waits while another hub of the node lives. Needs a tokio
    /// runtime around it.
    ///
    /// # Errors
    /// When there is no such folder, or no right to write to it.
    pub async fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source: io::Error| SocketError { path: path.to_owned(), source };
        let lock = lock_file(&beside(path, "lock")).map_err(failed)?;
        let mut said = false;
        while let Err(error) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if error != Errno::WOULDBLOCK {
                return Err(failed(error.into()));
            }
            if !std::mem::replace(&mut said, true) {
                tracing::warn!(path = %path.display(), "another agent of this node lives: waiting for its end");
            }
            tokio::time::sleep(TAKEN_PAUSE).await;
        }
        let fd = make(path).and_then(watch).map_err(failed)?;
        Ok(Self { fd, path: path.to_owned(), _lock: lock })
    }

    /// The next connection of somebody who may; others are turned away.
    pub(crate) async fn accept(&self) -> io::Result<Caller> {
        loop {
            let accept = |fd: &OwnedFd| Ok(accept_with(fd, SocketFlags::CLOEXEC)?);
            let stream = self.fd.async_io(Interest::READABLE, accept).await?;
            let uid = user_of(&stream)?;
            if may_be_all(uid) || UNPRIVILEGED.iter().any(|(user, _)| *user == uid.as_raw()) {
                return Ok(Caller { channel: Channel::new(stream)?, uid });
            }
            tracing::warn!(uid = uid.as_raw(), path = %self.path.display(), "a stranger is turned away");
        }
    }
}

// === impl Caller ===

impl Caller {
    /// Its user.
    pub(crate) fn uid(&self) -> u32 {
        self.uid.as_raw()
    }

    /// Whether it may be this component.
    pub(crate) fn may_be(&self, name: &str) -> bool {
        may_be(self.uid, name)
    }
}

fn may_be(uid: Uid, name: &str) -> bool {
    may_be_all(uid) || UNPRIVILEGED.contains(&(uid.as_raw(), name))
}

/// Root, and who runs a whole node without being root.
fn may_be_all(uid: Uid) -> bool {
    uid.is_root() || uid == geteuid()
}

/// Who could open it could lock it, and the agent would wait for that one's end: so it is the agent's alone, one of before too.
fn lock_file(path: &Path) -> io::Result<File> {
    const OWNERS: u32 = 0o600;
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(OWNERS).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(OWNERS))?;
    Ok(file)
}

/// Never is there no socket: one is made under another name, and takes the place of what is there.
fn make(path: &Path) -> io::Result<OwnedFd> {
    let new = beside(path, "new");
    if let Err(error) = fs::remove_file(&new)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let fd = socket()?;
    bind(&fd, &SocketAddrUnix::new(&new)?)?;
    // Whoever it is, `accept` asks the kernel; a mode that lets in one other user would take the right to give files away.
    fs::set_permissions(&new, fs::Permissions::from_mode(0o666))?;
    listen(&fd, BACKLOG)?;
    fs::rename(&new, path)?;
    Ok(fd)
}

#[expect(deprecated, reason = "its successor is unsafe for types that lie about their descriptor; an OwnedFd does not")]
fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

/// Connects to the hub of the node.
pub(crate) fn reach(path: &Path) -> Result<Channel, SocketError> {
    let reach = || {
        let fd = socket()?;
        connect(&fd, &SocketAddrUnix::new(path)?)?;
        // A hub speaks for all siblings: it must not be anybody.
        let uid = user_of(&fd)?;
        if !uid.is_root() && uid != geteuid() {
            return Err(io::Error::other(format!("its hub is user {}, neither root nor this one", uid.as_raw())));
        }
        Channel::new(fd)
    };
    reach().map_err(|source| SocketError { path: path.to_owned(), source })
}

/// Who is at the other end. Not by `rustix`: where the other end is of another container its process has no number here, the
/// kernel says 0, and `rustix` has no place for that. (Of a socket's kind this asks nothing.)
fn user_of(fd: &OwnedFd) -> io::Result<Uid> {
    let stream = std::os::unix::net::UnixStream::from(fd.try_clone()?);
    stream.set_nonblocking(true)?;
    Ok(Uid::from_raw(tokio::net::UnixStream::from_std(stream)?.peer_cred()?.uid()))
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

fn beside(path: &Path, what: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(what);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_may_be_its_own_component_only() {
        let may = |uid: u32| ["gateway", "coordinator", "agent"].map(|name| may_be(Uid::from_raw(uid), name));
        assert_eq!(may(0), [true; 3]);
        assert_eq!(may(geteuid().as_raw()), [true; 3]);
        assert_eq!(may(GATEWAY_UID), [true, false, false]);
        assert_eq!(may(COORDINATOR_UID), [false, true, false]);
        assert_eq!(may(65_531), [false; 3]);
    }

    #[tokio::test]
    async fn nobody_else_can_lock_the_hub_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.sock");
        let lock = beside(&path, "lock");
        let mode = || fs::metadata(&lock).unwrap().permissions().mode() & 0o777;
        drop(NodeSocket::bind(&path).await.unwrap());
        assert_eq!(mode(), 0o600);
        // As an older hub has left it.
        fs::set_permissions(&lock, fs::Permissions::from_mode(0o644)).unwrap();
        drop(NodeSocket::bind(&path).await.unwrap());
        assert_eq!(mode(), 0o600);
    }
}
