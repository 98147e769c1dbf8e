//! TLS towards clients: certificates that are replaced while connections are made.

use std::{collections::HashMap, sync::Arc};

use arc_swap::{ArcSwap, ArcSwapOption};
use k8s_openapi::api::core::v1::Secret;
use lifl_api::pod::TlsSettings;
use lifl_proxy::tls::configured;
use rustls::{
    ServerConfig, SupportedProtocolVersion,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};

/// Keys of a secret of type `kubernetes.io/tls`.
const CHAIN: &str = "tls.crt";
const KEY: &str = "tls.key";

/// A secret that is no certificate, or settings that leave no TLS to speak.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsFault {
    #[error("the secret has no '{0}'")]
    Missing(&'static str),
    #[error("'{0}' is not PEM: {1}")]
    Pem(&'static str, pem::Error),
    #[error("'{CHAIN}' holds no certificate")]
    Empty,
    #[error("certificate and key are of no use: {0}")]
    Key(#[from] rustls::Error),
    #[error("no TLS version from '{0}' to '{1}' is spoken")]
    Versions(String, String),
}

/// The certificates of one listener.
#[derive(Debug, Default)]
pub(crate) struct Certificates(ArcSwap<ByHost>);

/// One certificate, whatever name is asked for.
#[derive(Debug, Default)]
pub(crate) struct Certificate(ArcSwapOption<CertifiedKey>);

/// By host, in lower case; `*.example.com` stands for one label before `.example.com`.
pub(crate) type ByHost = HashMap<String, Arc<CertifiedKey>>;

/// Reads a certificate and its key.
pub(crate) fn read(secret: &Secret) -> Result<Arc<CertifiedKey>, TlsFault> {
    let part = |name: &'static str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(name)).map(|bytes| bytes.0.as_slice());
        let text = || secret.string_data.as_ref().and_then(|data| data.get(name)).map(String::as_bytes);
        bytes.or_else(text).ok_or(TlsFault::Missing(name))
    };
    let chain = CertificateDer::pem_slice_iter(part(CHAIN)?).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| TlsFault::Pem(CHAIN, error))?;
    if chain.is_empty() {
        return Err(TlsFault::Empty);
    }
    let key = PrivateKeyDer::from_pem_slice(part(KEY)?).map_err(|error| TlsFault::Pem(KEY, error))?;
    Ok(Arc::new(CertifiedKey::from_der(chain, key, &provider())?))
}

/// The configuration of a TLS listener: HTTP/2 where the client can, any certificate that is there when it asks.
pub(crate) fn server(certificates: Arc<dyn ResolvesServerCert>) -> Result<Arc<ServerConfig>, rustls::Error> {
    configured(provider(), &[&TLS13, &TLS12], certificates)
}

/// The same within what a pod's settings allow. Suites and curves that are not known here are passed over, as Go does;
/// where none is left the settings are an error.
pub(crate) fn of_pod(
    settings: &TlsSettings,
    certificate: Arc<dyn ResolvesServerCert>,
) -> Result<Arc<ServerConfig>, TlsFault> {
    let mut provider = provider();
    let suites = &settings.cipher_suites;
    if !suites.is_empty() {
        // Go's names are those of the registry, for TLS 1.3 too; and there it lets nobody choose among them.
        let named = |name: &str| suites.split(',').any(|one| one.trim() == name);
        provider.cipher_suites.retain(|suite| suite.tls13().is_some() || named(&format!("{:?}", suite.suite())));
    }
    if !settings.curve_preferences.is_empty() {
        let wanted: Vec<&str> = settings.curve_preferences.split(',').map(|name| group(name.trim())).collect();
        provider.kx_groups.retain(|group| wanted.contains(&format!("{:?}", group.name()).as_str()));
    }
    let (least, most) = (settings.min_version.as_str(), settings.max_version.as_str());
    let versions: Vec<&SupportedProtocolVersion> = [("1.3", &TLS13), ("1.2", &TLS12)]
        .into_iter()
        .filter(|(name, _)| (least.is_empty() || *name >= least) && (most.is_empty() || *name <= most))
        .map(|(_, version)| version)
        .collect();
    if versions.is_empty() {
        return Err(TlsFault::Versions(least.to_owned(), most.to_owned()));
    }
    Ok(configured(provider, &versions, certificate)?)
}

/// Go's name of a curve as rustls has it.
fn group(name: &str) -> &str {
    match name {
        "CurveP256" | "P-256" => "secp256r1",
        "CurveP384" | "P-384" => "secp384r1",
        other => other,
    }
}

fn provider() -> CryptoProvider {
    ring::default_provider()
}

// === impl Certificates ===

impl Certificates {
    /// Replaces them all.
    pub(crate) fn set(&self, by_host: ByHost) {
        self.0.store(Arc::new(by_host));
    }

    fn find(&self, host: &str) -> Option<Arc<CertifiedKey>> {
        let by_host = self.0.load();
        let wildcard = || by_host.get(&format!("*{}", &host[host.find('.')?..]));
        by_host.get(host).or_else(wildcard).cloned()
    }
}

impl ResolvesServerCert for Certificates {
    /// Who asks for no name, or for one that we have no certificate for, gets none: the handshake fails.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.find(&hello.server_name()?.to_ascii_lowercase())
    }
}

// === impl Certificate ===

impl Certificate {
    /// Replaces it.
    pub(crate) fn set(&self, key: Arc<CertifiedKey>) {
        self.0.store(Some(key));
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Duration};

    use lifl_proxy::{Body, Handle, Limits, Peer, Server, reply, tls::secured};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        task::JoinHandle,
        time::timeout,
    };

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn settings(change: impl FnOnce(&mut TlsSettings)) -> TlsSettings {
        let mut settings = TlsSettings {
            port: 8112,
            secret: "serving-certs".into(),
            min_version: String::new(),
            max_version: String::new(),
            cipher_suites: String::new(),
            curve_preferences: String::new(),
            root_ca: String::new(),
        };
        change(&mut settings);
        settings
    }

    fn of(change: impl FnOnce(&mut TlsSettings)) -> Result<Arc<ServerConfig>, TlsFault> {
        of_pod(&settings(change), Arc::new(Certificate::default()))
    }

    #[test]
    fn a_pod_speaks_what_its_settings_allow() {
        let suites = |config: &ServerConfig| config.crypto_provider().cipher_suites.len();
        let all = suites(&of(|_| {}).unwrap());
        let one = of(|s| s.cipher_suites = "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, OF_ANOTHER_TIME".into()).unwrap();
        let of_13 = one.crypto_provider().cipher_suites.iter().filter(|suite| suite.tls13().is_some()).count();
        assert_eq!(suites(&one), of_13 + 1);
        assert!(all > of_13 + 1);
        let curves = of(|s| s.curve_preferences = "X25519,CurveP256".into()).unwrap();
        assert_eq!(curves.crypto_provider().kx_groups.len(), 2);
    }

    struct Hello;

    impl Handle for Hello {
        async fn handle(&self, _: http::Request<Body>, _: &Peer) -> http::Response<Body> {
            reply::plain(http::StatusCode::OK, "hello")
        }
    }

    struct Listening {
        server: Server<Hello>,
        /// Over TLS.
        at: SocketAddr,
        task: JoinHandle<()>,
        trusted: CertificateDer<'static>,
    }

    async fn listen(limits: Limits) -> Listening {
        let made = rcgen::generate_simple_self_signed(["h.example.com".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let certificate = Certificate::default();
        let trusted = made.cert.der().clone();
        certificate.set(Arc::new(CertifiedKey::from_der(vec![trusted.clone()], key, &provider()).unwrap()));
        let config = super::server(Arc::new(certificate)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (at, server) = (listener.local_addr().unwrap(), Server::new(Arc::new(Hello), limits));
        let own = server.clone();
        let task = tokio::spawn(async move { own.listen_with(&listener, secured(config)).await });
        Listening { server, at, task, trusted }
    }

    /// Waits until so many connections and listeners are open.
    async fn open(server: &Server<Hello>, count: usize) {
        let known = async {
            while server.open() != count {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, known).await.expect("what is open is not counted");
    }

    /// The process ends when all connections are gone: one that shakes hands is one of them.
    #[tokio::test]
    async fn who_shakes_hands_is_not_forgotten_when_the_server_closes() {
        let Listening { server, at, task, trusted } = listen(Limits::default()).await;
        let mut stream = TcpStream::connect(at).await.unwrap();
        open(&server, 2).await;
        server.close();
        timeout(PATIENCE, task).await.expect("it listens on").unwrap();
        let waiting = timeout(Duration::from_millis(50), server.closed()).await;
        assert!(waiting.is_err(), "the end of the server did not wait for the handshake");

        let mut roots = rustls::RootCertStore::empty();
        roots.add(trusted).unwrap();
        let builder = rustls::ClientConfig::builder_with_provider(Arc::new(provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        let config = builder.with_root_certificates(roots).with_no_client_auth();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = rustls::pki_types::ServerName::try_from("h.example.com").unwrap();
        let mut stream = timeout(PATIENCE, connector.connect(name, &mut stream)).await.unwrap().unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: h.example.com\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        let head = answer.to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 200") && head.contains("connection: close"), "{answer}");
        timeout(PATIENCE, server.closed()).await.unwrap();
    }

    #[tokio::test]
    async fn connections_over_tls_and_without_it_share_one_limit() {
        let Listening { server, at, task, .. } = listen(Limits { connections: 1, ..Limits::default() }).await;
        let shaking = TcpStream::connect(at).await.unwrap();
        open(&server, 2).await;
        let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut stream = TcpStream::connect(plain.local_addr().unwrap()).await.unwrap();
        let own = server.clone();
        let plain = tokio::spawn(async move { own.listen(&plain).await });
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let early = timeout(Duration::from_millis(50), stream.read_to_string(&mut answer)).await;
        assert!(early.is_err(), "a second connection where one is the limit: {answer}");
        // The listener over TLS waits, too, and has waited longer.
        task.abort();
        drop(shaking);
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.ends_with("hello"), "{answer}");
        plain.abort();
    }

    #[test]
    fn settings_that_leave_nothing_are_an_error() {
        assert!(matches!(of(|s| s.max_version = "1.1".into()), Err(TlsFault::Versions(..))));
        assert!(matches!(of(|s| s.curve_preferences = "none".into()), Err(TlsFault::Key(_))));
        assert!(of(|s| s.min_version = "1.3".into()).is_ok());
    }
}
