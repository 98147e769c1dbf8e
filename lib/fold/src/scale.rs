//! The division that turns a sum into a model.

use crate::{
    Dtype,
    finite::stream,
    float::{STREAM_FROM, widen},
    kernel::{BLOCK, Block, Isa, QUAD},
};

#[inline(always)]
pub(crate) fn from_f32<I: Isa>(out: &mut [u8], dtype: Dtype, sum: &[f32], factor: f64, base: Option<(&[u8], Dtype)>) {
    divide::<I, _>(out, dtype, sum, base, |sum| f64::from(sum) * factor);
}

#[inline(always)]
#[expect(clippy::cast_precision_loss, reason = "a sum beyond 2^53 is rounded to 53 bits, the model has 24")]
pub(crate) fn from_i64<I: Isa>(
    out: &mut [u8],
    dtype: Dtype,
    sum: &[i64],
    scale: f64,
    weight: f64,
    base: Option<(&[u8], Dtype)>,
) {
    let divisor = scale * weight;
    divide::<I, _>(out, dtype, sum, base, |sum| sum as f64 / divisor);
}

#[inline(always)]
fn divide<I: Isa, T: Copy>(
    out: &mut [u8],
    dtype: Dtype,
    sum: &[T],
    base: Option<(&[u8], Dtype)>,
    mean: impl Fn(T) -> f64,
) {
    assert_eq!(out.len(), sum.len() * dtype.size(), "the model has another length than the sum");
    if let Some((bytes, dtype)) = base {
        assert_eq!(bytes.len(), sum.len() * dtype.size(), "the base has another length than the sum");
    }
    let past_caches = out.len() >= STREAM_FROM;
    let (mut model, mut bytes) = (Block::default(), [0; BLOCK * 4]);
    for (i, (out, sum)) in out.chunks_mut(BLOCK * dtype.size()).zip(sum.chunks(BLOCK)).enumerate() {
        let model = &mut model.0[..sum.len()];
        if let Some((bytes, dtype)) = base {
            widen::<I>(model, bytes, dtype, i * BLOCK);
            for (model, sum) in model.iter_mut().zip(sum) {
                *model = to_f32(f64::from(*model) + mean(*sum));
            }
        } else {
            for (model, sum) in model.iter_mut().zip(sum) {
                *model = to_f32(mean(*sum));
            }
        }
        if past_caches {
            let bytes = &mut bytes[..out.len()];
            narrow::<I>(bytes, dtype, model);
            stream::<I>(out, bytes);
        } else {
            narrow::<I>(out, dtype, model);
        }
    }
    I::fence();
}

#[inline(always)]
fn narrow<I: Isa>(out: &mut [u8], dtype: Dtype, model: &[f32]) {
    match dtype {
        Dtype::F32 => {
            for (out, x) in out.as_chunks_mut().0.iter_mut().zip(model) {
                *out = x.to_le_bytes();
            }
        }
        Dtype::Bf16 => {
            for (out, x) in out.as_chunks_mut().0.iter_mut().zip(model) {
                *out = narrow_bf16(*x).to_le_bytes();
            }
        }
        Dtype::F16 => {
            for (out, x) in out.chunks_mut(QUAD * 2).zip(model.chunks(QUAD)) {
                let mut quad = [0.0; QUAD];
                quad[..x.len()].copy_from_slice(x);
                out.copy_from_slice(&I::narrow_f16(&quad)[..out.len()]);
            }
        }
    }
}

/// The upper half of an `f32`, ties to even; without a branch, so that it becomes vectors.
#[inline(always)]
fn narrow_bf16(x: f32) -> u16 {
    const QUIET: u32 = 1 << 22;
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    upper_half(if x.is_nan() { bits | QUIET } else { rounded })
}

#[inline(always)]
fn upper_half(bits: u32) -> u16 {
    (bits >> 16) as u16
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "rounding to the model's precision is the purpose")]
fn to_f32(x: f64) -> f32 {
    x as f32
}
