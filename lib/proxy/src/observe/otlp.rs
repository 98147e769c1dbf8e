//! Messages of OTLP (`opentelemetry.proto.*.v1`), as far as spans need them.

use prost::{Message, Oneof};

use super::span::{Resource, Span, SpanKind};

/// What a collector is sent.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Export {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Attributes>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

/// `Resource`: of it we use the attributes.
#[derive(Clone, PartialEq, Message)]
struct Attributes {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<Wire>,
}

#[derive(Clone, PartialEq, Message)]
struct Scope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

/// `Span`.
#[derive(Clone, PartialEq, Message)]
struct Wire {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
    #[prost(fixed32, tag = "16")]
    flags: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "3")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(oneof = "Value", tags = "1, 3")]
    value: Option<Value>,
}

/// Value of an attribute.
#[derive(Clone, PartialEq, Eq, Oneof)]
pub enum Value {
    /// A text.
    #[prost(string, tag = "1")]
    Text(String),
    /// A number.
    #[prost(int64, tag = "3")]
    Number(i64),
}

/// `STATUS_CODE_ERROR`.
const ERROR: i32 = 2;
/// The trace is recorded.
const SAMPLED: u32 = 1;

/// The message for spans; those of one resource are together.
pub(super) fn export(spans: Vec<Span>) -> Export {
    let mut export = Export::default();
    let mut known: Vec<std::sync::Arc<Resource>> = Vec::new();
    for span in spans {
        let at = known.iter().position(|resource| std::sync::Arc::ptr_eq(resource, &span.resource));
        let at = at.unwrap_or_else(|| {
            known.push(std::sync::Arc::clone(&span.resource));
            export.resource_spans.push(of_resource(&span.resource));
            known.len() - 1
        });
        if let Some(scope) = export.resource_spans.get_mut(at).and_then(|one| one.scope_spans.first_mut()) {
            scope.spans.push(wire(span));
        }
    }
    export
}

fn of_resource(resource: &Resource) -> ResourceSpans {
    let scope = Scope { name: resource.scope.to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
    let attributes = resource.attributes.iter().map(|(key, text)| attribute(key, Value::Text(text.clone())));
    ResourceSpans {
        resource: Some(Attributes { attributes: attributes.collect() }),
        scope_spans: vec![ScopeSpans { scope: Some(scope), spans: Vec::new() }],
    }
}

fn wire(span: Span) -> Wire {
    Wire {
        trace_id: span.trace.0.into(),
        span_id: span.id.0.into(),
        parent_span_id: span.parent.map_or_else(Vec::new, |parent| parent.0.into()),
        name: span.name.to_owned(),
        kind: match span.kind {
            SpanKind::Internal => 1,
            SpanKind::Server => 2,
            SpanKind::Client => 3,
        },
        start_time_unix_nano: span.start,
        end_time_unix_nano: span.end,
        attributes: span.attributes.into_iter().map(|(key, value)| attribute(key, value)).collect(),
        status: span.failed.then_some(Status { code: ERROR }),
        flags: SAMPLED,
    }
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
}
