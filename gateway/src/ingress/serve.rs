//! Listeners, and the way of a request: decide, choose, forward.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version, header, uri::PathAndQuery};
use hyper::body::Body as _;
use lifl_api::ingress::PROBER_USER_AGENT;
use lifl_proxy::{
    Body, Dial, ForwardError, Handle, Limits, Peer, Pool, Protocol, Ride, Server, Tunnels, carry, forward,
    head::{self, K_PROXY_REQUEST, X_FORWARDED_PROTO},
    queue::{K_NETWORK_HASH, Queue},
    reply,
    tls::secured,
    upstream::SendError,
};
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};

use super::{
    backend::{Backend, Lease, Penalty},
    metrics::Refused,
    observe::Watch,
    rules::{Decision, Forward, Head, Listener},
    table::{Ingress, Report},
};
use crate::{
    observe::Observe,
    pods::{Pods, Sockets},
    tls,
};

/// An address that could not be reached is avoided for so long.
const AVOIDED: Duration = Duration::from_secs(1);
/// A request that was never sent is tried at so many addresses.
const TRIES: usize = 3;

/// Pods that this process serves itself: requests to them need not leave it.
pub trait Nearby: Send + Sync + 'static {
    /// Who answers for a pod.
    type Pod: Handle;

    /// The pod that listens at an address, if it is served here.
    fn pod(&self, at: &SocketAddr) -> Option<Arc<Self::Pod>>;
}

/// The way of a request through the ingress. Cheap to clone; all clones share connections and tunnels.
#[derive(Debug)]
pub struct Gate<D, N> {
    ingress: Ingress,
    pool: Pool<D>,
    nearby: Arc<N>,
    tunnels: Tunnels,
    observe: Arc<Observe>,
}

/// A gate, behind one listener.
struct Door<D, N> {
    gate: Gate<D, N>,
    listener: Listener,
}

/// What is to be done with a request; where it goes on, its head is already as its backend is to see it.
enum Way {
    Answer(Response<Body>, Refused),
    /// A prober's question, answered here.
    Told(Response<Body>),
    Forward(Arc<Backend>, Lease),
}

/// Serves listeners until `drain`, and for a `lame_duck` time more in which clients are told to go elsewhere, then until the requests
/// under way are answered and tunnels have ended; what takes longer than `patience` is cut off.
///
/// # Errors
/// When the TLS configuration cannot be made.
pub async fn serve<D: Dial, N: Nearby>(
    gate: Gate<D, N>,
    listeners: Vec<(Listener, TcpListener)>,
    limits: Limits,
    drain: impl Future<Output = ()>,
    lame_duck: Duration,
    patience: Duration,
) -> Result<(), rustls::Error> {
    let mut accepting = JoinSet::new();
    let mut servers = Vec::with_capacity(listeners.len());
    for (listener, socket) in listeners {
        let door = Arc::new(Door { gate: gate.clone(), listener });
        let server = Server::new(door, limits);
        servers.push(server.clone());
        if listener.is_tls() {
            let which = usize::from(listener == Listener::LocalTls);
            let certificates = Arc::clone(&gate.ingress.shared.certificates[which]);
            let secured = secured(tls::server(certificates)?);
            accepting.spawn(async move { server.listen_with(&socket, secured).await });
        } else {
            accepting.spawn(async move { server.listen(&socket).await });
        }
    }
    drain.await;
    servers.iter().for_each(Server::begin_drain);
    sleep(lame_duck).await;
    servers.iter().for_each(Server::close);
    while accepting.join_next().await.is_some() {}
    let gone = async {
        for server in &servers {
            server.closed().await;
        }
    };
    let deadline = Instant::now() + patience;
    if timeout_at(deadline, gone).await.is_err() {
        tracing::warn!("requests of the ingress under way are cut off");
    }
    gate.tunnels.end(deadline.saturating_duration_since(Instant::now())).await;
    Ok(())
}

/// Host and port as the backend is told of them; empty when there are none.
fn authority(request: &Request<Body>) -> &str {
    request.uri().authority().map_or_else(|| head::text(request.headers(), &header::HOST), head::host)
}

/// `301` to the same place over HTTPS; the port goes if it was the one that plain HTTP has anyway. A prober is told the hash
/// here, for its request goes no further.
fn redirect(request: &Request<Body>, hash: Option<&HeaderValue>) -> Response<Body> {
    let host = authority(request);
    let host = host.strip_suffix(":80").unwrap_or(host);
    let path = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
    let mut response = reply::empty(StatusCode::MOVED_PERMANENTLY);
    match HeaderValue::try_from(format!("https://{host}{path}")) {
        Ok(location) => {
            response.headers_mut().insert(header::LOCATION, location);
            if let Some(hash) = hash {
                response.headers_mut().insert(K_NETWORK_HASH, hash.clone());
            }
            response
        }
        Err(_) => reply::empty(StatusCode::BAD_REQUEST),
    }
}

/// Whether it is a prober of Ingresses that asks, ours or another's: it wants to know of the rules, not of what is behind them,
/// and need not be understood there. Whoever else asks for the hash is answered by the backend, with the hash in its request.
fn is_prober(request: &Request<Body>) -> bool {
    let by = request.headers().get(header::USER_AGENT).map(HeaderValue::as_bytes);
    by.is_some_and(|by| by.starts_with(PROBER_USER_AGENT.as_bytes()))
}

/// The answer to a prober.
fn told(hash: &HeaderValue) -> Response<Body> {
    let mut response = reply::empty(StatusCode::OK);
    response.headers_mut().insert(K_NETWORK_HASH, hash.clone());
    response
}

/// Makes the head what the rule says.
fn dress(request: &mut Request<Body>, forward: &Forward<'_>, scheme: &'static str) {
    if let Some(host) = forward.host {
        // A host in the target would win over the header.
        if request.uri().authority().is_some() {
            let path = request.uri().path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
            *request.uri_mut() = Uri::from(path);
        }
        request.headers_mut().insert(header::HOST, host.clone());
    }
    let headers = request.headers_mut();
    for (name, value) in forward.headers {
        headers.insert(name.clone(), value.clone());
    }
    if let Some(hash) = forward.hash {
        headers.insert(K_NETWORK_HASH, hash.clone());
    }
    // What comes here has not come by way of the activator, and is not to be counted so.
    headers.remove(K_PROXY_REQUEST);
    headers.entry(X_FORWARDED_PROTO).or_insert(HeaderValue::from_static(scheme));
}

/// Makes a head what it would be had it come over the network to a pod that is served here.
fn arrive(request: &mut Request<Body>, peer: &Peer, protocol: Protocol) {
    *request.version_mut() = match protocol {
        Protocol::H1 => Version::HTTP_11,
        Protocol::H2c => Version::HTTP_2,
    };
    head::append_forwarded_for(request.headers_mut(), peer);
}

/// The same request once more; only one without a body can be had twice.
fn copy(request: &Request<Body>) -> Option<Request<Body>> {
    if !request.body().is_end_stream() {
        return None;
    }
    let mut copy = Request::new(Body::empty());
    request.method().clone_into(copy.method_mut());
    request.uri().clone_into(copy.uri_mut());
    *copy.version_mut() = request.version();
    request.headers().clone_into(copy.headers_mut());
    *copy.extensions_mut() = request.extensions().clone();
    Some(copy)
}

/// The answer to a request that nobody answered. What cannot be reached is 503, not 502: a prober of Knative takes any
/// status but 404 and 503 for an ingress that is ready.
fn failure(error: &ForwardError) -> Response<Body> {
    match error {
        ForwardError::Send(_) => reply::plain(StatusCode::SERVICE_UNAVAILABLE, "no answer from upstream"),
        _ => reply::empty(error.status()),
    }
}

// === impl Pods ===

impl Nearby for Pods {
    type Pod = Queue<Sockets>;

    fn pod(&self, at: &SocketAddr) -> Option<Arc<Self::Pod>> {
        self.queue(at)
    }
}

// === impl Gate ===

impl<D: Dial, N: Nearby> Gate<D, N> {
    /// A gate of an ingress; its requests use the connections of `pool`.
    #[must_use]
    pub fn new(ingress: Ingress, pool: Pool<D>, nearby: Arc<N>) -> Self {
        Self { ingress, pool, nearby, tunnels: Tunnels::new(), observe: Arc::default() }
    }

    /// The same gate, with what is to be seen of its requests.
    #[must_use]
    pub fn observed(self, observe: Observe) -> Self {
        Self { observe: Arc::new(observe), ..self }
    }

    /// What became of the last snapshot.
    #[must_use]
    pub fn report(&self) -> Report {
        self.ingress.report()
    }

    /// Tunnels that are open.
    #[must_use]
    pub fn tunnels(&self) -> usize {
        self.tunnels.count()
    }

    /// Decides, and makes the head what the rule says.
    fn way(&self, listener: Listener, request: &mut Request<Body>) -> Way {
        let mut forwarded = None;
        // Twice, because addresses may go between the two looks; then there are new rules.
        for _look in 0..2 {
            let rules = self.ingress.shared.rules();
            let (authority, path) = (authority(request), request.uri().path());
            let head = Head { authority, path, headers: request.headers() };
            match rules.decide(listener, &head, fastrand::u64(..)) {
                Decision::Unknown => return Way::Answer(reply::empty(StatusCode::NOT_FOUND), Refused::Unknown),
                Decision::Redirect(hash) => return Way::Answer(redirect(request, hash), Refused::Redirected),
                Decision::Forward(forward) => {
                    if let Some(lease) = forward.backend.choose(fastrand::u64(..)) {
                        if let Some(hash) = forward.hash.filter(|_| is_prober(request)) {
                            return Way::Told(told(hash));
                        }
                        dress(request, &forward, if listener.is_tls() { "https" } else { "http" });
                        return Way::Forward(Arc::clone(forward.backend), lease);
                    }
                    forwarded = Some(Arc::clone(forward.backend));
                }
            }
        }
        if let Some(backend) = forwarded {
            tracing::debug!(backend = %backend.name, "no address");
        }
        Way::Answer(reply::plain(StatusCode::SERVICE_UNAVAILABLE, "no healthy upstream"), Refused::NoEndpoint)
    }

    /// One request to one of a backend's addresses, or to another if not a byte of it was sent.
    async fn pass(
        &self,
        mut request: Request<Body>,
        peer: &Peer,
        backend: &Backend,
        mut lease: Lease,
        watch: &mut Option<Watch>,
    ) -> Result<Response<Body>, ForwardError> {
        let mut tries = 0;
        loop {
            let target = Arc::clone(lease.target());
            if let Some(watch) = watch {
                watch.target(target.endpoint.addr);
            }
            if let Some(pod) = self.nearby.pod(&target.endpoint.addr) {
                arrive(&mut request, peer, target.endpoint.protocol);
                return Ok(carry(pod.handle(request, peer).await, lease));
            }
            let of_another;
            let upstream = match target.kept(|| self.pool.upstream(target.endpoint)) {
                Some(upstream) => upstream,
                None => {
                    of_another = self.pool.upstream(target.endpoint);
                    &of_another
                }
            };
            tries += 1;
            // A copy costs; it is needed only if a connection cannot be made.
            let again = if tries < TRIES && !upstream.is_connected() { copy(&request) } else { None };
            let ride = Ride { peer, clock: None, kept: lease, tunnels: &self.tunnels };
            let error = match forward(upstream, request, ride).await {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            if !matches!(error, ForwardError::Send(SendError::Dial { .. })) {
                return Err(error);
            }
            let penalty = Penalty::new(Arc::clone(&target));
            tokio::spawn(
                async move {
                    sleep(AVOIDED).await;
                    drop(penalty);
                }
                .boxed(),
            );
            match again.zip(backend.choose(fastrand::u64(..))) {
                Some((same, other)) => (request, lease) = (same, other),
                None => return Err(error),
            }
        }
    }
}

impl<D, N> Clone for Gate<D, N> {
    fn clone(&self) -> Self {
        Self {
            ingress: self.ingress.clone(),
            pool: self.pool.clone(),
            nearby: Arc::clone(&self.nearby),
            tunnels: self.tunnels.clone(),
            observe: Arc::clone(&self.observe),
        }
    }
}

// === impl Door ===

impl<D: Dial, N: Nearby> Door<D, N> {
    async fn answer(
        &self,
        mut request: Request<Body>,
        peer: &Peer,
        begun: Instant,
        watch: &mut Option<Watch>,
    ) -> Response<Body> {
        let (backend, lease) = match self.gate.way(self.listener, &mut request) {
            Way::Answer(response, reason) => {
                self.refused(reason, watch);
                return response;
            }
            Way::Told(response) => {
                // A prober's question is nobody's request.
                if let Some(watch) = watch.take() {
                    watch.forget();
                }
                return response;
            }
            Way::Forward(backend, lease) => (backend, lease),
        };
        if let Some(watch) = watch {
            watch.routed(&request, &backend);
        }
        match self.gate.pass(request, peer, &backend, lease, watch).await {
            Ok(response) => {
                backend.counters.count(response.status(), begun.elapsed());
                response
            }
            Err(error) => {
                tracing::debug!(%error, backend = %backend.name, "no answer");
                self.refused(Refused::Upstream, watch);
                failure(&error)
            }
        }
    }

    fn refused(&self, reason: Refused, watch: &mut Option<Watch>) {
        self.gate.ingress.shared.metrics.refused(self.listener, reason);
        if let Some(watch) = watch {
            watch.refused(reason);
        }
    }
}

impl<D: Dial, N: Nearby> Handle for Door<D, N> {
    async fn handle(&self, mut request: Request<Body>, peer: &Peer) -> Response<Body> {
        let begun = Instant::now();
        let mut watch = self.gate.observe.begin(self.listener, &mut request, peer);
        let response = self.answer(request, peer, begun, &mut watch).await;
        match watch {
            Some(watch) => watch.answered(response),
            None => response,
        }
    }
}
