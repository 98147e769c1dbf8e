//! What processes cost, seen from outside.

use std::{collections::BTreeMap, fs, os::linux::fs::MetadataExt as _, process};

use anyhow::Context as _;
use rustix::param::clock_ticks_per_second;

/// A process of the platform.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pid: u32,
    /// `gateway`, `agent`, `aggregator`, `coordinator`.
    pub(super) component: String,
}

/// Bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Memory {
    pub(super) shared: u64,
    pub(super) anonymous: u64,
}

/// The components that descend from this process.
pub(super) fn of_platform() -> anyhow::Result<Vec<Process>> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
        if let Some(parent) = fields(pid).and_then(|fields| fields.get(1)?.parse::<u32>().ok()) {
            parents.insert(pid, parent);
        }
    }
    let descends = |mut pid: u32| {
        while let Some(parent) = parents.get(&pid) {
            if *parent == process::id() {
                return true;
            }
            pid = *parent;
        }
        false
    };
    let component = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let word = String::from_utf8(line.split(|byte| *byte == 0).nth(1)?.to_vec()).ok()?;
        let known = ["agent", "aggregator", "coordinator", "gateway"].contains(&word.as_str());
        known.then_some(Process { pid: *pid, component: word })
    };
    Ok(parents.keys().filter(|pid| descends(**pid)).filter_map(component).collect())
}

/// Processor time of these processes so far, seconds, kernel included.
pub(super) fn cpu(pids: impl IntoIterator<Item = u32>) -> anyhow::Result<f64> {
    let mut ticks = 0;
    for pid in pids {
        let fields = fields(pid).with_context(|| format!("process {pid} is gone"))?;
        for field in [11, 12] {
            ticks += fields.get(field).context("unknown form of stat")?.parse::<u64>()?;
        }
    }
    Ok(ticks as f64 / clock_ticks_per_second() as f64)
}

/// All memfds of the platform, and the anonymous memory of those who handle updates.
pub(super) fn memory(platform: &[Process]) -> Memory {
    let mut files = BTreeMap::new();
    for pid in platform.iter().map(|process| process.pid).chain([process::id()]) {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for path in entries.flatten().map(|entry| entry.path()) {
            let is_memfd = fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"));
            if let Some(file) = is_memfd.then(|| fs::metadata(&path).ok()).flatten() {
                files.insert((file.st_dev(), file.st_ino()), file.st_blocks() * 512);
            }
        }
    }
    let anonymous = platform.iter().filter(|process| process.component != "coordinator").filter_map(|process| {
        let text = fs::read_to_string(format!("/proc/{}/status", process.pid)).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
    });
    Memory { shared: files.values().sum(), anonymous: anonymous.sum() }
}

/// What stands in proc(5)'s stat after the name, which may hold anything.
fn fields(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

// === impl Process ===

impl Process {
    pub(super) const fn pid(&self) -> u32 {
        self.pid
    }
}
