//! That a cluster that is down has left nothing on the machine.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    harness::{Outcome, ensure, until},
    machine::{NAME, cluster, down, folder, pid},
};

/// Folders in which the parts of Kubernetes keep things when nobody tells them otherwise.
const FOLDERS: &[&str] =
    &["/", "/etc", "/opt", "/run", "/run/netns", "/usr/libexec", "/var/lib", "/var/log", "/var/tmp"];

/// Settings of the whole machine that kubelet and kube-proxy change.
const SETTINGS: &[&str] = &[
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/keys/root_maxbytes",
    "/proc/sys/kernel/keys/root_maxkeys",
    "/proc/sys/kernel/panic",
    "/proc/sys/kernel/panic_on_oops",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/vm/panic_on_oom",
];

/// What a machine has besides processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Machine(BTreeSet<String>);

/// Ends the cluster; then the machine is as it was `before`.
pub(crate) fn down_leaves_nothing(before: &Machine) -> Outcome {
    // If no other test has started it. In a thread of its own, which leaves the nodes' network.
    std::thread::spawn(|| cluster().map(drop)).join().map_err(|_panic| "it panics")??;
    let family = family(pid()?);
    for (name, count) in [("kubelet", 2), ("containerd", 2), ("etcd", 1), ("pause", 1)] {
        let found = family.iter().filter(|(pid, _)| command(*pid).as_deref() == Some(name)).count();
        ensure(found >= count, || format!("{found} processes {name} are seen"))?;
    }
    ensure(control_groups().len() > 1, || "no control group is seen".to_owned())?;
    down();
    let mut left = Vec::new();
    let gone = until("everything to be gone", || {
        let alive = family.iter().filter(|(pid, began)| stat(*pid).is_some_and(|(_, now)| now == *began));
        left = alive.map(|(pid, _)| format!("process {pid} {:?}", command(*pid))).collect();
        let now = Machine::now();
        left.extend(before.0.symmetric_difference(&now.0).cloned());
        left.is_empty().then_some(())
    });
    gone.map_err(|_late| format!("left or lost: {left:#?}"))?;
    ensure(control_groups().is_empty() && !folder().exists(), || "groups or files".to_owned())
}

/// Processes below this one, each with the time of its start: a pid may be given again.
fn family(root: i32) -> BTreeSet<(i32, String)> {
    let pids = processes();
    let mut family = BTreeSet::from([root]);
    loop {
        let known = family.len();
        let child = |pid: &&i32| stat(**pid).is_some_and(|(parent, _)| family.contains(&parent));
        let children: Vec<i32> = pids.iter().filter(child).copied().collect();
        family.extend(children);
        if family.len() == known {
            return family.into_iter().filter_map(|pid| Some((pid, stat(pid)?.1))).collect();
        }
    }
}

/// All of this machine.
pub(crate) fn processes() -> Vec<i32> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten();
    names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Parent and time of start.
fn stat(pid: i32) -> Option<(i32, String)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(") ")?.1.split(' ').skip(1);
    Some((fields.next()?.parse().ok()?, fields.nth(17)?.to_owned()))
}

fn command(pid: i32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned())
}

fn control_groups() -> Vec<PathBuf> {
    let hierarchies =
        fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path().join(NAME));
    hierarchies.chain([Path::new("/sys/fs/cgroup").join(NAME)]).filter(|group| group.exists()).collect()
}

// === impl Machine ===

impl Machine {
    /// As it is now: mounts, interfaces, control groups, files, settings.
    pub(crate) fn now() -> Self {
        let mut all = BTreeSet::new();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        all.extend(mounts.lines().filter_map(|line| Some(format!("mount {}", line.split(' ').nth(4)?))));
        let mut entries = |what: &str, folder: &Path| {
            let found = fs::read_dir(folder).into_iter().flatten().flatten();
            all.extend(found.map(|entry| format!("{what} {}", entry.path().display())));
        };
        entries("interface", Path::new("/sys/class/net"));
        FOLDERS.iter().for_each(|folder| entries("file", Path::new(folder)));
        all.extend(control_groups().iter().map(|group| format!("control group {}", group.display())));
        let value = |setting: &&str| Some(format!("{setting} = {}", fs::read_to_string(setting).ok()?.trim()));
        all.extend(SETTINGS.iter().filter_map(value));
        Self(all)
    }
}
