//! Requests at a steady rate, each counted, none sent twice, on connections of their own and on kept ones; and streams.
//!
//! The rate does not wait for answers: who is late is followed by others. A request ends as answered (200 and the whole body) or
//! not, whatever the reason, a refused connection and a 503 included.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{sleep_until, timeout},
};

use crate::harness::Outcome;

/// Nobody waits longer for an answer of 20 ms.
const LATE: Duration = Duration::from_secs(20);
/// What is due and was not sent is made up for so far back, and what was due before is not sent at all: all that a machine misses
/// while it stands still would fill the function's queue at once. The number sent shows how much that is.
const MADE_UP: Duration = Duration::from_millis(100);
/// Of so many requests one is a POST, and half of the others come on a connection of their own.
const POST_EACH: u64 = 10;
/// Streams in flight all the time.
const STREAMS: usize = 4;

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) to: SocketAddr,
    pub(crate) host: String,
    pub(crate) per_second: u32,
    pub(crate) lasts: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Road {
    Fresh,
    Kept,
    Post,
}

/// What became of a request.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) road: Road,
    /// When its connection was asked for: for a kept one that was earlier.
    pub(crate) connected: Instant,
    pub(crate) began: Instant,
    /// So much later than it was to begin: the machine, or the load, stood still.
    pub(crate) late: Duration,
    pub(crate) ended: Instant,
    /// `None`: answered.
    pub(crate) fault: Option<String>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub(crate) sent: Vec<Sent>,
    /// Streams that broke off, and when.
    pub(crate) cut: Vec<Instant>,
}

/// Connections that wait for their next request.
type Idle = Arc<Mutex<Vec<Connection>>>;

/// One, and when it was asked for.
struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    since: Instant,
}

// === impl Record ===

impl Record {
    pub(crate) fn unanswered(&self) -> impl Iterator<Item = &Sent> {
        self.sent.iter().filter(|sent| sent.fault.is_some())
    }

    /// Share of requests that were answered.
    pub(crate) fn answered(&self) -> f64 {
        let count = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
        1.0 - count(self.unanswered().count()) / count(self.sent.len().max(1))
    }
}

/// Sends for as long as is planned, and until `ended`; `started` is told when the first goes out.
pub(crate) async fn run(
    plan: Plan,
    started: tokio::sync::oneshot::Sender<()>,
    ended: Arc<AtomicBool>,
) -> Outcome<Record> {
    let (idle, cut, over) = (Idle::default(), Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        streams.spawn(stream(plan.clone(), cut.clone(), over.clone()));
    }
    let begin = Instant::now();
    let next = AtomicU64::new(0);
    let mut due = tokio::time::Instant::now();
    let (mut sending, mut record) = (JoinSet::new(), Record::default());
    started.send(()).map_err(|()| "nobody waits for the load")?;
    while begin.elapsed() < plan.lasts || !ended.load(Ordering::Relaxed) {
        sleep_until(due).await;
        let wanted = due.into_std();
        due = due.max(tokio::time::Instant::now() - MADE_UP) + Duration::from_secs(1) / plan.per_second;
        let number = next.fetch_add(1, Ordering::Relaxed);
        sending.spawn(one(plan.clone(), number, wanted, idle.clone()));
        while let Some(sent) = sending.try_join_next() {
            record.sent.push(sent?);
        }
    }
    while let Some(sent) = sending.join_next().await {
        record.sent.push(sent?);
    }
    over.store(true, Ordering::Relaxed);
    streams.shutdown().await;
    record.cut.append(&mut cut.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(record)
}

async fn one(plan: Plan, number: u64, wanted: Instant, idle: Idle) -> Sent {
    let road = match number % POST_EACH {
        0 => Road::Post,
        other if other % 2 == 0 => Road::Kept,
        _ => Road::Fresh,
    };
    let (kept, began) = (if road == Road::Kept { take(&idle) } else { None }, Instant::now());
    let connected = kept.as_ref().map_or(began, |kept| kept.since);
    let fault = match timeout(LATE, exchange(&plan, road, number, kept, &idle)).await {
        Ok(Ok(())) => None,
        Ok(Err(why)) => Some(why.message().unwrap_or_default().to_owned()),
        Err(_late) => Some(format!("no answer in {LATE:?}")),
    };
    Sent { road, connected, began, late: began.saturating_duration_since(wanted), ended: Instant::now(), fault }
}

/// A connection that waits, unless the other end has closed it meanwhile.
fn take(idle: &Idle) -> Option<Connection> {
    let mut idle = idle.lock().unwrap_or_else(PoisonError::into_inner);
    idle.retain(|kept| kept.sender.is_ready());
    idle.pop()
}

async fn exchange(plan: &Plan, road: Road, number: u64, kept: Option<Connection>, idle: &Idle) -> Outcome {
    let mut connection = match kept {
        Some(kept) => kept,
        None => Connection { since: Instant::now(), sender: connect(plan.to).await? },
    };
    let request = match road {
        Road::Post => Request::post(format!("/once/{number}")).header("content-length", "0"),
        Road::Fresh | Road::Kept => Request::get("/sleep/20"),
    };
    let request = request.header("host", &plan.host).body(Empty::new())?;
    let response = connection.sender.send_request(request).await.map_err(|error| format!("no answer: {error:?}"))?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|error| format!("broken off: {error:?}"))?.to_bytes();
    let whole = body == if road == Road::Post { "done" } else { "slept" };
    if status != StatusCode::OK || !whole {
        return Err(format!("{status}: {}", String::from_utf8_lossy(&body)).into());
    }
    if road == Road::Kept && connection.sender.ready().await.is_ok() {
        idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }
    Ok(())
}

async fn connect(to: SocketAddr) -> Outcome<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(to).await.map_err(|error| format!("no connection: {error}"))?;
    stream.set_nodelay(true)?;
    // 300 of these a second that waited out their minute would fill the ports: each connect(2) would search for a free one, and
    // the load would be the bottleneck.
    stream.set_zero_linger()?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Reads a stream, and the next one when it breaks off.
async fn stream(plan: Plan, cut: Arc<Mutex<Vec<Instant>>>, over: Arc<AtomicBool>) {
    let reading = async || -> Outcome {
        let mut sender = connect(plan.to).await?;
        let request = Request::get("/stream").header("host", &plan.host).body(Empty::new())?;
        let mut body = sender.send_request(request).await?.into_body();
        while let Some(frame) = body.frame().await {
            frame?;
        }
        Ok(())
    };
    while !over.load(Ordering::Relaxed) {
        drop(reading().await);
        cut.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
