//! Pods without queue-proxy: the gateway serves listeners that the agent hands it, over its own death.
#![expect(clippy::unwrap_used, reason = "a test ends where its surroundings fail")]

mod harness;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    sync::Arc,
};

use harness::{Node, PATIENCE, http};
use http_body_util::BodyExt as _;
use lifl_api::{
    node::FromAgent,
    pod::{Exporter, Logging, NodePod, PodPort, PodSettings, PodWord, Protocol, RequestLog, RevisionTimeouts, Tracing},
};
use lifl_proxy::{Body, Handle, Limits, Peer, Server};
use serde_json::json;

const PLACE: u64 = 77;
const PORTS: [PodPort; 3] = [PodPort::Serving, PodPort::Admin, PodPort::Stats];

/// A user's container: tells what it was asked.
struct App;

impl Handle for App {
    async fn handle(&self, request: ::http::Request<Body>, _: &Peer) -> ::http::Response<Body> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let host = head.headers["host"].to_str().unwrap().to_owned();
        let told = json!({"path": head.uri.path(), "host": host, "body": String::from_utf8_lossy(&body)});
        ::http::Response::new(bytes::Bytes::from(told.to_string()).into())
    }
}

/// The app, and its pod's listeners as the agent keeps them.
struct World {
    pod: NodePod,
    listeners: Vec<TcpListener>,
}

impl World {
    async fn new() -> Self {
        let app = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = app.local_addr().unwrap().port();
        tokio::spawn(async move { Server::new(Arc::new(App), Limits::default()).listen(&app).await });
        let listeners = PORTS.map(|_| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        });
        let pod = NodePod {
            uid: "u1".into(),
            namespace: "golden".into(),
            name: "shop-blue-1".into(),
            address: "127.0.0.1".parse().unwrap(),
            draining: false,
            settings: settings(port),
        };
        Self { pod, listeners: listeners.into() }
    }

    fn at(&self, port: PodPort) -> SocketAddr {
        let index = PORTS.iter().position(|p| *p == port).unwrap();
        self.listeners[index].local_addr().unwrap()
    }

    async fn tell(&self, node: &Node) {
        let fds: Vec<_> = self.listeners.iter().map(|l| l.as_fd()).collect();
        let word = PodWord::Serve { place: PLACE, pod: Box::new(self.pod.clone()), ports: PORTS.into() };
        node.agent.channel.send(&FromAgent::Pod(word), &fds).await.unwrap();
        node.agent.channel.send(&FromAgent::Pod(PodWord::Synced), &[]).await.unwrap();
    }

    async fn ask(&self, port: PodPort, path: &str, headers: &[(&str, String)]) -> http::Answer {
        harness::soon("an answer", http::call(self.at(port), "GET", path, headers, b"")).await
    }

    /// What the kubelet and the activator ask.
    async fn probe(&self) -> http::Answer {
        let headers = [("user-agent", "kube-probe/1.34".to_owned()), ("k-network-probe", "queue".to_owned())];
        self.ask(PodPort::Serving, "/", &headers).await
    }
}

fn settings(user_port: u16) -> PodSettings {
    PodSettings {
        schema: PodSettings::schema(),
        namespace: "golden".into(),
        service: "shop".into(),
        configuration: "shop".into(),
        revision: "shop-blue".into(),
        system_namespace: "knative-serving".into(),
        serving_port: 8012,
        protocol: Protocol::Http1,
        tls: None,
        user_port,
        container_concurrency: 2,
        timeouts: RevisionTimeouts { request: 300, response_start: 0, idle: 0 },
        readiness: serde_json::from_value(json!([{"tcpSocket": {"port": user_port}}])).unwrap(),
        http2_auto_detect: false,
        full_duplex: false,
        request_log: RequestLog::default(),
        request_metrics: Exporter::default(),
        metrics: Exporter::default(),
        tracing: Tracing::default(),
        logging: Logging::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_served_as_with_queue_proxy_and_drained_when_it_ends() {
    let (node, world) = (Node::start(json!({})).await, World::new().await);
    world.tell(&node).await;
    let probe = world.probe().await;
    assert_eq!((probe.status, probe.text().as_str()), (200, "queue"));
    let original = [("k-original-host", "shop.golden.example.com".to_owned())];
    let answer = world.ask(PodPort::Serving, "/a/b", &original).await;
    assert_eq!(answer.json(), json!({"path": "/a/b", "host": "shop.golden.example.com", "body": ""}));
    let stats = world.ask(PodPort::Stats, "/metrics", &[]).await;
    assert_eq!((stats.status, stats.header("content-type")), (200, Some("application/protobuf")));

    let ends = Box::new(NodePod { draining: true, ..world.pod.clone() });
    node.agent.channel.send(&FromAgent::Pod(PodWord::Changed { place: PLACE, pod: ends }), &[]).await.unwrap();
    harness::soon("the probe's failure", async { while world.probe().await.status != 503 {} }).await;
    assert_eq!(world.ask(PodPort::Serving, "/late", &[]).await.status, 200, "who comes late is served still");

    node.agent.channel.send(&FromAgent::Pod(PodWord::Gone { place: PLACE }), &[]).await.unwrap();
    world.listeners.iter().for_each(|l| rustix::net::shutdown(l, rustix::net::Shutdown::Both).unwrap());
    assert!(TcpStream::connect(world.at(PodPort::Serving)).is_err());
    node.drained().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_wait_while_a_gateway_is_started_again() {
    let (node, world) = (Node::start(json!({})).await, World::new().await);
    world.tell(&node).await;
    assert_eq!(world.ask(PodPort::Serving, "/before", &[]).await.status, 200);
    let dead = node.kill().await;
    // Nobody serves: the kernel accepts, the request waits.
    let mut waiting = TcpStream::connect(world.at(PodPort::Serving)).unwrap();
    waiting.set_read_timeout(Some(PATIENCE)).unwrap();
    waiting.write_all(b"GET /meanwhile HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let node = dead.revive(&[]).await;
    world.tell(&node).await;
    let answer = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        waiting.read_to_string(&mut text).map(|_| text)
    });
    let answer = harness::soon("the answer", answer).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("/meanwhile"), "{answer}");
}
