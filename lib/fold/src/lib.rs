//! The arithmetic of aggregation: weighted sums, the division that ends them, and the finite check.
//!
//! ```text
//! update bytes --copy_finite--> slot --fold_f32 / fold_i64--> partial sum --scale_f32 / scale_i64--> model bytes
//! ```
//!
//! **How it is made fast.** Memory is the limit, not arithmetic: every kernel reads each input once and writes its result once, past the
//! caches where it would not fit them anyway, and a fold walks several pages side by side so that more reads are under way. The
//! `f32` sums are written in the few operations of an instruction set ([`Kernel`] tells which there are); everything else is plain loops,
//! compiled once for each. One update at a time costs two reads per element, the sum's and the update's, so it cannot reach the rate of a
//! copy; ten in one pass exceed it. Who has several inputs folds them together.
//!
//! **What is exact.** The `f32` sums round once per input (once, not twice, where the processor has fused multiply-add), so
//! two instruction sets may differ in the last bit. The fixed-point sums are integers and identical on every path, for any
//! order and any tree: each product is rounded to an integer by itself, before it meets the others.
//!
//! **Untrusted inputs.** The bytes of an [`Input`] may lie in memory that another process can still write. Each is read once, no value of
//! theirs steers an index or a branch that guards memory, and every bit pattern is a number: a liar spoils its own
//! contribution, nothing else.
#![expect(
    unsafe_code,
    reason = "calls into code compiled for a detected instruction set, its intrinsics, and aligned views of bytes"
)]

mod finite;
mod fixed;
mod float;
mod kernel;
mod scale;
#[cfg(test)]
mod tests;
mod views;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use kernel::Kernel;
pub use views::{as_f32, as_f32_mut, as_i64, as_i64_mut};

/// Type of the elements of an update or a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32 = 1,
    /// IEEE 754 half precision.
    F16 = 2,
    /// The upper half of an `f32`.
    Bf16 = 3,
}

/// One summand of [`fold_f32`]: `factor * x`.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The elements, little-endian, at any alignment; as many as the sum has.
    pub bytes: &'a [u8],
    /// Type of the elements.
    pub dtype: Dtype,
    /// Weight of an update; 1 for a partial sum.
    pub factor: f32,
}

/// One summand of [`fold_i64`].
#[derive(Clone, Copy, Debug)]
pub enum FixedInput<'a> {
    /// An update: contributes `round_ties_even(x * (weight * scale))`. A negative weight takes the same update out again, exactly.
    Float {
        /// The elements, little-endian, at any alignment; as many as the sum has.
        bytes: &'a [u8],
        /// Type of the elements.
        dtype: Dtype,
        /// Weight of the update.
        weight: f64,
    },
    /// A partial sum: contributes as it is.
    Partial(&'a [i64]),
}

/// A product beyond [`FIXED_LIMIT`], or a sum beyond `i64`: the sum is void, whatever its memory holds.
///
/// The scale and the weights are bounded at admission so that this cannot happen; it is found nevertheless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overflow;

/// Largest magnitude of one fixed-point product `x * weight * scale`, inclusive: 2^51.
///
/// Up to here an addition in `f64` rounds to an integer in one step and alike on every processor, and 4,095 inputs at the limit fit a sum.
/// A caller who knows `|x * weight| <= b` for all inputs chooses the scale `2^51 / b`, rounded down to a power of two.
pub const FIXED_LIMIT: f64 = 2_251_799_813_685_248.0;

/// `out[i] = base[i] + sum_k factor_k * x_k[i]` in one pass; `base` counts as zero when there is none.
///
/// # Panics
/// If a length does not match that of `out`.
pub fn fold_f32(out: &mut [f32], base: Option<&[f32]>, inputs: &[Input<'_>]) {
    Kernel::best().fold_f32(out, base, inputs);
}

/// [`fold_f32`] that also tells whether all sums are finite: with a finite base and finite factors, whether all inputs were, and
/// no sum grew beyond `f32`. One look per sum, not per input, while it is in a register.
///
/// # Errors
/// Index of the first sum that is infinite or not a number; `out` is complete all the same, and [`first_non_finite`] tells whose
/// fault it is.
///
/// # Panics
/// If a length does not match that of `out`.
pub fn fold_finite_f32(out: &mut [f32], base: Option<&[f32]>, inputs: &[Input<'_>]) -> Result<(), usize> {
    Kernel::best().fold_finite_f32(out, base, inputs)
}

/// `acc[i] += sum_k factor_k * x_k[i]`, in place.
///
/// # Panics
/// If a length does not match that of `acc`.
pub fn add_f32(acc: &mut [f32], inputs: &[Input<'_>]) {
    Kernel::best().add_f32(acc, inputs);
}

/// `out[i] = base[i] + sum_k round_ties_even(x_k[i] * (weight_k * scale))`, partial sums added as they are.
///
/// # Errors
/// [`Overflow`] if a product leaves [`FIXED_LIMIT`] (a non-finite one does) or a sum leaves `i64`; `out` is void then.
///
/// # Panics
/// If a length does not match that of `out`.
pub fn fold_i64(out: &mut [i64], base: Option<&[i64]>, inputs: &[FixedInput<'_>], scale: f64) -> Result<(), Overflow> {
    Kernel::best().fold_i64(out, base, inputs, scale)
}

/// `out[i] = base[i] + sum[i] * factor`, computed in `f64`, written as `dtype`; `factor` is `1 / W`.
///
/// Rounds to `f32` first and from there to the narrower types.
///
/// # Panics
/// If a length does not match that of `sum`.
pub fn scale_f32(out: &mut [u8], dtype: Dtype, sum: &[f32], factor: f64, base: Option<(&[u8], Dtype)>) {
    Kernel::best().scale_f32(out, dtype, sum, factor, base);
}

/// `out[i] = base[i] + sum[i] / (scale * weight)`, computed in `f64`, written as `dtype`; identical bits on every path.
///
/// Rounds to `f32` first and from there to the narrower types.
///
/// # Panics
/// If a length does not match that of `sum`.
pub fn scale_i64(out: &mut [u8], dtype: Dtype, sum: &[i64], scale: f64, weight: f64, base: Option<(&[u8], Dtype)>) {
    Kernel::best().scale_i64(out, dtype, sum, scale, weight, base);
}

/// Index of the first element that is infinite or not a number.
///
/// # Panics
/// If the length of `bytes` is not a multiple of the element's.
#[must_use]
pub fn first_non_finite(bytes: &[u8], dtype: Dtype) -> Option<usize> {
    Kernel::best().first_non_finite(bytes, dtype)
}

/// Checks `src` and copies it to `dst`, block by block while it is in the cache; from 4 KiB on past the caches, for a reader that comes later.
///
/// `src` is read twice and must be the caller's own: a buffer that was received into.
///
/// # Errors
/// Index of the first element that is infinite or not a number; its block and what follows are not copied.
///
/// # Panics
/// If the lengths differ or are not a multiple of the element's.
pub fn copy_finite(dst: &mut [u8], src: &[u8], dtype: Dtype) -> Result<(), usize> {
    Kernel::best().copy_finite(dst, src, dtype)
}

// === impl Dtype ===

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Reads the number that stands in an object's header.
    #[must_use]
    pub const fn from_u32(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::F32,
            2 => Self::F16,
            3 => Self::Bf16,
            _ => return None,
        })
    }
}

// === impl Overflow ===

impl std::fmt::Display for Overflow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a fixed-point sum overflows: an update or a weight exceeds the bound the job's scale was made for")
    }
}

impl std::error::Error for Overflow {}
