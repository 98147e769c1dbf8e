//! The opponents: hyper with the gateway's settings, in a process of its own.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use lifl_daemon::{Channel, SyncChannel, take_stdin};
use lifl_fold::{Dtype, Input, add_f32};
use lifl_shm::{Segment, SegmentSpec, SlotWriter};
use tokio::net::TcpListener;

use super::{
    Cost,
    http::{Connection, Upload, load},
    model::Updates,
    processes,
};

/// As the gateway has it.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);

/// Which opponent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opponent {
    /// Reads and drops.
    Sink,
    /// Stores each body in fresh memory, then adds it.
    Store,
}

/// An opponent at work.
pub(super) struct Server {
    opponent: Opponent,
    address: SocketAddr,
    /// The server ends when this is gone.
    control: Option<SyncChannel>,
    process: Child,
}

/// The sum of store-then-add, and its floats' place in a body.
struct Sum {
    floats: usize,
    sum: Vec<f32>,
}

type Shared = Arc<Mutex<Sum>>;

/// Part `ingest-sink` of this binary.
pub(crate) fn sink() -> anyhow::Result<()> {
    serve(Opponent::Sink)
}

/// Part `ingest-store` of this binary.
pub(crate) fn store() -> anyhow::Result<()> {
    serve(Opponent::Store)
}

fn serve(opponent: Opponent) -> anyhow::Result<()> {
    let control = SyncChannel::new(take_stdin().context("started by the bench")?);
    let ((floats, elements), _) = control.recv::<(usize, usize)>()?.context("no bench")?;
    let sum: Shared = Arc::new(Mutex::new(Sum { floats, sum: vec![0.0; elements] }));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
    let address = listener.local_addr()?;
    runtime.spawn(accept(listener, opponent, sum));
    control.send(&address, &[])?;
    // Until the bench is gone.
    control.recv::<()>()?;
    Ok(())
}

async fn accept(listener: TcpListener, opponent: Opponent, sum: Shared) {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).half_close(false);
    let builder = Arc::new(builder);
    while let Ok((stream, _)) = listener.accept().await {
        let (builder, sum) = (Arc::clone(&builder), Arc::clone(&sum));
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let sum = Arc::clone(&sum);
                async move { Ok::<_, Infallible>(answer(opponent, &sum, request).await) }
            });
            // A connection that fails is a request that fails: the client says so.
            let _ = stream.set_nodelay(true);
            let _ = builder.serve_connection(TokioIo::new(stream), answer).await;
        });
    }
}

async fn answer(opponent: Opponent, sum: &Shared, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let done = match (opponent, request.method() == Method::POST) {
        (Opponent::Sink, true) => discard(request).await,
        (Opponent::Store, true) => store_then_add(sum, request).await,
        (_, false) => take_sum(sum),
    };
    let (status, body) = match done {
        Ok(body) => (StatusCode::ACCEPTED, body),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, Bytes::from(format!("{error:#}"))),
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
}

async fn discard(request: Request<Incoming>) -> anyhow::Result<Bytes> {
    let mut body = request.into_body();
    while let Some(frame) = body.frame().await {
        drop(frame?);
    }
    Ok(Bytes::new())
}

async fn store_then_add(sum: &Shared, request: Request<Incoming>) -> anyhow::Result<Bytes> {
    let header = |name: &str| request.headers().get(name)?.to_str().ok()?.parse::<u64>().ok();
    let length = header("content-length").context("no length")?;
    let weight = u16::try_from(header("weight").context("no weight")?)?;
    let mut slot = tokio::task::spawn_blocking(move || fresh(length)).await??;
    let mut body = request.into_body();
    let mut at = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        let to = slot.payload_mut().get_mut(at..at + data.len()).context("more than was announced")?;
        to.copy_from_slice(&data);
        at += data.len();
    }
    let length = usize::try_from(length)?;
    ensure!(at == length, "{at} bytes of {length}");
    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
    let floats = slot.payload().get(sum.floats..length).context("no floats")?;
    ensure!(floats.len() == sum.sum.len() * size_of::<f32>(), "another model");
    add_f32(&mut sum.sum, &[Input { bytes: floats, dtype: Dtype::F32, factor: f32::from(weight) }]);
    Ok(Bytes::new())
}

/// New memory, as an implementation without a pool takes it for every body.
fn fresh(bytes: u64) -> anyhow::Result<SlotWriter> {
    let (segment, _fd) =
        Segment::create(SegmentSpec { chain: 1, writer: 0, slots: 1, payload_bytes: bytes, max_runs: 1 })?;
    segment.reserve().context("a new segment is full")
}

/// The sum since the last time; it begins anew.
fn take_sum(sum: &Shared) -> anyhow::Result<Bytes> {
    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
    let bytes = sum.sum.iter().flat_map(|x| x.to_le_bytes()).collect();
    sum.sum.fill(0.0);
    Ok(bytes)
}

// === impl Server ===

impl Server {
    pub(super) fn start(opponent: Opponent, updates: &Updates) -> anyhow::Result<Self> {
        let part = match opponent {
            Opponent::Sink => "ingest-sink",
            Opponent::Store => "ingest-store",
        };
        let (ours, theirs) = Channel::pair()?;
        let process = Command::new("/proc/self/exe")
            .args(["ingest", "--part", part])
            .stdin(Stdio::from(theirs))
            .spawn()
            .with_context(|| format!("cannot start {part}"))?;
        let control = SyncChannel::new(ours);
        control.send(&updates.floats(), &[])?;
        let Some((address, _)) = control.recv()? else { bail!("{part} did not start") };
        Ok(Self { opponent, address, control: Some(control), process })
    }

    /// So many updates over so many connections; what one cost.
    pub(super) fn turn(&mut self, updates: &Updates, count: usize, connections: usize) -> anyhow::Result<Cost> {
        let uploads: Vec<_> = (0..count)
            .map(|i| Upload { headers: format!("weight: {}\r\n", Updates::weight(i)), body: updates.body(i) })
            .collect();
        let pid = self.process.id();
        let before = processes::cpu([pid])?;
        let load = load(self.address, "/", &uploads, connections)?;
        let cpu = processes::cpu([pid])? - before;
        if self.opponent == Opponent::Store {
            let answer = Connection::open(self.address)?.call("GET", "/", "", &[])?;
            ensure!(answer.status == 202, "the sum is not to be had: {}", answer.status);
            updates.check(&answer.body, count, 1.0 / Updates::total_weight(count))?;
        }
        Ok(Cost { seconds: (load.last - load.first).as_secs_f64() / count as f64, cpu: cpu / count as f64 })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.control = None;
        // It ends by itself; whatever it says of it changes nothing here.
        let _ = self.process.wait();
    }
}
