//! What is written into the status of an Ingress, as net-kourier words it, and how an answer to a probe is judged.

use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use lifl_api::ingress::{IngressStatus, KCondition, KIngress, LoadBalancer, LoadBalancerEntry};
use lifl_cluster::Key;
use lifl_proxy::queue::K_NETWORK_HASH;

use super::table::Outcome;

const NETWORK: &str = "NetworkConfigured";
const BALANCER: &str = "LoadBalancerReady";
const READY: &str = "Ready";

/// Knative's words; what is waited for comes behind where it is known.
const WAITING: &str = "Waiting for load balancer to be ready";

/// Where clients find the gateways.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceHosts {
    /// Name of the service for clients outside, as it is known inside the cluster.
    pub public: String,
    /// Name of the service for clients inside.
    pub private: String,
}

/// What an answer to a probe says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probed {
    /// The gateway serves this version; or it tells nothing, and then it is believed.
    Ready,
    /// Not yet: ask again.
    NotYet,
}

/// What one condition says.
struct Says {
    status: String,
    reason: String,
    message: String,
}

/// Judges the answer to a probe with `K-Network-Hash: override`.
#[must_use]
pub fn judge(status: StatusCode, headers: &HeaderMap, hash: &str) -> Probed {
    match (status, headers.get(K_NETWORK_HASH)) {
        // A redirect tells its hash too: a version before may have redirected as well.
        (StatusCode::OK | StatusCode::MOVED_PERMANENTLY, Some(told))
            if !told.is_empty() && told.as_bytes() != hash.as_bytes() =>
        {
            Probed::NotYet
        }
        (StatusCode::NOT_FOUND | StatusCode::SERVICE_UNAVAILABLE, _) => Probed::NotYet,
        _ => Probed::Ready,
    }
}

/// The status of an Ingress: from what the table made of it, and whether probes found all gateways to serve it (`probed`).
/// Times stay as they are in the status before where a condition says the same; the result is equal to that status when
/// there is nothing to write.
#[must_use]
pub fn status(king: &KIngress, outcome: &Outcome, probed: bool, hosts: &ServiceHosts, now: Timestamp) -> IngressStatus {
    let before = king.status.clone().unwrap_or_default();
    let waiting = |why: String| Says::new("Unknown", "Uninitialized", &format!("{WAITING}{why}"));
    let (network, balancer) = match outcome {
        Outcome::Served if probed => (Says::yes(), Says::yes()),
        Outcome::Served => (Says::yes(), waiting(String::new())),
        Outcome::Missing(backend) => {
            let Key { namespace, name } = backend.of_service();
            (Says::yes(), waiting(format!(": there is no Service '{namespace}/{name}'")))
        }
        Outcome::Waiting(backend) => (Says::yes(), waiting(format!(": '{backend}' has no ready address"))),
        Outcome::Conflict(_) => (
            Says::as_before(NETWORK, &before),
            Says::new(
                "False",
                "DomainConflict",
                "Ingress rejected: ingress has a conflicting domain with another ingress",
            ),
        ),
        Outcome::Failed(_) => (Says::as_before(NETWORK, &before), Says::as_before(BALANCER, &before)),
    };
    let ready = match outcome {
        Outcome::Failed(why) => Says::new("Unknown", "ReconcileIngressFailed", why),
        _ if network.status == "True" && balancer.status == "True" => Says::yes(),
        _ => Says::new(&balancer.status, &balancer.reason, &balancer.message),
    };
    let conditions = [(BALANCER, balancer), (NETWORK, network), (READY, ready)];
    let conditions =
        conditions.into_iter().map(|(kind, says)| condition(kind, says, &before.conditions, now)).collect();
    let found = matches!(outcome, Outcome::Served) && probed;
    let entrance = |name: &str, old: Option<LoadBalancer>| {
        let entry = || LoadBalancerEntry { domain_internal: name.to_owned(), ..LoadBalancerEntry::default() };
        if found { Some(LoadBalancer { ingress: vec![entry()] }) } else { old }
    };
    IngressStatus {
        observed_generation: king.metadata.generation.unwrap_or_default(),
        conditions,
        public_load_balancer: entrance(&hosts.public, before.public_load_balancer),
        private_load_balancer: entrance(&hosts.private, before.private_load_balancer),
    }
}

fn condition(kind: &str, says: Says, before: &[KCondition], now: Timestamp) -> KCondition {
    let mut new = KCondition {
        kind: kind.to_owned(),
        status: says.status,
        severity: String::new(),
        last_transition_time: None,
        reason: says.reason,
        message: says.message,
    };
    let old = before.iter().find(|old| old.kind == kind);
    new.last_transition_time = old.and_then(|old| old.last_transition_time.clone());
    if old != Some(&new) {
        new.last_transition_time = Some(Time(now));
    }
    new
}

// === impl Says ===

impl Says {
    fn new(status: &str, reason: &str, message: &str) -> Self {
        Self { status: status.to_owned(), reason: reason.to_owned(), message: message.to_owned() }
    }

    /// What is not judged now stands.
    fn as_before(kind: &str, before: &IngressStatus) -> Self {
        let old = before.conditions.iter().find(|old| old.kind == kind);
        old.map_or_else(|| Self::new("Unknown", "", ""), |old| Self::new(&old.status, &old.reason, &old.message))
    }

    fn yes() -> Self {
        Self::new("True", "", "")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn king(status: serde_json::Value) -> KIngress {
        serde_json::from_value(json!({
            "apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress",
            "metadata": {"namespace": "golden", "name": "shop", "generation": 2},
            "spec": {}, "status": status,
        }))
        .unwrap()
    }

    fn hosts() -> ServiceHosts {
        ServiceHosts { public: "gateway.ns.svc.cluster.local".into(), private: "inner.ns.svc.cluster.local".into() }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn of(king: &KIngress, outcome: &Outcome, probed: bool, now: &str) -> serde_json::Value {
        serde_json::to_value(status(king, outcome, probed, &hosts(), at(now))).unwrap()
    }

    #[test]
    fn what_is_served_everywhere_is_ready() {
        let now = "2026-11-23T01:11:30Z";
        let got = of(&king(json!({})), &Outcome::Served, true, now);
        assert_eq!(
            got,
            json!({
                "conditions": [
                    {"lastTransitionTime": now, "status": "True", "type": "LoadBalancerReady"},
                    {"lastTransitionTime": now, "status": "True", "type": "NetworkConfigured"},
                    {"lastTransitionTime": now, "status": "True", "type": "Ready"},
                ],
                "observedGeneration": 2,
                "publicLoadBalancer": {"ingress": [{"domainInternal": "gateway.ns.svc.cluster.local"}]},
                "privateLoadBalancer": {"ingress": [{"domainInternal": "inner.ns.svc.cluster.local"}]},
            })
        );
        let again = of(&king(got.clone()), &Outcome::Served, true, "2026-11-23T02:00:00Z");
        assert_eq!(again, got, "what says the same is not written again");
    }

    #[test]
    fn until_probes_find_it_the_balancer_is_unknown() {
        let got = of(&king(json!({})), &Outcome::Served, false, "2026-11-23T01:11:30Z");
        let [balancer, network, ready] = got["conditions"].as_array().unwrap().as_slice() else { panic!("{got}") };
        assert_eq!(network["status"], "True");
        for condition in [balancer, ready] {
            assert_eq!(condition["status"], "Unknown");
            assert_eq!(condition["reason"], "Uninitialized");
            assert_eq!(condition["message"], "Waiting for load balancer to be ready");
        }
        assert_eq!(got.get("publicLoadBalancer"), None);
    }

    #[test]
    fn what_is_waited_for_is_told() {
        let backend = || super::super::backend::BackendName {
            namespace: "golden".into(),
            service: "shop".into(),
            port: super::super::backend::Port::Number(80),
        };
        let message = |outcome: &Outcome| {
            let got = of(&king(json!({})), outcome, false, "2026-11-23T01:11:30Z");
            assert_eq!(got["conditions"][2]["status"], "Unknown");
            got["conditions"][2]["message"].as_str().unwrap().to_owned()
        };
        let missing = message(&Outcome::Missing(backend()));
        assert_eq!(missing, "Waiting for load balancer to be ready: there is no Service 'golden/shop'");
        let waiting = message(&Outcome::Waiting(backend()));
        assert_eq!(waiting, "Waiting for load balancer to be ready: 'golden/shop:80' has no ready address");
    }

    #[test]
    fn a_conflict_is_told() {
        let name = Key { namespace: "n".into(), name: "first".into() };
        let ready = of(&king(json!({})), &Outcome::Served, true, "2026-11-23T01:11:30Z");
        let got = of(&king(ready), &Outcome::Conflict(name), false, "2026-11-23T03:00:00Z");
        assert_eq!(got["conditions"][0]["reason"], "DomainConflict");
        assert_eq!(got["conditions"][2]["status"], "False");
        assert_eq!(got["conditions"][2]["lastTransitionTime"], "2026-11-23T03:00:00Z");
    }

    #[test]
    fn a_fault_is_told() {
        let got = of(&king(json!({})), &Outcome::Failed("no secret".into()), false, "2026-11-23T01:11:30Z");
        assert_eq!(got["conditions"][2]["reason"], "ReconcileIngressFailed");
        assert_eq!(got["conditions"][2]["message"], "no secret");
        assert_eq!(got["conditions"][2]["status"], "Unknown");
    }

    #[test]
    fn answers_to_probes_are_judged_as_knative_does() {
        let with = |hash: &str| HeaderMap::from_iter([(K_NETWORK_HASH, hash.parse().unwrap())]);
        let none = HeaderMap::new();
        for (status, headers, want) in [
            (200, with("abc"), Probed::Ready),
            (200, with("old"), Probed::NotYet),
            (200, none.clone(), Probed::Ready),
            (404, none.clone(), Probed::NotYet),
            (503, with("abc"), Probed::NotYet),
            (302, none.clone(), Probed::Ready),
            (301, with("abc"), Probed::Ready),
            (301, with("old"), Probed::NotYet),
            (500, none, Probed::Ready),
        ] {
            assert_eq!(judge(StatusCode::from_u16(status).unwrap(), &headers, "abc"), want, "{status}");
        }
    }
}
