//! Every row of the surface's tables, against the real server.

mod harness;

use harness::{Node, Top, Update, group, http, path, soon, source, tensors};
use lifl_api::node::{FromGateway, ToGateway, Tree};
use lifl_ebpf::{Kind, role};
use serde_json::json;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

const ONES: [f32; 5] = [1.0, 2.0, 3.0, 4.0, 5.0];

/// A node whose job is in round 1 and expects `goal` updates of a, b, c and d.
async fn node(config: serde_json::Value, goal: u32) -> Node {
    let node = Node::start(config).await;
    node.job(|_| {}, &tensors::model([0.0; 5]), None).await;
    node.open(1, &["a", "b", "c", "d"], goal, Tree::default()).await;
    node
}

#[tokio::test]
async fn a_round_from_joining_to_the_next_model() {
    let node = node(json!({}), 2).await;
    let (a, b) = (node.join("a").await, node.join("b").await);
    let base = node.descriptor_of(Kind::Model).await;
    assert_eq!((base.dst, base.round), (role::TOP, 0));

    let answer = http::get(node.address, &path("/task?client=a&wait=30s"), Some(&a)).await;
    let task = answer.json();
    assert_eq!((answer.status, task["state"].as_str(), task["round"].as_u64()), (200, Some("train"), Some(1)));
    assert_eq!(task["deadline"], "2026-09-21T14:13:20Z");
    let url = task["model"]["url"].as_str().unwrap();
    let model = http::get(node.address, url, Some(&a)).await;
    assert_eq!(model.body, tensors::model([0.0; 5]));
    assert_eq!(task["model"]["sha256"], tensors::sha256(&model.body));

    let body = tensors::model(ONES);
    let first = node.update(Update::new("a", &a, "u1"), &body).await;
    assert_eq!(first.status, 202, "{}", first.text());
    let receipt = first.json();
    assert_eq!((receipt["source"].as_str(), receipt["id"].as_str()), (Some(source("a").as_str()), Some("u1")));
    assert_eq!(receipt["digest"], format!("crc32c-{:08x}", crc32c::crc32c(&body)));
    let sent = node.descriptor().await;
    assert_eq!((sent.kind, sent.dst, sent.weight(), sent.round), (Kind::Update as u8, role::TOP, 10.0, 1));
    let segment = node.segment(sent.segment).await;
    let object = segment.described(&sent, 5).unwrap();
    assert_eq!(object.run_f32(&object.runs()[0]).unwrap(), ONES);
    let task = http::get(node.address, &path("/task?client=a"), Some(&a)).await.json();
    assert_eq!((task["state"].as_str(), task["round"].as_u64()), (Some("wait"), Some(0)));

    let second = node.update(Update::new("b", &b, "u1"), &body).await;
    assert_eq!(second.status, 202, "{}", second.text());
    let other = node.descriptor().await;
    let close = node.descriptor().await;
    assert_eq!((close.kind, close.dst, close.count, close.round), (Kind::Close as u8, role::TOP, 2, 1));
    let closed = |word: &FromGateway| matches!(word, FromGateway::Closed { round: 1, admitted: 2, .. }).then_some(());
    node.hear("Closed", closed).await;

    let top = Top::new(&node, 4096).await;
    let made = tensors::model([1.5; 5]);
    let descriptor = top.seal(1, 2, 20.0, &made);
    node.data.send_all(&group(&[sent.key(), other.key()], descriptor)).unwrap();
    let done = |word: &FromGateway| match word {
        FromGateway::RoundDone { round: 1, count: 2, weight, length, receipt, .. } => {
            Some((*weight, *length, receipt.iter().map(|entry| entry.source.clone()).collect::<Vec<_>>()))
        }
        _ => None,
    };
    let ((weight, length, receipt), fds) = node.hear("RoundDone", done).await;
    assert_eq!((weight, length, fds.len()), (20.0, made.len() as u64, 1));
    assert_eq!(receipt, [source("a"), source("b")]);

    // A poll that waits is answered by the commit and the opening, not by time.
    let waiting = tokio::spawn({
        let (address, a) = (node.address, a.clone());
        async move { http::get(address, &path("/task?client=a&wait=60s"), Some(&a)).await }
    });
    let sha256 = tensors::sha256(&made);
    node.say(&ToGateway::Commit { chain: harness::CHAIN, round: 1, sha256 }).await;
    node.open(2, &["a"], 1, Tree::default()).await;
    let task = soon("the poll", waiting).await.unwrap().json();
    assert_eq!((task["state"].as_str(), task["round"].as_u64()), (Some("train"), Some(2)));
    assert_eq!(http::get(node.address, &path("/model"), None).await.body, made);
    assert_eq!(http::get(node.address, &path("/model?round=0"), None).await.code(), "unknown_model");

    // The update of the committed round is still known.
    let again = node.update(Update::new("a", &a, "u1"), &body).await;
    assert_eq!((again.status, again.json()["duplicate"].as_bool()), (202, Some(true)));
}

#[tokio::test]
async fn every_refusal_of_the_table() {
    let node = node(json!({}), 4).await;
    let (a, stranger) = (node.join("a").await, node.join("stranger").await);
    let body = tensors::model(ONES);
    let good = Update::new("a", &a, "u");
    let nan = tensors::model([1.0, f32::NAN, 3.0, 4.0, 5.0]);
    let missing = tensors::file(&[("a", "F32", &[3], tensors::f32s(&ONES[..3]))]);
    let shape = tensors::file(&[
        ("a", "F32", &[1, 3], tensors::f32s(&ONES[..3])),
        ("n", "I64", &[], vec![0; 8]),
        ("c", "F32", &[2], tensors::f32s(&ONES[3..])),
    ]);
    let huge = vec![0; 3 << 20];
    let zeros = format!("sha256-{}", "0".repeat(64));
    let wrong_digest = [("ce-fldigest", zeros.as_str())];
    let cases: Vec<(Update<'_>, &[u8], u16, &str)> = vec![
        (Update { token: None, ..good }, &body, 401, "no_token"),
        (Update { token: Some("x.y"), ..good }, &body, 403, "foreign_token"),
        (Update { token: Some(&stranger), ..good }, &body, 403, "foreign_token"),
        (Update { client: "stranger", token: Some(&stranger), ..good }, &body, 403, "not_selected"),
        (Update { more: &[("ce-source", "/elsewhere")], ..good }, &body, 403, "foreign_source"),
        (Update { more: &[("ce-id", "")], ..good }, &body, 400, "bad_attribute"),
        (Update { more: &[("ce-my-ext", "1")], ..good }, &body, 400, "bad_attribute"),
        (Update { more: &[("ce-fljob", "other")], ..good }, &body, 400, "bad_attribute"),
        (Update { more: &[("ce-fldigest", "md5-00")], ..good }, &body, 400, "bad_attribute"),
        (Update { more: &[("ce-type", "some.other")], ..good }, &body, 400, "bad_attribute"),
        (Update { round: "one", ..good }, &body, 400, "bad_attribute"),
        (Update { round: "0", ..good }, &body, 410, "round_closed"),
        (Update { round: "2", ..good }, &body, 410, "round_not_begun"),
        (Update { media: "application/json", ..good }, &body, 415, "media_type"),
        (Update { media: "application/cloudevents-batch+json", ..good }, &body, 415, "media_type"),
        (Update { more: &[("ce-flencoding", "zstd")], ..good }, &body, 415, "encoding"),
        (Update { more: &[("content-encoding", "gzip")], ..good }, &body, 415, "encoding"),
        (Update { kind: "diff", ..good }, &body, 422, "wrong_kind"),
        (Update { kind: "half", ..good }, &body, 422, "wrong_kind"),
        (Update { samples: "0", ..good }, &body, 422, "bad_weight"),
        (Update { samples: "-1", ..good }, &body, 422, "bad_weight"),
        (Update { samples: "1001", ..good }, &body, 422, "bad_weight"),
        (Update { samples: "many", ..good }, &body, 422, "bad_weight"),
        (Update { more: &[("ce-flweight", "NaN")], ..good }, &body, 422, "bad_weight"),
        (Update { more: &[("ce-flweight", "inf")], ..good }, &body, 422, "bad_weight"),
        (good, &nan, 422, "not_finite"),
        (good, &missing, 422, "bad_tensors"),
        (good, &shape, 422, "bad_tensors"),
        (good, &body[8..], 422, "bad_tensors"),
        (Update { more: &wrong_digest, ..good }, &body, 422, "bad_digest"),
        (good, &huge, 413, "too_large"),
        (good, &body[..body.len() - 1], 400, "bad_length"),
        (good, &[], 400, "bad_length"),
    ];
    for (head, body, status, code) in cases {
        let answer = node.update(head, body).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{head:?}: {}", answer.text());
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        assert_eq!(answer.json()["type"], "about:blank");
    }
    // None of them holds anything: the same update is taken now, once.
    let sha256 = format!("sha256-{}", tensors::sha256(&body));
    let right_digest = [("ce-fldigest", sha256.as_str())];
    let named = Update { more: &right_digest, ..good };
    let taken = node.update(named, &body).await;
    assert_eq!((taken.status, taken.json()["digest"].as_str()), (202, Some(sha256.as_str())));
    let again = node.update(named, &body).await;
    assert_eq!((again.status, again.json()["duplicate"].as_bool()), (202, Some(true)));
    for (other, status, code) in [
        (Update { more: &wrong_digest, ..good }, 409, "other_content"),
        (Update { samples: "11", ..named }, 409, "other_content"),
        (Update { id: "v", ..good }, 422, "one_per_round"),
    ] {
        let answer = node.update(other, &body).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{}", answer.text());
    }
    node.say(&ToGateway::Finish { chain: harness::CHAIN, succeeded: false, reason: "no more".into() }).await;
    node.settled().await;
    assert_eq!(node.update(Update { id: "w", ..good }, &body).await.code(), "round_closed");
    let task = http::get(node.address, &path("/task?client=a&wait=60s"), Some(&a)).await.json();
    assert_eq!((task["state"].as_str(), task["reason"].as_str()), (Some("failed"), Some("no more")));
}

#[tokio::test]
async fn routes_methods_and_conditional_models() {
    let node = node(json!({}), 4).await;
    let model = tensors::model([0.0; 5]);
    for (method, at, status) in [
        ("GET", "/metrics".to_owned(), 404),
        ("GET", "/".to_owned(), 404),
        ("GET", path("/nothing"), 404),
        ("GET", "/v1/namespaces/default/jobs/other/task?client=a".to_owned(), 404),
        ("GET", path("/events"), 405),
        ("POST", path("/task"), 405),
        ("DELETE", path(""), 405),
        ("GET", path("/task"), 400),
        ("GET", path("/task?client=a&wait=long"), 400),
        ("GET", path("/task?client=a"), 401),
        ("GET", path("/model?round=x"), 400),
        ("GET", path("/model?round=9"), 404),
        ("GET", path("/model?round=0"), 200),
        ("HEAD", path("/model"), 200),
        ("GET", path(""), 200),
    ] {
        let answer = http::call(node.address, method, &at, &[], &[]).await;
        assert_eq!(answer.status, status, "{method} {at}: {}", answer.text());
        if status == 405 {
            assert!(answer.header("allow").is_some());
        }
    }
    let head = http::call(node.address, "HEAD", &path("/model"), &[], &[]).await;
    assert_eq!(
        (head.header("etag"), head.header("content-length")),
        (Some("\"0\""), Some(model.len().to_string().as_str()))
    );
    for tag in ["\"0\"", "W/\"0\"", "\"5\", \"0\"", "*"] {
        let answer = http::call(node.address, "GET", &path("/model"), &[("if-none-match", tag.to_owned())], &[]).await;
        assert_eq!((answer.status, answer.body.len()), (304, 0), "{tag}");
    }
    let job = http::get(node.address, &path(""), None).await.json();
    assert_eq!((job["kind"].as_str(), job["status"]["clients"]["reported"].as_u64()), (Some("FederatedJob"), Some(0)));
}

#[tokio::test]
async fn a_secret_is_asked_for_and_tokens_outlive_the_gateways_memory() {
    let node = Node::start(json!({})).await;
    node.job(|_| {}, &tensors::model([0.0; 5]), Some("open sesame")).await;
    let event =
        json!({"specversion": "1.0", "id": "1", "type": lifl_api::event::types::AVAILABLE, "source": source("a")});
    let join = async |secret: Option<&str>| {
        let mut headers = vec![("content-type", "application/cloudevents+json".to_owned())];
        headers.extend(secret.map(|secret| ("authorization", format!("Bearer {secret}"))));
        http::call(node.address, "POST", &path("/events"), &headers, event.to_string().as_bytes()).await
    };
    assert_eq!(join(None).await.status, 401);
    assert_eq!(join(Some("open sesam")).await.status, 403);
    let joined = join(Some("open sesame")).await;
    assert_eq!((joined.status, joined.json()["heartbeat"].as_str()), (200, Some("20s")));
    let token = joined.json()["token"].as_str().unwrap().to_owned();
    for at in ["", "/model"] {
        assert_eq!(http::get(node.address, &path(at), None).await.status, 401);
        assert_eq!(http::get(node.address, &path(at), Some(&token)).await.status, 200);
    }
    let heard = |word: &FromGateway| matches!(word, FromGateway::Joined { client, .. } if client == "a").then_some(());
    node.hear("Joined", heard).await;
    let node = node.kill().await.revive(&[]).await;
    assert_eq!(http::get(node.address, &path("/task?client=a"), Some(&token)).await.status, 200);
    node.hear("Joined again", heard).await;
    assert_eq!(node.settled().await, ["a"]);
}

#[tokio::test]
async fn metrics_reach_the_coordinator_with_the_role_of_their_sender() {
    let node = node(json!({}), 4).await;
    let token = node.join_as("judge", "evaluator").await;
    let headers = [
        ("ce-specversion", "1.0".to_owned()),
        ("ce-id", "m1".to_owned()),
        ("ce-source", source("judge")),
        ("ce-type", lifl_api::event::types::METRICS.to_owned()),
        ("content-type", "application/json".to_owned()),
        ("authorization", format!("Bearer {token}")),
    ];
    let body = br#"{"round": 0, "samples": 100, "metrics": {"accuracy": 0.5}}"#;
    let answer = http::call(node.address, "POST", &path("/events"), &headers, body).await;
    assert_eq!(answer.status, 202, "{}", answer.text());
    let metrics = |word: &FromGateway| match word {
        FromGateway::Metrics { client, evaluator: true, data, .. } => Some((client.clone(), data.samples)),
        _ => None,
    };
    assert_eq!(node.hear("Metrics", metrics).await.0, ("judge".to_owned(), 100));
    for bad in ["", "[]", r#"{"round": -1}"#] {
        let answer = http::call(node.address, "POST", &path("/events"), &headers, bad.as_bytes()).await;
        assert_eq!(answer.status, 400, "{bad}");
    }
    assert!(!node.settled().await.contains(&"judge".to_owned()));
}

#[tokio::test]
async fn the_head_is_judged_before_the_body_is_asked_for() {
    let node = node(json!({}), 4).await;
    let a = node.join("a").await;
    let ask = async |update: Update<'_>| {
        let mut headers = update.headers();
        headers.push(("expect", "100-continue".to_owned()));
        let mut stream = TcpStream::connect(node.address).await.unwrap();
        stream.write_all(&http::head("POST", &path("/events"), &headers, Some(100))).await.unwrap();
        http::answer(&mut stream, "POST").await
    };
    let good = Update::new("a", &a, "u");
    assert_eq!(ask(Update { round: "5", ..good }).await.status, 410);
    assert_eq!(ask(Update { token: None, ..good }).await.status, 401);
    // A good one is told to go on, and taken.
    let body = tensors::model(ONES);
    let mut stream = http::begin(node.address, &path("/events"), &good.headers(), body.len()).await;
    stream.write_all(&body).await.unwrap();
    assert_eq!(http::answer(&mut stream, "POST").await.status, 202);
}

#[tokio::test]
async fn a_drained_gateway_answers_polls_finishes_uploads_and_takes_no_more() {
    let node = node(json!({"heartbeat_ms": 0}), 4).await;
    let (a, b) = (node.join("a").await, node.join("b").await);
    let body = tensors::model(ONES);
    let headers = Update::new("a", &a, "u").headers();
    let mut upload = http::begin(node.address, &path("/events"), &headers, body.len()).await;
    // b has nothing to do in this round: its poll waits, and the drain is what answers it.
    let word = ToGateway::Extend { chain: harness::CHAIN, round: 1, selected: vec!["a".into()], deadline_ms: 0 };
    node.say(&word).await;
    node.settled().await;
    let address = node.address;
    let poll = tokio::spawn(async move { http::get(address, &path("/task?client=b&wait=60s"), Some(&b)).await });
    // Nobody is alive by what was heard before: b is while it polls.
    while node.settled().await != ["b"] {}
    node.supervisor.drain().await.unwrap();
    let task = soon("the poll", poll).await.unwrap();
    assert_eq!((task.status, task.json()["state"].as_str()), (200, Some("wait")));
    upload.write_all(&body).await.unwrap();
    assert_eq!(http::answer(&mut upload, "POST").await.status, 202);
    node.drained().await;
}
