//! All that the ingress is told: objects as Kubernetes has them, from its API or from files, and what follows from them
//! for a port of a service.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use k8s_openapi::{
    api::{
        core::v1::{Endpoints, Secret, Service, ServicePort},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use lifl_api::ingress::KIngress;
use lifl_cluster::Key;
use lifl_proxy::{Endpoint, Protocol};

use super::backend::{BackendName, Port};

/// Label by which a slice names its service.
pub(super) const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// Everything at one instant. Cheap to make from watched stores: nothing is copied.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Of any class; those of others are passed over.
    pub ingresses: Vec<Arc<KIngress>>,
    /// Services that rules name: they tell names of ports, protocols and external names.
    pub services: Vec<Arc<Service>>,
    /// Ready addresses of services.
    pub slices: Vec<Arc<EndpointSlice>>,
    /// The same in the older form; read for services that have no slice.
    pub endpoints: Vec<Arc<Endpoints>>,
    /// Certificates.
    pub secrets: Vec<Arc<Secret>>,
    /// Addresses of the external names of services, as far as they are known.
    pub names: BTreeMap<String, Vec<IpAddr>>,
    /// Why secrets that rules name are not among [`secrets`](Self::secrets), where there is more to say than that they are not.
    pub refused: BTreeMap<Key, String>,
    /// The gateways of the cluster.
    pub gateways: Gateways,
    /// This node's name, where only objects tell it.
    pub node: Option<String>,
}

/// The gateways of a cluster that take requests, by the names of their pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gateways {
    /// Where each takes those of clients outside.
    pub public: BTreeMap<String, SocketAddr>,
    /// Where each takes those of clients inside.
    pub private: BTreeMap<String, SocketAddr>,
}

/// Whether both are the same objects in the same order. Objects are shared between snapshots: what is the same is the same in
/// memory.
pub(super) fn same<T>(left: &[Arc<T>], right: &[Arc<T>]) -> bool {
    left.len() == right.len() && left.iter().zip(right).all(|(left, right)| Arc::ptr_eq(left, right))
}

/// The addresses of a port of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) near: BTreeSet<Endpoint>,
    pub(super) far: BTreeSet<Endpoint>,
}

/// A snapshot, by service.
#[derive(Debug)]
pub(super) struct Catalog<'a> {
    node: &'a str,
    snapshot: &'a Snapshot,
    services: HashMap<(&'a str, &'a str), &'a Service>,
    slices: HashMap<(&'a str, &'a str), Vec<&'a EndpointSlice>>,
    endpoints: HashMap<(&'a str, &'a str), &'a Endpoints>,
}

/// A port, as far as it is known: its name in endpoints, and its number there if no name tells.
struct Wanted {
    name: Option<String>,
    number: Option<u16>,
    protocol: Protocol,
}

fn key(metadata: &ObjectMeta) -> (&str, &str) {
    (metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default())
}

/// HTTP/2 is spoken where the port's name or its protocol says so.
fn protocol(name: Option<&str>, application: Option<&str>) -> Protocol {
    match (name, application) {
        (Some("http2" | "h2c"), _) | (_, Some("kubernetes.io/h2c")) => Protocol::H2c,
        _ => Protocol::H1,
    }
}

fn service_port<'a>(service: &'a Service, port: &Port) -> Option<&'a ServicePort> {
    let ports = service.spec.as_ref()?.ports.as_ref()?;
    ports.iter().find(|candidate| match port {
        Port::Number(number) => candidate.port == *number,
        Port::Name(name) => candidate.name.as_ref() == Some(name),
    })
}

// === impl Addresses ===

impl Addresses {
    pub(super) fn is_empty(&self) -> bool {
        self.near.is_empty() && self.far.is_empty()
    }
}

// === impl Wanted ===

impl Wanted {
    /// From the service; where that is not known, from Knative's names for its ports.
    fn new(service: Option<&Service>, port: &Port) -> Option<Self> {
        if let Some(service) = service {
            let port = service_port(service, port)?;
            let number = match &port.target_port {
                Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
                Some(IntOrString::String(_)) => None,
                None => u16::try_from(port.port).ok(),
            };
            let protocol = protocol(port.name.as_deref(), port.app_protocol.as_deref());
            return Some(Self { name: Some(port.name.clone().unwrap_or_default()), number, protocol });
        }
        let name = match port {
            Port::Number(80) => "http",
            Port::Number(81) => "http2",
            Port::Number(443) => "https",
            Port::Number(number) => {
                return Some(Self { name: None, number: u16::try_from(*number).ok(), protocol: Protocol::H1 });
            }
            Port::Name(name) => name,
        };
        Some(Self { name: Some(name.to_owned()), number: None, protocol: protocol(Some(name), None) })
    }

    /// Its number among the ports of endpoints.
    fn find<'a>(&self, mut ports: impl Iterator<Item = (Option<&'a str>, Option<i32>)> + Clone) -> Option<u16> {
        let of_name = ports.clone().find(|(name, _)| self.name.as_deref() == Some(name.unwrap_or_default()));
        let number = of_name.and_then(|(_, port)| u16::try_from(port?).ok());
        // A service of one port need not name it.
        let only = || match (ports.next(), ports.next()) {
            (Some((None | Some(""), Some(port))), None) => u16::try_from(port).ok(),
            _ => None,
        };
        number.or(self.number).or_else(only)
    }
}

// === impl Catalog ===

impl<'a> Catalog<'a> {
    /// `node` is this node's name: its addresses are near.
    pub(super) fn new(snapshot: &'a Snapshot, node: &'a str) -> Self {
        let mut slices: HashMap<_, Vec<_>> = HashMap::new();
        for slice in &snapshot.slices {
            let service = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_LABEL));
            if let Some(service) = service {
                slices.entry((key(&slice.metadata).0, service.as_str())).or_default().push(&**slice);
            }
        }
        Self {
            node,
            snapshot,
            services: snapshot.services.iter().map(|service| (key(&service.metadata), &**service)).collect(),
            slices,
            endpoints: snapshot.endpoints.iter().map(|ends| (key(&ends.metadata), &**ends)).collect(),
        }
    }

    /// Ready addresses of a port of a service; none when service or port are unknown.
    pub(super) fn addresses(&self, backend: &BackendName) -> Addresses {
        let key = (backend.namespace.as_str(), backend.service.as_str());
        let mut out = Addresses::default();
        let service = self.services.get(&key).copied();
        if let Some(name) = self.external_name(backend) {
            let port = service.and_then(|service| service_port(service, &backend.port));
            let number = port.and_then(|port| u16::try_from(port.port).ok()).unwrap_or(80);
            let protocol =
                port.map_or(Protocol::H1, |port| protocol(port.name.as_deref(), port.app_protocol.as_deref()));
            let ips = self.snapshot.names.get(name).into_iter().flatten();
            out.far.extend(ips.map(|ip| Endpoint::plain(SocketAddr::new(*ip, number), protocol)));
            return out;
        }
        let Some(wanted) = Wanted::new(service, &backend.port) else { return out };
        match self.slices.get(&key) {
            Some(slices) => slices.iter().for_each(|slice| self.of_slice(slice, &wanted, &mut out)),
            None => self.endpoints.get(&key).into_iter().for_each(|ends| self.of_endpoints(ends, &wanted, &mut out)),
        }
        out
    }

    /// Whether the service of a backend is known.
    pub(super) fn has(&self, backend: &BackendName) -> bool {
        self.services.contains_key(&(backend.namespace.as_str(), backend.service.as_str()))
    }

    /// The name outside the cluster that a service stands for.
    pub(super) fn external_name(&self, backend: &BackendName) -> Option<&'a str> {
        let service = self.services.get(&(backend.namespace.as_str(), backend.service.as_str()))?;
        let spec = service.spec.as_ref().filter(|spec| spec.type_.as_deref() == Some("ExternalName"))?;
        spec.external_name.as_deref()
    }

    fn of_slice(&self, slice: &EndpointSlice, wanted: &Wanted, out: &mut Addresses) {
        let ports = slice.ports.iter().flatten();
        let Some(port) = wanted.find(ports.map(|port| (port.name.as_deref(), port.port))) else { return };
        for endpoint in slice.endpoints.iter().flatten() {
            // Who does not say is ready.
            if endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(false) {
                continue;
            }
            for address in &endpoint.addresses {
                self.add(address, endpoint.node_name.as_deref(), port, wanted.protocol, out);
            }
        }
    }

    fn of_endpoints(&self, endpoints: &Endpoints, wanted: &Wanted, out: &mut Addresses) {
        for subset in endpoints.subsets.iter().flatten() {
            let ports = subset.ports.iter().flatten();
            let Some(port) = wanted.find(ports.map(|port| (port.name.as_deref(), Some(port.port)))) else { continue };
            for address in subset.addresses.iter().flatten() {
                self.add(&address.ip, address.node_name.as_deref(), port, wanted.protocol, out);
            }
        }
    }

    fn add(&self, address: &str, node: Option<&str>, port: u16, protocol: Protocol, out: &mut Addresses) {
        // Slices of names (addressType FQDN) are deprecated, and nobody in the path of a revision writes them.
        let Ok(ip) = address.parse::<IpAddr>() else { return };
        let endpoint = Endpoint { addr: SocketAddr::new(ip, port), protocol, place: 0 };
        let near = !self.node.is_empty() && node == Some(self.node);
        if near { &mut out.near } else { &mut out.far }.insert(endpoint);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn service(ports: Value) -> Arc<Service> {
        read(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "n", "name": "s"},
            "spec": {"ports": ports}}))
    }

    fn slice(name: &str, ports: Value, endpoints: Value) -> Arc<EndpointSlice> {
        read(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "n", "name": name, "labels": {SERVICE_LABEL: "s"}},
            "ports": ports, "endpoints": endpoints}))
    }

    fn find(snapshot: &Snapshot, port: Port) -> (Vec<String>, Vec<String>) {
        let name = BackendName { namespace: "n".into(), service: "s".into(), port };
        let found = Catalog::new(snapshot, "here").addresses(&name);
        let texts = |set: &BTreeSet<Endpoint>| {
            set.iter().map(|end| format!("{} {:?}", end.addr, end.protocol)).collect::<Vec<_>>()
        };
        (texts(&found.near), texts(&found.far))
    }

    #[test]
    fn ready_addresses_of_all_slices_by_the_name_of_the_port() {
        let snapshot = Snapshot {
            services: vec![service(json!([
                {"name": "http2", "port": 81, "targetPort": "queue"},
                {"name": "https", "port": 443, "targetPort": 8112},
            ]))],
            slices: vec![
                slice(
                    "a",
                    json!([{"name": "https", "port": 8112}, {"name": "http2", "port": 8013}]),
                    json!([
                        {"addresses": ["10.0.0.1"], "nodeName": "here"},
                        {"addresses": ["10.0.0.2"], "nodeName": "there", "conditions": {"ready": true}},
                        {"addresses": ["10.0.0.3"], "conditions": {"ready": false}},
                    ]),
                ),
                slice("b", json!([{"name": "http2", "port": 9013}]), json!([{"addresses": ["10.0.0.4"]}])),
            ],
            ..Snapshot::default()
        };
        let want = (
            vec!["10.0.0.1:8013 H2c".to_owned()],
            vec!["10.0.0.2:8013 H2c".to_owned(), "10.0.0.4:9013 H2c".to_owned()],
        );
        assert_eq!(find(&snapshot, Port::Number(81)), want);
        assert_eq!(find(&snapshot, Port::Name("http2".into())), want);
        assert_eq!(find(&snapshot, Port::Number(80)), (vec![], vec![]), "a port that the service does not have");
    }

    #[test]
    fn what_stock_knative_wrote_is_understood() {
        // As in golden/one-revision: the public service of a revision, at zero, so with an activator behind.
        let snapshot = Snapshot {
            services: vec![service(json!([
                {"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8012},
                {"name": "https", "port": 443, "protocol": "TCP", "targetPort": 8112},
            ]))],
            endpoints: vec![read(json!({"apiVersion": "v1", "kind": "Endpoints",
                "metadata": {"namespace": "n", "name": "s"},
                "subsets": [{"addresses": [{"ip": "10.244.0.28", "nodeName": "here"}],
                    "ports": [{"name": "http", "port": 8012, "protocol": "TCP"},
                              {"name": "https", "port": 8112, "protocol": "TCP"}]}]}))],
            ..Snapshot::default()
        };
        assert_eq!(find(&snapshot, Port::Number(80)).0, ["10.244.0.28:8012 H1"]);
        let unnamed = Snapshot { services: Vec::new(), ..snapshot };
        assert_eq!(find(&unnamed, Port::Number(80)).0, ["10.244.0.28:8012 H1"], "without the service, by its name");
    }

    #[test]
    fn a_service_of_one_port_need_not_name_it() {
        let snapshot = Snapshot {
            services: vec![service(json!([{"port": 80, "targetPort": "web"}]))],
            slices: vec![slice("a", json!([{"name": "", "port": 3000}]), json!([{"addresses": ["10.0.0.1"]}]))],
            ..Snapshot::default()
        };
        assert_eq!(find(&snapshot, Port::Number(80)).1, ["10.0.0.1:3000 H1"]);
    }

    #[test]
    fn external_names_are_at_the_addresses_they_resolve_to() {
        let snapshot = Snapshot {
            services: vec![read(
                json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "n", "name": "s"},
                "spec": {"type": "ExternalName", "externalName": "inner.svc",
                         "ports": [{"name": "http2", "port": 80, "appProtocol": "kubernetes.io/h2c"}]}}),
            )],
            names: BTreeMap::from([("inner.svc".to_owned(), vec!["10.1.1.1".parse().unwrap()])]),
            ..Snapshot::default()
        };
        assert_eq!(find(&snapshot, Port::Number(80)).1, ["10.1.1.1:80 H2c"]);
    }
}
