//! A request on its way into a connection: its head, then its body as it comes.

use std::{
    io::{self, IoSlice, Write as _},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue, Method, header, request};
use hyper::body::Body as _;
use tokio::{io::AsyncWrite as _, net::TcpStream};

use super::Broken;
use crate::{head, upstream::Body};

/// What an idle connection keeps for its next head.
const KEPT: usize = 4 << 10;

/// Writes one request after the other.
#[derive(Default)]
pub(super) struct Writer {
    /// The head, and the sizes of chunks.
    lines: Vec<u8>,
    /// So much of them has been written.
    at: usize,
    /// What comes after the lines.
    data: Bytes,
    /// What comes after the data.
    tail: &'static [u8],
    /// What is to come.
    body: Option<Body>,
    framing: Framing,
    /// Trailers that were announced: no others are sent.
    announced: Vec<HeaderName>,
    began: bool,
    /// The body has given a piece.
    asked: bool,
    /// Nothing more of it will be written.
    failed: bool,
    broken: Option<Broken>,
}

#[derive(Clone, Copy, Default)]
enum Framing {
    #[default]
    Chunked,
    /// So many bytes are to come.
    Length(u64),
}

// === impl Writer ===

impl Writer {
    /// Begins a request. How long it is is told by its body alone, so that head and body cannot differ.
    pub(super) fn begin(&mut self, head: &request::Parts, body: Body) {
        self.lines.clear();
        (self.at, self.began, self.asked) = (0, false, false);
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        for part in [head.method.as_str(), " ", path, " HTTP/1.1\r\n"] {
            self.lines.extend_from_slice(part.as_bytes());
        }
        let mut told = false;
        for (name, value) in &head.headers {
            match *name {
                header::CONTENT_LENGTH | header::TRANSFER_ENCODING => told = true,
                _ => self.line(name, value),
            }
        }
        self.body = (!body.is_end_stream()).then_some(body);
        let length = self.body.as_ref().map(|body| body.size_hint().exact());
        match length {
            // As Go has it: servers ask for the length of what usually has a body.
            None if told || [Method::POST, Method::PUT, Method::PATCH].contains(&head.method) => self.length(0),
            None => {}
            Some(Some(length)) => {
                self.framing = Framing::Length(length);
                self.length(length);
            }
            Some(None) => {
                self.framing = Framing::Chunked;
                self.lines.extend_from_slice(b"transfer-encoding: chunked\r\n");
                let announced = head.headers.get_all(header::TRAILER).into_iter();
                self.announced.clear();
                self.announced.extend(announced.flat_map(|value| head::tokens(value.as_bytes())).filter_map(trailer));
            }
        }
        self.lines.extend_from_slice(b"\r\n");
    }

    fn length(&mut self, length: u64) {
        // A vector takes all that is written.
        let _written = write!(self.lines, "content-length: {length}\r\n");
    }

    /// Writes; ready when all is written, or nothing more will be.
    pub(super) fn poll(&mut self, stream: &mut TcpStream, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_done() {
            return Poll::Ready(());
        }
        if let Err(broken) = ready!(self.poll_all(stream, cx)) {
            self.cut(broken);
        }
        Poll::Ready(())
    }

    fn poll_all(&mut self, stream: &mut TcpStream, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        loop {
            let filled = self.poll_fill(cx)?;
            while self.has_bytes() {
                let parts = [&self.lines[self.at..], &self.data, self.tail].map(IoSlice::new);
                let wrote = match ready!(Pin::new(&mut *stream).poll_write_vectored(cx, &parts)) {
                    Ok(0) => return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into())),
                    wrote => wrote?,
                };
                self.began = true;
                self.advance(wrote);
            }
            if self.body.is_none() {
                return Poll::Ready(Ok(()));
            }
            ready!(filled);
        }
    }

    /// Takes the next piece of the body, if the last one has been written.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let Some(body) = self.body.as_mut().filter(|_| self.data.is_empty() && self.tail.is_empty()) else {
            return Poll::Ready(Ok(()));
        };
        let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
        self.asked = true;
        let frame = frame.transpose().map_err(|error| Broken::Body(error.into()))?;
        let ended = frame.is_none() || body.is_end_stream();
        let mut trailers = None;
        match frame.map(hyper::body::Frame::into_data) {
            Some(Ok(data)) => self.data = data,
            Some(Err(frame)) => trailers = frame.into_trailers().ok(),
            None => {}
        }
        match &mut self.framing {
            Framing::Length(left) => {
                let more = self.data.len() as u64;
                *left = left.checked_sub(more).ok_or(Broken::Length)?;
                if ended && *left > 0 {
                    return Poll::Ready(Err(Broken::Length));
                }
            }
            Framing::Chunked => {
                if !self.data.is_empty() {
                    // A vector takes all that is written.
                    let _written = write!(self.lines, "{:x}\r\n", self.data.len());
                    self.tail = if ended { b"\r\n0\r\n\r\n" } else { b"\r\n" };
                } else if let Some(trailers) = trailers {
                    self.last(&trailers);
                } else if ended {
                    self.tail = b"0\r\n\r\n";
                }
            }
        }
        if ended {
            self.body = None;
        }
        Poll::Ready(Ok(()))
    }

    /// The end of chunks, with trailers: they are the end of a body.
    fn last(&mut self, trailers: &HeaderMap) {
        self.lines.extend_from_slice(b"0\r\n");
        for (name, value) in trailers {
            if self.announced.contains(name) {
                self.line(name, value);
            }
        }
        self.lines.extend_from_slice(b"\r\n");
        self.body = None;
    }

    fn line(&mut self, name: &HeaderName, value: &HeaderValue) {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            self.lines.extend_from_slice(part);
        }
    }

    fn has_bytes(&self) -> bool {
        self.at < self.lines.len() || !self.data.is_empty() || !self.tail.is_empty()
    }

    fn advance(&mut self, mut wrote: usize) {
        let lines = wrote.min(self.lines.len() - self.at);
        self.at += lines;
        wrote -= lines;
        let data = wrote.min(self.data.len());
        self.data.advance(data);
        self.tail = &self.tail[wrote - data..];
        if self.at == self.lines.len() {
            self.lines.clear();
            self.at = 0;
        }
    }

    /// Nothing of a request is to be written, or can be.
    pub(super) fn is_done(&self) -> bool {
        self.failed || (self.body.is_none() && !self.has_bytes())
    }

    /// The body of a request of which nothing was written; `None` if something was, or the body was asked for a piece already.
    pub(super) fn take_unsent(&mut self) -> Option<Body> {
        (!self.began && !self.asked).then(|| self.body.take().unwrap_or_default())
    }

    /// What kept a request from being written.
    pub(super) fn take_broken(&mut self) -> Option<Broken> {
        self.broken.take()
    }

    /// The same, if no answer can make up for it: the endpoint may have said why it takes no more, the client has not.
    pub(super) fn take_fatal(&mut self) -> Option<Broken> {
        self.broken.take_if(|broken| !matches!(broken, Broken::Io(_)))
    }

    /// Another request can follow: this one is written to its end. Lets go of what an idle connection does not need.
    pub(super) fn rest(&mut self) -> bool {
        self.lines.shrink_to(KEPT);
        !self.failed && self.is_done()
    }

    fn cut(&mut self, broken: Broken) {
        self.lines.clear();
        (self.at, self.data, self.tail) = (0, Bytes::new(), b"");
        // Who has not begun it may send it again.
        if self.began || self.asked {
            self.body = None;
        }
        self.failed = true;
        self.broken = Some(broken);
    }
}

/// A field that may come after a body: RFC 9110 6.5.1.
fn trailer(token: &[u8]) -> Option<HeaderName> {
    HeaderName::from_bytes(token).ok().filter(head::may_be_trailer)
}
