//! One hop, to be held against nginx or haproxy: `hop LISTEN ENDPOINT [bare | CC] [THREADS | apart]`.
//!
//! `bare` passes on and nothing else; a number is all that queue-proxy does with this concurrency (0: no limit) and
//! Knative's default timeout of 300 s. `apart`: two threads with a runtime each, which share the listener and the pool.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use http::{Request, Response};
use lifl_proxy::{
    Body, Direct, Endpoint, Handle, Limits, Peer, Pool, PoolLimits, Protocol, Ride, Server, Timeouts, Tunnels,
    Upstream, forward,
    queue::{Queue, Settings},
    reply,
};
use mimalloc::MiMalloc;
use tokio::{net::TcpListener, runtime::Builder};

/// As the gateway's process has it.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

struct Bare {
    http1: Upstream<Direct>,
    h2c: Upstream<Direct>,
    tunnels: Tunnels,
}

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [listen, endpoint, rest @ ..] = &*words else {
        anyhow::bail!("hop LISTEN ENDPOINT [bare | CC] [THREADS | apart]")
    };
    let endpoint: SocketAddr = endpoint.parse().context("endpoint")?;
    let concurrency = rest.first().filter(|word| *word != "bare").map(|word| word.parse()).transpose()?;
    let pool = Pool::new(Direct, PoolLimits::default());
    let listener = std::net::TcpListener::bind(listen)?;
    listener.set_nonblocking(true)?;
    if rest.get(1).is_none_or(|word| word != "apart") {
        let threads = rest.get(1).map_or(Ok(2), |word| word.parse()).context("threads")?;
        let runtime = Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
        return runtime.block_on(serve(&pool, listener, endpoint, concurrency));
    }
    let threads = (0..2).map(|_| {
        let (pool, listener) = (pool.clone(), listener.try_clone()?);
        Ok(std::thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(serve(&pool, listener, endpoint, concurrency))
        }))
    });
    for thread in threads.collect::<anyhow::Result<Vec<_>>>()? {
        thread.join().map_err(|_panic| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(())
}

async fn serve(
    pool: &Pool<Direct>,
    listener: std::net::TcpListener,
    endpoint: SocketAddr,
    concurrency: Option<usize>,
) -> anyhow::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let Some(concurrency) = concurrency else {
        let at = |protocol| pool.upstream(Endpoint::plain(endpoint, protocol));
        let bare = Bare { http1: at(Protocol::H1), h2c: at(Protocol::H2c), tunnels: Tunnels::new() };
        Server::new(Arc::new(bare), Limits::default()).listen(&listener).await;
        return Ok(());
    };
    let timeouts = Timeouts { total: Duration::from_secs(300), ..Timeouts::default() };
    let pod_name = "hop".to_owned();
    let settings = Settings { pod_name, concurrency, timeouts, readiness: vec![], http2_auto_detect: false };
    let queue = Queue::new(pool, endpoint, 0, settings);
    Server::new(Arc::new(queue), Limits::default()).listen(&listener).await;
    Ok(())
}

// === impl Bare ===

impl Handle for Bare {
    async fn handle(&self, request: Request<Body>, peer: &Peer) -> Response<Body> {
        let upstream = if request.version() == http::Version::HTTP_2 { &self.h2c } else { &self.http1 };
        let ride = Ride { peer, clock: None, kept: (), tunnels: &self.tunnels };
        forward(upstream, request, ride).await.unwrap_or_else(|error| reply::error(error.status(), &error.to_string()))
    }
}
