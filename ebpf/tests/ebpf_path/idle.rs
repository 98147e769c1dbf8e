//! Processor time that nobody uses.

use std::{process::Command, time::Duration};

use lifl_ebpf::{PathKind, role};
use rustix::net::{SendFlags, send};

use crate::world::{Outcome, World, bytes, numbered, numbers, same};

/// Makes it the one that [`nothing_runs_while_nothing_is_sent`] watches.
pub(crate) const IDLE: &str = "--idle";

/// In a process of its own, where no other test's threads run.
pub(crate) fn nothing_runs_while_nothing_is_sent(kind: PathKind) -> Outcome {
    let kind = if kind == PathKind::Ebpf { "ebpf" } else { "userspace" };
    let status = Command::new(std::env::current_exe()?).args([IDLE, kind]).status()?;
    same(status.success(), true, "the idle process")
}

pub(crate) fn idle(kind: PathKind) -> Outcome {
    let world = World::new(kind, &[role::LEAF, role::TOP])?;
    world.send(0, &[numbered(role::TOP, 0)])?;
    world.receive(1, 1)?;
    // Half a descriptor is idle, too.
    let one = bytes(&[numbered(role::TOP, 1)]);
    send(&world.ends[0].socket, &one[..30], SendFlags::NOSIGNAL)?;
    let before = others_turns()?;
    std::thread::sleep(Duration::from_millis(300));
    let turns = others_turns()? - before;
    same(turns <= 2, true, &format!("{turns} turns of other threads while idle"))?;
    send(&world.ends[0].socket, &one[30..], SendFlags::NOSIGNAL)?;
    same(numbers(&world.receive(1, 1)?), vec![1], "then it is put together")
}

/// How often threads of this process other than this one went to sleep.
fn others_turns() -> Outcome<u64> {
    let this = rustix::thread::gettid().as_raw_nonzero().to_string();
    let mut turns = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?;
        if task.file_name().to_str() != Some(&this) {
            let status = std::fs::read_to_string(task.path().join("status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            turns += line.ok_or("no count of switches")?.trim().parse::<u64>()?;
        }
    }
    Ok(turns)
}
