//! Clients that ask and do not take the answer.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use lifl_proxy::{Body, Handle, Limits, Peer, Server, Timeouts, queue::Settings};
use tokio::{
    net::TcpListener,
    time::{Duration, Instant, sleep},
};

use crate::rig::{Aborts, Served, Wire, endpoint, eventually, fine, settings};

fn limits() -> Limits {
    Limits { head: Duration::from_secs(20), stall: Duration::from_secs(100), ..Limits::default() }
}

#[tokio::test(start_paused = true)]
async fn who_takes_nothing_is_cut_off() {
    let _fine = fine();
    let (addr, _task) = endpoint(|_, mut wire| async move {
        wire.head().await;
        wire.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
        let piece = format!("10000\r\n{}\r\n", "x".repeat(0x1_0000));
        while wire.try_write(&piece).await {}
    })
    .await;
    let served = Served::with(addr, settings(), limits()).await;
    let begun = Instant::now();
    let mut client = served.client().await;
    client.write("GET / HTTP/1.1\r\nHost: h\r\n\r\n").await;
    eventually("the request is under way", || served.queue.depth() == 1).await;
    while served.queue.depth() > 0 {
        sleep(Duration::from_secs(1)).await;
        assert!(begun.elapsed() < Duration::from_secs(300), "it is not cut off");
    }
    let after = begun.elapsed().as_secs();
    assert!((100..=140).contains(&after), "after {after} s");
    eventually("nothing is left", || served.pool.connections() == 0 && served.server.open() == 1).await;
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_the_endpoint_is_not() {
    let _fine = fine();
    let (addr, _task) = endpoint(|_, mut wire| async move {
        wire.head().await;
        sleep(Duration::from_secs(400)).await;
        wire.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n").await;
        sleep(Duration::from_secs(400)).await;
        wire.write("2\r\ncd\r\n0\r\n\r\n").await;
        wire.rest().await;
    })
    .await;
    let served = Served::with(addr, settings(), limits()).await;
    assert_eq!(served.ask("GET / HTTP/1.1\r\nHost: h\r\n\r\n").await.body, "abcd");
}

/// HTTP/2 that opens its streams without a window, and gives out what it likes.
async fn no_window(served: &Served, streams: u32) -> Wire {
    let mut client = served.client().await;
    // SETTINGS_INITIAL_WINDOW_SIZE, 0; GET, http, /, an authority.
    client.write("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    client.write_bytes(&[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0]).await;
    for number in 0..streams {
        get(&mut client, number).await;
    }
    client
}

async fn get(client: &mut Wire, number: u32) {
    let [.., stream] = (number * 2 + 1).to_be_bytes();
    client.write_bytes(&[0, 0, 6, 1, 5, 0, 0, 0, stream, 0x82, 0x86, 0x84, 0x41, 1, b'h']).await;
}

/// Takes the frames that come; 64 KiB more of the first stream for each of `seconds`. Streams that were reset.
async fn nibbles(client: &mut Wire, seconds: u64) -> Vec<u8> {
    let mut reset = vec![];
    for _ in 0..seconds {
        for stream in [0, 1] {
            client.write_bytes(&[0, 0, 4, 8, 0, 0, 0, 0, stream, 0, 1, 0, 0]).await;
        }
        let until = Instant::now() + Duration::from_secs(1);
        while let Ok(head) = tokio::time::timeout_at(until, client.bytes(9)).await {
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            client.bytes(length).await;
            if head[3] == 3 {
                reset.push(head[8]);
            }
        }
    }
    reset
}

/// Answers without end.
struct Endless;

impl Handle for Endless {
    async fn handle(&self, _: Request<Body>, _: &Peer) -> Response<Body> {
        let pieces = stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(&[b'x'; 0x4000]))));
        Response::new(Body::boxed(StreamBody::new(pieces).boxed_unsync()))
    }
}

async fn endless() -> (SocketAddr, Aborts) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let server = Server::new(Arc::new(Endless), Limits { stall: Duration::ZERO, ..Limits::default() });
    (addr, Aborts::new(async move { server.listen(&listener).await }))
}

/// A client that takes a little now and then of one answer, and nothing of another.
#[tokio::test(start_paused = true)]
async fn an_unread_answer_keeps_no_place_past_its_time() {
    let _fine = fine();
    let (addr, _task) = endless().await;
    let timeouts = Timeouts { total: Duration::from_secs(60), ..Timeouts::default() };
    let limits = Limits { stall: Duration::ZERO, ..limits() };
    let served = Served::with(addr, Settings { concurrency: 2, timeouts, ..settings() }, limits).await;
    let mut client = no_window(&served, 2).await;
    eventually("both are under way", || served.queue.depth() == 2).await;
    let mut reset = nibbles(&mut client, 90).await;
    reset.sort_unstable();
    assert_eq!(reset, [1, 3]);
    assert_eq!(served.queue.depth(), 0);
    get(&mut client, 2).await;
    eventually("the connection goes on", || served.queue.depth() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_read_excuses_no_other() {
    let _fine = fine();
    let (addr, _task) = endless().await;
    let served = Served::with(addr, Settings { concurrency: 2, ..settings() }, limits()).await;
    let mut client = no_window(&served, 2).await;
    eventually("both are under way", || served.queue.depth() == 2).await;
    assert_eq!(nibbles(&mut client, 140).await, [3]);
    assert_eq!(served.queue.depth(), 1, "who reads goes on");
}
