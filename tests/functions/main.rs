//! A thousand functions that nobody calls: no processor time, and little memory.
//!
//! Each is a network namespace with the listeners that its pod would have of queue-proxy, opened by the agent and served by the
//! gateway, as on a node of Kubernetes.

use std::{
    collections::BTreeMap,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use libtest_mimic::{Arguments, Failed, Trial};

mod cluster;
mod namespaces;
mod world;

use world::{Processes, Used, World, used};

const FUNCTIONS: usize = 1000;
/// What is watched.
const WATCHED: Duration = Duration::from_secs(60);
/// Ticks of the processor that one process may take meanwhile.
const TICKS: u64 = 1;
/// Of each function, over all processes.
const KIB: u64 = 64;
/// Until all are served; reaching it is a failure, no measure of speed.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    if let Some(ended) = world::component() {
        return ended;
    }
    let why_not = namespaces::why_not();
    let why = why_not.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
    let trial = Trial::test(format!("a_thousand_idle_functions{why}"), || {
        idle().map_err(|error| Failed::from(format!("{error:#}")))
    });
    let trial = trial.with_ignored_flag(why_not.is_some());
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}

fn idle() -> Result<()> {
    let none = {
        // Gone before the other one comes: what two platforms share would count half.
        let (_empty, processes) = calm(0)?;
        memory(&used(&processes)?)
    };
    let (world, processes) = calm(FUNCTIONS)?;
    let before = used(&processes)?;
    let began = Instant::now();
    while began.elapsed() < WATCHED {
        std::thread::sleep(WATCHED.saturating_sub(began.elapsed()));
    }
    let after = used(&processes)?;
    ensure!(processes == world.processes()?, "a process was started anew");
    ensure!(world.served() == FUNCTIONS, "{} functions are served", world.served());
    let each = memory(&after).saturating_sub(none) / FUNCTIONS as u64;
    let took = |pid: &u32| after[pid].ticks - before[pid].ticks;
    let told = |(pid, name): (&u32, &String)| format!("{name}: {} ticks, {} KiB", took(pid), after[pid].pss);
    let told: Vec<String> = processes.iter().map(told).collect();
    eprintln!("{FUNCTIONS} functions, {WATCHED:?}: {each} KiB each, {none} KiB without; {}", told.join("; "));
    ensure!(after.keys().all(|pid| took(pid) <= TICKS), "more than {TICKS} ticks in {WATCHED:?}: {told:?}");
    ensure!(each <= KIB, "{each} KiB each, {none} KiB without functions: {told:?}");
    Ok(())
}

/// A node whose functions are all served, have all been probed, and whose processes have come to rest.
fn calm(count: usize) -> Result<(World, Processes)> {
    let began = Instant::now();
    let world = World::start(count)?;
    let deadline = Instant::now() + PATIENCE;
    eprintln!("{count} functions: up after {:?}", began.elapsed());
    let in_time = || -> Result<()> {
        ensure!(Instant::now() < deadline, "{} of {count} functions are served, or no rest", world.served());
        Ok(())
    };
    while world.served() != count {
        in_time()?;
        std::thread::sleep(Duration::from_millis(200));
    }
    world.probe()?;
    let processes = world.processes()?;
    eprintln!("{count} functions: served and probed after {:?}", began.elapsed());
    let ticks = || anyhow::Ok(used(&processes)?.into_iter().map(|(pid, used)| (pid, used.ticks)).collect::<Vec<_>>());
    let mut last = ticks()?;
    loop {
        std::thread::sleep(Duration::from_secs(3));
        let now = ticks()?;
        if now == last {
            return Ok((world, processes));
        }
        ensure!(Instant::now() < deadline, "no rest: {last:?} {now:?} of {processes:?}");
        last = now;
    }
}

fn memory(used: &BTreeMap<u32, Used>) -> u64 {
    used.values().map(|used| used.pss).sum()
}
