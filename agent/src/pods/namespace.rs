//! Network namespaces of pods: finding them, and making sockets in them.
//!
//! A thread that enters a namespace stays in it, so each piece of work has a thread of its own that ends with it (20-50 us);
//! threads of the runtime never enter one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{CWD, Mode, OFlags, fstat, openat, stat},
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tokio::sync::oneshot;

/// Connections that wait for the gateway, each listener; the namespace's `somaxconn` bounds it too.
const BACKLOG: i32 = 4096;
const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// A pod's network namespace.
#[derive(Clone, Debug)]
pub(super) struct Namespace {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) inode: u64,
    /// Its name in the folder of mounts.
    pub(super) mount: String,
}

/// A namespace, and listeners in it.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) namespace: Namespace,
    pub(super) listeners: Vec<OwnedFd>,
}

/// Opens listeners in the namespaces of these addresses, or says why not, in the same order.
///
/// Namespaces in `held` belong to other pods and are passed over.
pub(super) async fn open(
    folder: PathBuf,
    wanted: Vec<(IpAddr, Vec<u16>)>,
    held: BTreeSet<u64>,
) -> io::Result<Vec<Result<Opened, String>>> {
    in_thread(move || {
        let addresses = wanted.iter().map(|(address, _)| *address).collect();
        let mut found = find(&folder, &addresses, &held)?;
        let open = |(address, ports): (IpAddr, Vec<u16>)| {
            let namespace = sole(&mut found, address, &folder)?;
            enter(namespace.fd.as_fd()).map_err(|e| format!("network namespace {}: {e}", namespace.mount))?;
            let listeners = ports.iter().map(|port| listener(*port)).collect::<Result<_, _>>()?;
            Ok(Opened { namespace, listeners })
        };
        Ok(wanted.into_iter().map(open).collect())
    })
    .await
}

/// The namespaces of these addresses in which the port beside is taken: somebody has opened the pod already. In the same order.
pub(super) async fn taken(
    folder: PathBuf,
    wanted: Vec<(IpAddr, u16)>,
    held: BTreeSet<u64>,
) -> io::Result<Vec<Result<Namespace, String>>> {
    in_thread(move || {
        let addresses = wanted.iter().map(|(address, _)| *address).collect();
        let mut found = find(&folder, &addresses, &held)?;
        let taken = |(address, port): (IpAddr, u16)| {
            let namespace = sole(&mut found, address, &folder)?;
            enter(namespace.fd.as_fd()).map_err(|e| format!("network namespace {}: {e}", namespace.mount))?;
            match listener(port) {
                Err(_taken) => Ok(namespace),
                Ok(_free) => Err(format!("nobody listens on port {port} of {address}")),
            }
        };
        Ok(wanted.into_iter().map(taken).collect())
    })
    .await
}

/// The one namespace of an address, or why there is none.
fn sole(found: &mut BTreeMap<IpAddr, Vec<Namespace>>, address: IpAddr, folder: &Path) -> Result<Namespace, String> {
    let mut places = found.remove(&address).unwrap_or_default();
    match (places.pop(), places.len()) {
        (Some(namespace), 0) => Ok(namespace),
        (None, _) => Err(format!("no network namespace with address {address} under {}", folder.display())),
        (Some(_), others) => Err(format!("address {address} is in {} network namespaces: whose is it?", others + 1)),
    }
}

/// Makes TCP sockets that dial the namespace's loopback. IPv4, as queue-proxy dials 127.0.0.1 only.
pub(super) async fn sockets(namespace: Arc<OwnedFd>, count: u32) -> io::Result<Vec<OwnedFd>> {
    in_thread(move || {
        enter(namespace.as_fd())?;
        (0..count).map(|_| Ok(socket_with(AddressFamily::INET, SocketType::STREAM, FLAGS, None)?)).collect()
    })
    .await
}

/// It is still mounted there.
pub(super) fn is_mounted(folder: &Path, namespace: &Namespace) -> bool {
    stat(folder.join(&namespace.mount)).is_ok_and(|found| found.st_ino == namespace.inode)
}

/// Number of a namespace.
pub(super) fn inode(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(fstat(fd)?.st_ino)
}

async fn in_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let (done, result) = oneshot::channel();
    std::thread::Builder::new().name("pod-netns".to_owned()).spawn(move || drop(done.send(work())))?;
    result.await.map_err(|_panicked| io::Error::other("the thread in the namespace ended early"))?
}

fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    Ok(move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?)
}

/// Visits every namespace of the folder that no pod holds, and asks it for these addresses.
///
/// All of them, though the first hit would do for a friendly node: a pod with `NET_ADMIN` may give itself any address. Who
/// does so keeps the owner of the address from being served, and is named by that; it never gets the owner's requests.
fn find(
    folder: &Path,
    wanted: &BTreeSet<IpAddr>,
    held: &BTreeSet<u64>,
) -> io::Result<BTreeMap<IpAddr, Vec<Namespace>>> {
    let mut seen = held.clone();
    seen.insert(stat("/proc/thread-self/ns/net")?.st_ino);
    let mut out: BTreeMap<IpAddr, Vec<Namespace>> = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let Ok(mount) = entry?.file_name().into_string() else { continue };
        // What stands there is not always a namespace (yet): the file is made before it is mounted upon.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let Ok(fd) = openat(CWD, folder.join(&mount), flags, Mode::empty()) else { continue };
        let inode = inode(fd.as_fd())?;
        if !seen.insert(inode) || enter(fd.as_fd()).is_err() {
            continue;
        }
        let fd = Arc::new(fd);
        for address in wanted.iter().filter(|address| is_here(**address)) {
            let namespace = Namespace { fd: fd.clone(), inode, mount: mount.clone() };
            out.entry(*address).or_default().push(namespace);
        }
    }
    Ok(out)
}

/// The address is one of this namespace: the kernel lets a socket be bound to it, and not to any address whatever.
fn is_here(address: IpAddr) -> bool {
    // Of the ranges for documentation: what binds to these has `ip_nonlocal_bind` set, and binds to everything.
    let nobodys = match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
    };
    binds(address) && !binds(nobodys)
}

fn binds(address: IpAddr) -> bool {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    socket_with(family, SocketType::DGRAM, FLAGS, None)
        .is_ok_and(|socket| bind(socket, &SocketAddr::new(address, 0)).is_ok())
}

/// A listener on all addresses of this namespace, of both families where it has both: as queue-proxy's.
fn listener(port: u16) -> Result<OwnedFd, String> {
    match listener_of(AddressFamily::INET6, port) {
        Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => listener_of(AddressFamily::INET, port),
        other => other,
    }
    .map_err(|error| match error {
        Errno::ADDRINUSE => format!("port {port} is taken: does a container of the pod listen on it?"),
        other => format!("port {port}: {other}"),
    })
}

fn listener_of(family: AddressFamily, port: u16) -> Result<OwnedFd, Errno> {
    let socket = socket_with(family, SocketType::STREAM, FLAGS, None)?;
    // A pod that is opened again must not wait for the connections of before to time out.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if family == AddressFamily::INET6 {
        sockopt::set_ipv6_v6only(&socket, false)?;
        bind(&socket, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0))?;
    } else {
        bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
    }
    listen(&socket, BACKLOG)?;
    Ok(socket)
}
