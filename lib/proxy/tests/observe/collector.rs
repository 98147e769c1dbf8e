//! A collector of traces: OTLP over HTTP and gRPC, decoded by messages of its own.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Buf as _;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use lifl_proxy::{Body, Handle, Peer, reply};
use prost::Message;

use crate::rig::{eventually, listen};

#[derive(Clone, PartialEq, Message)]
struct Exported {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, repeated, tag = "2")]
    spans: Vec<OtlpSpan>,
}

#[derive(Clone, PartialEq, Message)]
struct OtlpSpan {
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
    start: u64,
    #[prost(fixed64, tag = "8")]
    end: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
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
    #[prost(string, optional, tag = "1")]
    text: Option<String>,
    #[prost(int64, optional, tag = "3")]
    number: Option<i64>,
}

/// A span as it came, with ids in hex.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) trace: String,
    pub(crate) id: String,
    pub(crate) parent: String,
    pub(crate) name: String,
    pub(crate) kind: i32,
    pub(crate) times: (u64, u64),
    pub(crate) failed: bool,
    attributes: Vec<KeyValue>,
    resource: Vec<KeyValue>,
}

/// Takes spans, after it has refused so many posts.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    spans: Mutex<Vec<Seen>>,
    pub(crate) refuses: AtomicUsize,
    pub(crate) posts: AtomicUsize,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn find(all: &[KeyValue], key: &str) -> String {
    let value = all.iter().find(|one| one.key == key).and_then(|one| one.value.clone());
    value.map_or_else(String::new, |v| v.text.or_else(|| v.number.map(|n| n.to_string())).unwrap_or_default())
}

// === impl Seen ===

impl Seen {
    pub(crate) fn attribute(&self, key: &str) -> String {
        find(&self.attributes, key)
    }

    pub(crate) fn resource(&self, key: &str) -> String {
        find(&self.resource, key)
    }
}

// === impl Collector ===

impl Collector {
    pub(crate) async fn start() -> (Arc<Self>, SocketAddr) {
        let collector = Arc::new(Self::default());
        let at = listen(Arc::clone(&collector)).await;
        (collector, at)
    }

    /// So many spans, as soon as they are there.
    pub(crate) async fn spans(&self, count: usize) -> Vec<Seen> {
        eventually("spans", || self.spans.lock().expect("no panic").len() >= count).await;
        let spans = self.spans.lock().expect("no panic").clone();
        assert_eq!(spans.len(), count, "{spans:#?}");
        spans
    }

    fn take(&self, mut body: bytes::Bytes, grpc: bool) {
        if grpc {
            assert_eq!(body.get_u8(), 0, "not compressed");
            assert_eq!(body.get_u32() as usize, body.len());
        }
        let exported = Exported::decode(body).expect("a message");
        for of_one in exported.resource_spans {
            let resource = of_one.resource.unwrap_or_default().attributes;
            let spans = of_one.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.spans.lock().expect("no panic").extend(spans.map(|span| Seen {
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                name: span.name,
                kind: span.kind,
                times: (span.start, span.end),
                failed: span.status.is_some_and(|status| status.code == 2),
                attributes: span.attributes,
                resource: resource.clone(),
            }));
        }
    }
}

impl Handle for Collector {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        self.posts.fetch_add(1, Ordering::SeqCst);
        let grpc = match (request.uri().path(), request.headers()["content-type"].as_bytes()) {
            ("/v1/traces", b"application/x-protobuf") => false,
            ("/opentelemetry.proto.collector.trace.v1.TraceService/Export", b"application/grpc") => true,
            _ => return reply::empty(StatusCode::NOT_FOUND),
        };
        let body = request.into_body().collect().await.expect("a body").to_bytes();
        let refuse = |left: usize| left.checked_sub(1);
        if self.refuses.fetch_update(Ordering::SeqCst, Ordering::SeqCst, refuse).is_ok() {
            return reply::empty(StatusCode::SERVICE_UNAVAILABLE);
        }
        self.take(body, grpc);
        let mut response = reply::empty(StatusCode::OK);
        if grpc {
            response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
            response.headers_mut().insert("grpc-status", HeaderValue::from_static("0"));
        }
        response
    }
}
