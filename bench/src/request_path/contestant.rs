//! A server in processes of its own, and what it costs.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};

/// A server that does not listen by then has failed.
const START: Duration = Duration::from_secs(20);

/// A server at work; ended when dropped.
#[derive(Debug)]
pub(super) struct Contestant {
    pub(super) name: &'static str,
    /// Where it is asked.
    pub(super) at: SocketAddr,
    process: Child,
}

/// Processor time and requests of one turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    /// A second.
    pub(super) rate: f64,
    /// Microseconds of the contestant's processes per request.
    pub(super) cpu: f64,
    /// Milliseconds; 99 % took no longer.
    pub(super) p99: f64,
    /// Answers counted by the client.
    pub(super) answers: u64,
}

/// An address that is free now.
pub(super) fn free() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

/// What runs beside the bench must be there.
pub(super) fn installed(program: &str) -> anyhow::Result<()> {
    let mut version = Command::new(program);
    match version.arg("-v").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status() {
        Ok(_) => Ok(()),
        Err(error) => bail!("{program} is not installed: {error}"),
    }
}

// === impl Contestant ===

impl Contestant {
    /// Starts a server and waits until it listens.
    pub(super) fn start(name: &'static str, at: SocketAddr, command: &mut Command) -> anyhow::Result<Self> {
        let process = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let mut started = Self { name, at, process };
        let by = Instant::now() + START;
        while TcpStream::connect_timeout(&at, Duration::from_secs(1)).is_err() {
            if let Some(status) = started.process.try_wait()? {
                bail!("{name} ended: {status}");
            }
            if Instant::now() > by {
                bail!("{name} does not listen at {at}");
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(started)
    }

    /// Its process and its children's.
    pub(super) fn pids(&self) -> anyhow::Result<Vec<u32>> {
        let own = self.process.id();
        let mut pids = vec![own];
        for entry in fs::read_dir("/proc")? {
            let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
            if stat(pid).and_then(|fields| fields.get(1)?.parse().ok()) == Some(own) {
                pids.push(pid);
            }
        }
        Ok(pids)
    }

    /// Processor time so far, all threads, kernel included.
    pub(super) fn cpu(&self) -> anyhow::Result<Duration> {
        let mut nanoseconds = 0;
        for pid in self.pids()? {
            for task in fs::read_dir(format!("/proc/{pid}/task"))? {
                // A thread may end between the two.
                let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
                let first = text.split_whitespace().next().context("unknown form of schedstat")?;
                nanoseconds += first.parse::<u64>()?;
            }
        }
        Ok(Duration::from_nanos(nanoseconds))
    }

    /// The same as the kernel's ticks of its clock, rounded down as it does.
    pub(super) fn ticks(&self) -> anyhow::Result<u64> {
        let mut ticks = 0;
        for pid in self.pids()? {
            let fields = stat(pid).with_context(|| format!("{} is gone", self.name))?;
            for field in [11, 12] {
                ticks += fields.get(field).context("unknown form of stat")?.parse::<u64>()?;
            }
        }
        Ok(ticks)
    }

    /// Resident memory, kilobytes.
    pub(super) fn rss(&self) -> anyhow::Result<f64> {
        let mut sum = 0.0;
        for pid in self.pids()? {
            let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let number = line.and_then(|line| line.trim().strip_suffix(" kB")).context("unknown form of status")?;
            sum += number.parse::<f64>()?;
        }
        Ok(sum)
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        // What has ended already cannot be ended, and nobody is left to be told.
        if let Some(pid) = i32::try_from(self.process.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.process.wait();
    }
}

/// What stands in proc(5)'s stat after the name, which may hold anything.
fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}
