//! The finite check.

use crate::{Dtype, kernel::Isa, views::quads_of_bytes};

/// Bytes that are checked at once: a quarter of a first-level cache.
const BLOCK: usize = 8192;

/// Chunks from here on are copied past the caches: they are parts of an update that is folded when it is complete, by another
/// processor. It halves the time of a copy, since no line of the destination is first read in vain.
const STREAM_FROM: usize = 4096;

#[inline(always)]
pub(crate) fn first<I: Isa>(bytes: &[u8], dtype: Dtype) -> Option<usize> {
    assert!(bytes.len().is_multiple_of(dtype.size()), "bytes are not a whole number of elements");
    let (i, block) = bytes.chunks(BLOCK).enumerate().find(|(_, block)| !is_finite(block, dtype))?;
    Some(i * (BLOCK / dtype.size()) + first_in(block, dtype))
}

#[inline(always)]
pub(crate) fn copy<I: Isa>(dst: &mut [u8], src: &[u8], dtype: Dtype) -> Result<(), usize> {
    assert_eq!(dst.len(), src.len(), "source and destination differ in length");
    assert!(src.len().is_multiple_of(dtype.size()), "bytes are not a whole number of elements");
    let past_caches = src.len() >= STREAM_FROM;
    for (i, (dst, src)) in dst.chunks_mut(BLOCK).zip(src.chunks(BLOCK)).enumerate() {
        if !is_finite(src, dtype) {
            return Err(i * (BLOCK / dtype.size()) + first_in(src, dtype));
        }
        if past_caches { stream::<I>(dst, src) } else { dst.copy_from_slice(src) }
    }
    I::fence();
    Ok(())
}

/// Copies whole quads past the caches, what juts out through them; the caller fences.
#[inline(always)]
pub(crate) fn stream<I: Isa>(dst: &mut [u8], src: &[u8]) {
    let (head, body, tail) = quads_of_bytes(dst);
    let (first, last) = (head.len(), head.len() + size_of_val(body));
    head.copy_from_slice(&src[..first]);
    for (quad, src) in body.iter_mut().zip(src[first..last].as_chunks().0) {
        I::stream(quad, I::load_f32(src));
    }
    tail.copy_from_slice(&src[last..]);
}

/// Without its sign, an element is not finite exactly if its bits as an integer reach those of infinity: one maximum tells it of a block.
#[inline(always)]
fn is_finite(block: &[u8], dtype: Dtype) -> bool {
    match dtype {
        Dtype::F32 => {
            block.as_chunks().0.iter().fold(0, |max, x| max.max(i32::from_le_bytes(*x) & i32::MAX)) < 0x7f80_0000
        }
        Dtype::F16 => largest(block) < 0x7c00,
        Dtype::Bf16 => largest(block) < 0x7f80,
    }
}

#[inline(always)]
fn largest(block: &[u8]) -> i16 {
    block.as_chunks().0.iter().fold(0, |max, x| max.max(i16::from_le_bytes(*x) & i16::MAX))
}

#[cold]
fn first_in(block: &[u8], dtype: Dtype) -> usize {
    block.chunks_exact(dtype.size()).position(|x| !is_finite(x, dtype)).unwrap_or(0)
}
