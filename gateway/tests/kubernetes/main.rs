//! The gateway's process as a cluster sees it: rules from an API server, statuses back to it, over deaths of either.
#![expect(clippy::unwrap_used, reason = "a test ends where its surroundings fail")]

mod api;
#[path = "../harness/mod.rs"]
mod harness;

use std::{
    net::{SocketAddr, TcpListener},
    os::fd::AsFd,
    sync::Arc,
    time::Duration,
};

use ::http::{Request, Response, StatusCode};
use api::{Api, KINGS, SECRETS, SERVICES, SLICES};
use harness::{Node, http, soon};
use lifl_api::{
    node::FromAgent,
    pod::{NodePod, PodPort, PodSettings, PodWord},
};
use lifl_proxy::{Body, Handle, Limits, Peer, Server, reply};
use rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Notify,
};
use tokio_rustls::client::TlsStream;

const SHOP: &str = "golden/shop";

/// A pod behind a service that knows nothing of Knative: tells its name. `/slow` waits for a word.
struct App(&'static str, Arc<Notify>);

impl Handle for App {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        match request.uri().path() {
            "/" => {}
            "/slow" => self.1.notified().await,
            _ => return reply::empty(StatusCode::NOT_FOUND),
        }
        reply::plain(StatusCode::OK, self.0)
    }
}

/// An API server, and a gateway before it.
struct World {
    api: Api,
    node: Node,
    /// `ingress-http`, `ingress-https`, `ingress-local-http`.
    at: [SocketAddr; 3],
    _folder: tempfile::TempDir,
}

impl World {
    async fn new(change: impl FnOnce(&Api, &mut Value)) -> Self {
        let api = Api::start().await;
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = folder.path().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig);
        let names = ["ingress-http", "ingress-https", "ingress-local-http"];
        let listeners = names.map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let at = std::array::from_fn(|index| listeners[index].local_addr().unwrap());
        for (service, port) in [("lifl-gateway", at[0].port()), ("lifl-gateway-local", at[2].port())] {
            let gateway = json!({"addresses": ["127.0.0.1"], "nodeName": "here", "targetRef": {"kind": "Pod", "name": "gateway-1"}});
            api.put(SLICES, slice("lifl-system", service, port, &json!([gateway])));
        }
        let mut config = json!({
            "ingress": {"kubernetes": {"kubeconfig": kubeconfig, "pod": "gateway-1"}, "lame_duck_ms": 0},
        });
        change(&api, &mut config);
        let deposits = names.into_iter().zip(listeners).map(|(name, listener)| (name, listener.into())).collect();
        Self { node: Node::start_with(config, deposits).await, api, at, _folder: folder }
    }

    async fn ask(&self, host: &str) -> http::Answer {
        ask(self.at[0], host, "/").await
    }
}

async fn ask(at: SocketAddr, host: &str, path: &str) -> http::Answer {
    http::call(at, "GET", path, &[("host", host.to_owned())], b"").await
}

async fn app(name: &'static str) -> (u16, Arc<Notify>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let word = Arc::new(Notify::new());
    let app = Arc::new(App(name, Arc::clone(&word)));
    tokio::spawn(async move { Server::new(app, Limits::default()).listen(&listener).await });
    (port, word)
}

fn slice(namespace: &str, service: &str, port: u16, endpoints: &Value) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": namespace, "name": format!("{service}-1"),
                     "labels": {"kubernetes.io/service-name": service}},
        "ports": [{"name": "http", "port": port}], "endpoints": endpoints,
    })
}

fn service(api: &Api, name: &str) {
    api.put(
        SERVICES,
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "golden", "name": name},
        "spec": {"ports": [{"name": "http", "port": 80, "targetPort": 8012}]}}),
    );
}

fn king(service: &str, more: impl FnOnce(&mut Value)) -> Value {
    let rule = |host: &str, visibility: &str| {
        json!({"hosts": [host], "visibility": visibility, "http": {"paths": [{"splits": [
            {"serviceNamespace": "golden", "serviceName": service, "servicePort": 80, "percent": 100}]}]}})
    };
    let mut king = json!({
        "apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress",
        "metadata": {"namespace": "golden", "name": "shop",
            "annotations": {"networking.knative.dev/ingress.class": "lifl.ingress.networking.knative.dev"}},
        "spec": {"httpOption": "Enabled", "rules": [
            rule("shop.golden.svc.cluster.local", "ClusterLocal"), rule("shop.example.com", "ExternalIP")]},
    });
    more(&mut king);
    king
}

fn is_ready(status: &Value, generation: u64) -> bool {
    let says = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    status["observedGeneration"] == generation
        && status["conditions"].as_array().is_some_and(|all| all.iter().any(says))
}

fn message(status: &Value) -> &str {
    let all = status["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    all.iter()
        .find(|condition| condition["type"] == "Ready")
        .and_then(|ready| ready["message"].as_str())
        .unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_are_followed_and_statuses_written() {
    let world = World::new(|_, _| {}).await;
    let api = &world.api;
    api.put(KINGS, king("blue", |_| {}));
    api.until_status(SHOP, |status| message(status).ends_with(": there is no Service 'golden/blue'")).await;
    service(api, "blue");
    api.until_status(SHOP, |status| message(status).ends_with(": 'golden/blue:80' has no ready address")).await;
    let (blue, _) = app("blue").await;
    api.put(SLICES, slice("golden", "blue", blue, &json!([{"addresses": ["127.0.0.1"]}])));
    let mut status = api.until_status(SHOP, |status| is_ready(status, 1)).await;
    for condition in status["conditions"].as_array_mut().unwrap() {
        assert!(condition["lastTransitionTime"].take().is_string());
    }
    assert_eq!(
        status,
        json!({
            "observedGeneration": 1,
            "conditions": [
                {"type": "LoadBalancerReady", "status": "True", "lastTransitionTime": null},
                {"type": "NetworkConfigured", "status": "True", "lastTransitionTime": null},
                {"type": "Ready", "status": "True", "lastTransitionTime": null},
            ],
            "publicLoadBalancer": {"ingress": [{"domainInternal": "lifl-gateway.lifl-system.svc.cluster.local"}]},
            "privateLoadBalancer": {"ingress": [{"domainInternal": "lifl-gateway-local.lifl-system.svc.cluster.local"}]},
        })
    );
    assert_eq!(world.ask("shop.example.com").await.text(), "blue");
    assert_eq!(ask(world.at[2], "shop.golden", "/").await.text(), "blue");
    assert_eq!(world.ask("shop.golden").await.status, 404, "what is inside is not outside");

    let (green, _) = app("green").await;
    service(api, "green");
    api.put(SLICES, slice("golden", "green", green, &json!([{"addresses": ["127.0.0.1"]}])));
    api.put(KINGS, king("green", |_| {}));
    api.until_status(SHOP, |status| is_ready(status, 2)).await;
    assert_eq!(world.ask("shop.example.com").await.text(), "green");

    // An object that changes without saying anything new is written about no more.
    let before = api.asked("PUT");
    let mut same = king("green", |_| {});
    same["metadata"]["labels"] = json!({"of": "no interest"});
    api.put(KINGS, same);
    // Another one is, and by then the first would have been.
    api.put(
        KINGS,
        king("green", |king| {
            king["metadata"]["name"] = "second".into();
            king["spec"]["rules"] = json!([]);
        }),
    );
    api.until_status("golden/second", |status| is_ready(status, 1) || !message(status).is_empty()).await;
    let of_shop = api
        .asked(&format!("PUT {}", "/apis/networking.internal.knative.dev/v1alpha1/namespaces/golden/ingresses/shop/"));
    assert_eq!(of_shop, before, "the status of 'shop' is written again");

    api.delete(KINGS, SHOP);
    soon("the end of the rule", async {
        while world.ask("shop.example.com").await.status != 404 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    world.node.drained().await;
}

/// Nothing changes in the cluster meanwhile that would have the gateway look again.
#[tokio::test(flavor = "multi_thread")]
async fn a_status_that_is_not_written_is_written_later() {
    let world = World::new(|api, _| {
        for name in ["shop", "second"] {
            api.put(
                KINGS,
                king("blue", |king| {
                    king["metadata"]["name"] = name.into();
                    king["spec"]["rules"] = json!([]);
                }),
            );
        }
        // The first is done with that, before the second has failed.
        api.refuse_status(SHOP, 409);
        api.refuse_status("golden/second", 500);
    })
    .await;
    world.api.until_status("golden/second", |status| !status["conditions"].is_null()).await;
    let put =
        |name: &str| format!("PUT /apis/networking.internal.knative.dev/v1alpha1/namespaces/golden/ingresses/{name}/");
    assert_eq!((world.api.asked(&put("shop")), world.api.asked(&put("second"))), (1, 2));
    world.node.drained().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_lost_leaves_the_last_rules() {
    let world = World::new(|_, _| {}).await;
    let api = world.api.clone();
    let (blue, _) = app("blue").await;
    service(&api, "blue");
    api.put(SLICES, slice("golden", "blue", blue, &json!([{"addresses": ["127.0.0.1"]}])));
    api.put(KINGS, king("blue", |_| {}));
    api.until_status(SHOP, |status| is_ready(status, 1)).await;
    api.leave().await;
    for _ in 0..20 {
        assert_eq!(world.ask("shop.example.com").await.text(), "blue");
    }
    // A gateway that is started meanwhile knows no rules: whoever comes waits until it does, and is not told that there is
    // nothing.
    let at = world.at[0];
    let dead = world.node.kill().await;
    let mut waiting = TcpStream::connect(at).await.unwrap();
    let head = http::head("GET", "/", &[("host", "shop.example.com".to_owned())], None);
    waiting.write_all(&head).await.unwrap();
    let node = dead.revive(&[]).await;
    let mut first = [0];
    let early = tokio::time::timeout(Duration::from_millis(300), waiting.peek(&mut first)).await;
    assert!(early.is_err(), "an answer without rules");
    api.come_back().await;
    assert_eq!(http::answer(&mut waiting, "GET").await.text(), "blue");
    node.drained().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_without_knative_is_served_and_knative_may_come_later() {
    let world = World::new(|api, _| api.without_knative(true)).await;
    // Accepts, so it is in service.
    assert_eq!(world.ask("shop.example.com").await.status, 404);
    let (blue, _) = app("blue").await;
    service(&world.api, "blue");
    world.api.put(SLICES, slice("golden", "blue", blue, &json!([{"addresses": ["127.0.0.1"]}])));
    world.api.put(KINGS, king("blue", |_| {}));
    world.api.without_knative(false);
    world.api.until_status(SHOP, |status| is_ready(status, 1)).await;
    assert_eq!(world.ask("shop.example.com").await.text(), "blue");
    world.node.drained().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_is_answered_when_the_gateway_ends() {
    let world = World::new(|_, config| config["ingress"]["lame_duck_ms"] = 500.into()).await;
    let (blue, word) = app("blue").await;
    service(&world.api, "blue");
    world.api.put(SLICES, slice("golden", "blue", blue, &json!([{"addresses": ["127.0.0.1"]}])));
    world.api.put(KINGS, king("blue", |_| {}));
    world.api.until_status(SHOP, |status| is_ready(status, 1)).await;
    let at = world.at[0];
    let slow = tokio::spawn(async move { ask(at, "shop.example.com", "/slow").await });
    world.node.supervisor.drain().await.unwrap();
    // Who has yet to hear of it is served: a lame duck swims.
    assert_eq!(world.ask("shop.example.com").await.text(), "blue");
    let ended = tokio::spawn(world.node.drained());
    soon("the last word", async {
        while !slow.is_finished() {
            word.notify_waiters();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(slow.await.unwrap().text(), "blue");
    soon("the end", ended).await.unwrap();
}

fn certificate(secret: &str, host: &str) -> (Value, Vec<u8>) {
    use base64::Engine as _;
    let made = rcgen::generate_simple_self_signed([host.to_owned()]).unwrap();
    let encode = |text: String| base64::prelude::BASE64_STANDARD.encode(text);
    let data = json!({"tls.crt": encode(made.cert.pem()), "tls.key": encode(made.signing_key.serialize_pem())});
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"namespace": "golden", "name": secret}, "data": data});
    (secret, made.cert.der().to_vec())
}

/// A connection that trusts one certificate, if there is one to be had.
async fn over_tls(at: SocketAddr, trusted: &[u8]) -> Option<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.to_vec().into()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config.with_no_client_auth()));
    let stream = TcpStream::connect(at).await.unwrap();
    connector.connect(ServerName::try_from("shop.example.com").unwrap(), stream).await.ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_read_by_name_and_swapped() {
    let world = World::new(|_, _| {}).await;
    let api = &world.api;
    let (blue, _) = app("blue").await;
    service(api, "blue");
    api.put(SLICES, slice("golden", "blue", blue, &json!([{"addresses": ["127.0.0.1"]}])));
    let tls = json!([{"hosts": ["shop.example.com"], "secretName": "cert"}]);
    api.put(KINGS, king("blue", |king| king["spec"]["tls"] = tls));
    api.until_status(SHOP, |status| message(status) == "secret 'golden/cert': it is not there").await;
    let (secret, first) = certificate("cert", "shop.example.com");
    api.put(SECRETS, secret);
    api.until_status(SHOP, |status| is_ready(status, 1)).await;
    assert!(over_tls(world.at[1], &first).await.is_some());
    let (secret, second) = certificate("cert", "shop.example.com");
    api.put(SECRETS, secret);
    soon("the second certificate", async {
        while over_tls(world.at[1], &second).await.is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(over_tls(world.at[1], &first).await.is_none());
    assert_eq!(api.asked("GET /api/v1/secrets"), 0, "secrets are never listed or watched");
    assert!(api.asked("GET /api/v1/namespaces/golden/secrets/cert") > 1);
    world.node.drained().await;
}

/// What is queue-proxy's port 8112: between ingress or activator and the pod.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_served_over_tls_with_the_secret_of_its_namespace() {
    let world = World::new(|_, _| {}).await;
    // Its ingress is in force, so there is a way to the API server.
    assert_eq!(world.ask("shop.example.com").await.status, 404);
    let (user, _) = app("blue").await;
    let ports = [PodPort::Serving, PodPort::ServingTls, PodPort::Admin, PodPort::Stats];
    let listeners = ports.map(|_| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    });
    let at = listeners[1].local_addr().unwrap();
    let settings: PodSettings = serde_json::from_value(json!({
        "schema": PodSettings::schema(), "namespace": "golden", "configuration": "shop", "revision": "shop-blue",
        "servingPort": 8012, "protocol": "http1", "userPort": user, "containerConcurrency": 0,
        "timeouts": {"request": 300}, "tls": {"port": 8112, "secret": "serving-certs", "minVersion": "1.3"},
    }))
    .unwrap();
    let pod = NodePod {
        uid: "u1".into(),
        namespace: "golden".into(),
        name: "shop-blue-1".into(),
        address: "127.0.0.1".parse().unwrap(),
        draining: false,
        settings,
    };
    let word = PodWord::Serve { place: 7, pod: Box::new(pod), ports: ports.into() };
    let fds: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
    world.node.agent.channel.send(&FromAgent::Pod(word), &fds).await.unwrap();
    let (secret, trusted) = certificate("serving-certs", "shop.example.com");
    assert!(over_tls(at, &trusted).await.is_none(), "a handshake without a certificate");
    world.api.put(SECRETS, secret);
    let mut stream = soon("the certificate", async {
        loop {
            match over_tls(at, &trusted).await {
                Some(stream) => return stream,
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    })
    .await;
    let head = "GET / HTTP/1.1\r\nhost: shop.example.com\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut text = String::new();
    soon("an answer", stream.read_to_string(&mut text)).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK") && text.ends_with("blue"), "{text}");
    world.node.drained().await;
}
