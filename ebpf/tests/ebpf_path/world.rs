//! A chain and its members, and what tests ask of them.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant},
};

use libtest_mimic::Failed;
use lifl_ebpf::{
    ANY_CHAIN, Counters, Descriptor, Kind, Member, Path, PathKind, RouteKey, pair,
    wire::{DescriptorSocket, SendCause},
};
use rustix::net::sockopt;

pub(crate) type Outcome<T = ()> = Result<T, Failed>;

pub(crate) type Case = fn(PathKind) -> Outcome;

/// What a test waits for at most; reaching it is a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const CHAIN: u32 = 7;

pub(crate) struct World {
    pub(crate) path: Path,
    pub(crate) ends: Vec<End>,
}

pub(crate) struct End {
    pub(crate) socket: DescriptorSocket,
    pub(crate) near: OwnedFd,
    pub(crate) member: Member,
}

impl World {
    /// Members in one chain by their roles, each with a route; indices are positions.
    pub(crate) fn new(kind: PathKind, roles: &[u32]) -> Outcome<Self> {
        let path = if kind == PathKind::Ebpf { Path::load()? } else { Path::userspace()? };
        let mut world = Self { path, ends: Vec::new() };
        for role in roles {
            world.join(CHAIN, *role)?;
        }
        Ok(world)
    }

    pub(crate) fn join(&mut self, chain: u32, role: u32) -> Outcome<usize> {
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

    pub(crate) fn send(&self, from: usize, descriptors: &[Descriptor]) -> Outcome {
        Ok(self.ends[from].socket.send_all(descriptors)?)
    }

    /// Sends and goes on after each refusal; how many were refused to the sender's face.
    pub(crate) fn send_on(&self, from: usize, mut descriptors: &[Descriptor]) -> Outcome<usize> {
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

    pub(crate) fn receive(&self, at: usize, n: usize) -> Outcome<Vec<Descriptor>> {
        let mut got = Vec::new();
        while got.len() < n {
            if self.ends[at].socket.recv_into(&mut got)? == 0 {
                return Err(format!("end of stream after {} of {n}", got.len()).into());
            }
        }
        if got.len() > n { Err(format!("{} instead of {n}", got.len()).into()) } else { Ok(got) }
    }

    pub(crate) fn is_empty(&self, at: usize) -> Outcome<bool> {
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

    pub(crate) fn counters(&self, of: usize) -> Outcome<Counters> {
        Ok(self.path.counters(u32::try_from(of)?)?)
    }

    /// Waits until a member's counters have seen `n` descriptors, passed and refused.
    pub(crate) fn settled(&self, index: u32, n: u64) -> Outcome<Counters> {
        let mut counters = Counters::default();
        eventually(|| {
            counters = self.path.counters(index)?;
            Ok(counters.messages + counters.drops.iter().sum::<u64>() >= n)
        })?;
        Ok(counters)
    }
}

pub(crate) fn eventually(mut met: impl FnMut() -> Outcome<bool>) -> Outcome {
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
pub(crate) fn numbered(dst: u32, i: u64) -> Descriptor {
    Descriptor { src: 4242, generation: i, length: 100, ..Descriptor::new(Kind::Update, CHAIN, dst) }
}

pub(crate) fn numbers(descriptors: &[Descriptor]) -> Vec<u64> {
    descriptors.iter().map(|d| d.generation).collect()
}

pub(crate) fn bytes(descriptors: &[Descriptor]) -> Vec<u8> {
    descriptors.iter().flat_map(Descriptor::to_bytes).collect()
}

pub(crate) fn same<T: PartialEq + std::fmt::Debug>(got: T, want: T, what: &str) -> Outcome {
    if got == want { Ok(()) } else { Err(format!("{what}: got {got:?}, want {want:?}").into()) }
}
