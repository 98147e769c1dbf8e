//! A node made of network namespaces: a pod, a client, a cable between them.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::{
    mount::{UnmountFlags, mount_bind, unmount},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};
use tempfile::TempDir;

/// Address of the pod.
pub(crate) const POD: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// The pod's other address.
pub(crate) const POD_V6: Ipv6Addr = Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 2);
const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1);

/// Namespaces, mounted in a folder of their own.
pub(crate) struct Node {
    folder: TempDir,
    /// Outside of the folder: the client is no pod.
    outside: TempDir,
}

/// A mounted namespace.
pub(crate) struct Namespace(PathBuf);

/// Why this machine cannot have namespaces.
pub(crate) fn why_not() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".into());
    }
    if Command::new("ip").arg("-Version").stdout(Stdio::null()).status().is_err() {
        return Some("no 'ip' (Debian: iproute2)".into());
    }
    let tried = tempfile::tempdir().and_then(|folder| Namespace::create(&folder.path().join("try")).map(|_| folder));
    match tried {
        Ok(folder) => Namespace(folder.path().join("try")).remove().err().map(|error| error.to_string()),
        Err(error) => Some(format!("network namespaces: {error}")),
    }
}

/// The kernel speaks IPv6.
pub(crate) fn has_v6() -> bool {
    Path::new("/proc/net/if_inet6").exists()
}

// === impl Namespace ===

impl Namespace {
    /// As `ip netns add` does it: a namespace lives as long as it is mounted.
    fn create(path: &Path) -> io::Result<Self> {
        File::create(path)?;
        let target = path.to_owned();
        in_thread(move || {
            unshare()?;
            Ok(mount_bind("/proc/thread-self/ns/net", &target)?)
        })?;
        let new = Self(path.to_owned());
        new.ip(&["link", "set", "lo", "up"])?;
        Ok(new)
    }

    fn remove(&self) -> io::Result<()> {
        unmount(&self.0, UnmountFlags::DETACH)?;
        fs::remove_file(&self.0)
    }

    fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let namespace = File::open(&self.0)?;
        in_thread(move || {
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::Network))?;
            work()
        })
    }

    /// `ip` in this namespace: a child begins where the thread is that starts it.
    pub(crate) fn ip(&self, arguments: &[&str]) -> io::Result<()> {
        let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        self.inside(move || {
            let out = Command::new("ip").args(&arguments).output()?;
            match out.status.success() {
                true => Ok(()),
                false => Err(io::Error::other(format!("ip {arguments:?}: {}", String::from_utf8_lossy(&out.stderr)))),
            }
        })
    }

    /// Writes a file that shows this namespace's settings.
    pub(crate) fn write(&self, file: &'static str, text: &'static str) -> io::Result<()> {
        self.inside(move || fs::write(file, text))
    }
}

#[expect(deprecated, reason = "its successor is unsafe for the sake of UnshareFlags::FILES, which is not asked for")]
fn unshare() -> io::Result<()> {
    Ok(rustix::thread::unshare(UnshareFlags::NEWNET)?)
}

fn in_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    std::thread::spawn(work).join().map_err(|_panic| io::Error::other("the thread panicked"))?
}

// === impl Node ===

impl Node {
    pub(crate) fn new() -> io::Result<Self> {
        let node = Self { folder: tempfile::tempdir()?, outside: tempfile::tempdir()? };
        Namespace::create(&node.outside.path().join("client"))?;
        node.make_pod()?;
        // Of another pod, that has nothing to do with it.
        Namespace::create(&node.folder.path().join("other"))?;
        Ok(node)
    }

    /// Where the pods' namespaces are.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn client(&self) -> Namespace {
        Namespace(self.outside.path().join("client"))
    }

    fn pod(&self) -> Namespace {
        Namespace(self.folder.path().join("pod"))
    }

    fn make_pod(&self) -> io::Result<()> {
        let pod = Namespace::create(&self.folder.path().join("pod"))?;
        let client = self.client();
        let there = pod.0.to_string_lossy().into_owned();
        client.ip(&["link", "add", "cable", "type", "veth", "peer", "name", "eth0", "netns", &there])?;
        client.ip(&["addr", "add", &format!("{CLIENT}/24"), "dev", "cable"])?;
        client.ip(&["link", "set", "cable", "up"])?;
        pod.ip(&["addr", "add", &format!("{POD}/24"), "dev", "eth0"])?;
        pod.ip(&["link", "set", "eth0", "up"])?;
        if has_v6() {
            // Without waiting for a neighbour that has it already.
            client.ip(&["addr", "add", &format!("{CLIENT_V6}/64"), "dev", "cable", "nodad"])?;
            pod.ip(&["addr", "add", &format!("{POD_V6}/64"), "dev", "eth0", "nodad"])?;
        }
        Ok(())
    }

    /// The pod's sandbox dies and is made anew, with the same address.
    pub(crate) fn replace_pod(&mut self) -> io::Result<()> {
        self.client().ip(&["link", "del", "cable"])?;
        self.pod().remove()?;
        self.make_pod()
    }

    pub(crate) fn add(&mut self, name: &str, prepare: impl FnOnce(&Namespace) -> io::Result<()>) -> io::Result<()> {
        prepare(&Namespace::create(&self.folder.path().join(name))?)
    }

    pub(crate) fn remove(&mut self, name: &str) -> io::Result<()> {
        Namespace(self.folder.path().join(name)).remove()
    }

    pub(crate) fn in_pod<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.pod().inside(work)
    }

    pub(crate) fn in_client<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.client().inside(work)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for folder in [self.folder.path(), self.outside.path()] {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let _was_no_namespace = Namespace(entry.path()).remove();
            }
        }
    }
}
