//! What is seen of one pod's requests: figures, a line, spans; each only where it was asked for.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::{Request, StatusCode};
use hyper::body::Body as _;
use tokio::time::Instant;

use super::meters::{Meters, Sample, SeriesKey};
use crate::{
    head::Peer,
    observe::{
        Draft, Ended, Facts, GONE, Lines, Resource, Response, ServerSpan, Span, SpanId, SpanKind, Template, Tracer,
        Upload, Value, method_name,
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
    key: Option<SeriesKey>,
    upload: Upload,
    bytes: u64,
    draft: Option<Draft>,
    trail: Option<Box<Trail>>,
}

/// A request's spans.
#[derive(Debug)]
struct Trail {
    server: ServerSpan,
    client: SpanId,
    method: &'static str,
    path: String,
}

/// A pod as the source of spans.
#[must_use]
pub fn resource(facts: &Facts) -> Resource {
    let all = [
        ("service.name", facts.service_name().to_owned()),
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
        let key = self.meters.as_ref().map(|meters| meters.key(request));
        let trail = self.traces.as_ref().and_then(|tracer| Trail::begin(tracer, request, peer)).map(Box::new);
        self.seen(request, peer, key, trail)
    }

    /// A probe begins, if probes have lines.
    pub(super) fn probe(self: &Arc<Self>, request: &mut Request<Body>, peer: &Peer) -> Option<Seen> {
        self.log.as_ref().is_some_and(|log| log.probes).then(|| self.seen(request, peer, None, None))
    }

    fn seen(
        self: &Arc<Self>,
        request: &mut Request<Body>,
        peer: &Peer,
        key: Option<SeriesKey>,
        trail: Option<Box<Trail>>,
    ) -> Seen {
        let draft = (self.log.as_ref()).map(|log| log.template.draft(request, peer.addr, &self.facts));
        let upload = Upload::of(request);
        let (begun, watch) = (Instant::now(), Arc::clone(self));
        Seen { watch, begun, admitted: None, headed: None, status: None, key, upload, bytes: 0, draft, trail }
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
        if let (Some(meters), Some(key)) = (&watch.meters, self.key) {
            let app = self.admitted.map(|at| end.saturating_duration_since(at));
            let head = self.admitted.zip(self.headed).map(|(from, to)| to.saturating_duration_since(from));
            let whole = end.saturating_duration_since(self.begun);
            meters.add(&Sample { key: key.with(status), whole, app, head, sent, received: self.bytes });
        }
        if let (Some(log), Some(draft)) = (&watch.log, &self.draft) {
            let seconds = end.saturating_duration_since(self.begun).as_secs_f64();
            log.lines.push(&draft.finish(&Response { status, bytes: self.bytes, seconds }));
        }
        if let (Some(tracer), Some(trail)) = (&watch.traces, self.trail.take()) {
            let since = |time: Instant| time.saturating_duration_since(self.begun);
            let ended = Ended { took: since(end), status, sent, received: self.bytes };
            (*trail).send(tracer, watch, self.admitted.map(since), &ended);
        }
    }
}

// === impl Trail ===

impl Trail {
    fn begin(tracer: &Tracer, request: &mut Request<Body>, peer: &Peer) -> Option<Self> {
        let client = SpanId::random();
        let server = ServerSpan::begin(tracer, request, peer, "http", Some(client))?;
        let (_, method) = method_name(request.method());
        Some(Self { server, client, method, path: request.uri().path().to_owned() })
    }

    /// Four spans: the whole, what queue-proxy calls so, the time in line, the request to the user's container.
    fn send(self, tracer: &Tracer, watch: &Watch, admitted: Option<Duration>, ended: &Ended) {
        let Self { server, client, method, path } = self;
        let Ended { took, status, .. } = *ended;
        let (begun, proxy) = (Duration::ZERO, SpanId::random());
        if let Some(admitted) = admitted {
            let failed = status >= 400;
            let mut attributes = vec![
                ("http.request.method", Value::Text(method.to_owned())),
                ("server.address", Value::Text(watch.user.ip().to_string())),
                ("server.port", Value::Number(watch.user.port().into())),
                ("url.full", Value::Text(format!("http://{}{path}", watch.user))),
                ("http.response.status_code", Value::Number(status.into())),
            ];
            attributes.extend(failed.then(|| ("error.type", Value::Text(status.to_string()))));
            let part = server.part(tracer, (client, proxy), (server.name(), SpanKind::Client), [admitted, took]);
            tracer.send(Span { attributes, failed, ..part });
        }
        if watch.waits {
            let what = ("kn.queueproxy.wait", SpanKind::Internal);
            tracer.send(server.part(tracer, (SpanId::random(), proxy), what, [begun, admitted.unwrap_or(took)]));
        }
        let what = ("kn.queueproxy.proxy", SpanKind::Internal);
        tracer.send(server.part(tracer, (proxy, server.id()), what, [begun, took]));
        server.finish(tracer, ended);
    }
}
