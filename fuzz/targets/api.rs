//! Targets of `lib/api`: annotations, queue-proxy's environment, quantities, headers of tensors, objects of Kubernetes.

use std::{collections::BTreeMap, str::FromStr};

use lifl_api::{
    ingress::KIngress,
    manifest::Manifest,
    pod::{NodePod, PodSettings, PodWord},
    quantity::{Bytes, Span},
};

/// The annotation of a pod: what is read is written so that it is read again.
pub(crate) fn annotation(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(settings) = PodSettings::from_annotation(text) {
        let again = PodSettings::from_annotation(&settings.to_annotation()).expect("what was written");
        assert_eq!(again, settings);
        assert!(!settings.ports().is_empty());
    }
}

/// queue-proxy's environment, `KEY=value` a line.
pub(crate) fn environment(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let env: BTreeMap<String, String> = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    for secret in [None, Some("serving-certs")] {
        if let Ok(settings) = PodSettings::from_queue_env(&env, secret) {
            assert_eq!(PodSettings::from_annotation(&settings.to_annotation()), Ok(settings));
        }
    }
}

/// Sizes and times: what is shown is read as the same.
pub(crate) fn quantity(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(bytes) = Bytes::from_str(text) {
        assert_eq!(Bytes::from_str(&bytes.to_string()).ok().map(|bytes| bytes.0), Some(bytes.0), "{text}");
    }
    if let Ok(span) = Span::from_str(text) {
        assert_eq!(Span::from_str(&span.to_string()).ok().map(|span| span.0), Some(span.0), "{text}");
    }
}

/// The header of a safetensors file: eight bytes of length, then JSON.
pub(crate) fn safetensors(input: &[u8]) {
    if let Some(prefix) = input.first_chunk::<8>() {
        let _too_long = Manifest::header_length(*prefix);
    }
    if let Ok(manifest) = Manifest::parse(input) {
        let length: u64 = manifest.tensors().iter().map(|tensor| u64::from(!tensor.name.is_empty())).sum();
        assert!(length <= manifest.tensors().len() as u64);
        let _not_this_one = manifest.check(&manifest, &[]);
    }
}

/// A pod as the API server tells of it.
pub(crate) fn pod(input: &[u8]) {
    if let Ok(pod) = serde_json::from_slice(input) {
        let _not_ours = NodePod::of(&pod);
    }
    let _no_word = serde_json::from_slice::<PodWord>(input);
}

/// An Ingress, as JSON.
pub(crate) fn ingress(input: &[u8]) {
    if let Ok(ingress) = serde_json::from_slice::<KIngress>(input) {
        let again = serde_json::to_vec(&ingress).expect("written");
        serde_json::from_slice::<KIngress>(&again).expect("what was written");
    }
}
