//! A client of the API server.

use std::path::{Path, PathBuf};

use kube::{
    Client, Config,
    config::{InferConfigError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use thiserror::Error;

/// Why there is no client.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Neither a kubeconfig nor a service account.
    #[error("no way to the API server: {0}")]
    Nowhere(#[source] Box<InferConfigError>),
    /// A kubeconfig that does not serve.
    #[error("kubeconfig {path}: {source}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: KubeconfigError,
    },
    /// Certificates or credentials that do not serve.
    #[error("client of the API server: {0}")]
    Client(#[source] Box<kube::Error>),
}

/// A client by this kubeconfig; without one by `KUBECONFIG`, `~/.kube/config` or the pod's service account, the first there is.
///
/// It does not connect yet: an API server that is away is waited for by whoever asks it something.
///
/// # Errors
/// When the configuration or what it names does not serve.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ConnectError> {
    let mut config = match kubeconfig {
        None => Config::infer().await.map_err(|source| ConnectError::Nowhere(Box::new(source)))?,
        Some(path) => {
            let broken = |source| ConnectError::Kubeconfig { path: path.to_owned(), source };
            let file = Kubeconfig::read_from(path).map_err(broken)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(broken)?
        }
    };
    // Who asks knows whether to ask again, and when; a second clock below would only hide the failure.
    config.default_retry = false;
    Client::try_from(config).map_err(|source| ConnectError::Client(Box::new(source)))
}
