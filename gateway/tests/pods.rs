//! Pods without queue-proxy: the gateway serves listeners that the agent hands it, over its own death.
#![expect(clippy::unwrap_used, reason = "a test ends where its surroundings fail")]

mod harness;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    sync::Arc,
};

use harness::{Node, PATIENCE, http, path, tensors};
use http_body_util::BodyExt as _;
use lifl_api::{
    node::{FromAgent, FromGateway, ToAgent},
    pod::{
        Exporter, Logging, NodePod, PodAsk, PodPort, PodSettings, PodWord, Protocol, RequestLog, RevisionTimeouts,
        Tracing,
    },
};
use lifl_proxy::{Body, Handle, Limits, Peer, Server};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Semaphore,
};

const PLACE: u64 = 77;
const PORTS: [PodPort; 3] = [PodPort::Serving, PodPort::Admin, PodPort::Stats];

/// A user's container: tells what it was asked. `/slow` waits for a word.
struct App(Arc<Words>);

struct Words {
    slow: Semaphore,
    go: Semaphore,
}

impl Handle for App {
    async fn handle(&self, request: ::http::Request<Body>, _: &Peer) -> ::http::Response<Body> {
        let (head, body) = request.into_parts();
        if head.uri.path() == "/slow" {
            self.0.slow.add_permits(1);
            self.0.go.acquire().await.unwrap().forget();
        }
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
    /// Words for slow requests.
    words: Arc<Words>,
}

impl World {
    async fn new() -> Self {
        let app = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = app.local_addr().unwrap().port();
        let words = Arc::new(Words { slow: Semaphore::new(0), go: Semaphore::new(0) });
        let container = Arc::new(App(Arc::clone(&words)));
        tokio::spawn(async move { Server::new(container, Limits::default()).listen(&app).await });
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
        Self { pod, listeners: listeners.into(), words }
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

/// As an activator keeps them.
async fn kept(at: SocketAddr, path: &str) -> tokio::net::TcpStream {
    let mut stream = tokio::net::TcpStream::connect(at).await.unwrap();
    stream.write_all(&http::head("GET", path, &[], None)).await.unwrap();
    stream
}

async fn is_closed(stream: &mut tokio::net::TcpStream) {
    let mut rest = Vec::new();
    assert_eq!(harness::soon("the end of a connection", stream.read_to_end(&mut rest)).await.unwrap(), 0);
}

/// Two gateways each count a pod's requests for themselves: whoever keeps a connection to the old one is to go to the new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_superseded_sends_kept_connections_away_and_may_come_back() {
    // Long enough for a request to come after the word.
    let config = json!({"ingress": {"lame_duck_ms": 2_000}});
    let (node, world) = (Node::start(config).await, World::new().await);
    let at = world.at(PodPort::Serving);
    for turn in 0..2 {
        world.tell(&node).await;
        let mut idle = [kept(at, "/idle").await, kept(at, "/idle").await];
        for idle in &mut idle {
            let answer = http::answer(idle, "GET").await;
            assert_eq!((answer.status, answer.header("connection")), (200, None), "{turn}");
        }
        let mut busy = kept(at, "/slow").await;
        harness::soon("the slow request", world.words.slow.acquire()).await.unwrap().forget();
        node.agent.channel.send(&FromAgent::Superseded, &[]).await.unwrap();
        // What comes before the word and what comes after it is answered; with the first answer after it the client is told.
        loop {
            idle[0].write_all(&http::head("GET", "/late", &[], None)).await.unwrap();
            let answer = http::answer(&mut idle[0], "GET").await;
            assert_eq!(answer.status, 200, "{turn}");
            if answer.header("connection") == Some("close") {
                break;
            }
        }
        world.words.go.add_permits(1);
        let answer = http::answer(&mut busy, "GET").await;
        assert_eq!((answer.status, answer.header("connection")), (200, Some("close")), "{turn}");
        is_closed(&mut busy).await;
        is_closed(&mut idle[0]).await;
        is_closed(&mut idle[1]).await;
    }
    // Who has connected meanwhile waits for whoever accepts.
    let mut waiting = kept(at, "/waiting").await;
    world.tell(&node).await;
    assert_eq!(http::answer(&mut waiting, "GET").await.json()["path"], "/waiting");
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

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_another_pod_is_told_all_pods_and_finds_no_chain() {
    let (mut node, world) = (Node::start(json!({})).await, World::new().await);
    world.tell(&node).await;
    node.job(|_| {}, &tensors::model([0.0; 5]), None).await;
    assert_eq!(world.ask(PodPort::Serving, "/before", &[]).await.status, 200);
    assert_eq!(http::get(node.address, &path(""), None).await.status, 200);
    let chain_is_kept = |node: &Node| node.store.lock().unwrap().keys().any(|key| key.starts_with("ledger/"));
    assert!(chain_is_kept(&node));

    // Started again in the same pod: the chains are its, too.
    let same = node.supervisor.peer("agent").await.unwrap();
    let mut held = Vec::new();
    harness::soon("what it holds", async {
        loop {
            match same.recv::<ToAgent>().await.unwrap().unwrap() {
                (ToAgent::Holds { pod, ports }, fds) => held.push((*pod, ports, fds)),
                (ToAgent::HoldsAll, _) => return,
                _ => {}
            }
        }
    })
    .await;
    assert_eq!(held.len(), 1);
    let (pod, ports, fds) = &held[0];
    assert_eq!((pod, &ports[..], fds.len()), (&world.pod, &PORTS[..], PORTS.len()));
    let address = |fd: &std::os::fd::OwnedFd| TcpListener::from(fd.try_clone().unwrap()).local_addr().unwrap();
    assert_eq!(fds.iter().map(address).collect::<Vec<_>>(), PORTS.map(|port| world.at(port)));
    assert_eq!(http::get(node.address, &path(""), None).await.status, 200);

    node.another_agent(1).await;
    node.coordinator = node.supervisor.peer("coordinator").await.unwrap();
    let chains = |word: &FromGateway| match word {
        FromGateway::Hello { chains, .. } => Some(chains.len()),
        _ => None,
    };
    assert_eq!(node.hear("Hello", chains).await.0, 0, "the coordinator finds none");
    assert_eq!(http::get(node.address, &path(""), None).await.status, 404);
    harness::soon("the end of the deposits", async {
        while chain_is_kept(&node) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // It is the job's coordinator that begins it anew.
    node.job(|_| {}, &tensors::model([0.0; 5]), None).await;
    assert_eq!(http::get(node.address, &path(""), None).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_find_no_agent_wait_for_the_next_one() {
    const EACH: usize = 40;
    let (mut node, mut world) = (Node::start(json!({})).await, World::new().await);
    // Nothing of the pod's own keeps requests from coming all at once.
    world.pod.settings.container_concurrency = 0;
    let world = Arc::new(world);
    world.tell(&node).await;
    assert_eq!(world.ask(PodPort::Serving, "/first", &[]).await.status, 200);
    // An agent that is asked, and dies before it has answered.
    let dying = node.supervisor.peer("agent").await.unwrap();
    let call = |path: String| {
        let world = Arc::clone(&world);
        tokio::spawn(async move { world.ask(PodPort::Serving, &path, &[]).await })
    };
    let before: Vec<_> = (0..EACH).map(|number| call(format!("/before/{number}"))).collect();
    let mut asked = 0;
    harness::soon("questions for as many sockets", async {
        while asked < EACH {
            if let Some((ToAgent::Pod(PodAsk::Sockets { place: PLACE, count }), _)) = dying.recv().await.unwrap() {
                asked += count as usize;
            }
        }
    })
    .await;
    drop(dying);
    let after: Vec<_> = (0..EACH).map(|number| call(format!("/after/{number}"))).collect();
    node.another_agent(0).await;
    for (answer, path) in before
        .into_iter()
        .chain(after)
        .zip(["before", "after"].into_iter().flat_map(|path| (0..EACH).map(move |number| format!("/{path}/{number}"))))
    {
        let answer = answer.await.unwrap();
        assert_eq!((answer.status, &answer.json()["path"]), (200, &json!(path)), "{}", answer.text());
    }
    // What a burst of calls leaves behind is bounded by it.
    let given = node.agent.sockets.load(std::sync::atomic::Ordering::Relaxed) as usize;
    assert!((1..=5 * EACH).contains(&given), "{given}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_hardly_called_is_given_a_few_sockets() {
    let (node, world) = (Node::start(json!({})).await, World::new().await);
    world.tell(&node).await;
    let given = || node.agent.sockets.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(given(), 0, "nobody has called");
    assert_eq!(world.ask(PodPort::Serving, "/", &[]).await.status, 200);
    assert_eq!(given(), 1);
    for _ in 0..20 {
        assert_eq!(world.ask(PodPort::Serving, "/", &[]).await.status, 200);
    }
    assert!(given() <= 8, "{}: connections are used again", given());
}
