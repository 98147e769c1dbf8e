//! Certificates by the name that a client asks for, replaced while connections are made.

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwap;
use k8s_openapi::api::core::v1::Secret;
use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

/// Keys of a secret of type `kubernetes.io/tls`.
const CHAIN: &str = "tls.crt";
const KEY: &str = "tls.key";

/// A secret that is no certificate.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsFault {
    #[error("the secret has no '{0}'")]
    Missing(&'static str),
    #[error("'{0}' is not PEM: {1}")]
    Pem(&'static str, pem::Error),
    #[error("'{CHAIN}' holds no certificate")]
    Empty,
    #[error("certificate and key are of no use: {0}")]
    Key(#[from] rustls::Error),
}

/// The certificates of one listener.
#[derive(Debug, Default)]
pub(super) struct Certificates(ArcSwap<ByHost>);

/// By host, in lower case; `*.example.com` stands for one label before `.example.com`.
pub(super) type ByHost = HashMap<String, Arc<CertifiedKey>>;

/// Reads a certificate and its key.
pub(super) fn read(secret: &Secret) -> Result<Arc<CertifiedKey>, TlsFault> {
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
pub(super) fn server(certificates: Arc<Certificates>) -> Result<Arc<ServerConfig>, rustls::Error> {
    let builder = ServerConfig::builder_with_provider(Arc::new(provider())).with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn provider() -> CryptoProvider {
    ring::default_provider()
}

// === impl Certificates ===

impl Certificates {
    /// Replaces them all.
    pub(super) fn set(&self, by_host: ByHost) {
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
