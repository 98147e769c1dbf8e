//! What changes while traffic flows.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use libtest_mimic::Failed;
use lifl_ebpf::{DropReason, PathKind, RouteKey, role, wire::DescriptorSocket};

use crate::world::{CHAIN, Outcome, World, eventually, numbered, numbers, same};

pub(crate) fn two_senders_keep_their_order_and_causes_come_first(kind: PathKind) -> Outcome {
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

pub(crate) fn a_route_moves_while_traffic_flows(kind: PathKind) -> Outcome {
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

pub(crate) fn a_program_is_replaced_while_traffic_flows(kind: PathKind) -> Outcome {
    const N: u64 = 200_000;
    let world = World::new(kind, &[role::LEAF, role::TOP])?;
    let read = under_traffic(&world, N, |_| Ok(world.path.replace_program()?))?;
    same(read[0] == (0..N).collect::<Vec<_>>(), true, "each once, in order")?;
    let counters = world.counters(0)?;
    same((counters.messages, counters.drops), (N, [0; DropReason::COUNT]), "counters")
}
