//! Endpoints and clients that speak in bytes.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use lifl_proxy::{
    Dial, Endpoint, Limits, Pool, PoolLimits, Server, Timeouts,
    queue::{Probe, Queue, Settings},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// Dials like everybody, and counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counted(pub(crate) Arc<AtomicUsize>);

/// A queue that listens.
pub(crate) struct Served {
    pub(crate) queue: Arc<Queue<Counted>>,
    pub(crate) server: Server<Queue<Counted>>,
    pub(crate) pool: Pool<Counted>,
    pub(crate) addr: SocketAddr,
    pub(crate) dialled: Counted,
    _task: Aborts,
}

/// A connection of a client, or the other end of one.
pub(crate) struct Wire {
    stream: TcpStream,
    read: Vec<u8>,
}

/// One message as it stood on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) first: String,
    pub(crate) headers: BTreeMap<String, Vec<String>>,
    pub(crate) body: String,
    pub(crate) trailers: BTreeMap<String, Vec<String>>,
}

/// Ends a task with the test.
pub(crate) struct Aborts(JoinHandle<()>);

// === impl Counted ===

impl Dial for Counted {
    async fn dial(&self, to: &Endpoint) -> io::Result<TcpStream> {
        self.0.fetch_add(1, Ordering::SeqCst);
        TcpStream::connect(to.addr).await
    }
}

// === impl Aborts ===

impl Aborts {
    pub(crate) fn new(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(task))
    }
}

// === impl Served ===

/// Settings of a pod without limits.
pub(crate) fn settings() -> Settings {
    Settings {
        pod_name: "pod".into(),
        concurrency: 0,
        timeouts: Timeouts::default(),
        readiness: vec![],
        http2_auto_detect: false,
    }
}

pub(crate) fn probe(text: &str) -> Vec<Probe> {
    Probe::parse(text).expect("a probe")
}

impl Served {
    pub(crate) async fn new(user: SocketAddr, settings: Settings) -> Self {
        Self::with(user, settings, Limits::default()).await
    }

    pub(crate) async fn with(user: SocketAddr, settings: Settings, limits: Limits) -> Self {
        Self::pooled(user, settings, limits, PoolLimits::default()).await
    }

    pub(crate) async fn pooled(user: SocketAddr, settings: Settings, limits: Limits, pool: PoolLimits) -> Self {
        let dialled = Counted::default();
        let pool = Pool::new(dialled.clone(), pool);
        let queue = Arc::new(Queue::new(&pool, user, 0, settings));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let server = Server::new(Arc::clone(&queue), limits);
        let listening = server.clone();
        let task = Aborts(tokio::spawn(async move { listening.listen(&listener).await }));
        Self { queue, server, pool, addr, dialled, _task: task }
    }

    pub(crate) async fn client(&self) -> Wire {
        Wire::to(self.addr).await
    }

    /// What is answered to these bytes.
    pub(crate) async fn ask(&self, bytes: &str) -> Message {
        let mut client = self.client().await;
        client.write(bytes).await;
        client.message().await
    }
}

impl Drop for Aborts {
    fn drop(&mut self) {
        self.0.abort();
    }
}

// === impl Wire ===

impl Wire {
    pub(crate) async fn to(addr: SocketAddr) -> Self {
        Self::new(TcpStream::connect(addr).await.expect("connected"))
    }

    pub(crate) fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("a socket");
        Self { stream, read: vec![] }
    }

    pub(crate) async fn write(&mut self, bytes: &str) {
        self.stream.write_all(bytes.as_bytes()).await.expect("written");
    }

    pub(crate) async fn write_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("written");
    }

    /// False if the other side is gone.
    pub(crate) async fn try_write(&mut self, bytes: &str) -> bool {
        self.stream.write_all(bytes.as_bytes()).await.is_ok()
    }

    /// Some more bytes; false at the end of the stream.
    pub(crate) async fn more(&mut self) -> bool {
        self.stream.read_buf(&mut self.read).await.is_ok_and(|length| length > 0)
    }

    /// Up to and including `end`.
    pub(crate) async fn until(&mut self, end: &str) -> String {
        loop {
            if let Some(at) = self.read.windows(end.len()).position(|window| window == end.as_bytes()) {
                let rest = self.read.split_off(at + end.len());
                return String::from_utf8(std::mem::replace(&mut self.read, rest)).expect("text");
            }
            assert!(self.more().await, "ended before {end:?}: {:?}", String::from_utf8_lossy(&self.read));
        }
    }

    pub(crate) async fn exactly(&mut self, length: usize) -> String {
        String::from_utf8(self.bytes(length).await).expect("text")
    }

    pub(crate) async fn bytes(&mut self, length: usize) -> Vec<u8> {
        while self.read.len() < length {
            assert!(self.more().await, "ended too early: {:?}", String::from_utf8_lossy(&self.read));
        }
        let rest = self.read.split_off(length);
        std::mem::replace(&mut self.read, rest)
    }

    /// Everything until the other side ends.
    pub(crate) async fn rest(&mut self) -> String {
        while self.more().await {}
        String::from_utf8_lossy(&std::mem::take(&mut self.read)).into_owned()
    }

    pub(crate) async fn head(&mut self) -> Message {
        let text = self.until("\r\n\r\n").await;
        let mut lines = text.trim_end().split("\r\n");
        let first = lines.next().unwrap_or_default().to_owned();
        Message { first, headers: fields(lines), ..Message::default() }
    }

    /// A whole message: length, chunks with trailers, or nothing.
    pub(crate) async fn message(&mut self) -> Message {
        let mut message = self.head().await;
        if message.header("transfer-encoding") == "chunked" {
            loop {
                let line = self.until("\r\n").await;
                let size = usize::from_str_radix(line.trim(), 16).expect("a chunk's size");
                if size == 0 {
                    break;
                }
                message.body.push_str(&self.exactly(size).await);
                self.until("\r\n").await;
            }
            let mut lines = vec![];
            loop {
                let line = self.until("\r\n").await;
                if line == "\r\n" {
                    break;
                }
                lines.push(line.trim_end().to_owned());
            }
            message.trailers = fields(lines.iter().map(String::as_str));
        } else if let Ok(length) = message.header("content-length").parse() {
            message.body = self.exactly(length).await;
        }
        message
    }

    pub(crate) async fn end_writing(&mut self) {
        self.stream.shutdown().await.expect("shut down");
    }
}

fn fields<'a>(lines: impl Iterator<Item = &'a str>) -> BTreeMap<String, Vec<String>> {
    let mut fields: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in lines {
        let (name, value) = line.split_once(':').expect("a field");
        fields.entry(name.to_ascii_lowercase()).or_default().push(value.trim().to_owned());
    }
    fields
}

// === impl Message ===

impl Message {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |values| values[0].as_str())
    }

    pub(crate) fn status(&self) -> &str {
        self.first.split(' ').nth(1).unwrap_or_default()
    }
}

/// An endpoint that does `what` with each connection, which it numbers.
pub(crate) async fn endpoint<F, R>(what: F) -> (SocketAddr, Aborts)
where
    F: Fn(usize, Wire) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let task = tokio::spawn(async move {
        let mut number = 0;
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            tokio::spawn(what(number, Wire::new(stream)));
            number += 1;
        }
    });
    (addr, Aborts(task))
}

/// An endpoint that answers each request with `answer`, and keeps what it was asked.
pub(crate) async fn answers(answer: &'static str) -> (SocketAddr, Arc<Mutex<Vec<Message>>>, Aborts) {
    let asked = Arc::new(Mutex::new(vec![]));
    let keep = Arc::clone(&asked);
    let (addr, task) = endpoint(move |_, mut wire| {
        let keep = Arc::clone(&keep);
        async move {
            loop {
                while !wire.read.windows(4).any(|window| window == b"\r\n\r\n") {
                    if !wire.more().await {
                        return;
                    }
                }
                let message = wire.message().await;
                keep.lock().expect("no panic").push(message);
                wire.write(answer).await;
            }
        }
    })
    .await;
    (addr, asked, task)
}

/// Waits for a condition, not for time; a condition that never comes fails the test.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

/// Keeps a paused clock's jumps small.
pub(crate) fn fine() -> Aborts {
    Aborts::new(async {
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
}
