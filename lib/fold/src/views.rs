//! Bytes of a slot seen as numbers.

use crate::kernel::Quad;

// The numbers of a slot are little-endian, and so is every machine that these views compile for.
const _: () = assert!(cfg!(target_endian = "little"));

/// The bytes as `f32`; nothing if they are misaligned or not a whole number of elements.
#[must_use]
pub fn as_f32(bytes: &[u8]) -> Option<&[f32]> {
    // SAFETY: every bit pattern is an f32.
    whole(unsafe { bytes.align_to() })
}

/// The bytes as `i64`; nothing if they are misaligned or not a whole number of elements.
#[must_use]
pub fn as_i64(bytes: &[u8]) -> Option<&[i64]> {
    // SAFETY: every bit pattern is an i64.
    whole(unsafe { bytes.align_to() })
}

/// The bytes as `f32` to write; nothing if they are misaligned or not a whole number of elements.
#[must_use]
pub fn as_f32_mut(bytes: &mut [u8]) -> Option<&mut [f32]> {
    // SAFETY: every bit pattern is an f32, and every f32 is four bytes.
    whole_mut(unsafe { bytes.align_to_mut() })
}

/// The bytes as `i64` to write; nothing if they are misaligned or not a whole number of elements.
#[must_use]
pub fn as_i64_mut(bytes: &mut [u8]) -> Option<&mut [i64]> {
    // SAFETY: every bit pattern is an i64, and every i64 is eight bytes.
    whole_mut(unsafe { bytes.align_to_mut() })
}

/// The whole quads among `sums`, and what juts out at either end.
pub(crate) fn quads(sums: &mut [f32]) -> (&mut [f32], &mut [Quad], &mut [f32]) {
    // SAFETY: a quad is 64 floats and nothing else.
    unsafe { sums.align_to_mut() }
}

/// The whole quads among `bytes`, and what juts out at either end.
pub(crate) fn quads_of_bytes(bytes: &mut [u8]) -> (&mut [u8], &mut [Quad], &mut [u8]) {
    // SAFETY: a quad is 256 bytes, every pattern of which is 64 floats.
    unsafe { bytes.align_to_mut() }
}

/// The integers' bytes.
pub(crate) fn bytes_of(integers: &[i64]) -> &[u8] {
    // SAFETY: the same memory, and all of its bytes are written.
    unsafe { std::slice::from_raw_parts(integers.as_ptr().cast(), size_of_val(integers)) }
}

/// The integers' bytes, to write.
pub(crate) fn bytes_of_mut(integers: &mut [i64]) -> &mut [u8] {
    // SAFETY: the same memory, borrowed alone; any eight bytes are an i64.
    unsafe { std::slice::from_raw_parts_mut(integers.as_mut_ptr().cast(), size_of_val(integers)) }
}

fn whole<'a, T>((head, body, tail): (&'a [u8], &'a [T], &'a [u8])) -> Option<&'a [T]> {
    (head.is_empty() && tail.is_empty()).then_some(body)
}

fn whole_mut<'a, T>((head, body, tail): (&'a mut [u8], &'a mut [T], &'a mut [u8])) -> Option<&'a mut [T]> {
    (head.is_empty() && tail.is_empty()).then_some(body)
}
