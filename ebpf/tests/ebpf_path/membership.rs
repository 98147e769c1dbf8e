//! Who may send what to whom.

use std::{os::fd::AsFd as _, sync::mpsc};

use lifl_ebpf::{
    ANY_CHAIN, Counters, Descriptor, DropReason, Kind, Member, PathError, PathKind, RouteKey, STRANGERS, pair, role,
    wire::DescriptorSocket,
};

use crate::world::{CHAIN, End, Outcome, PATIENCE, World, eventually, numbered, numbers, same};

pub(crate) fn the_sender_is_stamped_over_a_lie(kind: PathKind) -> Outcome {
    let world = World::new(kind, &[role::LEAF + 3, role::TOP])?;
    let sent = Descriptor { weight_bits: 1.5f64.to_bits(), offset: 1 << 40, round: 9, ..numbered(role::TOP, 5) };
    world.send(0, &[sent])?;
    same(world.receive(1, 1)?[0], Descriptor { src: role::LEAF + 3, ..sent }, "received")
}

/// One good descriptor before, between and after each bad one, all in one write.
pub(crate) fn mixed() -> Vec<Descriptor> {
    let good = |i| numbered(role::TOP, i);
    let version = Descriptor { version: 9, ..good(100) };
    let chain = Descriptor { chain: CHAIN + 1, ..good(101) };
    let route = Descriptor { dst: role::LEAF + 77, ..good(102) };
    vec![good(0), version, good(1), chain, chain, good(2), route, good(3), version, route, chain, good(4)]
}

const MIXED_DROPS: [u64; DropReason::COUNT] = [0, 2, 3, 2, 0, 0];

pub(crate) fn what_may_not_pass_is_counted_and_the_rest_passes(kind: PathKind) -> Outcome {
    let world = World::new(kind, &[role::LEAF, role::TOP])?;
    let refused = world.send_on(0, &mixed())?;
    same(refused, if kind == PathKind::Ebpf { 7 } else { 0 }, "refused to the sender's face")?;
    same(numbers(&world.receive(1, 5)?), vec![0, 1, 2, 3, 4], "received")?;
    let counters = world.settled(0, 12)?;
    same((counters.messages, counters.drops), (5, MIXED_DROPS), "counters")?;
    same(world.is_empty(1)?, true, "nothing else came")
}

pub(crate) fn a_member_of_every_chain_is_reached_from_each(kind: PathKind) -> Outcome {
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

pub(crate) fn an_unregistered_member_is_a_stranger(kind: PathKind) -> Outcome {
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

pub(crate) fn a_seat_taken_again_is_not_the_old_members(kind: PathKind) -> Outcome {
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

pub(crate) fn seats_and_routes_are_checked(kind: PathKind) -> Outcome {
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

pub(crate) fn a_closed_receiver_is_no_route(kind: PathKind) -> Outcome {
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

pub(crate) fn a_dead_member_is_drained_first(kind: PathKind) -> Outcome {
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
