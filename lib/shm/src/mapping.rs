//! Memory shared with other processes: the unsafe code of this crate, but for the one promise that `segment.rs` makes.
//!
//! JUSTIFICATION: a mapping of a memfd is memory that no Rust type can describe, for another process may write it.
//! [`Mapping`] bounds every access by the mapped length, which seals keep backed by pages: no access can fault. Headers are
//! only touched as atomic words, for which concurrent writes are defined. Payload bytes are handed out as slices; that a
//! dishonest writer may change them while they are read is the documented contract of the reader: the result of such a
//! sum is the liar's own garbage, and no length, offset or pointer is ever taken from payload bytes.
#![expect(unsafe_code, reason = "memory shared between processes")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use memmap2::{MmapOptions, MmapRaw};
use rustix::{
    fs::{MemfdFlags, SealFlags},
    io::Errno,
    mm::Advice,
};

use crate::seqlock::Word;

const PAGE: usize = 4096;

/// Seals without which nothing is mapped: the size is fixed and nobody can remove that.
pub(crate) const FIXED_SIZE: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);
/// Seals of a segment: besides, only mappings made before sealing can write.
pub(crate) const SINGLE_WRITER: SealFlags = FIXED_SIZE.union(SealFlags::FUTURE_WRITE);

/// A shared mapping of a whole memfd; unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    raw: MmapRaw,
    writable: bool,
}

/// One atomic word of a mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At<'a> {
    pub(crate) mapping: &'a Mapping,
    pub(crate) at: usize,
}

/// Bytes of a mapping that only their owner touches in this process.
#[derive(Debug)]
pub(crate) struct Exclusive {
    mapping: Arc<Mapping>,
    at: usize,
    len: usize,
}

/// Makes a memfd of `len` bytes that can be sealed and never executed.
pub(crate) fn memfd(name: &str, len: usize) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3 do not know the flag.
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags)?,
        other => other?,
    };
    rustix::fs::ftruncate(&fd, len as u64)?;
    Ok(fd)
}

/// Adds `seals` to a memfd.
pub(crate) fn seal(fd: impl AsFd, seals: SealFlags) -> io::Result<()> {
    Ok(rustix::fs::fcntl_add_seals(fd, seals)?)
}

/// The seals of a file; a file that cannot have any has none.
pub(crate) fn seals(fd: impl AsFd) -> io::Result<SealFlags> {
    match rustix::fs::fcntl_get_seals(fd) {
        Err(Errno::INVAL) => Ok(SealFlags::empty()),
        other => Ok(other?),
    }
}

/// Size of a file and the bytes of it that have pages.
pub(crate) fn size(fd: impl AsFd) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
    Ok((size, blocks.saturating_mul(512)))
}

// === impl Mapping ===

impl Mapping {
    /// Maps `len` bytes for reading and writing.
    pub(crate) fn read_write(fd: impl AsFd, len: usize) -> io::Result<Self> {
        let raw = MmapOptions::new().len(len).map_raw(fd.as_fd().as_raw_fd())?;
        Ok(Self { raw, writable: true })
    }

    /// Maps `len` bytes for reading. The caller has seen the seals, then the size.
    pub(crate) fn read_only(fd: impl AsFd, len: usize) -> io::Result<Self> {
        let raw = MmapOptions::new().len(len).map_raw_read_only(fd.as_fd().as_raw_fd())?;
        Ok(Self { raw, writable: false })
    }

    pub(crate) fn len(&self) -> usize {
        self.raw.len()
    }

    /// Takes all pages now, charged to this process. Without memory for them this is an error here, not a signal later.
    pub(crate) fn populate(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping, whole; populating changes no byte.
        let done =
            unsafe { rustix::mm::madvise(self.raw.as_mut_ptr().cast(), self.raw.len(), Advice::LinuxPopulateWrite) };
        match done {
            // Kernels before 5.14 do not know the advice. The file is new: every byte is zero.
            Err(Errno::INVAL) => {
                for at in (0..self.len()).step_by(PAGE) {
                    self.store(at, 0, Ordering::Relaxed);
                }
                Ok(())
            }
            other => Ok(other?),
        }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at < self.len() && self.len() - at >= 8, "word {at} is outside the mapping");
        // SAFETY: within the mapping, as asserted.
        let word = unsafe { self.raw.as_ptr().add(at) };
        // SAFETY: mappings start on a page, so the word is aligned; it lives as long as the mapping, which `self` borrows;
        // this process touches header words as atomics only. A read-only mapping is never stored to (see `store`), and
        // 64-bit atomic loads of read-only memory are plain loads.
        unsafe { &*word.cast::<AtomicU64>() }
    }

    pub(crate) fn load(&self, at: usize, order: Ordering) -> u64 {
        self.word(at).load(order)
    }

    pub(crate) fn store(&self, at: usize, value: u64, order: Ordering) {
        assert!(self.writable, "a reader's mapping is not written");
        self.word(at).store(value, order);
    }

    /// Bytes of a payload. Another process may change them while the slice lives; see the head of this module.
    pub(crate) fn bytes(&self, at: usize, len: usize) -> &[u8] {
        assert!(at <= self.len() && len <= self.len() - at, "bytes {at}+{len} are outside the mapping");
        // SAFETY: within the mapping, as asserted.
        let start = unsafe { self.raw.as_ptr().add(at) };
        // SAFETY: mapped and backed by pages as long as `self` is borrowed. In this process payload bytes are written
        // through `Exclusive` only, before the object exists that reads them here.
        unsafe { std::slice::from_raw_parts(start, len) }
    }
}

// === impl At ===

impl Word for At<'_> {
    fn load(&self, order: Ordering) -> u64 {
        self.mapping.load(self.at, order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.mapping.store(self.at, value, order);
    }

    fn fence(order: Ordering) {
        std::sync::atomic::fence(order);
    }
}

// === impl Exclusive ===

impl Exclusive {
    /// Bytes `at..at + len` of a mapping this process can write.
    ///
    /// # Safety
    /// Until it is dropped nobody else in this process touches these bytes.
    pub(crate) unsafe fn new(mapping: Arc<Mapping>, at: usize, len: usize) -> Self {
        assert!(mapping.writable && at <= mapping.len() && len <= mapping.len() - at);
        assert!(at.is_multiple_of(PAGE) && len.is_multiple_of(PAGE));
        Self { mapping, at, len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.mapping.bytes(self.at, self.len)
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: within the mapping, asserted by `new`.
        let start = unsafe { self.mapping.raw.as_mut_ptr().add(self.at) };
        // SAFETY: writable and in bounds, asserted by `new`; nobody else touches these bytes, promised to `new`.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }

    pub(crate) fn f32_mut(&mut self) -> &mut [f32] {
        let bytes = self.bytes_mut();
        // SAFETY: every bit pattern is an f32 and every f32 is bytes.
        let (_, middle, _) = unsafe { bytes.align_to_mut::<f32>() };
        middle
    }

    pub(crate) fn i64_mut(&mut self) -> &mut [i64] {
        let bytes = self.bytes_mut();
        // SAFETY: every bit pattern is an i64 and every i64 is bytes.
        let (_, middle, _) = unsafe { bytes.align_to_mut::<i64>() };
        middle
    }
}

/// `bytes` as 32-bit floats; `bytes` starts on a multiple of 64 and holds whole elements.
pub(crate) fn as_f32(bytes: &[u8]) -> &[f32] {
    // SAFETY: every bit pattern is an f32.
    unsafe { bytes.align_to::<f32>() }.1
}

/// `bytes` as 64-bit integers; `bytes` starts on a multiple of 64 and holds whole elements.
pub(crate) fn as_i64(bytes: &[u8]) -> &[i64] {
    // SAFETY: every bit pattern is an i64.
    unsafe { bytes.align_to::<i64>() }.1
}

/// `bytes` as 16-bit words (the bits of f16 or bf16); `bytes` starts on a multiple of 64 and holds whole elements.
pub(crate) fn as_u16(bytes: &[u8]) -> &[u16] {
    // SAFETY: every bit pattern is a u16.
    unsafe { bytes.align_to::<u16>() }.1
}
