//! The edge: HTTPS in, verdicts out.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderValue, Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Body as _;
use lifl_proxy::{
    Body, Handle, Limits, Peer, Server, reply,
    tls::{configured, secured},
};
use rustls::{DEFAULT_VERSIONS, ServerConfig, crypto::ring};
use tokio::{net::TcpListener, time::timeout};

use crate::{
    certificate::{CertificateError, Certificates},
    config::Config,
    mutate::Verdict,
    review::review,
};

/// Where reviews come in of pods that ask themselves.
pub const POD_PATH: &str = "/pods";
/// Where reviews come in of pods whose namespace asks: the review does not tell, the registration does.
pub const NAMESPACE_PATH: &str = "/namespaces";
/// A review holds a pod, 1.5 MiB at most as etcd has it, and may hold it twice.
const MAX_REVIEW: usize = 8 << 20;
/// How often certificates are looked at.
const REFRESH: Duration = Duration::from_secs(10);
/// Connections at once, more wait: API servers keep few, and the rest of the cluster has no business here.
const MAX_CONNECTIONS: usize = 256;
/// Reviews under way are waited for at the end.
const DRAIN: Duration = Duration::from_secs(10);

/// Why the webhook does not serve.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// No certificate.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// No TLS.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The address cannot be had.
    #[error("{address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// A webhook that listens.
#[derive(Debug)]
pub struct Bound {
    /// Where.
    pub address: SocketAddr,
    /// With what.
    pub certificates: Arc<Certificates>,
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    server: Server<Reviews>,
}

/// What answers.
#[derive(Debug)]
struct Reviews {
    plain_runtimes: BTreeSet<String>,
    /// A review that has not come by then does not.
    patience: Duration,
}

/// Reads the certificate and binds.
///
/// # Errors
/// [`WebhookError`].
pub async fn build(config: Config) -> Result<Bound, WebhookError> {
    let provider = ring::default_provider();
    let certificates = Arc::new(Certificates::new(&config.certificate, Arc::new(provider.clone()), SystemTime::now())?);
    let tls = configured(provider, DEFAULT_VERSIONS, certificates.clone())?;
    let failed = |source| WebhookError::Listen { address: config.listen, source };
    let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let patience = Duration::from_millis(config.patience_ms);
    // Who has not said its TLS hello or its request's head by then, asks nothing for as long, or does not take its answer, is let go.
    let limits =
        Limits { connections: MAX_CONNECTIONS, head: patience, idle: patience, stall: patience, ..Limits::default() };
    let server = Server::new(Arc::new(Reviews { plain_runtimes: config.plain_runtimes, patience }), limits);
    Ok(Bound { address, certificates, listener, tls, server })
}

// === impl Bound ===

impl Bound {
    /// Serves until `drain` resolves, then finishes what is under way.
    pub async fn run(self, drain: impl Future<Output = ()>) {
        let Self { certificates, listener, tls, server, .. } = self;
        tokio::select! {
            () = drain => {}
            () = server.listen_with(&listener, secured(tls)) => {}
            () = refresh(&certificates) => {}
        }
        drop(listener);
        server.close();
        if timeout(DRAIN, server.closed()).await.is_err() {
            tracing::warn!("reviews did not end in {DRAIN:?}");
        }
    }
}

/// Looks for the next certificate, for ever.
async fn refresh(certificates: &Certificates) {
    let mut looks = tokio::time::interval(REFRESH);
    loop {
        looks.tick().await;
        match certificates.refresh(SystemTime::now()) {
            Ok(true) => tracing::info!("certificate exchanged"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "the old certificate is used on"),
        }
    }
}

// === impl Reviews ===

impl Handle for Reviews {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        answer(request, &self.plain_runtimes, self.patience).await
    }
}

async fn answer(request: Request<Body>, plain_runtimes: &BTreeSet<String>, patience: Duration) -> Response<Body> {
    let namespace_asks = match (request.method(), request.uri().path()) {
        (&Method::POST, POD_PATH) => false,
        (&Method::POST, NAMESPACE_PATH) => true,
        (&Method::GET, "/healthz" | "/readyz") => return text(StatusCode::OK, "ok"),
        (_, POD_PATH | NAMESPACE_PATH) => return text(StatusCode::METHOD_NOT_ALLOWED, "reviews are POSTed"),
        _ => return text(StatusCode::NOT_FOUND, "no such page"),
    };
    // What announces itself as too long is refused before a byte of it is read.
    if request.body().size_hint().lower() > MAX_REVIEW as u64 {
        return text(StatusCode::PAYLOAD_TOO_LARGE, "longer than any review");
    }
    let body = match timeout(patience, Limited::new(request.into_body(), MAX_REVIEW).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Err(_late) => return text(StatusCode::REQUEST_TIMEOUT, "the review does not come"),
        Ok(Err(error)) => return text(StatusCode::PAYLOAD_TOO_LARGE, &format!("body: {error}")),
    };
    let reviewed = match review(&body, namespace_asks, plain_runtimes) {
        Ok(reviewed) => reviewed,
        Err(error) => {
            tracing::warn!(%error, "review");
            return text(StatusCode::BAD_REQUEST, &error.to_string());
        }
    };
    let (namespace, name) = reviewed.pod;
    match &reviewed.verdict {
        Verdict::Patch { settings, .. } => {
            tracing::info!(namespace, name, revision = settings.revision, "queue-proxy taken out");
        }
        Verdict::Keep { reason, .. } => tracing::warn!(namespace, name, reason, "queue-proxy stays"),
        Verdict::NotOurs => {}
    }
    let mut response = reply::plain(StatusCode::OK, reviewed.answer.to_string());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn text(status: StatusCode, text: &str) -> Response<Body> {
    reply::plain(status, format!("{text}\n"))
}
