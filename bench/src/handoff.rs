//! One update from a leaf to the top, two processes on one machine, against gRPC.
//!
//! Ours is what the platform does: the leaf seals an object and sends its 64-byte descriptor through the `sk_msg` program; the top,
//! blocked in `recv`, checks it and holds the mapped floats. The opponent is tonic over loopback with its windows opened wide, one
//! stream per update, in the chunk size that served it best, received into one warm buffer. This process is the leaf, its child is
//! the top; both live through all rounds, everything is mapped and warm. Times are one way, from just before sending until the
//! receiver has its floats, on the clock that both share; the acknowledgement that paces them counts in processor time only, which
//! is that of both processes. Nothing is pinned unless a name says so: the kernel places the processes as it does in production.
//!
//! | figure | what is divided |
//! |---|---|
//! | `size_flatness` | latency of 232 MB, over that of 4 KB; the sizes take turns, handoff by handoff |
//! | `grpc_latency_vs_ours_232mb` | latency of gRPC that carries raw bytes, without a serialisation, over ours |
//! | `grpc_cpu_vs_ours_232mb` | processor time of the same |
//! | `handoff_fold_vs_grpc` | from the leaf's sealed partial until the top has folded it, 232 MB: gRPC with a protobuf message of bytes per chunk, received whole and folded by the same kernel, over ours |
//!
//! Raw series tell the other sizes and two more ways of the opponent: protobuf's packed floats, and folding each chunk as it comes.
//! Every handoff is checked by stamps that the leaf changes before sealing; contents and sums are compared outside of the time.

use anyhow::ensure;

use crate::{
    Args,
    measure::Rounds,
    report::{Report, median},
};

mod clock;
mod grpc;
mod leaf;
mod order;
mod top;

use grpc::How;
use leaf::{Leaf, Pinned};

pub(crate) use top::serve as top;

/// What is handed over: a small object for comparison, then ResNet-18, -34 and -152 as the LIFL paper has them.
const SIZES: [(&str, usize); 4] =
    [("4 KB", 1024), ("44 MB", 11_000_000), ("83 MB", 20_750_000), ("232 MB", 58_000_000)];

/// Index of the largest.
const LARGEST: usize = SIZES.len() - 1;

/// Handoffs of each size that make one value of latency.
const LATENCIES: u32 = 500;

/// Handoffs that make one value of processor time.
const CPU_HANDOFFS: u32 = 4000;

/// Handoffs with a fold, and transfers over gRPC, that make one value.
const TRANSFERS: u32 = 3;

/// Bytes per message that the opponent may choose from.
const CHUNKS: [usize; 3] = [1 << 20, 2 << 20, 4 << 20];

pub(crate) fn run(args: &Args) -> anyhow::Result<Report> {
    let mut leaf = Leaf::start()?;
    let chunk = best_chunk(&mut leaf)?;
    let mut sizes: Vec<Rounds> = SIZES.iter().map(|_| Rounds::default()).collect();
    let mut both = Rounds::default();
    turn(&mut leaf, chunk, &mut SIZES.map(|_| Rounds::default()), &mut Rounds::default())?;
    for _ in 0..args.rounds {
        turn(&mut leaf, chunk, &mut sizes, &mut both)?;
    }
    let path = leaf.finish()?;
    report(&sizes, &both, chunk, &path)
}

/// One round: every contestant once.
fn turn(leaf: &mut Leaf, chunk: usize, sizes: &mut [Rounds], both: &mut Rounds) -> anyhow::Result<()> {
    let all: Vec<usize> = (0..SIZES.len()).collect();
    let ways = [
        (Pinned::No, "ours, latency"),
        (Pinned::OneCore, "ours on one core, latency"),
        (Pinned::TwoCores, "ours on two cores, latency"),
    ];
    for (pinned, name) in ways {
        let done = leaf.hand_over(&all, LATENCIES, false, pinned)?;
        let medians: Vec<f64> = done.latencies.iter().map(|of_size| median(of_size)).collect();
        for (rounds, latency) in sizes.iter_mut().zip(&medians) {
            rounds.push(name, *latency);
        }
        let flatness = match pinned {
            Pinned::No => "size_flatness",
            Pinned::OneCore => "size_flatness on one core",
            Pinned::TwoCores => "size_flatness on two cores",
        };
        both.push(flatness, medians[LARGEST] / medians[0]);
    }
    for (size, rounds) in sizes.iter_mut().enumerate().skip(1) {
        let done = leaf.hand_over(&[size], CPU_HANDOFFS, false, Pinned::No)?;
        rounds.push("ours, cpu", done.cpu_each);
        for how in [How::Raw, How::Bytes, How::EachChunk, How::Floats] {
            let (latency, cpu) = how.series();
            let done = leaf.call(how, size, chunk, TRANSFERS)?;
            rounds.push(latency, median(&done.latencies[0]));
            rounds.push(cpu, done.cpu_each);
        }
        let done = leaf.hand_over(&[size], TRANSFERS, true, Pinned::No)?;
        rounds.push("ours and fold, latency", median(&done.latencies[0]));
        rounds.push("ours and fold, cpu", done.cpu_each);
        leaf.compare(size)?;
    }
    Ok(())
}

fn best_chunk(leaf: &mut Leaf) -> anyhow::Result<usize> {
    let mut best = (f64::INFINITY, CHUNKS[0]);
    for _ in 0..2 {
        for chunk in CHUNKS {
            let done = leaf.call(How::Raw, LARGEST, chunk, TRANSFERS)?;
            let time = median(&done.latencies[0]);
            if time < best.0 {
                best = (time, chunk);
            }
        }
    }
    Ok(best.1)
}

fn report(sizes: &[Rounds], both: &Rounds, chunk: usize, path: &str) -> anyhow::Result<Report> {
    let mut report = Report::new("handoff");
    report.note("path", path);
    report.note("opponent", format!("tonic 0.14, HTTP/2 over loopback, messages of {} MiB", chunk >> 20));
    report.note("processor time", "of both processes, kernel included, per update");
    let largest = &sizes[LARGEST];
    report.figure("size_flatness", "x", both.series("size_flatness")?.to_vec());
    for (name, over, under) in [
        ("grpc_latency_vs_ours_232mb", "grpc raw, latency", "ours, latency"),
        ("grpc_cpu_vs_ours_232mb", "grpc raw, cpu", "ours, cpu"),
        ("handoff_fold_vs_grpc", "grpc bytes and fold, latency", "ours and fold, latency"),
    ] {
        report.figure(name, "x", largest.ratio(over, under)?);
    }
    for (name, series) in both.iter().filter(|(name, _)| *name != "size_flatness") {
        report.series(name, "x", series.to_vec());
    }
    for ((label, _), rounds) in SIZES.iter().zip(sizes) {
        for (name, series) in rounds.iter() {
            ensure!(series.iter().all(|value| *value > 0.0), "{label}: {name} took no time");
            report.series(&format!("{label}: {name}"), "us", series.to_vec());
        }
    }
    for ((label, _), rounds) in SIZES.iter().zip(sizes).skip(1) {
        for (name, over) in [
            ("bytes", "grpc bytes and fold, latency"),
            ("floats", "grpc floats and fold, latency"),
            ("fold each chunk", "grpc bytes and fold each chunk, latency"),
        ] {
            let ratio = rounds.ratio(over, "ours and fold, latency")?;
            report.series(&format!("{label}: handoff and fold, grpc {name} over ours"), "x", ratio);
        }
    }
    Ok(report)
}
