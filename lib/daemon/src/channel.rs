//! JSON messages over a private SEQPACKET socket, file descriptors beside them.
//!
//! SEQPACKET keeps the borders of messages, so that a process may die between any two of them and its successor reads on.
//! A message of more than [`INLINE_BYTES`] travels in a memfd, because the kernel bounds a packet by the send buffer.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read as _, Seek as _, Write as _},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{MemfdFlags, memfd_create},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{Interest, unix::AsyncFd};

/// Larger messages are put into a memfd.
const INLINE_BYTES: usize = 32 << 10;
/// Descriptors beside one message, at most.
const MAX_FDS: usize = 64;
/// A spilled message longer than this is an error, not an allocation.
const MAX_SPILL: u64 = 256 << 20;

const INLINE: u8 = 0;
const SPILLED: u8 = 1;

/// A channel between two processes, inside a tokio runtime.
#[derive(Debug)]
pub struct Channel {
    fd: AsyncFd<OwnedFd>,
}

/// The same wire for a process without a runtime.
#[derive(Debug)]
pub struct SyncChannel {
    fd: OwnedFd,
}

/// A message that did not pass.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed.
    #[error("channel: {0}")]
    Io(#[from] io::Error),
    /// The peer does not speak our words: another version?
    #[error("channel: unreadable message ({source}): {text}")]
    Words {
        /// What serde said.
        source: serde_json::Error,
        /// The beginning of the message.
        text: String,
    },
    /// The message cannot be written as JSON.
    #[error("channel: {0}")]
    Encode(serde_json::Error),
    /// The peer broke the wire's rules.
    #[error("channel: {0}")]
    Wire(&'static str),
}

/// A message ready for the wire: its packet, and the memfd that holds it when it is long.
struct Outgoing {
    packet: Vec<u8>,
    spill: Option<OwnedFd>,
}

// === impl Outgoing ===

impl Outgoing {
    fn new<T: Serialize>(message: &T) -> Result<Self, ChannelError> {
        let mut packet = vec![INLINE];
        serde_json::to_writer(&mut packet, message).map_err(ChannelError::Encode)?;
        if packet.len() <= INLINE_BYTES {
            return Ok(Self { packet, spill: None });
        }
        // Refused here, where it is one message's trouble; the reader would have to give up the channel.
        if packet.len() as u64 > MAX_SPILL {
            return Err(ChannelError::Wire("message too long to be sent"));
        }
        let mut file = File::from(memfd_create("lifl-message", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
        file.write_all(&packet[1..])?;
        let length = (packet.len() as u64 - 1).to_le_bytes();
        let mut packet = vec![SPILLED];
        packet.extend(length);
        Ok(Self { packet, spill: Some(file.into()) })
    }

    fn send(&self, socket: BorrowedFd<'_>, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut all: Vec<BorrowedFd<'_>> = Vec::with_capacity(fds.len() + 1);
        all.extend(self.spill.as_ref().map(AsFd::as_fd));
        all.extend(fds);
        if all.len() > MAX_FDS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} descriptors beside one message", all.len()),
            ));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !all.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&all));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match sendmsg(socket, &[IoSlice::new(&self.packet)], &mut control, flags) {
                Err(Errno::INTR) => {}
                other => return other.map(drop).map_err(io::Error::from),
            }
        }
    }
}

/// Reads one packet; `Ok(None)` at the end of the stream.
fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut packet = vec![0; INLINE_BYTES + 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut packet)], &mut control, flags) {
            // A peer that died with our words unread resets the socket, once, ahead of its own last words: those are still there.
            Err(Errno::INTR | Errno::CONNRESET) => {}
            other => break other?,
        }
    };
    let fds = control
        .drain()
        .filter_map(|m| match m {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if got.bytes == 0 {
        return Ok(None);
    }
    if got.flags.contains(ReturnFlags::TRUNC) || got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "packet longer than the wire allows"));
    }
    packet.truncate(got.bytes);
    Ok(Some((packet, fds)))
}

fn decode<T: DeserializeOwned>(packet: &[u8], mut fds: Vec<OwnedFd>) -> Result<(T, Vec<OwnedFd>), ChannelError> {
    let words = |json: &[u8]| {
        serde_json::from_slice(json).map_err(|source| ChannelError::Words {
            source,
            text: String::from_utf8_lossy(&json[..json.len().min(200)]).into_owned(),
        })
    };
    match packet {
        [INLINE, json @ ..] => Ok((words(json)?, fds)),
        [SPILLED, length @ ..] => {
            let length =
                length.try_into().map(u64::from_le_bytes).map_err(|_short| ChannelError::Wire("short spill"))?;
            if length > MAX_SPILL || fds.is_empty() {
                return Err(ChannelError::Wire("spilled message without its memfd, or too long"));
            }
            let mut file = File::from(fds.remove(0));
            let mut json = Vec::new();
            file.rewind()?;
            file.take(length).read_to_end(&mut json)?;
            Ok((words(&json)?, fds))
        }
        _ => Err(ChannelError::Wire("unknown packet")),
    }
}

// === impl Channel ===

impl Channel {
    /// The two ends of a new channel; each becomes a [`Channel`] or [`SyncChannel`] in its process.
    ///
    /// # Errors
    /// What `socketpair` says.
    pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
        Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
    }

    /// Takes an end; needs a tokio runtime around it.
    ///
    /// # Errors
    /// When the descriptor cannot be polled.
    #[expect(
        deprecated,
        reason = "its successor is unsafe for types that lie about their descriptor; an OwnedFd does not"
    )]
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd: AsyncFd::new(fd)? })
    }

    /// The end as a descriptor, to be deposited.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }

    /// Sends one message; waits while the peer's queue is full.
    ///
    /// # Errors
    /// [`ChannelError`]; `BrokenPipe` when the peer is gone.
    pub async fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let outgoing = Outgoing::new(message)?;
        Ok(self.fd.async_io(Interest::WRITABLE, |fd| outgoing.send(fd.as_fd(), fds)).await?)
    }

    /// The next message; `None` when the peer is gone. Cancel-safe.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub async fn recv<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        let packet = self.fd.async_io(Interest::READABLE, |fd| receive(fd.as_fd())).await?;
        packet.map(|(packet, fds)| decode(&packet, fds)).transpose()
    }
}

// === impl SyncChannel ===

impl SyncChannel {
    /// Takes an end.
    #[must_use]
    pub const fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Sends one message; blocks while the peer's queue is full.
    ///
    /// # Errors
    /// [`ChannelError`]; `BrokenPipe` when the peer is gone.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let outgoing = Outgoing::new(message)?;
        loop {
            match outgoing.send(self.fd.as_fd(), fds) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::OUT)?,
                other => return Ok(other?),
            }
        }
    }

    /// The next message, if one is there.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn try_recv<T: DeserializeOwned>(&self) -> Result<Received<T>, ChannelError> {
        match receive(self.fd.as_fd()) {
            Ok(Some((packet, fds))) => decode(&packet, fds).map(|(m, fds)| Received::Message(m, fds)),
            Ok(None) => Ok(Received::Gone),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Received::Empty),
            Err(e) => Err(e.into()),
        }
    }

    /// The next message; blocks for it. `None` when the peer is gone.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn recv<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        loop {
            match self.try_recv()? {
                Received::Message(message, fds) => return Ok(Some((message, fds))),
                Received::Gone => return Ok(None),
                Received::Empty => self.wait(PollFlags::IN)?,
            }
        }
    }

    fn wait(&self, flags: PollFlags) -> io::Result<()> {
        match poll(&mut [PollFd::new(&self.fd, flags)], None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for SyncChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What [`SyncChannel::try_recv`] found.
#[derive(Debug)]
pub enum Received<T> {
    /// A message and the descriptors beside it.
    Message(T, Vec<OwnedFd>),
    /// Nothing yet.
    Empty,
    /// The peer is gone.
    Gone,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_keep_their_borders_and_their_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let (a, b) = (Channel::new(a).unwrap(), SyncChannel::new(b));
        let file = File::from(memfd_create("x", MemfdFlags::CLOEXEC).unwrap());
        (&file).write_all(b"payload").unwrap();
        a.send(&"one", &[]).await.unwrap();
        a.send(&("two", 2), &[file.as_fd()]).await.unwrap();
        let (one, fds): (String, _) = b.recv().unwrap().unwrap();
        assert_eq!((one.as_str(), fds.len()), ("one", 0));
        let (two, fds): ((String, u32), _) = b.recv().unwrap().unwrap();
        assert_eq!((two.1, fds.len()), (2, 1));
        let mut text = String::new();
        let mut got = File::from(fds.into_iter().next().unwrap());
        got.rewind().unwrap();
        got.read_to_string(&mut text).unwrap();
        assert_eq!(text, "payload");
        drop(a);
        assert!(b.recv::<String>().unwrap().is_none());
    }

    #[tokio::test]
    async fn long_messages_spill_and_a_full_queue_waits() {
        let (a, b) = Channel::pair().unwrap();
        let (a, b) = (SyncChannel::new(a), Channel::new(b).unwrap());
        let long = "x".repeat(3 << 20);
        let sender = std::thread::spawn(move || {
            for i in 0..2000u32 {
                a.send(&(i, if i % 500 == 0 { long.as_str() } else { "short" }), &[]).unwrap();
            }
        });
        for i in 0..2000u32 {
            let ((n, text), _fds): ((u32, String), _) = b.recv().await.unwrap().unwrap();
            assert_eq!(n, i);
            assert_eq!(text.len(), if i % 500 == 0 { 3 << 20 } else { 5 });
        }
        assert!(b.recv::<(u32, String)>().await.unwrap().is_none());
        sender.join().unwrap();
    }

    #[tokio::test]
    async fn last_words_of_a_peer_that_died_with_unread_ones_are_heard() {
        let (a, b) = Channel::pair().unwrap();
        let (c, d) = Channel::pair().unwrap();
        let (a, b) = (SyncChannel::new(a), SyncChannel::new(b));
        let (c, d) = (SyncChannel::new(c), Channel::new(d).unwrap());
        for dying in [&a, &c] {
            dying.send(&"first", &[]).unwrap();
            dying.send(&"last", &[]).unwrap();
        }
        b.send(&"never read", &[]).unwrap();
        d.send(&"never read", &[]).await.unwrap();
        drop((a, c));
        for word in ["first", "last"] {
            assert_eq!(b.recv::<String>().unwrap().unwrap().0, word);
            assert_eq!(d.recv::<String>().await.unwrap().unwrap().0, word);
        }
        assert!(b.recv::<String>().unwrap().is_none() && d.recv::<String>().await.unwrap().is_none());
    }

    #[test]
    fn foreign_words_are_an_error_with_their_text() {
        let (a, b) = Channel::pair().unwrap();
        let (a, b) = (SyncChannel::new(a), SyncChannel::new(b));
        a.send(&"not a number", &[]).unwrap();
        assert!(b.recv::<u32>().unwrap_err().to_string().contains("not a number"));
    }
}
