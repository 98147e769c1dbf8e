//! Connections that have left HTTP: bytes both ways, until both sides have ended.

use std::{
    future::poll_fn,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split},
    net::TcpStream,
    sync::watch,
    time::timeout,
};

use crate::{
    timeouts::{Clock, Expired},
    upstream::Switch,
};

/// Of each direction.
const BUFFER: usize = 16 << 10;
/// A tunnel that cannot be opened on the client's side within this is given up.
const OPENING: Duration = Duration::from_secs(10);

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

    /// Opens a tunnel; `kept` is dropped when it has ended.
    pub(super) fn open<K: Send + 'static>(&self, client: OnUpgrade, endpoint: Switch, clock: Option<Clock>, kept: K) {
        let mut cut = self.cut.subscribe();
        tokio::spawn(async move {
            tokio::select! {
                ended = tunnel(client, endpoint, clock) => if let Err(error) = ended {
                    tracing::debug!(%error, "tunnel ended");
                },
                _ = cut.wait_for(|cut| *cut) => tracing::debug!("tunnel cut off"),
            }
            drop((kept, cut));
        });
    }
}

impl Default for Tunnels {
    fn default() -> Self {
        Self::new()
    }
}

async fn tunnel(client: OnUpgrade, endpoint: Switch, clock: Option<Clock>) -> io::Result<()> {
    // The client's side opens when the head of the 101 has been written, so both are waited for at once.
    let both = async { tokio::join!(client, endpoint.open()) };
    let (client, (endpoint, first)) = timeout(OPENING, both).await.map_err(|_late| io::ErrorKind::TimedOut)?;
    let client = client.map_err(io::Error::other)?;
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
    let up = copy(from_client, to_endpoint, || Ok(()));
    let down = copy(first.chain(from_endpoint), to_client, wrote);
    tokio::try_join!(up, down).map(|_| ())
}

async fn copy<R, W>(mut from: R, mut to: W, passed: impl Fn() -> io::Result<()>) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        passed()?;
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

fn lock(clock: &Mutex<Clock>) -> std::sync::MutexGuard<'_, Clock> {
    clock.lock().unwrap_or_else(PoisonError::into_inner)
}
