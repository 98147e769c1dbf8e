//! What tests run in pods: a small app of HTTP/1.1 and h2c, in this very program.
//!
//! | request | answer |
//! |---|---|
//! | `GET /` | who it is, and the request's headers, as JSON |
//! | `GET /sleep/MS` | `slept`, after so long |
//! | `POST /once/ID` | `done`, after 20 ms; it is counted |
//! | `GET /counts` | `{"posts": how many ids, "twice": [ids that came more than once]}` |
//! | `GET /stream` | `.` each 50 ms, for ever |

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{
    body::{Body, Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use serde_json::json;
use tokio::{
    net::TcpListener,
    time::{Interval, interval, sleep},
};

use crate::harness::Outcome;

/// The argument by which this program is the app; behind it stand addresses to listen on.
pub(crate) const APP: &str = "app";

/// Work of a request that is counted.
const WORK: Duration = Duration::from_millis(20);

/// How often each id was POSTed.
type Counts = Arc<Mutex<BTreeMap<String, u32>>>;

/// A dot now and then.
struct Dots(Interval);

/// Serves until it is killed.
pub(crate) fn run(addresses: impl Iterator<Item = String>) -> ExitCode {
    let served = || -> Outcome {
        tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
            let counts = Counts::default();
            for address in addresses {
                let listener = TcpListener::bind(address.parse::<SocketAddr>()?).await?;
                tokio::spawn(serve(listener, counts.clone()));
            }
            // As first process of its container it would not hear SIGTERM.
            let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
            term.recv().await;
            Ok(())
        })
    };
    match served() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("app: {}", why.message().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

async fn serve(listener: TcpListener, counts: Counts) {
    while let Ok((stream, _)) = listener.accept().await {
        let counts = counts.clone();
        let service = service_fn(move |request| {
            let counts = counts.clone();
            async move { Ok::<_, Infallible>(answer(request, &counts).await) }
        });
        tokio::spawn(async move {
            // Whoever goes away is no matter here.
            let _gone = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(request: Request<Incoming>, counts: &Counts) -> Response<BoxBody<Bytes, Infallible>> {
    let lock = || counts.lock().unwrap_or_else(PoisonError::into_inner);
    let path = request.uri().path();
    match (request.method(), path.split('/').nth(1).unwrap_or_default(), path.rsplit('/').next().unwrap_or_default()) {
        (&Method::GET, "sleep", time) => {
            sleep(Duration::from_millis(time.parse().unwrap_or_default())).await;
            text("slept".into())
        }
        (&Method::POST, "once", id) => {
            *lock().entry(id.to_owned()).or_default() += 1;
            sleep(WORK).await;
            text("done".into())
        }
        (&Method::GET, "counts", _) => {
            let counts = lock();
            let twice: Vec<&String> = counts.iter().filter(|(_, count)| **count > 1).map(|(id, _)| id).collect();
            text(json!({"posts": counts.len(), "twice": twice}).to_string())
        }
        (&Method::GET, "stream", _) => Response::new(Dots(interval(Duration::from_millis(50))).boxed()),
        (_, "", _) => {
            let headers: BTreeMap<&str, String> = request
                .headers()
                .iter()
                .map(|(name, value)| (name.as_str(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
                .collect();
            let version = format!("{:?}", request.version());
            let uid = rustix::process::geteuid().as_raw();
            text(json!({"uid": uid, "version": version, "headers": headers}).to_string())
        }
        _ => {
            let mut nothing = text("nothing here".into());
            *nothing.status_mut() = StatusCode::NOT_FOUND;
            nothing
        }
    }
}

fn text(text: String) -> Response<BoxBody<Bytes, Infallible>> {
    Response::new(Full::from(text).boxed())
}

// === impl Dots ===

impl Body for Dots {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_tick(cx).map(|_| Some(Ok(Frame::data(Bytes::from_static(b".")))))
    }
}
