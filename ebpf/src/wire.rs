//! How a member reads and writes descriptors on its data socket.
//!
//! The same calls serve both paths; the socket may be blocking (an aggregator's) or not (the gateway's, in an `AsyncFd`).

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::atomic::{AtomicUsize, Ordering},
};

use lifl_ebpf_common::{DESCRIPTOR_BYTES, Descriptor};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};

/// Descriptors per system call. One write stays below a page: the kernel never has to cut it where a descriptor is not over.
pub const BATCH: usize = 32;

/// A member's data socket.
///
/// Everything takes `&self`; one task may send while another one receives, but two that send, or two that receive, must
/// take turns.
#[derive(Debug)]
pub struct DescriptorSocket {
    fd: OwnedFd,
    /// Bytes of the next descriptor to send that the socket already took (a full TCP buffer cuts anywhere).
    begun: AtomicUsize,
}

/// Some descriptors of a [`DescriptorSocket::send_all`] were delivered, the rest was not.
#[derive(Debug, thiserror::Error)]
#[error("{delivered} descriptors sent, then: {cause}")]
pub struct SendError {
    /// How many of the slice, from its start. The rest was not delivered.
    pub delivered: usize,
    /// What stopped the next one.
    #[source]
    pub cause: SendCause,
}

/// Why a descriptor was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendCause {
    /// The path refused this descriptor ([`crate::DropReason`] says why, in the counters of the sender).
    #[error("the path refused the descriptor")]
    Refused,
    /// A socket in non-blocking mode cannot take more now; come again with the rest when it is writable.
    #[error("the socket takes no more now")]
    WouldBlock,
    /// The kernel has no memory for the receiver's queue; nothing says when it will: come again later with the rest.
    #[error("no memory for the receiver's queue")]
    Full,
    /// The agent closed the other end.
    #[error("the other end is closed")]
    Closed,
    /// Another error of the socket.
    #[error(transparent)]
    Io(io::Error),
}

// === impl DescriptorSocket ===

impl DescriptorSocket {
    /// Takes end A of a [`crate::pair()`].
    #[must_use]
    pub const fn new(fd: OwnedFd) -> Self {
        Self { fd, begun: AtomicUsize::new(0) }
    }

    /// Sends descriptors, each once and in order.
    ///
    /// After [`SendCause::WouldBlock`] or [`SendCause::Full`] the next call must begin with the first descriptor that was
    /// not delivered: the socket may have taken a part of it already.
    pub fn send_all(&self, descriptors: &[Descriptor]) -> Result<(), SendError> {
        let mut bytes = [0; BATCH * DESCRIPTOR_BYTES];
        let mut delivered = 0;
        for batch in descriptors.chunks(BATCH) {
            for (at, descriptor) in bytes.chunks_exact_mut(DESCRIPTOR_BYTES).zip(batch) {
                at.copy_from_slice(&descriptor.to_bytes());
            }
            let end = batch.len() * DESCRIPTOR_BYTES;
            let mut at = self.begun.swap(0, Ordering::Relaxed);
            while at < end {
                match send(&self.fd, &bytes[at..end], SendFlags::NOSIGNAL) {
                    Ok(sent) => at += sent,
                    Err(Errno::INTR) => {}
                    Err(errno) => {
                        self.begun.store(at % DESCRIPTOR_BYTES, Ordering::Relaxed);
                        let cause = match errno {
                            // The program refuses with the first one; after a part of a descriptor, with the second.
                            Errno::PIPE | Errno::ACCESS if !self.is_closed() => SendCause::Refused,
                            Errno::PIPE | Errno::ACCESS | Errno::CONNRESET => SendCause::Closed,
                            Errno::AGAIN => SendCause::WouldBlock,
                            Errno::NOMEM | Errno::NOBUFS => SendCause::Full,
                            errno => SendCause::Io(errno.into()),
                        };
                        return Err(SendError { delivered: delivered + at / DESCRIPTOR_BYTES, cause });
                    }
                }
            }
            delivered += batch.len();
        }
        Ok(())
    }

    /// Appends what is there, at least one descriptor; 0 when the other end is closed.
    ///
    /// Without any: waits, or fails with `WouldBlock` in non-blocking mode.
    pub fn recv_into(&self, out: &mut Vec<Descriptor>) -> io::Result<usize> {
        let n = self.peek(out)?;
        self.consume(n)?;
        Ok(n)
    }

    /// As [`Self::recv_into`], but leaves the descriptors in the socket: [`Self::consume`] those that are dealt with. A
    /// process that dies in between leaves them to whoever holds the socket next.
    pub fn peek(&self, out: &mut Vec<Descriptor>) -> io::Result<usize> {
        let mut bytes = [0; BATCH * DESCRIPTOR_BYTES];
        let mut got = self.look(&mut bytes, RecvFlags::PEEK)?;
        if (1..DESCRIPTOR_BYTES).contains(&got) {
            // The rest is on its way. A blocking socket waits for it here, another one returns the same part.
            got = self.look(&mut bytes[..DESCRIPTOR_BYTES], RecvFlags::PEEK | RecvFlags::WAITALL)?;
        }
        let (whole, _) = bytes[..got].as_chunks::<DESCRIPTOR_BYTES>();
        out.extend(whole.iter().map(Descriptor::from_bytes));
        if whole.is_empty() && got != 0 && !self.is_closed() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(whole.len())
    }

    fn look(&self, bytes: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        loop {
            match recv(&self.fd, &mut *bytes, flags) {
                Ok((got, _)) => return Ok(got),
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(0),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Whether the agent closed the other end.
    fn is_closed(&self) -> bool {
        let mut polled = [PollFd::new(&self.fd, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut polled, Some(&now)).is_ok() && !polled[0].revents().is_empty()
    }

    /// Takes `n` descriptors out of the socket that [`Self::peek`] has shown.
    pub fn consume(&self, n: usize) -> io::Result<()> {
        let mut bytes = [0; BATCH * DESCRIPTOR_BYTES];
        let mut left = n * DESCRIPTOR_BYTES;
        while left > 0 {
            let want = left.min(bytes.len());
            match recv(&self.fd, &mut bytes[..want], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((got, _)) => left -= got,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// The socket itself.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsFd for DescriptorSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for DescriptorSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
