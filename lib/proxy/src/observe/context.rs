//! W3C Trace Context: which trace a request belongs to, and whether it is recorded.

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::head::text;

/// Trace, parent and flags.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// What vendors add; passed on as it is.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const B3: HeaderName = HeaderName::from_static("x-b3-traceid");

/// A trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(pub [u8; 16]);

/// A span of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanId(pub [u8; 8]);

/// Where a request stands in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: TraceId,
    /// The span that the next ones are children of.
    pub span: SpanId,
    /// Whether the trace is recorded.
    pub sampled: bool,
}

/// The trace that a request says it belongs to, where Knative's request log finds it. Empty if it is no number: it is a stranger's
/// text, and goes into lines as it is.
#[must_use]
pub fn trace_id(headers: &HeaderMap) -> &str {
    let trace = text(headers, &TRACEPARENT).split('-').nth(1).unwrap_or_else(|| text(headers, &B3));
    if trace.bytes().all(|digit| digit.is_ascii_hexdigit()) && trace.len() <= 32 { trace } else { "" }
}

// === impl TraceId ===

impl TraceId {
    /// One that nobody else has.
    #[must_use]
    pub fn random() -> Self {
        Self(fastrand::u128(1..).to_be_bytes())
    }
}

// === impl SpanId ===

impl SpanId {
    /// One that no other span of its trace has.
    #[must_use]
    pub fn random() -> Self {
        Self(fastrand::u64(1..).to_be_bytes())
    }
}

// === impl Context ===

impl Context {
    /// What the headers say; `None` if they say nothing, or nothing that is valid.
    #[must_use]
    pub fn read(headers: &HeaderMap) -> Option<Self> {
        let mut all = headers.get_all(TRACEPARENT).into_iter();
        let (one, None) = (all.next()?, all.next()) else { return None };
        let text = one.as_bytes().trim_ascii();
        // A later version may have more behind, which is not ours to read.
        let (head, rest) = text.split_at_checked(55)?;
        let version = hex::<1>(head.get(..2)?)?[0];
        let ends = if version == 0 { rest.is_empty() } else { rest.first().is_none_or(|byte| *byte == b'-') };
        let dashes = [2, 35, 52].iter().all(|at| head[*at] == b'-');
        let (trace, span) = (hex(&head[3..35])?, hex(&head[36..52])?);
        let flags = hex::<1>(&head[53..])?[0];
        let valid = version != 0xff && ends && dashes && trace != [0; 16] && span != [0; 8];
        valid.then_some(Self { trace: TraceId(trace), span: SpanId(span), sampled: flags & 1 == 1 })
    }

    /// Says so in the headers.
    pub fn write(&self, headers: &mut HeaderMap) {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        put(&mut text[3..35], &self.trace.0);
        put(&mut text[36..52], &self.span.0);
        text[54] = if self.sampled { b'1' } else { b'0' };
        if let Ok(value) = HeaderValue::from_bytes(&text) {
            headers.insert(TRACEPARENT, value);
        }
    }
}

/// Lower case only, as the standard has it.
fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

fn put(out: &mut [u8], bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (pair, byte) in out.chunks_exact_mut(2).zip(bytes) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(TRACEPARENT, HeaderValue::try_from(*value).expect("a value"));
        }
        headers
    }

    #[test]
    fn a_context_survives_the_wire() {
        let context = Context::read(&headers(&[GOOD])).expect("a context");
        assert_eq!((context.trace.0[0], context.span.0[7], context.sampled), (0x0a, 0x31, true));
        let mut written = HeaderMap::new();
        context.write(&mut written);
        assert_eq!(written[TRACEPARENT], GOOD);
        let later = format!("01-{}-more", &GOOD[3..]);
        assert_eq!(Context::read(&headers(&[&later])), Some(context), "a later version");
        assert_eq!(trace_id(&written), "0af7651916cd43dd8448eb211c80319c");
    }

    #[test]
    fn what_is_not_valid_is_no_context() {
        let zero = "0".repeat(32);
        let rows = [
            String::new(),
            GOOD[..54].to_owned(),
            format!("{GOOD}-more"),
            format!("ff-{}", &GOOD[3..]),
            GOOD.to_uppercase(),
            format!("00-{zero}-b7ad6b7169203331-01"),
            format!("00-0af7651916cd43dd8448eb211c80319c-{}-01", &zero[..16]),
            GOOD.replace('-', "_"),
            "\u{e9}".repeat(30),
        ];
        for row in rows {
            assert_eq!(Context::read(&headers(&[&row])), None, "{row}");
        }
        assert_eq!(Context::read(&headers(&[GOOD, GOOD])), None, "two of them");
        assert_eq!(Context::read(&HeaderMap::new()), None);
    }
}
