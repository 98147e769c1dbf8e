//! Reproducible sums: integers, so that neither order nor tree nor instruction set shows in the result.

use crate::{
    FIXED_LIMIT, FixedInput, Overflow,
    finite::stream,
    float::{STREAM_FROM, widen},
    kernel::{BLOCK, Block, Isa},
    views::{bytes_of, bytes_of_mut},
};

/// 1.5 * 2^52: from 2^52 to 2^53 an `f64` counts in ones, so adding this rounds to an integer, ties to even, and leaves it in the low bits.
const TO_INTEGER: f64 = 6_755_399_441_055_744.0;

#[inline(always)]
pub(crate) fn fold<I: Isa>(
    out: &mut [i64],
    base: Option<&[i64]>,
    inputs: &[FixedInput<'_>],
    scale: f64,
) -> Result<(), Overflow> {
    check_lengths(out.len(), base, inputs);
    let past_caches = size_of_val(out) >= STREAM_FROM;
    let (mut wide, mut sums) = (Block::default(), [0; BLOCK]);
    for (i, out) in out.chunks_mut(BLOCK).enumerate() {
        let at = i * BLOCK;
        let sums = &mut sums[..out.len()];
        match base {
            Some(base) => sums.copy_from_slice(&base[at..at + sums.len()]),
            None => sums.fill(0),
        }
        for input in inputs {
            match input {
                FixedInput::Float { bytes, dtype, weight } => {
                    let wide = &mut wide.0[..sums.len()];
                    widen::<I>(wide, bytes, *dtype, at);
                    add_floats(sums, wide, weight * scale)?;
                }
                FixedInput::Partial(partial) => add_integers(sums, &partial[at..])?,
            }
        }
        if past_caches { stream::<I>(bytes_of_mut(out), bytes_of(sums)) } else { out.copy_from_slice(sums) }
    }
    I::fence();
    Ok(())
}

#[inline(always)]
fn add_floats(sums: &mut [i64], x: &[f32], factor: f64) -> Result<(), Overflow> {
    let (mut sign, mut beyond) = (0, 0_i64);
    for (sum, x) in sums.iter_mut().zip(x) {
        let product = f64::from(*x) * factor;
        // As integers: the bits of magnitudes are ordered like them, and infinity and what is not a number come last.
        beyond |= i64::from(product.abs().to_bits() > FIXED_LIMIT.to_bits());
        let integer = (product + TO_INTEGER).to_bits().wrapping_sub(TO_INTEGER.to_bits()).cast_signed();
        add(sum, integer, &mut sign);
    }
    if sign < 0 || beyond != 0 { Err(Overflow) } else { Ok(()) }
}

#[inline(always)]
fn add_integers(sums: &mut [i64], x: &[i64]) -> Result<(), Overflow> {
    let mut sign = 0;
    for (sum, x) in sums.iter_mut().zip(x) {
        add(sum, *x, &mut sign);
    }
    if sign < 0 { Err(Overflow) } else { Ok(()) }
}

/// `sign` becomes negative when a sum overflows: its sign is neither summand's.
#[inline(always)]
fn add(sum: &mut i64, x: i64, sign: &mut i64) {
    let next = sum.wrapping_add(x);
    *sign |= (*sum ^ next) & (x ^ next);
    *sum = next;
}

fn check_lengths(sums: usize, base: Option<&[i64]>, inputs: &[FixedInput<'_>]) {
    assert!(base.is_none_or(|base| base.len() == sums), "the base has another length than the sum");
    for input in inputs {
        let len = match input {
            FixedInput::Float { bytes, dtype, .. } => {
                assert!(bytes.len().is_multiple_of(dtype.size()), "bytes are not a whole number of elements");
                bytes.len() / dtype.size()
            }
            FixedInput::Partial(partial) => partial.len(),
        };
        assert_eq!(len, sums, "an input has another length than the sum");
    }
}
