//! Control events: small, owned, in binary or structured mode.

use cloudevents::{
    AttributesReader as _, Data, Event, EventBuilder as _, EventBuilderV10,
    event::{EventBuilderError, ExtensionValue, SpecVersion},
};
use http::{HeaderMap, header::CONTENT_TYPE};
use serde_json::Value;

use crate::{error::EventError, head::Head, text};

/// Longest structured event, bytes: base64 and JSON are held in memory several times over.
pub const MAX_STRUCTURED: usize = 8 << 20;

/// An event with its data.
#[derive(Clone, Debug, PartialEq)]
pub struct Control {
    event: Event,
}

// === impl Control ===

impl Control {
    /// From a request in binary mode: its head and its whole body.
    ///
    /// # Errors
    /// A value that is no text.
    pub fn from_binary(head: &Head<'_>, body: &[u8]) -> Result<Self, EventError> {
        let mut builder = EventBuilderV10::new().id(head.id()?).source(head.source()?).ty(head.kind()?);
        for (name, _) in head.iter() {
            builder = match name {
                "specversion" | "id" | "source" | "type" | "dataschema" => builder,
                "subject" => builder.subject(head.required(name)?),
                "time" => builder.time(head.required(name)?.into_owned()),
                _ => builder.extension(name, head.text(name)?.unwrap_or_default().into_owned()),
            };
        }
        let content_type = head.content_type().unwrap_or("application/json");
        builder = match head.text("dataschema")? {
            Some(schema) => builder.data_with_schema(content_type, schema.into_owned(), body.to_vec()),
            None => builder.data(content_type, body.to_vec()),
        };
        let event = builder.build().map_err(|error| refused(head, &error))?;
        Ok(Self { event })
    }

    /// From a request in structured mode.
    ///
    /// # Errors
    /// Another format than JSON, too long, unreadable, or what the SDK lets pass: empty or misnamed attributes.
    pub fn from_structured(headers: &HeaderMap, body: &[u8]) -> Result<Self, EventError> {
        let content_type = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let essence = content_type.split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/cloudevents+json") {
            return Err(EventError::Format(content_type.chars().take(200).collect()));
        }
        if body.len() > MAX_STRUCTURED {
            return Err(EventError::TooLong { limit: MAX_STRUCTURED });
        }
        let event: Event = serde_json::from_slice(body).map_err(|e| EventError::Unreadable(e.to_string()))?;
        if event.specversion() != SpecVersion::V10 {
            return Err(EventError::Version(event.specversion().to_string()));
        }
        for (name, value) in [("id", event.id()), ("source", event.source()), ("type", event.ty())] {
            if value.is_empty() {
                return Err(EventError::Empty(name.to_owned()));
            }
        }
        if event.subject() == Some("") {
            return Err(EventError::Empty("subject".to_owned()));
        }
        for (name, value) in event.iter_extensions() {
            if !text::is_name(name) {
                return Err(EventError::Name(name.chars().take(200).collect()));
            }
            if let ExtensionValue::Integer(number) = value
                && i32::try_from(*number).is_err()
            {
                return Err(EventError::value(name, &number.to_string(), "a signed 32-bit integer"));
            }
        }
        Ok(Self { event })
    }

    /// `id`.
    #[must_use]
    pub fn id(&self) -> &str {
        self.event.id()
    }

    /// `source`.
    #[must_use]
    pub fn source(&self) -> &str {
        self.event.source()
    }

    /// `type`.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.event.ty()
    }

    /// An extension attribute as text.
    #[must_use]
    pub fn extension(&self, name: &str) -> Option<String> {
        self.event.extension(name).map(ToString::to_string)
    }

    /// The data as JSON; `None` when there are none.
    ///
    /// # Errors
    /// [`EventError::Unreadable`].
    pub fn json(&self) -> Result<Option<Value>, EventError> {
        let unreadable = |e: serde_json::Error| EventError::Unreadable(format!("data: {e}"));
        match self.event.data() {
            None => Ok(None),
            Some(Data::Json(value)) => Ok(Some(value.clone())),
            Some(Data::String(text)) => serde_json::from_str(text).map(Some).map_err(unreadable),
            Some(Data::Binary(bytes)) if bytes.is_empty() => Ok(None),
            Some(Data::Binary(bytes)) => serde_json::from_slice(bytes).map(Some).map_err(unreadable),
        }
    }

    /// The event as the SDK holds it.
    #[must_use]
    pub const fn event(&self) -> &Event {
        &self.event
    }
}

/// What the SDK's builder refuses are values of the two attributes that have a type.
fn refused(head: &Head<'_>, error: &EventBuilderError) -> EventError {
    let (name, wanted) = match error {
        EventBuilderError::ParseTimeError { .. } => ("time", "a time of RFC 3339"),
        EventBuilderError::ParseUrlError { .. } => ("dataschema", "an absolute URI"),
        other => return EventError::Unreadable(other.to_string()),
    };
    let value = head.text(name).ok().flatten().unwrap_or_default();
    EventError::value(name, &value, wanted)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use serde_json::json;

    use super::*;
    use crate::{Mode, mode};

    fn of_type(content_type: &str) -> HeaderMap {
        let mut map = HeaderMap::new();
        map.insert(CONTENT_TYPE, HeaderValue::from_str(content_type).unwrap());
        map
    }

    fn event(change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut value = json!({"specversion": "1.0", "id": "1", "source": "/a", "type": "t"});
        change(&mut value);
        serde_json::to_vec(&value).unwrap()
    }

    // CloudEvents conformance, `features/http-protocol-binding.feature`: "HTTP structured content mode".
    #[test]
    fn the_conformance_feature_in_structured_mode() {
        for content_type in ["application/cloudevents+json", "application/cloudevents+json; charset=utf-8"] {
            let headers = of_type(content_type);
            assert_eq!(mode(&headers), Mode::Structured);
            let body = br#"{"specversion":"1.0","type":"com.example.someevent","time":"2018-04-05T03:56:24Z",
                "id":"1234-1234-1234","source":"/mycontext/subcontext","datacontenttype":"application/json",
                "data":{"message":"Hello World!"}}"#;
            let event = Control::from_structured(&headers, body).unwrap();
            assert_eq!((event.id(), event.kind()), ("1234-1234-1234", "com.example.someevent"));
            assert_eq!(event.source(), "/mycontext/subcontext");
            assert_eq!(event.event().datacontenttype(), Some("application/json"));
            assert_eq!(event.event().time().unwrap().timestamp(), 1_522_900_584);
            assert_eq!(event.json().unwrap(), Some(json!({"message": "Hello World!"})));
        }
    }

    #[test]
    fn binary_and_structured_say_the_same() {
        let mut headers = of_type("application/json");
        for (name, value) in [
            ("ce-specversion", "1.0"),
            ("ce-id", "a%20b"),
            ("ce-source", "/s"),
            ("ce-type", "t"),
            ("ce-subject", "who"),
            ("ce-time", "2018-04-05T03:56:24Z"),
            ("ce-dataschema", "urn:fl:model:m:00"),
            ("ce-fljob", "digits"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let head = Head::binary(&headers).unwrap();
        let binary = Control::from_binary(&head, br#"{"x":1}"#).unwrap();
        let body = event(|e| {
            e["id"] = "a b".into();
            e["source"] = "/s".into();
            e["subject"] = "who".into();
            e["time"] = "2018-04-05T03:56:24Z".into();
            e["dataschema"] = "urn:fl:model:m:00".into();
            e["fljob"] = "digits".into();
            e["data"] = json!({"x": 1});
        });
        let structured = Control::from_structured(&of_type("Application/CloudEvents+JSON"), &body).unwrap();
        assert_eq!(binary.json().unwrap(), structured.json().unwrap());
        assert_eq!(binary.extension("fljob"), structured.extension("fljob"));
        assert_eq!((binary.id(), binary.event().dataschema()), (structured.id(), structured.event().dataschema()));
        assert_eq!(Control::from_binary(&head, b"").unwrap().json().unwrap(), None);
        headers.insert("ce-time", HeaderValue::from_static("yesterday"));
        let error = Control::from_binary(&Head::binary(&headers).unwrap(), b"").unwrap_err().to_string();
        assert_eq!(error, "attribute 'time' is 'yesterday', which is not a time of RFC 3339");
    }

    #[test]
    fn what_the_sdk_lets_pass_is_refused() {
        let read = |body: &[u8]| Control::from_structured(&of_type("application/cloudevents+json"), body);
        for name in ["id", "source", "type", "subject"] {
            let error = read(&event(|e| e[name] = "".into())).unwrap_err();
            assert_eq!(error, EventError::Empty(name.to_owned()));
        }
        for name in ["my-ext", "Upper", ""] {
            let error = read(&event(|e| e[name] = "x".into())).unwrap_err();
            assert_eq!(error, EventError::Name(name.to_owned()));
        }
        let large = read(&event(|e| e["flround"] = json!(1_i64 << 40))).unwrap_err();
        assert!(matches!(large, EventError::Value { .. }), "{large}");
        assert_eq!(read(&event(|e| e["specversion"] = "0.3".into())).unwrap_err(), EventError::Version("0.3".into()));
        let both = event(|e| {
            e["data"] = json!(1);
            e["data_base64"] = "AA==".into();
        });
        for unreadable in [&both[..], b"", b"{", b"[]", b"null", &event(|e| e["id"] = 5.into())] {
            assert!(matches!(read(unreadable), Err(EventError::Unreadable(_))));
        }
    }

    #[test]
    fn size_and_format_are_bounded() {
        let long = vec![b' '; MAX_STRUCTURED + 1];
        let error = Control::from_structured(&of_type("application/cloudevents+json"), &long).unwrap_err();
        assert_eq!(error, EventError::TooLong { limit: MAX_STRUCTURED });
        for format in ["application/cloudevents", "application/cloudevents+avro", "application/cloudevents-batch+json"]
        {
            let error = Control::from_structured(&of_type(format), b"{}").unwrap_err();
            assert_eq!(error, EventError::Format(format.to_owned()));
        }
    }
}
