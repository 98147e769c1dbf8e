//! One HTTP/1.1 connection, driven by whoever has it.

use std::{
    fmt,
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{
        TrySendError,
        http1::{self, Parts},
    },
};
use hyper_util::rt::TokioIo;
use rustix::net::RecvFlags;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    task::coop,
    time::Instant,
};

use super::{body::Body, shelf::Shelf};

/// After this long idle the kernel is asked whether the other side has closed: the reactor may not have said so yet, and a
/// request that is written into a closed connection cannot be sent again.
const DOUBTED: Duration = Duration::from_millis(20);

/// A connection in use.
pub(super) struct Lease(Box<Connection>);

/// What a connection's request came to.
pub(super) type Answer = Result<Response<Incoming>, TrySendError<Request<Body>>>;

struct Connection {
    sender: http1::SendRequest<Body>,
    driver: http1::Connection<TokioIo<Doubtful>, Body>,
    /// Set to have the kernel asked.
    doubt: Arc<AtomicBool>,
    /// The shelf owns what lies on it: owned in turn, neither would ever end.
    shelf: Weak<Shelf>,
    idle_since: Instant,
    /// Polled to its end: another poll would shut down a stream that has been handed over.
    ended: bool,
    _alive: Alive,
}

/// Counts a connection as long as it exists.
#[derive(Debug)]
pub(super) struct Alive(Arc<AtomicUsize>);

/// A stream that can be told to look at the kernel's word about its end.
struct Doubtful {
    stream: TcpStream,
    doubt: Arc<AtomicBool>,
}

// === impl Lease ===

impl Lease {
    /// Begins HTTP/1.1 on a stream.
    pub(super) async fn handshake(
        stream: TcpStream,
        header_bytes: usize,
        shelf: Weak<Shelf>,
        alive: Alive,
    ) -> hyper::Result<Self> {
        let doubt = Arc::new(AtomicBool::new(false));
        let io = TokioIo::new(Doubtful { stream, doubt: Arc::clone(&doubt) });
        let (sender, driver) = http1::Builder::new().max_buf_size(header_bytes).handshake::<_, Body>(io).await?;
        let idle_since = Instant::now();
        Ok(Self(Box::new(Connection { sender, driver, doubt, shelf, idle_since, ended: false, _alive: alive })))
    }

    /// When it was put back.
    pub(super) fn idle_since(&self) -> Instant {
        self.0.idle_since
    }

    /// Whether another request may be sent: open as far as can be known, and nothing under way.
    pub(super) fn usable(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.0.idle_since) >= DOUBTED {
            self.0.doubt.store(true, Ordering::Relaxed);
        }
        self.open()
    }

    /// The same as far as the reactor has said: asks the kernel nothing.
    pub(super) fn open(&mut self) -> bool {
        // Nobody is to be woken: the connection is polled again with the request.
        let open = self.poll(&mut Context::from_waker(Waker::noop())).is_pending();
        open && self.0.sender.is_ready()
    }

    /// Sends a request and waits for the head of the response. A request that was never begun comes back in the error.
    pub(super) async fn send(&mut self, request: Request<Body>) -> Answer {
        // Comes by polling the connection, so its own wake-up (and the task budget, which would need one) is left out.
        let mut answer = pin!(coop::unconstrained(self.0.sender.try_send_request(request)));
        poll_fn(|cx| {
            let ended = self.poll(cx).is_ready();
            let mut quiet = Context::from_waker(Waker::noop());
            match answer.as_mut().poll(&mut quiet) {
                // An ended connection has answered; were it not so, waking is somebody else's.
                Poll::Pending if ended => answer.as_mut().poll(cx),
                polled => polled,
            }
        })
        .await
    }

    /// Drives the connection; ready when it has ended, or has been handed over to an upgrade.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.0.ended {
            let ended = std::task::ready!(Pin::new(&mut self.0.driver).poll(cx));
            self.0.ended = true;
            if let Err(error) = ended {
                tracing::trace!(%error, "connection to an endpoint ended");
            }
        }
        Poll::Ready(())
    }

    /// Drives the connection until it ends.
    pub(super) async fn run(mut self) {
        poll_fn(|cx| self.poll(cx)).await;
    }

    /// After a `101`: the bare stream, and what has been read of it beyond the head.
    pub(super) async fn leave_http(mut self) -> (TcpStream, Bytes) {
        poll_fn(|cx| self.poll(cx)).await;
        let Parts { io, read_buf, .. } = self.0.driver.into_parts();
        (io.into_inner().stream, read_buf)
    }

    /// After the response's end: back to the shelf, unless something is still under way or nobody sends there any more.
    pub(super) fn give_back(mut self) {
        if self.open()
            && let Some(shelf) = self.0.shelf.upgrade()
        {
            self.0.idle_since = Instant::now();
            shelf.put(self);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").finish_non_exhaustive()
    }
}

// === impl Alive ===

impl Alive {
    pub(super) fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(count))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

// === impl Doubtful ===

impl AsyncRead for Doubtful {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.doubt.load(Ordering::Relaxed) {
            this.doubt.store(false, Ordering::Relaxed);
            // The end of the stream is an ordinary read of nothing, an error is told by the next read.
            if let Ok((_, 0)) =
                rustix::net::recv(&this.stream, &mut [0_u8; 1][..], RecvFlags::PEEK | RecvFlags::DONTWAIT)
            {
                return Poll::Ready(Ok(()));
            }
        }
        Pin::new(&mut this.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Doubtful {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }
}
