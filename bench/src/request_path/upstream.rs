//! The container of uploads and of gRPC: hyper on one thread.
//!
//! It counts a body's bytes and answers with their number, and gives a gRPC message back as it came.

use std::{
    convert::Infallible,
    fs,
    net::SocketAddr,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Request, Response, header};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpStream};

use super::contestant::{Contestant, free};

/// One gRPC message of 32 bytes: not compressed, its length, a field of bytes.
pub(super) const MESSAGE: &[u8] = b"\x00\x00\x00\x00\x20\x0a\x1e123456789012345678901234567890";

/// What is read of an upload at once.
const READ: usize = 256 << 10;

static CALLS: AtomicU64 = AtomicU64::new(0);

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// Starts it.
pub(super) fn start() -> anyhow::Result<Contestant> {
    let at = free()?;
    let mut command = Command::new("/proc/self/exe");
    command.args(["request-path", "--part", "request-path-upstream"]).env("LIFL_BENCH_LISTEN", at.to_string());
    Contestant::start("direct", at, &mut command)
}

/// The message as a file.
pub(super) fn message(folder: &Path) -> anyhow::Result<std::path::PathBuf> {
    let file = folder.join("message");
    fs::write(&file, MESSAGE)?;
    Ok(file)
}

/// Part `request-path-upstream` of this binary.
pub(crate) fn upstream() -> anyhow::Result<()> {
    let at: SocketAddr = std::env::var("LIFL_BENCH_LISTEN").context("started by the bench")?.parse()?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let listener = TcpListener::bind(at).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(connection(stream));
        }
    })
}

async fn connection(stream: TcpStream) {
    let mut first = [0; 3];
    // Long enough to be told from any method.
    let http2 = matches!(stream.peek(&mut first).await, Ok(3..)) && first == *b"PRI";
    let service = service_fn(|request| async move { Ok::<_, Infallible>(answer(request).await) });
    let io = TokioIo::new(stream);
    // A connection that fails is a request that fails: the client says so.
    if http2 {
        let _ =
            http2::Builder::new(TokioExecutor::new()).max_concurrent_streams(1000).serve_connection(io, service).await;
    } else {
        let _ = http1::Builder::new().max_buf_size(READ).serve_connection(io, service).await;
    }
}

async fn answer(request: Request<Incoming>) -> Answer {
    CALLS.fetch_add(1, Ordering::Relaxed);
    let grpc =
        request.headers().get(header::CONTENT_TYPE).is_some_and(|of| of.as_bytes().starts_with(b"application/grpc"));
    let count = request.uri().path() == "/count";
    let mut body = request.into_body();
    if grpc {
        let Ok(message) = body.collect().await else { return text("broken off".to_owned()) };
        return echo(message.to_bytes());
    }
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return text("broken off".to_owned()) };
        bytes += frame.data_ref().map_or(0, Bytes::len);
    }
    text(if count { CALLS.load(Ordering::Relaxed).to_string() } else { bytes.to_string() })
}

fn text(text: String) -> Answer {
    Response::new(Full::new(Bytes::from(text)).boxed_unsync())
}

fn echo(message: Bytes) -> Answer {
    let trailers =
        HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
    let frames = [Ok(Frame::data(message)), Ok(Frame::trailers(trailers))];
    let mut response = Response::new(StreamBody::new(stream::iter(frames)).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// One call through `at`: message and status must come back.
pub(super) fn check(at: SocketAddr) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let stream = TcpStream::connect(at).await?;
        let (mut sender, driver) =
            hyper::client::conn::http2::handshake::<_, _, Full<Bytes>>(TokioExecutor::new(), TokioIo::new(stream))
                .await?;
        let driver = tokio::spawn(driver);
        let request = Request::post(format!("http://{at}/bench.Echo/Echo"))
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::TE, "trailers")
            .body(Full::new(Bytes::from_static(MESSAGE)))?;
        let response = sender.send_request(request).await?;
        ensure!(response.status() == 200, "{at} answered {}", response.status());
        let body = response.into_body().collect().await?;
        let status = body.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned();
        ensure!(status.is_some_and(|status| status == "0"), "{at}: no grpc-status");
        ensure!(body.to_bytes() == MESSAGE, "{at}: another message");
        driver.abort();
        Ok(())
    })
}
