//! Spans, and who decides which requests have them.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, Method, Request, Version, header};

use super::{
    context::{Context, SpanId, TRACESTATE, TraceId},
    export::Exporter,
    otlp::Value,
};
use crate::head::{Peer, X_FORWARDED_FOR};

/// Whose spans they are.
#[derive(Debug, Default)]
pub struct Resource {
    /// Attributes of a resource by OpenTelemetry's conventions.
    pub attributes: Vec<(&'static str, String)>,
    /// What makes the spans.
    pub scope: &'static str,
}

/// A part of a request's way, over.
#[derive(Clone, Debug)]
pub struct Span {
    /// The trace that it belongs to.
    pub trace: TraceId,
    /// Itself.
    pub id: SpanId,
    /// What it is part of.
    pub parent: Option<SpanId>,
    /// Its name: few different ones.
    pub name: &'static str,
    /// Its side.
    pub kind: SpanKind,
    /// Nanoseconds since 1970.
    pub start: u64,
    /// Nanoseconds since 1970.
    pub end: u64,
    /// What else is known.
    pub attributes: Vec<(&'static str, Value)>,
    /// It did not end well.
    pub failed: bool,
    /// Whose it is.
    pub resource: Arc<Resource>,
}

/// On which side of a call a span is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// Neither.
    Internal,
    /// It answers.
    Server,
    /// It asks.
    Client,
}

/// The span of a request that is answered, until it is over.
#[derive(Debug)]
pub struct ServerSpan {
    trace: TraceId,
    parent: Option<SpanId>,
    id: SpanId,
    name: &'static str,
    started: SystemTime,
    attributes: Vec<(&'static str, Value)>,
}

/// How a request that is answered ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// From its first byte to the last one of the response.
    pub took: Duration,
    /// Of the response.
    pub status: u16,
    /// Bytes of the request's body.
    pub sent: u64,
    /// Bytes of the response's body.
    pub received: u64,
}

/// Decides which requests are traced, and sends their spans. Cloning shares what is behind it.
#[derive(Clone, Debug)]
pub struct Tracer {
    exporter: Exporter,
    resource: Arc<Resource>,
    sample: f64,
}

/// The name of a request's span, and the method as an attribute: those that HTTP knows, one word for all others.
#[must_use]
pub fn method_name(method: &Method) -> (&'static str, &'static str) {
    let known = match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::CONNECT => "CONNECT",
        Method::OPTIONS => "OPTIONS",
        Method::TRACE => "TRACE",
        _ => return ("HTTP", "_OTHER"),
    };
    (known, known)
}

/// A time as spans have it.
fn unix_nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// What OpenTelemetry's conventions say of a request that is answered. The query is left out: secrets stand there.
fn server_attributes<B>(request: &Request<B>, peer: &Peer, scheme: &str) -> Vec<(&'static str, Value)> {
    let text = |value: &str| Value::Text(value.to_owned());
    let headers = request.headers();
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let ip = peer.addr.ip().to_canonical().to_string();
    let (_, method) = method_name(request.method());
    let authority = request.uri().authority().map(|authority| authority.as_str()).or_else(|| header(header::HOST));
    let client = header(X_FORWARDED_FOR).and_then(|all| all.split(',').next()).map_or(ip.as_str(), str::trim);
    let mut all = vec![
        ("http.request.method", text(method)),
        ("url.path", text(request.uri().path())),
        ("url.scheme", text(scheme)),
        ("network.protocol.version", text(version(request.version()))),
        ("client.address", text(client)),
        ("network.peer.port", Value::Number(peer.addr.port().into())),
        ("network.peer.address", Value::Text(ip)),
    ];
    if method == "_OTHER" {
        all.push(("http.request.method_original", text(request.method().as_str())));
    }
    if let Some(authority) = authority.and_then(|authority| authority.parse::<http::uri::Authority>().ok()) {
        all.push(("server.address", text(authority.host())));
        all.extend(authority.port_u16().map(|port| ("server.port", Value::Number(port.into()))));
    }
    all.extend(header(header::USER_AGENT).map(|agent| ("user_agent.original", text(agent))));
    all
}

const fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    }
}

// === impl ServerSpan ===

impl ServerSpan {
    /// Begins where the request does; `None` if it is not recorded. Who comes next is told of `next`, or of this span if there is
    /// none between.
    pub fn begin<B>(
        tracer: &Tracer,
        request: &mut Request<B>,
        peer: &Peer,
        scheme: &str,
        next: Option<SpanId>,
    ) -> Option<Self> {
        let (trace, parent) = tracer.join(request.headers_mut())?;
        let attributes = server_attributes(request, peer, scheme);
        let (name, _) = method_name(request.method());
        let id = SpanId::random();
        Context { trace, span: next.unwrap_or(id), sampled: true }.write(request.headers_mut());
        Some(Self { trace, parent, id, name, started: SystemTime::now(), attributes })
    }

    /// A span of the same trace, from and to so long after the request came.
    #[must_use]
    pub fn part(
        &self,
        tracer: &Tracer,
        (id, parent): (SpanId, SpanId),
        (name, kind): (&'static str, SpanKind),
        [from, to]: [Duration; 2],
    ) -> Span {
        Span {
            trace: self.trace,
            id,
            parent: Some(parent),
            name,
            kind,
            start: unix_nanos(self.started + from),
            end: unix_nanos(self.started + to),
            attributes: Vec::new(),
            failed: false,
            resource: Arc::clone(tracer.resource()),
        }
    }

    /// Itself, as a parent.
    #[must_use]
    pub const fn id(&self) -> SpanId {
        self.id
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Sends it.
    pub fn finish(self, tracer: &Tracer, ended: &Ended) {
        let Ended { took, status, sent, received } = *ended;
        let number = |number: u64| Value::Number(i64::try_from(number).unwrap_or(i64::MAX));
        let failed = status >= 500;
        let mut attributes = self.attributes;
        attributes.push(("http.response.status_code", Value::Number(status.into())));
        attributes.extend(failed.then(|| ("error.type", Value::Text(status.to_string()))));
        attributes.extend([("http.request.body.size", number(sent)), ("http.response.body.size", number(received))]);
        tracer.send(Span {
            trace: self.trace,
            id: self.id,
            parent: self.parent,
            name: self.name,
            kind: SpanKind::Server,
            start: unix_nanos(self.started),
            end: unix_nanos(self.started + took),
            attributes,
            failed,
            resource: Arc::clone(tracer.resource()),
        });
    }
}

// === impl Tracer ===

impl Tracer {
    /// Sends spans of `resource` by `exporter`. Of requests that say nothing of a trace, the share `sample` begins one.
    #[must_use]
    pub fn new(exporter: Exporter, resource: Resource, sample: f64) -> Self {
        Self { exporter, resource: Arc::new(resource), sample }
    }

    /// The same exporter for another resource.
    #[must_use]
    pub fn of(&self, resource: Resource, sample: f64) -> Self {
        Self { exporter: self.exporter.clone(), resource: Arc::new(resource), sample }
    }

    /// Of requests that say nothing of a trace, so many begin one.
    #[must_use]
    pub const fn sample(&self) -> f64 {
        self.sample
    }

    /// The trace that a request belongs to, and its parent there; `None` if it is not recorded, which who comes next is
    /// told, so that the dice are thrown once. Who asked for a trace decides; this one only where nobody did.
    #[must_use]
    pub fn join(&self, headers: &mut HeaderMap) -> Option<(TraceId, Option<SpanId>)> {
        if let Some(context) = Context::read(headers) {
            return context.sampled.then_some((context.trace, Some(context.span)));
        }
        // Of a trace that is not there, or cannot be read.
        headers.remove(TRACESTATE);
        let trace = TraceId::random();
        if fastrand::f64() < self.sample {
            return Some((trace, None));
        }
        Context { trace, span: SpanId::random(), sampled: false }.write(headers);
        None
    }

    /// Sends a span on its way; it is dropped if there are too many.
    pub fn send(&self, span: Span) {
        self.exporter.send(span);
    }

    /// Whose spans it sends.
    #[must_use]
    pub const fn resource(&self) -> &Arc<Resource> {
        &self.resource
    }

    /// Waits until what was sent so far has gone, or was given up.
    pub async fn flush(&self) {
        self.exporter.flush().await;
    }
}
