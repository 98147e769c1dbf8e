//! One Ingress, read: hosts, routes by listener, backends and certificates, or why it cannot be served.

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

use http::{HeaderName, HeaderValue};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use lifl_api::ingress::{CLUSTER_LOCAL, EXTERNAL_IP, IngressPath, IngressSplit, IngressTls, KIngress, REDIRECTED};
use lifl_cluster::Key;

use super::{
    backend::{Backend, BackendName, Port},
    rules::{Action, Listener, Route, Routes, Split, Splits, Wanted, order},
};

/// An Ingress as it is served.
#[derive(Debug)]
pub(super) struct Translated {
    pub(super) name: Key,
    /// Of the spec that this was read from.
    pub(super) hash: String,
    pub(super) rules: Vec<Rule>,
    /// Certificates for clients outside and inside.
    pub(super) tls: [Vec<Certificate>; 2],
    created: Option<Timestamp>,
    /// And whether they have a share of the requests.
    backends: BTreeMap<BackendName, bool>,
}

/// Hosts that are served alike.
#[derive(Debug)]
pub(super) struct Rule {
    /// Lower case; `*` is any.
    pub(super) hosts: Vec<String>,
    /// By listener.
    routes: [Option<Routes>; 4],
}

/// Where a certificate is, and the hosts that it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Certificate {
    pub(super) secret: Key,
    pub(super) hosts: Vec<String>,
}

/// An Ingress that cannot be served as it stands.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// It has no name.
    #[error("no namespace or no name")]
    Nameless,
    /// Its spec cannot be written as JSON.
    #[error("the spec cannot be hashed: {0}")]
    Hash(#[from] serde_json::Error),
    /// A rule does not say what becomes of its requests.
    #[error("a rule for {0:?} has no 'http'")]
    NoHttp(Vec<String>),
    /// A header that cannot be.
    #[error("'{0}' is not the name of a header")]
    HeaderName(String),
    /// A header that cannot be so.
    #[error("'{value}' cannot be the value of '{name}'")]
    HeaderValue {
        /// The header.
        name: String,
        /// What it is to be.
        value: String,
    },
    /// Pods that want to be spoken to over TLS.
    #[error(
        "'{0}' is asked over TLS, which is not spoken to pods yet: `system-internal-tls` in Knative's ConfigMap config-network is to \
         be off"
    )]
    Tls(BackendName),
    /// Shares that divide nothing.
    #[error("the splits of path '{0}' have no share of the requests, or a negative one")]
    Shares(String),
}

fn name_of(name: &str) -> Result<HeaderName, Fault> {
    HeaderName::from_bytes(name.as_bytes()).map_err(|_says_no_more| Fault::HeaderName(name.to_owned()))
}

fn value_of(name: &str, value: &str) -> Result<HeaderValue, Fault> {
    HeaderValue::from_str(value)
        .map_err(|_says_no_more| Fault::HeaderValue { name: name.to_owned(), value: value.to_owned() })
}

fn certificate(tls: &IngressTls, own: &Key) -> Certificate {
    let namespace = if tls.secret_namespace.is_empty() { &own.namespace } else { &tls.secret_namespace };
    let hosts = tls.hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
    Certificate { secret: Key { namespace: namespace.clone(), name: tls.secret_name.clone() }, hosts }
}

fn backend_of(split: &IngressSplit) -> BackendName {
    let port = match &split.service_port {
        IntOrString::Int(number) => Port::Number(*number),
        IntOrString::String(name) => Port::Name(name.clone()),
    };
    BackendName { namespace: split.service_namespace.clone(), service: split.service_name.clone(), port }
}

fn splits(path: &IngressPath, backend: &mut impl FnMut(BackendName) -> Arc<Backend>) -> Result<Splits, Fault> {
    let mut total = 0;
    let mut list = Vec::with_capacity(path.splits.len());
    for split in &path.splits {
        total += u64::try_from(split.percent).map_err(|_negative| Fault::Shares(path.path.clone()))?;
        let mut headers = BTreeMap::new();
        for (name, value) in split.append_headers.iter().chain(&path.append_headers) {
            let key = name_of(name)?;
            let value = value_of(name, value)?;
            headers.insert(key.as_str().to_owned(), (key, value));
        }
        let headers = headers.into_values().collect();
        let name = backend_of(split);
        if matches!(&name.port, Port::Number(443)) || matches!(&name.port, Port::Name(port) if port == "https") {
            return Err(Fault::Tls(name));
        }
        list.push(Split { until: total, backend: backend(name), headers });
    }
    if total == 0 {
        return Err(Fault::Shares(path.path.clone()));
    }
    let host = match path.rewrite_host.as_str() {
        "" => None,
        host => Some(value_of("host", host)?),
    };
    Ok(Splits { list, total, host })
}

fn route(path: &IngressPath, hash: &HeaderValue, action: Action) -> Result<Arc<Route>, Fault> {
    let mut headers = Vec::with_capacity(path.headers.len());
    for (name, wanted) in &path.headers {
        let value = Some(wanted.exact.clone()).filter(|value| !value.is_empty());
        headers.push(Wanted { name: name_of(name)?, value });
    }
    let prefix = if path.path.is_empty() { "/" } else { &path.path };
    Ok(Arc::new(Route { path: prefix.to_owned(), headers, action, hash: hash.clone() }))
}

// === impl Translated ===

impl Translated {
    /// Reads an Ingress; `backend` gives what a name stands for.
    pub(super) fn new(king: &KIngress, mut backend: impl FnMut(BackendName) -> Arc<Backend>) -> Result<Self, Fault> {
        let (Some(namespace), Some(own)) = (king.metadata.namespace.clone(), king.metadata.name.clone()) else {
            return Err(Fault::Nameless);
        };
        let name = Key { namespace, name: own };
        let mut king = king.clone();
        king.set_defaults();
        let hash = king.hash()?;
        let hash_value = value_of("k-network-hash", &hash)?;
        let mut backends = BTreeMap::new();
        let mut rules = Vec::with_capacity(king.spec.rules.len());
        for rule in &king.spec.rules {
            let Some(http) = &rule.http else { return Err(Fault::NoHttp(rule.hosts.clone())) };
            let external = rule.visibility == EXTERNAL_IP;
            let redirected = external && king.spec.http_option == REDIRECTED;
            let (mut forwards, mut redirects) = (Vec::new(), Vec::new());
            for path in http.paths.iter().filter(|path| !path.splits.is_empty()) {
                let splits = splits(path, &mut backend)?;
                for split in &path.splits {
                    *backends.entry(backend_of(split)).or_default() |= split.percent > 0;
                }
                forwards.push(route(path, &hash_value, Action::Split(splits))?);
                if redirected {
                    redirects.push(route(path, &hash_value, Action::Redirect)?);
                }
            }
            if forwards.is_empty() {
                continue;
            }
            order(&mut forwards);
            order(&mut redirects);
            let secure: Routes = forwards.into();
            let plain: Routes = if redirected { redirects.into() } else { Arc::clone(&secure) };
            let has_tls = !king.spec.tls.is_empty();
            let routes = Listener::ALL.map(|listener| match listener {
                Listener::External => external.then(|| Arc::clone(&plain)),
                Listener::ExternalTls => (external && has_tls).then(|| Arc::clone(&secure)),
                Listener::Local => Some(Arc::clone(&plain)),
                Listener::LocalTls => (rule.visibility == CLUSTER_LOCAL && has_tls).then(|| Arc::clone(&secure)),
            });
            let mut hosts: Vec<String> = rule.hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
            if hosts.is_empty() {
                hosts.push("*".to_owned());
            }
            hosts.sort_unstable();
            hosts.dedup();
            rules.push(Rule { hosts, routes });
        }
        let tls = [EXTERNAL_IP, CLUSTER_LOCAL]
            .map(|visibility| king.tls_of(visibility).into_iter().map(|tls| certificate(tls, &name)).collect());
        let created = king.metadata.creation_timestamp.as_ref().map(|time| time.0);
        Ok(Self { name, hash, rules, tls, created, backends })
    }

    /// Who comes first when two declare the same host: the older; every gateway must come to the same answer.
    pub(super) fn precedence(&self, other: &Self) -> Ordering {
        let age = |ingress: &Self| (ingress.created.is_none(), ingress.created);
        age(self).cmp(&age(other)).then_with(|| self.name.cmp(&other.name))
    }

    /// Backends that have a share of the requests.
    pub(super) fn sharing(&self) -> impl Iterator<Item = &BackendName> {
        self.backends.iter().filter(|(_, share)| **share).map(|(name, _)| name)
    }

    /// All backends.
    pub(super) fn backends(&self) -> impl Iterator<Item = &BackendName> {
        self.backends.keys()
    }
}

// === impl Rule ===

impl Rule {
    /// Adds its routes to those of a host.
    pub(super) fn join(&self, parts: &mut [Vec<Routes>; 4]) {
        for (part, routes) in parts.iter_mut().zip(&self.routes) {
            part.extend(routes.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::metrics::Counters, *};

    fn translated(port: &Value) -> Result<Translated, Fault> {
        let split = json!({"serviceNamespace": "golden", "serviceName": "blue", "servicePort": port, "percent": 100});
        let king: KIngress = serde_json::from_value(json!({
            "apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress",
            "metadata": {"namespace": "golden", "name": "shop"},
            "spec": {"rules": [{"hosts": ["shop.example.com"], "http": {"paths": [{"splits": [split]}]}}]},
        }))
        .unwrap();
        Translated::new(&king, |name| Arc::new(Backend::new(name, Counters::default())))
    }

    #[test]
    fn pods_that_are_to_be_asked_over_tls_are_refused_by_name() {
        for port in [json!(443), json!("https")] {
            let fault = translated(&port).unwrap_err();
            assert!(matches!(&fault, Fault::Tls(name) if name.service == "blue"), "{fault}");
            assert!(fault.to_string().contains("system-internal-tls"), "{fault}");
        }
        for port in [json!(80), json!(81), json!("http2")] {
            assert!(translated(&port).is_ok(), "{port}");
        }
    }
}
