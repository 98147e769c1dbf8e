//! Listeners and connections: HTTP/1.1, and HTTP/2 by prior knowledge, on the same port.
//!
//! Bounded: connections, heads (bytes, fields and time), streams, what a client may have on the way of an upload, streams
//! that it opens and resets at once. SETTINGS, PING and CONTINUATION floods are h2's to bound: it keeps one of each.

use std::{
    convert::Infallible,
    fmt,
    future::Future,
    io,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::FutureExt as _;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use hyper::{
    body::{Body as _, Incoming},
    server::conn::{http1, http2},
    service::{HttpService, service_fn},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};

use crate::{
    head::{self, Peer},
    progress::{Progress, Turn},
    reply,
    upstream::Body,
};

mod connection;
mod end;
mod h2c;
mod sniff;
mod streams;

use end::{End, Phase, reached};
use h2c::{Joined, Switch};
use sniff::{Sniffed, Version as Spoken};
use streams::Streams;

/// A listener out of descriptors is asked again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bytes of a body read at once, if they come fast enough.
const READ: usize = 256 << 10;

/// Of one HTTP/2 answer, waiting for a client that does not read: a client may leave all of its streams so.
const SEND: usize = 32 << 10;

/// Of all uploads of one HTTP/2 connection: what it may cost at most while nobody reads them.
const UPLOADS: u32 = 16 << 20;

/// Answers requests.
pub trait Handle: Send + Sync + 'static {
    /// The answer to one request. Dropped if its client goes away.
    fn handle(&self, request: Request<Body>, peer: &Peer) -> impl Future<Output = Response<Body>> + Send;
}

/// What clients may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; more wait in the kernel.
    pub connections: usize,
    /// A request's head, in bytes.
    pub header_bytes: u32,
    /// A request's head, in time; counts from the first byte, on a new connection from its beginning.
    pub head: Duration,
    /// An idle connection is closed after this; zero is never.
    pub idle: Duration,
    /// A client that takes nothing of its answers for this long is cut off; zero is never. Looked at each half of `head`.
    pub stall: Duration,
    /// Streams of one HTTP/2 connection.
    pub streams: u32,
    /// Streams of one HTTP/2 connection that were reset before anybody looked at them.
    pub resets: usize,
    /// What an HTTP/2 client may send of one upload before it is read: per round trip, as long as it is read. All uploads of a
    /// connection may be 16 MiB ahead of their readers, which is the memory that a connection can cost; by default it takes 64
    /// that nobody reads to stop the others.
    pub window: u32,
}

/// Serves listeners until it is told to close.
pub struct Server<H> {
    shared: Arc<Shared<H>>,
}

struct Shared<H> {
    handler: Arc<H>,
    limits: Limits,
    permits: Arc<Semaphore>,
    end: Arc<End>,
}

/// One connection's requests have this in common.
struct Session<H> {
    handler: Arc<H>,
    peer: Peer,
    progress: Arc<Progress>,
    end: Arc<End>,
    /// Set by the request that asks for HTTP/2 in place of HTTP/1.1: the last one of its connection.
    switch: Mutex<Option<Switch>>,
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 100_000,
            header_bytes: 64 << 10,
            head: Duration::from_secs(60),
            idle: Duration::ZERO,
            // Knative's default for a whole request.
            stall: Duration::from_secs(300),
            streams: 250,
            resets: 20,
            window: 256 << 10,
        }
    }
}

// === impl Server ===

impl<H: Handle> Server<H> {
    /// A server that listens to nothing yet.
    #[must_use]
    pub fn new(handler: Arc<H>, limits: Limits) -> Self {
        let permits = Arc::new(Semaphore::new(limits.connections.min(Semaphore::MAX_PERMITS)));
        Self { shared: Arc::new(Shared { handler, limits, permits, end: Arc::new(End::new()) }) }
    }

    /// Accepts connections until [`Server::close`], or until whoever shares the socket has shut it down.
    pub async fn listen(&self, listener: &TcpListener) {
        self.listen_with(listener, |stream| stream).await;
    }

    /// The same with something between a connection's bytes and its requests, as TLS is. It is not waited for here, so what it
    /// has to do first is to be done when it is read.
    pub async fn listen_with<I>(&self, listener: &TcpListener, wrap: impl Fn(TcpStream) -> I)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut told = self.shared.end.subscribe();
        loop {
            let accepted = tokio::select! {
                () = reached(&mut told, Phase::Closing) => return,
                accepted = self.accept(listener) => accepted,
            };
            let (stream, peer, permit) = match accepted {
                Ok(Some(accepted)) => accepted,
                Ok(None) => continue,
                Err(_shut_down) => return,
            };
            // Counted from here on, not from when its task first runs.
            let (server, stream, told) = (self.clone(), wrap(stream), self.shared.end.subscribe());
            tokio::spawn(async move { server.told(stream, peer.holding(permit), told).await }.boxed());
        }
    }

    /// `Ok(None)`: not this time.
    async fn accept(&self, listener: &TcpListener) -> io::Result<Option<(TcpStream, Peer, OwnedSemaphorePermit)>> {
        let Ok(permit) = Arc::clone(&self.shared.permits).acquire_owned().await else { return Ok(None) };
        let accepted = listener.accept().await.and_then(|(stream, addr)| {
            stream.set_nodelay(true)?;
            Ok((stream, Peer::new(addr)))
        });
        match accepted {
            Ok((stream, peer)) => Ok(Some((stream, peer, permit))),
            Err(error) => {
                // Of a listener that was shut down, and of a client that was gone before its options were set.
                if error.kind() == io::ErrorKind::InvalidInput && !is_listening(listener) {
                    return Err(error);
                }
                if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::InvalidInput) {
                    tracing::warn!(%error, "connection is not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                Ok(None)
            }
        }
    }

    /// Serves one connection to its end; TLS, if any, is below. A connection that was there before the server closed has its
    /// first request answered, if it comes soon.
    pub async fn connection<I>(&self, io: I, peer: Peer)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.told(io, peer, self.shared.end.subscribe()).await;
    }

    async fn told<I>(&self, mut io: I, peer: Peer, mut told: watch::Receiver<Phase>)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Shared { handler, limits, end, .. } = &*self.shared;
        // The version is told by the first bytes: who sends none is not waited for longer than for a head.
        let first = {
            let mut first = pin!(timeout(limits.head, sniff::version(&mut io)));
            tokio::select! {
                first = &mut first => first,
                // A new socket has nothing to read until the reactor has looked, so nothing yet is no answer.
                () = reached(&mut told, Phase::Closing) => timeout(connection::LAST, first).await.and_then(|first| first),
            }
        };
        let Ok(Ok((version, read))) = first else { return };
        let progress = Arc::new(Progress::default());
        let session = Arc::new(Session::new(Arc::clone(handler), peer, Arc::clone(&progress), Arc::clone(end)));
        let io = TokioIo::new(Sniffed::new(io, read, Arc::clone(&progress)));
        let ended = match version {
            Spoken::Http1 => {
                let connection = self.http1().serve_connection(io, Arc::clone(&session).service()).with_upgrades();
                match connection::drive(connection, &mut told, end, &progress, limits).await {
                    Ok(()) => match session.switched() {
                        Some(switch) => self.switch(switch, &session, &mut told).await,
                        None => Ok(()),
                    },
                    ended => ended,
                }
            }
            Spoken::Http2 => {
                let connection = self.http2(&progress).serve_connection(io, Arc::clone(&session).service());
                connection::drive(connection, &mut told, end, &progress, limits).await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "connection ended");
        }
    }

    /// Goes on as HTTP/2 after an upgrade.
    async fn switch(
        &self,
        switch: Switch,
        session: &Arc<Session<H>>,
        told: &mut watch::Receiver<Phase>,
    ) -> hyper::Result<()> {
        let joined = Joined::new(TokioIo::new(switch.on.await?), switch.request);
        let http2 = self.http2(&session.progress);
        let connection = http2.serve_connection(TokioIo::new(joined), Arc::clone(session).service());
        connection::drive(connection, told, &self.shared.end, &session.progress, &self.shared.limits).await
    }

    /// Clients are to go elsewhere before [`Server::close`]: connections are still accepted, but each is over after the answers
    /// that are under way. HTTP/1.1 is told with its next answer, so idle connections are left alone; HTTP/2 is told at once, or
    /// with its first request.
    pub fn begin_drain(&self) {
        self.shared.end.reach(Phase::Draining);
    }

    /// No more connections are accepted, idle ones are closed, the others after the requests that are under way.
    pub fn close(&self) {
        self.shared.end.reach(Phase::Closing);
    }

    /// Waits until all connections are gone.
    pub async fn closed(&self) {
        self.shared.end.all_gone().await;
    }

    /// Connections and listeners that are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.shared.end.open()
    }

    fn http1(&self) -> http1::Builder {
        let mut builder = http1::Builder::new();
        // Time is taken care of in `connection`: hyper would set and unset a timer at each request.
        builder
            .header_read_timeout(None)
            .max_header_size(self.shared.limits.header_bytes as usize)
            .max_buf_size(READ.max(self.shared.limits.header_bytes as usize));
        builder
    }

    fn http2(&self, progress: &Arc<Progress>) -> http2::Builder<Streams> {
        let limits = &self.shared.limits;
        // Streams that are not read must leave the others theirs.
        let all = limits.window.saturating_mul(limits.streams.max(1)).min(UPLOADS.max(limits.window));
        let mut builder = http2::Builder::new(Streams(Arc::clone(progress)));
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams)
            .max_header_list_size(limits.header_bytes)
            .max_pending_accept_reset_streams(limits.resets)
            .max_send_buf_size(SEND)
            .initial_stream_window_size(limits.window)
            .initial_connection_window_size(all);
        builder
    }
}

impl<H> Clone for Server<H> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<H> fmt::Debug for Server<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("limits", &self.shared.limits).finish_non_exhaustive()
    }
}

// === impl Session ===

impl<H: Handle> Session<H> {
    fn new(handler: Arc<H>, peer: Peer, progress: Arc<Progress>, end: Arc<End>) -> Self {
        Self { handler, peer, progress, end, switch: Mutex::new(None) }
    }

    fn service(
        self: Arc<Self>,
    ) -> impl HttpService<
        Incoming,
        ResBody = Body,
        Error = Infallible,
        Future = impl Future<Output = Result<Response<Body>, Infallible>> + Send + 'static,
    > {
        let session = self;
        service_fn(move |request: Request<Incoming>| {
            let session = Arc::clone(&session);
            let turn = session.progress.begin();
            async move { Ok::<_, Infallible>(session.answer(request, turn).await) }
        })
    }

    fn switched(&self) -> Option<Switch> {
        self.switch.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    async fn answer(&self, mut request: Request<Incoming>, turn: Turn) -> Response<Body> {
        if let Err(fault) = check(&request) {
            return refuse(fault);
        }
        if let Some(switch) = h2c::wanted(&mut request) {
            *self.switch.lock().unwrap_or_else(PoisonError::into_inner) = Some(switch);
            return h2c::switching();
        }
        head::drop_named(request.headers_mut());
        // HTTP/1.1 has the same done by hyper.
        let http2 = request.version() == Version::HTTP_2;
        let bare = request.method() == Method::HEAD && http2;
        let mut response = self.handler.handle(request.map(Body::from), &self.peer).await;
        if bare {
            drop_body(&mut response);
        }
        if !http2 && response.status() != StatusCode::SWITCHING_PROTOCOLS && self.end.has_reached(Phase::Draining) {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response.body_mut().during(turn);
        response
    }
}

/// The head says what the body would have been.
fn drop_body(response: &mut Response<Body>) {
    let body = std::mem::take(response.body_mut());
    if let Some(length) = body.size_hint().exact().filter(|length| *length > 0) {
        response.headers_mut().entry(header::CONTENT_LENGTH).or_insert(length.into());
    }
}

fn is_listening(listener: &TcpListener) -> bool {
    rustix::net::sockopt::socket_acceptconn(listener).unwrap_or(false)
}

/// What hyper lets pass, and Go or another proxy does not: what two servers may read as two things is refused.
fn check<B>(request: &Request<B>) -> Result<(), &'static str> {
    let headers = request.headers();
    let mut hosts = headers.get_all(header::HOST).iter();
    let first = hosts.next();
    if hosts.next().is_some() {
        return Err("too many Host headers");
    }
    if request.version() == Version::HTTP_11 && first.is_none() {
        return Err("missing required Host header");
    }
    let valid = |host: &[u8]| host.iter().all(|b| b.is_ascii_alphanumeric() || b"!$%&'()*+,-.:;=[]_~".contains(b));
    if first.is_some_and(|host| !valid(host.as_bytes())) {
        return Err("malformed Host header");
    }
    let mut encodings = headers.get_all(header::TRANSFER_ENCODING).iter();
    if let Some(encoding) = encodings.next()
        && (encodings.next().is_some() || !encoding.as_bytes().eq_ignore_ascii_case(b"chunked"))
    {
        return Err("unsupported transfer encoding");
    }
    check_target(request)
}

fn check_target<B>(request: &Request<B>) -> Result<(), &'static str> {
    let path = request.uri().path();
    let asterisk = path == "*" && request.method() == Method::OPTIONS;
    if request.method() == Method::CONNECT {
        return Err("nothing to connect to");
    }
    if !path.starts_with('/') && !asterisk {
        return Err("malformed target");
    }
    let mut escapes = path.split('%').skip(1).map(str::as_bytes);
    if !escapes.all(|rest| matches!(rest, [a, b, ..] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit())) {
        return Err("malformed escape in the target");
    }
    Ok(())
}

fn refuse(fault: &str) -> Response<Body> {
    let mut response = reply::plain(StatusCode::BAD_REQUEST, format!("400 Bad Request: {fault}"));
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl Handle for Nothing {
        async fn handle(&self, _: Request<Body>, _: &Peer) -> Response<Body> {
            reply::empty(StatusCode::OK)
        }
    }

    #[tokio::test]
    async fn listening_ends_when_another_holder_of_the_socket_shuts_it_down() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Server::new(Arc::new(Nothing), Limits::default());
        let ends = async {
            tokio::task::yield_now().await;
            rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
        };
        let both = async { tokio::join!(server.listen(&listener), ends) };
        timeout(Duration::from_secs(20), both).await.expect("it listens on");
    }
}
