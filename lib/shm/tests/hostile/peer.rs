//! What the other process does. It knows the layout as well as the store does, and follows none of its rules.

use std::{
    fs::OpenOptions,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use lifl_shm::SegmentReader;
use memmap2::{MmapOptions, MmapRaw};
use rustix::{
    fs::{FallocateFlags, MemfdFlags, SealFlags},
    io::Errno,
    mm::{Advice, MprotectFlags},
};

use crate::{
    CHAIN, ELEMENTS, ID, honest, read_all,
    wire::{receive, send},
};

const FOUR: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL).union(SealFlags::FUTURE_WRITE);

/// Messages that the roles send.
pub(crate) const SEALS: usize = 5;
pub(crate) const SHRINKS: usize = 6;
pub(crate) const WRITES: usize = 8;

pub(crate) fn run(role: &str) {
    let socket = rustix::stdio::stdin();
    match role {
        "half-sealed" => half_sealed(socket),
        "no-memfd" => no_memfd(socket),
        "small" => small(socket),
        "overflow" => overflow(socket),
        "shrink" => shrink(socket),
        "scribble" => scribble(socket),
        "die-mid-write" => die_mid_write(socket),
        "reader" => reader(socket),
        "release" => release(socket),
        other => panic!("no role {other}"),
    }
    // Until this process is killed: what it passed must not depend on its death.
    let _ = receive(socket);
}

/// The bytes of an honest segment with one object of sevens.
fn bytes() -> Vec<u8> {
    let (segment, fd, _) = honest();
    let mut bytes = vec![0; usize::try_from(segment.bytes()).unwrap()];
    assert_eq!(rustix::io::pread(&fd, &mut bytes, 0).unwrap(), bytes.len());
    bytes
}

fn memfd(bytes: &[u8], seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("peer", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    assert_eq!(rustix::io::pwrite(&fd, bytes, 0).unwrap(), bytes.len());
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

/// The same, and the mapping that a hostile writer keeps.
fn kept(bytes: &[u8]) -> (OwnedFd, MmapRaw) {
    let fd = memfd(bytes, SealFlags::empty());
    let map = MmapOptions::new().len(bytes.len()).map_raw(fd.as_raw_fd()).unwrap();
    rustix::fs::fcntl_add_seals(&fd, FOUR).unwrap();
    (fd, map)
}

fn half_sealed(socket: BorrowedFd<'_>) {
    let bytes = bytes();
    let missing = [FOUR, SealFlags::SHRINK, SealFlags::GROW, SealFlags::SEAL, SealFlags::FUTURE_WRITE];
    assert_eq!(missing.len(), SEALS);
    for missing in missing {
        let fd = memfd(&bytes, FOUR.difference(missing));
        send(socket, &missing.bits().to_string(), Some(fd.as_fd()));
    }
    send(socket, "whole", Some(memfd(&bytes, FOUR).as_fd()));
}

fn no_memfd(socket: BorrowedFd<'_>) {
    let file = OpenOptions::new().read(true).open("/proc/self/exe").unwrap();
    let zero = OpenOptions::new().read(true).write(true).open("/dev/zero").unwrap();
    send(socket, "a file", Some(file.as_fd()));
    send(socket, "a device", Some(zero.as_fd()));
    send(socket, "a socket", Some(socket));
}

fn small(socket: BorrowedFd<'_>) {
    let bytes = bytes();
    for len in [0, 8, 64, bytes.len() - 4096] {
        send(socket, "small", Some(memfd(&bytes[..len], FOUR).as_fd()));
    }
    for size in [bytes.len() as u64, 1 << 50] {
        let fd = memfd(&bytes[..4096], SealFlags::empty());
        rustix::fs::ftruncate(&fd, size).unwrap();
        rustix::fs::fcntl_add_seals(&fd, FOUR).unwrap();
        send(socket, "no pages", Some(fd.as_fd()));
    }
}

/// Every word of the header, each with every number that has gone wrong elsewhere.
fn overflow(socket: BorrowedFd<'_>) {
    let bytes = bytes();
    let numbers = [0, 1 << 16, 1 << 31, u64::from(u32::MAX), 1 << 32, 1 << 52, 1 << 63, u64::MAX - 4095, u64::MAX];
    for word in [0, 1, 2, 4, 5, 6] {
        for number in numbers {
            let mut bytes = bytes.clone();
            bytes[word * 8..word * 8 + 8].copy_from_slice(&number.to_le_bytes());
            // A segment may have no runs; the payloads then start on the same page.
            if (word, number) != (6, 0) {
                send(socket, &format!("word {word} is {number}"), Some(memfd(&bytes, FOUR).as_fd()));
            }
        }
    }
    // Products that wrap around to the true size.
    for (slots, payload) in [(1_u64 << 16, 1_u64 << 48), (4, 1 << 62), (2, (1 << 63) + 8192)] {
        let mut bytes = bytes.clone();
        bytes[32..40].copy_from_slice(&slots.to_le_bytes());
        bytes[40..48].copy_from_slice(&payload.to_le_bytes());
        send(socket, "a product that wraps", Some(memfd(&bytes, FOUR).as_fd()));
    }
    send(socket, "done", None);
}

fn shrink(socket: BorrowedFd<'_>) {
    let bytes = bytes();
    let (fd, map) = kept(&bytes);
    send(socket, "segment", Some(fd.as_fd()));
    receive(socket).unwrap();
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let len = bytes.len() as u64;
    // SAFETY: the range is the mapping, and nothing here reads it afterwards.
    let removed = unsafe { rustix::mm::madvise(map.as_mut_ptr().cast(), map.len(), Advice::LinuxRemove) };
    let attempts: [(&str, Result<(), Errno>); SHRINKS] = [
        ("truncate to nothing", rustix::fs::ftruncate(&fd, 0)),
        ("truncate by a page", rustix::fs::ftruncate(&fd, len - 4096)),
        ("grow", rustix::fs::ftruncate(&fd, len + 4096)),
        ("punch a hole", rustix::fs::fallocate(&fd, hole, 0, len)),
        ("remove pages through the mapping", removed),
        ("seal anew", rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE)),
    ];
    tell(socket, &attempts);
}

/// Keeps its mapping and writes for ever: headers of slots, of the segment, payloads.
fn scribble(socket: BorrowedFd<'_>) {
    let bytes = bytes();
    let (fd, map) = kept(&bytes);
    send(socket, "segment", Some(fd.as_fd()));
    // SAFETY: page-aligned, and as long as the words it is cut into; only atomics touch it in this process.
    let words = unsafe { std::slice::from_raw_parts(map.as_ptr().cast::<AtomicU64>(), map.len() / 8) };
    let original: Vec<u64> = words.iter().map(|word| word.load(Ordering::Relaxed)).collect();
    let numbers = [0, 1, 2, 3, 4, 64, 100, 1000, 8192, 8193, 1 << 31, 1 << 32, 1 << 63, u64::MAX];
    let mut random = 0x9E37_79B9_7F4A_7C15_u64;
    loop {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let pick = |shift: u32, len: usize| usize::try_from(random >> shift & 0xFFFF).unwrap() % len;
        // One slot header of 24 words after the segment's 8; payloads start on the next page.
        let target = match pick(0, 4) {
            0 => pick(16, 8),
            1 => 512 + pick(16, 125),
            _ => 8 + pick(16, 24),
        };
        words[target].store(numbers[pick(32, numbers.len())], Ordering::Relaxed);
        if pick(48, 3) == 0 {
            // The truth again, so that the reader is also given something to read.
            for (word, value) in words.iter().zip(&original).take(32) {
                word.store(*value, Ordering::Relaxed);
            }
            for _ in 0..64 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = 512 + usize::try_from(random >> 40).unwrap() % 125;
                words[at].store(random, Ordering::Relaxed);
            }
        }
    }
}

fn die_mid_write(socket: BorrowedFd<'_>) {
    let (segment, fd, _) = honest();
    let mut slot = segment.reserve().unwrap();
    slot.payload_mut()[..4000].fill(9);
    send(socket, "segment", Some(fd.as_fd()));
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

/// Is given a segment to read, and tries every way to write.
fn reader(socket: BorrowedFd<'_>) {
    let fd = receive(socket).unwrap().1.unwrap();
    let len = usize::try_from(rustix::fs::fstat(&fd).unwrap().st_size).unwrap();
    let writable = |fd: BorrowedFd<'_>| match MmapOptions::new().len(len).map_raw(fd.as_raw_fd()) {
        Ok(_) => Ok(()),
        Err(error) => Err(Errno::from_io_error(&error).unwrap()),
    };
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let reopened = OpenOptions::new().read(true).write(true).open(&path);
    let through_path = |with: fn(&OwnedFd) -> Result<(), Errno>| match &reopened {
        Ok(file) => with(&OwnedFd::from(file.try_clone().unwrap())),
        Err(error) => Err(Errno::from_io_error(error).unwrap()),
    };
    let map = MmapOptions::new().len(len).map_raw_read_only(fd.as_raw_fd()).unwrap();
    let all = MprotectFlags::READ | MprotectFlags::WRITE;
    // SAFETY: the range is the mapping; it stays readable.
    let made_writable = unsafe { rustix::mm::mprotect(map.as_mut_ptr().cast(), map.len(), all) };
    let whole = |fd: &OwnedFd| {
        let len = usize::try_from(rustix::fs::fstat(fd)?.st_size).unwrap();
        match MmapOptions::new().len(len).map_raw(fd.as_raw_fd()) {
            Ok(_) => Ok(()),
            Err(error) => Err(Errno::from_io_error(&error).unwrap()),
        }
    };
    let attempts: [(&str, Result<(), Errno>); WRITES] = [
        ("map for writing", writable(fd.as_fd())),
        ("write", rustix::io::pwrite(&fd, &[0], 4096).map(drop)),
        ("make the mapping writable", made_writable),
        ("map for writing through /proc", through_path(whole)),
        ("write through /proc", through_path(|fd| rustix::io::pwrite(fd, &[0], 4096).map(drop))),
        ("truncate", rustix::fs::ftruncate(&fd, 0)),
        ("punch a hole", rustix::fs::fallocate(&fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 4096)),
        ("seal for its writer too", rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE)),
    ];
    tell(socket, &attempts);
    let object = SegmentReader::map(&fd, CHAIN, ID).unwrap().object(crate::key(0, 2), ELEMENTS).unwrap();
    send(socket, &read_all(&object).to_string(), None);
}

/// Says that objects may be recycled: each name it can think of, the true one more than once.
fn release(socket: BorrowedFd<'_>) {
    for slot in [0, 1, 2, 3, u32::MAX] {
        for generation in (0_u64..64).chain([u64::MAX, u64::MAX - 1, 1 << 32]) {
            for _ in 0..4 {
                send(socket, &format!("{slot} {generation}"), None);
            }
        }
    }
    send(socket, "done", None);
}

fn tell(socket: BorrowedFd<'_>, attempts: &[(&str, Result<(), Errno>)]) {
    for (what, result) in attempts {
        let text = match result {
            Err(Errno::PERM | Errno::ACCESS) => format!("{what}: refused"),
            other => format!("{what}: {other:?}"),
        };
        send(socket, &text, None);
    }
}
