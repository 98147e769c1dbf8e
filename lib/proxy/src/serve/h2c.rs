//! `Upgrade: h2c`: a connection that begins as HTTP/1.1 and goes on as HTTP/2, the first request included.
//!
//! HTTP/2 knows nothing of a request that came before it: RFC 7540 3.2 makes it stream 1, half closed. So what the client
//! sends after the `101` is passed on with one frame put in after its first (its SETTINGS): the request's HEADERS, as
//! the client would have written them. `HTTP2-Settings` is not looked at: the same settings follow in that first frame.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use hyper::{
    body::{Body as _, Incoming},
    upgrade::OnUpgrade,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::sniff::PREFACE;
use crate::{
    head::{self, HTTP2_SETTINGS},
    reply,
    upstream::Body,
};

const FRAME_HEAD: usize = 9;
/// What every HTTP/2 peer takes as one frame; a longer head stays with HTTP/1.1.
const FRAME: usize = 16_384;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const END_STREAM_AND_HEADERS: u8 = 0x5;

/// A connection on its way to HTTP/2.
#[derive(Debug)]
pub(super) struct Switch {
    pub(super) on: OnUpgrade,
    /// The frame of the request that asked for it.
    pub(super) request: Bytes,
}

/// What the client sends, with the request's frame behind its first one.
#[derive(Debug)]
pub(super) struct Joined<I> {
    io: I,
    /// Still to be put in.
    request: Option<Bytes>,
    /// Of the client, not passed on yet.
    read: BytesMut,
}

/// Whether a request asks for HTTP/2 and can have it: it must have no body, which would still be HTTP/1.1.
pub(super) fn wanted(request: &mut Request<Incoming>) -> Option<Switch> {
    let headers = request.headers();
    let to = headers.get(header::UPGRADE)?;
    let asked = to.as_bytes().eq_ignore_ascii_case(b"h2c")
        && request.version() == Version::HTTP_11
        && headers.contains_key(HTTP2_SETTINGS)
        && head::has_token(headers, &header::CONNECTION, "upgrade")
        && request.body().is_end_stream();
    let request_frame = asked.then(|| frame(request)).flatten()?;
    Some(Switch { on: hyper::upgrade::on(request), request: request_frame })
}

/// The answer that begins HTTP/2.
pub(super) fn switching() -> Response<Body> {
    let mut response = reply::empty(StatusCode::SWITCHING_PROTOCOLS);
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("h2c"));
    response
}

/// A request as the HEADERS of stream 1: literals that touch no table, so that the client's own compression goes on.
fn frame<B>(request: &Request<B>) -> Option<Bytes> {
    let mut block = BytesMut::new();
    let authority = request.headers().get(header::HOST)?.as_bytes();
    let path = request.uri().path_and_query()?.as_str();
    literal(&mut block, b":method", request.method().as_str().as_bytes());
    literal(&mut block, b":scheme", b"http");
    literal(&mut block, b":authority", authority);
    literal(&mut block, b":path", path.as_bytes());
    let named: Vec<&[u8]> = (request.headers().get_all(header::CONNECTION).into_iter())
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .collect();
    for (name, value) in request.headers() {
        let connections = named.iter().any(|named| named.eq_ignore_ascii_case(name.as_str().as_bytes()));
        let te = name == header::TE && value != "trailers";
        if !connections && !te && name != header::HOST && !head::is_hop_by_hop(name) {
            literal(&mut block, name.as_str().as_bytes(), value.as_bytes());
        }
    }
    let length = u32::try_from(block.len()).ok().filter(|_| block.len() <= FRAME)?;
    let mut frame = BytesMut::with_capacity(FRAME_HEAD + block.len());
    frame.put_uint(length.into(), 3);
    frame.put_u8(HEADERS);
    frame.put_u8(END_STREAM_AND_HEADERS);
    frame.put_u32(1);
    frame.put(block);
    Some(frame.freeze())
}

/// RFC 7541 6.2.2 with a new name, nothing compressed.
fn literal(block: &mut BytesMut, name: &[u8], value: &[u8]) {
    block.put_u8(0);
    for text in [name, value] {
        length(block, text.len());
        block.put_slice(text);
    }
}

/// RFC 7541 5.1 with a prefix of seven bits.
fn length(block: &mut BytesMut, length: usize) {
    const PREFIX: usize = 0x7f;
    let byte = |number: usize| u8::try_from(number & 0xff).unwrap_or_default();
    if length < PREFIX {
        block.put_u8(byte(length));
        return;
    }
    block.put_u8(byte(PREFIX));
    let mut rest = length - PREFIX;
    while rest >= 0x80 {
        block.put_u8(byte(rest & 0x7f) | 0x80);
        rest >>= 7;
    }
    block.put_u8(byte(rest));
}

// === impl Joined ===

impl<I> Joined<I> {
    pub(super) fn new(io: I, request: Bytes) -> Self {
        Self { io, request: Some(request), read: BytesMut::new() }
    }

    /// Puts the request in if enough has been read to know where.
    fn join(&mut self) -> io::Result<()> {
        let Some(request) = &self.request else { return Ok(()) };
        let told = self.read.len().min(PREFACE.len());
        if self.read[..told] != PREFACE[..told] {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no preface after the upgrade"));
        }
        let Some([a, b, c, kind]) = self.read.get(PREFACE.len()..PREFACE.len() + 4) else { return Ok(()) };
        let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
        if *kind != SETTINGS || length > FRAME {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no settings after the preface"));
        }
        let at = PREFACE.len() + FRAME_HEAD + length;
        if self.read.len() >= at {
            let rest = self.read.split_off(at);
            self.read.extend_from_slice(request);
            self.read.unsplit(rest);
            self.request = None;
        }
        Ok(())
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Joined<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.request.is_some() {
            let mut bytes = [0; 1024];
            let mut some = ReadBuf::new(&mut bytes);
            std::task::ready!(Pin::new(&mut this.io).poll_read(cx, &mut some))?;
            if some.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.read.extend_from_slice(some.filled());
            this.join()?;
        }
        if this.read.is_empty() {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        let length = this.read.len().min(buf.remaining());
        buf.put_slice(&this.read[..length]);
        this.read.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Joined<I> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn lengths_are_written_as_rfc_7541_c_1_has_them() {
        let written = |number: usize| {
            let mut block = BytesMut::new();
            length(&mut block, number);
            block.to_vec()
        };
        assert_eq!(written(10), [10]);
        assert_eq!(written(126), [126]);
        assert_eq!(written(127), [127, 0]);
        assert_eq!(written(127 + 1337 - 31), [127, 0x80 | (1306 & 0x7f) as u8, 10]);
    }

    #[tokio::test]
    async fn the_request_stands_behind_the_settings_however_they_are_cut() {
        let settings = [0, 0, 6, SETTINGS, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 100];
        let sent = [PREFACE, &settings, b"what follows"].concat();
        let expected = [PREFACE, &settings, b"REQUEST", b"what follows"].concat();
        for cut in 1..sent.len() {
            let (mut client, server) = tokio::io::duplex(4096);
            let (first, second) = (sent[..cut].to_vec(), sent[cut..].to_vec());
            let writing = tokio::spawn(async move {
                client.write_all(&first).await.expect("room");
                tokio::task::yield_now().await;
                client.write_all(&second).await.expect("room");
            });
            let mut joined = Joined::new(server, Bytes::from_static(b"REQUEST"));
            let mut read = vec![];
            joined.read_to_end(&mut read).await.expect("read");
            writing.await.expect("written");
            assert_eq!(read, expected, "cut at {cut}");
        }
    }
}
