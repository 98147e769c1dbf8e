//! A platform that nobody uses does nothing: with a client that waits for work in a long poll, no process takes time.

#[expect(dead_code, reason = "of the harness only a part is needed here")]
mod harness;

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use harness::{
    Outcome,
    client::join,
    ensure,
    http::Call,
    job::Job,
    no_ebpf, until,
    up::{Options, Up},
};
use libtest_mimic::{Arguments, Trial};

/// What is watched: longer than any heartbeat.
const WATCHED: Duration = Duration::from_secs(60);
/// Ticks of the processor that one process may take meanwhile.
const TICKS: u64 = 1;
/// Voluntary context switches of all processes together, a second.
const SWITCHES: u64 = 2;

/// What a process has used so far.
#[derive(Clone, Debug, Default)]
struct Used {
    name: String,
    ticks: u64,
    /// By thread.
    switches: BTreeMap<String, u64>,
}

fn main() {
    let mut arguments = Arguments::from_args();
    // The two would be each other's noise.
    arguments.test_threads.get_or_insert(1);
    let trials = [("ebpf", no_ebpf()), ("userspace", None)].map(|(path, ignored)| {
        let why = ignored.map(|why| format!(" ({why})")).unwrap_or_default();
        let idle = move || idle(path == "userspace");
        Trial::test(format!("{path}::nothing_runs{why}"), idle).with_ignored_flag(ignored.is_some())
    });
    libtest_mimic::run(&arguments, trials.into()).exit();
}

/// Processes of the platform: all whose session of parents leads to it.
fn used(supervisor: i32) -> BTreeMap<i32, Used> {
    let parent = |pid: i32| -> Option<i32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = |pid: &i32| {
        let mut at = Some(*pid);
        while let Some(now) = at.filter(|now| *now > 1) {
            if now == supervisor {
                return true;
            }
            at = parent(now);
        }
        false
    };
    pids.filter(ours).filter_map(|pid| Some((pid, usage(pid)?))).collect()
}

fn usage(pid: i32) -> Option<Used> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    let name = command.split('\0').nth(1).unwrap_or_default().to_owned();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let switches = tasks.filter_map(|task| {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()));
        let thread = format!("{} {}", task.file_name().to_string_lossy(), field("Name:")?);
        Some((thread, field("voluntary_ctxt_switches:")?.parse().ok()?))
    });
    Some(Used { name, ticks, switches: switches.collect() })
}

fn idle(userspace: bool) -> Outcome {
    let dir = tempfile::tempdir()?;
    // Two clients are wanted, one comes: the job waits, with its functions started.
    Job::new(dir.path(), "idle", 3, 2).write(dir.path())?;
    let mut up = Up::start(dir.path(), &Options { userspace, ..Options::default() })?;
    let token = until("a token", || join(up.gateway, "idle", 0, None).ok())?;
    let address = up.gateway;
    until("the functions", || up.process("top"))?;
    std::thread::spawn(move || {
        let mut poll = Call::get("/v1/namespaces/default/jobs/idle/task?client=c0&wait=60s");
        poll.headers.push(("authorization", format!("Bearer {token}")));
        let _until_the_platform_ends = poll.to(address, Duration::from_secs(120));
    });
    quiet(up.pid())?;
    let before = used(up.pid());
    let began = Instant::now();
    while began.elapsed() < WATCHED {
        std::thread::sleep(WATCHED.saturating_sub(began.elapsed()));
    }
    let after = used(up.pid());
    let mut switches = 0;
    let mut said = String::new();
    for (pid, now) in &after {
        let old = before.get(pid).ok_or_else(|| format!("{pid} {} was started meanwhile", now.name))?;
        let ticks = now.ticks - old.ticks;
        for (thread, count) in &now.switches {
            let more = count - old.switches.get(thread).copied().unwrap_or(0);
            switches += more;
            if more > 0 {
                said.push_str(&format!("{} {thread}: {more} switches\n", now.name));
            }
        }
        ensure(ticks <= TICKS, || format!("{pid} {}: {ticks} ticks in {WATCHED:?}\n{said}", now.name))?;
    }
    eprintln!("{} processes, {switches} voluntary context switches in {WATCHED:?}\n{said}", after.len());
    ensure(after.len() >= 5, || format!("{after:?}"))?;
    ensure(switches <= SWITCHES * WATCHED.as_secs(), || format!("{switches} switches in {WATCHED:?}\n{said}"))?;
    up.end()
}

/// Waits until the start is over: two looks a second apart that differ by little.
fn quiet(supervisor: i32) -> Outcome {
    let all = || used(supervisor).values().flat_map(|used| used.switches.values()).sum::<u64>();
    let mut last = all();
    until("the start to be over", || {
        std::thread::sleep(Duration::from_secs(1));
        let now = all();
        let calm = now.saturating_sub(last) <= SWITCHES;
        last = now;
        calm.then_some(())
    })
}
