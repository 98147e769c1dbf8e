//! Sums in `f32`.
//!
//! What bounds a fold is how many lines the processor fetches at a time, and it looks ahead within each 4 KiB page by itself. So the
//! loop walks several pages side by side: few inputs take more pages each, many inputs are streams enough.

use crate::{
    Dtype, Input,
    kernel::{Isa, QUAD, Quad},
    views::quads,
};

/// Quads of a page.
const PAGE: usize = 4096 / size_of::<Quad>();

/// Streams of reads that go on at a time, about: measured, from 8 to 16 make little difference.
const STREAMS: usize = 12;

/// Sums from here on are written past the caches: they would push out what is read next, and each line would first be read in vain.
pub(crate) const STREAM_FROM: usize = 4 << 20;

/// What a sum starts from.
#[derive(Clone, Copy)]
enum Start<'a> {
    Zero,
    Base(&'a [f32]),
    Itself,
}

#[inline(always)]
pub(crate) fn fold<I: Isa>(out: &mut [f32], base: Option<&[f32]>, inputs: &[Input<'_>]) {
    walk::<I, false>(out, base.map_or(Start::Zero, Start::Base), inputs);
}

#[inline(always)]
pub(crate) fn fold_finite<I: Isa>(out: &mut [f32], base: Option<&[f32]>, inputs: &[Input<'_>]) -> Result<(), usize> {
    if walk::<I, true>(out, base.map_or(Start::Zero, Start::Base), inputs) {
        return Ok(());
    }
    out.iter().position(|sum| !sum.is_finite()).map_or(Ok(()), Err)
}

#[inline(always)]
pub(crate) fn add<I: Isa>(acc: &mut [f32], inputs: &[Input<'_>]) {
    walk::<I, false>(acc, Start::Itself, inputs);
}

/// Writes the sums; tells whether they are finite if `CHECKED`.
#[inline(always)]
fn walk<I: Isa, const CHECKED: bool>(out: &mut [f32], start: Start<'_>, inputs: &[Input<'_>]) -> bool {
    let reads = inputs.len()
        + match start {
            Start::Zero => 0,
            Start::Base(base) => {
                assert_eq!(base.len(), out.len(), "the base has another length than the sum");
                1
            }
            Start::Itself => 1,
        };
    for input in inputs {
        assert_eq!(input.bytes.len(), out.len() * input.dtype.size(), "an input has another length than the sum");
    }
    let past_caches = size_of_val(out) >= STREAM_FROM && !matches!(start, Start::Itself);
    let (head, body, tail) = quads(out);
    let (first, last) = (head.len(), head.len() + body.len() * QUAD);
    edge::<I>(head, 0, start, inputs);
    edge::<I>(tail, last, start, inputs);

    let mut poison = I::load(&[0.0; QUAD]);
    let pages = (STREAMS / reads.max(1)).clamp(1, 8);
    for (tile, quads) in body.chunks_mut(pages * PAGE).enumerate() {
        let at = first + tile * pages * PAGE * QUAD;
        for side in 0..PAGE {
            for i in (side..quads.len()).step_by(PAGE) {
                let sums = sum::<I>(&quads[i], at + i * QUAD, start, inputs);
                if CHECKED {
                    // Nothing as long as the sums are finite, else not a number from then on.
                    poison = I::multiply_add(sums, 0.0, poison);
                }
                if past_caches { I::stream(&mut quads[i], sums) } else { I::store(&mut quads[i], sums) }
            }
        }
    }
    if past_caches {
        I::fence();
    }
    let mut poisoned = Quad([0.0; QUAD]);
    I::store(&mut poisoned, poison);
    [&*head, &*tail, &poisoned.0].into_iter().flatten().all(|x| x.is_finite())
}

/// One quad of sums, in registers while all inputs pass by.
#[inline(always)]
fn sum<I: Isa>(out: &Quad, at: usize, start: Start<'_>, inputs: &[Input<'_>]) -> I::Lanes {
    let mut sums = match start {
        Start::Zero => I::load(&[0.0; QUAD]),
        Start::Base(base) => I::load(part(base, at)),
        Start::Itself => I::load(&out.0),
    };
    for input in inputs {
        sums = I::multiply_add(load::<I>(input.bytes, input.dtype, at), input.factor, sums);
    }
    sums
}

#[inline(always)]
fn load<I: Isa>(bytes: &[u8], dtype: Dtype, at: usize) -> I::Lanes {
    match dtype {
        Dtype::F32 => I::load_f32(part(bytes, at * 4)),
        Dtype::F16 => I::load_f16(part(bytes, at * 2)),
        Dtype::Bf16 => I::load_bf16(part(bytes, at * 2)),
    }
}

/// Elements from element `at` on as `f32`, as many as `out` has.
#[inline(always)]
pub(crate) fn widen<I: Isa>(out: &mut [f32], bytes: &[u8], dtype: Dtype, at: usize) {
    let (head, body, tail) = quads(out);
    let (first, last) = (at + head.len(), at + head.len() + body.len() * QUAD);
    for (i, quad) in body.iter_mut().enumerate() {
        I::store(quad, load::<I>(bytes, dtype, first + i * QUAD));
    }
    for (at, edge) in [(at, head), (last, tail)] {
        for (i, out) in edge.iter_mut().enumerate() {
            *out = element(bytes, dtype, at + i);
        }
    }
}

#[inline(always)]
pub(crate) fn part<T, const N: usize>(all: &[T], at: usize) -> &[T; N] {
    match all[at..].first_chunk() {
        Some(part) => part,
        None => beyond(),
    }
}

#[cold]
fn beyond() -> ! {
    panic!("an input ends before the sum does")
}

/// The few sums before the first and after the last whole quad.
#[inline(always)]
fn edge<I: Isa>(out: &mut [f32], at: usize, start: Start<'_>, inputs: &[Input<'_>]) {
    for (i, out) in out.iter_mut().enumerate() {
        let mut sum = match start {
            Start::Zero => 0.0,
            Start::Base(base) => base[at + i],
            Start::Itself => *out,
        };
        for input in inputs {
            let x = element(input.bytes, input.dtype, at + i);
            sum = if I::FUSED { x.mul_add(input.factor, sum) } else { x * input.factor + sum };
        }
        *out = sum;
    }
}

fn element(bytes: &[u8], dtype: Dtype, i: usize) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes(*part(bytes, i * 4)),
        Dtype::F16 => half::f16::from_le_bytes(*part(bytes, i * 2)).to_f32_const(),
        Dtype::Bf16 => half::bf16::from_le_bytes(*part(bytes, i * 2)).to_f32_const(),
    }
}
