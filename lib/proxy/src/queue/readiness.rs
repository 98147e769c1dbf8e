//! The user's readiness probe, run by us since Knative took it from the container.
//!
//! A probe without a period is *aggressive*: every 50 ms, up to 10 s, until it has passed often enough in a row; a cold
//! start waits for it. Others are one try. Checks that overlap share one run; nothing is remembered after it.

use std::{
    fmt,
    future::Future,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Limited};
use prost::Message;
use serde::Deserialize;
use tokio::{
    sync::OnceCell,
    time::{Instant, sleep, timeout},
};

use crate::{
    endpoint::{Dial, Endpoint, Protocol},
    head::HTTP2_SETTINGS,
    upstream::{Body, Pool, Sent},
};

const EVERY: Duration = Duration::from_millis(50);
const TRY: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(10);
/// An answer longer than this is not read to its end: its connection is not used again.
const ANSWER: usize = 64 << 10;
const AGENT: HeaderValue = HeaderValue::from_static("kube-probe/");

/// A Kubernetes `Probe`, as far as a proxy can run it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Probe {
    http_get: Option<HttpGet>,
    tcp_socket: Option<TcpSocket>,
    grpc: Option<Grpc>,
    timeout_seconds: u32,
    period_seconds: u32,
    success_threshold: u32,
}

/// The text is no probe.
#[derive(Debug, thiserror::Error)]
#[error("readiness probe: {0}")]
pub struct ProbeError(#[from] serde_json::Error);

/// Runs the probes of one pod.
pub struct Readiness<D> {
    pool: Pool<D>,
    user: SocketAddr,
    place: u64,
    probes: Vec<Probe>,
    /// What HTTP probes speak; not known while the port is still to be asked.
    protocol: OnceLock<Protocol>,
    /// The run that is under way, if any; owned by those who wait for it.
    run: Mutex<Weak<OnceCell<bool>>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct HttpGet {
    path: String,
    port: Port,
    host: String,
    scheme: String,
    http_headers: Vec<Header>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Header {
    name: String,
    value: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct TcpSocket {
    port: Port,
    host: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Grpc {
    port: Port,
    service: Option<String>,
}

/// A number, or a name that stands for the user's port.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Port {
    Number(u16),
    Name(String),
}

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, Message)]
struct HealthRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, PartialEq, Message)]
struct HealthResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

// === impl Probe ===

impl Probe {
    /// What `SERVING_READINESS_PROBE` says: one probe, or a list of them.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn parse(text: &str) -> Result<Vec<Self>, ProbeError> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum OneOrMany {
            Many(Vec<Probe>),
            One(Box<Probe>),
        }
        Ok(match serde_json::from_str(text)? {
            OneOrMany::One(probe) => vec![*probe],
            OneOrMany::Many(probes) => probes,
        })
    }

    fn aggressive(&self) -> bool {
        self.period_seconds == 0
    }

    fn timeout(&self) -> Duration {
        if self.aggressive() { TRY } else { Duration::from_secs(self.timeout_seconds.max(1).into()) }
    }

    pub(super) fn endpoint(&self, user: SocketAddr, place: u64) -> Endpoint {
        let (port, host, protocol) = if let Some(get) = &self.http_get {
            (&get.port, &*get.host, Protocol::H1)
        } else if let Some(grpc) = &self.grpc {
            (&grpc.port, "", Protocol::H2c)
        } else if let Some(socket) = &self.tcp_socket {
            (&socket.port, &*socket.host, Protocol::H1)
        } else {
            // The kubelet runs what is to be executed; here only the port is looked at.
            return Endpoint { addr: user, protocol: Protocol::H1, place };
        };
        let ip = host.parse().unwrap_or(if user.is_ipv4() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { user.ip() });
        let port = match port {
            Port::Number(number) if *number > 0 => *number,
            Port::Number(_) | Port::Name(_) => user.port(),
        };
        Endpoint { addr: SocketAddr::new(ip, port), protocol, place }
    }
}

// === impl HttpGet ===

impl HttpGet {
    /// Without the headers that the user asks for.
    fn request(&self, addr: SocketAddr) -> Option<Request<Body>> {
        let path = if self.path.starts_with('/') { self.path.clone() } else { format!("/{}", self.path) };
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = Uri::try_from(path).ok()?;
        request.headers_mut().insert(header::HOST, HeaderValue::try_from(addr.to_string()).ok()?);
        request.headers_mut().insert(header::USER_AGENT, AGENT);
        Some(request)
    }
}

impl Default for Port {
    fn default() -> Self {
        Self::Number(0)
    }
}

// === impl Readiness ===

impl<D: Dial> Readiness<D> {
    pub(super) fn new(pool: Pool<D>, user: SocketAddr, place: u64, probes: Vec<Probe>, detect: bool) -> Self {
        let protocol = if detect { OnceLock::new() } else { OnceLock::from(Protocol::H1) };
        Self { pool, user, place, probes, protocol, run: Mutex::new(Weak::new()) }
    }

    /// Whether all probes pass; waits for them, together with whoever asks meanwhile.
    pub(super) async fn check(&self) -> bool {
        let run = {
            let mut current = self.run.lock().unwrap_or_else(PoisonError::into_inner);
            match current.upgrade().filter(|run| !run.initialized()) {
                Some(run) => run,
                None => {
                    let run = Arc::new(OnceCell::new());
                    *current = Arc::downgrade(&run);
                    run
                }
            }
        };
        *run.get_or_init(|| self.all()).await
    }

    async fn all(&self) -> bool {
        for probe in &self.probes {
            let passed = repeat(probe, || self.once(probe)).await;
            if !passed {
                return false;
            }
        }
        true
    }

    async fn once(&self, probe: &Probe) -> bool {
        let endpoint = probe.endpoint(self.user, self.place);
        let tried = async {
            match (&probe.http_get, &probe.grpc) {
                (Some(get), _) if !get.scheme.eq_ignore_ascii_case("https") => self.http(get, endpoint).await,
                (None, Some(grpc)) => self.grpc(grpc, endpoint).await,
                _ => self.pool.reaches(&endpoint).await.then_some(()),
            }
        };
        matches!(timeout(probe.timeout(), tried).await, Ok(Some(())))
    }

    /// Goes over the pool: the connection that has passed the probe carries the first request.
    async fn http(&self, get: &HttpGet, endpoint: Endpoint) -> Option<()> {
        let endpoint = Endpoint { protocol: self.protocol(get, endpoint).await?, ..endpoint };
        let mut request = get.request(endpoint.addr)?;
        for Header { name, value } in &get.http_headers {
            let (name, value) = (HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?);
            if name == header::HOST {
                request.headers_mut().insert(name, value);
            } else {
                request.headers_mut().append(name, value);
            }
        }
        if endpoint.protocol == Protocol::H2c {
            let host = request.headers_mut().remove(header::HOST)?;
            *request.uri_mut() = Uri::try_from(format!("http://{}{}", host.to_str().ok()?, request.uri())).ok()?;
            *request.version_mut() = http::Version::HTTP_2;
        }
        let Sent::Response(response) = self.pool.upstream(endpoint).send(request).await.ok()? else { return None };
        let status = response.status();
        // Read to its end so that the connection can be used again; what it says does not count.
        let _read = Limited::new(response.into_body(), ANSWER).collect().await;
        (StatusCode::OK.as_u16()..400).contains(&status.as_u16()).then_some(())
    }

    /// Asked for once: whoever offers to change to h2c is probed in h2c, as whoever answers anything else is in HTTP/1.1.
    async fn protocol(&self, get: &HttpGet, endpoint: Endpoint) -> Option<Protocol> {
        if let Some(known) = self.protocol.get() {
            return Some(*known);
        }
        let mut request = get.request(endpoint.addr)?;
        *request.method_mut() = Method::OPTIONS;
        let offer = [(header::CONNECTION, "Upgrade, HTTP2-Settings"), (header::UPGRADE, "h2c"), (HTTP2_SETTINGS, "")];
        request.headers_mut().extend(offer.map(|(name, value)| (name, HeaderValue::from_static(value))));
        let answer = self.pool.upstream(endpoint).send(request).await.ok()?;
        let changes =
            matches!(&answer, Sent::Switch(head, _) if head.headers.get(header::UPGRADE).is_some_and(|to| to == "h2c"));
        Some(*self.protocol.get_or_init(|| if changes { Protocol::H2c } else { Protocol::H1 }))
    }

    async fn grpc(&self, grpc: &Grpc, endpoint: Endpoint) -> Option<()> {
        const SERVING: i32 = 1;
        let message = HealthRequest { service: grpc.service.clone().unwrap_or_default() }.encode_to_vec();
        let mut framed = vec![0];
        framed.extend_from_slice(&u32::try_from(message.len()).ok()?.to_be_bytes());
        framed.extend_from_slice(&message);
        let request = Request::builder()
            .method(Method::POST)
            .version(http::Version::HTTP_2)
            .uri(format!("http://{}/grpc.health.v1.Health/Check", endpoint.addr))
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::TE, "trailers")
            .header(header::USER_AGENT, AGENT)
            .body(Body::from(Bytes::from(framed)))
            .ok()?;
        let Sent::Response(response) = self.pool.upstream(endpoint).send(request).await.ok()? else { return None };
        let answer = Limited::new(response.into_body(), ANSWER).collect().await.ok()?;
        let passed = answer.trailers().and_then(|trailers| trailers.get("grpc-status")).is_some_and(|code| code == "0");
        let message = answer.to_bytes();
        let health = HealthResponse::decode(message.get(5..)?).ok()?;
        (passed && health.status == SERVING).then_some(())
    }
}

impl<D> fmt::Debug for Readiness<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readiness").field("probes", &self.probes).finish_non_exhaustive()
    }
}

/// Tries once, or until it has passed often enough in a row.
pub(super) async fn repeat<F: Future<Output = bool>>(probe: &Probe, attempt: impl Fn() -> F) -> bool {
    if !probe.aggressive() {
        return attempt().await;
    }
    let until = Instant::now() + PATIENCE;
    let mut passed = 0;
    loop {
        passed = if attempt().await { passed + 1 } else { 0 };
        if passed >= probe.success_threshold.max(1) {
            return true;
        }
        if Instant::now() + EVERY > until {
            return false;
        }
        sleep(EVERY).await;
    }
}
