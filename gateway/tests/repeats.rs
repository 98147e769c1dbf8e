//! An update that is sent again: the same receipt for the same content, before and after lives end.

mod harness;

use harness::{CHAIN, Node, Top, Update, group, http, job_word, open_word, path, tensors};
use lifl_api::node::{FromGateway, ToGateway, Tree};
use lifl_ebpf::Kind;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

const ONES: [f32; 5] = [1.0, 2.0, 3.0, 4.0, 5.0];

async fn node(config: Value, goal: u32) -> Node {
    let node = Node::start(config).await;
    node.job(|spec| spec["update"] = json!({"maxSize": "4Ki"}), &tensors::model([0.0; 5]), None).await;
    node.open(1, &["a", "b"], goal, Tree::default()).await;
    node
}

/// All ways to repeat an update that was accepted with `head` and `body`.
async fn repeat(node: &Node, head: Update<'_>, body: &[u8]) {
    let same = node.update(head, body).await;
    assert_eq!((same.status, same.json()["duplicate"].as_bool()), (202, Some(true)), "{}", same.text());
    let nan = tensors::model([f32::NAN; 5]);
    let other = tensors::model([9.0; 5]);
    for (what, body) in [("others", &other[..]), ("nothing", &[]), ("NaN", &nan), ("part", &body[..body.len() - 1])] {
        let answer = node.update(head, body).await;
        assert_eq!((answer.status, answer.code().as_str()), (409, "other_content"), "{what}: {}", answer.text());
    }
    let long = vec![0; 5 << 10];
    assert_eq!(node.update(head, &long).await.code(), "too_large");
}

#[tokio::test]
async fn a_repeated_event_is_compared_with_what_was_accepted() {
    let node = node(json!({"upload_grace_ms": 200}), 2).await;
    let (a, b) = (node.join("a").await, node.join("b").await);
    let body = tensors::model(ONES);
    let right = format!("sha256-{}", tensors::sha256(&body));
    let (right, wrong) = ([("ce-fldigest", right.as_str())], format!("sha256-{}", "0".repeat(64)));
    let wrong = [("ce-fldigest", wrong.as_str())];
    let plain = Update::new("a", &a, "u");
    assert_eq!(node.update(plain, &body).await.status, 202);
    repeat(&node, plain, &body).await;
    // Accepted by its CRC, named by its SHA-256 now.
    repeat(&node, Update { more: &right, ..plain }, &body).await;
    assert_eq!(node.update(Update { more: &wrong, ..plain }, &body).await.code(), "other_content");
    // It is paced as uploads are, and takes no slot.
    let mut slow = http::begin(node.address, &path("/events"), &plain.headers(), body.len()).await;
    slow.write_all(&body[..9]).await.unwrap();
    assert_eq!(http::answer(&mut slow, "POST").await.code(), "too_slow");

    // The other way round; with both digests there is nothing to read.
    let named = Update { more: &right, ..Update::new("b", &b, "u") };
    let first = node.descriptor_of(Kind::Update).await;
    assert_eq!(node.update(named, &body).await.status, 202);
    let second = node.descriptor_of(Kind::Update).await;
    repeat(&node, Update { more: &[], ..named }, &body).await;
    assert_eq!(node.update(named, &body).await.status, 202);
    assert_eq!(node.update(Update { more: &wrong, ..named }, &body).await.code(), "other_content");

    // The round is closed by now, and then committed.
    repeat(&node, plain, &body).await;
    let top = Top::new(&node, 4096).await;
    let made = tensors::model([1.5; 5]);
    node.data.send_all(&group(&[first.key(), second.key()], top.seal(1, 2, 20.0, &made))).unwrap();
    node.hear("RoundDone", |word| matches!(word, FromGateway::RoundDone { .. }).then_some(())).await;
    node.say(&ToGateway::Commit { chain: CHAIN, round: 1, sha256: tensors::sha256(&made) }).await;
    node.settled().await;
    repeat(&node, plain, &body).await;
    let late = node.update(Update { round: "2", ..Update::new("a", &a, "v") }, &body).await;
    assert_eq!(late.code(), "round_not_begun");
}

fn disk(spec: &mut Value) {
    spec["ackLevel"] = "Disk".into();
}

#[tokio::test]
async fn a_round_that_is_not_known_yet_is_no_reason_to_give_up() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"journal_dir": dir.path()});
    let body = tensors::model(ONES);
    let first = Node::start(config.clone()).await;
    first.job(disk, &tensors::model([0.0; 5]), None).await;
    first.open(1, &["a", "b"], 3, Tree::default()).await;
    let (a, b) = (first.join("a").await, first.join("b").await);
    assert_eq!(first.update(Update::new("a", &a, "u"), &body).await.status, 202);
    drop(first.kill().await);

    // Nothing but the disk is left, and the coordinator waits for clients before it opens the round.
    let second = Node::start(config).await;
    second.job(disk, &tensors::model([0.0; 5]), None).await;
    let known = second.update(Update::new("a", &a, "u"), &body).await;
    assert_eq!((known.status, known.json()["duplicate"].as_bool()), (202, Some(true)), "{}", known.text());
    let other = second.update(Update::new("a", &a, "u"), &tensors::model([9.0; 5])).await;
    assert_eq!(other.code(), "other_content");
    let early = second.update(Update::new("b", &b, "u"), &body).await;
    assert_eq!((early.status, early.code().as_str()), (503, "starting"));
    assert!(early.header("retry-after").is_some());

    // What is admitted again counts, and is told.
    second.say(&open_word(1, &["a", "b"], 3, Tree::default())).await;
    let progress = |word: &FromGateway| match word {
        FromGateway::Progress { round: 1, admitted, .. } => Some(*admitted),
        _ => None,
    };
    assert_eq!(second.hear("Progress", progress).await.0, 1);
    second.settled().await;
    let another = second.update(Update::new("a", &a, "v"), &body).await;
    assert_eq!((another.status, another.code().as_str()), (422, "one_per_round"));
    repeat_once(&second, Update::new("a", &a, "u"), &body).await;
    assert_eq!(second.update(Update::new("b", &b, "u"), &body).await.status, 202);
}

async fn repeat_once(node: &Node, head: Update<'_>, body: &[u8]) {
    let same = node.update(head, body).await;
    assert_eq!((same.status, same.json()["duplicate"].as_bool()), (202, Some(true)), "{}", same.text());
}

#[tokio::test]
async fn committed_rounds_are_closed_even_to_a_new_ledger() {
    let node = Node::start(json!({})).await;
    node.job(|_| {}, &tensors::model([0.0; 5]), None).await;
    node.model(2, &tensors::model([2.0; 5])).await;
    node.settled().await;
    let a = node.join("a").await;
    let body = tensors::model(ONES);
    for (round, status, code) in [("0", 410, "round_closed"), ("2", 410, "round_closed"), ("3", 503, "starting")] {
        let answer = node.update(Update { round, ..Update::new("a", &a, "u") }, &body).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "round {round}");
    }
}

#[tokio::test]
async fn nobody_takes_the_place_of_a_journalled_update() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"journal_dir": dir.path(), "slot_wait_ms": 50});
    let clients = ["a", "b", "c", "d", "e"];
    let body = tensors::model(ONES);
    let first = Node::start(config.clone()).await;
    first.job(disk, &tensors::model([0.0; 5]), None).await;
    first.open(1, &clients, 5, Tree::default()).await;
    for client in &clients[..4] {
        let token = first.join(client).await;
        assert_eq!(first.update(Update::new(client, &token, "u"), &body).await.status, 202);
    }
    drop(first.kill().await);

    // Room for the model and fewer updates than the journal holds: admitting them again takes as long as the test likes.
    let second = Node::start(config).await;
    second.say(&job_word(disk, None, 2 * 12 * 1024)).await;
    second.model(0, &tensors::model([0.0; 5])).await;
    second.settled().await;
    second.say(&open_word(1, &clients, 5, Tree::default())).await;
    second.hear("Progress", |word| matches!(word, FromGateway::Progress { .. }).then_some(())).await;
    let e = second.join("e").await;
    let answer = second.update(Update::new("e", &e, "u"), &body).await;
    assert_eq!((answer.status, answer.code().as_str()), (503, "starting"), "{}", answer.text());
    let d = second.join("d").await;
    repeat_once(&second, Update::new("d", &d, "u"), &body).await;

    // Dead in the midst of it: the next life has the ledger, and goes on with what the journal has besides.
    let third = second.kill().await.revive(&[]).await;
    third.say(&job_word(disk, None, 64 << 20)).await;
    third.say(&open_word(1, &clients, 5, Tree::default())).await;
    let whole = |word: &FromGateway| matches!(word, FromGateway::Progress { admitted: 4, .. }).then_some(());
    third.hear("Progress of all", whole).await;
    third.settled().await;
    for client in &clients[..4] {
        let token = third.join(client).await;
        repeat_once(&third, Update::new(client, &token, "u"), &body).await;
    }
    assert_eq!(third.update(Update::new("e", &e, "u"), &body).await.status, 202);
}
