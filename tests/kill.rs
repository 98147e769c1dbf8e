//! Whatever dies, and whenever: no update that was acknowledged is lost, none counts twice, and the job ends.
//!
//! One run is one small job with one death, or a few. Every transition of a round has a place where its process can be told to
//! die (`--failpoint`); besides them come deaths at arbitrary moments, of each component, drawn from a seed. After each run
//! the checkpoint folder is held against what the clients noted ([`harness::oracle`]).

mod harness;

use std::time::Duration;

use harness::{
    Outcome,
    client::Clients,
    ensure,
    job::Job,
    no_ebpf, oracle,
    up::{Options, Up, kill},
};
use libtest_mimic::{Arguments, Trial};

const ROUNDS: u32 = 3;
const CLIENTS: u32 = 6;

/// Places to die at: component or role, name, which passing.
const POINTS: &[(&str, &str, u32)] = &[
    ("agent", "agent.path_kept", 1),
    ("agent", "agent.registered", 1),
    ("agent", "agent.registered", 4),
    ("agent", "agent.started", 3),
    ("agent", "agent.settled", 1),
    ("agent", "agent.settled", 5),
    ("agent", "agent.granted", 1),
    ("agent", "agent.granted", 4),
    ("agent", "agent.checked", 1),
    ("agent", "agent.checked", 3),
    ("agent", "agent.shared", 1),
    ("agent", "agent.shared", 4),
    ("agent", "agent.folded", 2),
    ("gateway", "gateway.opened", 1),
    ("gateway", "gateway.opened", 2),
    ("gateway", "gateway.peeked", 1),
    ("gateway", "gateway.peeked", 7),
    ("gateway", "gateway.sealed", 2),
    ("gateway", "gateway.admitted", 1),
    ("gateway", "gateway.admitted", 6),
    ("gateway", "gateway.sent", 3),
    ("gateway", "gateway.sent", 6),
    ("gateway", "gateway.contained", 1),
    ("gateway", "gateway.contained", 6),
    ("gateway", "gateway.closed", 1),
    ("gateway", "gateway.committing", 1),
    ("gateway", "gateway.committed", 2),
    ("coordinator", "coordinator.round_done", 1),
    ("coordinator", "coordinator.checkpoint_written", 2),
    ("leaf", "function.received", 1),
    ("leaf", "function.received", 2),
    ("leaf", "function.folded", 1),
    ("leaf", "function.folded", 3),
    ("leaf", "function.sealed", 1),
    ("leaf", "function.sealed", 2),
    ("leaf", "function.sent", 1),
    ("middle", "function.received", 2),
    ("middle", "function.folded", 1),
    ("middle", "function.sealed", 1),
    ("middle", "function.sent", 1),
    ("top", "function.received", 1),
    ("top", "function.folded", 1),
    ("top", "function.sealed", 1),
    ("top", "function.divided", 1),
    ("top", "function.sent", 1),
];

/// Deaths within one run.
const PAIRS: &[&[&str]] = &[
    &["leaf:function.folded:1", "agent:agent.buried:1"],
    &["leaf:function.sealed:1", "agent:agent.replaced:1"],
    &["leaf:function.sealed:1", "agent:agent.checked:4"],
    &["middle:function.received:1", "agent:agent.ended:1"],
    &["middle:function.folded:1", "gateway:gateway.peeked:3"],
    &["top:function.divided:1", "gateway:gateway.closed:1"],
    &["top:function.sent:1", "gateway:gateway.committing:1", "coordinator:coordinator.round_done:1"],
    &[
        "leaf:function.received:2",
        "agent:agent.shared:5",
        "gateway:gateway.sent:4",
        "coordinator:coordinator.round_done:1",
    ],
    &["gateway:gateway.admitted:6", "coordinator:coordinator.checkpoint_written:1", "agent:agent.granted:3"],
];

/// Who dies at arbitrary moments.
const VICTIMS: [&str; 6] = ["agent", "gateway", "coordinator", "leaf", "middle", "top"];
const SEEDS: u64 = 5;

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(2);
    let mut trials = Vec::new();
    for userspace in [false, true] {
        let path = if userspace { "userspace" } else { "ebpf" };
        let ignored = if userspace { None } else { no_ebpf() };
        let mut add = |name: String, run: Box<dyn FnOnce() -> Outcome + Send>| {
            let why = ignored.map(|why| format!(" ({why})")).unwrap_or_default();
            trials.push(Trial::test(format!("{path}::{name}{why}"), run).with_ignored_flag(ignored.is_some()));
        };
        for (component, name, n) in POINTS {
            let points = vec![format!("{component}:{name}:{n}")];
            add(points[0].clone(), Box::new(move || dies_at(points, userspace)));
        }
        for pair in PAIRS {
            let points: Vec<String> = pair.iter().map(|point| (*point).to_owned()).collect();
            add(points.join("+"), Box::new(move || dies_at(points, userspace)));
        }
        for seed in 0..SEEDS {
            add(format!("any_moment::{seed}"), Box::new(move || dies_at_any_moment(seed, userspace)));
        }
        add("lifl_itself".to_owned(), Box::new(move || lifl_dies(userspace)));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

/// Runs a job in which the processes die at the points.
fn dies_at(points: Vec<String>, userspace: bool) -> Outcome {
    let dir = tempfile::tempdir()?;
    let job = Job::new(dir.path(), "kill", ROUNDS, CLIENTS);
    job.write(dir.path())?;
    let mut up = Up::start(dir.path(), &Options { userspace, failpoints: points.clone(), ..Options::default() })?;
    let result = finish(&up, &job, Clients::start(up.gateway, &job), false);
    with_log(result, &up)?;
    for point in points {
        let component = point.split(':').next().unwrap_or_default();
        let component = format!("component=\"{component}\"");
        match point.contains("function.") {
            true => up.wait_log(&["function died"])?,
            false => up.wait_log(&["starting it again", &component])?,
        };
    }
    up.end()
}

/// Waits for the job's end and checks it.
fn finish(up: &Up, job: &Job, clients: Clients, lost: bool) -> Outcome {
    let book = clients.done()?;
    harness::until("the phase Succeeded", || (up.job(&job.name)?["phase"] == "Succeeded").then_some(()))?;
    oracle::check(job, &book, lost)
}

fn with_log(result: Outcome, up: &Up) -> Outcome {
    result.map_err(|failed| format!("{}\n{}", failed.message().unwrap_or_default(), up.log()).into())
}

/// Kills one after another, after pauses, all drawn from the seed.
fn dies_at_any_moment(seed: u64, userspace: bool) -> Outcome {
    let dir = tempfile::tempdir()?;
    let job = Job::new(dir.path(), "kill", 12, CLIENTS);
    job.write(dir.path())?;
    let mut up = Up::start(dir.path(), &Options { userspace, ..Options::default() })?;
    let clients = Clients::start(up.gateway, &job);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut victims = VICTIMS;
    random.shuffle(&mut victims);
    let mut deaths = 0;
    for victim in victims {
        // Where in a round the death falls is what the seed varies; nothing is waited for.
        std::thread::sleep(Duration::from_millis(random.u64(1..150)));
        if let Some(pid) = up.process(victim) {
            kill(pid);
            deaths += 1;
        }
    }
    let result = finish(&up, &job, clients, false);
    with_log(result, &up)?;
    ensure(deaths > 2, || format!("only {deaths} deaths"))?;
    up.end()
}

/// `kill -9` on the supervisor and all with it; its successor goes on from the checkpoint.
fn lifl_dies(userspace: bool) -> Outcome {
    let dir = tempfile::tempdir()?;
    let job = Job::new(dir.path(), "kill", 6, CLIENTS);
    job.write(dir.path())?;
    let mut options = Options { userspace, ..Options::default() };
    let mut up = Up::start(dir.path(), &options)?;
    options.addresses = Some((up.gateway, up.admin));
    let clients = Clients::start(up.gateway, &job);
    for round in [1, 3] {
        let committed = job.checkpoint.join(format!("rounds/{round:06}/commit.json"));
        harness::until("a committed round", || committed.exists().then_some(()))?;
        up.kill()?;
        // Its children get their signal as it ends; the gateway's listener goes with the last of them.
        for address in [up.gateway, up.admin] {
            harness::until("a free port", || std::net::TcpListener::bind(address).ok())?;
        }
        up = Up::start(dir.path(), &options)?;
        ensure(committed.exists(), || format!("round {round} is gone"))?;
    }
    let result = finish(&up, &job, clients, true);
    with_log(result, &up)?;
    up.end()
}
