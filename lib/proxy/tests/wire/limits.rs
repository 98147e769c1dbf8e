//! What clients may cost: heads, time, connections, streams; and the end of a server.

use std::time::Duration;

use lifl_proxy::Limits;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep},
};

use crate::rig::{Served, Wire, answers, endpoint, eventually, fine, settings};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const GET: &str = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[tokio::test]
async fn heads_that_are_no_requests() {
    let (addr, asked, _task) = answers(OK).await;
    let served = Served::new(addr, settings()).await;
    let long = format!("GET / HTTP/1.1\r\nHost: h\r\nX: {}\r\n\r\n", "x".repeat(70_000));
    let many = format!("GET / HTTP/1.1\r\nHost: h\r\n{}\r\n", "X: y\r\n".repeat(200));
    let rows: [(&str, &str, &str); 8] = [
        ("GET / HTTP/1.1\r\n\r\n", "400", "400 Bad Request: missing required Host header"),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400", "400 Bad Request: too many Host headers"),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "400", "400 Bad Request: malformed Host header"),
        ("GET nowhere HTTP/1.1\r\nHost: a\r\n\r\n", "400", "400 Bad Request: malformed target"),
        ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", "400", ""),
        ("nonsense\r\n\r\n", "400", ""),
        (&long, "431", ""),
        (&many, "431", ""),
    ];
    for (request, status, body) in rows {
        let mut client = served.client().await;
        client.write(request).await;
        let answer = client.message().await;
        assert_eq!((answer.status(), &*answer.body), (status, body), "{:?}", &request[..30.min(request.len())]);
        assert_eq!(client.rest().await, "", "and the connection is closed");
    }
    assert!(asked.lock().expect("no panic").is_empty());
}

#[tokio::test(start_paused = true)]
async fn slow_heads_are_cut_off() {
    let (addr, _asked, _task) = answers(OK).await;
    let served = Served::new(addr, settings()).await;
    let begun = Instant::now();
    let mut silent = served.client().await;
    assert_eq!(silent.rest().await, "");
    assert_eq!(begun.elapsed().as_secs(), 60, "not a byte");
    let mut slow = served.client().await;
    let begun = Instant::now();
    slow.write("GET / HTTP/1.1\r\n").await;
    assert_eq!(slow.rest().await, "");
    assert!((60..=90).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    eventually("connections are gone", || served.server.open() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_answer_is_not_a_slow_head() {
    let _fine = fine();
    let (addr, _task) = endpoint(|_, mut wire| async move {
        wire.head().await;
        sleep(Duration::from_secs(200)).await;
        wire.write("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n").await;
        sleep(Duration::from_secs(200)).await;
        wire.write("ok").await;
        wire.head().await;
        wire.write(OK).await;
    })
    .await;
    let served = Served::with(addr, settings(), Limits { idle: Duration::from_secs(90), ..Limits::default() }).await;
    let mut client = served.client().await;
    client.write(GET).await;
    assert_eq!(client.message().await.body, "ok");
    let begun = Instant::now();
    assert_eq!(client.rest().await, "", "an idle connection with a limit ends");
    assert!((80..=130).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn connections_beyond_the_bound_wait() {
    let (addr, _asked, _task) = answers(OK).await;
    let served = Served::with(addr, settings(), Limits { connections: 1, ..Limits::default() }).await;
    let mut first = served.client().await;
    first.write(GET).await;
    assert_eq!(first.message().await.body, "ok");
    let mut second = served.client().await;
    second.write(GET).await;
    assert_eq!(served.server.open(), 2, "the listener and one connection");
    drop(first);
    assert_eq!(second.message().await.body, "ok");
}

#[tokio::test]
async fn a_server_that_closes_lets_requests_end() {
    let (addr, _task) = endpoint(|_, mut wire| async move {
        wire.head().await;
        wire.until("go").await;
        wire.write(OK).await;
    })
    .await;
    let served = Served::new(addr, settings()).await;
    let mut idle = served.client().await;
    let mut busy = served.client().await;
    busy.write("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n").await;
    eventually("the request is under way", || served.queue.depth() == 1).await;
    served.server.close();
    assert_eq!(idle.rest().await, "", "idle connections are closed");
    eventually("no listener, one connection", || served.server.open() == 1).await;
    busy.write("go").await;
    let answer = busy.message().await;
    assert_eq!((&*answer.body, answer.header("connection")), ("ok", "close"));
    served.server.closed().await;
    assert!(TcpStream::connect(served.addr).await.is_err() || Wire::to(served.addr).await.rest().await.is_empty());
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The first request is answered as HTTP/2's first stream, others follow on the same connection.
#[tokio::test]
async fn an_upgrade_to_http_2() {
    let (addr, asked, _task) = answers(OK).await;
    let served = Served::new(addr, settings()).await;
    let mut stream = TcpStream::connect(served.addr).await.expect("connected");
    let request = "GET /first HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
        HTTP2-Settings: AAMAAABkAAQAAP__\r\nUser-Agent: kube-probe/1\r\nK-Network-Probe: queue\r\n\r\n";
    stream.write_all(request.as_bytes()).await.expect("written");
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("a head"));
    }
    let head = String::from_utf8(head).expect("text").to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 ") && head.contains("upgrade: h2c"), "{head}");
    stream.write_all(PREFACE).await.expect("written");
    stream.write_all(&frame(4, 0, 0, &[])).await.expect("written");
    let (mut bodies, mut sent) = (vec![], false);
    while bodies.len() < 2 {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.expect("a frame");
        let length = usize::from(head[1]) << 8 | usize::from(head[2]);
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await.expect("a payload");
        if head[3] == 0 && length > 0 {
            bodies.push((head[8], String::from_utf8(payload).expect("text")));
        }
        if !sent && bodies.len() == 1 {
            sent = true;
            let agent = [0x00, 0x0a].iter().chain(b"user-agent").chain(&[0x0c]).chain(b"kube-probe/1").copied();
            let probe = [0x00, 0x0f].iter().chain(b"k-network-probe").chain(&[0x05]).chain(b"queue").copied();
            let block: Vec<u8> = HEAD.iter().copied().chain(agent).chain(probe).collect();
            stream.write_all(&frame(1, 5, 3, &block)).await.expect("written");
        }
    }
    assert_eq!(bodies, [(1, "queue".to_owned()), (3, "queue".to_owned())]);
    assert!(asked.lock().expect("no panic").is_empty());
}

/// Writes as much as is taken; true if the server ended the connection.
async fn flood(served: &Served, next: impl Fn(u32) -> Vec<u8>) -> bool {
    let mut stream = TcpStream::connect(served.addr).await.expect("connected");
    stream.write_all(PREFACE).await.expect("written");
    stream.write_all(&frame(4, 0, 0, &[])).await.expect("written");
    let (mut from, mut to) = stream.split();
    let writing = async {
        for number in 0..20_000 {
            if to.write_all(&next(number)).await.is_err() {
                return true;
            }
        }
        false
    };
    let reading = async {
        let mut buffer = vec![0; 65_536];
        while from.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
        true
    };
    tokio::select! {
        cut = writing => cut,
        cut = reading => cut,
    }
}

/// Indexed fields of HPACK's static table: GET, http, /, and an authority.
const HEAD: &[u8] = &[0x82, 0x86, 0x84, 0x41, 0x01, b'h'];

#[tokio::test]
async fn floods_are_cut_off_or_cost_nothing() {
    let (addr, _task) = endpoint(|_, mut wire| async move {
        wire.rest().await;
    })
    .await;
    let served = Served::new(addr, settings()).await;
    let rapid_reset = |number: u32| {
        let stream = number * 2 + 1;
        [frame(1, 5, stream, HEAD), frame(3, 0, stream, &8_u32.to_be_bytes())].concat()
    };
    assert!(flood(&served, rapid_reset).await, "streams that are opened and reset");
    let continuation = |number: u32| match number {
        0 => frame(1, 1, 1, HEAD),
        _ => frame(9, 0, 1, &[0x00, 0x01, b'x', 0x01, b'y'].repeat(100)),
    };
    assert!(flood(&served, continuation).await, "a head without end");
    // One acknowledgement is kept, whatever comes: such a client costs its own time.
    flood(&served, |_| frame(6, 0, 0, &[0; 8])).await;
    flood(&served, |_| frame(4, 0, 0, &[])).await;
    eventually("nothing is left", || served.queue.depth() == 0 && served.server.open() == 1).await;
}
