//! What is seen of a request on its way through the ingress: a line of the access log, a span. Where neither is wanted
//! nothing is made.

use std::{borrow::Cow, net::SocketAddr, sync::Arc, time::SystemTime};

use http::{HeaderValue, Method, Request, Response, Uri, Version, header};
use jiff::Timestamp;
use lifl_proxy::{
    Body, Keep, Peer, carry,
    head::{self, SERVING_REVISION},
    observe::{Ended, GONE, Lines, ServerSpan, Upload, trace_id},
};
use serde::Serialize;
use tokio::time::Instant;

use super::{backend::Backend, metrics::Refused, rules::Listener};
use crate::observe::Observe;

/// Of what clients write as they like, so much stands in a line.
const SHOWN: usize = 2048;

/// One request that is watched, until dropped.
#[derive(Debug)]
pub(super) struct Watch {
    observe: Arc<Observe>,
    begun: Instant,
    started: SystemTime,
    listener: Listener,
    line: Option<Box<Line>>,
    span: Option<Box<ServerSpan>>,
    status: u16,
    reason: Option<Refused>,
    upload: Upload,
    bytes: u64,
    complete: bool,
}

/// What a line tells that the head of a request told: as it came, and cut when it is written.
#[derive(Debug)]
struct Line {
    client: SocketAddr,
    method: Method,
    target: Uri,
    host: Option<HeaderValue>,
    version: Version,
    agent: Option<HeaderValue>,
    trace: String,
    backend: Option<Arc<Backend>>,
    revision: Option<HeaderValue>,
    upstream: Option<SocketAddr>,
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

fn text(value: Option<&HeaderValue>) -> Cow<'_, str> {
    value.map_or(Cow::Borrowed(""), |value| shown(String::from_utf8_lossy(value.as_bytes())))
}

fn shown(text: Cow<'_, str>) -> Cow<'_, str> {
    match text.char_indices().nth(SHOWN) {
        None => text,
        Some((end, _)) => Cow::Owned(text[..end].to_owned()),
    }
}

// === impl Observe ===

impl Observe {
    /// A request comes; `None` if nothing is to be seen of it.
    pub(super) fn begin(
        self: &Arc<Self>,
        listener: Listener,
        request: &mut Request<Body>,
        peer: &Peer,
    ) -> Option<Watch> {
        if self.log.is_none() && self.traces.is_none() {
            return None;
        }
        let begun = Instant::now();
        let scheme = if listener.is_tls() { "https" } else { "http" };
        let span = self.traces.as_ref().and_then(|tracer| ServerSpan::begin(tracer, request, peer, scheme, None));
        let line = self.log.as_ref().map(|_| Box::new(Line::new(request, peer)));
        let upload = Upload::of(request);
        Some(Watch {
            observe: Arc::clone(self),
            begun,
            started: SystemTime::now(),
            listener,
            line,
            span: span.map(Box::new),
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
    pub(super) fn routed(&mut self, request: &Request<Body>, backend: &Arc<Backend>) {
        if let Some(line) = &mut self.line {
            line.backend = Some(Arc::clone(backend));
            line.revision = request.headers().get(SERVING_REVISION).cloned();
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
        (self.line, self.span) = (None, None);
    }

    fn write(&self, lines: &Lines, line: &Line, sent: u64) {
        let backend = line.backend.as_ref().map(|backend| &backend.name);
        let path = line.target.path_and_query().map_or("", |path| path.as_str());
        let started = Timestamp::try_from(self.started).unwrap_or_default();
        let written = Written {
            time: format!("{started:.6}"),
            listener: self.listener.label(),
            client: line.client,
            method: line.method.as_str(),
            host: &line.host(),
            path: &shown(path.into()),
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
            revision: &text(line.revision.as_ref()),
            upstream: line.upstream,
            user_agent: &text(line.agent.as_ref()),
            trace_id: &line.trace,
        };
        // Texts and numbers: none fails to be written.
        lines.push(&serde_json::to_string(&written).unwrap_or_default());
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
        if let (Some(tracer), Some(span)) = (&self.observe.traces, self.span.take()) {
            let ended = Ended { took: self.begun.elapsed(), status: self.status, sent, received: self.bytes };
            span.finish(tracer, &ended);
        }
    }
}

// === impl Line ===

impl Line {
    fn new(request: &Request<Body>, peer: &Peer) -> Self {
        let headers = request.headers();
        Self {
            client: peer.addr,
            method: request.method().clone(),
            target: request.uri().clone(),
            host: headers.get(header::HOST).cloned(),
            version: request.version(),
            agent: headers.get(header::USER_AGENT).cloned(),
            trace: trace_id(headers).to_owned(),
            backend: None,
            revision: None,
            upstream: None,
        }
    }

    fn host(&self) -> Cow<'_, str> {
        self.target
            .authority()
            .map_or_else(|| text(self.host.as_ref()), |authority| shown(head::host(authority).into()))
    }
}
