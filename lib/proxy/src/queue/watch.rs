//! What is seen of one pod's requests: figures, a line, spans; each only where it was asked for.

use std::{net::SocketAddr, sync::Arc, time::SystemTime};

use http::{Request, StatusCode};
use hyper::body::Body as _;
use tokio::time::Instant;

use super::meters::{Kind as MeterKind, Meters, Sample};
use crate::{
    head::Peer,
    observe::{
        Context, Draft, Facts, GONE, Kind, Lines, Resource, Response, Span, SpanId, Template, TraceId, Tracer, Upload,
        Value, method_name, server_attributes, unix_nanos,
    },
    upstream::{Body, Keep},
};

/// What is to be seen of a pod's requests. By default: nothing.
#[derive(Clone, Debug, Default)]
pub struct Observe {
    /// Whose requests they are.
    pub facts: Facts,
    /// Where requests come in.
    pub port: u16,
    /// Figures for Prometheus, at port 9091.
    pub metrics: bool,
    /// A line for each request.
    pub log: Option<RequestLog>,
    /// Spans of requests.
    pub traces: Option<Tracer>,
}

/// Lines of requests.
#[derive(Clone, Debug)]
pub struct RequestLog {
    /// Where they go.
    pub lines: Lines,
    /// What they look like.
    pub template: Template,
    /// Probes have lines too.
    pub probes: bool,
}

/// Who watches.
#[derive(Debug)]
pub(super) struct Watch {
    facts: Facts,
    user: SocketAddr,
    /// There is a line in which requests wait.
    waits: bool,
    meters: Option<Meters>,
    log: Option<RequestLog>,
    traces: Option<Tracer>,
}

/// One request that is watched; told what becomes of it, and done with when dropped.
#[derive(Debug)]
pub(super) struct Seen {
    watch: Arc<Watch>,
    begun: Instant,
    /// It was let through to the user's container.
    admitted: Option<Instant>,
    /// The head of the container's answer came.
    headed: Option<Instant>,
    status: Option<StatusCode>,
    /// None: a probe, of which there is a line at most.
    kind: Option<MeterKind>,
    upload: Upload,
    bytes: u64,
    draft: Option<Draft>,
    trail: Option<Box<Trail>>,
}

/// A request's spans.
#[derive(Debug)]
struct Trail {
    trace: TraceId,
    parent: Option<SpanId>,
    server: SpanId,
    proxy: SpanId,
    client: SpanId,
    started: SystemTime,
    name: &'static str,
    method: &'static str,
    path: String,
    attributes: Vec<(&'static str, Value)>,
}

/// How a request went.
struct Over {
    begun: u64,
    admitted: Option<u64>,
    end: u64,
    status: u16,
}

/// A pod as the source of spans.
#[must_use]
pub fn resource(facts: &Facts) -> Resource {
    let service = [&facts.service, &facts.configuration, &facts.revision, &facts.pod];
    let service = service.into_iter().find(|name| !name.is_empty()).cloned().unwrap_or_default();
    let all = [
        ("service.name", service),
        ("service.version", env!("CARGO_PKG_VERSION").to_owned()),
        ("service.instance.id", facts.pod.clone()),
        ("k8s.container.name", "queue-proxy".to_owned()),
        ("k8s.namespace.name", facts.namespace.clone()),
        ("k8s.pod.name", facts.pod.clone()),
        ("kn.service.name", facts.service.clone()),
        ("kn.configuration.name", facts.configuration.clone()),
        ("kn.revision.name", facts.revision.clone()),
        ("telemetry.sdk.language", "rust".to_owned()),
        ("telemetry.sdk.name", "lifl".to_owned()),
    ];
    let attributes = all.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    Resource { attributes, scope: "knative.dev/serving/pkg/queue" }
}

// === impl Watch ===

impl Watch {
    /// `None` if there is nothing to see.
    pub(super) fn new(observe: Observe, user: SocketAddr, waits: bool) -> Option<Arc<Self>> {
        let Observe { facts, port, metrics, log, traces } = observe;
        if !metrics && log.is_none() && traces.is_none() {
            return None;
        }
        let meters = metrics.then(|| Meters::new(&facts, port, user));
        Some(Arc::new(Self { facts, user, waits, meters, log, traces }))
    }

    pub(super) const fn meters(&self) -> Option<&Meters> {
        self.meters.as_ref()
    }

    /// A request begins. Its head becomes what the user's container is to see of the trace.
    pub(super) fn begin(self: &Arc<Self>, request: &mut Request<Body>, peer: &Peer) -> Seen {
        let kind = self.meters.as_ref().map(|meters| meters.kind(request));
        let trail = self.traces.as_ref().and_then(|tracer| Trail::begin(tracer, request, peer)).map(Box::new);
        self.seen(request, peer, kind, trail)
    }

    /// A probe begins, if probes have lines.
    pub(super) fn probe(self: &Arc<Self>, request: &mut Request<Body>, peer: &Peer) -> Option<Seen> {
        self.log.as_ref().is_some_and(|log| log.probes).then(|| self.seen(request, peer, None, None))
    }

    fn seen(
        self: &Arc<Self>,
        request: &mut Request<Body>,
        peer: &Peer,
        kind: Option<MeterKind>,
        trail: Option<Box<Trail>>,
    ) -> Seen {
        let draft = (self.log.as_ref()).map(|log| log.template.draft(request, &peer.addr.to_string(), &self.facts));
        let upload = Upload::of(request);
        let (begun, watch) = (Instant::now(), Arc::clone(self));
        Seen { watch, begun, admitted: None, headed: None, status: None, kind, upload, bytes: 0, draft, trail }
    }
}

// === impl Seen ===

impl Seen {
    /// It goes to the user's container.
    pub(super) fn admit(&mut self) {
        self.admitted = Some(if self.watch.waits { Instant::now() } else { self.begun });
    }

    /// It is answered here.
    pub(super) fn answered(&mut self, response: &http::Response<Body>) {
        self.refused(response.status());
        self.bytes = response.body().size_hint().exact().unwrap_or_default();
    }
}

impl Keep for Seen {
    fn head(&mut self, status: StatusCode) {
        self.status = Some(status);
        self.headed = Some(Instant::now());
    }

    fn refused(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    fn passed(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }
}

impl Drop for Seen {
    fn drop(&mut self) {
        let end = Instant::now();
        let status = self.status.map_or(GONE, |status| status.as_u16());
        let sent = self.upload.bytes();
        let watch = &self.watch;
        if let (Some(meters), Some(kind)) = (&watch.meters, self.kind) {
            let app = self.admitted.map(|at| end.saturating_duration_since(at));
            let head = self.admitted.zip(self.headed).map(|(from, to)| to.saturating_duration_since(from));
            let whole = end.saturating_duration_since(self.begun);
            meters.add(&Sample { kind: kind.with(status), whole, app, head, sent, received: self.bytes });
        }
        if let (Some(log), Some(draft)) = (&watch.log, &self.draft) {
            let seconds = end.saturating_duration_since(self.begun).as_secs_f64();
            log.lines.push(&draft.finish(&Response { status, bytes: self.bytes, seconds }));
        }
        if let (Some(tracer), Some(trail)) = (&watch.traces, self.trail.take()) {
            let at = |time: Instant| unix_nanos(trail.started + time.saturating_duration_since(self.begun));
            let over = Over { begun: at(self.begun), admitted: self.admitted.map(at), end: at(end), status };
            (*trail).send(tracer, watch, &over, sent, self.bytes);
        }
    }
}

// === impl Trail ===

impl Trail {
    fn begin(tracer: &Tracer, request: &mut Request<Body>, peer: &Peer) -> Option<Self> {
        let (trace, parent) = tracer.join(request.headers_mut())?;
        let attributes = server_attributes(request, peer, "http");
        let (name, method) = method_name(request.method());
        let [server, proxy, client] = std::array::from_fn(|_| SpanId::random());
        Context { trace, span: client, sampled: true }.write(request.headers_mut());
        let (started, path) = (SystemTime::now(), request.uri().path().to_owned());
        Some(Self { trace, parent, server, proxy, client, started, name, method, path, attributes })
    }

    /// Four spans: the whole, what queue-proxy calls so, the time in line, the request to the user's container.
    fn send(mut self, tracer: &Tracer, watch: &Watch, over: &Over, sent: u64, received: u64) {
        let number = |number: u64| Value::Number(i64::try_from(number).unwrap_or(i64::MAX));
        let Over { begun, admitted, end, status } = *over;
        let result = |from: u16| {
            let failed = status >= from;
            let error = failed.then(|| ("error.type", Value::Text(status.to_string())));
            [Some(("http.response.status_code", Value::Number(status.into()))), error].into_iter().flatten()
        };
        let span = |id, parent, name, kind, (start, end), attributes, failed| Span {
            trace: self.trace,
            id,
            parent,
            name,
            kind,
            start,
            end,
            attributes,
            failed,
            resource: Arc::clone(tracer.resource()),
        };
        if let Some(admitted) = admitted {
            let mut attributes = vec![
                ("http.request.method", Value::Text(self.method.to_owned())),
                ("server.address", Value::Text(watch.user.ip().to_string())),
                ("server.port", Value::Number(watch.user.port().into())),
                ("url.full", Value::Text(format!("http://{}{}", watch.user, self.path))),
            ];
            attributes.extend(result(400));
            let parent = Some(self.proxy);
            let times = (admitted, end);
            tracer.send(span(self.client, parent, self.name, Kind::Client, times, attributes, status >= 400));
        }
        if watch.waits {
            let times = (begun, admitted.unwrap_or(end));
            let (id, parent) = (SpanId::random(), Some(self.proxy));
            tracer.send(span(id, parent, "kn.queueproxy.wait", Kind::Internal, times, Vec::new(), false));
        }
        let (times, parent) = ((begun, end), Some(self.server));
        tracer.send(span(self.proxy, parent, "kn.queueproxy.proxy", Kind::Internal, times, Vec::new(), false));
        let mut attributes = std::mem::take(&mut self.attributes);
        attributes.extend(result(500));
        attributes.extend([("http.request.body.size", number(sent)), ("http.response.body.size", number(received))]);
        let span = Span {
            attributes,
            ..span(self.server, self.parent, self.name, Kind::Server, times, Vec::new(), status >= 500)
        };
        tracer.send(span);
    }
}
