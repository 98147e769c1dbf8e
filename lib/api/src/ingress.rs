//! Knative's internal Ingress (`networking.internal.knative.dev/v1alpha1`, "KIngress"): what a Route asks of whoever
//! brings requests to its revisions.
//!
//! Written and judged by Knative's own parts, so names, order and omissions are exactly those of its Go types: the
//! [hash](KIngress::hash) is taken over the bytes that Go would write. Words are kept as they stand (`String` rather
//! than an enum), because one object with an unknown word must not make a whole list unreadable.

use std::{collections::BTreeMap, io};

use k8s_openapi::apimachinery::pkg::{apis::meta::v1::Time, util::intstr::IntOrString};
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Annotation that names the class of an Ingress.
pub const CLASS_ANNOTATION: &str = "networking.knative.dev/ingress.class";
/// The class that the gateway serves.
pub const CLASS: &str = "lifl.ingress.networking.knative.dev";
/// Value of `K-Network-Hash` in a request that asks which version of an Ingress is served.
pub const HASH_OVERRIDE: &str = "override";
/// Value of `K-Network-Probe` from probers of an Ingress.
pub const PROBE_VALUE: &str = "probe";
/// User-Agent of probers of an Ingress.
pub const PROBER_USER_AGENT: &str = "Knative-Ingress-Probe";
/// Path that probers ask for.
pub const PROBE_PATH: &str = "/healthz";

/// `visibility` of a rule for clients outside the cluster; also what an empty one means.
pub const EXTERNAL_IP: &str = "ExternalIP";
/// `visibility` of a rule for clients inside the cluster.
pub const CLUSTER_LOCAL: &str = "ClusterLocal";
/// `httpOption` that sends plain requests of external rules to HTTPS.
pub const REDIRECTED: &str = "Redirected";

/// What is asked for.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "networking.internal.knative.dev",
    version = "v1alpha1",
    kind = "Ingress",
    root = "KIngress",
    plural = "ingresses",
    singular = "ingress",
    shortname = "kingress",
    shortname = "king",
    namespaced,
    status = "IngressStatus",
    schema = "disabled",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct IngressSpec {
    /// Certificates, by host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tls: Vec<IngressTls>,
    /// Which hosts are served, how.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<IngressRule>,
    /// `Enabled` or `Redirected`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub http_option: String,
}

/// A certificate and the hosts that it is for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IngressTls {
    /// Hosts, as in the certificate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// Secret of type `kubernetes.io/tls`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub secret_name: String,
    /// Its namespace; empty: the Ingress's own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub secret_namespace: String,
}

/// Hosts that are served alike.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IngressRule {
    /// Hosts without port; none: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// `ExternalIP` or `ClusterLocal`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub visibility: String,
    /// What becomes of their requests. Knative refuses a rule without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpRule>,
}

/// What becomes of the requests of a rule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRule {
    /// Paths, each a prefix.
    #[serde(default)]
    pub paths: Vec<IngressPath>,
}

/// A prefix of paths, and where its requests go.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IngressPath {
    /// Literal prefix; empty: `/`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// The Host that the backend sees instead of the client's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rewrite_host: String,
    /// Headers that a request must carry.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, HeaderMatch>,
    /// Services that share the requests.
    #[serde(default)]
    pub splits: Vec<IngressSplit>,
    /// Headers that are set, whatever the client sent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub append_headers: BTreeMap<String, String>,
}

/// What a header must be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeaderMatch {
    /// Exactly this; empty: anything, as long as it is there.
    #[serde(default)]
    pub exact: String,
}

/// A service and its share of the requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IngressSplit {
    /// Namespace of the service.
    #[serde(default)]
    pub service_namespace: String,
    /// The service: that of a revision as a rule.
    #[serde(default)]
    pub service_name: String,
    /// Its port, by number or by name.
    #[serde(default = "no_port")]
    pub service_port: IntOrString,
    /// Of a hundred; left out where there is but one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub percent: i64,
    /// Headers that are set on this share.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub append_headers: BTreeMap<String, String>,
}

/// How far it has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IngressStatus {
    /// Generation of the spec that the rest speaks of.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub observed_generation: i64,
    /// `LoadBalancerReady`, `NetworkConfigured`, `Ready`; in the order of their names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<KCondition>,
    /// Where clients outside find it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_load_balancer: Option<LoadBalancer>,
    /// Where clients inside find it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_load_balancer: Option<LoadBalancer>,
}

/// A condition as Knative writes them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KCondition {
    /// Its name.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// Empty: an error when false.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub severity: String,
    /// Since when it says what it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<Time>,
    /// One word.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// One line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// Entrances to the gateways. A Route copies the only entry of the private one to its placeholder service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadBalancer {
    /// Exactly one entry is understood.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<LoadBalancerEntry>,
}

/// One entrance: an address, a name, or a name inside the cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancerEntry {
    /// Address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub ip: String,
    /// Name in the DNS.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Name inside the cluster.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain_internal: String,
    /// Only by a mesh.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub mesh_only: bool,
}

/// Writes JSON as Go's `encoding/json` does: what HTML could take for markup is escaped.
#[derive(Debug)]
struct GoFormatter;

fn no_port() -> IntOrString {
    IntOrString::Int(0)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde asks for")]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

// === impl KIngress ===

impl KIngress {
    /// Its class; `None` is nobody's.
    #[must_use]
    pub fn class(&self) -> Option<&str> {
        self.metadata.annotations.as_ref()?.get(CLASS_ANNOTATION).map(String::as_str)
    }

    /// Fills in what Knative's webhook fills in: every reader hashes the spec after it.
    pub fn set_defaults(&mut self) {
        for rule in &mut self.spec.rules {
            if rule.visibility.is_empty() {
                EXTERNAL_IP.clone_into(&mut rule.visibility);
            }
            for path in rule.http.iter_mut().flat_map(|http| &mut http.paths) {
                if let [only] = path.splits.as_mut_slice()
                    && only.percent == 0
                {
                    only.percent = 100;
                }
            }
        }
    }

    /// SHA-256 in lower-case hex of spec, namespace and name: what probers compare. Of the spec as it stands; see
    /// [`set_defaults`](Self::set_defaults).
    ///
    /// # Errors
    /// When the spec cannot be written as JSON, which no spec that was read from JSON does.
    pub fn hash(&self) -> Result<String, serde_json::Error> {
        let mut bytes = Vec::with_capacity(1024);
        self.spec.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, GoFormatter))?;
        bytes.extend_from_slice(self.metadata.namespace.as_deref().unwrap_or_default().as_bytes());
        bytes.extend_from_slice(self.metadata.name.as_deref().unwrap_or_default().as_bytes());
        Ok(Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Certificates of a visibility: those that name all hosts of one of its rules. A rule for any host ends the search,
    /// as Knative's own readers do.
    #[must_use]
    pub fn tls_of(&self, visibility: &str) -> Vec<&IngressTls> {
        let mut out = Vec::new();
        for rule in self.spec.rules.iter().filter(|rule| rule.visibility == visibility) {
            if rule.hosts.is_empty() {
                return out;
            }
            out.extend(self.spec.tls.iter().filter(|tls| rule.hosts.iter().all(|host| tls.hosts.contains(host))));
        }
        out
    }
}

// === impl GoFormatter ===

impl serde_json::ser::Formatter for GoFormatter {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut plain = 0;
        for (at, c) in fragment.char_indices() {
            let escaped = match c {
                '<' => "\\u003c",
                '>' => "\\u003e",
                '&' => "\\u0026",
                '\u{2028}' => "\\u2028",
                '\u{2029}' => "\\u2029",
                _ => continue,
            };
            writer.write_all(&fragment.as_bytes()[plain..at])?;
            writer.write_all(escaped.as_bytes())?;
            plain = at + c.len_utf8();
        }
        writer.write_all(&fragment.as_bytes()[plain..])
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: serde_json::Value) -> KIngress {
        serde_json::from_value(value).unwrap()
    }

    fn with_path(path: serde_json::Value) -> KIngress {
        read(json!({
            "apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress",
            "metadata": {},
            "spec": {"rules": [{"hosts": ["example.com"], "http": {"paths": [path]}}]},
        }))
    }

    // The two sums are those of the table in knative/networking's pkg/ingress/ingress_test.go.
    #[test]
    fn hashes_are_those_of_go() {
        let plain = with_path(json!({"splits": [{"serviceName": "blah"}]}));
        assert_eq!(plain.hash().unwrap(), "a25000a350642c8abef53078b329bd043e18758f6063c1172d53b04e14fcf5c1");
        let headers = with_path(json!({"splits": [{"serviceName": "blah", "appendHeaders": {"Foo": "bar"}}]}));
        assert_eq!(headers.hash().unwrap(), "6b652c7abed871354affd4a9cb699d33816f24541fac942149b91ad872fe63ca");
    }

    #[test]
    fn the_bytes_under_the_hash_are_those_of_go() {
        let king = read(json!({
            "apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress",
            "metadata": {"name": "shop", "namespace": "golden", "generation": 3},
            "spec": {
                "httpOption": "Redirected", "unknown": {"fields": "are tolerated"},
                "rules": [{
                    "visibility": "ExternalIP", "hosts": ["a.example.com", "b.example.com"],
                    "http": {"paths": [{
                        "appendHeaders": {"Z": "<&>", "A": "\u{2028}é\u{8}\u{1f}\"\\"},
                        "splits": [
                            {"percent": 90, "servicePort": "http", "serviceName": "s", "serviceNamespace": "n",
                             "appendHeaders": {"Knative-Serving-Revision": "r", "Knative-Serving-Namespace": "n"}},
                            {"percent": 0, "servicePort": 81, "serviceName": "t", "serviceNamespace": "n"}],
                        "headers": {"Tag": {"exact": "next"}, "Any": {"exact": ""}},
                        "rewriteHost": "inner.svc", "path": "/p"}]}}],
                "tls": [{"secretNamespace": "n", "secretName": "cert", "hosts": ["a.example.com"]}],
            },
        }));
        let mut bytes = Vec::new();
        king.spec.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, GoFormatter)).unwrap();
        let want = concat!(
            r#"{"tls":[{"hosts":["a.example.com"],"secretName":"cert","secretNamespace":"n"}],"#,
            r#""rules":[{"hosts":["a.example.com","b.example.com"],"visibility":"ExternalIP","http":{"paths":["#,
            r#"{"path":"/p","rewriteHost":"inner.svc","headers":{"Any":{"exact":""},"Tag":{"exact":"next"}},"#,
            r#""splits":[{"serviceNamespace":"n","serviceName":"s","servicePort":"http","percent":90,"#,
            r#""appendHeaders":{"Knative-Serving-Namespace":"n","Knative-Serving-Revision":"r"}},"#,
            r#"{"serviceNamespace":"n","serviceName":"t","servicePort":81}],"#,
            r#""appendHeaders":{"A":"\u2028é\b\u001f\"\\","Z":"\u003c\u0026\u003e"}}]}}],"#,
            r#""httpOption":"Redirected"}"#,
        );
        assert_eq!(String::from_utf8(bytes).unwrap(), want);
        let whole = format!("{want}goldenshop");
        let sum: String = Sha256::digest(whole.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(king.hash().unwrap(), sum);
    }

    #[test]
    fn defaults_are_those_of_the_webhook() {
        let mut king = with_path(json!({"splits": [{"serviceName": "blah"}]}));
        king.set_defaults();
        assert_eq!(king.spec.rules[0].visibility, EXTERNAL_IP);
        assert_eq!(king.spec.rules[0].http.as_ref().unwrap().paths[0].splits[0].percent, 100);
        let mut two = with_path(json!({"splits": [{"serviceName": "a"}, {"serviceName": "b", "percent": 100}]}));
        two.set_defaults();
        assert_eq!(two.spec.rules[0].http.as_ref().unwrap().paths[0].splits[0].percent, 0);
    }

    #[test]
    fn a_certificate_serves_a_rule_when_it_names_all_of_its_hosts() {
        let king = read(json!({
            "apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress", "metadata": {},
            "spec": {
                "rules": [
                    {"hosts": ["a", "b"], "visibility": "ExternalIP", "http": {"paths": []}},
                    {"hosts": ["c"], "visibility": "ClusterLocal", "http": {"paths": []}},
                ],
                "tls": [{"hosts": ["a"], "secretName": "half"}, {"hosts": ["b", "a"], "secretName": "whole"},
                        {"hosts": ["c"], "secretName": "inner"}],
            },
        }));
        let names = |visibility| king.tls_of(visibility).iter().map(|tls| tls.secret_name.clone()).collect::<Vec<_>>();
        assert_eq!(names(EXTERNAL_IP), ["whole"]);
        assert_eq!(names(CLUSTER_LOCAL), ["inner"]);
    }
}
