//! HTTP/2 connections to one endpoint: few, shared by all.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{net::TcpStream, time::Instant};

use super::{
    HEAD,
    body::{Body, Keep},
};

/// What an endpoint may send of one response before it is read. Little, since a client may leave all of its streams unread;
/// enough for an endpoint that is near: 32 KB on the way cost no time below 1 GB/s and 30 us.
const STREAM_WINDOW: u32 = 64 << 10;

/// Streams of a connection, before another one is made. They belong to many clients: what some do not read must leave the others
/// theirs, so all of their windows together are the connection's.
const STREAMS: u32 = 100;

/// The connections, and one dialler at a time.
#[derive(Debug, Default)]
pub(super) struct Shared {
    connections: Mutex<Vec<Connection>>,
    /// Held while a connection is made, so that a burst of requests makes one and not hundreds.
    pub(super) dialling: tokio::sync::Mutex<()>,
    failures: Mutex<Failures>,
}

/// Dials that came to nothing: how many, and what the last one said.
#[derive(Debug, Default)]
pub(super) struct Failures(pub(super) u64, Option<io::Error>);

/// One of the streams of a connection; counted until dropped.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) sender: http2::SendRequest<Body>,
    pub(super) counted: Counted,
}

/// A stream's count.
#[derive(Debug)]
pub(super) struct Counted(Arc<AtomicUsize>);

#[derive(Debug)]
struct Connection {
    sender: http2::SendRequest<Body>,
    streams: Arc<AtomicUsize>,
    used: Instant,
}

// === impl Shared ===

impl Shared {
    /// A stream of the connection with the fewest, if that has room for it.
    pub(super) fn take(&self, now: Instant) -> Option<Stream> {
        let mut connections = self.lock();
        connections.retain(|connection| !connection.sender.is_closed());
        let least = connections.iter_mut().min_by_key(|connection| connection.streams.load(Ordering::Relaxed))?;
        least.has_room().then(|| least.stream(now))
    }

    /// Whether a stream can be had.
    pub(super) fn has_room(&self) -> bool {
        self.lock().iter().any(|connection| !connection.sender.is_closed() && connection.has_room())
    }

    /// Begins HTTP/2 on a stream; `alive` is dropped with the connection.
    pub(super) async fn add<A: Send + 'static>(&self, stream: TcpStream, alive: A) -> hyper::Result<Stream> {
        let (sender, driver) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(STREAMS * STREAM_WINDOW)
            .max_header_list_size(HEAD)
            .handshake::<_, Body>(TokioIo::new(stream))
            .await?;
        tokio::spawn(
            async move {
                if let Err(error) = driver.await {
                    tracing::debug!(%error, "HTTP/2 connection to an endpoint ended");
                }
                drop(alive);
            }
            .boxed(),
        );
        let mut connection = Connection { sender, streams: Arc::default(), used: Instant::now() };
        let stream = connection.stream(Instant::now());
        self.lock().push(connection);
        Ok(stream)
    }

    /// A dial came to nothing: those who wait for it need not try one after the other.
    pub(super) fn failed(&self, error: &io::Error) {
        let mut failures = self.failures();
        *failures = Failures(failures.0 + 1, Some(same(error)));
    }

    /// What the last dial said, if one has failed after there were `before`.
    pub(super) fn failed_since(&self, before: u64) -> Option<io::Error> {
        let failures = self.failures();
        failures.1.as_ref().filter(|_| failures.0 > before).map(same)
    }

    pub(super) fn failures(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes what has been idle for too long.
    pub(super) fn sweep(&self, age: Duration, now: Instant) {
        self.lock().retain(|connection| {
            let idle = connection.streams.load(Ordering::Relaxed) == 0;
            let old = idle && now.saturating_duration_since(connection.used) >= age;
            !old && !connection.sender.is_closed()
        });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn same(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

// === impl Connection ===

impl Connection {
    fn has_room(&self) -> bool {
        self.streams.load(Ordering::Relaxed) < STREAMS as usize
    }

    fn stream(&mut self, now: Instant) -> Stream {
        self.streams.fetch_add(1, Ordering::Relaxed);
        self.used = now;
        Stream { sender: self.sender.clone(), counted: Counted(Arc::clone(&self.streams)) }
    }
}

// === impl Counted ===

impl Keep for Counted {}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
