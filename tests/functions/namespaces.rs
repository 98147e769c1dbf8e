//! Network namespaces as a container runtime leaves them: mounted in a folder, each with an address and an app that listens.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::{
    mount::{UnmountFlags, mount_bind, unmount},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};
use tempfile::TempDir;

/// Where the apps listen.
pub(crate) const USER_PORT: u16 = 8080;

/// Pods' namespaces; unmounted when dropped.
pub(crate) struct Namespaces {
    folder: TempDir,
    count: usize,
    /// Nobody accepts: a connection is made all the same, which is what a probe asks for.
    _apps: Vec<TcpListener>,
}

/// Why this machine cannot have them.
pub(crate) fn why_not() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".into());
    }
    if Command::new("ip").arg("-Version").stdout(Stdio::null()).status().is_err() {
        return Some("no 'ip' (Debian: iproute2)".into());
    }
    Namespaces::new(1).err().map(|error| format!("network namespaces: {error}"))
}

/// Address of the pod of this number.
pub(crate) fn address(number: usize) -> Ipv4Addr {
    let [.., high, low] = u32::try_from(number + 1).unwrap_or_default().to_be_bytes();
    Ipv4Addr::new(10, 98, high, low)
}

// === impl Namespaces ===

impl Namespaces {
    pub(crate) fn new(count: usize) -> io::Result<Self> {
        let mut new = Self { folder: tempfile::tempdir()?, count, _apps: Vec::new() };
        for number in 0..count {
            let app = create(&new.path(number), address(number))?;
            new._apps.push(app);
        }
        Ok(new)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Bytes to a port of a pod, from within, and what comes back until the end.
    pub(crate) fn ask(&self, number: usize, port: u16, request: &'static str) -> io::Result<String> {
        let namespace = File::open(self.path(number))?;
        let to = SocketAddr::from((address(number), port));
        in_thread(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(20))?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(request.as_bytes())?;
            io::read_to_string(stream)
        })
    }

    fn path(&self, number: usize) -> PathBuf {
        self.folder().join(format!("pod-{number}"))
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for number in 0..self.count {
            let _was_not_made = unmount(self.path(number), UnmountFlags::DETACH);
            let _was_not_made = fs::remove_file(self.path(number));
        }
    }
}

/// As `ip netns add` does it, and the app in it.
fn create(path: &Path, address: Ipv4Addr) -> io::Result<TcpListener> {
    File::create(path)?;
    let target = path.to_owned();
    in_thread(move || {
        unshare()?;
        mount_bind("/proc/thread-self/ns/net", &target)?;
        let mut ip = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn()?;
        let words = format!("link set lo up\naddr add {address}/32 dev lo\n");
        ip.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?.write_all(words.as_bytes())?;
        if !ip.wait()?.success() {
            return Err(io::Error::other("ip failed"));
        }
        TcpListener::bind((Ipv4Addr::LOCALHOST, USER_PORT))
    })
}

#[expect(deprecated, reason = "its successor is unsafe for the sake of UnshareFlags::FILES, which is not asked for")]
fn unshare() -> io::Result<()> {
    Ok(rustix::thread::unshare(UnshareFlags::NEWNET)?)
}

fn in_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    std::thread::spawn(work).join().map_err(|_panic| io::Error::other("the thread panicked"))?
}
