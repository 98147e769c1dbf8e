//! Connections that have left HTTP: bytes both ways, until both sides have ended, or one has and the other says nothing more.

use std::{
    future::poll_fn,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split},
    net::TcpStream,
    sync::{Notify, watch},
    time::{sleep, timeout},
};

use crate::{
    head::Peer,
    timeouts::{Clock, Expired},
    upstream::{Keep, Switch},
};

/// Of each direction.
const BUFFER: usize = 16 << 10;
/// A tunnel that cannot be opened on the client's side within this is given up.
const OPENING: Duration = Duration::from_secs(10);
/// A tunnel of which one side has ended is over when nothing has come from the other for this long, or twice as long at most.
/// What speaks over a tunnel mostly ends both sides together; a client that is gone without a word must not keep a place.
const LINGER: Duration = Duration::from_secs(60);

/// What is dropped with a tunnel though it came when the tunnel was open already; none: it has ended. An extension of a `101`.
#[derive(Clone)]
pub(super) struct Carried(Arc<Mutex<Option<Kept>>>);

type Kept = Vec<Box<dyn Keep>>;

/// What has passed through a tunnel.
#[derive(Debug, Default)]
struct Passed {
    bytes: AtomicU64,
    one_ended: Notify,
}

/// All tunnels of a server: how many there are, and the word to end. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Tunnels {
    /// Its receivers are the tunnels.
    cut: Arc<watch::Sender<bool>>,
}

// === impl Tunnels ===

impl Tunnels {
    /// No tunnel yet.
    #[must_use]
    pub fn new() -> Self {
        Self { cut: Arc::new(watch::Sender::new(false)) }
    }

    /// Tunnels that are open.
    #[must_use]
    pub fn count(&self) -> usize {
        self.cut.receiver_count()
    }

    /// Waits until all have ended by themselves, at most for `patience`; then cuts off those that are left.
    pub async fn end(&self, patience: Duration) {
        if timeout(patience, self.cut.closed()).await.is_err() {
            self.cut.send_replace(true);
            self.cut.closed().await;
        }
    }

    /// Opens a tunnel; `kept` is dropped when it has ended, and so is what is carried along later.
    pub(super) fn open<K: Keep>(
        &self,
        peer: &Peer,
        (client, endpoint): (OnUpgrade, Switch),
        clock: Option<Clock>,
        kept: K,
    ) -> Carried {
        let mut cut = self.cut.subscribe();
        let carried = Carried(Arc::new(Mutex::new(Some(Vec::new()))));
        // The connection's place among the clients' connections: it is still one of them.
        let (place, carries) = (peer.held(), carried.clone());
        tokio::spawn(
            async move {
                let whole = tokio::select! {
                    ended = tunnel(client, endpoint, clock) => match ended {
                        Ok(()) => true,
                        Err(error) => {
                            tracing::debug!(%error, "tunnel ended");
                            false
                        }
                    },
                    _ = cut.wait_for(|cut| *cut) => {
                        tracing::debug!("tunnel cut off");
                        false
                    }
                };
                carries.end(whole);
                drop((kept, place, cut));
            }
            .boxed(),
        );
        carried
    }
}

impl Default for Tunnels {
    fn default() -> Self {
        Self::new()
    }
}

// === impl Carried ===

impl Carried {
    pub(super) fn add<K: Keep>(&self, mut kept: K) {
        if let Some(carried) = &mut *lock(&self.0) {
            carried.push(Box::new(kept));
            return;
        }
        kept.whole();
    }

    fn end(&self, whole: bool) {
        let mut carried = lock(&self.0).take().unwrap_or_default();
        if whole {
            carried.iter_mut().for_each(|kept| kept.whole());
        }
    }
}

// === impl Passed ===

impl Passed {
    /// Resolves when one side has ended and the other has nothing more to say.
    async fn lingered(&self) {
        self.one_ended.notified().await;
        loop {
            let before = self.bytes.load(Ordering::Relaxed);
            sleep(LINGER).await;
            if self.bytes.load(Ordering::Relaxed) == before {
                return;
            }
        }
    }
}

async fn tunnel(client: OnUpgrade, endpoint: Switch, clock: Option<Clock>) -> io::Result<()> {
    let (endpoint, first) = endpoint.open();
    // Opens when the head of the 101 has been written.
    let client = timeout(OPENING, client).await.map_err(|_late| io::ErrorKind::TimedOut)?.map_err(io::Error::other)?;
    let clock = clock.map(Mutex::new);
    tokio::select! {
        ended = pass(client, endpoint, &first, clock.as_ref()) => ended,
        expired = rings(clock.as_ref()) => Err(io::Error::new(io::ErrorKind::TimedOut, expired)),
    }
}

async fn pass(client: Upgraded, mut endpoint: TcpStream, first: &[u8], clock: Option<&Mutex<Clock>>) -> io::Result<()> {
    let (from_client, to_client) = split(TokioIo::new(client));
    let (from_endpoint, to_endpoint) = endpoint.split();
    let wrote = || match clock {
        Some(clock) => lock(clock).wrote().map_err(|expired| io::Error::new(io::ErrorKind::TimedOut, expired)),
        None => Ok(()),
    };
    let passed = Passed::default();
    let up = copy(from_client, to_endpoint, &passed, || Ok(()));
    let down = copy(first.chain(from_endpoint), to_client, &passed, wrote);
    tokio::select! {
        ended = async { tokio::try_join!(up, down) } => ended.map(|_| ()),
        () = passed.lingered() => Err(io::Error::new(io::ErrorKind::TimedOut, "one side has ended, the other is silent")),
    }
}

async fn copy<R, W>(mut from: R, mut to: W, passed: &Passed, heard: impl Fn() -> io::Result<()>) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            passed.one_ended.notify_one();
            return to.shutdown().await;
        }
        passed.bytes.fetch_add(length as u64, Ordering::Relaxed);
        heard()?;
        to.write_all(&buffer[..length]).await?;
        to.flush().await?;
    }
}

async fn rings(clock: Option<&Mutex<Clock>>) -> Expired {
    // Asked again at each poll of the tunnel, so a byte that comes meanwhile puts it off.
    match clock {
        Some(clock) => poll_fn(|cx| lock(clock).poll_expired(cx)).await,
        None => std::future::pending().await,
    }
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
