//! An ingress on real sockets, backends that tell what they saw, and clients of HTTP/1.1, HTTP/2 and TLS.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    future::ready,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt as _, Empty, Full, combinators::BoxBody};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use lifl_api::ingress::KIngress;
use lifl_gateway::{
    ingress::{Gate, Ingress, Listener, Nearby, Settings, Snapshot, serve},
    observe::Observe,
};
use lifl_proxy::{Body, Direct, Handle, Limits, Peer, Pool, PoolLimits, reply};
use prometheus::Registry;
use rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};

/// Nothing in these tests takes as long; a hang becomes a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for something that must come.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} does not come"))
}

/// Pods that the ingress's own process serves: they tell what they were asked.
#[derive(Debug, Default)]
pub(crate) struct Near(Mutex<BTreeSet<SocketAddr>>);

/// One of them.
pub(crate) struct Pod(SocketAddr);

pub(crate) struct World {
    pub(crate) ingress: Ingress,
    pub(crate) near: Arc<Near>,
    pub(crate) registry: Registry,
    pub(crate) at: BTreeMap<&'static str, SocketAddr>,
    drain: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

impl Near {
    pub(crate) fn serve(&self, at: SocketAddr) {
        self.0.lock().unwrap().insert(at);
    }
}

impl Nearby for Near {
    type Pod = Pod;

    fn pod(&self, at: &SocketAddr) -> Option<Arc<Pod>> {
        self.0.lock().unwrap().contains(at).then(|| Arc::new(Pod(*at)))
    }
}

impl Handle for Pod {
    async fn handle(&self, request: Request<Body>, _peer: &Peer) -> Response<Body> {
        let of = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let saw = json!({
            "backend": "near", "at": self.0.to_string(), "version": format!("{:?}", request.version()),
            "revision": of("knative-serving-revision"), "for": of("x-forwarded-for"),
        });
        reply::plain(StatusCode::OK, json!({"saw": saw}).to_string())
    }
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::observed(Observe::default()).await
    }

    pub(crate) async fn observed(observe: Observe) -> Self {
        let registry = Registry::new();
        let ingress = Ingress::new(Settings::default(), &registry).unwrap();
        let near = Arc::new(Near::default());
        let mut listeners = Vec::new();
        let mut at = BTreeMap::new();
        for listener in Listener::ALL {
            let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
            at.insert(listener.label(), socket.local_addr().unwrap());
            listeners.push((listener, socket));
        }
        let gate = Gate::new(ingress.clone(), Pool::new(Direct, PoolLimits::default()), Arc::clone(&near));
        let gate = gate.observed(observe);
        let (drain, drained) = oneshot::channel();
        let served = tokio::spawn(async move {
            let drained = async move {
                let _dropped_is_told_too = drained.await;
            };
            serve(gate, listeners, Limits::default(), drained, Duration::ZERO, PATIENCE).await.unwrap();
        });
        Self { ingress, near, registry, at, drain, served }
    }

    /// Drains, and waits for the end.
    pub(crate) async fn end(self) {
        drop(self.drain);
        soon("the end", self.served).await.unwrap();
    }

    pub(crate) fn counted(&self, metric: &str, labels: &[(&str, &str)]) -> String {
        let families = self.registry.gather();
        let of_metric = families.iter().filter(|family| family.name() == metric);
        let has = |metric: &&prometheus::proto::Metric| {
            labels.iter().all(|(name, value)| {
                metric.get_label().iter().any(|label| label.name() == *name && label.value() == *value)
            })
        };
        let metrics = of_metric.flat_map(|family| family.get_metric().iter().filter(has));
        let sum: f64 = metrics.map(|metric| metric.get_counter().get_value() + metric.get_gauge().get_value()).sum();
        sum.to_string()
    }
}

// --- objects

pub(crate) fn read<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value).unwrap())
}

pub(crate) fn king(name: &str, spec: Value) -> Arc<KIngress> {
    read(json!({
        "apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress",
        "metadata": {"namespace": "n", "name": name,
            "annotations": {"networking.knative.dev/ingress.class": "lifl.ingress.networking.knative.dev"}},
        "spec": spec,
    }))
}

/// A rule for one host.
pub(crate) fn rule(host: &str, visibility: &str, paths: Value) -> Value {
    json!({"hosts": [host], "visibility": visibility, "http": {"paths": paths}})
}

pub(crate) fn split(service: &str, percent: u8) -> Value {
    json!({"serviceNamespace": "n", "serviceName": service, "servicePort": 80, "percent": percent,
           "appendHeaders": {"Knative-Serving-Revision": service, "Knative-Serving-Namespace": "n"}})
}

/// A rule that sends all of a host to one service.
pub(crate) fn whole(host: &str, service: &str) -> Value {
    rule(host, "ExternalIP", json!([{"splits": [split(service, 100)]}]))
}

/// Adds a service with these addresses; its port is called `http` or `http2`.
pub(crate) fn add(snapshot: &mut Snapshot, service: &str, port: &str, at: &[SocketAddr]) {
    snapshot.services.push(read(json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "n", "name": service},
        "spec": {"ports": [{"name": port, "port": 80, "targetPort": 8012}]}})));
    for (number, at) in at.iter().enumerate() {
        snapshot.slices.push(read(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "addressType": "IPv4",
            "metadata": {"namespace": "n", "name": format!("{service}-{number}"),
                         "labels": {"kubernetes.io/service-name": service}},
            "ports": [{"name": port, "port": at.port()}],
            "endpoints": [{"addresses": [at.ip().to_string()]}]})));
    }
}

// --- backends

/// Answers any request with what it saw of it, as JSON. `/ws` becomes a tunnel that sends back what it gets, `/trailers`
/// answers as gRPC does.
pub(crate) async fn backend(name: &'static str) -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = socket.accept().await.unwrap();
            tokio::spawn(async move {
                let service =
                    service_fn(move |request| async move { Ok::<_, Infallible>(answer(name, request).await) });
                let builder = auto::Builder::new(TokioExecutor::new());
                let _the_client_left = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
            });
        }
    });
    address
}

/// An address where nobody listens.
pub(crate) async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

async fn answer(name: &'static str, mut request: Request<Incoming>) -> Response<BoxBody<Bytes, Infallible>> {
    match request.uri().path() {
        "/ws" => {
            let upgraded = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut stream = TokioIo::new(upgraded.await.unwrap());
                let (mut reader, mut writer) = tokio::io::split(&mut stream);
                tokio::io::copy(&mut reader, &mut writer).await.unwrap();
                writer.shutdown().await.unwrap();
            });
            let mut response = Response::new(Empty::new().boxed());
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
            response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            response
        }
        "/trailers" => {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_static("0"))]);
            let mut response = Response::new(Full::new(body).with_trailers(ready(Some(Ok(trailers)))).boxed());
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            response
        }
        _ => {
            let headers: BTreeMap<String, Vec<String>> = request
                .headers()
                .keys()
                .map(|key| {
                    let values = request.headers().get_all(key).iter();
                    (key.to_string(), values.map(|value| value.to_str().unwrap().to_owned()).collect())
                })
                .collect();
            let host = request.uri().authority().map(ToString::to_string);
            let saw = json!({
                "backend": name, "method": request.method().as_str(), "path": request.uri().path(),
                "host": host.or_else(|| Some(headers.get("host")?[0].clone())),
                "version": if request.version() == Version::HTTP_2 { 2 } else { 1 },
                "headers": headers,
            });
            // As queue-proxy and activator answer probes.
            let hash = request.headers().get("k-network-hash").cloned();
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let saw = json!({"saw": saw, "bytes": body.len()});
            let mut response = Response::new(Full::new(Bytes::from(saw.to_string())).boxed());
            if let Some(hash) = hash {
                response.headers_mut().insert("k-network-hash", hash);
            }
            response
        }
    }
}

// --- clients

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) trailers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    /// What the backend saw.
    pub(crate) fn saw(&self) -> Value {
        let mut told: Value = serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        told["saw"].take()
    }

    pub(crate) fn backend(&self) -> String {
        self.saw()["backend"].as_str().unwrap().to_owned()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    async fn of(response: Response<Incoming>) -> Self {
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap();
        let trailers = body.trailers().cloned().unwrap_or_default();
        Self { status: parts.status.as_u16(), headers: parts.headers, trailers, body: body.to_bytes() }
    }
}

pub(crate) type Out = Full<Bytes>;

/// A GET; its target is a path, its host a header.
pub(crate) fn get(host: &str, path: &str) -> Request<Out> {
    Request::get(path).header(header::HOST, host).body(Full::default()).unwrap()
}

pub(crate) async fn http1_on<I: AsyncRead + AsyncWrite + Unpin + Send + 'static>(io: I) -> http1::SendRequest<Out> {
    let (sender, connection) = http1::handshake(TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    sender
}

pub(crate) async fn http2_on<I: AsyncRead + AsyncWrite + Unpin + Send + 'static>(io: I) -> http2::SendRequest<Out> {
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// One request on a connection of its own.
pub(crate) async fn ask(at: SocketAddr, request: Request<Out>) -> Answer {
    soon("an answer", async {
        let mut sender = http1_on(TcpStream::connect(at).await.unwrap()).await;
        Answer::of(sender.send_request(request).await.unwrap()).await
    })
    .await
}

pub(crate) async fn ask_on(sender: &mut http1::SendRequest<Out>, request: Request<Out>) -> Answer {
    soon("an answer", async {
        sender.ready().await.unwrap();
        Answer::of(sender.send_request(request).await.unwrap()).await
    })
    .await
}

pub(crate) async fn ask_http2(sender: &mut http2::SendRequest<Out>, request: Request<Out>) -> Answer {
    soon("an answer", async {
        sender.ready().await.unwrap();
        Answer::of(sender.send_request(request).await.unwrap()).await
    })
    .await
}

// --- TLS

/// A certificate for these hosts that signs itself: as a secret, and as DER for who trusts it.
pub(crate) fn certificate(secret: &str, hosts: &[&str]) -> (Arc<k8s_openapi::api::core::v1::Secret>, Vec<u8>) {
    let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(hosts).unwrap();
    let secret = read(json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"namespace": "n", "name": secret},
        "stringData": {"tls.crt": made.cert.pem(), "tls.key": made.signing_key.serialize_pem()}}));
    (secret, made.cert.der().to_vec())
}

/// A TLS connection that trusts one certificate; the error if there is none to be had.
pub(crate) async fn tls(
    at: SocketAddr,
    host: &'static str,
    trusted: &[u8],
    alpn: &[&str],
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.to_vec().into()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|word| word.as_bytes().to_vec()).collect();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(at).await?;
    soon("a handshake", connector.connect(ServerName::try_from(host).unwrap(), stream)).await
}
