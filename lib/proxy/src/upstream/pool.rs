//! All endpoints' connections, shared by all threads.

use std::{
    collections::HashMap,
    fmt,
    future::poll_fn,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{Request, Response, StatusCode, response};
use hyper::body::Frame;
use tokio::{
    net::TcpStream,
    sync::mpsc,
    task::AbortHandle,
    time::{Instant, sleep, timeout},
};

use super::{
    body::{Body, Keep, Piped},
    h1::{Alive, Answer, Broken, Lease},
    h2,
    shelf::Shelf,
};
use crate::endpoint::{Dial, Endpoint, Protocol};

/// Connections that end before they carry a request are made again this often.
const FRESH_TRIES: u32 = 3;

/// Sweeps in the age of an idle connection: it may get older by one part of so many.
const SWEEPS: u32 = 4;

/// Bounds of a pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolLimits {
    /// Idle HTTP/1.1 connections per endpoint.
    pub idle: usize,
    /// An idle connection is closed after this.
    pub age: Duration,
    /// A connection must be made within this.
    pub connect: Duration,
}

/// Connections to endpoints. Cloning shares it.
pub struct Pool<D> {
    shared: Arc<Shared<D>>,
}

/// The connections to one endpoint. Cloning shares them; they are closed with the last clone.
pub struct Upstream<D> {
    pool: Arc<Shared<D>>,
    host: Arc<Host>,
}

/// What an endpoint answered.
#[derive(Debug)]
pub enum Sent {
    /// A response; its body keeps the connection busy until its end.
    Response(Response<Body>),
    /// `101 Switching Protocols`.
    Switch(response::Parts, Switch),
}

/// A connection that is about to leave HTTP.
#[derive(Debug)]
pub struct Switch(Lease);

/// No response.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The endpoint cannot be reached.
    #[error("dial {to}: {source}")]
    Dial {
        /// Where to.
        to: std::net::SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
    /// The HTTP/2 connection broke, or what came on it is not HTTP.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// The same of an HTTP/1.1 connection.
    #[error(transparent)]
    Endpoint(#[from] Broken),
}

struct Shared<D> {
    dial: D,
    limits: PoolLimits,
    hosts: Mutex<HashMap<Endpoint, Weak<Host>>>,
    /// Connections that exist, idle or not: while there are any, somebody sweeps.
    alive: Arc<AtomicUsize>,
    swept: AtomicBool,
}

struct Host {
    endpoint: Endpoint,
    shelf: Arc<Shelf>,
    h2: h2::Shared,
}

/// Ends a task with the body that it feeds.
struct Ends(AbortHandle);

// === impl PoolLimits ===

impl Default for PoolLimits {
    fn default() -> Self {
        Self { idle: 1000, age: Duration::from_secs(90), connect: Duration::from_secs(10) }
    }
}

// === impl Pool ===

impl<D: Dial> Pool<D> {
    /// An empty pool.
    #[must_use]
    pub fn new(dial: D, limits: PoolLimits) -> Self {
        let (hosts, alive, swept) = (Mutex::default(), Arc::default(), AtomicBool::new(false));
        Self { shared: Arc::new(Shared { dial, limits, hosts, alive, swept }) }
    }

    /// The connections to an endpoint; to be kept by who sends there often.
    #[must_use]
    pub fn upstream(&self, endpoint: Endpoint) -> Upstream<D> {
        let limits = &self.shared.limits;
        let mut hosts = self.shared.hosts();
        let host = hosts.get(&endpoint).and_then(Weak::upgrade).unwrap_or_else(|| {
            hosts.retain(|_, host| host.strong_count() > 0);
            let shelf = Arc::new(Shelf::new(limits.idle, limits.age));
            let host = Arc::new(Host { endpoint, shelf, h2: h2::Shared::default() });
            hosts.insert(endpoint, Arc::downgrade(&host));
            host
        });
        Upstream { pool: Arc::clone(&self.shared), host }
    }

    /// Whether a connection to there can be made; it is closed at once.
    pub async fn reaches(&self, endpoint: &Endpoint) -> bool {
        self.shared.dial.dial(endpoint).await.is_ok()
    }

    /// Connections that exist, idle or not.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.alive.load(Ordering::Relaxed)
    }
}

impl<D> Clone for Pool<D> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<D> fmt::Debug for Pool<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("connections", &self.shared.alive).finish_non_exhaustive()
    }
}

// === impl Upstream ===

impl<D: Dial> Upstream<D> {
    /// Where its requests go.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        self.host.endpoint
    }

    /// Idle HTTP/1.1 connections.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.host.shelf.idle()
    }

    /// Whether a request probably needs no new connection.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        match self.host.endpoint.protocol {
            Protocol::H1 => self.idle() > 0,
            Protocol::H2c => self.host.h2.has_room(),
        }
    }

    /// Sends a request whose head is already as the endpoint is to see it; waits for the head of the response.
    ///
    /// A request is sent again if, and only if, not a byte of it had been written: its connection turned out to be closed.
    ///
    /// # Errors
    /// [`SendError`]: the endpoint may or may not have seen the request.
    pub async fn send(&self, request: Request<Body>) -> Result<Sent, SendError> {
        match self.host.endpoint.protocol {
            Protocol::H1 => self.send_h1(request).await,
            // Boxed, as is making a connection: what HTTP/1.1 on an open connection does not need is not part of its size.
            Protocol::H2c => Box::pin(self.send_h2(request)).await,
        }
    }

    async fn send_h1(&self, mut request: Request<Body>) -> Result<Sent, SendError> {
        let mut fresh = 0;
        loop {
            let mut lease = match self.host.shelf.take(Instant::now()) {
                Some(lease) => lease,
                None => {
                    fresh += 1;
                    Box::pin(self.pool.connect(&self.host)).await?
                }
            };
            match lease.send(request).await {
                Ok(answer) => return Ok(answered(answer, lease)),
                Err(unanswered) => match unanswered.unsent {
                    Some(unsent) if fresh < FRESH_TRIES => request = *unsent,
                    _ => return Err(unanswered.broken.into()),
                },
            }
        }
    }

    async fn send_h2(&self, mut request: Request<Body>) -> Result<Sent, SendError> {
        let mut tries = 0;
        loop {
            let mut stream = self.pool.stream(&self.host).await?;
            tries += 1;
            let mut error = match stream.sender.try_send_request(request).await {
                Ok(response) => {
                    let counted = stream.counted;
                    return Ok(Sent::Response(response.map(|body| Body::from(body).with(None, counted))));
                }
                Err(error) => error,
            };
            match error.take_message() {
                Some(unsent) if tries < FRESH_TRIES => request = unsent,
                _ => return Err(error.into_error().into()),
            }
        }
    }
}

/// Decides who drives the connection from here on.
fn answered(Answer { response, whole }: Answer, lease: Lease) -> Sent {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Sent::Switch(response.into_parts().0, Switch(lease));
    }
    let body = match whole {
        _ if lease.is_sending() => {
            // The response has overtaken its request: both must go on whoever reads or does not read.
            let (to, frames) = mpsc::channel(1);
            let length = whole.as_ref().map(|whole| whole.len() as u64).or_else(|| lease.left());
            let ends = Ends(tokio::spawn(pipe(lease, whole, to).boxed()).abort_handle());
            Body::piped(Piped { frames, length }).with(None, ends)
        }
        Some(whole) => {
            lease.give_back();
            Body::from(whole)
        }
        None => Body::leased(lease),
    };
    Sent::Response(response.map(|()| body))
}

/// Drives both directions of a connection until the response is over: who reads it has no use for the rest of the request.
async fn pipe(mut lease: Lease, whole: Option<Bytes>, to: mpsc::Sender<Result<Frame<Bytes>, Broken>>) {
    let mut first = whole.map(|whole| Ok(Frame::data(whole)));
    loop {
        let room = tokio::select! {
            biased;
            room = to.reserve() => room,
            never = async { lease.sent().await; std::future::pending().await } => never,
        };
        let Ok(room) = room else { return };
        match first.take() {
            Some(frame) => room.send(frame),
            None => {
                let Some(frame) = poll_fn(|cx| lease.poll_frame(cx)).await else { return };
                if lease.is_end() && !lease.is_sending() {
                    // Before it is sent: who reads the last frame ends this task.
                    lease.give_back();
                    return room.send(frame);
                }
                room.send(frame);
            }
        }
    }
}

impl<D> Clone for Upstream<D> {
    fn clone(&self) -> Self {
        Self { pool: Arc::clone(&self.pool), host: Arc::clone(&self.host) }
    }
}

impl<D> fmt::Debug for Upstream<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").field("endpoint", &self.host.endpoint).finish_non_exhaustive()
    }
}

// === impl Switch ===

impl Switch {
    /// The bare stream, and what has been read of it beyond the head.
    #[must_use]
    pub fn open(self) -> (TcpStream, Bytes) {
        self.0.leave_http()
    }
}

// === impl Shared ===

impl<D: Dial> Shared<D> {
    async fn connect(self: &Arc<Self>, host: &Host) -> Result<Lease, SendError> {
        let (stream, alive) = self.dial(host).await?;
        Ok(Lease::new(stream, Arc::downgrade(&host.shelf), alive))
    }

    async fn stream(self: &Arc<Self>, host: &Host) -> Result<h2::Stream, SendError> {
        if let Some(stream) = host.h2.take(Instant::now()) {
            return Ok(stream);
        }
        let failures = host.h2.failures().0;
        let _alone = host.h2.dialling.lock().await;
        if let Some(stream) = host.h2.take(Instant::now()) {
            return Ok(stream);
        }
        if let Some(source) = host.h2.failed_since(failures) {
            return Err(SendError::Dial { to: host.endpoint.addr, source });
        }
        let (stream, alive) = match self.dial(host).await {
            Err(SendError::Dial { to, source }) => {
                host.h2.failed(&source);
                return Err(SendError::Dial { to, source });
            }
            dialled => dialled?,
        };
        Ok(host.h2.add(stream, alive).await?)
    }

    async fn dial(self: &Arc<Self>, host: &Host) -> Result<(TcpStream, Alive), SendError> {
        let to = host.endpoint.addr;
        let failed = |source| SendError::Dial { to, source };
        let dialled = timeout(self.limits.connect, self.dial.dial(&host.endpoint)).await;
        let stream = dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let alive = Alive::new(&self.alive);
        self.keep_swept();
        Ok((stream, alive))
    }

    /// Sweeps from time to time as long as there are connections; without any, nothing runs.
    fn keep_swept(self: &Arc<Self>) {
        if self.swept.swap(true, Ordering::AcqRel) {
            return;
        }
        let (pool, every) = (Arc::downgrade(self), self.limits.age / SWEEPS);
        tokio::spawn(
            async move {
                loop {
                    sleep(every).await;
                    let Some(pool) = pool.upgrade() else { return };
                    let now = Instant::now();
                    let hosts: Vec<Arc<Host>> = pool.hosts().values().filter_map(Weak::upgrade).collect();
                    for host in hosts {
                        host.shelf.sweep(now);
                        host.h2.sweep(pool.limits.age, now);
                    }
                    if pool.alive.load(Ordering::Acquire) == 0 {
                        pool.swept.store(false, Ordering::Release);
                        // Who connected just now saw the task running: it goes on.
                        if pool.alive.load(Ordering::Acquire) == 0 || pool.swept.swap(true, Ordering::AcqRel) {
                            return;
                        }
                    }
                }
            }
            .boxed(),
        );
    }
}

impl<D> Shared<D> {
    fn hosts(&self) -> MutexGuard<'_, HashMap<Endpoint, Weak<Host>>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Ends ===

impl Keep for Ends {}

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}
