//! A collector of traces: OTLP over HTTP and gRPC.

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
use prost::Message as _;

use crate::{
    otlp::{Exported, KeyValue, find, hex},
    rig::{eventually, listen},
};

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
