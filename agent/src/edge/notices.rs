//! What people are told of the node's pods: Events, each said once.

use k8s_openapi::{
    api::core::v1::{ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use lifl_api::pod::{NodePod, kept_reason};
use lifl_cluster::Notice;

/// Its settings are there, its sockets cannot be.
const NOT_SERVED: &str = "PodNotServed";
/// Its settings cannot be understood.
const SETTINGS_INVALID: &str = "PodSettingsInvalid";
/// It asked for the node, and has queue-proxy.
const SIDECAR_KEPT: &str = "SidecarKept";

/// Reads a pod, and what is to be said of it.
pub(super) fn read(pod: &Pod) -> (Option<NodePod>, Option<Notice>) {
    // Who is about to end needs no help.
    let ends = pod.metadata.deletion_timestamp.is_some();
    let notice = |reason, message| Notice { about: about(&pod.metadata), warning: true, reason, message };
    match NodePod::of(pod) {
        Ok(served) => {
            let kept = kept_reason(pod).filter(|_| !ends);
            (served, kept.map(|why| notice(SIDECAR_KEPT, format!("queue-proxy serves this pod: {why}"))))
        }
        Err(error) => {
            let message = format!("the node's gateway does not serve this pod: {error}");
            (None, (!ends).then(|| notice(SETTINGS_INVALID, message)))
        }
    }
}

/// Says that a pod cannot be served.
pub(super) fn not_served(pod: &NodePod, reason: &str) -> Notice {
    let meta = ObjectMeta {
        namespace: Some(pod.namespace.clone()),
        name: Some(pod.name.clone()),
        uid: Some(pod.uid.clone()),
        ..ObjectMeta::default()
    };
    let message = format!("the node's gateway does not serve this pod: {reason}");
    Notice { about: about(&meta), warning: true, reason: NOT_SERVED, message }
}

fn about(pod: &ObjectMeta) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    use lifl_api::pod::{KEPT_ANNOTATION, SETTINGS_ANNOTATION};
    use serde_json::{Value, json};

    use super::*;

    fn pod(annotations: &Value) -> Value {
        json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "annotations": annotations},
            "spec": {"containers": []},
            "status": {"podIP": "10.244.0.9"},
        })
    }

    fn said(value: Value) -> Option<(&'static str, String)> {
        let (served, notice) = read(&serde_json::from_value(value).unwrap());
        assert!(served.is_none());
        notice.map(|notice| {
            assert_eq!((notice.about.kind.as_deref(), notice.about.uid.as_deref()), (Some("Pod"), Some("u")));
            (notice.reason, notice.message)
        })
    }

    #[test]
    fn each_reason_has_its_word() {
        assert_eq!(said(pod(&json!({}))), None);
        let (reason, message) = said(pod(&json!({KEPT_ANNOTATION: "hostNetwork is set"}))).unwrap();
        assert_eq!((reason, &*message), ("SidecarKept", "queue-proxy serves this pod: hostNetwork is set"));
        let broken = pod(&json!({SETTINGS_ANNOTATION: "{}"}));
        let (reason, message) = said(broken.clone()).unwrap();
        assert_eq!(reason, "PodSettingsInvalid");
        assert!(message.starts_with("the node's gateway does not serve this pod: "), "{message}");
        for mut ending in [broken, pod(&json!({KEPT_ANNOTATION: "hostNetwork is set"}))] {
            ending["metadata"]["deletionTimestamp"] = json!("2026-11-23T01:13:39Z");
            assert_eq!(said(ending), None);
        }
    }
}
