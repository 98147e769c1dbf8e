//! `initial: {fromFirstClient: true}`: whoever is first, and however many are; nobody else's tensors are taken.

mod harness;

use std::{
    cell::RefCell,
    fs::File,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt as _, MetadataExt as _},
    },
};

use harness::{CHAIN, Node, Update, http, job_word, path, soon, tensors};
use lifl_api::node::{FromGateway, ToGateway, Tree};
use lifl_ebpf::Kind;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

const CLIENTS: [&str; 4] = ["a", "b", "c", "d"];

async fn node() -> Node {
    let node = Node::start(json!({})).await;
    let spec = |spec: &mut Value| spec["model"]["initial"] = json!({"fromFirstClient": true});
    node.say(&job_word(spec, None, 64 << 20)).await;
    node.open(1, &CLIENTS, 4, Tree::default()).await;
    node
}

fn first(word: &FromGateway) -> Option<u64> {
    match word {
        FromGateway::FirstModel { offset: 0, length, .. } => Some(*length),
        _ => None,
    }
}

/// How often a first model is told before all that was said so far is done.
async fn told(node: &Node) -> usize {
    let told = RefCell::new(0);
    node.say(&ToGateway::Alive { chain: CHAIN }).await;
    let alive = |word: &FromGateway| {
        *told.borrow_mut() += usize::from(first(word).is_some());
        matches!(word, FromGateway::AliveClients { .. }).then_some(())
    };
    node.hear("answer to Alive", alive).await;
    told.into_inner()
}

#[expect(clippy::unwrap_used, reason = "a test ends where its surroundings fail")]
fn content(fds: Vec<OwnedFd>) -> Vec<u8> {
    let file = File::from(fds.into_iter().next().unwrap());
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().size()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[tokio::test]
async fn of_many_first_models_one_is_told_and_it_outlives_both_sides() {
    let node = node().await;
    let mut tokens = Vec::new();
    for client in CLIENTS {
        tokens.push(node.join(client).await);
    }
    let bodies: Vec<_> = [1.0, 2.0, 3.0].map(|value| tensors::model([value; 5])).into();
    // All of them are let in before any has sent its tensors.
    let mut uploads = Vec::new();
    for (client, token) in CLIENTS.iter().zip(&tokens).take(3) {
        let headers = Update::new(client, token, "u").headers();
        uploads.push(http::begin(node.address, &path("/events"), &headers, bodies[0].len()).await);
    }
    for (upload, body) in uploads.iter_mut().zip(&bodies) {
        upload.write_all(body).await.unwrap();
    }
    for upload in &mut uploads {
        let answer = http::answer(upload, "POST").await;
        assert_eq!((answer.status, answer.code().as_str()), (503, "model_adopted"));
        assert!(answer.header("retry-after").is_some());
    }
    // One that comes later is not even read, whatever it sends.
    let late = node.update(Update::new("d", &tokens[3], "u"), &tensors::model([f32::NAN; 5])).await;
    assert_eq!((late.status, late.code().as_str()), (503, "model_adopted"));
    assert_eq!(told(&node).await, 1);

    // A new coordinator knows of nothing.
    let mut node = node;
    node.coordinator = node.supervisor.peer("coordinator").await.unwrap();
    let (length, fds) = node.hear("FirstModel again", first).await;
    let adopted = content(fds);
    assert!(bodies.contains(&adopted) && adopted.len() as u64 == length);
    assert_eq!(told(&node).await, 0);
    let node = node.kill().await.revive(&[]).await;
    let (_, fds) = node.hear("FirstModel of the gateway's second life", first).await;
    assert_eq!(content(fds), adopted);
    let again = node.update(Update::new("b", &tokens[1], "u"), &bodies[1]).await;
    assert_eq!((again.status, again.code().as_str()), (503, "model_adopted"));
    assert_eq!(told(&node).await, 0);

    node.model(0, &adopted).await;
    node.settled().await;
    assert_eq!(node.descriptor().await.kind, Kind::Model as u8);
    for ((client, token), body) in CLIENTS.iter().zip(&tokens).zip(&bodies) {
        assert_eq!(node.update(Update::new(client, token, "u"), body).await.status, 202);
    }
    soon("the end of the deposit", async {
        while node.store.lock().unwrap().contains_key("first/7") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(told(&node).await, 0);
}

#[tokio::test]
async fn a_job_that_failed_over_its_first_model_lets_it_go() {
    let node = node().await;
    let a = node.join("a").await;
    let body = tensors::model([1.0; 5]);
    assert_eq!(node.update(Update::new("a", &a, "u"), &body).await.code(), "model_adopted");
    node.hear("FirstModel", first).await;
    node.say(&ToGateway::Finish { chain: CHAIN, succeeded: false, reason: "refused".into() }).await;
    node.settled().await;
    assert_eq!(node.update(Update::new("a", &a, "u"), &body).await.code(), "round_closed");
    soon("the end of the deposit", async {
        while node.store.lock().unwrap().contains_key("first/7") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let node = node.kill().await.revive(&[]).await;
    assert_eq!(told(&node).await, 0);
}
