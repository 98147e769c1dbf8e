//! `AdmissionReview` of `admission.k8s.io/v1`: read, judged, answered. Pure.

use std::collections::BTreeSet;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::mutate::{Request, Verdict, mutate};

const VERSION: &str = "admission.k8s.io/v1";

/// A review that cannot be answered; everything that can be is allowed.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    /// It is no JSON, or lacks what every review has.
    #[error("no AdmissionReview: {0}")]
    Unreadable(#[from] serde_json::Error),
    /// Of another version.
    #[error("{kind} of {version} is not AdmissionReview of {VERSION}")]
    Version {
        /// What it says to be.
        kind: String,
        /// Of which API.
        version: String,
    },
}

/// An answer, and what it says.
#[derive(Debug)]
pub struct Reviewed {
    /// The review to send back.
    pub answer: Value,
    /// What was decided.
    pub verdict: Verdict,
    /// Of which pod: namespace and name, or what its name will begin with.
    pub pod: (String, String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    api_version: String,
    kind: String,
    request: AdmissionRequest,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AdmissionRequest {
    uid: String,
    #[serde(default)]
    kind: Kind,
    #[serde(default)]
    sub_resource: String,
    #[serde(default)]
    operation: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    object: Value,
}

#[derive(Default, PartialEq, Eq, Deserialize)]
struct Kind {
    #[serde(default)]
    group: String,
    #[serde(default)]
    version: String,
    #[serde(default)]
    kind: String,
}

// === impl AdmissionRequest ===

impl AdmissionRequest {
    /// Containers can be changed while the pod is created and never after.
    fn creates_a_pod(&self) -> bool {
        let pod = Kind { group: String::new(), version: "v1".into(), kind: "Pod".into() };
        self.kind == pod && self.operation == "CREATE" && self.sub_resource.is_empty()
    }
}

/// Answers a review; `namespace_asks`: it came because of its namespace.
///
/// # Errors
/// [`ReviewError`] when there is nothing to answer to.
pub fn review(body: &[u8], namespace_asks: bool, plain_runtimes: &BTreeSet<String>) -> Result<Reviewed, ReviewError> {
    let Review { api_version, kind, request } = serde_json::from_slice(body)?;
    if (api_version.as_str(), kind.as_str()) != (VERSION, "AdmissionReview") {
        return Err(ReviewError::Version { kind, version: api_version });
    }
    let about = Request { namespace: &request.namespace, namespace_asks, plain_runtimes };
    let verdict = if request.creates_a_pod() { mutate(&request.object, &about) } else { Verdict::NotOurs };
    let mut response = json!({"uid": request.uid, "allowed": true});
    if let Verdict::Patch { patch, .. } | Verdict::Keep { patch, .. } = &verdict {
        response["patchType"] = json!("JSONPatch");
        response["patch"] = json!(STANDARD.encode(Value::from(patch.clone()).to_string()));
    }
    match &verdict {
        Verdict::Patch { .. } => response["auditAnnotations"] = json!({"data-plane": "node"}),
        Verdict::Keep { reason, .. } => {
            response["auditAnnotations"] = json!({"data-plane": format!("sidecar: {reason}")});
            response["warnings"] = json!([format!("queue-proxy stays: {reason}")]);
        }
        Verdict::NotOurs => {}
    }
    let metadata = &request.object["metadata"];
    let name = metadata["name"].as_str().or_else(|| metadata["generateName"].as_str()).unwrap_or_default().to_owned();
    let answer = json!({"apiVersion": VERSION, "kind": "AdmissionReview", "response": response});
    Ok(Reviewed { answer, verdict, pod: (request.namespace, name) })
}
