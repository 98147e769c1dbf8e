//! HTTP/2: by prior knowledge, to HTTP/2 endpoints and to others, gRPC in both of its forms.

use std::{sync::Arc, sync::atomic::Ordering};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{body::Frame, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lifl_proxy::{Body, Handle, Limits, Peer, Server, queue::Settings};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use crate::rig::{Aborts, Served, endpoint, eventually, settings};

type Client = http2::SendRequest<BoxBody<Bytes, std::convert::Infallible>>;

/// Sends back what it gets, as it comes, and says how it went in a trailer.
struct Echo;

impl Handle for Echo {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        let seen = [("version", format!("{:?}", request.version())), ("uri", request.uri().to_string())];
        let forwarded = request.headers().get("x-forwarded-for").cloned();
        let teed = request.headers().get("te").cloned();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().expect("a value"));
        let body = request.into_body().with_trailers(async move { Some(Ok(trailers)) });
        let mut response = Response::new(Body::boxed(body.boxed_unsync()));
        for (name, value) in seen {
            response.headers_mut().insert(name, value.parse().expect("a value"));
        }
        for (name, value) in [("forwarded-for", forwarded), ("te-seen", teed)] {
            if let Some(value) = value {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }
}

async fn echo() -> (std::net::SocketAddr, Aborts) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let server = Server::new(Arc::new(Echo), Limits::default());
    (addr, Aborts::new(async move { server.listen(&listener).await }))
}

async fn connect(addr: std::net::SocketAddr) -> (Client, Aborts) {
    let stream = TcpStream::connect(addr).await.expect("connected");
    let (client, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
    (client, Aborts::new(async move { drop(connection.await) }))
}

fn post(body: BoxBody<Bytes, std::convert::Infallible>) -> Request<BoxBody<Bytes, std::convert::Infallible>> {
    Request::post("http://shop.example.com/s/M").header("te", "trailers").body(body).expect("a request")
}

fn full(text: &'static str) -> BoxBody<Bytes, std::convert::Infallible> {
    Full::new(Bytes::from_static(text.as_bytes())).boxed()
}

#[tokio::test]
async fn grpc_unary() {
    let (addr, _echo) = echo().await;
    let served = Served::new(addr, Settings { concurrency: 1, ..settings() }).await;
    let (mut client, _client) = connect(served.addr).await;
    for _ in 0..3 {
        let response = client.send_request(post(full("hello"))).await.expect("a response");
        assert_eq!((response.status(), response.version()), (StatusCode::OK, Version::HTTP_2));
        let header = |name: &str| response.headers()[name].to_str().expect("text").to_owned();
        assert_eq!(header("version"), "HTTP/2.0", "the endpoint is spoken to as the client speaks");
        assert_eq!(header("uri"), "http://shop.example.com/s/M");
        assert_eq!((header("forwarded-for"), header("te-seen")), ("127.0.0.1".into(), "trailers".into()));
        let whole = response.into_body().collect().await.expect("a body");
        assert_eq!(whole.trailers().expect("trailers")["grpc-status"], "0");
        assert_eq!(whole.to_bytes(), "hello");
    }
    assert_eq!(served.dialled.0.load(Ordering::SeqCst), 1, "one connection for all");
    eventually("the place is free", || served.queue.depth() == 0).await;
}

#[tokio::test]
async fn grpc_streams_both_ways_at_once() {
    let (addr, _echo) = echo().await;
    let served = Served::new(addr, settings()).await;
    let (mut client, _client) = connect(served.addr).await;
    let (send, mut sent) = mpsc::channel::<&'static str>(1);
    let body = StreamBody::new(futures_stream(move |cx| {
        sent.poll_recv(cx).map(|text| text.map(|text| Ok(Frame::data(Bytes::from_static(text.as_bytes())))))
    }));
    let response = client.send_request(post(BodyExt::boxed(body))).await.expect("a head before any byte");
    let mut body = response.into_body();
    for text in ["one", "two", "three"] {
        send.send(text).await.expect("open");
        let frame = body.frame().await.expect("a frame").expect("data").into_data().expect("data");
        assert_eq!(frame, text);
    }
    drop(send);
    let trailers = body.frame().await.expect("a frame").expect("trailers").into_trailers().expect("trailers");
    assert_eq!(trailers["grpc-status"], "0");
    assert!(body.frame().await.is_none());
}

#[tokio::test]
async fn many_streams_share_few_connections() {
    let (addr, _echo) = echo().await;
    let served = Served::new(addr, settings()).await;
    let (client, _client) = connect(served.addr).await;
    let tasks: Vec<_> = (0..150)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move {
                let response = client.send_request(post(full("x"))).await.expect("a response");
                response.into_body().collect().await.expect("a body").to_bytes()
            })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.expect("no panic"), "x");
    }
    let dialled = served.dialled.0.load(Ordering::SeqCst);
    assert!((1..=2).contains(&dialled), "{dialled} connections for 150 requests at once, 100 streams each");
}

#[tokio::test]
async fn a_stream_that_is_reset_cancels() {
    let (seen, mut ended) = mpsc::channel(1);
    struct Waits(mpsc::Sender<&'static str>);
    struct Says(mpsc::Sender<&'static str>);
    impl Drop for Says {
        fn drop(&mut self) {
            self.0.try_send("dropped").expect("room");
        }
    }
    impl Handle for Waits {
        async fn handle(&self, _: Request<Body>, _: &Peer) -> Response<Body> {
            let _says = Says(self.0.clone());
            std::future::pending().await
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let server = Server::new(Arc::new(Waits(seen)), Limits::default());
    let _waits = Aborts::new(async move { server.listen(&listener).await });
    let served = Served::new(addr, settings()).await;
    let (mut client, _client) = connect(served.addr).await;
    let asked = tokio::spawn(async move { client.send_request(post(full("x"))).await.map(drop) });
    eventually("the request is under way", || served.queue.depth() == 1).await;
    asked.abort();
    assert_eq!(ended.recv().await, Some("dropped"), "the endpoint's stream is reset too");
    eventually("nothing is counted any more", || served.queue.depth() == 0).await;
}

#[tokio::test]
async fn an_endpoint_that_goes_away_is_dialled_again() {
    let (addr, echo) = echo().await;
    let served = Served::new(addr, settings()).await;
    let (mut client, _client) = connect(served.addr).await;
    client.send_request(post(full("x"))).await.expect("a response");
    drop(echo);
    // The listener is closed with its task; its connections live on and are used.
    let response = client.send_request(post(full("x"))).await.expect("a response");
    assert_eq!(response.status(), StatusCode::OK);
}

#[tokio::test]
async fn an_http_1_endpoint_is_no_http_2_endpoint() {
    let (addr, _task) = endpoint(|_, mut wire| async move {
        wire.more().await;
        wire.write("HTTP/1.1 400 What\r\nContent-Length: 0\r\n\r\n").await;
    })
    .await;
    let served = Served::new(addr, settings()).await;
    let (mut client, _client) = connect(served.addr).await;
    let response = client.send_request(post(full("x"))).await.expect("a response");
    assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
}

/// Echoes, but for `/unread`, which it never reads.
struct Reads;

impl Handle for Reads {
    async fn handle(&self, request: Request<Body>, peer: &Peer) -> Response<Body> {
        if request.uri().path() == "/unread" {
            std::future::pending::<()>().await;
        }
        Echo.handle(request, peer).await
    }
}

#[tokio::test]
async fn uploads_that_nobody_reads_stop_no_other() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let server = Server::new(Arc::new(Reads), Limits::default());
    let _reads = Aborts::new(async move { server.listen(&listener).await });
    let (client, _client) = connect(addr).await;
    let long = || Full::new(Bytes::from(vec![b'x'; 2 << 20])).boxed();
    let _unread: Vec<_> = (0..32)
        .map(|_| {
            let mut client = client.clone();
            let request = Request::post("http://h/unread").body(long()).expect("a request");
            Aborts::new(async move { drop(client.send_request(request).await) })
        })
        .collect();
    // What they may send is on its way before this one asks.
    let mut client = client;
    for _ in 0..3 {
        let response = client.send_request(post(long())).await.expect("a response");
        assert_eq!(response.into_body().collect().await.expect("a body").to_bytes().len(), 2 << 20);
    }
}

/// A stream made of a poll function.
fn futures_stream<T>(
    poll: impl FnMut(&mut std::task::Context<'_>) -> std::task::Poll<Option<T>>,
) -> impl futures_util::Stream<Item = T> {
    futures_util::stream::poll_fn(poll)
}
