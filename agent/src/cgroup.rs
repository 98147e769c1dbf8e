//! A cgroup per function: bounds its memory and its processes, on v1 and on v2.
//!
//! Which hierarchy has a controller is found by looking, not by version: machines with both exist (tested: v1 memory and
//! pids beside a v2 mount without them, kernel 6.18).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustix::mount::{MountFlags, mount_remount};

/// Where the functions' groups are made, one folder a hierarchy.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cgroups {
    roots: Vec<Root>,
}

#[derive(Clone, Debug)]
struct Root {
    folder: PathBuf,
    knobs: Vec<(&'static str, Knob)>,
}

#[derive(Clone, Copy, Debug)]
enum Knob {
    Memory,
    Processes,
}

/// A platform's parent group is this and the pid of its supervisor.
const PREFIX: &str = "lifl.";
/// A function needs one; the second is room for the moment of a fork that it never makes.
const MAX_PROCESSES: u64 = 8;

// === impl Cgroups ===

impl Cgroups {
    /// Makes the parent group of this platform's functions in each hierarchy that can bound memory or processes; none when
    /// not permitted. Groups of platforms that died without an agent to remove them go first.
    pub(crate) fn new(supervisor: i32) -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut roots = Vec::new();
        for (mount, kind, options) in mounts.lines().filter_map(parse_mount) {
            let knobs = match kind {
                "cgroup2" => v2_knobs(&mount),
                "cgroup" => v1_knobs(&options),
                _ => continue,
            };
            let folder = mount.join(format!("{PREFIX}{supervisor}"));
            if !knobs.is_empty() {
                sweep(&mount);
            }
            if !knobs.is_empty() && make(&folder, &mount).is_ok() {
                if kind == "cgroup2" {
                    let _refused_shows_in_apply = fs::write(folder.join("cgroup.subtree_control"), "+memory +pids");
                }
                roots.push(Root { folder, knobs });
            }
        }
        Self { roots }
    }

    /// Puts a process into a group of its own.
    pub(crate) fn apply(&self, group: &str, pid: i32, memory: u64) -> io::Result<()> {
        for root in &self.roots {
            let folder = root.folder.join(group);
            fs::create_dir_all(&folder)?;
            for (file, knob) in &root.knobs {
                let value = match knob {
                    Knob::Memory => memory,
                    Knob::Processes => MAX_PROCESSES,
                };
                fs::write(folder.join(file), value.to_string())?;
            }
            fs::write(folder.join("cgroup.procs"), pid.to_string())?;
        }
        Ok(())
    }

    /// Removes a group whose process has ended.
    pub(crate) fn remove(&self, group: &str) {
        for root in &self.roots {
            let _busy_groups_go_with_the_parent = fs::remove_dir(root.folder.join(group));
        }
    }

    /// Removes everything; groups must be empty.
    pub(crate) fn remove_all(&self) {
        self.roots.iter().for_each(|root| remove_tree(&root.folder));
    }
}

/// Makes the parent group. Containers find their control groups mounted read-only: whoever may enter other namespaces may
/// remount too, and a function stays within what its pod may use.
fn make(folder: &Path, mount: &Path) -> io::Result<()> {
    match fs::create_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            let flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            mount_remount(mount, flags, c"")?;
            fs::create_dir_all(folder)
        }
        made => made,
    }
}

/// Removes the groups of dead platforms. Only empty groups can be removed: a living one that this process cannot see (another
/// pid namespace) loses nothing but folders that are made again when they are needed.
fn sweep(mount: &Path) {
    for entry in fs::read_dir(mount).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            remove_tree(&entry.path());
        }
    }
}

fn remove_tree(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _busy = fs::remove_dir(entry.path());
        }
    }
    let _busy = fs::remove_dir(folder);
}

/// Mount point, file system and super options of a line of `mountinfo`.
fn parse_mount(line: &str) -> Option<(PathBuf, &str, String)> {
    let (left, right) = line.split_once(" - ")?;
    let mount = left.split(' ').nth(4)?;
    let mut right = right.split(' ');
    let kind = right.next()?;
    let options = right.nth(1)?.to_owned();
    Some((PathBuf::from(mount), kind, options))
}

fn v1_knobs(options: &str) -> Vec<(&'static str, Knob)> {
    options
        .split(',')
        .filter_map(|controller| match controller {
            "memory" => Some(("memory.limit_in_bytes", Knob::Memory)),
            "pids" => Some(("pids.max", Knob::Processes)),
            _ => None,
        })
        .collect()
}

fn v2_knobs(mount: &Path) -> Vec<(&'static str, Knob)> {
    let controllers = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
    controllers
        .split_whitespace()
        .filter_map(|controller| match controller {
            "memory" => Some(("memory.max", Knob::Memory)),
            "pids" => Some(("pids.max", Knob::Processes)),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_dead_platforms_go_and_others_stay() {
        let mount = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let dead = child.id();
        child.wait().unwrap();
        let group = |pid: u32| mount.path().join(format!("{PREFIX}{pid}"));
        fs::create_dir_all(group(dead).join("1-16-3")).unwrap();
        fs::create_dir_all(group(std::process::id()).join("1-16-3")).unwrap();
        fs::create_dir_all(mount.path().join("lifl.slice")).unwrap();
        sweep(mount.path());
        assert!(!group(dead).exists());
        assert!(group(std::process::id()).join("1-16-3").exists() && mount.path().join("lifl.slice").exists());
    }

    #[test]
    fn hierarchies_are_read_from_mountinfo() {
        let v1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory";
        let (mount, kind, options) = parse_mount(v1).unwrap();
        assert_eq!((mount.to_str(), kind, v1_knobs(&options).len()), (Some("/sys/fs/cgroup/memory"), "cgroup", 1));
        let v2 = "41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(parse_mount(v2).unwrap().1, "cgroup2");
        assert!(parse_mount("nonsense").is_none());
    }
}
