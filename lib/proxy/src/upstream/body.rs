//! The one body type of requests and responses.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::StatusCode;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::sync::mpsc;

use super::h1::{Broken, Lease};
use crate::{
    progress::Turn,
    timeouts::{Clock, Expired},
};

/// A body: what a client or an endpoint sends, a few bytes of our own, or something foreign in a box.
#[derive(Default)]
pub struct Body {
    kind: Kind,
    /// What the body carries along: its request's clock, and what ends with it.
    along: Option<Box<Along>>,
    /// The request that it answers, for who watches the connection.
    during: Option<Turn>,
}

/// A body ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The connection it came on, or its framing.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// The same, of an HTTP/1.1 connection to an endpoint.
    #[error(transparent)]
    Endpoint(#[from] Broken),
    /// Time is up.
    #[error(transparent)]
    Expired(#[from] Expired),
    /// The foreign body in its box.
    #[error(transparent)]
    Other(Box<dyn std::error::Error + Send + Sync>),
}

#[derive(Default)]
enum Kind {
    #[default]
    Empty,
    Bytes(Bytes),
    /// Driven by somebody else: a server's connection, or an HTTP/2 connection.
    Incoming(Incoming),
    /// Of an HTTP/1.1 connection that this body drives.
    Leased(Lease),
    /// Of an HTTP/1.1 connection that a task drives.
    Piped(Piped),
    /// Held back until the endpoint has said `100 Continue`, or has kept silent for too long.
    Held(Incoming, Pin<Box<dyn Future<Output = ()> + Send>>),
    Boxed(UnsyncBoxBody<Bytes, BodyError>),
}

/// The other end of a body, and how long it is, if that is known.
pub(super) struct Piped {
    pub(super) frames: mpsc::Receiver<Result<Frame<Bytes>, Broken>>,
    pub(super) length: Option<u64>,
}

/// What lives as long as a response is under way, and is told of it. Dropping it is the end.
pub trait Keep: Send + 'static {
    /// What the endpoint answers.
    fn head(&mut self, _status: StatusCode) {}

    /// What is answered in its place.
    fn refused(&mut self, _status: StatusCode) {}

    /// So many bytes of the body have passed.
    fn passed(&mut self, _bytes: usize) {}

    /// The body has ended as its sender meant it to. Who does not hear this was cut off.
    fn whole(&mut self) {}
}

struct Along<T: ?Sized = dyn Keep> {
    clock: Option<Clock>,
    kept: T,
}

// === impl Body ===

impl Body {
    /// No body.
    #[must_use]
    pub const fn empty() -> Self {
        Self { kind: Kind::Empty, along: None, during: None }
    }

    /// A body of its own kind.
    #[must_use]
    pub const fn boxed(body: UnsyncBoxBody<Bytes, BodyError>) -> Self {
        Self { kind: Kind::Boxed(body), along: None, during: None }
    }

    /// This body with the clock of its request, and with what is to be dropped when it ends: a place in the breaker, a
    /// request's count.
    #[must_use]
    pub fn with<T: Keep>(mut self, clock: Option<Clock>, mut kept: T) -> Self {
        if self.kind.is_end() {
            kept.whole();
        }
        self.along = Some(match self.along {
            None => Box::new(Along { clock, kept }),
            // One of two clocks counts: nobody has both.
            Some(mut former) => Box::new(Along { clock: clock.or_else(|| former.clock.take()), kept: (kept, former) }),
        });
        self
    }

    /// The body of a response on a connection that it drives.
    pub(super) fn leased(lease: Lease) -> Self {
        if lease.is_end() {
            lease.give_back();
            return Self::empty();
        }
        Self { kind: Kind::Leased(lease), along: None, during: None }
    }

    /// The body of a response on a connection that a task drives.
    pub(super) const fn piped(piped: Piped) -> Self {
        Self { kind: Kind::Piped(piped), along: None, during: None }
    }

    /// This body, held back until `go`. Only a client's body waits; the others are returned as they are.
    #[must_use]
    pub(crate) fn held(self, go: impl Future<Output = ()> + Send + 'static) -> Self {
        match self.kind {
            Kind::Incoming(incoming) => {
                Self { kind: Kind::Held(incoming, Box::pin(go)), along: self.along, during: self.during }
            }
            kind => Self { kind, along: self.along, during: self.during },
        }
    }

    /// This body is of the answer to `turn`.
    pub(crate) fn during(&mut self, mut turn: Turn) {
        turn.answered(self.along.as_ref().and_then(|along| along.clock.as_ref()).and_then(Clock::end));
        self.during = Some(turn);
    }

    /// The end of the body: connection given back, places free.
    fn end(&mut self) {
        if let Kind::Leased(lease) = std::mem::take(&mut self.kind) {
            lease.give_back();
        }
        if let Some(mut along) = self.along.take() {
            along.kept.whole();
        }
        self.during = None;
    }

    /// The body is cut off: an HTTP/1.1 connection that is not read to the end is closed.
    fn cut(&mut self) {
        self.kind = Kind::Empty;
        self.along = None;
        self.during = None;
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let frame = match this.kind.poll(cx) {
            Poll::Ready(frame) => {
                this.during.iter_mut().for_each(Turn::took);
                frame
            }
            Poll::Pending => {
                this.during.iter_mut().for_each(Turn::waits);
                let clock = this.along.as_mut().and_then(|along| along.clock.as_mut());
                let Some(clock) = clock else { return Poll::Pending };
                let Poll::Ready(expired) = clock.poll_expired(cx) else { return Poll::Pending };
                this.cut();
                return Poll::Ready(Some(Err(expired.into())));
            }
        };
        match frame {
            Some(Ok(frame)) => {
                if let Some(along) = &mut this.along {
                    if let Some(Err(expired)) = along.clock.as_mut().map(Clock::wrote) {
                        this.cut();
                        return Poll::Ready(Some(Err(expired.into())));
                    }
                    if let Some(data) = frame.data_ref() {
                        along.kept.passed(data.len());
                    }
                }
                if this.kind.is_end() {
                    this.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            None => {
                this.end();
                Poll::Ready(None)
            }
            Some(Err(error)) => {
                this.cut();
                Poll::Ready(Some(Err(error)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.kind.is_end()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Empty => SizeHint::with_exact(0),
            Kind::Bytes(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Incoming(body) | Kind::Held(body, _) => body.size_hint(),
            Kind::Leased(lease) => lease.left().map_or_else(SizeHint::default, SizeHint::with_exact),
            Kind::Piped(piped) => piped.length.map_or_else(SizeHint::default, SizeHint::with_exact),
            Kind::Boxed(body) => body.size_hint(),
        }
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Empty => "empty",
            Kind::Bytes(_) => "bytes",
            Kind::Incoming(_) => "incoming",
            Kind::Leased(_) => "leased",
            Kind::Piped(_) => "piped",
            Kind::Held(..) => "held",
            Kind::Boxed(_) => "boxed",
        };
        f.debug_tuple("Body").field(&kind).finish()
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        if bytes.is_empty() { Self::empty() } else { Self { kind: Kind::Bytes(bytes), along: None, during: None } }
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Self {
        Bytes::from_static(text.as_bytes()).into()
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Bytes::from(text).into()
    }
}

impl From<Incoming> for Body {
    fn from(incoming: Incoming) -> Self {
        let kind = if HttpBody::is_end_stream(&incoming) { Kind::Empty } else { Kind::Incoming(incoming) };
        Self { kind, along: None, during: None }
    }
}

// === impl Keep ===

impl Keep for () {}

impl<K: Keep> Keep for Option<K> {
    fn head(&mut self, status: StatusCode) {
        self.iter_mut().for_each(|kept| kept.head(status));
    }

    fn refused(&mut self, status: StatusCode) {
        self.iter_mut().for_each(|kept| kept.refused(status));
    }

    fn passed(&mut self, bytes: usize) {
        self.iter_mut().for_each(|kept| kept.passed(bytes));
    }

    fn whole(&mut self) {
        self.iter_mut().for_each(Keep::whole);
    }
}

impl<K: Keep> Keep for Box<K> {
    fn head(&mut self, status: StatusCode) {
        K::head(self, status);
    }

    fn refused(&mut self, status: StatusCode) {
        K::refused(self, status);
    }

    fn passed(&mut self, bytes: usize) {
        K::passed(self, bytes);
    }

    fn whole(&mut self) {
        K::whole(self);
    }
}

impl<A: Keep, B: Keep> Keep for (A, B) {
    fn head(&mut self, status: StatusCode) {
        self.0.head(status);
        self.1.head(status);
    }

    fn refused(&mut self, status: StatusCode) {
        self.0.refused(status);
        self.1.refused(status);
    }

    fn passed(&mut self, bytes: usize) {
        self.0.passed(bytes);
        self.1.passed(bytes);
    }

    fn whole(&mut self) {
        self.0.whole();
        self.1.whole();
    }
}

/// What a body carried along before it was given something else.
impl Keep for Box<Along> {
    fn head(&mut self, status: StatusCode) {
        self.kept.head(status);
    }

    fn refused(&mut self, status: StatusCode) {
        self.kept.refused(status);
    }

    fn passed(&mut self, bytes: usize) {
        self.kept.passed(bytes);
    }

    fn whole(&mut self) {
        self.kept.whole();
    }
}

// === impl Kind ===

impl Kind {
    fn is_end(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Bytes(bytes) => bytes.is_empty(),
            Self::Incoming(body) | Self::Held(body, _) => HttpBody::is_end_stream(body),
            Self::Leased(lease) => lease.is_end(),
            Self::Piped(piped) => piped.length == Some(0),
            Self::Boxed(body) => body.is_end_stream(),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self {
            Self::Empty => Poll::Ready(None),
            Self::Bytes(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Incoming(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::Http),
            Self::Held(_, go) => {
                std::task::ready!(go.as_mut().poll(cx));
                let Self::Held(body, _) = std::mem::take(self) else { return Poll::Ready(None) };
                *self = Self::Incoming(body);
                self.poll(cx)
            }
            Self::Leased(lease) => lease.poll_frame(cx).map_err(BodyError::Endpoint),
            Self::Piped(piped) => {
                let frame = std::task::ready!(piped.frames.poll_recv(cx));
                if let (Some(left), Some(Ok(frame))) = (&mut piped.length, &frame) {
                    *left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len) as u64);
                }
                Poll::Ready(frame.map(|frame| frame.map_err(BodyError::Endpoint)))
            }
            Self::Boxed(body) => Pin::new(body).poll_frame(cx),
        }
    }
}
