//! An API server whose answers the test gives, one by one.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{Request, Response};
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use kube::{Client, client::Body};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

type Answer = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

/// The server's end: what is asked, in the order in which it is.
pub(super) struct Server {
    calls: mpsc::UnboundedReceiver<Call>,
}

/// A request that waits for its answer.
pub(super) struct Call {
    method: String,
    /// Path and query.
    pub(super) path: String,
    /// The body, if there is one.
    pub(super) body: Value,
    answer: oneshot::Sender<Answer>,
}

/// The server's end of a watch.
pub(super) struct Watcher(mpsc::UnboundedSender<Result<Bytes, std::io::Error>>);

// === impl Server ===

impl Server {
    /// A server, and a client of it.
    pub(super) fn start() -> (Client, Self) {
        let (sender, calls) = mpsc::unbounded_channel();
        let service = tower::service_fn(move |request: Request<Body>| {
            let sender = sender.clone();
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await.expect("the request's body").to_bytes();
                let (answer, answered) = oneshot::channel();
                let body = serde_json::from_slice(&body).unwrap_or_default();
                let (method, path) = (head.method.to_string(), head.uri.to_string().replace("?&", "?"));
                // A test that is over hears nothing more.
                drop(sender.send(Call { method, path, body, answer }));
                match answered.await {
                    Ok(answer) => Ok::<_, Infallible>(answer),
                    Err(_over) => std::future::pending().await,
                }
            }
        });
        (Client::new(service, "default"), Self { calls })
    }

    /// The next request; it is of this method, and its path begins so.
    pub(super) async fn asked(&mut self, method: &str, path: &str) -> Call {
        let call = self.calls.recv().await.expect("a request");
        assert!(
            call.method == method && call.path.starts_with(path),
            "{} {}, not {method} {path}",
            call.method,
            call.path
        );
        call
    }

    /// The next request is a watch from this version.
    pub(super) async fn watched_from(&mut self, version: &str) -> Watcher {
        let call = self.asked("GET", "/api/v1/configmaps?").await;
        let wanted = format!("resourceVersion={version}");
        assert!(call.path.contains("watch=true") && call.path.split('&').any(|part| part == wanted), "{}", call.path);
        assert!(call.path.contains("allowWatchBookmarks=true"), "{}", call.path);
        let (sender, mut events) = mpsc::unbounded_channel::<Result<Bytes, std::io::Error>>();
        let frames = stream::poll_fn(move |context| events.poll_recv(context));
        let body = StreamBody::new(frames.map(|frame| frame.map(hyper::body::Frame::data)));
        drop(call.answer.send(Response::new(UnsyncBoxBody::new(body))));
        Watcher(sender)
    }

    /// Waits until all clients are gone; fails if one of them asks something.
    pub(super) async fn closed(&mut self) {
        if let Some(call) = self.calls.recv().await {
            panic!("{} {}", call.method, call.path);
        }
    }
}

// === impl Call ===

impl Call {
    pub(super) fn answer(self, code: u16, document: &Value) {
        let body = http_body_util::Full::from(document.to_string()).map_err(|never| match never {}).boxed_unsync();
        let answer = Response::builder().status(code).body(body).expect("an answer");
        drop(self.answer.send(answer));
    }
}

// === impl Watcher ===

impl Watcher {
    pub(super) fn say(&self, event: &Value) {
        self.say_all(std::slice::from_ref(event));
    }

    /// Several events in one frame.
    pub(super) fn say_all(&self, events: &[Value]) {
        let lines: String = events.iter().map(|event| format!("{event}\n")).collect();
        self.0.send(Ok(lines.into())).expect("the watch is open");
    }

    /// The connection breaks.
    pub(super) fn break_off(self) {
        self.0.send(Err(std::io::ErrorKind::ConnectionReset.into())).expect("the watch is open");
    }

    /// The watch ends, as each does after some minutes.
    pub(super) fn end(self) {}
}
