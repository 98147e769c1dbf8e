//! One HTTP/1.1 connection, driven by whoever has it.
//!
//! The client's side of HTTP/1.1 is our own: hyper's is a task's worth of channels between the request and its connection, of
//! which a proxy that drives the connection itself needs none. Heads are parsed by httparse.

use std::{
    fmt,
    future::poll_fn,
    io,
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Frame;
use rustix::net::RecvFlags;
use tokio::{io::AsyncReadExt as _, net::TcpStream, sync::Notify, time::Instant};

use super::{
    HEAD,
    body::{Body, BodyError},
    shelf::Shelf,
};

mod request;
mod response;

use request::Writer;
use response::{Decoder, Piece};

/// After this long idle the kernel is asked whether the other side has closed: the reactor may not have said so yet, and a
/// request that is written into a closed connection cannot be sent again.
const DOUBTED: Duration = Duration::from_millis(20);

/// Read at once from an endpoint that sends little, and kept by an idle connection.
const READ: usize = 8 << 10;
/// Read at once from one that fills whatever it is given.
const READ_MOST: usize = 256 << 10;

/// A connection in use.
pub(super) struct Lease(Box<Connection>);

/// A response's head, and its body if that has come already.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response<()>,
    pub(super) whole: Option<Bytes>,
}

/// No response.
#[derive(Debug)]
pub(super) struct Unanswered {
    pub(super) broken: Broken,
    /// The request, if nothing of it has been written.
    pub(super) unsent: Option<Box<Request<Body>>>,
}

/// What keeps a request from its response.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The endpoint has closed the connection.
    #[error("connection closed before the response")]
    Closed,
    /// It has closed the connection within a body.
    #[error("connection closed before the end of the response")]
    Short,
    /// It has sent something that is no HTTP.
    #[error("malformed response: {0}")]
    Malformed(&'static str),
    /// The same, in the parser's words.
    #[error("malformed response: {0}")]
    Parse(#[from] httparse::Error),
    /// A head, or trailers.
    #[error("head of a response of more than {0} bytes")]
    Long(usize),
    /// The request's body is not as long as its head says.
    #[error("body of a request of another length than said")]
    Length,
    /// The request's body has come to an early end.
    #[error("body of a request: {0}")]
    Body(Box<BodyError>),
    /// What the kernel says.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Told when the endpoint has said `100 Continue`; an extension of a request.
#[derive(Clone, Debug)]
pub(crate) struct Continue(pub(crate) Arc<Notify>);

struct Connection {
    stream: TcpStream,
    writer: Writer,
    buffer: BytesMut,
    /// To be read at once.
    room: usize,
    /// It was more, and the buffer with it.
    grown: bool,
    /// Of the buffer's head, looked at.
    seen: usize,
    body: Decoder,
    keep_alive: bool,
    /// The shelf owns what lies on it: owned in turn, neither would ever end.
    shelf: Weak<Shelf>,
    idle_since: Instant,
    _alive: Alive,
}

/// Counts a connection as long as it exists.
#[derive(Debug)]
pub(super) struct Alive(Arc<AtomicUsize>);

// === impl Lease ===

impl Lease {
    /// HTTP/1.1 on a stream that has carried nothing yet.
    pub(super) fn new(stream: TcpStream, shelf: Weak<Shelf>, alive: Alive) -> Self {
        Self(Box::new(Connection {
            stream,
            writer: Writer::default(),
            buffer: BytesMut::new(),
            room: READ,
            grown: false,
            seen: 0,
            body: Decoder::End,
            keep_alive: true,
            shelf,
            idle_since: Instant::now(),
            _alive: alive,
        }))
    }

    /// When it was put back.
    pub(super) fn idle_since(&self) -> Instant {
        self.0.idle_since
    }

    /// Whether another request may be sent: open as far as can be known.
    pub(super) fn usable(&self, now: Instant) -> bool {
        if now.saturating_duration_since(self.0.idle_since) < DOUBTED {
            return self.open();
        }
        let peeked = rustix::net::recv(&self.0.stream, &mut [0_u8; 1][..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        matches!(peeked, Err(rustix::io::Errno::WOULDBLOCK))
    }

    /// The same as far as the reactor has said.
    pub(super) fn open(&self) -> bool {
        // What nobody asked for is no better than an end.
        matches!(self.0.stream.try_read(&mut [0; 1]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Sends a request and waits for the head of the response.
    pub(super) async fn send(&mut self, request: Request<Body>) -> Result<Answer, Unanswered> {
        let connection = &mut *self.0;
        let (head, body) = request.into_parts();
        let told = head.extensions.get::<Continue>().cloned();
        connection.writer.begin(&head, body);
        let (bodiless, mut interim) = (head.method == Method::HEAD, 0);
        let broken = poll_fn(|cx| connection.poll_answer(cx, bodiless, &mut interim, told.as_ref()));
        broken.await.map_err(|broken| {
            let unsent = connection.writer.take_unsent();
            Unanswered { broken, unsent: unsent.map(|body| Box::new(Request::from_parts(head, body))) }
        })
    }

    /// The request is still under way.
    pub(super) fn is_sending(&self) -> bool {
        !self.0.writer.is_done()
    }

    /// Drives the request to its end, and reads nothing.
    pub(super) async fn sent(&mut self) {
        let Connection { writer, stream, .. } = &mut *self.0;
        poll_fn(|cx| writer.poll(stream, cx)).await;
    }

    /// The next piece of the response's body; drives the request as well.
    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let connection = &mut *self.0;
        // An endpoint that does not take all of a request may still answer it.
        let _sending = connection.writer.poll(&mut connection.stream, cx);
        if let Some(broken) = connection.writer.take_fatal() {
            return Poll::Ready(Some(Err(broken)));
        }
        loop {
            match connection.body.next(&mut connection.buffer)? {
                Some(Piece::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Some(Piece::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Some(Piece::End) => return Poll::Ready(None),
                None => {}
            }
            if ready!(connection.poll_read(cx))? == 0 {
                connection.body.ended()?;
            }
        }
    }

    /// Nothing of the response is to come.
    pub(super) fn is_end(&self) -> bool {
        self.0.body == Decoder::End
    }

    /// Bytes of the response to come, if its head tells.
    pub(super) fn left(&self) -> Option<u64> {
        match self.0.body {
            Decoder::End => Some(0),
            Decoder::Length(left) => Some(left),
            _ => None,
        }
    }

    /// After a `101`: the bare stream, and what has been read of it beyond the head.
    pub(super) fn leave_http(self) -> (TcpStream, Bytes) {
        let Connection { stream, buffer, .. } = *self.0;
        (stream, buffer.freeze())
    }

    /// After the response's end: back to the shelf, unless something is still under way or nobody sends there any more.
    pub(super) fn give_back(mut self) {
        let connection = &mut *self.0;
        let whole = connection.keep_alive && connection.body == Decoder::End && connection.buffer.is_empty();
        if whole
            && connection.writer.rest()
            && let Some(shelf) = connection.shelf.upgrade()
        {
            if std::mem::take(&mut connection.grown) || connection.buffer.capacity() > 2 * READ {
                (connection.buffer, connection.room) = (BytesMut::new(), READ);
            }
            connection.idle_since = Instant::now();
            shelf.put(self);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").finish_non_exhaustive()
    }
}

// === impl Connection ===

impl Connection {
    fn poll_answer(
        &mut self,
        cx: &mut Context<'_>,
        bodiless: bool,
        interim: &mut usize,
        told: Option<&Continue>,
    ) -> Poll<Result<Answer, Broken>> {
        // A request that cannot be written to its end may have been answered before it.
        let _sending = self.writer.poll(&mut self.stream, cx);
        if let Some(broken) = self.writer.take_fatal() {
            return Poll::Ready(Err(broken));
        }
        loop {
            let before = self.buffer.len();
            if let Some(head) = response::head(&mut self.buffer, &mut self.seen, HEAD as usize, bodiless)? {
                let status = head.response.status();
                if !status.is_informational() || status == StatusCode::SWITCHING_PROTOCOLS {
                    (self.body, self.keep_alive) = (head.body, head.keep_alive);
                    return Poll::Ready(Ok(Answer { response: head.response, whole: head.whole }));
                }
                // As many as there may be, but not without end.
                *interim += before - self.buffer.len();
                if *interim > HEAD as usize {
                    return Poll::Ready(Err(Broken::Malformed("interim responses without end")));
                }
                if let Some(Continue(told)) = told.filter(|_| status == StatusCode::CONTINUE) {
                    told.notify_one();
                }
                continue;
            }
            let read = ready!(self.poll_read(cx));
            if !matches!(read, Ok(1..)) {
                // What kept the request from being written tells more.
                let read = || read.map_or_else(Broken::Io, |_end| Broken::Closed);
                return Poll::Ready(Err(self.writer.take_broken().unwrap_or_else(read)));
            }
        }
    }

    /// Reads what there is; 0 is the end.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.buffer.reserve(self.room);
        let room = self.buffer.capacity() - self.buffer.len();
        let read = ready!(pin!(self.stream.read_buf(&mut self.buffer)).poll(cx))?;
        // As much at once as the endpoint fills, found out by doubling.
        if read >= room {
            self.room = (self.room * 2).min(READ_MOST);
            self.grown = true;
        } else if read < self.room / 4 {
            self.room = (self.room / 2).max(READ);
        }
        Poll::Ready(Ok(read))
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
