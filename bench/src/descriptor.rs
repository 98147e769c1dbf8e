//! The hop of a descriptor: round trips of 64 bytes between two threads, over what moves descriptors here and over what else a
//! kernel has to offer.
//!
//! - `sk_msg_vs_eventfd`: over the eBPF path / over a pair of eventfds, both threads on one core. An eventfd is the cheapest way to
//!   wake somebody and carries nothing.
//! - `sk_msg_vs_tcp`: over the eBPF path / over the same sockets without it, same core.
//! - `prog_ns`: run time of the program per descriptor above that of an empty `sk_msg` program, by the kernel's own clock.
//!
//! The series tell the same for two cores, for the router in user space and for a Unix socket, and the processor time of each.
//! Round trips across cores are ruled by how long an idle core takes to wake.

use std::{
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path as FsPath,
};

use anyhow::{Context as _, ensure};
use lifl_ebpf::{
    Baseline, DESCRIPTOR_BYTES, Descriptor, Kind, Member, Path, PathKind, ProgramRuns, RouteKey, pair, role,
};
use rustix::{
    event::{EventfdFlags, eventfd},
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

use crate::{
    Args,
    measure::{Rounds, cost},
    report::{Report, median},
};

const CHAIN: u32 = 1;
const ROLES: [u32; 2] = [role::LEAF, role::TOP];
/// Round trips per turn: some tenths of a second.
const SAME_CORE: u64 = 40_000;
const TWO_CORES: u64 = 8_000;

/// Turns of the program and of the empty one within a round, and round trips of each.
const SLICES: usize = 31;
const SLICE: u64 = 1_000;

const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// One thing to go back and forth over.
struct Contestant {
    /// Series of microseconds per round trip, and of processor microseconds per round trip: same core, two cores.
    names: [[&'static str; 2]; 2],
    link: Link,
}

enum Link {
    /// Both ends of something that carries 64 bytes; with the path that counts them.
    Sockets([OwnedFd; 2], Option<Members>),
    /// One for each direction.
    Eventfds([OwnedFd; 2]),
}

/// Kept while the sockets are used.
struct Members {
    path: Path,
    _near: [OwnedFd; 2],
}

/// Where the two threads run.
#[derive(Clone, Copy)]
struct Cores {
    ping: usize,
    pong: usize,
}

/// Turns the kernel's run time statistics on; off again when dropped, if they were.
struct Stats {
    before: String,
}

/// Runs the bench.
pub(crate) fn run(args: &Args) -> anyhow::Result<Report> {
    let all = sched_getaffinity(None)?;
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)).take(2).collect();
    let [first, second] = cpus[..] else { anyhow::bail!("needs two cores") };
    let placements =
        [(Cores { ping: first, pong: first }, SAME_CORE, 0), (Cores { ping: first, pong: second }, TWO_CORES, 1)];
    let mut rounds = Rounds::default();
    let mut programs = Programs::new()?;
    for _ in 0..args.rounds {
        for (cores, trips, at) in placements {
            // A router's thread runs where the thread may that makes it.
            pin(cores.ping)?;
            if cores.ping != cores.pong {
                sched_setaffinity(None, &all)?;
            }
            for contestant in contestants()? {
                let [wall, cpu] = contestant.names[at];
                contestant.link.trips(cores, trips / 10)?;
                let (result, cost) = cost(|| contestant.link.trips(cores, trips))?;
                result.with_context(|| format!("{wall} failed"))?;
                contestant.link.check(trips + trips / 10).with_context(|| format!("{wall} is wrong"))?;
                let each = |seconds: f64| seconds * 1e6 / trips as f64;
                rounds.push(wall, each(cost.wall.as_secs_f64()));
                rounds.push(cpu, each(cost.cpu.as_secs_f64()));
            }
        }
        programs.round(Cores { ping: first, pong: first }, &mut rounds)?;
    }
    sched_setaffinity(None, &all)?;
    report(&rounds)
}

fn report(rounds: &Rounds) -> anyhow::Result<Report> {
    let mut report = Report::new("descriptor");
    report.note("cores", "two threads of one process, pinned; 'same': to one core, 'cross': to two");
    report.note("kernel", fs::read_to_string("/proc/sys/kernel/osrelease")?.trim());
    report.figure("sk_msg_vs_eventfd", "x", rounds.ratio("same_sk_msg_us", "same_eventfd_us")?);
    report.figure("sk_msg_vs_tcp", "x", rounds.ratio("same_sk_msg_us", "same_tcp_us")?);
    report.series("router_vs_tcp", "x", rounds.ratio("same_router_us", "same_tcp_us")?);
    let (program, empty) = (rounds.series("program_ns")?, rounds.series("empty_program_ns")?);
    report.figure("prog_ns", "ns", program.iter().zip(empty).map(|(program, empty)| program - empty).collect());
    for (name, series) in rounds.iter() {
        report.series(name, if name.ends_with("_ns") { "ns" } else { "us" }, series.to_vec());
    }
    Ok(report)
}

fn contestants() -> anyhow::Result<[Contestant; 5]> {
    let sk_msg = Path::load().context("no eBPF path here")?;
    let unix = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let event = || eventfd(0, EventfdFlags::CLOEXEC);
    Ok([
        Contestant {
            names: [["same_sk_msg_us", "same_sk_msg_cpu_us"], ["cross_sk_msg_us", "cross_sk_msg_cpu_us"]],
            link: Link::members(sk_msg)?,
        },
        Contestant {
            names: [["same_eventfd_us", "same_eventfd_cpu_us"], ["cross_eventfd_us", "cross_eventfd_cpu_us"]],
            link: Link::Eventfds([event()?, event()?]),
        },
        Contestant {
            names: [["same_tcp_us", "same_tcp_cpu_us"], ["cross_tcp_us", "cross_tcp_cpu_us"]],
            link: Link::Sockets(pair()?.into(), None),
        },
        Contestant {
            names: [["same_unix_us", "same_unix_cpu_us"], ["cross_unix_us", "cross_unix_cpu_us"]],
            link: Link::Sockets(unix.into(), None),
        },
        Contestant {
            names: [["same_router_us", "same_router_cpu_us"], ["cross_router_us", "cross_router_cpu_us"]],
            link: Link::members(Path::userspace()?)?,
        },
    ])
}

fn pin(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

// === impl Link ===

impl Link {
    fn members(path: Path) -> anyhow::Result<Self> {
        let [(a0, near0), (a1, near1)] = [pair()?, pair()?];
        for (at, (a, near)) in [(&a0, &near0), (&a1, &near1)].into_iter().enumerate() {
            let counter = u32::try_from(at)?;
            let member = Member { chain: CHAIN, role: ROLES[at], counter, reserved: 0 };
            path.register(Some(a.as_fd()), near.as_fd(), member)?;
            path.set_route(RouteKey { chain: CHAIN, dst: ROLES[at] }, counter)?;
        }
        Ok(Self::Sockets([a0, a1], Some(Members { path, _near: [near0, near1] })))
    }

    /// Goes back and forth between two threads.
    fn trips(&self, cores: Cores, trips: u64) -> anyhow::Result<()> {
        let ping = || -> anyhow::Result<()> {
            pin(cores.ping)?;
            match self {
                Self::Sockets([a, _], _) => ping_pong(a.as_fd(), 0, trips),
                Self::Eventfds([there, back]) => {
                    (0..trips).try_for_each(|_| Ok(signal(there).and_then(|()| await_signal(back))?))
                }
            }
        };
        let pong = || -> anyhow::Result<()> {
            pin(cores.pong)?;
            match self {
                Self::Sockets([_, b], _) => ping_pong(b.as_fd(), 1, trips),
                Self::Eventfds([there, back]) => {
                    (0..trips).try_for_each(|_| Ok(await_signal(there).and_then(|()| signal(back))?))
                }
            }
        };
        std::thread::scope(|scope| {
            let ping = scope.spawn(ping);
            let pong = scope.spawn(pong);
            let pong = pong.join().ok().context("the answering thread panicked")?;
            ping.join().ok().context("the asking thread panicked")?.and(pong)
        })
    }

    /// Whether each descriptor was seen, once and in each direction, by the path.
    fn check(&self, trips: u64) -> anyhow::Result<()> {
        let Self::Sockets(_, Some(Members { path, .. })) = self else { return Ok(()) };
        for index in [0, 1] {
            let counters = path.counters(index)?;
            ensure!(counters.messages == trips, "{} descriptors counted, {trips} sent", counters.messages);
            ensure!(counters.drops.iter().all(|drops| *drops == 0), "drops: {:?}", counters.drops);
        }
        Ok(())
    }
}

/// Side 0 begins, side 1 answers.
fn ping_pong(socket: BorrowedFd<'_>, side: usize, trips: u64) -> anyhow::Result<()> {
    let ours = Descriptor::new(Kind::Update, CHAIN, ROLES[1 - side]).to_bytes();
    let mut theirs = [0; DESCRIPTOR_BYTES];
    for _ in 0..trips {
        if side == 0 {
            send(socket, &ours, SendFlags::NOSIGNAL)?;
        }
        let (got, _) = recv(socket, &mut theirs[..], RecvFlags::empty())?;
        ensure!(got == DESCRIPTOR_BYTES, "{got} bytes came");
        if side == 1 {
            send(socket, &ours, SendFlags::NOSIGNAL)?;
        }
    }
    let dst = Descriptor::from_bytes(&theirs).dst;
    ensure!(dst == ROLES[side], "a descriptor for {dst} came to {}", ROLES[side]);
    Ok(())
}

fn signal(fd: &OwnedFd) -> io::Result<()> {
    rustix::io::write(fd, &1u64.to_ne_bytes())?;
    Ok(())
}

fn await_signal(fd: &OwnedFd) -> io::Result<()> {
    rustix::io::read(fd, &mut [0; 8])?;
    Ok(())
}

/// The program and an empty one, each under its own traffic.
struct Programs {
    path: Link,
    empty: Link,
    baseline: Baseline,
}

// === impl Programs ===

impl Programs {
    fn new() -> anyhow::Result<Self> {
        let path = Link::members(Path::load().context("no eBPF path here")?)?;
        let mut baseline = Baseline::load()?;
        let (a, b) = pair()?;
        baseline.insert(a.as_fd())?;
        baseline.insert(b.as_fd())?;
        Ok(Self { path, empty: Link::Sockets([a, b], None), baseline })
    }

    fn round(&mut self, cores: Cores, rounds: &mut Rounds) -> anyhow::Result<()> {
        let stats = Stats::enable()?;
        let Link::Sockets(_, Some(Members { path, .. })) = &self.path else { anyhow::bail!("no members") };
        ensure!(path.kind() == PathKind::Ebpf, "not the eBPF path");
        let (mut program, mut empty) = (Vec::new(), Vec::new());
        // Many short turns: what interrupts one of them does not reach the median.
        for _ in 0..SLICES {
            program.push(per_run(|| path.program_runs()?.context("no program"), || self.path.trips(cores, SLICE))?);
            empty.push(per_run(|| Ok(self.baseline.program_runs()?), || self.empty.trips(cores, SLICE))?);
        }
        drop(stats);
        rounds.push("program_ns", median(&program));
        rounds.push("empty_program_ns", median(&empty));
        Ok(())
    }
}

fn per_run(
    runs: impl Fn() -> anyhow::Result<ProgramRuns>,
    traffic: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let before = runs()?;
    traffic()?;
    let after = runs()?;
    let count = after.count - before.count;
    ensure!(count == 2 * SLICE, "the program ran {count} times for {} descriptors", 2 * SLICE);
    Ok((after.ns - before.ns) as f64 / count as f64)
}

// === impl Stats ===

impl Stats {
    fn enable() -> anyhow::Result<Self> {
        let before = fs::read_to_string(STATS).context("this kernel counts no program run times")?;
        fs::write(STATS, "1").with_context(|| format!("cannot write {}", FsPath::new(STATS).display()))?;
        Ok(Self { before })
    }
}

impl Drop for Stats {
    fn drop(&mut self) {
        if let Err(error) = fs::write(STATS, self.before.trim()) {
            eprintln!("cannot restore {STATS}: {error}");
        }
    }
}
