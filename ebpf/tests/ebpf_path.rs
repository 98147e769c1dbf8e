//! Both descriptor paths under the same traffic: in the kernel where it is allowed, in user space everywhere.

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, BufReader, Write as _},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::{Command, Stdio},
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Failed, Trial};
use lifl_ebpf::{
    ANY_CHAIN, Counters, Descriptor, DropReason, Kind, Member, Path, PathError, PathKind, RouteKey, STRANGERS, pair,
    role,
    wire::{DescriptorSocket, SendCause},
};
use rustix::net::{SendFlags, send, sockopt};

type Outcome<T = ()> = Result<T, Failed>;
type Case = fn(PathKind) -> Outcome;

/// What a test waits for at most; reaching it is a failure.
const PATIENCE: Duration = Duration::from_secs(30);
const CHAIN: u32 = 7;
/// Makes this binary the process that [`nothing_is_left_behind`] kills.
const CHILD: &str = "--load-and-wait";
/// Makes it the one that [`a_receiver_without_memory_fails_the_sender`] watches.
const FILL: &str = "--fill-within";
/// Makes it the one that [`nothing_runs_while_nothing_is_sent`] watches.
const IDLE: &str = "--idle";
/// Where cgroup v1 limits the memory of sockets apart from other memory.
const TCP_LIMITS: &str = "/sys/fs/cgroup/memory";

const CASES: [(&str, Case); 17] = [
    ("coalesced_writes_are_taken_apart", coalesced_writes_are_taken_apart),
    ("a_byte_at_a_time_is_put_together", a_byte_at_a_time_is_put_together),
    ("the_sender_is_stamped_over_a_lie", the_sender_is_stamped_over_a_lie),
    ("what_may_not_pass_is_counted_and_the_rest_passes", what_may_not_pass_is_counted_and_the_rest_passes),
    ("a_member_of_every_chain_is_reached_from_each", a_member_of_every_chain_is_reached_from_each),
    ("an_unregistered_member_is_a_stranger", an_unregistered_member_is_a_stranger),
    ("a_seat_taken_again_is_not_the_old_members", a_seat_taken_again_is_not_the_old_members),
    ("seats_and_routes_are_checked", seats_and_routes_are_checked),
    ("peeked_descriptors_stay_until_consumed", peeked_descriptors_stay_until_consumed),
    ("a_closed_receiver_is_no_route", a_closed_receiver_is_no_route),
    ("two_senders_keep_their_order_and_causes_come_first", two_senders_keep_their_order_and_causes_come_first),
    ("a_route_moves_while_traffic_flows", a_route_moves_while_traffic_flows),
    ("a_program_is_replaced_while_traffic_flows", a_program_is_replaced_while_traffic_flows),
    ("a_full_receiver_loses_nothing_silently", a_full_receiver_loses_nothing_silently),
    ("a_dead_member_is_drained_first", a_dead_member_is_drained_first),
    ("the_path_survives_its_owner", the_path_survives_its_owner),
    ("nothing_runs_while_nothing_is_sent", nothing_runs_while_nothing_is_sent),
];

fn main() {
    let words: Vec<String> = std::env::args().collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, CHILD] => return child().expect("child"),
        [_, FILL, group] => return fill_within(group).expect("fill"),
        [_, IDLE, "ebpf"] => return idle(PathKind::Ebpf).expect("idle"),
        [_, IDLE, _] => return idle(PathKind::Userspace).expect("idle"),
        _ => {}
    }
    let args = Arguments::from_args();
    let refusal = Path::load().err().map(|e| e.to_string());
    if let Some(reason) = &refusal {
        eprintln!("the path in the kernel is not tested here: {reason}");
    }
    let mut trials = Vec::new();
    for (name, case) in CASES {
        let ebpf = Trial::test(format!("ebpf::{name}"), move || case(PathKind::Ebpf));
        trials.push(ebpf.with_ignored_flag(refusal.is_some()));
        trials.push(Trial::test(format!("userspace::{name}"), move || case(PathKind::Userspace)));
    }
    for (name, case) in [
        ("both::same_traffic_same_results", same_traffic_same_results as fn() -> Outcome),
        ("ebpf::a_split_write_that_goes_beyond_its_end_is_refused_for_good", overshoot_is_refused_for_good),
        ("ebpf::nothing_is_left_behind", nothing_is_left_behind),
    ] {
        trials.push(Trial::test(name, case).with_ignored_flag(refusal.is_some()));
    }
    let no_limits = !std::path::Path::new(TCP_LIMITS).join("memory.kmem.tcp.limit_in_bytes").exists();
    if no_limits {
        eprintln!("no limit for a receiver's memory is tested here: cgroup v1 has none at {TCP_LIMITS}");
    }
    let limited =
        Trial::test("ebpf::a_receiver_without_memory_fails_the_sender", a_receiver_without_memory_fails_the_sender);
    trials.push(limited.with_ignored_flag(refusal.is_some() || no_limits));
    libtest_mimic::run(&args, trials).exit();
}

// === the world of a test ===

struct World {
    path: Path,
    ends: Vec<End>,
}

struct End {
    socket: DescriptorSocket,
    near: OwnedFd,
    member: Member,
}

impl World {
    /// Members in one chain by their roles, each with a route; indices are positions.
    fn new(kind: PathKind, roles: &[u32]) -> Outcome<Self> {
        let path = if kind == PathKind::Ebpf { Path::load()? } else { Path::userspace()? };
        let mut world = Self { path, ends: Vec::new() };
        for role in roles {
            world.join(CHAIN, *role)?;
        }
        Ok(world)
    }

    fn join(&mut self, chain: u32, role: u32) -> Outcome<usize> {
        let (a, near) = pair()?;
        sockopt::set_socket_timeout(&a, sockopt::Timeout::Recv, Some(PATIENCE))?;
        sockopt::set_socket_timeout(&a, sockopt::Timeout::Send, Some(PATIENCE))?;
        let index = self.ends.len();
        let member = Member { chain, role, counter: u32::try_from(index)?, reserved: 0 };
        self.path.register(Some(a.as_fd()), near.as_fd(), member)?;
        if chain != ANY_CHAIN {
            self.path.set_route(RouteKey { chain, dst: role }, member.counter)?;
        }
        self.ends.push(End { socket: DescriptorSocket::new(a), near, member });
        Ok(index)
    }

    fn send(&self, from: usize, descriptors: &[Descriptor]) -> Outcome {
        Ok(self.ends[from].socket.send_all(descriptors)?)
    }

    /// Sends and goes on after each refusal; how many were refused to the sender's face.
    fn send_on(&self, from: usize, mut descriptors: &[Descriptor]) -> Outcome<usize> {
        let mut refused = 0;
        while let Err(e) = self.ends[from].socket.send_all(descriptors) {
            if !matches!(e.cause, SendCause::Refused) {
                return Err(e.into());
            }
            refused += 1;
            descriptors = &descriptors[e.delivered + 1..];
        }
        Ok(refused)
    }

    fn receive(&self, at: usize, n: usize) -> Outcome<Vec<Descriptor>> {
        let mut got = Vec::new();
        while got.len() < n {
            if self.ends[at].socket.recv_into(&mut got)? == 0 {
                return Err(format!("end of stream after {} of {n}", got.len()).into());
            }
        }
        if got.len() > n { Err(format!("{} instead of {n}", got.len()).into()) } else { Ok(got) }
    }

    fn is_empty(&self, at: usize) -> Outcome<bool> {
        let mut byte = [0];
        match rustix::net::recv(
            &self.ends[at].socket,
            &mut byte,
            rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT,
        ) {
            Err(rustix::io::Errno::AGAIN) => Ok(true),
            Ok((n, _)) => Ok(n == 0),
            Err(e) => Err(e.into()),
        }
    }

    fn counters(&self, of: usize) -> Outcome<Counters> {
        Ok(self.path.counters(u32::try_from(of)?)?)
    }

    /// Waits until a member's counters have seen `n` descriptors, passed and refused.
    fn settled(&self, index: u32, n: u64) -> Outcome<Counters> {
        let mut counters = Counters::default();
        eventually(|| {
            counters = self.path.counters(index)?;
            Ok(counters.messages + counters.drops.iter().sum::<u64>() >= n)
        })?;
        Ok(counters)
    }
}

fn eventually(mut met: impl FnMut() -> Outcome<bool>) -> Outcome {
    let start = Instant::now();
    while !met()? {
        if start.elapsed() > PATIENCE {
            return Err("did not come about".into());
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// The `i`-th descriptor of a test, for `dst`; `src` is a lie.
fn numbered(dst: u32, i: u64) -> Descriptor {
    Descriptor { src: 4242, generation: i, length: 100, ..Descriptor::new(Kind::Update, CHAIN, dst) }
}

fn numbers(descriptors: &[Descriptor]) -> Vec<u64> {
    descriptors.iter().map(|d| d.generation).collect()
}

fn bytes(descriptors: &[Descriptor]) -> Vec<u8> {
    descriptors.iter().flat_map(Descriptor::to_bytes).collect()
}

fn same<T: PartialEq + std::fmt::Debug>(got: T, want: T, what: &str) -> Outcome {
    if got == want { Ok(()) } else { Err(format!("{what}: got {got:?}, want {want:?}").into()) }
}

// === cases ===

fn coalesced_writes_are_taken_apart(kind: PathKind) -> Outcome {
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

fn a_byte_at_a_time_is_put_together(kind: PathKind) -> Outcome {
    let world = World::new(kind, &[role::LEAF, role::TOP])?;
    for byte in bytes(&(0..20).map(|i| numbered(role::TOP, i)).collect::<Vec<_>>()) {
        same(send(&world.ends[0].socket, &[byte], SendFlags::NOSIGNAL)?, 1, "bytes taken")?;
    }
    // Whole ones after pieces, too.
    world.send(0, &(20..60).map(|i| numbered(role::TOP, i)).collect::<Vec<_>>())?;
    same(numbers(&world.receive(1, 60)?), (0..60).collect(), "received")?;
    same(world.counters(0)?.messages, 60, "counted")
}

fn the_sender_is_stamped_over_a_lie(kind: PathKind) -> Outcome {
    let world = World::new(kind, &[role::LEAF + 3, role::TOP])?;
    let sent = Descriptor { weight_bits: 1.5f64.to_bits(), offset: 1 << 40, round: 9, ..numbered(role::TOP, 5) };
    world.send(0, &[sent])?;
    same(world.receive(1, 1)?[0], Descriptor { src: role::LEAF + 3, ..sent }, "received")
}

/// One good descriptor before, between and after each bad one, all in one write.
fn mixed() -> Vec<Descriptor> {
    let good = |i| numbered(role::TOP, i);
    let version = Descriptor { version: 9, ..good(100) };
    let chain = Descriptor { chain: CHAIN + 1, ..good(101) };
    let route = Descriptor { dst: role::LEAF + 77, ..good(102) };
    vec![good(0), version, good(1), chain, chain, good(2), route, good(3), version, route, chain, good(4)]
}

const MIXED_DROPS: [u64; DropReason::COUNT] = [0, 2, 3, 2, 0, 0];

fn what_may_not_pass_is_counted_and_the_rest_passes(kind: PathKind) -> Outcome {
    let world = World::new(kind, &[role::LEAF, role::TOP])?;
    let refused = world.send_on(0, &mixed())?;
    same(refused, if kind == PathKind::Ebpf { 7 } else { 0 }, "refused to the sender's face")?;
    same(numbers(&world.receive(1, 5)?), vec![0, 1, 2, 3, 4], "received")?;
    let counters = world.settled(0, 12)?;
    same((counters.messages, counters.drops), (5, MIXED_DROPS), "counters")?;
    same(world.is_empty(1)?, true, "nothing else came")
}

fn a_member_of_every_chain_is_reached_from_each(kind: PathKind) -> Outcome {
    let mut world = World::new(kind, &[])?;
    let gateway = world.join(ANY_CHAIN, role::GATEWAY)?;
    let chains = [1, 2];
    for chain in chains {
        world.path.set_route(RouteKey { chain, dst: role::GATEWAY }, 0)?;
        let top = world.join(chain, role::TOP)?;
        world.send(gateway, &[Descriptor::new(Kind::Close, chain, role::TOP)])?;
        same(world.receive(top, 1)?[0].src, role::GATEWAY, "from the gateway")?;
        world.send(top, &[Descriptor::new(Kind::Model, chain, role::GATEWAY)])?;
        let got = world.receive(gateway, 1)?[0];
        same((got.chain, got.src), (chain, role::TOP), "to the gateway")?;
    }
    // A member of one chain does not get into the other.
    let foreign = Descriptor::new(Kind::Model, 2, role::GATEWAY);
    world.send_on(1, &[foreign])?;
    same(world.settled(1, 2)?.drops[DropReason::Chain as usize], 1, "drops")
}

fn an_unregistered_member_is_a_stranger(kind: PathKind) -> Outcome {
    let world = World::new(kind, &[role::LEAF, role::TOP])?;
    world.send(0, &[numbered(role::TOP, 0)])?;
    world.receive(1, 1)?;
    world.path.unregister(0)?;
    world.send_on(0, &[numbered(role::TOP, 1), numbered(role::TOP, 2)])?;
    let strangers = world.settled(STRANGERS, 2)?;
    same((strangers.messages, strangers.drops[DropReason::Stranger as usize]), (0, 2), "strangers")?;
    same(world.is_empty(1)?, true, "nothing came")?;
    // Nor does anybody reach it.
    world.send_on(1, &[numbered(role::LEAF, 3)])?;
    same(world.settled(1, 1)?.drops[DropReason::Route as usize], 1, "drops of who sends to it")
}

fn a_seat_taken_again_is_not_the_old_members(kind: PathKind) -> Outcome {
    let mut world = World::new(kind, &[role::LEAF, role::TOP])?;
    world.send(0, &[numbered(role::TOP, 0)])?;
    world.receive(1, 1)?;
    world.path.unregister(0)?;
    let (a, near) = pair()?;
    let member = Member { role: role::MIDDLE, ..world.ends[0].member };
    world.path.register(Some(a.as_fd()), near.as_fd(), member)?;
    let old = std::mem::replace(&mut world.ends[0], End { socket: DescriptorSocket::new(a), near, member });
    same(world.counters(0)?, Counters::default(), "counters begin anew")?;
    if old.socket.send_all(&[numbered(role::TOP, 1)]).is_ok() {
        // A router reads no more from it: the next write finds the end closed.
        eventually(|| Ok(old.socket.send_all(&[numbered(role::TOP, 1)]).is_err()))?;
    }
    world.send(0, &[numbered(role::TOP, 2)])?;
    let got = world.receive(1, 1)?[0];
    same((got.src, got.generation), (role::MIDDLE, 2), "the new member's")?;
    same(world.counters(0)?.messages, 1, "counted")
}

fn seats_and_routes_are_checked(kind: PathKind) -> Outcome {
    let world = World::new(kind, &[role::LEAF])?;
    let End { socket, near, member } = &world.ends[0];
    let taken = world.path.register(Some(socket.as_fd()), near.as_fd(), *member);
    same(matches!(taken, Err(PathError::SeatTaken(0))), true, "seat taken")?;
    let beyond = Member { counter: lifl_ebpf::MAX_MEMBERS, ..*member };
    let beyond = world.path.register(Some(socket.as_fd()), near.as_fd(), beyond);
    same(matches!(beyond, Err(PathError::NoSeat(_))), true, "index beyond the last")?;
    let key = RouteKey { chain: CHAIN, dst: role::TOP };
    same(matches!(world.path.set_route(key, 5), Err(PathError::NoSeat(5))), true, "route to nobody")?;
    world.path.remove_route(key)?;
    world.path.remove_route(RouteKey { chain: CHAIN, dst: role::LEAF })?;
    world.send_on(0, &[numbered(role::LEAF, 0)])?;
    same(world.settled(0, 1)?.drops[DropReason::Route as usize], 1, "removed route")
}

fn peeked_descriptors_stay_until_consumed(kind: PathKind) -> Outcome {
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

fn a_closed_receiver_is_no_route(kind: PathKind) -> Outcome {
    let mut world = World::new(kind, &[role::LEAF, role::TOP, role::MIDDLE])?;
    world.send(0, &[numbered(role::TOP, 0)])?;
    world.receive(1, 1)?;
    let (drained, is_drained) = mpsc::channel();
    world.path.on_drained(1, move || {
        let _ = drained.send(());
    });
    let dead = world.ends.remove(1);
    drop(dead.socket);
    is_drained.recv_timeout(PATIENCE)?;
    world.send_on(0, &[numbered(role::TOP, 1), numbered(role::MIDDLE, 2)])?;
    same(numbers(&world.receive(1, 1)?), vec![2], "the others go on")?;
    let counters = world.settled(0, 3)?;
    same((counters.messages, counters.drops[DropReason::Route as usize]), (2, 1), "counters")
}

fn two_senders_keep_their_order_and_causes_come_first(kind: PathKind) -> Outcome {
    const ROUNDS: u64 = 10_000;
    let world = World::new(kind, &[role::LEAF, role::TOP, role::GATEWAY])?;
    std::thread::scope(|scope| {
        // The leaf tells the gateway, then the top; the top, having heard, tells the gateway.
        let leaf = scope.spawn(|| {
            (0..ROUNDS).try_for_each(|i| world.send(0, &[numbered(role::GATEWAY, i), numbered(role::TOP, i)]))
        });
        let top = scope.spawn(|| -> Outcome {
            let mut heard = Vec::new();
            let mut told = 0;
            while told < ROUNDS {
                world.ends[1].socket.recv_into(&mut heard)?;
                for d in heard.drain(..) {
                    same(d.generation, told, "order at the top")?;
                    world.send(1, &[numbered(role::GATEWAY, d.generation)])?;
                    told += 1;
                }
            }
            Ok(())
        });
        let mut next = BTreeMap::from([(role::LEAF, 0), (role::TOP, 0)]);
        let mut heard = Vec::new();
        while next.values().sum::<u64>() < 2 * ROUNDS {
            world.ends[2].socket.recv_into(&mut heard)?;
            for d in heard.drain(..) {
                let want = next.get_mut(&d.src).ok_or("from nobody")?;
                same(d.generation, *want, "order at the gateway")?;
                *want += 1;
            }
            if next[&role::TOP] > next[&role::LEAF] {
                return Err("the gateway heard the answer before the cause".into());
            }
        }
        leaf.join().ok().ok_or("leaf panicked")??;
        top.join().ok().ok_or("top panicked")?
    })
}

/// Sends `n` from member 0 to the top while `meanwhile` is done again and again; returns what members 1.. received.
fn under_traffic(world: &World, n: u64, mut meanwhile: impl FnMut(u64) -> Outcome) -> Outcome<Vec<Vec<u64>>> {
    let done = AtomicBool::new(false);
    let received = AtomicU64::new(0);
    let turns = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (1..world.ends.len())
            .map(|at| {
                let (done, received) = (&done, &received);
                scope.spawn(move || -> Outcome<Vec<u64>> {
                    let socket = DescriptorSocket::new(rustix::io::dup(&world.ends[at].socket)?);
                    let mut got = Vec::new();
                    while !(done.load(Ordering::SeqCst) && world.is_empty(at)?) {
                        let mut polled = [rustix::event::PollFd::new(&socket, rustix::event::PollFlags::IN)];
                        let tick = rustix::event::Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
                        if rustix::event::poll(&mut polled, Some(&tick))? > 0 {
                            received.fetch_add(socket.recv_into(&mut got)? as u64, Ordering::SeqCst);
                        }
                    }
                    Ok(numbers(&got))
                })
            })
            .collect();
        let writer = scope.spawn(|| -> Outcome {
            let all: Vec<_> = (0..n).map(|i| numbered(role::TOP, i)).collect();
            let mut at = 0;
            for (size, _) in (1..=40).cycle().zip(&all) {
                let end = (at + size).min(all.len());
                world.send(0, &all[at..end])?;
                at = end;
                // As the protocol: what is outstanding is bounded.
                let sent = at as u64;
                eventually(|| Ok(sent - received.load(Ordering::SeqCst) < 8_000))?;
                // Something happens at least in each fifth of it.
                eventually(|| Ok(turns.load(Ordering::SeqCst) >= 5 * sent / n))?;
                if at == all.len() {
                    break;
                }
            }
            Ok(())
        });
        let mut result = Ok(());
        while result.is_ok() && !writer.is_finished() {
            result = meanwhile(turns.fetch_add(1, Ordering::SeqCst));
        }
        let written = writer.join().ok().ok_or_else(|| Failed::from("writer panicked"));
        let settled = written.and_then(|w| w).and_then(|()| world.settled(0, n).map(drop));
        done.store(true, Ordering::SeqCst);
        let read: Outcome<Vec<Vec<u64>>> =
            readers.into_iter().map(|r| r.join().ok().ok_or("reader panicked")?).collect();
        result?;
        settled?;
        read
    })
}

fn a_route_moves_while_traffic_flows(kind: PathKind) -> Outcome {
    const N: u64 = 100_000;
    let world = World::new(kind, &[role::LEAF, role::TOP, role::MIDDLE])?;
    let key = RouteKey { chain: CHAIN, dst: role::TOP };
    let read = under_traffic(&world, N, |turn| Ok(world.path.set_route(key, 1 + u32::from(turn % 2 == 0))?))?;
    for (at, got) in read.iter().enumerate() {
        same(got.is_sorted(), true, "order at each")?;
        same(got.is_empty(), false, &format!("receiver {at} got nothing"))?;
    }
    let mut all = read.concat();
    all.sort_unstable();
    same(all == (0..N).collect::<Vec<_>>(), true, "each once")?;
    same(world.counters(0)?.drops, [0; DropReason::COUNT], "drops")
}

fn a_program_is_replaced_while_traffic_flows(kind: PathKind) -> Outcome {
    const N: u64 = 200_000;
    let world = World::new(kind, &[role::LEAF, role::TOP])?;
    let read = under_traffic(&world, N, |_| Ok(world.path.replace_program()?))?;
    same(read[0] == (0..N).collect::<Vec<_>>(), true, "each once, in order")?;
    let counters = world.counters(0)?;
    same((counters.messages, counters.drops), (N, [0; DropReason::COUNT]), "counters")
}

fn a_full_receiver_loses_nothing_silently(kind: PathKind) -> Outcome {
    // The kernel's path is bounded by memory only: see the test of that.
    let bound = if kind == PathKind::Ebpf { 50_000 } else { 1_000_000 };
    let full = fill(kind, bound)?;
    match kind {
        PathKind::Ebpf => same(full.is_none(), true, "takes all"),
        PathKind::Userspace => same(matches!(full, Some(SendCause::WouldBlock)), true, "holds back"),
    }
}

/// Sends to a receiver that does not read until it takes no more or `bound` is reached; then it reads, and traffic goes on.
fn fill(kind: PathKind, bound: u64) -> Outcome<Option<SendCause>> {
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
fn a_receiver_without_memory_fails_the_sender() -> Outcome {
    let group = std::path::PathBuf::from(format!("{TCP_LIMITS}/lifl-test-{}", std::process::id()));
    std::fs::create_dir(&group)?;
    std::fs::write(group.join("memory.kmem.tcp.limit_in_bytes"), "1048576")?;
    let status = Command::new(std::env::current_exe()?).args([FILL, group.to_str().ok_or("path")?]).status();
    std::fs::remove_dir(&group)?;
    same(status?.success(), true, "the process that fills")
}

fn fill_within(group: &str) -> Outcome {
    std::fs::write(format!("{group}/cgroup.procs"), std::process::id().to_string())?;
    let full = fill(PathKind::Ebpf, 1_000_000)?;
    same(matches!(full, Some(SendCause::Full)), true, "no memory")
}

fn a_dead_member_is_drained_first(kind: PathKind) -> Outcome {
    const N: u64 = 3_000;
    let mut world = World::new(kind, &[role::TOP, role::LEAF])?;
    world.send(1, &(0..N).map(|i| numbered(role::TOP, i)).collect::<Vec<_>>())?;
    // It dies with something unread, as an aggregator does.
    world.send(0, &[numbered(role::LEAF, 0)])?;
    world.settled(0, 1)?;
    world.settled(1, N)?;
    let dead = world.ends.pop().ok_or("no leaf")?;
    let (drained, is_drained) = mpsc::channel();
    world.path.on_drained(1, move || {
        let _ = drained.send(());
    });
    drop(dead.socket);
    is_drained.recv_timeout(PATIENCE)?;
    same(numbers(&world.receive(0, usize::try_from(N)?)?), (0..N).collect(), "all it had sent")?;
    same(world.is_empty(0)?, true, "and no more")
}

fn the_path_survives_its_owner(kind: PathKind) -> Outcome {
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

/// In a process of its own, where no other test's threads run.
fn nothing_runs_while_nothing_is_sent(kind: PathKind) -> Outcome {
    let kind = if kind == PathKind::Ebpf { "ebpf" } else { "userspace" };
    let status = Command::new(std::env::current_exe()?).args([IDLE, kind]).status()?;
    same(status.success(), true, "the idle process")
}

fn idle(kind: PathKind) -> Outcome {
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

/// Counters without times, by index; what each member received.
type Results = (Vec<(u64, u64, [u64; DropReason::COUNT])>, Vec<Vec<Descriptor>>);

fn same_traffic_same_results() -> Outcome {
    let run = |kind| -> Outcome<Results> {
        let world = World::new(kind, &[role::LEAF, role::LEAF + 1, role::MIDDLE, role::TOP])?;
        // A generator with a fixed seed decides who sends what to whom, and in writes of which size.
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        let mut sent = [0; 4];
        for i in 0..2_000 {
            let from = usize::try_from(random(4))?;
            let write: Vec<_> = (0..=random(70))
                .map(|_| {
                    let dst = [role::LEAF, role::LEAF + 1, role::MIDDLE, role::TOP, role::GATEWAY]
                        [usize::try_from(random(5)).expect("below five")];
                    let d = Descriptor { length: random(1 << 20), ..numbered(dst, i) };
                    match random(20) {
                        0 => Descriptor { version: 0, ..d },
                        1 => Descriptor { chain: CHAIN + 1, ..d },
                        2 => Descriptor { kind: Kind::Release as u8, ..d },
                        _ => d,
                    }
                })
                .collect();
            world.send_on(from, &write)?;
            sent[from] += write.len() as u64;
            // One sender at a time, so that what each receives has one order only.
            world.settled(u32::try_from(from)?, sent[from])?;
        }
        let mut counters = Vec::new();
        let mut received = Vec::new();
        for at in 0..4 {
            let c = world.counters(at)?;
            counters.push((c.messages, c.bytes, c.drops));
            let mut got = Vec::new();
            while !world.is_empty(at)? {
                world.ends[at].socket.recv_into(&mut got)?;
            }
            received.push(got);
        }
        Ok((counters, received))
    };
    let (kernel, router) = (run(PathKind::Ebpf)?, run(PathKind::Userspace)?);
    same(&kernel.0, &router.0, "counters")?;
    for at in 0..4 {
        same(kernel.1[at].len(), router.1[at].len(), "number received")?;
        same(kernel.1[at] == router.1[at], true, &format!("what member {at} received"))?;
    }
    let passed: u64 = kernel.0.iter().map(|c| c.0).sum();
    same(kernel.1.iter().map(|got| got.len() as u64).sum::<u64>(), passed, "received as counted")
}

fn overshoot_is_refused_for_good() -> Outcome {
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

/// Loads a path in a process of its own, which is then killed: its maps are gone as soon as the store has them no more.
fn nothing_is_left_behind() -> Outcome {
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

fn child() -> Outcome {
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
