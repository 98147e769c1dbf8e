//! Which kinds the API server knows.

use kube::Client;
use thiserror::Error;

use crate::store::Kind;

/// The API server did not say what it knows.
#[derive(Debug, Error)]
#[error("kinds of {version}: {source}")]
pub struct DiscoveryError {
    /// Group and version that was asked for.
    pub version: String,
    /// What the API server, or the way to it, says.
    #[source]
    pub source: Box<kube::Error>,
}

/// Whether the API server knows a kind now. A [`Store`](crate::Store) of one that it does not know waits for it; this is for who
/// has something better to do.
///
/// # Errors
/// When the API server refuses or cannot be reached.
pub async fn knows<K: Kind>(client: &Client) -> Result<bool, DiscoveryError> {
    let version = K::api_version(&()).into_owned();
    match client.list_api_group_resources(&version).await {
        Ok(known) => Ok(known.resources.iter().any(|resource| resource.name == K::plural(&()))),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(source) => Err(DiscoveryError { version, source: Box::new(source) }),
    }
}
