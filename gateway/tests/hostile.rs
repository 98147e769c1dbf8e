//! Senders that are slow, broken, many or greedy.

mod harness;

use std::sync::atomic::Ordering;

use harness::{Node, Update, http, job_word, path, soon, tensors};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lifl_api::node::{FromGateway, Tree};
use lifl_ebpf::Kind;
use serde_json::json;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

const ONES: [f32; 5] = [1.0, 2.0, 3.0, 4.0, 5.0];

async fn node(config: serde_json::Value) -> Node {
    let node = Node::start(config).await;
    node.job(|_| {}, &tensors::model([0.0; 5]), None).await;
    node.open(1, &["a", "b", "c", "d"], 4, Tree::default()).await;
    node
}

/// Begins an upload and sends only a part of it.
#[expect(clippy::unwrap_used, reason = "a test ends where its surroundings fail")]
async fn begin(node: &Node, update: Update<'_>, body: &[u8], part: usize) -> TcpStream {
    let mut stream = TcpStream::connect(node.address).await.unwrap();
    stream.write_all(&http::head("POST", &path("/events"), &update.headers(), Some(body.len()))).await.unwrap();
    stream.write_all(&body[..part]).await.unwrap();
    stream
}

#[tokio::test]
async fn a_stalled_upload_is_given_up_and_its_client_may_come_again() {
    let node = node(json!({"upload_grace_ms": 100})).await;
    let a = node.join("a").await;
    let body = tensors::model(ONES);
    for part in [0, 5, 60, body.len() - 1] {
        let mut stalled = begin(&node, Update::new("a", &a, "u"), &body, part).await;
        let answer = http::answer(&mut stalled, "POST").await;
        assert_eq!((answer.status, answer.code().as_str()), (408, "too_slow"), "after {part} bytes");
    }
    assert_eq!(node.update(Update::new("a", &a, "u"), &body).await.status, 202);
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing_behind() {
    let node = node(json!({})).await;
    let a = node.join("a").await;
    let body = tensors::model(ONES);
    for part in [0, 9, 100, body.len() - 1] {
        drop(begin(&node, Update::new("a", &a, "u"), &body, part).await);
    }
    soon("an end of the broken uploads", async {
        while node.update(Update::new("a", &a, "u"), &body).await.status != 202 {}
    })
    .await;
    assert_eq!(node.descriptor_of(Kind::Update).await.count, 1);
}

#[tokio::test]
async fn without_memory_uploads_are_sent_away_and_with_it_they_are_taken() {
    let node = Node::start(json!({"slot_wait_ms": 50})).await;
    // Room for the model and two updates.
    node.say(&job_word(|_| {}, None, 3 * 12 * 1024)).await;
    node.model(0, &tensors::model([0.0; 5])).await;
    node.open(1, &["a", "b", "c", "d"], 4, Tree::default()).await;
    let body = tensors::model(ONES);
    let mut outcomes = Vec::new();
    for client in ["a", "b", "c", "d"] {
        let token = node.join(client).await;
        let answer = node.update(Update::new(client, &token, "u"), &body).await;
        if answer.status == 429 {
            assert_eq!((answer.code().as_str(), answer.header("retry-after")), ("out_of_memory", Some("1")));
        }
        outcomes.push(answer.status);
    }
    assert!(outcomes.contains(&202) && outcomes.ends_with(&[429]), "{outcomes:?}");

    let refused = self::node(json!({"slot_wait_ms": 50})).await;
    refused.agent.limit.store(refused.agent.granted.load(Ordering::Relaxed), Ordering::Relaxed);
    let body = tensors::model(ONES);
    let token = refused.join("a").await;
    // What is granted already may serve this one; the agent's word is asked for no more than once a second.
    let status = refused.update(Update::new("a", &token, "u"), &body).await.status;
    assert!(status == 202 || status == 429);
}

#[tokio::test]
async fn a_second_upload_of_a_client_waits_its_turn() {
    let node = node(json!({})).await;
    let a = node.join("a").await;
    let body = tensors::model(ONES);
    let headers = Update::new("a", &a, "u").headers();
    let mut first = http::begin(node.address, &path("/events"), &headers, body.len()).await;
    let same = node.update(Update::new("a", &a, "u"), &body).await;
    assert_eq!((same.status, same.code().as_str()), (409, "in_progress"));
    let other = node.update(Update::new("a", &a, "v"), &body).await;
    assert_eq!((other.status, other.code().as_str()), (429, "client_busy"));
    first.write_all(&body).await.unwrap();
    assert_eq!(http::answer(&mut first, "POST").await.status, 202);
}

#[tokio::test]
async fn a_thousand_idle_connections_are_harmless() {
    let node = node(json!({"max_connections": 1200, "header_timeout_ms": 60_000})).await;
    let mut idle = Vec::new();
    for n in 0..1000 {
        let mut stream = TcpStream::connect(node.address).await.unwrap();
        if n % 2 == 0 {
            stream.write_all(b"GET /v1/name").await.unwrap();
        }
        idle.push(stream);
    }
    let a = node.join("a").await;
    assert_eq!(node.update(Update::new("a", &a, "u"), &tensors::model(ONES)).await.status, 202);
    drop(idle);
}

#[tokio::test]
async fn silent_connections_make_room_for_others() {
    let node = node(json!({"max_connections": 8, "header_timeout_ms": 50})).await;
    let mut idle = Vec::new();
    for n in 0..32 {
        let mut stream = TcpStream::connect(node.address).await.unwrap();
        if n % 2 == 0 {
            stream.write_all(b"GET /").await.unwrap();
        }
        idle.push(stream);
    }
    assert_eq!(http::get(node.address, &path("/model"), None).await.status, 200);
}

#[tokio::test]
async fn http2_with_prior_knowledge() {
    let node = node(json!({})).await;
    let stream = TcpStream::connect(node.address).await.unwrap();
    let executor = TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let uri = format!("http://gateway{}", path("/model"));
    let request = ::http::Request::get(uri).body(Empty::<bytes::Bytes>::new()).unwrap();
    let response = soon("a response", sender.send_request(request)).await.unwrap();
    assert_eq!((response.status().as_u16(), response.version()), (200, ::http::Version::HTTP_2));
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, tensors::model([0.0; 5]));
}

#[tokio::test]
async fn a_large_model_is_streamed_whole_while_the_next_takes_its_place() {
    let node = Node::start(json!({})).await;
    let values = vec![1.0; 3 << 20];
    let large = tensors::file(&[("w", "F32", &[3 << 20], tensors::f32s(&values))]);
    node.job(|_| {}, &large, None).await;
    let mut stream = TcpStream::connect(node.address).await.unwrap();
    stream.write_all(&http::head("GET", &path("/model"), &[], None)).await.unwrap();
    // The response begins; more than the socket's buffers is still to come when another model is served.
    let mut first = [0; 1];
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut first).await.unwrap();
    let newer = tensors::file(&[("w", "F32", &[3 << 20], tensors::f32s(&vec![2.0; 3 << 20]))]);
    node.model(1, &newer).await;
    node.settled().await;
    let mut rest = Vec::new();
    let wanted = large.len();
    soon("the rest of the model", async {
        // Head and body come in one stream, however it is cut.
        while rest.len() < wanted || !rest.ends_with(&large) {
            tokio::io::AsyncReadExt::read_buf(&mut stream, &mut rest).await.unwrap();
        }
    })
    .await;
    assert_eq!(http::get(node.address, &path("/model"), None).await.body.len(), newer.len());
}

#[tokio::test]
async fn the_first_client_may_bring_the_model() {
    let node = Node::start(json!({})).await;
    let spec = |spec: &mut serde_json::Value| spec["model"]["initial"] = json!({"fromFirstClient": true});
    node.say(&job_word(spec, None, 64 << 20)).await;
    node.open(1, &["a"], 1, Tree::default()).await;
    let a = node.join("a").await;
    let task = http::get(node.address, &path("/task?client=a"), Some(&a)).await.json();
    assert_eq!((task["state"].as_str(), task["model"].is_null()), (Some("train"), true));
    let body = tensors::model(ONES);
    let bad = tensors::model([f32::NAN; 5]);
    assert_eq!(node.update(Update::new("a", &a, "u"), &bad).await.code(), "not_finite");
    let answer = node.update(Update::new("a", &a, "u"), &body).await;
    assert_eq!((answer.status, answer.code().as_str()), (503, "model_adopted"));
    let first = |word: &FromGateway| match word {
        FromGateway::FirstModel { offset: 0, length, .. } => Some(*length),
        _ => None,
    };
    let (length, fds) = node.hear("FirstModel", first).await;
    let mut file = vec![0; usize::try_from(length).unwrap()];
    let memory = std::fs::File::from(fds.into_iter().next().unwrap());
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut file, 0).unwrap();
    assert_eq!(file, body);
    node.model(0, &file).await;
    node.settled().await;
    assert_eq!(node.descriptor().await.kind, Kind::Model as u8);
    assert_eq!(node.update(Update::new("a", &a, "u"), &body).await.status, 202);
}
