//! What x86-64 adds: AVX2 and AVX-512.

use std::{
    arch::{is_x86_feature_detected as has, x86_64::*},
    array::from_fn,
};

use crate::kernel::{Isa, QUAD, Quad};

/// AVX2, FMA and F16C: every x86-64 server since 2015.
#[derive(Debug)]
pub(crate) struct Avx2;

/// AVX-512 as Skylake servers and Zen 4 have it.
#[derive(Debug)]
pub(crate) struct Avx512;

pub(crate) fn has_avx2() -> bool {
    has!("avx2") && has!("fma") && has!("f16c")
}

pub(crate) fn has_avx512() -> bool {
    has_avx2() && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")
}

/// Writes an instruction set down: a quad is `$count` registers of `$lanes` floats.
///
/// The instructions are there whenever the methods run: the loops are instantiated with these types only in functions that have them enabled,
/// which run only where they were detected (`kernels!`). Every access is to an array borrowed from the caller, cut into pieces of exactly one register.
macro_rules! isa {
    ($isa:ident, $count:literal x $register:ty, $lanes:literal floats, load $load:ident, store $store:ident, stream $stream:ident,
     splat $splat:ident, fused $fused:ident, halves $load_halves:ident, widen $widen:ident, extend $extend:ident, shift $shift:ident, cast $cast:ident,
     narrow $narrow:ident, store halves $store_halves:ident) => {
        impl Isa for $isa {
            type Lanes = [$register; $count];
            const FUSED: bool = true;

            #[inline(always)]
            fn load(x: &[f32; QUAD]) -> Self::Lanes {
                let x = x.as_chunks::<$lanes>().0;
                // SAFETY: `x[i]` is one readable register; an unaligned load.
                from_fn(|i| unsafe { $load(x[i].as_ptr()) })
            }

            #[inline(always)]
            fn load_f32(x: &[u8; QUAD * 4]) -> Self::Lanes {
                let x = x.as_chunks::<{ $lanes * 4 }>().0;
                // SAFETY: `x[i]` is one readable register; an unaligned load.
                from_fn(|i| unsafe { $load(x[i].as_ptr().cast()) })
            }

            #[inline(always)]
            fn load_f16(x: &[u8; QUAD * 2]) -> Self::Lanes {
                let x = x.as_chunks::<{ $lanes * 2 }>().0;
                from_fn(|i| {
                    // SAFETY: `x[i]` is one readable half register; an unaligned load.
                    let x = unsafe { $load_halves(x[i].as_ptr().cast()) };
                    // SAFETY: on registers only.
                    unsafe { $widen(x) }
                })
            }

            #[inline(always)]
            fn load_bf16(x: &[u8; QUAD * 2]) -> Self::Lanes {
                let x = x.as_chunks::<{ $lanes * 2 }>().0;
                from_fn(|i| {
                    // SAFETY: `x[i]` is one readable half register; an unaligned load.
                    let x = unsafe { $load_halves(x[i].as_ptr().cast()) };
                    // SAFETY: on registers only.
                    let x = unsafe { $extend(x) };
                    // SAFETY: on registers only.
                    let x = unsafe { $shift::<16>(x) };
                    // SAFETY: on registers only.
                    unsafe { $cast(x) }
                })
            }

            #[inline(always)]
            fn multiply_add(x: Self::Lanes, factor: f32, sum: Self::Lanes) -> Self::Lanes {
                // SAFETY: on registers only.
                let factor = unsafe { $splat(factor) };
                // SAFETY: on registers only.
                from_fn(|i| unsafe { $fused(x[i], factor, sum[i]) })
            }

            #[inline(always)]
            fn store(out: &mut Quad, x: Self::Lanes) {
                for (out, x) in out.0.as_chunks_mut::<$lanes>().0.iter_mut().zip(x) {
                    // SAFETY: `out` is one writable register, and aligned as part of a quad.
                    unsafe { $store(out.as_mut_ptr(), x) };
                }
            }

            #[inline(always)]
            fn stream(out: &mut Quad, x: Self::Lanes) {
                for (out, x) in out.0.as_chunks_mut::<$lanes>().0.iter_mut().zip(x) {
                    // SAFETY: `out` is one writable register, and aligned as part of a quad.
                    unsafe { $stream(out.as_mut_ptr(), x) };
                }
            }

            #[inline(always)]
            fn fence() {
                // SAFETY: orders stores, touches nothing.
                unsafe { _mm_sfence() };
            }

            #[inline(always)]
            fn narrow_f16(x: &[f32; QUAD]) -> [u8; QUAD * 2] {
                let mut out = [0; QUAD * 2];
                for (out, x) in out.as_chunks_mut::<{ $lanes * 2 }>().0.iter_mut().zip(Self::load(x)) {
                    // SAFETY: on registers only.
                    let x = unsafe { $narrow::<_MM_FROUND_TO_NEAREST_INT>(x) };
                    // SAFETY: `out` is one writable half register; an unaligned store.
                    unsafe { $store_halves(out.as_mut_ptr().cast(), x) };
                }
                out
            }
        }
    };
}

isa!(
    Avx2, 8 x __m256, 8 floats, load _mm256_loadu_ps, store _mm256_store_ps, stream _mm256_stream_ps,
    splat _mm256_set1_ps, fused _mm256_fmadd_ps, halves _mm_loadu_si128, widen _mm256_cvtph_ps, extend _mm256_cvtepu16_epi32,
    shift _mm256_slli_epi32, cast _mm256_castsi256_ps, narrow _mm256_cvtps_ph, store halves _mm_storeu_si128
);

isa!(
    Avx512, 4 x __m512, 16 floats, load _mm512_loadu_ps, store _mm512_store_ps, stream _mm512_stream_ps,
    splat _mm512_set1_ps, fused _mm512_fmadd_ps, halves _mm256_loadu_si256, widen _mm512_cvtph_ps, extend _mm512_cvtepu16_epi32,
    shift _mm512_slli_epi32, cast _mm512_castsi512_ps, narrow _mm512_cvtps_ph, store halves _mm256_storeu_si256
);
