//! The calls of `bpf(2)` that aya keeps to itself, or cannot make: links as plain descriptors, an iterator over one map.
#![expect(unsafe_code, reason = "rustix has no bpf(2)")]

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

const RAW_TRACEPOINT_OPEN: u32 = 17;
const LINK_CREATE: u32 = 28;
const ITER_CREATE: u32 = 33;
const TRACE_ITER: u32 = 28;

/// Attaches a program to the tracepoint for which it was loaded, as long as the descriptor lives.
pub(super) fn attach(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // name: u64, prog_fd: u32, reserved: u32
    bpf(RAW_TRACEPOINT_OPEN, &[0, 0, number(program), 0])
}

/// An iterator over all sockets with a value in this map; [`iterate`] runs it.
pub(super) fn iterator(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // union bpf_iter_link_info: map.map_fd is its first word
    let info = [number(map)];
    let at = ((&raw const info).addr() as u64).to_ne_bytes();
    let [a, b, c, d, e, f, g, h] = at;
    let halves = [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])];
    // prog_fd, target_fd, attach_type, flags, iter_info: u64, iter_info_len
    bpf(LINK_CREATE, &[number(program), 0, TRACE_ITER, 0, halves[0], halves[1], 4])
}

/// One run over all: it happens as the descriptor is read.
pub(super) fn iterate(iterator: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // link_fd, flags
    bpf(ITER_CREATE, &[number(iterator), 0])
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn bpf(command: u32, attributes: &[u32]) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as many bytes of attributes as it is told, and for these commands writes none; what they point to
    // lives in the caller's frame.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: these commands return a new descriptor, which is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
