//! What an endpoint answers: heads and bodies out of bytes (RFC 9112 4 to 7). Pure.

use std::mem::MaybeUninit;

use bytes::{Buf as _, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING},
};
use httparse::{ParserConfig, Status};
use hyper::ext::ReasonPhrase;

use super::Broken;
use crate::head;

/// Fields of a head, or of trailers.
const FIELDS: usize = 256;
/// A chunk's size with its extensions.
const SIZE_LINE: usize = 4 << 10;
/// Trailers of a body.
const TRAILERS: usize = 16 << 10;
/// Up to so many bytes are copied out of the buffer, so that it stays the connection's own: cheaper than another buffer.
const SMALL: usize = 4 << 10;

/// A response's head, and how its body comes.
pub(super) struct Head {
    pub(super) response: Response<()>,
    /// The whole body, if it has come with the head.
    pub(super) whole: Option<Bytes>,
    pub(super) body: Decoder,
    /// Another request may be sent on the connection.
    pub(super) keep_alive: bool,
}

/// What is to come of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decoder {
    /// Nothing.
    End,
    /// So many bytes.
    Length(u64),
    /// The size of a chunk.
    Size,
    /// So many bytes of a chunk.
    Chunk(u64),
    /// The line feed after a chunk.
    ChunkEnd,
    /// Trailers, or the empty line in their place.
    Trailers,
    /// All until the connection ends.
    Rest,
}

/// A piece of a body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
}

/// What the fields say of the body and of the connection.
#[derive(Default)]
struct Framing {
    length: Option<u64>,
    /// It was said more than once, or with more than its digits.
    repeated: bool,
    chunked: bool,
    close: bool,
    keep_alive: bool,
}

/// Takes the next head out of `buffer`; `None` while it is not whole. `seen` bytes were looked at before. `bodiless`: the request
/// was a HEAD.
///
/// # Errors
/// [`Broken`]: what is there is no response, or its head is longer than `bound`.
pub(super) fn head(
    buffer: &mut BytesMut,
    seen: &mut usize,
    bound: usize,
    bodiless: bool,
) -> Result<Option<Head>, Broken> {
    let Some(end) = end_of_head(buffer, *seen) else {
        if buffer.len() >= bound {
            return Err(Broken::Long(bound));
        }
        // A line feed at the end may be the last line's.
        *seen = buffer.len().saturating_sub(2);
        return Ok(None);
    };
    *seen = 0;
    if end > bound {
        return Err(Broken::Long(bound));
    }
    let block = Bytes::copy_from_slice(&buffer[..buffer.len().min(end + SMALL)]);
    buffer.advance(end);
    let mut fields = [const { MaybeUninit::uninit() }; FIELDS];
    let mut parsed = httparse::Response::new(&mut []);
    let config = ParserConfig::default();
    let Status::Complete(length) =
        config.parse_response_with_uninit_headers(&mut parsed, &block[..end], &mut fields)?
    else {
        return Err(Broken::Malformed("an empty line before its end"));
    };
    debug_assert_eq!(length, end);
    let http11 = parsed.version == Some(1);
    let status =
        StatusCode::from_u16(parsed.code.unwrap_or_default()).map_err(|_invalid| Broken::Malformed("status"))?;
    let mut framing = Framing::default();
    let mut headers = HeaderMap::with_capacity(parsed.headers.len());
    for field in &*parsed.headers {
        let (name, value) = pair(&block, field)?;
        if framing.heed(&name, &value)? {
            headers.append(name, value);
        }
    }
    let body = framing.body(status, bodiless, http11)?;
    match framing.length {
        // RFC 9112 6.3: the encoding counts, and the length must not be passed on beside it.
        Some(_) if framing.chunked => drop(headers.remove(CONTENT_LENGTH)),
        Some(length) if framing.repeated => drop(headers.insert(CONTENT_LENGTH, length.into())),
        _ => {}
    }
    let keep_alive = body != Decoder::Rest && !framing.close && (http11 || framing.keep_alive);
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.version_mut() = if http11 { Version::HTTP_11 } else { Version::HTTP_10 };
    *response.headers_mut() = headers;
    if let Some(reason) = parsed.reason.filter(|reason| status.canonical_reason() != Some(reason))
        && let Ok(reason) = ReasonPhrase::try_from(reason.as_bytes())
    {
        response.extensions_mut().insert(reason);
    }
    let (body, whole) = match body {
        Decoder::Length(length) if length <= (block.len() - end) as u64 => {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            buffer.advance(length);
            (Decoder::End, Some(block.slice(end..end + length)))
        }
        body => (body, None),
    };
    Ok(Some(Head { response, whole, body, keep_alive }))
}

/// The length of a head: up to the first empty line, looked for from `seen` on.
fn end_of_head(buffer: &[u8], seen: usize) -> Option<usize> {
    memchr::memchr_iter(b'\n', &buffer[seen..]).map(|at| seen + at + 1).find_map(|next| match buffer.get(next..) {
        Some([b'\n', ..]) => Some(next + 1),
        Some([b'\r', b'\n', ..]) => Some(next + 2),
        _ => None,
    })
}

fn pair(block: &Bytes, field: &httparse::Header<'_>) -> Result<(HeaderName, HeaderValue), Broken> {
    let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_invalid| Broken::Malformed("header name"))?;
    let value = HeaderValue::from_maybe_shared(block.slice_ref(field.value))
        .map_err(|_invalid| Broken::Malformed("header value"))?;
    Ok((name, value))
}

/// A length, however often it is said, if it is always the same.
fn length_of(value: &HeaderValue) -> Option<u64> {
    let mut said = value.as_bytes().split(|byte| *byte == b',').map(|length| {
        let length = length.trim_ascii();
        let digits = !length.is_empty() && length.iter().all(u8::is_ascii_digit);
        std::str::from_utf8(length).ok().filter(|_| digits).and_then(|length| length.parse::<u64>().ok())
    });
    let first = said.next().flatten()?;
    said.all(|length| length == Some(first)).then_some(first)
}

// === impl Framing ===

impl Framing {
    /// Takes a field into account; whether it is to stay in the head.
    fn heed(&mut self, name: &HeaderName, value: &HeaderValue) -> Result<bool, Broken> {
        if *name == CONTENT_LENGTH {
            let length = length_of(value).ok_or(Broken::Malformed("Content-Length"))?;
            let first = self.length.replace(length);
            if first.is_some_and(|first| first != length) {
                return Err(Broken::Malformed("several Content-Length"));
            }
            let plain = value == "0" || (!value.as_bytes().starts_with(b"0") && !value.as_bytes().contains(&b','));
            self.repeated |= first.is_some() || !plain;
            return Ok(first.is_none());
        }
        if *name == TRANSFER_ENCODING {
            // All that Go takes of an endpoint: of another encoding nobody here knows the end.
            if self.chunked || !value.as_bytes().eq_ignore_ascii_case(b"chunked") {
                return Err(Broken::Malformed("Transfer-Encoding"));
            }
            self.chunked = true;
        } else if *name == CONNECTION {
            for token in head::tokens(value.as_bytes()) {
                self.close |= token.eq_ignore_ascii_case(b"close");
                self.keep_alive |= token.eq_ignore_ascii_case(b"keep-alive");
            }
        }
        Ok(true)
    }

    fn body(&self, status: StatusCode, bodiless: bool, http11: bool) -> Result<Decoder, Broken> {
        let none = status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        if none || bodiless {
            return Ok(Decoder::End);
        }
        match self.length {
            _ if self.chunked && !http11 => Err(Broken::Malformed("Transfer-Encoding in HTTP/1.0")),
            _ if self.chunked => Ok(Decoder::Size),
            Some(0) => Ok(Decoder::End),
            Some(length) => Ok(Decoder::Length(length)),
            None => Ok(Decoder::Rest),
        }
    }
}

// === impl Decoder ===

impl Decoder {
    /// Takes the next piece of the body out of `buffer`; `None` if more must come first.
    ///
    /// # Errors
    /// [`Broken`]: these are no chunks.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Piece>, Broken> {
        loop {
            match *self {
                Self::End => return Ok(Some(Piece::End)),
                Self::Rest => return Ok(take(buffer, u64::MAX).map(Piece::Data)),
                Self::Length(left) => {
                    let Some(data) = take(buffer, left) else { return Ok(None) };
                    let left = left - data.len() as u64;
                    *self = if left == 0 { Self::End } else { Self::Length(left) };
                    return Ok(Some(Piece::Data(data)));
                }
                Self::Chunk(left) => {
                    let Some(data) = take(buffer, left) else { return Ok(None) };
                    let left = left - data.len() as u64;
                    *self = if left == 0 { Self::ChunkEnd } else { Self::Chunk(left) };
                    return Ok(Some(Piece::Data(data)));
                }
                Self::Size => {
                    let Some(size) = chunk_size(buffer)? else { return Ok(None) };
                    *self = if size == 0 { Self::Trailers } else { Self::Chunk(size) };
                }
                Self::ChunkEnd => match **buffer {
                    [b'\r', b'\n', ..] => {
                        buffer.advance(2);
                        *self = Self::Size;
                    }
                    [] | [b'\r'] => return Ok(None),
                    _ => return Err(Broken::Malformed("chunk without end")),
                },
                Self::Trailers => {
                    let Some(trailers) = trailers(buffer)? else { return Ok(None) };
                    *self = Self::End;
                    if !trailers.is_empty() {
                        return Ok(Some(Piece::Trailers(trailers)));
                    }
                }
            }
        }
    }

    /// The connection has ended.
    ///
    /// # Errors
    /// [`Broken::Short`] if more was to come.
    pub(super) const fn ended(&mut self) -> Result<(), Broken> {
        match self {
            Self::End | Self::Rest => {
                *self = Self::End;
                Ok(())
            }
            _ => Err(Broken::Short),
        }
    }
}

fn take(buffer: &mut BytesMut, most: u64) -> Option<Bytes> {
    let length = usize::try_from(most).unwrap_or(usize::MAX).min(buffer.len());
    match length {
        0 => None,
        1..=SMALL => {
            let data = Bytes::copy_from_slice(&buffer[..length]);
            buffer.advance(length);
            Some(data)
        }
        _ => Some(buffer.split_to(length).freeze()),
    }
}

fn chunk_size(buffer: &mut BytesMut) -> Result<Option<u64>, Broken> {
    const WRONG: Broken = Broken::Malformed("chunk size");
    // An empty size is none, though the parser takes it for zero.
    if buffer.first().is_some_and(|digit| !digit.is_ascii_hexdigit()) {
        return Err(WRONG);
    }
    match httparse::parse_chunk_size(buffer) {
        Ok(Status::Complete((length, size))) => {
            buffer.advance(length);
            Ok(Some(size))
        }
        Ok(Status::Partial) if buffer.len() < SIZE_LINE => Ok(None),
        Ok(Status::Partial) | Err(_) => Err(WRONG),
    }
}

fn trailers(buffer: &mut BytesMut) -> Result<Option<HeaderMap>, Broken> {
    if buffer.starts_with(b"\r\n") {
        buffer.advance(2);
        return Ok(Some(HeaderMap::new()));
    }
    if buffer.starts_with(b"\n") {
        return Err(Broken::Malformed("trailers"));
    }
    let Some(end) = end_of_head(buffer, 0) else {
        return if buffer.len() < TRAILERS { Ok(None) } else { Err(Broken::Long(TRAILERS)) };
    };
    let block = buffer.split_to(end).freeze();
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let Status::Complete((_, fields)) = httparse::parse_headers(&block, &mut fields)? else {
        return Err(Broken::Malformed("trailers"));
    };
    let mut trailers = HeaderMap::with_capacity(fields.len());
    for field in fields {
        let (name, value) = pair(&block, field)?;
        if head::may_be_trailer(&name) {
            trailers.append(name, value);
        }
    }
    Ok(Some(trailers))
}

#[cfg(test)]
mod tests;
