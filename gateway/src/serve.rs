//! The public port: connections, routes, answers.

use std::{convert::Infallible, os::fd::OwnedFd, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
};

use crate::{
    problem::{Code, Refusal},
    state::Gateway,
};

mod auth;
mod control;
mod first;
mod model;
mod paced;
mod task;
mod update;
mod upload;

use paced::Paced;

/// Streams of one HTTP/2 connection.
const STREAMS: u32 = 64;
/// What an HTTP/2 client may send of one upload before it is read.
const WINDOW: u32 = 1 << 20;
/// A listener out of descriptors is asked again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A response's body.
pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// Serves until `end`, then until requests under way are answered. `theirs`: the coordinator's listener, as it comes and goes.
pub(crate) async fn run(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    mut theirs: mpsc::UnboundedReceiver<Option<OwnedFd>>,
    end: impl Future<Output = ()>,
) {
    let mut end = std::pin::pin!(end);
    let places = Arc::new(Semaphore::new(gateway.config.max_connections));
    // Closed when the last connection has dropped its end.
    let (alive, mut all_gone) = mpsc::channel::<Infallible>(1);
    let server = Arc::new(builder(&gateway));
    let mut coordinators: Option<TcpListener> = None;
    loop {
        let accepted = tokio::select! {
            () = &mut end => break,
            Some(listener) = theirs.recv() => {
                coordinators = listener.and_then(listen);
                continue;
            }
            accepted = accept(&listener, coordinators.as_ref(), &places) => accepted,
        };
        let Some((stream, place)) = accepted else { continue };
        let (gateway, server, alive) = (Arc::clone(&gateway), Arc::clone(&server), alive.clone());
        tokio::spawn(
            async move {
                connection(gateway, &server, stream).await;
                drop((place, alive));
            }
            .boxed(),
        );
    }
    drop((listener, coordinators, alive));
    gateway.draining.send_replace(true);
    let patience = Duration::from_millis(gateway.config.drain_ms);
    if tokio::time::timeout(patience, all_gone.recv()).await.is_err() {
        tracing::warn!("requests under way are cut off");
    }
    tracing::info!("gateway is drained");
}

fn listen(listener: OwnedFd) -> Option<TcpListener> {
    let listener = std::net::TcpListener::from(listener);
    let listening = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
    listening.inspect_err(|error| tracing::error!(%error, "listener of the coordinator")).ok()
}

async fn accept(
    listener: &TcpListener,
    coordinators: Option<&TcpListener>,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    let of_coordinator = async {
        match coordinators {
            Some(listener) => listener.accept().await,
            None => std::future::pending().await,
        }
    };
    let accepted = tokio::select! {
        accepted = listener.accept() => accepted,
        accepted = of_coordinator => accepted,
    };
    match accepted {
        Ok((stream, _)) => Some((stream, place)),
        Err(error) => {
            tracing::warn!(%error, "connection is not accepted");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

fn builder(gateway: &Gateway) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    let head = Duration::from_millis(gateway.config.header_timeout_ms);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(head).half_close(false);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(4 * WINDOW)
        .keep_alive_interval(head)
        .keep_alive_timeout(head);
    builder
}

async fn connection(gateway: Arc<Gateway>, server: &auto::Builder<TokioExecutor>, stream: TcpStream) {
    let mut draining = gateway.draining.subscribe();
    let head = Duration::from_millis(gateway.config.header_timeout_ms);
    // The version is told by the first bytes: who sends none is not waited for longer than for a head.
    let mut first = [0];
    tokio::select! {
        ready = tokio::time::timeout(head, stream.peek(&mut first)) => match ready {
            Ok(Ok(1)) => {}
            _ => return,
        },
        _ = draining.wait_for(|draining| *draining) => return,
    }
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "connection");
    }
    let floor = gateway.config.upload_floor;
    let io = TokioIo::new(Paced::new(stream, floor));
    let service = service_fn(move |request| {
        let gateway = Arc::clone(&gateway);
        async move { Ok::<_, Infallible>(route(&gateway, request).await) }
    });
    let connection = server.serve_connection(io, service);
    tokio::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = drained(&mut draining) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "connection ended");
    }
}

async fn drained(draining: &mut watch::Receiver<bool>) {
    let _gone_is_drained_too = draining.wait_for(|draining| *draining).await;
}

async fn route(gateway: &Arc<Gateway>, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.split('/').collect();
    let (namespace, job, rest) = match parts.as_slice() {
        ["", "v1", "namespaces", namespace, "jobs", job, rest @ ..] => (*namespace, *job, rest),
        _ => return refuse(&Code::NotFound.with(format!("nothing is at '{path}'"))),
    };
    let get = matches!(*request.method(), Method::GET | Method::HEAD);
    let post = request.method() == Method::POST;
    let allowed = match rest {
        ["events"] => post,
        ["task" | "model"] | [] => get,
        _ => return refuse(&Code::NotFound.with(format!("nothing is at '{path}'"))),
    };
    if !allowed {
        let allow = if rest == ["events"] { "POST" } else { "GET, HEAD" };
        let detail = format!("{} is not for '{path}'; allowed: {allow}", request.method());
        let mut response = refuse(&Code::MethodNotAllowed.with(detail));
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
        return response;
    }
    let Some(chain) = gateway.chain_of(namespace, job) else {
        return refuse(&Code::UnknownJob.with(format!("no job '{job}' in namespace '{namespace}' (yet?)")));
    };
    let result = match rest {
        ["events"] => return control::post(gateway, &chain, request).await,
        ["task"] => task::get(gateway, &chain, &request).await,
        ["model"] => model::get(gateway, &chain, &request),
        _ => model::document(gateway, &chain, &request),
    };
    result.unwrap_or_else(|refusal| refuse(&refusal))
}

/// A JSON document.
fn json<T: Serialize>(status: StatusCode, document: &T) -> Response<Body> {
    match serde_json::to_vec(document) {
        Ok(bytes) => respond(status, "application/json", bytes.into()),
        Err(error) => {
            tracing::error!(%error, "document");
            respond(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", Bytes::new())
        }
    }
}

fn respond(status: StatusCode, media: &'static str, bytes: Bytes) -> Response<Body> {
    let mut response = Response::new(Full::new(bytes).map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    response
}

/// The answer to what is refused.
fn refuse(refusal: &Refusal) -> Response<Body> {
    let (_, status, retry) = refusal.code.row();
    let bytes = serde_json::to_vec(&refusal.problem()).unwrap_or_default();
    let mut response = respond(status, "application/problem+json", bytes.into());
    if let Some(seconds) = retry {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}
