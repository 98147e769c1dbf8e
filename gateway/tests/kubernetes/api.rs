//! As much of an API server as the gateway needs: lists, watches, single objects, statuses. It can be away for a while.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{
    body::{Body, Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet},
};

pub(crate) const KINGS: &str = "/apis/networking.internal.knative.dev/v1alpha1/ingresses";
pub(crate) const SERVICES: &str = "/api/v1/services";
pub(crate) const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub(crate) const SECRETS: &str = "/api/v1/secrets";
const KNATIVE: &str = "/apis/networking.internal.knative.dev/v1alpha1";

type Answer = Response<BoxBody<Bytes, Infallible>>;

/// The server; clones are one.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) address: SocketAddr,
    store: Arc<Store>,
    serving: Arc<Mutex<Option<JoinHandle<()>>>>,
}

struct Store {
    state: Mutex<State>,
    /// The last version.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    /// By collection, by `namespace/name`.
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    /// Every change: its version, the collection, the event.
    events: Vec<(u64, String, Value)>,
    /// Method and target of every request.
    asked: Vec<String>,
    without_knative: bool,
    /// The next status of an Ingress is refused with this code.
    refused: BTreeMap<String, u16>,
}

/// Lines that come when they come.
struct Lines(mpsc::UnboundedReceiver<Bytes>);

// === impl Api ===

impl Api {
    pub(crate) async fn start() -> Self {
        let store = Store { state: Mutex::default(), changed: watch::Sender::new(1) };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = Self { address: listener.local_addr().unwrap(), store: Arc::new(store), serving: Arc::default() };
        api.serve(listener);
        api
    }

    fn serve(&self, listener: TcpListener) {
        let store = Arc::clone(&self.store);
        let serving = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let store = Arc::clone(&store);
                let service = service_fn(move |request| {
                    let store = Arc::clone(&store);
                    async move { Ok::<_, Infallible>(store.answer(request).await) }
                });
                connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        *self.serving.lock().unwrap() = Some(serving);
    }

    /// Its port refuses, all its connections are gone.
    pub(crate) async fn leave(&self) {
        let serving = self.serving.lock().unwrap().take().unwrap();
        serving.abort();
        drop(serving.await);
    }

    /// Is there again.
    pub(crate) async fn come_back(&self) {
        self.serve(TcpListener::bind(self.address).await.unwrap());
    }

    /// Knative's kinds are not installed (yet).
    pub(crate) fn without_knative(&self, without: bool) {
        self.store.state().without_knative = without;
    }

    /// Adds an object or replaces it; a spec that differs is a new generation.
    pub(crate) fn put(&self, collection: &str, object: Value) {
        self.store.put(collection, object);
    }

    pub(crate) fn delete(&self, collection: &str, name: &str) {
        self.store.delete(collection, name);
    }

    /// The status of an Ingress.
    pub(crate) fn status(&self, name: &str) -> Value {
        self.store.state().objects[KINGS][name]["status"].clone()
    }

    /// Refuses the next status that is written of an Ingress, and no other.
    pub(crate) fn refuse_status(&self, name: &str, code: u16) {
        self.store.state().refused.insert(name.to_owned(), code);
    }

    /// Waits until the status of an Ingress is accepted.
    pub(crate) async fn until_status(&self, name: &str, accept: impl Fn(&Value) -> bool) -> Value {
        let mut changed = self.store.changed.subscribe();
        let seen = tokio::time::timeout(super::harness::PATIENCE, async {
            while !accept(&self.status(name)) {
                changed.changed().await.unwrap();
            }
        });
        let late = seen.await.is_err();
        let status = self.status(name);
        assert!(!late, "waited for another status than {status:#}");
        status
    }

    /// Requests so far whose line begins so.
    pub(crate) fn asked(&self, begins: &str) -> usize {
        self.store.state().asked.iter().filter(|line| line.starts_with(begins)).count()
    }

    pub(crate) fn write_kubeconfig(&self, path: &Path) {
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        fs::write(path, text.to_string()).unwrap();
    }
}

// === impl Store ===

impl Store {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, collection: &str, mut object: Value) -> Value {
        let mut state = self.state();
        let version = *self.changed.borrow() + 1;
        let name = name_of(&object);
        let objects = state.objects.entry(collection.to_owned()).or_default();
        let old = objects.get(&name);
        let generation = match old {
            Some(old) if old["spec"] == object["spec"] => old["metadata"]["generation"].clone(),
            Some(old) => (old["metadata"]["generation"].as_i64().unwrap() + 1).into(),
            None => 1.into(),
        };
        if let Some(old) = old
            && object["status"].is_null()
        {
            object["status"] = old["status"].clone();
        }
        let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
        object["metadata"]["generation"] = generation;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        object["metadata"]["uid"] = name.clone().into();
        objects.insert(name, object.clone());
        state.events.push((version, collection.to_owned(), json!({"type": kind, "object": object})));
        self.changed.send_replace(version);
        object
    }

    fn delete(&self, collection: &str, name: &str) {
        let mut state = self.state();
        let version = *self.changed.borrow() + 1;
        let mut object = state.objects.get_mut(collection).unwrap().remove(name).unwrap();
        object["metadata"]["resourceVersion"] = version.to_string().into();
        state.events.push((version, collection.to_owned(), json!({"type": "DELETED", "object": object})));
        self.changed.send_replace(version);
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Answer {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let path = head.uri.path().to_owned();
        let query = head.uri.query().unwrap_or_default();
        let parameter = |name: &str| query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
        {
            let mut state = self.state();
            state.asked.push(format!("{} {path}?{query}", head.method));
            if state.without_knative && path.starts_with(KNATIVE) {
                return refuse(404, "the server could not find the requested resource");
            }
        }
        if path == KNATIVE {
            let resources = json!([{"name": "ingresses", "singularName": "ingress", "namespaced": true, "kind": "Ingress", "verbs": []}]);
            return say(
                200,
                &json!({"kind": "APIResourceList", "groupVersion": "networking.internal.knative.dev/v1alpha1", "resources": resources}),
            );
        }
        let parts: Vec<&str> = path.split("/namespaces/").collect();
        match (&head.method, parts.as_slice()) {
            (&Method::GET, [collection]) if parameter("watch") == Some("true") => {
                let from = parameter("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or_default();
                Arc::clone(&self).watch((*collection).to_owned(), from)
            }
            (&Method::GET, [collection]) => {
                let state = self.state();
                let items: Vec<Value> =
                    state.objects.get(*collection).into_iter().flat_map(BTreeMap::values).cloned().collect();
                let version = self.changed.borrow().to_string();
                say(
                    200,
                    &json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items}),
                )
            }
            (method, [group, rest]) => {
                let rest: Vec<&str> = rest.split('/').collect();
                let (collection, name) = (format!("{group}/{}", rest[1]), format!("{}/{}", rest[0], rest[2]));
                let found = self.state().objects.get(&collection).and_then(|all| all.get(&name)).cloned();
                match (method, found) {
                    (_, None) => refuse(404, "not found"),
                    (&Method::GET, Some(object)) => say(200, &object),
                    (&Method::PUT, Some(mut object)) => {
                        let refused = self.state().refused.remove(&name);
                        if let Some(code) = refused {
                            return refuse(code, "not now");
                        }
                        let new: Value = serde_json::from_slice(&body).unwrap();
                        if new["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"] {
                            return refuse(409, "the object has been modified");
                        }
                        object["status"] = new["status"].clone();
                        say(200, &self.put(&collection, object))
                    }
                    _ => refuse(405, "not here"),
                }
            }
            _ => refuse(404, "not here"),
        }
    }

    fn watch(self: Arc<Self>, collection: String, from: u64) -> Answer {
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut changed = self.changed.subscribe();
            let mut reached = from;
            loop {
                changed.mark_unchanged();
                let news: Vec<Bytes> = {
                    let state = self.state();
                    let new = state.events.iter().filter(|(version, of, _)| *version > reached && *of == collection);
                    let lines = new.map(|(_, _, event)| format!("{event}\n").into()).collect();
                    reached = state.events.last().map_or(reached, |(version, ..)| reached.max(*version));
                    lines
                };
                if news.into_iter().any(|line| sender.send(line).is_err()) {
                    return;
                }
                tokio::select! {
                    changed = changed.changed() => changed.unwrap(),
                    () = sender.closed() => return,
                }
            }
        });
        Response::new(Lines(receiver).boxed())
    }
}

fn name_of(object: &Value) -> String {
    let part = |key: &str| object["metadata"][key].as_str().unwrap();
    format!("{}/{}", part("namespace"), part("name"))
}

fn say(code: u16, document: &Value) -> Answer {
    let body = Full::from(document.to_string()).boxed();
    Response::builder().status(code).header("content-type", "application/json").body(body).unwrap()
}

fn refuse(code: u16, why: &str) -> Answer {
    let reason = if code == 404 { "NotFound" } else { "Conflict" };
    say(
        code,
        &json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": why, "reason": reason, "code": code}),
    )
}

// === impl Lines ===

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}
