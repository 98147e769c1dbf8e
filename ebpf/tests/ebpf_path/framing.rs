//! Descriptors and the borders of writes.

use std::io;

use lifl_ebpf::{DropReason, PathKind, role, wire::DescriptorSocket};
use rustix::net::{SendFlags, send};

use crate::world::{Outcome, World, bytes, eventually, numbered, numbers, same};

pub(crate) fn coalesced_writes_are_taken_apart(kind: PathKind) -> Outcome {
    let world = World::new(kind, &[role::LEAF, role::MIDDLE, role::TOP])?;
    // One write for two receivers, as large as a socket takes at once.
    let all: Vec<_> = (0..600).map(|i| numbered(if i % 3 == 0 { role::TOP } else { role::MIDDLE }, i)).collect();
    let all_bytes = bytes(&all);
    let mut at = 0;
    while at < all_bytes.len() {
        at += send(&world.ends[0].socket, &all_bytes[at..], SendFlags::NOSIGNAL)?;
    }
    same(numbers(&world.receive(1, 400)?), (0..600).filter(|i| i % 3 != 0).collect(), "middle")?;
    same(numbers(&world.receive(2, 200)?), (0..600).filter(|i| i % 3 == 0).collect(), "top")?;
    let counters = world.counters(0)?;
    same((counters.messages, counters.bytes, counters.drops), (600, 60_000, [0; DropReason::COUNT]), "counters")?;
    if counters.first_ns == 0 || counters.first_ns > counters.last_ns {
        return Err(format!("first {} last {}", counters.first_ns, counters.last_ns).into());
    }
    Ok(())
}

pub(crate) fn a_byte_at_a_time_is_put_together(kind: PathKind) -> Outcome {
    let world = World::new(kind, &[role::LEAF, role::TOP])?;
    for byte in bytes(&(0..20).map(|i| numbered(role::TOP, i)).collect::<Vec<_>>()) {
        same(send(&world.ends[0].socket, &[byte], SendFlags::NOSIGNAL)?, 1, "bytes taken")?;
    }
    // Whole ones after pieces, too.
    world.send(0, &(20..60).map(|i| numbered(role::TOP, i)).collect::<Vec<_>>())?;
    same(numbers(&world.receive(1, 60)?), (0..60).collect(), "received")?;
    same(world.counters(0)?.messages, 60, "counted")
}

pub(crate) fn peeked_descriptors_stay_until_consumed(kind: PathKind) -> Outcome {
    let world = World::new(kind, &[role::LEAF, role::TOP])?;
    world.send(0, &(0..10).map(|i| numbered(role::TOP, i)).collect::<Vec<_>>())?;
    world.settled(0, 10)?;
    let socket = &world.ends[1].socket;
    let mut seen = Vec::new();
    eventually(|| {
        seen.clear();
        Ok(socket.peek(&mut seen)? == 10)
    })?;
    socket.consume(4)?;
    // A process that held the socket before is dead: its successor sees what was not consumed.
    let successor = DescriptorSocket::new(rustix::io::dup(socket)?);
    let mut seen = Vec::new();
    same(successor.peek(&mut seen)?, 6, "left")?;
    same(numbers(&seen), (4..10).collect(), "which")?;
    successor.consume(6)?;
    rustix::io::ioctl_fionbio(&successor, true)?;
    let none = successor.peek(&mut seen).map_err(|e| e.kind());
    same(none, Err(io::ErrorKind::WouldBlock), "empty")
}

pub(crate) fn overshoot_is_refused_for_good() -> Outcome {
    let world = World::new(PathKind::Ebpf, &[role::LEAF, role::TOP])?;
    let two = bytes(&[numbered(role::TOP, 0), numbered(role::TOP, 1)]);
    let socket = &world.ends[0].socket;
    // The tail of a write is cut off, and may come alone.
    same(send(socket, &two[..100], SendFlags::NOSIGNAL)?, 64, "whole ones only")?;
    same(send(socket, &two[64..100], SendFlags::NOSIGNAL)?, 36, "a part")?;
    same(send(socket, &two[100..], SendFlags::NOSIGNAL)?, 28, "its rest")?;
    same(numbers(&world.receive(1, 2)?), vec![0, 1], "received")?;
    // A part whose rest comes with more: nothing is delivered, now and later, and it is said each time.
    same(send(socket, &two[..36], SendFlags::NOSIGNAL)?, 36, "a part")?;
    same(send(socket, &two[36..], SendFlags::NOSIGNAL), Err(rustix::io::Errno::ACCESS), "too much")?;
    same(world.counters(0)?.drops[DropReason::Framing as usize], 1, "counted")?;
    same(send(socket, &two, SendFlags::NOSIGNAL), Err(rustix::io::Errno::ACCESS), "ever after")?;
    same(world.is_empty(1)?, true, "nothing came")
}
