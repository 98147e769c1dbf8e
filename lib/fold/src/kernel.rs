//! Which instruction set runs: detected once, or forced.

use std::sync::OnceLock;

use crate::{Dtype, FixedInput, Input, Overflow, finite, fixed, float, scale};

/// The kernels compiled for one instruction set that this processor has.
///
/// The free functions of this crate use [`Kernel::best`]; tests and benches go through [`Kernel::all`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel(Path);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Elements that a loop handles at once.
pub(crate) const QUAD: usize = 64;

/// Four cache lines of sums.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Quad(pub(crate) [f32; QUAD]);

/// An instruction set: what the loops are written in.
pub(crate) trait Isa {
    /// A quad in registers.
    type Lanes: Copy;
    /// Multiply-add in one rounding is an instruction, not a call.
    const FUSED: bool;

    fn load(x: &[f32; QUAD]) -> Self::Lanes;
    fn load_f32(x: &[u8; QUAD * 4]) -> Self::Lanes;
    fn load_f16(x: &[u8; QUAD * 2]) -> Self::Lanes;
    fn load_bf16(x: &[u8; QUAD * 2]) -> Self::Lanes;
    fn multiply_add(x: Self::Lanes, factor: f32, sum: Self::Lanes) -> Self::Lanes;

    fn store(out: &mut Quad, x: Self::Lanes);
    fn narrow_f16(x: &[f32; QUAD]) -> [u8; QUAD * 2];

    /// Stores past the caches, if there is a way.
    fn stream(out: &mut Quad, x: Self::Lanes) {
        Self::store(out, x);
    }

    /// Orders all that [`Isa::stream`] wrote before whatever is written next.
    fn fence() {}
}

/// Elements of a block that a loop keeps in the first-level cache between its steps.
pub(crate) const BLOCK: usize = 4 * QUAD;

/// A block of floats, aligned like the quads in it.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Block(pub(crate) [f32; BLOCK]);

/// What every Rust target can do.
#[derive(Debug)]
pub(crate) struct Portable;

/// Makes methods of [`Kernel`] from generic loops: each is compiled once per instruction set and the kernel's one is called.
///
/// The loops are `inline(always)`: a function that the compiler kept apart would be compiled without the instruction set.
macro_rules! kernels {
    ($($(#[$meta:meta])* $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $module:ident::$loop:ident;)*) => {
        impl Kernel {$(
            $(#[$meta])*
            pub fn $name(self, $($arg: $type),*) $(-> $out)? {
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $type),*) $(-> $out)? {
                    $module::$loop::<crate::x86::Avx2>($($arg),*)
                }
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $type),*) $(-> $out)? {
                    $module::$loop::<crate::x86::Avx512>($($arg),*)
                }
                match self.0 {
                    Path::Portable => $module::$loop::<Portable>($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: this variant is only made after the processor was found to have these instructions.
                    Path::Avx2 => unsafe { avx2($($arg),*) },
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: this variant is only made after the processor was found to have these instructions.
                    Path::Avx512 => unsafe { avx512($($arg),*) },
                }
            }
        )*}
    };
}

kernels! {
    /// See [`crate::fold_f32`].
    ///
    /// # Panics
    /// As there.
    fold_f32(out: &mut [f32], base: Option<&[f32]>, inputs: &[Input<'_>]) = float::fold;

    /// See [`crate::fold_finite_f32`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    fold_finite_f32(out: &mut [f32], base: Option<&[f32]>, inputs: &[Input<'_>]) -> Result<(), usize> = float::fold_finite;

    /// See [`crate::add_f32`].
    ///
    /// # Panics
    /// As there.
    add_f32(acc: &mut [f32], inputs: &[Input<'_>]) = float::add;

    /// See [`crate::fold_i64`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    fold_i64(out: &mut [i64], base: Option<&[i64]>, inputs: &[FixedInput<'_>], scale: f64) -> Result<(), Overflow> = fixed::fold;

    /// See [`crate::scale_f32`].
    ///
    /// # Panics
    /// As there.
    scale_f32(out: &mut [u8], dtype: Dtype, sum: &[f32], factor: f64, base: Option<(&[u8], Dtype)>) = scale::from_f32;

    /// See [`crate::scale_i64`].
    ///
    /// # Panics
    /// As there.
    scale_i64(out: &mut [u8], dtype: Dtype, sum: &[i64], scale: f64, weight: f64, base: Option<(&[u8], Dtype)>) = scale::from_i64;

    /// See [`crate::first_non_finite`].
    ///
    /// # Panics
    /// As there.
    #[must_use]
    first_non_finite(bytes: &[u8], dtype: Dtype) -> Option<usize> = finite::first;

    /// See [`crate::copy_finite`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    copy_finite(dst: &mut [u8], src: &[u8], dtype: Dtype) -> Result<(), usize> = finite::copy;
}

// === impl Kernel ===

impl Kernel {
    /// The one that the free functions use: the widest that this processor has.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<Kernel> = OnceLock::new();
        *BEST.get_or_init(|| Self::avx512().or_else(Self::avx2).unwrap_or_else(Self::portable))
    }

    /// All that this processor can run, narrowest first.
    pub fn all() -> impl Iterator<Item = Self> {
        [Some(Self::portable()), Self::avx2(), Self::avx512()].into_iter().flatten()
    }

    /// The baseline of the compilation target; NEON on arm64.
    #[must_use]
    pub const fn portable() -> Self {
        Self(Path::Portable)
    }

    /// AVX2, FMA and F16C.
    #[must_use]
    pub fn avx2() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if crate::x86::has_avx2() {
            return Some(Self(Path::Avx2));
        }
        None
    }

    /// AVX-512 with F, BW, DQ and VL, besides all of [`Kernel::avx2`].
    #[must_use]
    pub fn avx512() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if crate::x86::has_avx512() {
            return Some(Self(Path::Avx512));
        }
        None
    }

    /// For logs and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self.0 {
            Path::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => "avx512",
        }
    }
}

// === impl Block ===

impl Default for Block {
    fn default() -> Self {
        Self([0.0; BLOCK])
    }
}

// === impl Portable ===

impl Isa for Portable {
    type Lanes = [f32; QUAD];
    // arm64 has it in its baseline; elsewhere it would be a call of the C library per element.
    const FUSED: bool = cfg!(target_arch = "aarch64");

    #[inline(always)]
    fn load(x: &[f32; QUAD]) -> Self::Lanes {
        *x
    }

    #[inline(always)]
    fn load_f32(x: &[u8; QUAD * 4]) -> Self::Lanes {
        from_chunks(x, f32::from_le_bytes)
    }

    #[inline(always)]
    fn load_f16(x: &[u8; QUAD * 2]) -> Self::Lanes {
        from_chunks(x, |x| widen_f16(u16::from_le_bytes(x)))
    }

    #[inline(always)]
    fn load_bf16(x: &[u8; QUAD * 2]) -> Self::Lanes {
        from_chunks(x, |x| f32::from_bits(u32::from(u16::from_le_bytes(x)) << 16))
    }

    #[inline(always)]
    fn multiply_add(x: Self::Lanes, factor: f32, mut sum: Self::Lanes) -> Self::Lanes {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum = if Self::FUSED { x.mul_add(factor, *sum) } else { x * factor + *sum };
        }
        sum
    }

    #[inline(always)]
    fn store(out: &mut Quad, x: Self::Lanes) {
        out.0 = x;
    }

    #[inline(always)]
    fn narrow_f16(x: &[f32; QUAD]) -> [u8; QUAD * 2] {
        let mut out = [0; QUAD * 2];
        for (out, x) in out.as_chunks_mut().0.iter_mut().zip(x) {
            *out = half::f16::from_f32_const(*x).to_le_bytes();
        }
        out
    }
}

#[inline(always)]
fn from_chunks<const N: usize>(bytes: &[u8], element: impl Fn([u8; N]) -> f32) -> [f32; QUAD] {
    let mut out = [0.0; QUAD];
    for (out, x) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = element(*x);
    }
    out
}

/// `f16` to `f32` without a branch, so that it becomes vectors: moved to its place in an `f32` it lacks only the difference of
/// the exponents' biases, 2^112, which a multiplication adds exactly, subnormals included.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    const BIAS: f32 = f32::from_bits((127 + 112) << 23);
    let sign = u32::from(bits & 0x8000) << 16;
    let rest = u32::from(bits & 0x7fff) << 13;
    let special = if rest >= 0x7c00 << 13 { 0xff << 23 } else { 0 };
    f32::from_bits(((f32::from_bits(rest) * BIAS).to_bits() | special) | sign)
}
