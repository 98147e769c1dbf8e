//! The clients against a gateway that says what the test wants: only what goes over the wire is judged here.

use std::{convert::Infallible, sync::Mutex};

use cloudevents::{AttributesReader, Event};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;

use super::*;

/// One request as the gateway saw it.
#[derive(Clone, Debug)]
struct Seen {
    kind: Kind,
    client: String,
    headers: HeaderMap,
    body: Bytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Join,
    Task,
    Model,
    Update,
    Metrics,
}

enum Reply {
    Json(u16, Value),
    After(u16, &'static str),
    Bytes(Vec<u8>),
    HangUp,
}

type Script = dyn Fn(&Seen, usize) -> Reply + Send + Sync;

struct Fake {
    script: Box<Script>,
    seen: Mutex<Vec<Seen>>,
}

impl Fake {
    fn of(&self, kind: Kind) -> Vec<Seen> {
        let seen = self.seen.lock().expect("lock");
        seen.iter().filter(|seen| seen.kind == kind).cloned().collect()
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, std::io::Error> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
        let (kind, client) = kind_and_client(&head.method, &head.uri, &head.headers, &body);
        let seen = Seen { kind, client, headers: head.headers, body };
        let before = {
            let mut all = self.seen.lock().expect("lock");
            let same = |other: &&Seen| other.kind == kind && other.client == seen.client;
            let before = all.iter().filter(same).count();
            all.push(seen.clone());
            before
        };
        let response = match (self.script)(&seen, before) {
            Reply::Json(status, value) => respond(status, value.to_string().into()),
            Reply::After(status, after) => {
                let mut response = respond(status, Bytes::from_static(b"later"));
                response.headers_mut().insert("retry-after", after.parse().expect("header"));
                response
            }
            Reply::Bytes(bytes) => respond(200, bytes.into()),
            Reply::HangUp => return Err(std::io::Error::other("hung up")),
        };
        Ok(response)
    }
}

fn respond(status: u16, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = StatusCode::from_u16(status).expect("status");
    response
}

fn kind_and_client(method: &Method, uri: &Uri, headers: &HeaderMap, body: &[u8]) -> (Kind, String) {
    let path = uri.path().strip_prefix("/v1/namespaces/default/jobs/digits").expect("job");
    let last = |source: &str| source.rsplit('/').next().unwrap_or_default().to_owned();
    match (method.as_str(), path) {
        ("GET", "/task") => {
            let query = uri.query().expect("query");
            let client = query.strip_prefix("client=").and_then(|q| q.split_once("&wait="));
            (Kind::Task, client.expect("client, then wait").0.to_owned())
        }
        // Tokens are the clients' names here, so that a fetch can be told from another.
        ("GET", "/model") => {
            let token = headers["authorization"].to_str().expect("text");
            (Kind::Model, token.strip_prefix("Bearer ").expect("bearer").to_owned())
        }
        ("POST", "/events") if headers["content-type"] == "application/cloudevents+json" => {
            let event: Event = serde_json::from_slice(body).expect("a CloudEvent");
            let kind = match event.ty() {
                "dev.lifl.fl.client.available.v1" => Kind::Join,
                "dev.lifl.fl.client.metrics.v1" => Kind::Metrics,
                other => panic!("unexpected type {other}"),
            };
            (kind, last(event.source()))
        }
        ("POST", "/events") => (Kind::Update, last(headers["ce-source"].to_str().expect("text"))),
        other => panic!("unexpected request {other:?}"),
    }
}

/// Runs two trainers and the evaluator against `script` until all have ended.
async fn run(
    script: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static,
) -> (Arc<Fake>, Result<Outcome, ClientError>, Vec<Progress>) {
    let fake = Arc::new(Fake { script: Box::new(script), seen: Mutex::default() });
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let base = format!("http://{}", listener.local_addr().expect("address"));
    let serving = tokio::spawn(serve(listener, Arc::clone(&fake)));
    let (sender, mut receiver) = mpsc::channel(4);
    let base = base.parse().expect("uri");
    let collect = async {
        let mut all = Vec::new();
        while let Some(progress) = receiver.recv().await {
            all.push(progress);
        }
        all
    };
    let clients = run_clients(base, "default", "digits", config(), sender);
    let (outcome, progress) = tokio::join!(Box::pin(clients), collect);
    serving.abort();
    (fake, outcome, progress)
}

async fn serve(listener: TcpListener, fake: Arc<Fake>) -> Infallible {
    loop {
        let (stream, _peer) = listener.accept().await.expect("accepted");
        let fake = Arc::clone(&fake);
        tokio::spawn(async move {
            let service = service_fn(move |request| Arc::clone(&fake).answer(request));
            // An error here is a connection that the script or the client broke off.
            drop(http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
        });
    }
}

fn config() -> ClientsConfig {
    ClientsConfig {
        split: Split { clients: 2, ..Split::DEMO },
        training: Training { epochs: 1, batch: 64, ..Training::DEMO },
        patience: Duration::from_secs(30),
    }
}

fn model() -> Vec<u8> {
    Mlp::new(8, 1).to_safetensors().expect("written")
}

fn joined(seen: &Seen) -> Reply {
    Reply::Json(202, json!({"schema": "lifl.dev/joined/v1", "token": seen.client, "heartbeat": "20s"}))
}

fn receipt(seen: &Seen) -> Value {
    let header = |name: &str| seen.headers[name].to_str().expect("text").to_owned();
    json!({"schema": "lifl.dev/receipt/v1", "source": header("ce-source"), "id": header("ce-id"), "round": 3, "digest": "crc32c:0"})
}

fn task(state: &str) -> Reply {
    let digest: String = Sha256::digest(model()).iter().map(|b| format!("{b:02x}")).collect();
    let url = "/v1/namespaces/default/jobs/digits/model?round=2";
    Reply::Json(
        200,
        json!({"schema": "lifl.dev/task/v1", "state": state, "round": 3, "model": {"round": 2, "url": url, "sha256": digest}}),
    )
}

/// An ordinary job of one round, but for what `change` answers.
fn job(change: impl Fn(&Seen, usize) -> Option<Reply>) -> impl Fn(&Seen, usize) -> Reply {
    move |seen, before| {
        change(seen, before).unwrap_or_else(|| match seen.kind {
            Kind::Join => joined(seen),
            Kind::Task if before == 0 => task("train"),
            Kind::Task => task("done"),
            Kind::Model => Reply::Bytes(model()),
            Kind::Update => Reply::Json(202, receipt(seen)),
            Kind::Metrics => Reply::Json(202, json!({})),
        })
    }
}

#[tokio::test]
async fn a_round_goes_by_the_profile() {
    let (fake, outcome, progress) = run(job(|_, _| None)).await;
    let outcome = outcome.expect("ran");
    assert_eq!((outcome.accepted, outcome.late, outcome.refused), (2, 0, 0));
    assert_eq!(outcome.failure, None);
    let updates = fake.of(Kind::Update);
    assert_eq!(updates.len(), 2);
    let first = updates.iter().find(|u| u.client == "client-000").expect("sent");
    let mut attributes: Vec<(&str, &str)> = first
        .headers
        .iter()
        .filter(|(name, _)| !["ce-time", "ce-flsamples", "host"].contains(&name.as_str()))
        .map(|(name, value)| (name.as_str(), value.to_str().expect("text")))
        .collect();
    attributes.sort_unstable();
    let length = first.body.len().to_string();
    assert_eq!(
        attributes,
        [
            ("authorization", "Bearer client-000"),
            ("ce-flclient", "client-000"),
            ("ce-fldtype", "f32"),
            ("ce-fljob", "digits"),
            ("ce-flkind", "full"),
            ("ce-flround", "3"),
            ("ce-id", "digits.3.client-000.1"),
            ("ce-source", "/namespaces/default/jobs/digits/clients/client-000"),
            ("ce-specversion", "1.0"),
            ("ce-subject", "jobs/digits/rounds/000003"),
            ("ce-type", "dev.lifl.fl.update.submitted.v1"),
            ("content-length", length.as_str()),
            ("content-type", "application/vnd.safetensors"),
        ]
    );
    assert!(first.headers["ce-time"].to_str().expect("text").ends_with('Z'));
    let samples = updates.iter().map(|u| u.headers["ce-flsamples"].to_str().expect("text"));
    let samples: usize = samples.map(|s| s.parse::<usize>().expect("decimal")).sum();
    assert_eq!(samples, 1437);
    let trained = Mlp::from_safetensors(&first.body).expect("a model");
    assert_ne!(trained, Mlp::from_safetensors(&model()).expect("a model"));
    assert_eq!(progress.iter().filter(|p| matches!(p, Progress::Joined { .. })).count(), 3);
    assert_eq!(progress.iter().filter(|p| matches!(p, Progress::Ended { .. })).count(), 3);
}

#[tokio::test]
async fn an_update_is_repeated_under_one_id_until_it_is_taken() {
    let script = job(|seen, before| {
        (seen.kind == Kind::Update && seen.client == "client-001").then(|| match before {
            0 => Reply::After(503, "0"),
            1 => Reply::After(409, "0"),
            2 => Reply::HangUp,
            3 => Reply::After(429, "0"),
            4 => Reply::After(404, "0"),
            5 => Reply::After(408, "0"),
            _ => {
                let mut receipt = receipt(seen);
                receipt["duplicate"] = true.into();
                Reply::Json(202, receipt)
            }
        })
    });
    let (fake, outcome, progress) = run(script).await;
    let outcome = outcome.expect("ran");
    assert_eq!((outcome.accepted, outcome.retries), (2, 6));
    let mut updates = fake.of(Kind::Update);
    updates.retain(|update| update.client == "client-001");
    assert_eq!(updates.len(), 7);
    for update in &updates {
        assert_eq!(update.headers, updates[0].headers);
        assert_eq!(update.body, updates[0].body);
    }
    let twice = |p: &&Progress| matches!(p, Progress::Accepted { duplicate: true, .. });
    assert_eq!(progress.iter().filter(twice).count(), 1);
}

#[tokio::test]
async fn a_closed_round_and_a_refusal_end_only_the_update() {
    let script = job(|seen, _| {
        (seen.kind == Kind::Update).then(|| match seen.client.as_str() {
            "client-000" => Reply::Json(410, json!({})),
            _ => Reply::Json(
                422,
                json!({"type": "about:blank", "title": "", "status": 422, "detail": "fc1.bias is not finite", "code": "NonFinite"}),
            ),
        })
    });
    let (fake, outcome, progress) = run(script).await;
    let outcome = outcome.expect("ran");
    assert_eq!((outcome.accepted, outcome.late, outcome.refused), (0, 1, 1));
    assert_eq!(fake.of(Kind::Update).len(), 2);
    let refused = Progress::Refused {
        client: "client-001".into(),
        round: 3,
        status: 422,
        detail: "fc1.bias is not finite (NonFinite)".to_owned(),
    };
    assert!(progress.contains(&refused), "{progress:?}");
}

#[tokio::test]
async fn a_forgotten_client_joins_again() {
    let script = job(|seen, before| {
        let unknown = seen.kind == Kind::Task && seen.client == "client-000" && before == 0;
        match seen.kind {
            Kind::Join if before == 1 => {
                Some(Reply::Json(202, json!({"schema": "", "token": "second", "heartbeat": "20s"})))
            }
            _ if unknown => Some(Reply::Json(401, json!({}))),
            Kind::Task if seen.client == "client-000" && before == 1 => Some(task("train")),
            _ => None,
        }
    });
    let (fake, outcome, _) = run(script).await;
    assert_eq!(outcome.expect("ran").accepted, 2);
    let mut joins = fake.of(Kind::Join);
    joins.retain(|join| join.client == "client-000");
    let ids = joins.iter().map(|j| serde_json::from_slice::<Value>(&j.body).expect("JSON")["id"].clone());
    let ids: Vec<Value> = ids.collect();
    assert_eq!(ids, ["digits.available.client-000.1", "digits.available.client-000.2"]);
    let updates = fake.of(Kind::Update);
    let first = updates.iter().find(|u| u.client == "client-000").expect("sent");
    assert_eq!(first.headers["authorization"], "Bearer second");
}

#[tokio::test]
async fn a_token_refused_twice_is_an_error() {
    let script = job(|seen, _| (seen.kind == Kind::Task).then(|| Reply::Json(403, json!({}))));
    let (_, outcome, _) = run(script).await;
    assert!(matches!(outcome, Err(ClientError::Refused { status: StatusCode::FORBIDDEN, .. })), "{outcome:?}");
}

#[tokio::test]
async fn the_evaluator_measures_each_model_once() {
    let script = job(|seen, before| match seen.kind {
        Kind::Task if seen.client == "evaluator" && before < 3 => Some(task("wait")),
        _ => None,
    });
    let (fake, outcome, progress) = run(script).await;
    let outcome = outcome.expect("ran");
    let accuracy = Mlp::new(8, 1).accuracy(&Dataset::new(Split::DEMO.seed).held_out);
    assert_eq!(outcome.measured, [(2, accuracy)]);
    assert_eq!(outcome.accuracy(), Some(accuracy));
    assert!(progress.contains(&Progress::Measured { round: 2, accuracy }));
    let metrics = fake.of(Kind::Metrics);
    assert_eq!(metrics.len(), 1);
    let event: Value = serde_json::from_slice(&metrics[0].body).expect("JSON");
    assert_eq!(event["data"], json!({"round": 2, "samples": 360, "metrics": {"accuracy": accuracy}}));
    assert_eq!(event["source"], "/namespaces/default/jobs/digits/clients/evaluator");
    assert_eq!(metrics[0].headers["authorization"], "Bearer evaluator");
    let joins = fake.of(Kind::Join);
    let role = |client: &str| {
        let join = joins.iter().find(|join| join.client == client).expect("joined");
        assert!(!join.headers.contains_key("authorization"));
        serde_json::from_slice::<Value>(&join.body).expect("JSON")["data"]["role"].clone()
    };
    assert_eq!((role("evaluator"), role("client-001")), (json!("evaluator"), json!("trainer")));
}

#[tokio::test]
async fn another_model_than_announced_is_not_trained() {
    let script = job(|seen, before| match seen.kind {
        Kind::Task if seen.client == "evaluator" => Some(task("wait")).filter(|_| before == 0),
        Kind::Task if before == 1 => Some(task("train")),
        Kind::Model if before == 0 => Some(Reply::Bytes(b"another".to_vec())),
        _ => None,
    });
    let (fake, outcome, progress) = run(script).await;
    let outcome = outcome.expect("ran");
    assert_eq!((outcome.accepted, outcome.retries, fake.of(Kind::Model).len()), (2, 3, 6));
    assert_eq!(progress.iter().filter(|p| matches!(p, Progress::Retried { .. })).count(), 3);
}

#[tokio::test]
async fn a_failed_job_says_why() {
    let script = job(|seen, _| {
        (seen.kind == Kind::Task).then(|| {
            Reply::Json(200, json!({"schema": "", "state": "failed", "round": 1, "reason": "too few clients"}))
        })
    });
    let (_, outcome, _) = run(script).await;
    assert_eq!(outcome.expect("ran").failure.as_deref(), Some("too few clients"));
}

#[tokio::test]
async fn a_gateway_that_is_not_there_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let base: Uri = format!("http://{}", listener.local_addr().expect("address")).parse().expect("uri");
    drop(listener);
    let impatient = ClientsConfig { patience: Duration::ZERO, ..config() };
    let (sender, _receiver) = mpsc::channel(64);
    let outcome = run_clients(base, "default", "digits", impatient, sender).await;
    let error = outcome.expect_err("nobody listens").to_string();
    assert!(error.contains("joining") && error.contains("Connection refused"), "{error}");
    let (sender, _receiver) = mpsc::channel(64);
    let outcome = run_clients(Uri::from_static("/path"), "default", "digits", impatient, sender).await;
    assert!(matches!(outcome, Err(ClientError::Base(_))));
}
