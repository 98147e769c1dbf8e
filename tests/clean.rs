//! Whatever way `lifl` ends, nothing of it is left: no process, no cgroup, no eBPF object, no holder of its memory.

#[expect(dead_code, reason = "of the harness only a part is needed here")]
mod harness;

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    net::TcpStream,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use harness::{
    Outcome,
    client::{Clients, join, update_headers, values},
    ensure,
    http::{Call, read},
    job::{Job, file},
    no_ebpf, until,
    up::{Options, Up, kill},
};
use libtest_mimic::{Arguments, Trial};

/// What a platform has, as others see it.
#[derive(Debug, Default)]
struct Traces {
    /// Process and the time of its start: a pid may be given again.
    processes: BTreeSet<(i32, String)>,
    cgroups: Vec<PathBuf>,
    programs: BTreeSet<u32>,
    maps: BTreeSet<u32>,
    /// Device and inode of each memfd.
    memory: BTreeSet<(u64, u64)>,
}

/// A test over one of the paths.
type Case = fn(userspace: bool) -> Outcome;

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = vec![Trial::test("sigterm_lets_uploads_finish", sigterm_lets_uploads_finish)];
    for userspace in [false, true] {
        let path = if userspace { "userspace" } else { "ebpf" };
        let ignored = if userspace { None } else { no_ebpf() };
        let why = ignored.map(|why| format!(" ({why})")).unwrap_or_default();
        let cases: [(&str, Case); 3] = [
            ("sigterm_leaves_nothing", sigterm_leaves_nothing),
            ("sigkill_leaves_nothing", sigkill_leaves_nothing),
            ("sigkill_after_a_dead_agent_leaves_nothing", sigkill_after_a_dead_agent_leaves_nothing),
        ];
        for (name, case) in cases {
            let trial = Trial::test(format!("{path}::{name}{why}"), move || case(userspace));
            trials.push(trial.with_ignored_flag(ignored.is_some()));
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn stat(pid: i32) -> Option<(i32, String)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    // A zombie holds nothing and waits only for its parent.
    (state != "Z").then_some(())?;
    Some((parent, fields.nth(17)?.to_owned()))
}

fn processes() -> Vec<i32> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten();
    names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn memory_of(pid: i32) -> BTreeSet<(u64, u64)> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let memfds = fds.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:")));
    memfds.filter_map(|fd| fs::metadata(fd.path()).ok()).map(|found| (found.dev(), found.ino())).collect()
}

fn bpf_ids(pid: i32, field: &str) -> BTreeSet<u32> {
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let texts = infos.filter_map(|info| fs::read_to_string(info.path()).ok());
    texts.filter_map(|text| text.lines().find_map(|line| line.strip_prefix(field)?.trim().parse().ok())).collect()
}

/// Groups of this name in every hierarchy.
fn cgroups(name: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let groups = mounts.lines().filter(|line| line.contains(" - cgroup"));
    let folders = groups.filter_map(|line| Some(Path::new(line.split(' ').nth(4)?).join(name)));
    folders.filter(|folder| folder.exists()).collect()
}

// === impl Traces ===

impl Traces {
    fn of(up: &Up) -> Self {
        let mut traces = Self { cgroups: cgroups(&format!("lifl.{}", up.pid())), ..Self::default() };
        let mut family = BTreeSet::from([up.pid()]);
        loop {
            let known = family.len();
            let child = |pid: &i32| stat(*pid).is_some_and(|(parent, _)| family.contains(&parent));
            let children: Vec<i32> = processes().into_iter().filter(child).collect();
            family.extend(children);
            if family.len() == known {
                break;
            }
        }
        for pid in family {
            traces.processes.extend(stat(pid).map(|(_, began)| (pid, began)));
            traces.memory.extend(memory_of(pid));
            traces.programs.extend(bpf_ids(pid, "prog_id:"));
            traces.maps.extend(bpf_ids(pid, "map_id:"));
        }
        traces
    }

    /// What of it is there still, in the order in which it goes.
    ///
    /// Maps come last, after the programs: to look at a map opens it, and a kernel (6.18) that is emptying a map of programs at
    /// that moment loses count of it and keeps it.
    fn left(&self) -> Vec<String> {
        let alive = |(pid, began): &&(i32, String)| stat(*pid).is_some_and(|(_, now)| now == *began);
        let mut left: Vec<String> =
            self.processes.iter().filter(alive).map(|(pid, _)| format!("process {pid}")).collect();
        left.extend(self.cgroups.iter().filter(|group| group.exists()).map(|group| group.display().to_string()));
        let held: BTreeSet<_> = processes().into_iter().flat_map(memory_of).collect();
        left.extend(self.memory.intersection(&held).map(|memfd| format!("memfd {memfd:?}")));
        if left.is_empty() && !self.programs.is_empty() {
            let programs = aya::programs::loaded_programs().flatten().map(|program| program.id());
            left.extend(programs.filter(|id| self.programs.contains(id)).map(|id| format!("program {id}")));
        }
        if left.is_empty() && !self.maps.is_empty() {
            let maps = aya::maps::loaded_maps().flatten().map(|map| map.id());
            left.extend(maps.filter(|id| self.maps.contains(id)).map(|id| format!("map {id}")));
        }
        left
    }

    fn gone(&self) -> Outcome {
        let mut last = Vec::new();
        let gone = until("everything to be gone", || {
            last = self.left();
            last.is_empty().then_some(())
        });
        gone.map_err(|_late| format!("left: {last:?}").into())
    }
}

/// A platform in the middle of a job that lasts.
fn busy(dir: &Path, userspace: bool) -> Outcome<(Up, Clients, Traces)> {
    let job = Job::new(dir, "clean", 100_000, 4);
    job.write(dir)?;
    let up = Up::start(dir, &Options { userspace, ..Options::default() })?;
    let clients = Clients::start(up.gateway, &job);
    let committed = job.checkpoint.join("rounds/000002/commit.json");
    until("a committed round", || committed.exists().then_some(()))?;
    let traces = Traces::of(&up);
    // Supervisor, three components, two leaves, middle, top.
    ensure(traces.processes.len() == 8, || format!("processes: {:?}", traces.processes))?;
    ensure(!traces.memory.is_empty(), || "no memfd is seen".to_owned())?;
    ensure(traces.programs.is_empty() == userspace, || format!("programs: {:?}", traces.programs))?;
    let root = rustix::process::geteuid().is_root();
    ensure(!root || !traces.cgroups.is_empty(), || "no cgroup is seen".to_owned())?;
    Ok((up, clients, traces))
}

fn sigterm_leaves_nothing(userspace: bool) -> Outcome {
    let dir = tempfile::tempdir()?;
    let (mut up, _clients, traces) = busy(dir.path(), userspace)?;
    up.end()?;
    traces.gone()
}

fn sigkill_leaves_nothing(userspace: bool) -> Outcome {
    let dir = tempfile::tempdir()?;
    let (mut up, _clients, traces) = busy(dir.path(), userspace)?;
    up.kill()?;
    traces.gone()
}

/// The agent that has to clear up has started none of the functions.
fn sigkill_after_a_dead_agent_leaves_nothing(userspace: bool) -> Outcome {
    let dir = tempfile::tempdir()?;
    let (mut up, _clients, before) = busy(dir.path(), userspace)?;
    let agent = up.process("agent").ok_or("no agent")?;
    kill(agent);
    until("another agent", || up.process("agent").filter(|now| *now != agent))?;
    until("all of its functions", || up.process("leaf").and(up.process("middle")).and(up.process("top")))?;
    let after = Traces::of(&up);
    up.kill()?;
    before.gone()?;
    after.gone()
}

fn sigterm_lets_uploads_finish() -> Outcome {
    let dir = tempfile::tempdir()?;
    let job = Job::new(dir.path(), "clean", 5, 1);
    job.write(dir.path())?;
    let mut up = Up::start(dir.path(), &Options { userspace: no_ebpf().is_some(), ..Options::default() })?;
    let token = until("a token", || join(up.gateway, "clean", 0, None).ok())?;
    let mut poll = Call::get("/v1/namespaces/default/jobs/clean/task?client=c0&wait=5s");
    poll.headers.push(("authorization", format!("Bearer {token}")));
    until("a task", || {
        let task = poll.to(up.gateway, Duration::from_secs(20)).ok()?;
        (task.json()["state"] == "train").then_some(())
    })?;
    let body = file(&values(0, 1), false);
    let headers = update_headers("clean", 0, 1, &token);
    let path = "/v1/namespaces/default/jobs/clean/events";
    let head = Call { method: "POST", path, headers, body: &body }.head();
    let mut stream = TcpStream::connect(up.gateway)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body[..body.len() / 2])?;
    let uploading = |up: &Up| {
        let chains = up.status()?["components"]["gateway"]["status"]["chains"].clone();
        (chains[0]["uploading"] == 1).then_some(())
    };
    until("the upload to be under way", || uploading(&up))?;
    up.terminate();
    up.wait_log(&["draining"])?;
    stream.write_all(&body[body.len() / 2..])?;
    let answer = read(&mut stream)?;
    ensure(answer.status == 202, || answer.text())?;
    let status = up.ended()?;
    ensure(status.success(), || format!("{status}"))
}
