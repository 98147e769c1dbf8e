//! A connection whose peer must read what it asked for: a download that stands still holds a model's slot.

use std::{
    future::Future as _,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep_until},
};

/// The length of time over which the floor is judged.
const WINDOW: Duration = Duration::from_secs(10);

/// Fails writes when, in a window in which the peer always had something left to read, it read less than the floor.
#[derive(Debug)]
pub(crate) struct Paced {
    stream: TcpStream,
    /// Bytes that must pass in a window.
    least: u64,
    passed: u64,
    /// Runs while the socket is full; a timer only then.
    window: Option<Pin<Box<Sleep>>>,
}

// === impl Paced ===

impl Paced {
    pub(crate) fn new(stream: TcpStream, floor: u64) -> Self {
        Self { stream, least: floor.saturating_mul(WINDOW.as_secs()).max(1), passed: 0, window: None }
    }

    fn judge(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(result) = written {
            if let Ok(bytes) = result {
                self.passed += bytes as u64;
            }
            return Poll::Ready(result);
        }
        let window = self.window.get_or_insert_with(|| {
            self.passed = 0;
            Box::pin(sleep_until(Instant::now() + WINDOW))
        });
        while window.as_mut().poll(cx).is_ready() {
            if self.passed < self.least {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read")));
            }
            self.passed = 0;
            window.as_mut().reset(Instant::now() + WINDOW);
        }
        Poll::Pending
    }
}

impl AsyncRead for Paced {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Paced {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.judge(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.judge(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper flushes when all it has is written: the peer is not waited for.
        self.window = None;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
