//! A job that is no more: not found, not waited for, not kept; and one of its name begins anew.

mod harness;

use std::time::Duration;

use harness::{CHAIN, Node, Update, http, job_word, path, soon, tensors};
use lifl_api::node::{FromGateway, ToGateway, Tree};
use serde_json::json;

const ONES: [f32; 5] = [1.0, 2.0, 3.0, 4.0, 5.0];

/// Waits until the supervisor keeps nothing of the chain.
async fn forgotten(node: &Node) {
    soon("the deposits to go", async {
        loop {
            let of = |key: &String| key.split('/').nth(1) == Some(CHAIN.to_string().as_str());
            if node.store.lock().is_ok_and(|store| !store.keys().any(of)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_removed_job_is_gone_for_clients_and_for_the_supervisor() {
    let node = Node::start(json!({})).await;
    node.job(|_| {}, &tensors::model([0.0; 5]), None).await;
    node.open(1, &["a", "b"], 2, Tree::default()).await;
    let (token, waiting) = (node.join("a").await, node.join("c").await);
    assert_eq!(node.update(Update::new("a", &token, "u"), &tensors::model(ONES)).await.status, 202);
    assert!(node.store.lock().unwrap().keys().any(|key| key.starts_with("segment/")));
    let (address, poll) = (node.address, path("/task?client=c&wait=30s"));
    let poll = tokio::spawn(async move { http::get(address, &poll, Some(&waiting)).await });
    node.say(&ToGateway::Remove { chain: CHAIN }).await;
    // Who waits is told at once, that it may end; who comes later finds nothing.
    let answer = soon("the poll", poll).await.unwrap();
    if answer.status == 200 {
        assert_eq!(
            (&answer.json()["state"], &answer.json()["reason"]),
            (&json!("failed"), &json!("the job is deleted"))
        );
    } else {
        assert_eq!(answer.status, 404, "the poll came late");
    }
    forgotten(&node).await;
    for call in ["/task?client=a", "/model", ""] {
        let answer = http::get(node.address, &path(call), Some(&token)).await;
        assert_eq!((answer.status, &answer.json()["code"]), (404, &json!("unknown_job")), "{call}");
    }
    assert_eq!(node.update(Update::new("a", &token, "v"), &tensors::model(ONES)).await.status, 404);
    // Asked again where it stands, and in its next life, it knows nothing of it.
    node.say(&ToGateway::Greet).await;
    let chains = |word: &FromGateway| match word {
        FromGateway::Hello { chains, journal } => Some((chains.len(), *journal)),
        _ => None,
    };
    assert_eq!(node.hear("Hello", chains).await.0, (0, false));
    let node = node.kill().await.revive(&[]).await;
    assert_eq!(node.hear("Hello", chains).await.0, (0, false));
    // Another job of its name takes updates, from its first round on.
    node.job(|_| {}, &tensors::model([0.0; 5]), None).await;
    node.open(1, &["a"], 1, Tree::default()).await;
    let token = node.join("a").await;
    assert_eq!(node.update(Update::new("a", &token, "u"), &tensors::model(ONES)).await.status, 202);
}

#[tokio::test]
async fn a_job_that_waits_for_memory_can_be_removed() {
    let node = Node::start(json!({"slot_wait_ms": 60_000})).await;
    node.agent.limit.store(0, std::sync::atomic::Ordering::Relaxed);
    node.say(&job_word(|_| {}, None, 64 << 20)).await;
    // The worker waits for the model's slot, and would for ever.
    node.model(0, &tensors::model([0.0; 5])).await;
    node.say(&ToGateway::Alive { chain: CHAIN }).await;
    node.say(&ToGateway::Remove { chain: CHAIN }).await;
    forgotten(&node).await;
    assert_eq!(http::get(node.address, &path(""), None).await.status, 404);
    node.drained().await;
}

#[tokio::test]
async fn a_journal_goes_with_its_job() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(json!({"journal_dir": folder.path()})).await;
    node.job(|spec| spec["ackLevel"] = json!("Disk"), &tensors::model([0.0; 5]), None).await;
    node.open(1, &["a", "b"], 2, Tree::default()).await;
    let token = node.join("a").await;
    assert_eq!(node.update(Update::new("a", &token, "u"), &tensors::model(ONES)).await.status, 202);
    let journal = folder.path().join("default.digits.journal");
    assert!(journal.exists());
    node.say(&ToGateway::Remove { chain: CHAIN }).await;
    forgotten(&node).await;
    assert!(!journal.exists());
}
