//! Both paths side by side.

use lifl_ebpf::{Descriptor, DropReason, Kind, PathKind, role};

use crate::world::{CHAIN, Outcome, World, numbered, same};

/// Counters without times, by index; what each member received.
type Results = (Vec<(u64, u64, [u64; DropReason::COUNT])>, Vec<Vec<Descriptor>>);

pub(crate) fn same_traffic_same_results() -> Outcome {
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
