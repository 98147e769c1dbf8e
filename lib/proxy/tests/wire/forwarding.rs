//! HTTP/1.1 to HTTP/1.1: heads, bodies, upgrades, connections.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use lifl_proxy::{Limits, PoolLimits};
use tokio::{
    sync::{Notify, Semaphore},
    time::sleep,
};

use crate::rig::{Served, Wire, answers, endpoint, eventually, settings};

const GET: &str = "GET /p?q HTTP/1.1\r\nHost: h\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[tokio::test]
async fn a_request_arrives_and_its_response_comes_back() {
    let answer = "HTTP/1.1 201 Made\r\nContent-Length: 2\r\nX-Mine: 1\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\n\
        Keep-Alive: 5\r\n\r\nok";
    let (addr, asked, _task) = answers(answer).await;
    let served = Served::new(addr, settings()).await;
    let request = "POST /p?q HTTP/1.1\r\nHost: 10.0.0.1:8012\r\nK-Original-Host: shop.example.com\r\n\
        K-Proxy-Request: activator\r\nKnative-Serving-Namespace: n\r\nKnative-Serving-Revision: r\r\n\
        X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: http\r\nConnection: close, x-gone\r\nX-Gone: 1\r\n\
        Content-Length: 4\r\n\r\nbody";
    let answer = served.ask(request).await;
    assert_eq!((answer.status(), &*answer.body, answer.header("x-mine")), ("201", "ok", "1"));
    assert!(!answer.headers.contains_key("x-hop") && !answer.headers.contains_key("keep-alive"));
    assert!(answer.headers.contains_key("date"), "added when the endpoint sends none");
    let asked = asked.lock().expect("no panic").remove(0);
    assert_eq!((&*asked.first, &*asked.body), ("POST /p?q HTTP/1.1", "body"));
    let names: Vec<&str> = asked.headers.keys().map(String::as_str).collect();
    let expected = ["content-length", "forwarded", "host", "k-proxy-request", "x-forwarded-for", "x-forwarded-proto"];
    assert_eq!(names, expected, "no User-Agent is made up, nothing meant for others is passed on");
    assert_eq!(asked.header("host"), "shop.example.com");
    assert_eq!(asked.header("x-forwarded-for"), "192.0.2.1, 127.0.0.1");
    assert_eq!(asked.header("forwarded"), "for=192.0.2.1;proto=http");
}

#[tokio::test]
async fn connections_are_used_again_on_both_sides() {
    let (addr, asked, _task) = answers(OK).await;
    let served = Served::new(addr, settings()).await;
    let mut client = served.client().await;
    for _ in 0..5 {
        client.write(GET).await;
        assert_eq!(client.message().await.body, "ok");
    }
    assert_eq!(served.ask(GET).await.body, "ok", "another client uses the same connection");
    assert_eq!((served.dialled.0.load(Ordering::SeqCst), asked.lock().expect("no panic").len()), (1, 6));
    assert_eq!(served.pool.connections(), 1);
}

#[tokio::test(start_paused = true)]
async fn idle_connections_are_closed_after_their_time() {
    let (addr, _asked, _task) = answers(OK).await;
    let limits = PoolLimits { age: Duration::from_secs(1000), ..PoolLimits::default() };
    let served = Served::pooled(addr, settings(), Limits::default(), limits).await;
    assert_eq!(served.ask(GET).await.body, "ok");
    sleep(Duration::from_secs(500)).await;
    assert_eq!(served.pool.connections(), 1);
    sleep(Duration::from_secs(700)).await;
    assert_eq!(served.pool.connections(), 0, "nobody asked for it, and it is gone");
    assert_eq!(served.ask(GET).await.body, "ok");
    assert_eq!(served.dialled.0.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn idle_connections_are_bounded() {
    let gate = Arc::new(Semaphore::new(0));
    let waits = Arc::clone(&gate);
    let (addr, _task) = endpoint(move |_, mut wire| {
        let gate = Arc::clone(&waits);
        async move {
            wire.head().await;
            gate.acquire().await.expect("open").forget();
            wire.write(OK).await;
            wire.rest().await;
        }
    })
    .await;
    let limits = PoolLimits { idle: 2, ..PoolLimits::default() };
    let served = Served::pooled(addr, settings(), Limits::default(), limits).await;
    let mut clients = vec![];
    for _ in 0..5 {
        let mut client = served.client().await;
        client.write(GET).await;
        clients.push(client);
    }
    eventually("all are under way", || served.pool.connections() == 5).await;
    gate.add_permits(5);
    for client in &mut clients {
        assert_eq!(client.message().await.body, "ok");
    }
    eventually("two are kept", || served.pool.connections() == 2).await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_turn() {
    let (addr, asked, _task) = answers(OK).await;
    let served = Served::new(addr, settings()).await;
    let mut client = served.client().await;
    client.write(&GET.repeat(3)).await;
    for _ in 0..3 {
        assert_eq!(client.message().await.body, "ok");
    }
    assert_eq!(asked.lock().expect("no panic").len(), 3);
}

/// A reused connection that the endpoint has closed is no reason for a 502, and no request is sent twice.
#[tokio::test]
async fn only_what_was_never_sent_is_sent_again() {
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&seen);
    let (addr, _task) = endpoint(move |_, mut wire| {
        let seen = Arc::clone(&counted);
        async move {
            wire.head().await;
            seen.fetch_add(1, Ordering::SeqCst);
            // Says nothing of closing, and closes.
            wire.write(OK).await;
        }
    })
    .await;
    let served = Served::new(addr, settings()).await;
    for turn in 1..=5 {
        assert_eq!(served.ask(GET).await.status(), "200");
        assert_eq!(seen.load(Ordering::SeqCst), turn);
    }
    assert_eq!(served.dialled.0.load(Ordering::SeqCst), 5);
}

#[tokio::test]
async fn what_may_have_been_sent_is_not_sent_again() {
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&seen);
    let (addr, _task) = endpoint(move |_, mut wire| {
        let seen = Arc::clone(&counted);
        async move {
            wire.head().await;
            seen.fetch_add(1, Ordering::SeqCst);
        }
    })
    .await;
    let served = Served::new(addr, settings()).await;
    let answer = served.ask(GET).await;
    assert_eq!((answer.status(), answer.header("content-type")), ("502", "text/plain; charset=utf-8"));
    assert_eq!(seen.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_endpoint_that_refuses_is_a_bad_gateway() {
    let (addr, task) = endpoint(|_, _| async {}).await;
    drop(task);
    let served = Served::new(addr, settings()).await;
    eventually("the listener is gone", || std::net::TcpStream::connect(addr).is_err()).await;
    let answer = served.ask(GET).await;
    assert_eq!((answer.status(), answer.header("x-content-type-options")), ("502", "nosniff"));
    assert!(answer.body.ends_with('\n'), "{:?}", answer.body);
}

#[tokio::test]
async fn trailers_go_both_ways() {
    let (addr, asked, _task) = answers(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n",
    )
    .await;
    let served = Served::new(addr, settings()).await;
    let request = "POST / HTTP/1.1\r\nHost: h\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\nTrailer: X-Mine\r\n\r\n\
        3\r\nabc\r\n0\r\nX-Mine: 9\r\n\r\n";
    let answer = served.ask(request).await;
    assert_eq!((&*answer.body, &*answer.trailers["x-sum"][0]), ("ok", "7"));
    let asked = asked.lock().expect("no panic").remove(0);
    assert_eq!((&*asked.body, &*asked.trailers["x-mine"][0], asked.header("te")), ("abc", "9", "trailers"));
}

#[tokio::test]
async fn a_response_without_end_is_passed_on_as_it_comes() {
    let (addr, _task) = endpoint(|_, mut wire| async move {
        wire.head().await;
        wire.write("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n").await;
        wire.head().await;
    })
    .await;
    let served = Served::new(addr, settings()).await;
    let mut client = served.client().await;
    client.write(GET).await;
    assert_eq!(client.head().await.header("transfer-encoding"), "chunked");
    client.until("data: 1\n\n").await;
}

#[tokio::test]
async fn expect_asks_the_endpoint() {
    let (addr, _task) = endpoint(|number, mut wire| async move {
        let asked = wire.head().await;
        assert_eq!(asked.header("expect"), "100-continue");
        if number == 0 {
            wire.write("HTTP/1.1 100 Continue\r\n\r\n").await;
            assert_eq!(wire.exactly(4).await, "body");
            wire.write(OK).await;
        } else {
            wire.write("HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n").await;
            assert_eq!(wire.rest().await, "", "the body stays with the client");
        }
    })
    .await;
    let served = Served::new(addr, settings()).await;
    let request = "PUT / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";
    let mut client = served.client().await;
    client.write(request).await;
    assert_eq!(client.head().await.status(), "100");
    client.write("body").await;
    assert_eq!(client.message().await.body, "ok");
    drop(client);
    // The first connection stays with its task: take another one.
    let mut client = served.client().await;
    let busy = served.client().await;
    drop(busy);
    client.write(request).await;
    assert_eq!(client.head().await.status(), "417");
}

/// The endpoint answers before it reads, the client reads only after it has written all: neither waits for the other.
#[tokio::test]
async fn full_duplex() {
    const MEGABYTE: usize = 1 << 20;
    let (addr, _task) = endpoint(|_, mut wire| async move {
        wire.head().await;
        wire.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
        for turn in 0..3 {
            wire.until(&format!("ping{turn}\r\n")).await;
            wire.write(&format!("5\r\npong{turn}\r\n")).await;
        }
        wire.write(&format!("{:x}\r\n{}\r\n", 8 * MEGABYTE, "x".repeat(8 * MEGABYTE))).await;
        wire.until("0\r\n\r\n").await;
        wire.write("0\r\n\r\n").await;
    })
    .await;
    let served = Served::new(addr, settings()).await;
    let mut client = served.client().await;
    client.write("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    assert_eq!(client.head().await.status(), "200");
    for turn in 0..3 {
        client.write(&format!("5\r\nping{turn}\r\n")).await;
        client.until(&format!("pong{turn}\r\n")).await;
    }
    client.write(&format!("{:x}\r\n{}\r\n0\r\n\r\n", 8 * MEGABYTE, "y".repeat(8 * MEGABYTE))).await;
    client.until("\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn a_client_that_goes_away_cancels() {
    let (gone, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
    let (saw, tell) = (Arc::clone(&gone), Arc::clone(&begun));
    let (addr, _task) = endpoint(move |_, mut wire| {
        let (saw, tell) = (Arc::clone(&saw), Arc::clone(&tell));
        async move {
            wire.head().await;
            tell.notify_one();
            assert_eq!(wire.rest().await, "");
            saw.store(true, Ordering::SeqCst);
        }
    })
    .await;
    let served = Served::new(addr, settings()).await;
    let mut client = served.client().await;
    client.write(GET).await;
    begun.notified().await;
    assert_eq!(served.queue.depth(), 1);
    drop(client);
    eventually("the endpoint sees the end", || gone.load(Ordering::SeqCst)).await;
    eventually("nothing is counted any more", || served.queue.depth() == 0 && served.pool.connections() == 0).await;
}

#[tokio::test]
async fn an_upgrade_is_a_tunnel() {
    let (addr, _task) = endpoint(|number, mut wire| async move {
        let asked = wire.head().await;
        assert_eq!((asked.header("connection"), asked.header("upgrade")), ("Upgrade", "echo/1"));
        let to = if number == 0 { "echo/1" } else { "other" };
        wire.write(&format!("HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: {to}\r\n\r\nfirst")).await;
        while wire.more().await {
            let text = wire.exactly(4).await;
            wire.write(&text.to_uppercase()).await;
        }
        wire.write("last").await;
    })
    .await;
    let served = Served::new(addr, settings()).await;
    let request = "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo/1\r\n\r\n";
    let mut client = served.client().await;
    client.write(request).await;
    let head = client.head().await;
    assert_eq!((head.status(), head.header("upgrade"), head.header("connection")), ("101", "echo/1", "Upgrade"));
    assert_eq!(client.exactly(5).await, "first");
    client.write("ping").await;
    assert_eq!(client.exactly(4).await, "PING");
    assert_eq!((served.queue.tunnels().count(), served.queue.depth()), (1, 1));
    client.end_writing().await;
    assert_eq!(client.rest().await, "last", "each direction ends by itself");
    eventually("the tunnel is over", || served.queue.tunnels().count() == 0 && served.queue.depth() == 0).await;
    let mut other = served.client().await;
    other.write(request).await;
    assert_eq!(other.head().await.status(), "502", "the endpoint switched to something else");
}

#[tokio::test]
async fn an_upgrade_may_be_declined() {
    let (addr, _asked, _task) = answers(OK).await;
    let served = Served::new(addr, settings()).await;
    let mut client = served.client().await;
    client.write("GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
    assert_eq!(client.message().await.body, "ok");
    client.write(GET).await;
    assert_eq!(client.message().await.body, "ok", "HTTP goes on");
}

#[tokio::test]
async fn heads_without_bodies() {
    let (addr, _task) = endpoint(|_, mut wire| async move {
        loop {
            let asked = wire.head().await;
            let answer = match asked.first.split(' ').next() {
                Some("HEAD") => "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n",
                Some("DELETE") => "HTTP/1.1 204 Gone\r\n\r\n",
                _ => "HTTP/1.1 304 Same\r\nETag: \"1\"\r\n\r\n",
            };
            wire.write(answer).await;
        }
    })
    .await;
    let served = Served::new(addr, settings()).await;
    let mut client = served.client().await;
    for (method, status, length) in [("HEAD", "200", "99"), ("DELETE", "204", ""), ("GET", "304", "")] {
        client.write(&format!("{method} / HTTP/1.1\r\nHost: h\r\n\r\n")).await;
        let head = client.head().await;
        assert_eq!((head.status(), head.header("content-length")), (status, length), "{method}");
    }
    assert_eq!(served.dialled.0.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn http_1_0_ends_with_the_connection() {
    let (addr, asked, _task) =
        answers("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n").await;
    let served = Served::new(addr, settings()).await;
    let mut client = Wire::to(served.addr).await;
    client.write("GET / HTTP/1.0\r\nHost: h\r\n\r\n").await;
    let head = client.head().await;
    assert!(head.first.starts_with("HTTP/1.0 200") && !head.headers.contains_key("transfer-encoding"), "{head:?}");
    assert_eq!(client.rest().await, "ok");
    assert_eq!(asked.lock().expect("no panic")[0].first, "GET / HTTP/1.1");
}

#[tokio::test]
async fn connect_is_not_for_a_reverse_proxy() {
    let (addr, _asked, _task) = answers(OK).await;
    let served = Served::new(addr, settings()).await;
    let mut client = served.client().await;
    client.write("CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n").await;
    assert_eq!(client.message().await.status(), "400");
    assert_eq!(client.rest().await, "", "what follows is not HTTP");
}

#[tokio::test]
async fn a_get_may_have_a_body() {
    let (addr, asked, _task) = answers(OK).await;
    let served = Served::new(addr, settings()).await;
    let chunks = "GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let length = "GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello";
    for (request, field) in [(chunks, "transfer-encoding"), (length, "content-length")] {
        assert_eq!(served.ask(request).await.body, "ok");
        let asked = asked.lock().expect("no panic").remove(0);
        assert!(asked.body == "hello" && asked.headers.contains_key(field), "{asked:?}");
    }
}

#[tokio::test]
async fn an_endpoint_may_say_often_that_it_works_but_not_without_end() {
    let (addr, _task) = endpoint(|_, mut wire| async move {
        let interim = "HTTP/1.1 102 Processing\r\n\r\n";
        while wire.head().await.first.starts_with("GET /some ") {
            wire.write(&interim.repeat(50)).await;
            wire.write(OK).await;
        }
        while wire.try_write(&interim.repeat(50)).await {}
    })
    .await;
    let served = Served::new(addr, settings()).await;
    for _ in 0..2 {
        assert_eq!(served.ask("GET /some HTTP/1.1\r\nHost: h\r\n\r\n").await.body, "ok");
    }
    let refused = served.ask("GET /all HTTP/1.1\r\nHost: h\r\n\r\n").await;
    assert!(refused.status() == "502" && refused.body.contains("interim responses without end"), "{refused:?}");
}

/// The connection is free when its response has been read, though the response began before the request's end.
#[tokio::test]
async fn a_connection_is_used_again_after_a_response_that_has_overtaken_its_request() {
    let (addr, _task) = endpoint(|_, mut wire| async move {
        loop {
            wire.head().await;
            wire.write("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello").await;
            wire.exactly(4).await;
            wire.write("world").await;
        }
    })
    .await;
    let served = Served::new(addr, settings()).await;
    for _ in 0..3 {
        let mut client = served.client().await;
        client.write("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\n").await;
        assert_eq!(client.head().await.status(), "200");
        assert_eq!(client.exactly(5).await, "hello");
        client.write("ping").await;
        assert_eq!(client.exactly(5).await, "world");
    }
    assert_eq!(served.dialled.0.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn how_long_a_request_is_stands_in_its_head_once() {
    let (addr, asked, _task) = answers(OK).await;
    let served = Served::new(addr, settings()).await;
    for request in [
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2, 2\r\n\r\nok",
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        "POST / HTTP/1.1\r\nHost: h\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\n\r\n",
    ] {
        served.ask(request).await;
    }
    let asked = asked.lock().expect("no panic");
    let lengths: Vec<_> = asked.iter().map(|asked| asked.headers.get("content-length").map(Vec::len)).collect();
    let said: Vec<_> = asked.iter().map(|asked| asked.header("content-length")).collect();
    assert!(lengths.iter().all(|length| length.is_none_or(|length| length == 1)), "{lengths:?}");
    assert_eq!(said[said.len() - 2..], ["0", ""], "Go's rule for what usually has a body");
}
