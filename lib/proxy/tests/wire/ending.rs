//! The end of a server: clients are told, and what has come is answered.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use lifl_proxy::{Body, Handle, Limits, Peer, Server};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinHandle,
};

use crate::rig::{Aborts, Wire, eventually};

const GET: &str = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";

type Client = http2::SendRequest<Empty<Bytes>>;

/// Answers at once; at `/wait` when it is told to.
struct Answers(Semaphore);

impl Handle for Answers {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        if request.uri().path() == "/wait" {
            drop(self.0.acquire().await);
        }
        Response::new("ok".into())
    }
}

struct Listening {
    answers: Arc<Answers>,
    server: Server<Answers>,
    addr: SocketAddr,
    _task: Aborts,
}

impl Listening {
    async fn new() -> Self {
        let answers = Arc::new(Answers(Semaphore::new(0)));
        let server = Server::new(Arc::clone(&answers), Limits::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let listening = server.clone();
        let task = Aborts::new(async move { listening.listen(&listener).await });
        Self { answers, server, addr, _task: task }
    }
}

/// A server that has been given one connection and told to close before it could look at it.
async fn closed_at_once(first: &str) -> (Wire, Server<Answers>) {
    let server = Server::new(Arc::new(Answers(Semaphore::new(0))), Limits::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let mut client = Wire::to(listener.local_addr().expect("an address")).await;
    let (stream, addr) = listener.accept().await.expect("a connection");
    client.write(first).await;
    let serving = server.clone();
    tokio::spawn(async move { serving.connection(stream, Peer::new(addr)).await });
    server.close();
    (client, server)
}

async fn http2(addr: SocketAddr) -> (Client, JoinHandle<()>) {
    let stream = TcpStream::connect(addr).await.expect("connected");
    let (client, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
    (client, tokio::spawn(async move { drop(connection.await) }))
}

fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://h{path}")).body(Empty::new()).expect("a request")
}

async fn whole(response: Response<hyper::body::Incoming>) -> (StatusCode, Bytes) {
    let status = response.status();
    (status, response.into_body().collect().await.expect("a body").to_bytes())
}

#[tokio::test]
async fn what_has_come_before_the_close_is_answered() {
    for sent in [GET.len(), 0, 7] {
        let (mut client, server) = closed_at_once(&GET[..sent]).await;
        tokio::task::yield_now().await;
        client.write(&GET[sent..]).await;
        let answer = client.message().await;
        assert_eq!((answer.status(), answer.header("connection")), ("200", "close"), "after {sent} bytes");
        assert_eq!(client.rest().await, "");
        server.closed().await;
    }
}

#[tokio::test]
async fn who_sends_nothing_is_not_waited_for() {
    for sent in [0, 7] {
        let (mut client, server) = closed_at_once(&GET[..sent]).await;
        assert_eq!(client.rest().await, "");
        server.closed().await;
    }
}

#[tokio::test]
async fn a_first_stream_that_comes_at_the_close_is_answered() {
    let listening = Listening::new().await;
    let (mut client, connection) = http2(listening.addr).await;
    eventually("it is accepted", || listening.server.open() == 2).await;
    listening.server.close();
    let response = client.send_request(get("/")).await.expect("a response");
    assert_eq!(whole(response).await, (StatusCode::OK, "ok".into()));
    connection.await.expect("GOAWAY");
    listening.server.closed().await;
}

#[tokio::test]
async fn a_drain_is_told_with_the_next_answer() {
    let listening = Listening::new().await;
    let (mut idle, mut busy) = (Wire::to(listening.addr).await, Wire::to(listening.addr).await);
    idle.write(GET).await;
    assert_eq!(idle.message().await.header("connection"), "");
    busy.write(&GET.replace("/ ", "/wait ")).await;
    eventually("both are there", || listening.server.open() == 3).await;
    listening.server.begin_drain();
    listening.answers.0.add_permits(1);
    let mut new = Wire::to(listening.addr).await;
    for client in [&mut idle, &mut new] {
        client.write(GET).await;
    }
    for client in [&mut busy, &mut idle, &mut new] {
        let answer = client.message().await;
        assert_eq!((answer.status(), answer.header("connection")), ("200", "close"));
        assert_eq!(client.rest().await, "", "and it is closed");
    }
    eventually("only the listener is left", || listening.server.open() == 1).await;
}

#[tokio::test]
async fn who_is_silent_through_the_drain_is_let_go_at_the_close() {
    let listening = Listening::new().await;
    let mut idle = Wire::to(listening.addr).await;
    idle.write(GET).await;
    assert_eq!(idle.message().await.status(), "200");
    listening.server.begin_drain();
    for _turn in 0..100 {
        // The connection's task has its turns too, and sees the first word only.
        tokio::task::yield_now().await;
    }
    listening.server.close();
    assert_eq!(idle.rest().await, "", "it is closed");
    eventually("nothing is left", || listening.server.open() == 0).await;
}

#[tokio::test]
async fn a_drain_lets_streams_end_and_says_goaway() {
    let listening = Listening::new().await;
    let (mut busy, ended) = http2(listening.addr).await;
    let (mut idle, also_ended) = http2(listening.addr).await;
    whole(idle.send_request(get("/")).await.expect("a response")).await;
    let asked = tokio::spawn(busy.send_request(get("/wait")));
    whole(busy.send_request(get("/")).await.expect("a response")).await;
    listening.server.begin_drain();
    also_ended.await.expect("an idle connection ends");
    listening.answers.0.add_permits(1);
    let response = asked.await.expect("no panic").expect("a response");
    assert_eq!(whole(response).await, (StatusCode::OK, "ok".into()));
    ended.await.expect("GOAWAY");
    let (mut new, ended) = http2(listening.addr).await;
    tokio::task::yield_now().await;
    whole(new.send_request(get("/")).await.expect("a new connection has its request")).await;
    ended.await.expect("GOAWAY");
}
