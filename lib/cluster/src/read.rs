//! Single objects, read when they are wanted: for kinds that are not to be listed.

use kube::Client;
use thiserror::Error;

use crate::{
    objects::Key,
    store::{Kind, Reach},
};

/// A read that failed.
#[derive(Debug, Error)]
#[error("{kind} {key}: {}", says(source))]
pub struct ReadError {
    /// The kind of the object.
    pub kind: String,
    /// Which object.
    pub key: Key,
    /// What the API server, or the way to it, says.
    #[source]
    pub source: Box<kube::Error>,
}

// === impl ReadError ===

impl ReadError {
    /// What the API server says, for people.
    #[must_use]
    pub fn why(&self) -> String {
        says(&self.source)
    }

    /// The API server was reached and will not give it, as far as it can tell; not that it is away, too busy or does not know us
    /// just now.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(&*self.source, kube::Error::Api(status) if is_refusal(status.code))
    }
}

/// Whether an API server that answers with this code will answer the same to the same for the time being.
pub(crate) fn is_refusal(code: u16) -> bool {
    (400..500).contains(&code) && !matches!(code, 401 | 408 | 429)
}

/// For people: what an API server says is a sentence, and all that it sends beside it is not.
fn says(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// The object of this key, if there is one.
///
/// # Errors
/// When the API server refuses or cannot be reached.
pub async fn get<K: Kind>(client: &Client, key: &Key) -> Result<Option<K>, ReadError> {
    let api: kube::Api<K> = <K::Scope as Reach>::api(client.clone(), Some(&key.namespace));
    api.get_opt(&key.name).await.map_err(|source| ReadError {
        kind: K::kind(&()).into_owned(),
        key: key.clone(),
        source: Box::new(source),
    })
}
