//! A pod with an app, and clients that speak in bytes.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use lifl_proxy::{
    Body, Direct, Handle, Limits, Peer, Pool, PoolLimits, Server, Timeouts,
    observe::Facts,
    queue::{Observe, Queue, Settings},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::Duration,
};

/// Nothing here takes as long; a hang becomes a failure.
const PATIENCE: Duration = Duration::from_secs(30);

/// A user's container: answers `body` with the status that the path names, and keeps the heads that it saw.
#[derive(Debug, Default)]
pub(crate) struct App {
    pub(crate) heads: Mutex<Vec<HeaderMap>>,
}

/// What was written, for all to read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Written(Arc<Mutex<Vec<u8>>>);

pub(crate) struct Pod {
    pub(crate) app: Arc<App>,
    pub(crate) user: SocketAddr,
    pub(crate) queue: Arc<Queue<Direct>>,
    pub(crate) at: SocketAddr,
}

/// Waits for something that must come.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} does not come"))
}

/// Serves until the test ends.
pub(crate) async fn listen<H: Handle>(handler: Arc<H>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    tokio::spawn(async move { Server::new(handler, Limits::default()).listen(&listener).await });
    addr
}

/// What is answered to these bytes, to the end of the connection.
pub(crate) async fn ask(at: SocketAddr, bytes: &str) -> String {
    soon("an answer", async {
        let mut stream = TcpStream::connect(at).await.expect("connected");
        stream.write_all(bytes.as_bytes()).await.expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        answer
    })
    .await
}

/// A GET whose connection ends with the answer.
pub(crate) async fn get(at: SocketAddr, path: &str, headers: &str) -> String {
    ask(at, &format!("GET {path} HTTP/1.1\r\nHost: shop.example:81\r\nConnection: close\r\n{headers}\r\n")).await
}

/// Waits for a condition, not for time.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    soon(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

pub(crate) fn facts() -> Facts {
    Facts {
        revision: "meter-one".into(),
        namespace: "golden".into(),
        service: "meter".into(),
        configuration: "meter".into(),
        pod: "meter-one-deployment-1".into(),
        address: "10.244.0.66".into(),
    }
}

// === impl App ===

impl Handle for App {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        let (head, body) = request.into_parts();
        self.heads.lock().expect("no panic").push(head.headers);
        let _the_client_left = body.collect().await;
        let status = head.uri.path().trim_start_matches('/').parse().unwrap_or(200);
        let mut response = Response::new(Bytes::from_static(b"body").into());
        *response.status_mut() = StatusCode::from_u16(status).expect("a status");
        response
    }
}

// === impl Pod ===

impl Pod {
    pub(crate) async fn new(concurrency: usize, observe: Observe) -> Self {
        let app = Arc::new(App::default());
        let user = listen(Arc::clone(&app)).await;
        Self::at(app, user, concurrency, observe).await
    }

    /// Of an app that may not be there.
    pub(crate) async fn at(app: Arc<App>, user: SocketAddr, concurrency: usize, observe: Observe) -> Self {
        let pool = Pool::new(Direct, PoolLimits::default());
        let settings = Settings {
            pod_name: "pod".into(),
            concurrency,
            timeouts: Timeouts::default(),
            readiness: vec![],
            http2_auto_detect: false,
        };
        let queue = Arc::new(Queue::new(&pool, user, 0, settings).observed(observe));
        let at = listen(Arc::clone(&queue)).await;
        Self { app, user, queue, at }
    }

    /// What the app saw of the last request.
    pub(crate) fn saw(&self, header: &str) -> String {
        let heads = self.app.heads.lock().expect("no panic");
        let value = heads.last().expect("a request").get(header).cloned();
        value.map_or_else(String::new, |value| value.to_str().expect("text").to_owned())
    }
}

// === impl Written ===

impl Written {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().expect("no panic").clone()).expect("text")
    }
}

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
