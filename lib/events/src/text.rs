//! Values of attributes as text: quoting and percent-encoding of the HTTP binding, and what is a name.

use std::borrow::Cow;

/// Undoes a double-quoted string, then one round of percent-encoding. `None` if the result is not UTF-8.
///
/// A `%` that begins no escape stays as it is: senders that encode nothing (most SDKs) mean it literally.
pub(crate) fn decode(raw: &[u8]) -> Option<Cow<'_, str>> {
    let unquoted = unquote(raw);
    if !unquoted.contains(&b'%') {
        return match unquoted {
            Cow::Borrowed(bytes) => std::str::from_utf8(bytes).ok().map(Cow::Borrowed),
            Cow::Owned(bytes) => String::from_utf8(bytes).ok().map(Cow::Owned),
        };
    }
    let mut out = Vec::with_capacity(unquoted.len());
    let mut rest: &[u8] = &unquoted;
    while let Some((&byte, after)) = rest.split_first() {
        let escape = (byte == b'%').then(|| after.first_chunk().and_then(hex)).flatten();
        out.push(escape.unwrap_or(byte));
        rest = if escape.is_some() { &after[2..] } else { after };
    }
    String::from_utf8(out).ok().map(Cow::Owned)
}

fn hex(digits: &[u8; 2]) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
    Some(digit(digits[0])? << 4 | digit(digits[1])?)
}

fn unquote(raw: &[u8]) -> Cow<'_, [u8]> {
    let Some(inner) = raw.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")) else {
        return Cow::Borrowed(raw);
    };
    if !inner.contains(&b'\\') {
        return Cow::Borrowed(inner);
    }
    let mut out = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter();
    while let Some(&byte) = bytes.next() {
        let escaped = (byte == b'\\').then(|| bytes.next()).flatten();
        out.push(*escaped.unwrap_or(&byte));
    }
    Cow::Owned(out)
}

/// Whether an attribute may have this name.
pub(crate) fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    !name.is_empty() && name != "data" && name.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As the specification says: space, `"`, `%` and everything outside of U+0021 to U+007E.
    fn encode(text: &str) -> String {
        let mut out = String::new();
        for byte in text.bytes() {
            match byte {
                b'"' | b'%' => out.push_str(&format!("%{byte:02X}")),
                0x21..=0x7e => out.push(char::from(byte)),
                _ => out.push_str(&format!("%{byte:02X}")),
            }
        }
        out
    }

    #[test]
    fn values_are_unquoted_and_decoded_once() {
        for (raw, text) in [
            (&b"plain"[..], Some("plain")),
            (b"", Some("")),
            (b"Euro%20%E2%82%AC%20%F0%9F%98%80", Some("Euro € 😀")),
            (b"%e2%82%ac %41", Some("€ A")),
            (b"%2541", Some("%41")),
            (b"100%", Some("100%")),
            (b"100%zz%2", Some("100%zz%2")),
            (b"\"a \\\"b\\\\ c\"", Some("a \"b\\ c")),
            (b"\"%22\"", Some("\"")),
            (b"\"", Some("\"")),
            (b"\"\"", Some("")),
            ("ä".as_bytes(), Some("ä")),
            (b"\xff", None),
            (b"%ff", None),
            (b"%C3%28", None),
        ] {
            assert_eq!(decode(raw).as_deref(), text, "{}", String::from_utf8_lossy(raw));
        }
    }

    proptest! {
        #[test]
        fn what_the_specification_encodes_is_decoded(text in any::<String>()) {
            let encoded = encode(&text);
            prop_assert_eq!(decode(encoded.as_bytes()).unwrap(), text);
        }

        #[test]
        fn no_bytes_panic(raw in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Some(text) = decode(&raw) {
                prop_assert!(text.len() <= raw.len());
            }
        }
    }
}
