//! What the leaf tells the top to do, what both agree on.

use anyhow::ensure;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::{Deserialize, Serialize};

use super::SIZES;

/// Chain of this bench.
pub(super) const CHAIN: u32 = 1;

/// The leaf's order; each has one [`Answer`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Map the segment of this size; its fd is beside. It is the segment's number, too.
    Map {
        /// Index in [`SIZES`].
        size: usize,
    },
    /// Take what comes, object by object; two answers, before the first and after the last.
    Receive {
        /// How many.
        handoffs: u32,
        /// Fold each into the sum.
        fold: bool,
        /// Run on this core, or on any.
        core: Option<usize>,
    },
    /// Compare what came last over gRPC with what the leaf sealed, to the last byte, and that with what it must be.
    Compare {
        /// Index in [`SIZES`].
        size: usize,
    },
    /// Tell the processor time so far.
    Cpu,
}

/// The top's answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// Started; the port of its gRPC server.
    Serving(u16),
    /// Done.
    Done,
    /// When each object was had, ns.
    Received(Vec<u64>),
    /// Processor time, ns.
    Cpu(u64),
}

/// Elements that the leaf changes before it seals, spread over the payload.
pub(super) fn stamped(elements: usize) -> [usize; 5] {
    [0, elements / 4, elements / 2, elements / 4 * 3, elements - 1]
}

/// What it writes there: small integers are exact.
pub(super) fn stamp(serial: u32) -> f32 {
    f32::from(u16::try_from(serial % 1000).unwrap_or(0)) / 1000.0
}

/// All other elements: scattered over (-1/2, 1/2).
pub(super) fn value(i: usize, size: usize) -> f32 {
    let mixed =
        (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(size.wrapping_mul(0xd1b5_4a32_d192_ed03)) >> 44;
    mixed as f32 / 1_048_576.0 - 0.5
}

/// Checks the stamps of what was received.
pub(super) fn check_stamps(floats: &[f32], size: usize, serial: u32) -> anyhow::Result<()> {
    let elements = SIZES[size].1;
    ensure!(floats.len() == elements, "{} elements instead of {elements}", floats.len());
    for at in stamped(elements) {
        let (got, want) = (floats[at], stamp(serial));
        ensure!(got.to_bits() == want.to_bits(), "element {at} of handoff {serial} is {got} instead of {want}");
    }
    Ok(())
}

/// Runs the calling thread on one core, or on any.
pub(super) fn pin(core: Option<usize>) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    match core {
        Some(core) => set.set(core),
        None => (0..CpuSet::MAX_CPU).for_each(|core| set.set(core)),
    }
    Ok(sched_setaffinity(None, &set)?)
}
