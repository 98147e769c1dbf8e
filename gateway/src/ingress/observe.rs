//! What is seen of a request on its way through the ingress: a line of the access log, a span. Where neither is wanted
//! nothing is made.

use std::{net::SocketAddr, sync::Arc, time::SystemTime};

use http::{HeaderMap, HeaderName, Request, Response, Version, header};
use jiff::Timestamp;
use lifl_proxy::{
    Body, Keep, Peer, carry,
    observe::{
        Context, GONE, Kind, Lines, Span, SpanId, TraceId, Tracer, Upload, Value, method_name, server_attributes,
        trace_id, unix_nanos,
    },
};
use serde::Serialize;
use tokio::time::Instant;

use super::{
    backend::{Backend, BackendName},
    metrics::Refused,
    rules::Listener,
};
use crate::observe::Observe;

const REVISION: HeaderName = HeaderName::from_static("knative-serving-revision");
/// Of what clients write as they like, so much stands in a line.
const SHOWN: usize = 2048;

/// One request that is watched, until dropped.
#[derive(Debug)]
pub(super) struct Watch {
    observe: Observe,
    begun: Instant,
    started: SystemTime,
    listener: Listener,
    line: Option<Box<Line>>,
    trail: Option<Box<Trail>>,
    status: u16,
    reason: Option<Refused>,
    upload: Upload,
    bytes: u64,
    complete: bool,
}

/// What a line tells that the head of a request told.
#[derive(Debug)]
struct Line {
    client: SocketAddr,
    method: String,
    host: String,
    path: String,
    version: Version,
    agent: String,
    trace: String,
    backend: Option<BackendName>,
    revision: String,
    upstream: Option<SocketAddr>,
}

#[derive(Debug)]
struct Trail {
    trace: TraceId,
    parent: Option<SpanId>,
    id: SpanId,
    name: &'static str,
    attributes: Vec<(&'static str, Value)>,
}

/// A line as it is written: one JSON object.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    time: String,
    listener: &'static str,
    client: SocketAddr,
    method: &'a str,
    host: &'a str,
    path: &'a str,
    protocol: &'static str,
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    request_bytes: u64,
    bytes: u64,
    /// Seconds.
    duration: f64,
    /// The response was not cut off.
    complete: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<&'a str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    revision: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream: Option<SocketAddr>,
    #[serde(skip_serializing_if = "str::is_empty")]
    user_agent: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    trace_id: &'a str,
}

fn text(headers: &HeaderMap, name: &HeaderName) -> String {
    headers.get(name).map_or_else(String::new, |value| shown(&String::from_utf8_lossy(value.as_bytes())))
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}

// === impl Observe ===

impl Observe {
    /// A request comes; `None` if nothing is to be seen of it.
    pub(super) fn begin(&self, listener: Listener, request: &mut Request<Body>, peer: &Peer) -> Option<Watch> {
        if self.log.is_none() && self.traces.is_none() {
            return None;
        }
        let begun = Instant::now();
        let trail = self.traces.as_ref().and_then(|tracer| Trail::begin(tracer, listener, request, peer));
        let line = self.log.as_ref().map(|_| Box::new(Line::new(request, peer)));
        let upload = Upload::of(request);
        Some(Watch {
            observe: self.clone(),
            begun,
            started: SystemTime::now(),
            listener,
            line,
            trail: trail.map(Box::new),
            status: GONE,
            reason: None,
            upload,
            bytes: 0,
            complete: false,
        })
    }
}

// === impl Watch ===

impl Watch {
    /// It goes to a backend; its head is as the backend is to see it.
    pub(super) fn routed(&mut self, request: &Request<Body>, backend: &Backend) {
        if let Some(line) = &mut self.line {
            line.backend = Some(backend.name.clone());
            line.revision = text(request.headers(), &REVISION);
        }
    }

    /// It goes to this address, or goes there now.
    pub(super) fn target(&mut self, at: SocketAddr) {
        if let Some(line) = &mut self.line {
            line.upstream = Some(at);
        }
    }

    /// The gateway itself answers.
    pub(super) const fn refused(&mut self, reason: Refused) {
        self.reason = Some(reason);
    }

    /// The head of the answer is there; its body takes the watch along.
    pub(super) fn answered(mut self, response: Response<Body>) -> Response<Body> {
        self.status = response.status().as_u16();
        carry(response, self)
    }

    /// Nothing is said of it.
    pub(super) fn forget(mut self) {
        (self.line, self.trail) = (None, None);
    }

    fn write(&self, lines: &Lines, line: &Line, sent: u64) {
        let backend = line.backend.as_ref();
        let started = Timestamp::try_from(self.started).unwrap_or_default();
        let written = Written {
            time: format!("{started:.6}"),
            listener: self.listener.label(),
            client: line.client,
            method: &line.method,
            host: &line.host,
            path: &line.path,
            protocol: match line.version {
                Version::HTTP_10 => "HTTP/1.0",
                Version::HTTP_2 => "HTTP/2",
                _ => "HTTP/1.1",
            },
            status: self.status,
            reason: self.reason.map(Refused::label),
            request_bytes: sent,
            bytes: self.bytes,
            duration: self.begun.elapsed().as_secs_f64(),
            complete: self.complete,
            namespace: backend.map(|backend| backend.namespace.as_str()),
            service: backend.map(|backend| backend.service.as_str()),
            revision: &line.revision,
            upstream: line.upstream,
            user_agent: &line.agent,
            trace_id: &line.trace,
        };
        // Texts and numbers: none fails to be written.
        lines.push(&serde_json::to_string(&written).unwrap_or_default());
    }

    fn send(&self, tracer: &Tracer, trail: &mut Trail, sent: u64) {
        let number = |number: u64| Value::Number(i64::try_from(number).unwrap_or(i64::MAX));
        let failed = self.status >= 500;
        let mut attributes = std::mem::take(&mut trail.attributes);
        attributes.extend([
            ("http.response.status_code", Value::Number(self.status.into())),
            ("http.request.body.size", number(sent)),
            ("http.response.body.size", number(self.bytes)),
        ]);
        attributes.extend(failed.then(|| ("error.type", Value::Text(self.status.to_string()))));
        tracer.send(Span {
            trace: trail.trace,
            id: trail.id,
            parent: trail.parent,
            name: trail.name,
            kind: Kind::Server,
            start: unix_nanos(self.started),
            end: unix_nanos(self.started + self.begun.elapsed()),
            attributes,
            failed,
            resource: Arc::clone(tracer.resource()),
        });
    }
}

impl Keep for Watch {
    fn passed(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    fn whole(&mut self) {
        self.complete = true;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let sent = self.upload.bytes();
        if let (Some(lines), Some(line)) = (&self.observe.log, self.line.take()) {
            self.write(lines, &line, sent);
        }
        if let Some(mut trail) = self.trail.take()
            && let Some(tracer) = &self.observe.traces
        {
            self.send(tracer, &mut trail, sent);
        }
    }
}

// === impl Line ===

impl Line {
    fn new(request: &Request<Body>, peer: &Peer) -> Self {
        let headers = request.headers();
        let target = request.uri();
        Self {
            client: peer.addr,
            method: request.method().to_string(),
            host: target.authority().map_or_else(|| text(headers, &header::HOST), |host| shown(host.as_str())),
            path: target.path_and_query().map_or_else(String::new, |path| shown(path.as_str())),
            version: request.version(),
            agent: text(headers, &header::USER_AGENT),
            trace: trace_id(headers).to_owned(),
            backend: None,
            revision: String::new(),
            upstream: None,
        }
    }
}

// === impl Trail ===

impl Trail {
    fn begin(tracer: &Tracer, listener: Listener, request: &mut Request<Body>, peer: &Peer) -> Option<Self> {
        let (trace, parent) = tracer.join(request.headers_mut())?;
        let attributes = server_attributes(request, peer, if listener.is_tls() { "https" } else { "http" });
        let (name, _) = method_name(request.method());
        let id = SpanId::random();
        Context { trace, span: id, sampled: true }.write(request.headers_mut());
        Some(Self { trace, parent, id, name, attributes })
    }
}
