//! What outlives the owner of the path, and what does not.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    process::{Command, Stdio},
};

use lifl_ebpf::{Member, Path, PathError, PathKind, RouteKey, role};

use crate::{
    membership::mixed,
    world::{CHAIN, End, Outcome, World, eventually, numbered, numbers, same},
};

/// Makes this binary the process that [`nothing_is_left_behind`] kills.
pub(crate) const CHILD: &str = "--load-and-wait";

pub(crate) fn the_path_survives_its_owner(kind: PathKind) -> Outcome {
    let mut world = World::new(kind, &[role::LEAF, role::TOP])?;
    world.send(0, &[numbered(role::TOP, 0)])?;
    world.settled(0, 1)?;
    let store: Vec<(String, OwnedFd)> = world.path.fds()?.into_iter().map(|(name, fd)| (name.to_owned(), fd)).collect();
    // The owner dies; the members go on sending.
    let empty = Path::userspace()?;
    drop(std::mem::replace(&mut world.path, empty));
    world.send(0, &[numbered(role::TOP, 1)])?;
    world.path = if kind == PathKind::Ebpf { Path::adopt(store)? } else { Path::userspace()? };
    same(world.path.kind(), kind, "kind")?;
    // The first member's descriptor waits already, and has no route before the second is told.
    world.path.hold(true)?;
    for End { near, member, .. } in &world.ends {
        world.path.register(None, near.as_fd(), *member)?;
        world.path.set_route(RouteKey { chain: CHAIN, dst: member.role }, member.counter)?;
    }
    world.path.hold(false)?;
    world.send(0, &[numbered(role::TOP, 2)])?;
    same(numbers(&world.receive(1, 3)?), vec![0, 1, 2], "received")?;
    if kind == PathKind::Ebpf {
        same(world.counters(0)?.messages, 3, "the kernel's counters go on")?;
        world.path.replace_program()?;
        world.send_on(0, &mixed())?;
        same(world.receive(1, 5)?.len(), 5, "with a new program")?;
        let other = Member { role: role::MIDDLE, ..world.ends[0].member };
        let other = world.path.register(None, world.ends[0].near.as_fd(), other);
        same(matches!(other, Err(PathError::NoSeat(0))), true, "another's seat")?;
    }
    let middle = world.join(CHAIN, role::MIDDLE)?;
    world.send(middle, &[numbered(role::TOP, 3)])?;
    same(world.receive(1, 1)?[0].src, role::MIDDLE, "a new member")
}

/// Loads a path in a process of its own, which is then killed: its maps are gone as soon as the store has them no more.
pub(crate) fn nothing_is_left_behind() -> Outcome {
    let mut child =
        Command::new(std::env::current_exe()?).arg(CHILD).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    let stdout = child.stdout.take().ok_or("no stdout")?;
    BufReader::new(stdout).read_line(&mut line)?;
    let id: u32 = line.trim().parse()?;
    let exists = || aya::maps::MapData::from_id(id).is_ok();
    let was_there = exists();
    child.kill()?;
    child.wait()?;
    same(was_there, true, "there while it is used")?;
    eventually(|| Ok(!exists()))
}

pub(crate) fn child() -> Outcome {
    let world = World::new(PathKind::Ebpf, &[role::LEAF, role::TOP])?;
    world.send(0, &[numbered(role::TOP, 0)])?;
    let fds = world.path.fds()?;
    let (_, sockets) = fds.iter().find(|(name, _)| *name == "bpf-sockets").ok_or("no map of sockets")?;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", sockets.as_raw_fd()))?;
    let id = info.lines().find_map(|l| l.strip_prefix("map_id:")).ok_or("no id")?;
    writeln!(io::stdout(), "{}", id.trim())?;
    io::stdin().read_line(&mut String::new())?;
    Ok(())
}
