//! The kernels of `lifl-fold` against `memcpy` and against Flower.
//!
//! Ten updates of ResNet-18's size, 46.8 MB in `f32`, warm, on one thread unless a name says otherwise. What runs on one thread is
//! measured in processor time, so that a busy machine disturbs it as little as can be. Flower runs in a child that measures its own;
//! its turns alternate with ours.
//!
//! | figure | what is divided |
//! |---|---|
//! | `f32_vs_memcpy` | input bytes per second of an addition into an accumulator, over `memcpy`, in buffers of twice the second-level cache |
//! | `f32_vs_memcpy_46mb` | the same with ten updates one after the other, from memory: the addition reads two streams, `memcpy` one |
//! | `kway_vs_memcpy` | the same with the ten folded in one pass |
//! | `two_threads` | one thread's time of the pass over that of two, each with half the elements |
//! | `f16_vs_f32_updates`, `bf16_vs_f32_updates` | updates per second, the ten folded in one pass as an aggregator does, over those in `f32` |
//! | `f16_vs_f32_eager`, `bf16_vs_f32_eager` | the same, added one after the other |
//! | `finite_check_cost` | receive (from a buffer of 256 KiB in the cache) and add: checked copies, over `memcpy` |
//! | `finite_check_in_fold_cost` | the pass over ten with its sums checked, over the pass without |
//! | `vs_flower_inplace_per_core`, `vs_flower_aggregate_per_core` | processor time from ten updates' bytes to a model: Flower's, over ours |
//!
//! Flower's time ends with its arrays in memory; that it would still have to serialise them is reported apart and not counted. Ours
//! starts from raw tensors as a slot holds them, and includes the check of every sum for finite values, which Flower does not have.

use std::hint::black_box;

use anyhow::ensure;
use lifl_fold::{
    Dtype, FixedInput, Input, Kernel, add_f32, copy_finite, fold_f32, fold_finite_f32, fold_i64, scale_f32, scale_i64,
};

use crate::{
    Args,
    measure::{Rounds, cost},
    report::Report,
};

mod flower;

use flower::Flower;

/// Elements of ResNet-18 with its 1,000 classes.
const ELEMENTS: usize = 11_689_512;

/// Updates of a round.
const CLIENTS: usize = 10;

/// What a receiver has in the cache at a time.
const CHUNK: usize = 256 << 10;

/// Examples that each update stands for.
const WEIGHTS: [f32; CLIENTS] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0];

/// Fixed-point steps of 1.
const SCALE: f64 = 1_048_576.0;

/// Largest error of a mean in `f32`: ten roundings of numbers below 1.
const F32_ERROR: f64 = 1e-6;

/// What the kernels run on; allocated and touched once.
struct Memory {
    updates: Vec<Vec<u8>>,
    halves: Vec<Vec<u8>>,
    brains: Vec<Vec<u8>>,
    base: Vec<f32>,
    sums: Vec<f32>,
    fixed: [Vec<i64>; 2],
    model: Vec<u8>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Report> {
    let mut memory = Memory::new();
    let reference = memory.reference();
    check_kernels(&mut memory, &reference)?;
    let mut flower = Flower::start(&args.python, &memory.updates)?;
    let mut rounds = Rounds::default();
    for round in 0..=args.rounds {
        // The first turn of each touches its memory and counts for nothing.
        let mut warm_up = Rounds::default();
        let rounds = if round == 0 { &mut warm_up } else { &mut rounds };
        against_memcpy(&mut memory, rounds)?;
        narrow_and_fixed(&mut memory, rounds)?;
        finite_check(&mut memory, rounds)?;
        bytes_to_model(&mut memory, &reference, rounds)?;
        flower.turn("inplace", &reference, rounds)?;
        bytes_to_model(&mut memory, &reference, rounds)?;
        flower.turn("aggregate", &reference, rounds)?;
    }
    report(&rounds, &flower)
}

fn report(rounds: &Rounds, flower: &Flower) -> anyhow::Result<Report> {
    let mut report = Report::new("fold");
    report.note("kernel", Kernel::best().name());
    report.note("updates", format!("{CLIENTS} of {ELEMENTS} elements"));
    report.note("opponent", flower.version());
    for (name, over, under) in [
        ("f32_vs_memcpy", "memcpy, above L2", "add f32, above L2"),
        ("f32_vs_memcpy_46mb", "memcpy", "add f32"),
        ("kway_vs_memcpy", "memcpy", "fold f32 10-way"),
        ("two_threads", "fold f32 10-way, wall", "fold f32 10-way, 2 threads, wall"),
        ("f16_vs_f32_updates", "fold f32 10-way", "fold f16 10-way"),
        ("bf16_vs_f32_updates", "fold f32 10-way", "fold bf16 10-way"),
        ("f16_vs_f32_eager", "add f32", "add f16"),
        ("bf16_vs_f32_eager", "add f32", "add bf16"),
        ("finite_check_cost", "receive and add, checked", "receive and add"),
        ("finite_check_in_fold_cost", "fold f32 10-way, checked", "fold f32 10-way"),
        ("vs_flower_inplace_per_core", "flower inplace, cpu", "bytes to model, cpu"),
        ("vs_flower_aggregate_per_core", "flower aggregate, cpu", "bytes to model, cpu"),
    ] {
        report.figure(name, "x", rounds.ratio(over, under)?);
    }
    for (name, series) in rounds.iter() {
        let unit = if name.ends_with("page faults") { "pages per update" } else { "ms per update" };
        report.series(name, unit, series.to_vec());
    }
    Ok(report)
}

fn against_memcpy(memory: &mut Memory, rounds: &mut Rounds) -> anyhow::Result<()> {
    let Memory { updates, base, sums, model, .. } = memory;
    timed(rounds, "memcpy", || updates.iter().for_each(|update| black_box(&mut *model).copy_from_slice(update)))?;
    let inputs = inputs(updates, Dtype::F32);
    timed(rounds, "add f32", || inputs.chunks(1).for_each(|input| add_f32(sums, input)))?;
    let bytes = above_l2()?;
    let (small, repeats) = (&updates[0][..bytes], CLIENTS * (ELEMENTS * 4 / bytes));
    timed(rounds, "memcpy, above L2", || {
        (0..repeats).for_each(|_| black_box(&mut model[..bytes]).copy_from_slice(black_box(small)));
    })?;
    let input = [Input { bytes: small, dtype: Dtype::F32, factor: 1.0 }];
    timed(rounds, "add f32, above L2", || {
        (0..repeats).for_each(|_| add_f32(black_box(&mut sums[..bytes / 4]), black_box(&input)));
    })?;
    let (mut from, mut to) = (&mut *base, &mut *sums);
    timed(rounds, "add f32, taking turns", || {
        for input in inputs.chunks(1) {
            fold_f32(to, Some(from), input);
            std::mem::swap(&mut from, &mut to);
        }
    })?;
    timed(rounds, "fold f32 10-way", || fold_f32(sums, None, &inputs))?;
    timed(rounds, "fold f32 10-way, checked", || black_box(fold_finite_f32(sums, None, &inputs)))?;
    let (left, right) = sums.split_at_mut(ELEMENTS / 2);
    let halves = |range: std::ops::Range<usize>| -> Vec<Input<'_>> {
        inputs.iter().map(|input| Input { bytes: &input.bytes[range.start * 4..range.end * 4], ..*input }).collect()
    };
    let (first, second) = (halves(0..ELEMENTS / 2), halves(ELEMENTS / 2..ELEMENTS));
    let (_, both) = cost(|| {
        std::thread::scope(|scope| {
            scope.spawn(|| fold_f32(left, None, &first));
            fold_f32(right, None, &second);
        });
    })?;
    rounds.push("fold f32 10-way, 2 threads, wall", both.wall_ms() / CLIENTS as f64);
    let (_, alone) = cost(|| fold_f32(sums, None, &inputs))?;
    rounds.push("fold f32 10-way, wall", alone.wall_ms() / CLIENTS as f64);
    Ok(())
}

/// Twice the second-level cache of a core, bytes: above it, and small enough that "warm" means something.
fn above_l2() -> anyhow::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index2/size")?;
    let kib: usize = text.trim().trim_end_matches('K').parse()?;
    Ok(((2 * kib) << 10).min(ELEMENTS * 4))
}

fn narrow_and_fixed(memory: &mut Memory, rounds: &mut Rounds) -> anyhow::Result<()> {
    let Memory { updates, halves, brains, sums, fixed: [from, to], .. } = memory;
    for (name, kway, updates, dtype) in
        [("add f16", "fold f16 10-way", halves, Dtype::F16), ("add bf16", "fold bf16 10-way", brains, Dtype::Bf16)]
    {
        let inputs = inputs(updates, dtype);
        timed(rounds, name, || inputs.chunks(1).for_each(|input| add_f32(sums, input)))?;
        timed(rounds, kway, || fold_f32(sums, None, &inputs))?;
    }
    let inputs: Vec<_> = inputs(updates, Dtype::F32).iter().map(fixed_input).collect();
    timed(rounds, "add fixed, taking turns", || {
        inputs.chunks(1).for_each(|input| {
            black_box(fold_i64(to, Some(from), input, SCALE)).ok();
            std::mem::swap(from, to);
        });
    })?;
    from.fill(0);
    timed(rounds, "fold fixed 10-way", || fold_i64(to, Some(from), &inputs, SCALE))
}

fn finite_check(memory: &mut Memory, rounds: &mut Rounds) -> anyhow::Result<()> {
    let Memory { updates, sums, model, .. } = memory;
    let buffer = &updates[0][..CHUNK];
    let mut receive = |name, copy: fn(&mut [u8], &[u8]) -> bool| {
        timed(rounds, name, || {
            for _ in 0..CLIENTS {
                for chunk in black_box(&mut *model).chunks_mut(CHUNK) {
                    black_box(copy(chunk, &buffer[..chunk.len()]));
                }
                add_f32(sums, &[Input { bytes: model, dtype: Dtype::F32, factor: 1.0 }]);
            }
        })
    };
    receive("receive and add", |to, from| {
        to.copy_from_slice(from);
        true
    })?;
    receive("receive and add, checked", |to, from| copy_finite(to, from, Dtype::F32).is_ok())?;
    let mut copies = |name, copy: fn(&mut [u8], &[u8]) -> bool| {
        timed(rounds, name, || {
            for _ in 0..CLIENTS {
                for chunk in black_box(&mut *model).chunks_mut(CHUNK) {
                    black_box(copy(chunk, &buffer[..chunk.len()]));
                }
            }
        })
    };
    copies("receive", |to, from| {
        to.copy_from_slice(from);
        true
    })?;
    copies("receive, checked", |to, from| copy_finite(to, from, Dtype::F32).is_ok())
}

/// What Flower does, our way: raw tensors in, model out.
fn bytes_to_model(memory: &mut Memory, reference: &[f64], rounds: &mut Rounds) -> anyhow::Result<()> {
    let Memory { updates, sums, model, .. } = memory;
    let inputs = inputs(updates, Dtype::F32);
    let (finite, cost) = cost(|| {
        let finite = fold_finite_f32(sums, None, &inputs);
        scale_f32(model, Dtype::F32, sums, 1.0 / total_weight(), None);
        finite
    })?;
    ensure!(finite.is_ok(), "the fold called a finite update non-finite");
    rounds.push("bytes to model, cpu", cost.cpu_ms() / CLIENTS as f64);
    rounds.push("bytes to model, page faults", cost.faults as f64 / CLIENTS as f64);
    check_model(model, reference, F32_ERROR)
}

/// Every kernel that is timed must find the weighted mean first, or no number of this run counts.
fn check_kernels(memory: &mut Memory, reference: &[f64]) -> anyhow::Result<()> {
    let Memory { updates, halves, brains, base, sums, fixed: [from, to], model } = memory;
    let weight = total_weight();
    // A half has eleven bits, a bfloat16 eight, and the updates are below 1/2.
    let types = [
        (Dtype::F32, updates, F32_ERROR),
        (Dtype::F16, halves, 2.0_f64.powi(-12)),
        (Dtype::Bf16, brains, 2.0_f64.powi(-9)),
    ];
    for (dtype, updates, error) in types {
        let inputs = inputs(updates, dtype);
        fold_f32(sums, None, &inputs);
        scale_f32(model, Dtype::F32, sums, 1.0 / weight, None);
        check_model(model, reference, error)?;
        sums.fill(0.0);
        inputs.chunks(1).for_each(|input| add_f32(sums, input));
        scale_f32(model, Dtype::F32, sums, 1.0 / weight, None);
        check_model(model, reference, error)?;
        base.fill(0.0);
        fold_f32(sums, Some(base), &inputs);
        scale_f32(model, Dtype::F32, sums, 1.0 / weight, None);
        check_model(model, reference, error)?;
        let fixed: Vec<_> = inputs.iter().map(fixed_input).collect();
        from.fill(0);
        fold_i64(to, Some(from), &fixed, SCALE)?;
        scale_i64(model, Dtype::F32, to, SCALE, weight, None);
        check_model(model, reference, error + 1.0 / SCALE)?;
    }
    Ok(())
}

fn check_model(model: &[u8], reference: &[f64], error: f64) -> anyhow::Result<()> {
    let (model, _) = model.as_chunks();
    ensure!(model.len() == reference.len(), "{} elements instead of {}", model.len(), reference.len());
    for (i, (x, mean)) in model.iter().zip(reference).enumerate() {
        let x = f64::from(f32::from_le_bytes(*x));
        ensure!((x - mean).abs() <= error, "element {i} is {x} instead of {mean}");
    }
    Ok(())
}

fn total_weight() -> f64 {
    WEIGHTS.iter().map(|weight| f64::from(*weight)).sum()
}

fn fixed_input<'a>(input: &Input<'a>) -> FixedInput<'a> {
    FixedInput::Float { bytes: input.bytes, dtype: input.dtype, weight: input.factor.into() }
}

fn inputs(updates: &[Vec<u8>], dtype: Dtype) -> Vec<Input<'_>> {
    updates.iter().zip(WEIGHTS).map(|(bytes, factor)| Input { bytes, dtype, factor }).collect()
}

/// Times ten updates' worth of work, kept per update.
fn timed<T>(rounds: &mut Rounds, name: &'static str, work: impl FnOnce() -> T) -> anyhow::Result<()> {
    let (result, cost) = cost(work)?;
    black_box(result);
    rounds.push(name, cost.cpu_ms() / CLIENTS as f64);
    Ok(())
}

// === impl Memory ===

impl Memory {
    fn new() -> Self {
        let floats: Vec<Vec<f32>> = (0..CLIENTS).map(|seed| (0..ELEMENTS).map(|i| value(i, seed)).collect()).collect();
        let bytes = |dtype: Dtype| {
            let update = |floats: &Vec<f32>| {
                let mut bytes = vec![0; ELEMENTS * dtype.size()];
                scale_f32(&mut bytes, dtype, floats, 1.0, None);
                bytes
            };
            floats.iter().map(update).collect()
        };
        Self {
            updates: floats.iter().map(|update| update.iter().flat_map(|x| x.to_le_bytes()).collect()).collect(),
            halves: bytes(Dtype::F16),
            brains: bytes(Dtype::Bf16),
            base: vec![0.5; ELEMENTS],
            sums: vec![0.5; ELEMENTS],
            fixed: [vec![1; ELEMENTS], vec![1; ELEMENTS]],
            model: vec![1; ELEMENTS * 4],
        }
    }

    /// The weighted mean in `f64`.
    fn reference(&self) -> Vec<f64> {
        let weight = total_weight();
        let mut means = vec![0.0; ELEMENTS];
        for (update, factor) in self.updates.iter().zip(WEIGHTS) {
            for (mean, x) in means.iter_mut().zip(update.as_chunks().0) {
                *mean += f64::from(f32::from_le_bytes(*x)) * f64::from(factor) / weight;
            }
        }
        means
    }
}

/// Scattered over (-1/2, 1/2), different for every update.
fn value(i: usize, seed: usize) -> f32 {
    let mixed =
        (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed.wrapping_mul(0xd1b5_4a32_d192_ed03)) >> 44;
    mixed as f32 / 1_048_576.0 - 0.5
}
