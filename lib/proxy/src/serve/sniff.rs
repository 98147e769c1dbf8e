//! The first bytes of a connection: which HTTP it speaks.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

use crate::progress::Progress;

/// What an HTTP/2 client begins with.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Mostly the whole head of a first request, so that looking costs no read of its own.
const FIRST: usize = 1024;

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    Http1,
    Http2,
}

/// A stream of which some bytes have been read already; counts what is read.
#[derive(Debug)]
pub(super) struct Sniffed<I> {
    io: I,
    first: Bytes,
    progress: Arc<Progress>,
}

/// The version, and what has been read to tell it.
pub(super) async fn version<I: AsyncRead + Unpin>(io: &mut I) -> io::Result<(Version, Bytes)> {
    let mut read = BytesMut::with_capacity(FIRST);
    loop {
        if io.read_buf(&mut read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let told = read.len().min(PREFACE.len());
        if read[..told] != PREFACE[..told] {
            return Ok((Version::Http1, read.freeze()));
        }
        if told == PREFACE.len() {
            return Ok((Version::Http2, read.freeze()));
        }
    }
}

// === impl Sniffed ===

impl<I> Sniffed<I> {
    pub(super) fn new(io: I, first: Bytes, progress: Arc<Progress>) -> Self {
        Self { io, first, progress }
    }

    fn written(&self, written: &Poll<io::Result<usize>>) {
        match written {
            Poll::Pending => self.progress.full(),
            Poll::Ready(Ok(bytes)) => self.progress.wrote(*bytes),
            Poll::Ready(Err(_)) => {}
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Sniffed<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.first.is_empty() {
            let before = buf.filled().len();
            std::task::ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
            this.progress.read(buf.filled().len() - before);
        } else {
            let length = this.first.len().min(buf.remaining());
            buf.put_slice(&this.first[..length]);
            this.first.advance(length);
            this.progress.read(length);
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Sniffed<I> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write(cx, buf);
        this.written(&written);
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write_vectored(cx, bufs);
        this.written(&written);
        written
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    async fn told(parts: &[&[u8]]) -> io::Result<(Version, Bytes)> {
        let (mut client, mut server) = tokio::io::duplex(4096);
        let parts: Vec<Vec<u8>> = parts.iter().map(|part| part.to_vec()).collect();
        let writer = tokio::spawn(async move {
            for part in parts {
                client.write_all(&part).await.expect("room");
                tokio::task::yield_now().await;
            }
        });
        let told = version(&mut server).await;
        writer.await.expect("writer");
        told
    }

    #[tokio::test]
    async fn the_preface_is_known_however_it_is_cut() {
        for cut in 1..PREFACE.len() {
            let (version, read) = told(&[&PREFACE[..cut], &PREFACE[cut..]]).await.expect("told");
            assert_eq!((version, &*read), (Version::Http2, PREFACE));
        }
        let (version, _) = told(&[b"P", b"R", b"O"]).await.expect("told");
        assert_eq!(version, Version::Http1);
        let (version, _) = told(&[b"GET / HTTP/1.1\r\n"]).await.expect("told");
        assert_eq!(version, Version::Http1);
        let error = told(&[b"PRI * HT"]).await.expect_err("cut off");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
