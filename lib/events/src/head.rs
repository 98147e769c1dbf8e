//! The head of an event in binary mode: a view over the headers.

use std::{borrow::Cow, str::FromStr};

use http::{HeaderMap, HeaderName, HeaderValue, header::CONTENT_TYPE};

use crate::{error::EventError, text};

const PREFIX: &str = "ce-";
const REQUIRED: [&str; 4] = ["specversion", "id", "source", "type"];
/// Optional attributes that must not be empty when present.
const NEVER_EMPTY: [&str; 3] = ["dataschema", "subject", "time"];

/// How a request carries its event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Attributes are headers, the body is the data.
    Binary,
    /// The body is the event.
    Structured,
    /// The body is a list of events.
    Batch,
}

/// The attributes of an event in binary mode, borrowed from its headers.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    headers: &'a HeaderMap,
}

/// The mode that the Content-Type says.
#[must_use]
pub fn mode(headers: &HeaderMap) -> Mode {
    let value = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let begins = |with: &str| value.get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with.as_bytes()));
    if begins("application/cloudevents-batch") {
        Mode::Batch
    } else if begins("application/cloudevents") {
        Mode::Structured
    } else {
        Mode::Binary
    }
}

// === impl Head ===

impl<'a> Head<'a> {
    /// Views the headers of a request in binary mode, once all that every event must fulfil is checked.
    ///
    /// # Errors
    /// The first attribute that is missing, empty, repeated or misnamed; another version.
    pub fn binary(headers: &'a HeaderMap) -> Result<Self, EventError> {
        for name in headers.keys() {
            if let Some(attribute) = name.as_str().strip_prefix(PREFIX) {
                check(headers, name, attribute)?;
            }
        }
        let head = Self { headers };
        for name in REQUIRED {
            if head.raw(name).ok_or_else(|| EventError::Missing(name.to_owned()))?.is_empty() {
                return Err(EventError::Empty(name.to_owned()));
            }
        }
        if let Some(empty) = NEVER_EMPTY.iter().find(|name| head.raw(name).is_some_and(HeaderValue::is_empty)) {
            return Err(EventError::Empty((*empty).to_owned()));
        }
        let version = head.required("specversion")?;
        if version != "1.0" {
            return Err(EventError::Version(version.into_owned()));
        }
        Ok(head)
    }

    /// The attribute as it came, to be passed on.
    #[must_use]
    pub fn raw(&self, name: &str) -> Option<&'a HeaderValue> {
        // Names of attributes are at most some twenty characters: no allocation.
        let mut key = [0; 64];
        let length = PREFIX.len() + name.len();
        let slot = key.get_mut(..length)?;
        slot[..PREFIX.len()].copy_from_slice(PREFIX.as_bytes());
        slot[PREFIX.len()..].copy_from_slice(name.as_bytes());
        self.headers.get(std::str::from_utf8(slot).ok()?)
    }

    /// The attribute as text, unquoted and percent-decoded.
    ///
    /// # Errors
    /// [`EventError::Encoding`].
    pub fn text(&self, name: &str) -> Result<Option<Cow<'a, str>>, EventError> {
        let Some(value) = self.raw(name) else { return Ok(None) };
        let text = text::decode(value.as_bytes()).ok_or_else(|| EventError::Encoding {
            name: name.to_owned(),
            value: String::from_utf8_lossy(value.as_bytes()).chars().take(200).collect(),
        })?;
        Ok(Some(text))
    }

    /// As [`Self::text`], and neither absent nor empty.
    ///
    /// # Errors
    /// [`EventError::Missing`], [`EventError::Empty`], [`EventError::Encoding`].
    pub fn required(&self, name: &str) -> Result<Cow<'a, str>, EventError> {
        let text = self.text(name)?.ok_or_else(|| EventError::Missing(name.to_owned()))?;
        if text.is_empty() {
            return Err(EventError::Empty(name.to_owned()));
        }
        Ok(text)
    }

    /// The attribute as a value of another type; `wanted` says in an error what that is.
    ///
    /// # Errors
    /// [`EventError::Value`], [`EventError::Encoding`].
    pub fn parse<T: FromStr>(&self, name: &str, wanted: &'static str) -> Result<Option<T>, EventError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        text.parse().map(Some).map_err(|_no_detail| EventError::value(name, &text, wanted))
    }

    /// `id`.
    ///
    /// # Errors
    /// [`EventError::Encoding`].
    pub fn id(&self) -> Result<Cow<'a, str>, EventError> {
        self.required("id")
    }

    /// `source`.
    ///
    /// # Errors
    /// [`EventError::Encoding`].
    pub fn source(&self) -> Result<Cow<'a, str>, EventError> {
        self.required("source")
    }

    /// `type`.
    ///
    /// # Errors
    /// [`EventError::Encoding`].
    pub fn kind(&self) -> Result<Cow<'a, str>, EventError> {
        self.required("type")
    }

    /// `datacontenttype`: the Content-Type header, if it is text.
    #[must_use]
    pub fn content_type(&self) -> Option<&'a str> {
        self.headers.get(CONTENT_TYPE)?.to_str().ok()
    }

    /// Attributes with their values as they came, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, &'a HeaderValue)> {
        self.headers.iter().filter_map(|(name, value)| Some((name.as_str().strip_prefix(PREFIX)?, value)))
    }
}

fn check(headers: &HeaderMap, name: &HeaderName, attribute: &str) -> Result<(), EventError> {
    if attribute == "datacontenttype" {
        return Err(EventError::ContentType);
    }
    if !text::is_name(attribute) {
        return Err(EventError::Name(attribute.to_owned()));
    }
    if headers.get_all(name).iter().nth(1).is_some() {
        return Err(EventError::Repeated(attribute.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in lines {
            map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        map
    }

    const GOOD: [(&str, &str); 5] = [
        ("CE-SpecVersion", "1.0"),
        ("ce-id", "1"),
        ("Ce-Source", "/a"),
        ("ce-type", "t"),
        ("Content-Type", "application/json"),
    ];

    #[test]
    fn the_mode_is_told_by_the_beginning_of_the_content_type_in_any_case() {
        for (value, expected) in [
            ("application/json", Mode::Binary),
            ("application/cloudevents+json", Mode::Structured),
            ("APPLICATION/CloudEvents+JSON; charset=utf-8", Mode::Structured),
            ("application/cloudevents", Mode::Structured),
            ("application/cloudevents-batch+json", Mode::Batch),
            ("Application/CloudEvents-Batch", Mode::Batch),
            ("application/cloudevent", Mode::Binary),
            ("", Mode::Binary),
        ] {
            assert_eq!(mode(&headers(&[("content-type", value)])), expected, "{value}");
        }
        assert_eq!(mode(&HeaderMap::new()), Mode::Binary);
    }

    // CloudEvents conformance, `features/http-protocol-binding.feature`: "HTTP binary content mode".
    #[test]
    fn the_conformance_feature_in_binary_mode() {
        for content_type in ["application/json", "application/json; charset=utf-8"] {
            let map = headers(&[
                ("Host", "hostname"),
                ("ce-specversion", "1.0"),
                ("ce-type", "com.example.someevent"),
                ("ce-time", "2018-04-05T03:56:24Z"),
                ("ce-id", "1234-1234-1234"),
                ("ce-source", "/mycontext/subcontext"),
                ("Content-Type", content_type),
                ("Content-Length", "18"),
            ]);
            assert_eq!(mode(&map), Mode::Binary);
            let head = Head::binary(&map).unwrap();
            for (name, value) in [
                ("id", "1234-1234-1234"),
                ("type", "com.example.someevent"),
                ("specversion", "1.0"),
                ("source", "/mycontext/subcontext"),
                ("time", "2018-04-05T03:56:24Z"),
            ] {
                assert_eq!(head.text(name).unwrap().as_deref(), Some(value), "{name}");
            }
            assert_eq!(head.content_type(), Some(content_type));
            assert_eq!(head.iter().count(), 5);
        }
    }

    #[test]
    fn what_every_event_must_fulfil_is_an_error_that_names_it() {
        let cases: [(&[(&str, &str)], EventError); 9] = [
            (&[("ce-my-ext", "1")], EventError::Name("my-ext".into())),
            (&[("ce-my_ext", "1")], EventError::Name("my_ext".into())),
            (&[("ce-", "1")], EventError::Name(String::new())),
            (&[("ce-data", "1")], EventError::Name("data".into())),
            (&[("ce-datacontenttype", "a/b")], EventError::ContentType),
            (&[("ce-id", "2")], EventError::Repeated("id".into())),
            (&[("ce-ext", "1"), ("ce-ext", "1")], EventError::Repeated("ext".into())),
            (&[("ce-subject", "")], EventError::Empty("subject".into())),
            (&[("ce-dataschema", "")], EventError::Empty("dataschema".into())),
        ];
        for (more, expected) in cases {
            let map = headers(&[&GOOD, more].concat());
            assert_eq!(Head::binary(&map).unwrap_err(), expected);
        }
        for name in REQUIRED {
            let header = format!("ce-{name}");
            let mut map = headers(&GOOD);
            map.insert(HeaderName::from_bytes(header.as_bytes()).unwrap(), HeaderValue::from_static(""));
            assert_eq!(Head::binary(&map).unwrap_err(), EventError::Empty(name.to_owned()));
            map.remove(&header);
            assert_eq!(Head::binary(&map).unwrap_err(), EventError::Missing(name.to_owned()));
        }
        let mut map = headers(&GOOD);
        map.insert("ce-specversion", HeaderValue::from_static("0.3"));
        assert_eq!(Head::binary(&map).unwrap_err(), EventError::Version("0.3".into()));
        // Quoted emptiness is emptiness too, told where the value is read.
        map = headers(&GOOD);
        map.insert("ce-id", HeaderValue::from_static("\"\""));
        assert_eq!(Head::binary(&map).unwrap().id().unwrap_err(), EventError::Empty("id".into()));
    }

    #[test]
    fn typed_reads_decode_and_relayed_bytes_stay() {
        let mut map = headers(&GOOD);
        map.insert("ce-subject", HeaderValue::from_static("a%20b"));
        map.insert("ce-flround", HeaderValue::from_static("three"));
        map.insert("ce-bad", HeaderValue::from_bytes(b"\xff").unwrap());
        let head = Head::binary(&map).unwrap();
        assert_eq!(head.text("subject").unwrap().unwrap(), "a b");
        assert_eq!(head.raw("subject").unwrap(), "a%20b");
        let error = head.parse::<u32>("flround", "a number").unwrap_err().to_string();
        assert_eq!(error, "attribute 'flround' is 'three', which is not a number");
        assert!(matches!(head.text("bad"), Err(EventError::Encoding { .. })));
        assert_eq!(head.parse::<u32>("absent", "a number").unwrap(), None);
        assert_eq!(head.raw(&"x".repeat(200)), None);
    }

    proptest! {
        #[test]
        fn no_headers_panic(lines in prop::collection::vec(("(ce-)?[a-z0-9_-]{1,12}", prop::collection::vec(any::<u8>(), 0..20)), 0..8)) {
            let mut map = headers(&GOOD);
            for (name, value) in &lines {
                if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_bytes(value)) {
                    map.append(name, value);
                }
            }
            if let Ok(head) = Head::binary(&map) {
                for (name, _) in head.iter() {
                    prop_assert!(text::is_name(name));
                    let _either_way = head.text(name);
                }
            }
        }
    }
}
