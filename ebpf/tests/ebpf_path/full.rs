//! Receivers that take no more.

use std::process::Command;

use lifl_ebpf::{PathKind, role, wire::SendCause};

use crate::world::{Outcome, World, numbered, numbers, same};

/// Makes it the one that [`a_receiver_without_memory_fails_the_sender`] watches.
pub(crate) const FILL: &str = "--fill-within";
/// Where cgroup v1 limits the memory of sockets apart from other memory.
pub(crate) const TCP_LIMITS: &str = "/sys/fs/cgroup/memory";

pub(crate) fn a_full_receiver_loses_nothing_silently(kind: PathKind) -> Outcome {
    // The kernel's path is bounded by memory only: see the test of that.
    let bound = if kind == PathKind::Ebpf { 50_000 } else { 1_000_000 };
    let full = fill(kind, bound)?;
    match kind {
        PathKind::Ebpf => same(full.is_none(), true, "takes all"),
        PathKind::Userspace => same(matches!(full, Some(SendCause::WouldBlock)), true, "holds back"),
    }
}

/// Sends to a receiver that does not read until it takes no more or `bound` is reached; then it reads, and traffic goes on.
pub(crate) fn fill(kind: PathKind, bound: u64) -> Outcome<Option<SendCause>> {
    let world = World::new(kind, &[role::LEAF, role::TOP])?;
    let socket = &world.ends[0].socket;
    rustix::io::ioctl_fionbio(socket, true)?;
    let batch = |at: u64| (at..at + 32).map(|i| numbered(role::TOP, i)).collect::<Vec<_>>();
    let mut sent = 0;
    let mut full = None;
    while full.is_none() && sent < bound {
        let result = socket.send_all(&batch(sent));
        sent += result.as_ref().map_or_else(|e| e.delivered as u64, |()| 32);
        full = result.err().map(|e| e.cause);
    }
    let mut got = Vec::new();
    while (got.len() as u64) < sent {
        world.ends[1].socket.recv_into(&mut got)?;
    }
    same(numbers(&got) == (0..sent).collect::<Vec<_>>(), true, "each once, in order")?;
    rustix::io::ioctl_fionbio(socket, false)?;
    world.send(0, &batch(sent))?;
    same(numbers(&world.receive(1, 32)?), (sent..sent + 32).collect(), "goes on")?;
    Ok(full)
}

/// A process whose sockets may hold 1 MiB (cgroup v1's own limit for TCP) fills a receiver.
pub(crate) fn a_receiver_without_memory_fails_the_sender() -> Outcome {
    let group = std::path::PathBuf::from(format!("{TCP_LIMITS}/lifl-test-{}", std::process::id()));
    std::fs::create_dir(&group)?;
    std::fs::write(group.join("memory.kmem.tcp.limit_in_bytes"), "1048576")?;
    let status = Command::new(std::env::current_exe()?).args([FILL, group.to_str().ok_or("path")?]).status();
    std::fs::remove_dir(&group)?;
    same(status?.success(), true, "the process that fills")
}

pub(crate) fn fill_within(group: &str) -> Outcome {
    std::fs::write(format!("{group}/cgroup.procs"), std::process::id().to_string())?;
    let full = fill(PathKind::Ebpf, 1_000_000)?;
    same(matches!(full, Some(SendCause::Full)), true, "no memory")
}
