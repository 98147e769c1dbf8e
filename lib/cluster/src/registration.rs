//! A webhook's registration: who calls it checks its certificate against a root that is written there.

use k8s_openapi::{ByteString, api::admissionregistration::v1::MutatingWebhookConfiguration};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;

use crate::{objects::Key, write::WriteError};

/// Has all webhooks of this registration checked against `root`, PEM. `false`: it was so already.
///
/// Only roots are written: what else stands there is whoever's who registered it.
///
/// # Errors
/// When there is no such registration, no right to write to it, or no way to the API server.
pub async fn trust(client: &Client, name: &str, root: &str) -> Result<bool, WriteError> {
    let failed = |source| WriteError {
        kind: "MutatingWebhookConfiguration".to_owned(),
        key: Key { namespace: String::new(), name: name.to_owned() },
        source: Box::new(source),
    };
    let api: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let registered = api.get(name).await.map_err(failed)?;
    let root = ByteString(root.as_bytes().to_vec());
    let webhooks = registered.webhooks.unwrap_or_default();
    if webhooks.iter().all(|webhook| webhook.client_config.ca_bundle.as_ref() == Some(&root)) {
        return Ok(false);
    }
    // Merged by name: an entry that is not named stays as it is.
    let entry = |name: &str| json!({"name": name, "clientConfig": {"caBundle": root}});
    let entries: Vec<_> = webhooks.iter().map(|webhook| entry(&webhook.name)).collect();
    let patch = Patch::Strategic(json!({"webhooks": entries}));
    api.patch(name, &PatchParams::default(), &patch).await.map_err(failed)?;
    Ok(true)
}
