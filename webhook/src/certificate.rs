//! The certificate: from files or self-made, exchanged while connections come in.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls::{
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use crate::config::CertificateSource;

/// Life of a self-made certificate. Its root lives in memory only, so nobody who could take the key outlives the process.
const LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
/// It is renewed when so much of its life is left.
const RENEW_BEFORE: Duration = Duration::from_secs(10 * 24 * 3600);
/// Clocks of the caller may be behind ours.
const SKEW: Duration = Duration::from_secs(3600);
/// Life of the root.
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Why there is no (new) certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no PEM of what it should hold.
    #[error("{}: {reason}", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The certificate cannot be used.
    #[error("certificate: {0}")]
    Tls(#[from] rustls::Error),
    /// It cannot be made.
    #[error("self-made certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// The certificate in use, and where the next one comes from.
#[derive(Debug)]
pub struct Certificates {
    source: Source,
    provider: Arc<CryptoProvider>,
    current: RwLock<Current>,
}

#[derive(Debug)]
enum Source {
    Files { certificate: PathBuf, key: PathBuf },
    SelfMade { root: Box<CertifiedIssuer<'static, KeyPair>>, names: Vec<String> },
}

#[derive(Clone, Debug)]
struct Current {
    key: Arc<CertifiedKey>,
    made_of: Origin,
}

/// What tells one certificate from the next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    /// Contents of the files. A mounted Secret is exchanged by a link, so times of change say little.
    Files(Vec<u8>, Vec<u8>),
    Until(SystemTime),
}

// === impl Certificates ===

impl Certificates {
    /// The first certificate.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn new(
        source: &CertificateSource,
        provider: Arc<CryptoProvider>,
        now: SystemTime,
    ) -> Result<Self, CertificateError> {
        let source = match source {
            CertificateSource::Files { certificate, key } => {
                Source::Files { certificate: certificate.clone(), key: key.clone() }
            }
            CertificateSource::SelfMade { names } => {
                Source::SelfMade { root: Box::new(make_root(now)?), names: names.clone() }
            }
        };
        let current = RwLock::new(source.load(&provider, now)?);
        Ok(Self { source, provider, current })
    }

    /// Takes the next certificate into use, if there is one. What is wrong leaves the one in use where it is: half of a pair may
    /// be written already.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn refresh(&self, now: SystemTime) -> Result<bool, CertificateError> {
        let current = self.current().made_of;
        if !self.source.is_newer(&current, now)? {
            return Ok(false);
        }
        let next = self.source.load(&self.provider, now)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(true)
    }

    /// PEM of the root that a self-made certificate is to be checked against; `None` for files: their issuer is known there.
    #[must_use]
    pub fn root(&self) -> Option<String> {
        match &self.source {
            Source::Files { .. } => None,
            Source::SelfMade { root, .. } => Some(root.pem()),
        }
    }

    fn current(&self) -> Current {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().key)
    }
}

// === impl Source ===

impl Source {
    fn is_newer(&self, current: &Origin, now: SystemTime) -> Result<bool, CertificateError> {
        Ok(match (self, current) {
            (Self::Files { certificate, key }, _) => Origin::Files(read(certificate)?, read(key)?) != *current,
            (Self::SelfMade { .. }, Origin::Until(end)) => now + RENEW_BEFORE >= *end,
            (Self::SelfMade { .. }, Origin::Files(..)) => true,
        })
    }

    fn load(&self, provider: &CryptoProvider, now: SystemTime) -> Result<Current, CertificateError> {
        let (chain, key, made_of) = match self {
            Self::Files { certificate, key } => {
                let (chain_pem, key_pem) = (read(certificate)?, read(key)?);
                let pem = |path: &Path, reason: String| CertificateError::Pem { path: path.to_owned(), reason };
                let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&chain_pem)
                    .collect::<Result<_, _>>()
                    .map_err(|e| pem(certificate, e.to_string()))?;
                if chain.is_empty() {
                    return Err(pem(certificate, "no certificate in it".into()));
                }
                let key = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|e| pem(key, e.to_string()))?;
                (chain, key, Origin::Files(chain_pem, key_pem))
            }
            Self::SelfMade { root, names } => {
                let key = KeyPair::generate()?;
                let leaf = leaf_of(names, now)?.signed_by(&key, root)?;
                let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
                (vec![leaf.der().clone()], key, Origin::Until(now + LIFE))
            }
        };
        Ok(Current { key: Arc::new(CertifiedKey::from_der(chain, key, provider)?), made_of })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CertificateError> {
    fs::read(path).map_err(|source| CertificateError::File { path: path.to_owned(), source })
}

fn make_root(now: SystemTime) -> Result<CertifiedIssuer<'static, KeyPair>, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, "lifl webhook root");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - SKEW).into();
    params.not_after = (now + ROOT_LIFE).into();
    CertifiedIssuer::self_signed(params, KeyPair::generate()?)
}

fn leaf_of(names: &[String], now: SystemTime) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names.to_vec())?;
    params.distinguished_name.push(DnType::CommonName, "lifl webhook");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    params.not_before = (now - SKEW).into();
    params.not_after = (now + LIFE).into();
    Ok(params)
}
