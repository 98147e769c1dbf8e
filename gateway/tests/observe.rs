//! A request's trace through a whole gateway: ingress, pod, user's container; and what Prometheus reads of the pod.
#![expect(clippy::unwrap_used, reason = "a test ends where its surroundings fail")]

mod harness;
#[path = "../../lib/proxy/tests/observe/otlp.rs"]
mod otlp;

use std::{
    net::{SocketAddr, TcpListener},
    os::fd::AsFd as _,
    sync::{Arc, Mutex},
};

use ::http::{Request, Response};
use harness::{Node, http};
use http_body_util::BodyExt as _;
use lifl_api::{
    node::FromAgent,
    pod::{Exporter, NodePod, PodPort, PodSettings, PodWord, Tracing},
};
use lifl_proxy::{Body, Handle, Limits, Peer, Server};
use otlp::{Exported, find, hex};
use prost::Message as _;
use serde_json::{Value, json};

const PLACE: u64 = 78;
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// A span: service, name, kind; trace, parent and itself in hex.
#[derive(Clone, Debug)]
struct Seen {
    service: String,
    name: String,
    kind: i32,
    trace: String,
    parent: String,
    id: String,
}

/// Takes spans.
#[derive(Debug, Default)]
struct Collector(Mutex<Vec<Seen>>);

/// The user's container: tells its parent in the trace.
struct App;

impl Handle for Collector {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        assert_eq!(request.uri().path(), "/v1/traces");
        let body = request.into_body().collect().await.unwrap().to_bytes();
        for of_one in Exported::decode(body).unwrap().resource_spans {
            let service = find(&of_one.resource.unwrap().attributes, "service.name");
            let spans = of_one.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans.map(|span| Seen {
                service: service.clone(),
                name: span.name,
                kind: span.kind,
                trace: hex(&span.trace_id),
                parent: hex(&span.parent_span_id),
                id: hex(&span.span_id),
            }));
        }
        Response::new(Body::empty())
    }
}

impl Handle for App {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        let of = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        Response::new(json!({"parent": of("traceparent"), "state": of("tracestate")}).to_string().into())
    }
}

async fn listen<H: Handle>(handler: Arc<H>) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move { Server::new(handler, Limits::default()).listen(&listener).await });
    at
}

/// The rule that leads to the pod, as files have it.
fn rules() -> String {
    let split = json!({"serviceNamespace": "golden", "serviceName": "shop-blue", "servicePort": 80, "percent": 100});
    let rule = json!({"hosts": ["shop.example"], "visibility": "ExternalIP", "http": {"paths": [{"splits": [split]}]}});
    let items = json!([
        {"apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress",
         "metadata": {"namespace": "golden", "name": "shop",
                      "annotations": {"networking.knative.dev/ingress.class": "lifl.ingress.networking.knative.dev"}},
         "spec": {"rules": [rule]}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "golden", "name": "shop-blue"},
         "spec": {"ports": [{"name": "http", "port": 80, "targetPort": 8012}]}},
        {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
         "metadata": {"namespace": "golden", "name": "shop-blue-1",
                      "labels": {"kubernetes.io/service-name": "shop-blue"}},
         "ports": [{"name": "http", "port": 8012}], "endpoints": [{"addresses": ["127.0.0.1"]}]},
    ]);
    serde_yaml_ng::to_string(&json!({"apiVersion": "v1", "kind": "List", "items": items})).unwrap()
}

fn pod(user_port: u16, tracing: Tracing) -> NodePod {
    let settings = json!({
        "schema": PodSettings::schema(), "namespace": "golden", "service": "shop", "configuration": "shop",
        "revision": "shop-blue", "servingPort": 8012, "protocol": "http1", "userPort": user_port,
        "containerConcurrency": 2, "timeouts": {"request": 300},
    });
    let settings: PodSettings = serde_json::from_value(settings).unwrap();
    let request_metrics = Exporter { protocol: "prometheus".into(), ..settings.request_metrics.clone() };
    NodePod {
        uid: "u1".into(),
        namespace: "golden".into(),
        name: "shop-blue-1".into(),
        address: "127.0.0.1".parse().unwrap(),
        draining: false,
        settings: PodSettings { request_metrics, tracing, ..settings },
    }
}

struct World {
    node: Node,
    ingress: SocketAddr,
    metrics: SocketAddr,
    _rules: tempfile::TempDir,
}

impl World {
    /// A gateway that sends its spans to `otlp`, with one pod, which may have a collector of its own.
    async fn new(otlp: Option<SocketAddr>, tracing: Tracing) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("rules.yaml"), rules()).unwrap();
        let otlp = otlp.map(|at| format!("http://{at}"));
        let config: Value = json!({"ingress": {"files": folder.path(), "otlp": otlp, "lame_duck_ms": 0}});
        let entrance = TcpListener::bind("127.0.0.1:0").unwrap();
        let ingress = entrance.local_addr().unwrap();
        let node = Node::start_with(config, vec![("ingress-http", entrance.into())]).await;
        let ports = [PodPort::Serving, PodPort::UserMetrics];
        let listeners = ports.map(|_| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        });
        let metrics = listeners[1].local_addr().unwrap();
        let app = listen(Arc::new(App)).await;
        let word = PodWord::Serve { place: PLACE, pod: Box::new(pod(app.port(), tracing)), ports: ports.into() };
        let fds: Vec<_> = listeners.iter().map(|listener| listener.as_fd()).collect();
        node.agent.channel.send(&FromAgent::Pod(word), &fds).await.unwrap();
        node.agent.channel.send(&FromAgent::Pod(PodWord::Synced), &[]).await.unwrap();
        let world = Self { node, ingress, metrics, _rules: folder };
        // The pod is told of over one channel, rules come from files: nobody says when both are there. The pod traces no probe.
        let probe = [("host", "shop.example".to_owned()), ("k-network-probe", "queue".to_owned())];
        harness::soon("the way to the pod", async {
            while http::call(world.ingress, "GET", "/", &probe, b"").await.status != 200 {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
        world
    }

    async fn ask(&self, more: &[(&str, String)]) -> Value {
        let mut headers = vec![("host", "shop.example".to_owned())];
        headers.extend(more.iter().cloned());
        harness::soon("an answer", http::call(self.ingress, "GET", "/a", &headers, b"")).await.json()
    }
}

fn one(spans: &[Seen], service: &str, name: &str, kind: i32) -> Seen {
    let of = |span: &&Seen| span.service == service && span.name == name && span.kind == kind;
    let found: Vec<&Seen> = spans.iter().filter(of).collect();
    assert_eq!(found.len(), 1, "{service} {name} {kind} in {spans:#?}");
    found[0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_through_ingress_and_pod_to_the_app() {
    let collector = Arc::new(Collector::default());
    let world = World::new(Some(listen(Arc::clone(&collector)).await), Tracing::default()).await;
    let told = [("traceparent", format!("00-{TRACE}-{PARENT}-01")), ("tracestate", "v=1".to_owned())];
    let saw = world.ask(&told).await;
    let answer = http::call(world.metrics, "GET", "/metrics", &[], b"").await.text();
    // Drained: all that was seen has been sent.
    world.node.drained().await;
    // The probes that looked for the way to the pod are requests too, each with a trace of its own and one span at the ingress.
    let (spans, others): (Vec<_>, Vec<_>) =
        collector.0.lock().unwrap().clone().into_iter().partition(|span| span.trace == TRACE);
    assert_eq!(spans.len(), 5, "{spans:#?}");
    assert!(others.iter().all(|span| span.service == "lifl-gateway"), "{others:#?}");
    let ingress = one(&spans, "lifl-gateway", "GET", 2);
    let (server, client) = (one(&spans, "shop", "GET", 2), one(&spans, "shop", "GET", 3));
    let proxy = one(&spans, "shop", "kn.queueproxy.proxy", 1);
    let wait = one(&spans, "shop", "kn.queueproxy.wait", 1);
    assert_eq!(ingress.parent, PARENT);
    assert_eq!(server.parent, ingress.id);
    assert_eq!(proxy.parent, server.id);
    assert_eq!((wait.parent, client.parent), (proxy.id.clone(), proxy.id));
    assert_eq!(saw["parent"], format!("00-{TRACE}-{}-01", client.id));
    assert_eq!(saw["state"], "v=1");

    let count = answer.lines().find(|line| line.starts_with("http_server_request_duration_seconds_count{"));
    let count = count.unwrap_or_else(|| panic!("no count in {answer}"));
    assert!(count.contains("server_address=\"127.0.0.1\",server_port=\"8012\"") && count.ends_with("} 1"), "{count}");
    assert!(answer.contains("kn_revision_name=\"shop-blue\""), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_may_have_a_collector_of_its_own() {
    let collector = Arc::new(Collector::default());
    let at = listen(Arc::clone(&collector)).await;
    let endpoint = format!("http://{at}/v1/traces");
    let world = World::new(None, Tracing { protocol: "http/protobuf".into(), endpoint, sampling_rate: 1.0 }).await;
    let saw = world.ask(&[]).await;
    let all = || collector.0.lock().unwrap().len() >= 4;
    harness::soon("the spans", async {
        while !all() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    let spans = collector.0.lock().unwrap().clone();
    let client = one(&spans, "shop", "GET", 3);
    assert_eq!(one(&spans, "shop", "GET", 2).parent, "", "the pod is where the trace begins");
    assert_eq!(saw["parent"], format!("00-{}-{}-01", client.trace, client.id));
    world.node.drained().await;
}
