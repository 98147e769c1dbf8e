//! The edge: HTTPS in, verdicts out.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    body::{Body as _, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::{ServerConfig, crypto::CryptoProvider};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
};
use tokio_rustls::TlsAcceptor;

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
/// Connections at once: API servers keep few, and the rest of the cluster has no business here.
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
    desk: Desk,
}

/// What each connection is served with.
#[derive(Clone, Debug)]
struct Desk {
    acceptor: Acceptor,
    plain_runtimes: Arc<BTreeSet<String>>,
    /// Who has not said its TLS hello, its request's head or its body by then, or asks nothing for as long, is let go.
    patience: Duration,
}

/// Requests of a connection, by their numbers.
#[derive(Debug, Default)]
struct Requests {
    begun: AtomicU64,
    ended: AtomicU64,
}

/// A request under way: until it is answered, or its client has left.
struct UnderWay(Arc<Requests>);

#[derive(Clone)]
struct Acceptor(TlsAcceptor);

// === impl Acceptor ===

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor").finish_non_exhaustive()
    }
}

/// Reads the certificate and binds.
///
/// # Errors
/// [`WebhookError`].
pub async fn build(config: Config) -> Result<Bound, WebhookError> {
    let provider: Arc<CryptoProvider> = Arc::new(rustls::crypto::ring::default_provider());
    let certificates = Arc::new(Certificates::new(&config.certificate, provider.clone(), SystemTime::now())?);
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(certificates.clone());
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let failed = |source| WebhookError::Listen { address: config.listen, source };
    let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let acceptor = Acceptor(TlsAcceptor::from(Arc::new(tls)));
    let patience = Duration::from_millis(config.patience_ms);
    let desk = Desk { acceptor, plain_runtimes: Arc::new(config.plain_runtimes), patience };
    Ok(Bound { address, certificates, listener, desk })
}

// === impl Bound ===

impl Bound {
    /// Serves until `drain` resolves, then finishes what is under way.
    pub async fn run(self, drain: impl Future<Output = ()>) {
        let (end, ends) = watch::channel(false);
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut refresh = tokio::time::interval(REFRESH);
        let mut drain = std::pin::pin!(drain);
        loop {
            let stream = tokio::select! {
                () = &mut drain => break,
                _ = refresh.tick() => {
                    self.refresh();
                    continue;
                }
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // Of this connection, or of all of them for lack of descriptors: then a loop would only burn time.
                        tracing::warn!(%error, "accept");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                tracing::warn!("more than {MAX_CONNECTIONS} connections: one refused");
                continue;
            };
            let serving = self.desk.clone().serve(stream, ends.clone());
            tokio::spawn(
                async move {
                    if let Err(error) = serving.await {
                        tracing::debug!(%error, "connection");
                    }
                    drop(place);
                }
                .boxed(),
            );
        }
        drop((self.listener, ends));
        end.send_replace(true);
        if tokio::time::timeout(DRAIN, end.closed()).await.is_err() {
            tracing::warn!("reviews did not end in {DRAIN:?}");
        }
    }

    fn refresh(&self) {
        match self.certificates.refresh(SystemTime::now()) {
            Ok(true) => tracing::info!("certificate exchanged"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "the old certificate is used on"),
        }
    }
}

// === impl Desk ===

impl Desk {
    async fn serve(
        self,
        stream: TcpStream,
        mut ends: watch::Receiver<bool>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let patience = self.patience;
        let stream = tokio::time::timeout(patience, self.acceptor.0.accept(stream)).await??;
        let requests = Arc::new(Requests::default());
        let counted = requests.clone();
        let service = service_fn(move |request| {
            let (under_way, plain_runtimes) = (UnderWay::begin(&counted), self.plain_runtimes.clone());
            async move {
                let answer = answer(request, &plain_runtimes, patience).await;
                drop(under_way);
                Ok::<_, Infallible>(answer)
            }
        });
        let mut http = auto::Builder::new(TokioExecutor::new());
        http.http1().timer(TokioTimer::new()).header_read_timeout(patience);
        // Of a peer that has gone without a word.
        http.http2().timer(TokioTimer::new()).keep_alive_interval(patience).keep_alive_timeout(patience);
        let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
        tokio::select! {
            done = &mut connection => return done,
            _its_sender_waits_for_us = ends.wait_for(|ends| *ends) => {}
            () = requests.cease(patience) => {}
        }
        connection.as_mut().graceful_shutdown();
        // Nothing is under way any more, or it is drained: who does not take the rest has it cut off.
        tokio::time::timeout(DRAIN.max(patience), connection).await?
    }
}

// === impl Requests ===

impl Requests {
    /// Waits for a time as long as `patience` with no request.
    async fn cease(&self, patience: Duration) {
        let mut seen = 0;
        loop {
            tokio::time::sleep(patience).await;
            let (ended, begun) = (self.ended.load(Relaxed), self.begun.load(Relaxed));
            if begun == ended && begun == seen {
                return;
            }
            seen = begun;
        }
    }
}

// === impl UnderWay ===

impl UnderWay {
    fn begin(requests: &Arc<Requests>) -> Self {
        requests.begun.fetch_add(1, Relaxed);
        Self(requests.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Relaxed);
    }
}

async fn answer(
    request: Request<Incoming>,
    plain_runtimes: &BTreeSet<String>,
    patience: Duration,
) -> Response<Full<Bytes>> {
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
    let body = match tokio::time::timeout(patience, Limited::new(request.into_body(), MAX_REVIEW).collect()).await {
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
    let mut response = Response::new(Full::from(reviewed.answer.to_string()));
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

fn text(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{text}\n")));
    *response.status_mut() = status;
    response
}
