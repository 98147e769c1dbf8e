//! The user's probes as queue-proxy runs them: several, gRPC, and those that only the kubelet can run.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use lifl_proxy::{Body, Handle, Limits, Peer, Server, queue::Settings};
use tokio::net::TcpListener;

use crate::rig::{Aborts, Served, endpoint, probe, settings};

const PROBE: &str = "GET / HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1\r\nK-Network-Probe: queue\r\n\r\n";

/// `grpc.health.v1.Health`, with this answer.
struct Health {
    /// Of the message: 1 is SERVING.
    status: u8,
    /// `grpc-status`.
    code: &'static str,
}

impl Handle for Health {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
        assert_eq!((request.version(), request.method().as_str()), (http::Version::HTTP_2, "POST"));
        assert_eq!(request.headers()["content-type"], "application/grpc");
        let asked = request.into_body().collect().await.expect("a body").to_bytes();
        assert_eq!(asked, [&[0, 0, 0, 0, 5, 0x0a, 3][..], b"abc"].concat(), "the service that was named");
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", self.code.parse().expect("a value"));
        let message = Full::new(Bytes::from(vec![0, 0, 0, 0, 2, 0x08, self.status]));
        let body = message.map_err(|never| match never {}).with_trailers(async move { Some(Ok(trailers)) });
        Response::new(Body::boxed(body.boxed_unsync()))
    }
}

/// An app of both protocols that takes up an offer of h2c; it writes down what it is asked.
#[derive(Default)]
struct Both(Mutex<Vec<String>>);

impl Handle for Both {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        assert_eq!(request.uri().path(), "/up");
        self.0.lock().expect("unharmed").push(format!("{} {:?}", request.method(), request.version()));
        Response::new(Body::empty())
    }
}

#[tokio::test]
async fn knative_a_grpc_probe_asks_the_health_service() {
    for (status, code, expected) in [(1, "0", "200"), (2, "0", "503"), (0, "0", "503"), (1, "12", "503")] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let server = Server::new(Arc::new(Health { status, code }), Limits::default());
        let _health = Aborts::new(async move { server.listen(&listener).await });
        let readiness = probe(r#"{"grpc":{"port":0,"service":"abc"},"periodSeconds":1,"timeoutSeconds":5}"#);
        let served = Served::new(addr, Settings { readiness, ..settings() }).await;
        assert_eq!(served.ask(PROBE).await.status(), expected, "{status} {code}");
    }
}

#[tokio::test]
async fn knative_all_probes_of_a_list_must_pass() {
    let (addr, _task) = endpoint(|_, mut wire| async move {
        loop {
            let asked = wire.head().await;
            let status = if asked.first.contains("/bad") { 500 } else { 200 };
            wire.write(&format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n")).await;
        }
    })
    .await;
    let get = |path: &str| format!(r#"{{"httpGet":{{"path":"{path}"}},"periodSeconds":1,"timeoutSeconds":5}}"#);
    for (paths, expected) in [(["/a", "/b"], "200"), (["/a", "/bad"], "503"), (["/bad", "/b"], "503")] {
        let readiness = probe(&format!("[{},{}]", get(paths[0]), get(paths[1])));
        let served = Served::new(addr, Settings { readiness, ..settings() }).await;
        assert_eq!(served.ask(PROBE).await.status(), expected, "{paths:?}");
    }
}

/// What is to be executed is the kubelet's; here the port is looked at.
#[tokio::test]
async fn knative_of_an_exec_probe_the_port_is_asked() {
    let (addr, task) = endpoint(|_, mut wire| async move { drop(wire.rest().await) }).await;
    let readiness = || probe(r#"{"exec":{"command":["false"]},"periodSeconds":1,"timeoutSeconds":5}"#);
    let served = Served::new(addr, Settings { readiness: readiness(), ..settings() }).await;
    assert_eq!(served.ask(PROBE).await.status(), "200");
    drop(task);
    crate::rig::eventually("the listener is gone", || std::net::TcpStream::connect(addr).is_err()).await;
    assert_eq!(served.ask(PROBE).await.status(), "503");
}

/// Detection is Knative's `autodetect-http2`: whoever takes up an offered upgrade is probed in h2c from then on.
#[tokio::test]
async fn knative_a_port_that_takes_up_h2c_is_probed_in_it() {
    for (detect, expected) in [(true, "GET HTTP/2.0"), (false, "GET HTTP/1.1")] {
        let both = Arc::new(Both::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let server = Server::new(Arc::clone(&both), Limits::default());
        let _app = Aborts::new(async move { server.listen(&listener).await });
        let served = Served::new(addr, detecting(detect)).await;
        for _ in 0..2 {
            assert_eq!(served.ask(PROBE).await.status(), "200");
        }
        let mut seen = both.0.lock().expect("unharmed").clone();
        // The question itself may become the first request of the new protocol.
        seen.retain(|line| !line.starts_with("OPTIONS"));
        assert_eq!(seen, [expected; 2], "detects: {detect}");
    }
}

#[tokio::test]
async fn knative_a_port_is_asked_once_whether_it_speaks_h2c() {
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let lines = Arc::clone(&seen);
    let (addr, _task) = endpoint(move |_, mut wire| {
        let lines = Arc::clone(&lines);
        async move {
            loop {
                let asked = wire.head().await;
                let offered = asked.header("upgrade").to_owned();
                lines.lock().expect("unharmed").push(format!("{} {offered}", asked.first));
                wire.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
            }
        }
    })
    .await;
    let served = Served::new(addr, detecting(true)).await;
    for _ in 0..2 {
        assert_eq!(served.ask(PROBE).await.status(), "200");
    }
    let seen = seen.lock().expect("unharmed").clone();
    assert_eq!(seen, ["OPTIONS /up HTTP/1.1 h2c", "GET /up HTTP/1.1 ", "GET /up HTTP/1.1 "]);
}

fn detecting(http2_auto_detect: bool) -> Settings {
    let readiness = probe(r#"{"httpGet":{"path":"/up","port":0},"periodSeconds":1,"timeoutSeconds":5}"#);
    Settings { readiness, http2_auto_detect, ..settings() }
}
