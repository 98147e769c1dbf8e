//! What Knative's queue-proxy does for one pod, byte for byte where others compare.
//!
//! ```text
//!  port 8012 / 8013 ─> Queue ── probe? ── answered here: draining? ready?
//!                        │ no
//!                        └─> timeouts ─> Forwarded ─> stats ─> breaker ─> Host ─> the user's port
//!  port 9090 ─> Figures: the stat message          port 8022 ─> Admin: wait-for-drain
//!  port 9091 ─> Metrics: Prometheus, if asked for
//! ```
//!
//! The protocol towards the user's container is the one that the client speaks.

use std::{
    future::Future,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, header};
use prost::Message as _;

use crate::{
    breaker::{Breaker, Full},
    endpoint::{Dial, Endpoint, Protocol},
    forward::{ForwardError, Ride, Tunnels, forward, within},
    head::{self, Peer},
    reply,
    serve::Handle,
    stats::{Present, Stats},
    timeouts::{Clock, Timeouts},
    upstream::{Body, Pool, Upstream},
};

mod drain;
mod meters;
mod probe;
mod readiness;
#[cfg(test)]
mod tests;
mod watch;

pub use drain::Drain;
pub use probe::{K_NETWORK_HASH, K_NETWORK_PROBE};
pub use readiness::{Probe, ProbeError, Readiness};
pub use watch::{Observe, RequestLog, resource};

use watch::{Seen, Watch};

/// No request for this long, and a draining pod is drained.
pub const QUIET: Duration = Duration::from_secs(30);
/// Tunnels of a drained pod are cut off after this.
pub const TUNNELS: Duration = Duration::from_secs(60);

const PROMETHEUS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// What is settled for a pod when it is made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its name, as the autoscaler knows it.
    pub pod_name: String,
    /// Requests at once; 0 is no limit.
    pub concurrency: usize,
    /// What its requests may take.
    pub timeouts: Timeouts,
    /// All must pass for the pod to be ready.
    pub readiness: Vec<Probe>,
    /// The user's port is asked whether it speaks h2c before it is probed over HTTP.
    pub http2_auto_detect: bool,
}

/// The proxy of one pod.
#[derive(Debug)]
pub struct Queue<D> {
    pod_name: String,
    user: SocketAddr,
    http1: Upstream<D>,
    h2c: Upstream<D>,
    breaker: Option<Breaker>,
    timeouts: Timeouts,
    stats: Stats,
    drain: Arc<Drain>,
    readiness: Readiness<D>,
    tunnels: Tunnels,
    /// None where nobody asks for figures, lines or traces: then they cost nothing.
    watch: Option<Arc<Watch>>,
}

/// Port 9090: the stat message.
#[derive(Debug)]
pub struct Figures<D>(pub Arc<Queue<D>>);

/// Port 9091: what Prometheus reads.
#[derive(Debug)]
pub struct Metrics<D>(pub Arc<Queue<D>>);

/// Port 8022: what the kubelet's preStop hook waits for.
#[derive(Debug)]
pub struct Admin<D>(pub Arc<Queue<D>>);

/// A [`Handle`] as a tower service, for one client.
#[derive(Debug)]
pub struct Service<H> {
    handler: Arc<H>,
    peer: Peer,
}

// === impl Queue ===

impl<D: Dial> Queue<D> {
    /// The proxy of the pod whose container listens at `user` in network namespace `place`.
    #[must_use]
    pub fn new(pool: &Pool<D>, user: SocketAddr, place: u64, settings: Settings) -> Self {
        let Settings { pod_name, concurrency, timeouts, readiness, http2_auto_detect } = settings;
        let at = |protocol| pool.upstream(Endpoint { addr: user, protocol, place });
        Self {
            pod_name,
            user,
            http1: at(Protocol::H1),
            h2c: at(Protocol::H2c),
            breaker: Breaker::for_concurrency(concurrency),
            timeouts,
            stats: Stats::new(),
            drain: Arc::new(Drain::new()),
            readiness: Readiness::new(pool.clone(), user, place, readiness, http2_auto_detect),
            tunnels: Tunnels::new(),
            watch: None,
        }
    }

    /// The same proxy, watched.
    #[must_use]
    pub fn observed(mut self, observe: Observe) -> Self {
        self.watch = Watch::new(observe, self.user, self.breaker.is_some());
        self
    }

    /// The pod is to end (SIGTERM): probes fail from now on; see [`Drain::done`].
    pub fn terminate(&self) {
        self.drain.terminate();
    }

    /// How far the pod's end has come.
    #[must_use]
    pub fn drain(&self) -> &Arc<Drain> {
        &self.drain
    }

    /// Its WebSockets and the like; to be ended after the server has closed.
    #[must_use]
    pub fn tunnels(&self) -> &Tunnels {
        &self.tunnels
    }

    /// Its figures.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Requests that are worked on and waiting.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.breaker.as_ref().map_or_else(|| self.stats.present() as usize, Breaker::present)
    }

    /// Whether the user's probe passes now.
    pub async fn ready(&self) -> bool {
        self.readiness.check().await
    }

    async fn health(&self, headers: &HeaderMap) -> Response<Body> {
        if self.drain.draining() {
            return probe::shutting_down();
        }
        if let Err(refused) = probe::for_queue(headers) {
            return refused;
        }
        if self.ready().await { probe::healthy() } else { reply::empty(StatusCode::SERVICE_UNAVAILABLE) }
    }

    async fn user(&self, mut request: Request<Body>, peer: &Peer) -> Response<Body> {
        let clock = self.timeouts.begin(&peer.timer);
        // A probe that nobody here answers is still no request of a user's.
        let watch = self.watch.as_ref().filter(|_| !request.headers().contains_key(K_NETWORK_PROBE));
        // Boxed: large, and mostly there is none.
        let seen = watch.map(|watch| Box::new(watch.begin(&mut request, peer)));
        let upstream = if request.version() == Version::HTTP_2 { &self.h2c } else { &self.http1 };
        head::shim_forwarded(request.headers_mut());
        let proxied = request.headers().get(head::K_PROXY_REQUEST).is_some_and(|by| by == "activator");
        let present = self.stats.come(proxied);
        let request = to_user(request);
        match self.pass(upstream, request, peer, clock, (present, seen)).await {
            Ok(response) => response,
            Err(refused) => refused,
        }
    }

    async fn pass(
        &self,
        upstream: &Upstream<D>,
        request: Request<Body>,
        peer: &Peer,
        mut clock: Option<Clock>,
        mut kept: (Present, Option<Box<Seen>>),
    ) -> Result<Response<Body>, Response<Body>> {
        let place = match &self.breaker {
            None => None,
            Some(breaker) => {
                let place = within(clock.as_mut(), pin!(breaker.acquire())).await;
                match place.map_err(|expired| refusal(&expired.into())).and_then(|place| place.map_err(full)) {
                    Ok(place) => Some(place),
                    Err(refused) => {
                        kept.1.iter_mut().for_each(|seen| seen.answered(&refused));
                        return Err(refused);
                    }
                }
            }
        };
        kept.1.iter_mut().for_each(|seen| seen.admit());
        let ride = Ride { peer, clock, kept: (place, kept), tunnels: &self.tunnels };
        forward(upstream, request, ride).await.map_err(|error| refusal(&error))
    }

    /// Answers a probe, with a line if probes have lines.
    async fn probed(&self, kind: probe::Kind, mut request: Request<Body>, peer: &Peer) -> Response<Body> {
        let seen = self.watch.as_ref().and_then(|watch| watch.probe(&mut request, peer));
        let response = match kind {
            probe::Kind::Health => self.health(request.headers()).await,
            probe::Kind::Network => probe::network(request.headers(), self.drain.draining()),
        };
        if let Some(mut seen) = seen {
            seen.answered(&response);
        }
        response
    }
}

/// Restores the host and takes away what the user's container is not to see.
fn to_user(request: Request<Body>) -> Request<Body> {
    let (mut parts, body) = request.into_parts();
    head::restore_host(&mut parts);
    head::strip_revision(&mut parts.headers);
    Request::from_parts(parts, body)
}

fn refusal(error: &ForwardError) -> Response<Body> {
    tracing::debug!(%error, "request is not answered by the user's container");
    match error {
        // The one text without a line feed.
        ForwardError::Expired(_) => reply::plain(StatusCode::GATEWAY_TIMEOUT, "request timeout"),
        error => reply::error(error.status(), &error.to_string()),
    }
}

fn full(full: Full) -> Response<Body> {
    reply::error(StatusCode::SERVICE_UNAVAILABLE, &full.to_string())
}

impl<D: Dial> Handle for Queue<D> {
    async fn handle(&self, request: Request<Body>, peer: &Peer) -> Response<Body> {
        match probe::kind(request.headers()) {
            // Boxed: rare, and so large that every request would be slower for holding it.
            Some(kind) => Box::pin(self.probed(kind, request, peer)).await,
            None => {
                self.drain.touch();
                self.user(request, peer).await
            }
        }
    }
}

// === impl Figures ===

impl<D: Dial> Handle for Figures<D> {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        if request.uri().path() != "/metrics" {
            return not_found();
        }
        let stat = self.0.stats.stat(&self.0.pod_name).encode_to_vec();
        let mut response = reply::empty(StatusCode::OK);
        *response.body_mut() = bytes::Bytes::from(stat).into();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/protobuf"));
        response
    }
}

// === impl Metrics ===

impl<D: Dial> Handle for Metrics<D> {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        let queue = &self.0;
        let meters = queue.watch.as_ref().and_then(|watch| watch.meters());
        let (Some(meters), "/metrics") = (meters, request.uri().path()) else { return not_found() };
        let depth = queue.breaker.as_ref().map(Breaker::present);
        let mut response = reply::empty(StatusCode::OK);
        *response.body_mut() = meters.text(depth).into();
        response.headers_mut().insert(header::CONTENT_TYPE, PROMETHEUS);
        response
    }
}

// === impl Admin ===

impl<D: Dial> Handle for Admin<D> {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        match request.uri().path() {
            "/wait-for-drain" => {
                Drain::wait(&self.0.drain).await;
                reply::empty(StatusCode::OK)
            }
            "/drain-complete" => match self.0.stats.present() {
                0 => reply::plain(StatusCode::OK, "drained"),
                present => reply::plain(StatusCode::SERVICE_UNAVAILABLE, format!("pending requests: {present}")),
            },
            _ => not_found(),
        }
    }
}

fn not_found() -> Response<Body> {
    reply::error(StatusCode::NOT_FOUND, "404 page not found")
}

// === impl Service ===

impl<H> Service<H> {
    /// `handler`, as `peer` sees it.
    #[must_use]
    pub const fn new(handler: Arc<H>, peer: Peer) -> Self {
        Self { handler, peer }
    }
}

impl<H> Clone for Service<H> {
    fn clone(&self) -> Self {
        Self { handler: Arc::clone(&self.handler), peer: self.peer.clone() }
    }
}

impl<H: Handle> tower::Service<Request<Body>> for Service<H> {
    type Response = Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Self { handler, peer } = self.clone();
        Box::pin(async move { Ok(handler.handle(request, &peer).await) })
    }
}
