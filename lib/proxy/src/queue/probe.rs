//! Who probes, and what is answered to whom. Pure.

use http::{HeaderMap, HeaderName, Response, StatusCode, header::USER_AGENT};

use crate::{head::text, reply, upstream::Body};

/// Whom a probe is for.
pub const K_NETWORK_PROBE: HeaderName = HeaderName::from_static("k-network-probe");
/// Returned to an ingress that asks whether its rules have arrived.
pub const K_NETWORK_HASH: HeaderName = HeaderName::from_static("k-network-hash");

const K_KUBELET_PROBE: HeaderName = HeaderName::from_static("k-kubelet-probe");
const KUBELET: &str = "kube-probe/";
const PROBERS: [&str; 3] = [KUBELET, "Knative-Activator-Probe", "Knative-Autoscaling-Probe"];

/// A probe that is answered by the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Is the pod ready? Known by who asks, whatever the path.
    Health,
    /// Do requests arrive?
    Network,
}

/// What a request probes; `None` is a user's request, even if it says `K-Network-Probe: queue`.
pub(super) fn kind(headers: &HeaderMap) -> Option<Kind> {
    let by = text(headers, &USER_AGENT);
    if PROBERS.iter().any(|prober| by.starts_with(prober)) || !text(headers, &K_KUBELET_PROBE).is_empty() {
        Some(Kind::Health)
    } else if text(headers, &K_NETWORK_PROBE) == "probe" {
        Some(Kind::Network)
    } else {
        None
    }
}

/// A health probe must be for us: this is how an autoscaler learns that no activator is in the path.
pub(super) fn for_queue(headers: &HeaderMap) -> Result<(), Response<Body>> {
    let value = text(headers, &K_NETWORK_PROBE);
    if value == "queue" {
        return Ok(());
    }
    Err(reply::error(StatusCode::BAD_REQUEST, &format!("unexpected probe header value: {value}")))
}

pub(super) fn network(headers: &HeaderMap, draining: bool) -> Response<Body> {
    if draining {
        return shutting_down();
    }
    match headers.get(K_NETWORK_HASH) {
        Some(hash) if !hash.is_empty() => {
            let mut response = reply::empty(StatusCode::OK);
            response.headers_mut().insert(K_NETWORK_HASH, hash.clone());
            response
        }
        _ => {
            let text = "a probe request must contain a non-empty \"K-Network-Hash\" header";
            reply::error(StatusCode::BAD_REQUEST, text)
        }
    }
}

pub(super) fn healthy() -> Response<Body> {
    reply::plain(StatusCode::OK, "queue")
}

pub(super) fn shutting_down() -> Response<Body> {
    reply::error(StatusCode::SERVICE_UNAVAILABLE, "shutting down")
}
