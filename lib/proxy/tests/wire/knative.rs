//! Rows of Knative's contract: who asks what of queue-proxy's ports, and every byte of the answer that others compare.

use std::sync::Arc;

use lifl_proxy::{
    Handle, Limits, Server,
    queue::{Admin, Figures, Settings},
};
use prost::Message as _;
use tokio::{net::TcpListener, time::Duration};

use crate::rig::{Aborts, Message, Served, Wire, answers, endpoint, eventually, probe, settings};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nuser";
const ACTIVATOR: &str = "User-Agent: Knative-Activator-Probe";
const AUTOSCALER: &str = "User-Agent: Knative-Autoscaling-Probe";
const KUBELET: &str = "User-Agent: kube-probe/1.34";
const TEXT: &str = "text/plain; charset=utf-8";
const NO_HASH: &str = "a probe request must contain a non-empty \"K-Network-Hash\" header\n";

/// In which state a row is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum In {
    Ready,
    Unready,
    Draining,
}

struct Row {
    state: In,
    path: &'static str,
    headers: &'static [&'static str],
    status: &'static str,
    /// `None`: no type, no body.
    body: Option<&'static str>,
    /// Go's `http.Error`.
    nosniff: bool,
}

const fn row(
    state: In,
    path: &'static str,
    headers: &'static [&'static str],
    status: &'static str,
    body: Option<&'static str>,
) -> Row {
    Row { state, path, headers, status, body, nosniff: false }
}

const fn error(
    state: In,
    path: &'static str,
    headers: &'static [&'static str],
    status: &'static str,
    body: &'static str,
) -> Row {
    Row { state, path, headers, status, body: Some(body), nosniff: true }
}

const ROWS: &[Row] = &[
    // As recorded in golden/answers/queue-answers.txt.
    row(In::Ready, "/healthz", &[ACTIVATOR, "K-Network-Probe: queue"], "200", Some("queue")),
    error(
        In::Ready,
        "/healthz",
        &[ACTIVATOR, "K-Network-Probe: activator"],
        "400",
        "unexpected probe header value: activator\n",
    ),
    row(In::Ready, "/", &[KUBELET, "K-Network-Probe: queue"], "200", Some("queue")),
    error(In::Ready, "/", &[KUBELET], "400", "unexpected probe header value: \n"),
    row(In::Ready, "/", &["K-Network-Probe: probe", "K-Network-Hash: abc"], "200", None),
    // The rest of the contract.
    row(In::Ready, "/any/path", &[AUTOSCALER, "K-Network-Probe: queue"], "200", Some("queue")),
    error(
        In::Ready,
        "/",
        &[AUTOSCALER, "K-Network-Probe: activator"],
        "400",
        "unexpected probe header value: activator\n",
    ),
    row(In::Ready, "/", &["K-Kubelet-Probe: queue", "K-Network-Probe: queue"], "200", Some("queue")),
    error(In::Ready, "/", &["K-Kubelet-Probe: x"], "400", "unexpected probe header value: \n"),
    error(In::Ready, "/", &["K-Network-Probe: probe"], "400", NO_HASH),
    error(In::Ready, "/", &["K-Network-Probe: probe", "K-Network-Hash:"], "400", NO_HASH),
    row(In::Unready, "/healthz", &[ACTIVATOR, "K-Network-Probe: queue"], "503", None),
    row(In::Unready, "/", &[KUBELET, "K-Network-Probe: queue"], "503", None),
    error(In::Unready, "/", &[KUBELET, "K-Network-Probe: other"], "400", "unexpected probe header value: other\n"),
    row(In::Unready, "/", &["K-Network-Probe: probe", "K-Network-Hash: abc"], "200", None),
    error(In::Draining, "/healthz", &[ACTIVATOR, "K-Network-Probe: queue"], "503", "shutting down\n"),
    error(In::Draining, "/", &[KUBELET, "K-Network-Probe: queue"], "503", "shutting down\n"),
    error(In::Draining, "/", &[AUTOSCALER, "K-Network-Probe: activator"], "503", "shutting down\n"),
    error(In::Draining, "/", &["K-Network-Probe: probe", "K-Network-Hash: abc"], "503", "shutting down\n"),
    error(In::Draining, "/", &["K-Network-Probe: probe"], "503", "shutting down\n"),
];

#[tokio::test]
async fn knative_probes_row_by_row() {
    let (addr, asked, _task) = answers(OK).await;
    for (number, row) in ROWS.iter().enumerate() {
        // A port that nobody listens to: the one of a listener that is gone.
        let never = probe(r#"{"tcpSocket":{"port":1},"periodSeconds":1}"#);
        let readiness = if row.state == In::Unready { never } else { probe("[]") };
        let served = Served::new(addr, Settings { readiness, ..settings() }).await;
        if row.state == In::Draining {
            served.queue.terminate();
        }
        let mut request = format!("GET {} HTTP/1.1\r\nHost: h\r\n", row.path);
        for header in row.headers {
            request.push_str(&format!("{header}\r\n"));
        }
        let answer = served.ask(&format!("{request}\r\n")).await;
        let body = row.body.unwrap_or_default();
        let expected = [
            ("status", row.status),
            ("body", body),
            ("type", if row.body.is_some() { TEXT } else { "" }),
            ("nosniff", if row.nosniff { "nosniff" } else { "" }),
            ("length", &body.len().to_string()),
            ("hash", if row.status == "200" && row.body.is_none() { "abc" } else { "" }),
        ];
        let found = [
            ("status", answer.status()),
            ("body", &answer.body),
            ("type", answer.header("content-type")),
            ("nosniff", answer.header("x-content-type-options")),
            ("length", answer.header("content-length")),
            ("hash", answer.header("k-network-hash")),
        ];
        assert_eq!(found, expected, "row {number}: {:?}", row.headers);
        assert!(answer.headers.contains_key("date"));
    }
    assert!(asked.lock().expect("no panic").is_empty(), "the container sees no probe");
}

#[tokio::test]
async fn knative_a_probe_from_anybody_else_is_the_users() {
    let (addr, asked, _task) = answers(OK).await;
    let served = Served::new(addr, settings()).await;
    for headers in ["K-Network-Probe: queue", "K-Network-Probe: activator", "User-Agent: curl/8", "K-Network-Hash: abc"]
    {
        assert_eq!(served.ask(&format!("GET / HTTP/1.1\r\nHost: h\r\n{headers}\r\n\r\n")).await.body, "user");
    }
    served.queue.terminate();
    let answer = served.ask("GET / HTTP/1.1\r\nHost: h\r\n\r\n").await;
    assert_eq!(answer.body, "user", "a draining pod goes on answering requests");
    assert_eq!(asked.lock().expect("no panic").len(), 5);
}

#[tokio::test]
async fn knative_the_users_probe_decides() {
    let rows = [("200", "200"), ("204", "200"), ("302", "200"), ("399", "200"), ("400", "503"), ("500", "503")];
    for (status, expected) in rows {
        let (addr, _task) = endpoint(move |_, mut wire| async move {
            loop {
                let asked = wire.head().await;
                assert_eq!((&*asked.first, asked.header("x-mine")), ("GET /ready HTTP/1.1", "1"));
                assert!(asked.header("user-agent").starts_with("kube-probe/"));
                wire.write(&format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n")).await;
            }
        })
        .await;
        let text = r#"{"httpGet":{"path":"/ready","port":0,"httpHeaders":[{"name":"x-mine","value":"1"}]},
            "periodSeconds":5,"timeoutSeconds":5}"#;
        let served = Served::new(addr, Settings { readiness: probe(text), ..settings() }).await;
        for _ in 0..2 {
            let answer =
                served.ask("GET / HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1\r\nK-Network-Probe: queue\r\n\r\n");
            assert_eq!(answer.await.status(), expected, "{status}");
        }
    }
}

#[tokio::test]
async fn knative_concurrency_and_ten_times_as_many_in_line() {
    let release = Arc::new(tokio::sync::Semaphore::new(0));
    let gate = Arc::clone(&release);
    let (addr, _task) = endpoint(move |_, mut wire| {
        let gate = Arc::clone(&gate);
        async move {
            loop {
                wire.head().await;
                gate.acquire().await.expect("open").forget();
                wire.write(OK).await;
            }
        }
    })
    .await;
    let served = Served::new(addr, Settings { concurrency: 2, ..settings() }).await;
    let mut clients = vec![];
    for number in 1..=22 {
        let mut client = served.client().await;
        client.write("GET / HTTP/1.1\r\nHost: h\r\n\r\n").await;
        eventually("the request is counted", || served.queue.depth() == number).await;
        clients.push(client);
    }
    assert_eq!(served.pool.connections(), 2, "no more than two at once");
    let refused = served.ask("GET / HTTP/1.1\r\nHost: h\r\n\r\n").await;
    assert_eq!((refused.status(), &*refused.body), ("503", "pending request queue full\n"));
    assert_eq!((refused.header("content-type"), refused.header("x-content-type-options")), (TEXT, "nosniff"));
    let probed = "GET / HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1\r\nK-Network-Probe: queue\r\n\r\n";
    assert_eq!(served.ask(probed).await.body, "queue", "probes do not stand in line");
    // Who goes away makes room.
    drop(clients.pop());
    eventually("a place in the line is free", || served.queue.depth() == 21).await;
    release.add_permits(21);
    for client in &mut clients {
        assert_eq!(client.message().await.body, "user");
    }
    eventually("all have gone", || served.queue.depth() == 0).await;
    assert_eq!(served.pool.connections(), 2);
}

async fn port<H: Handle>(handler: H) -> (std::net::SocketAddr, Aborts) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let server = Server::new(Arc::new(handler), Limits::default());
    (addr, Aborts::new(async move { server.listen(&listener).await }))
}

async fn get(addr: std::net::SocketAddr, path: &str) -> Message {
    let mut client = Wire::to(addr).await;
    client.write(&format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n")).await;
    client.message().await
}

pub(crate) async fn stat(figures: std::net::SocketAddr) -> lifl_proxy::stats::Stat {
    let mut client = Wire::to(figures).await;
    client.write("GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n").await;
    let head = client.head().await;
    assert_eq!((head.status(), head.header("content-type")), ("200", "application/protobuf"));
    let bytes = client.bytes(head.header("content-length").parse().expect("a length")).await;
    lifl_proxy::stats::Stat::decode(&*bytes).expect("a stat")
}

#[tokio::test]
async fn knative_port_9090_has_the_stat() {
    let (addr, _task) = endpoint(|_, mut wire| async move {
        wire.rest().await;
    })
    .await;
    let served = Served::new(addr, Settings { concurrency: 1, ..settings() }).await;
    let (figures, _figures) = port(Figures(Arc::clone(&served.queue))).await;
    assert_eq!(get(figures, "/other").await.body, "404 page not found\n");
    // One is worked on, one waits, two came by way of the activator, one of which waits.
    let mut clients = vec![];
    for (number, header) in ["K-Proxy-Request: activator", "K-Proxy-Request: activator", "X: y"].iter().enumerate() {
        let mut client = served.client().await;
        client.write(&format!("GET / HTTP/1.1\r\nHost: h\r\n{header}\r\n\r\n")).await;
        eventually("the request is counted", || served.queue.depth() == number + 1).await;
        clients.push(client);
    }
    let mut came = 0.0;
    let quiet = async {
        loop {
            let stat = stat(figures).await;
            assert_eq!(stat.pod_name, "pod");
            if stat.process_uptime > 0.0 && stat.request_count < 0.5 {
                return stat;
            }
            came = stat.request_count.max(came);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let whole = tokio::time::timeout(Duration::from_secs(30), quiet).await.expect("a quiet second");
    // A whole second in which nobody came or went.
    let expected = (3.0, 2.0, 0.0, 0.0, 0);
    let found = (
        whole.average_concurrent_requests,
        whole.average_proxied_concurrent_requests,
        whole.request_count,
        whole.proxied_request_count,
        whole.timestamp,
    );
    assert_eq!(found, expected);
    assert!((1.0..=3.0).contains(&came), "{came} came in the busiest second");
}

#[tokio::test(start_paused = true)]
async fn knative_port_8022_waits_for_the_drain() {
    let (addr, _asked, _task) = answers(OK).await;
    let served = Served::new(addr, settings()).await;
    let (admin, _admin) = port(Admin(Arc::clone(&served.queue))).await;
    let answer = get(admin, "/wait-for-drain").await;
    assert_eq!((answer.status(), &*answer.body, answer.header("content-length")), ("200", "", "0"));
    assert!(!answer.headers.contains_key("content-type"));
    let answer = get(admin, "/drain-complete").await;
    assert_eq!((answer.status(), &*answer.body), ("200", "drained"));
    let present = served.queue.stats().come(false);
    let answer = get(admin, "/drain-complete").await;
    assert_eq!((answer.status(), &*answer.body), ("503", "pending requests: 1"));
    drop(present);
    let answer = get(admin, "/other").await;
    assert_eq!((answer.status(), answer.header("x-content-type-options")), ("404", "nosniff"));
}
