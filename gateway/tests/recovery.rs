//! What survives the gateway: a life cut short after each step, and another one that goes on.

mod harness;

use std::os::fd::AsFd as _;

use harness::{CHAIN, Node, Top, Update, group, http, path, soon, tensors};
use lifl_api::node::{FromAgent, FromGateway, ToGateway, Tree};
use lifl_ebpf::{Descriptor, Kind, ObjectKey, role};
use serde_json::json;

const ONES: [f32; 5] = [1.0, 2.0, 3.0, 4.0, 5.0];

async fn node(goal: u32, tree: Tree) -> Node {
    let node = Node::start(json!({})).await;
    node.job(|_| {}, &tensors::model([0.0; 5]), None).await;
    node.open(1, &["a", "b", "c"], goal, tree).await;
    node
}

fn hello(word: &FromGateway) -> Option<(u32, bool, u32, Option<u32>)> {
    let FromGateway::Hello { chains, .. } = word else { return None };
    chains.first().map(|chain| (chain.round, chain.open, chain.admitted, chain.model_round))
}

#[tokio::test]
async fn promised_updates_survive_and_are_sent_again() {
    let first = node(2, Tree::default()).await;
    let (a, b) = (first.join("a").await, first.join("b").await);
    let body = tensors::model(ONES);
    assert_eq!(first.update(Update::new("a", &a, "u"), &body).await.status, 202);
    let sent = first.descriptor_of(Kind::Update).await;

    let second = first.kill().await.revive(&[]).await;
    assert_eq!(second.hear("Hello", hello).await.0, (1, true, 1, Some(0)));
    let base = second.descriptor_of(Kind::Model).await;
    assert_eq!((base.dst, base.round), (role::TOP, 0));
    let again = second.descriptor_of(Kind::Update).await;
    assert_eq!((again.key(), again.weight(), again.dst), (sent.key(), 10.0, role::TOP));
    let segment = second.segment(again.segment).await;
    let object = segment.described(&again, 5).unwrap();
    assert_eq!(object.run_f32(&object.runs()[0]).unwrap(), ONES);
    // Same token, same receipt, and the round goes on: one more closes it.
    let answer = second.update(Update::new("a", &a, "u"), &body).await;
    assert_eq!((answer.status, answer.json()["duplicate"].as_bool()), (202, Some(true)));
    assert_eq!(second.update(Update::new("b", &b, "u"), &body).await.status, 202);
    let other = second.descriptor_of(Kind::Update).await;
    assert_ne!(other.segment, sent.segment, "a dead gateway's segments are not written");
    assert_eq!(second.descriptor_of(Kind::Close).await.count, 2);
    assert_eq!(http::get(second.address, &path("/model"), None).await.body, tensors::model([0.0; 5]));

    // Closed, and dead again: the successor says so, and asks the top again.
    let third = second.kill().await.revive(&[]).await;
    assert_eq!(third.hear("Hello", hello).await.0, (1, false, 2, Some(0)));
    let closed = |word: &FromGateway| matches!(word, FromGateway::Closed { round: 1, admitted: 2, .. }).then_some(());
    third.hear("Closed", closed).await;
    let mut keys = [third.descriptor_of(Kind::Update).await.key(), third.descriptor_of(Kind::Update).await.key()];
    keys.sort_unstable();
    assert_eq!(third.descriptor_of(Kind::Close).await.count, 2);

    // The model is sealed while the gateway lives, told while it is dead, and committed by the next.
    let top = Top::new(&third, 4096).await;
    let made = tensors::model([2.0; 5]);
    let model = top.seal(1, 2, 20.0, &made);
    let dead = third.kill().await;
    let fourth = {
        let node = dead.revive(&[(&top.segment, &top.fd)]).await;
        node.data.send_all(&group(&keys, model)).unwrap();
        node
    };
    let done = |word: &FromGateway| matches!(word, FromGateway::RoundDone { count: 2, .. }).then_some(());
    fourth.hear("RoundDone", done).await;
    let fifth = fourth.kill().await.revive(&[(&top.segment, &top.fd)]).await;
    fifth.hear("RoundDone again", done).await;
    let sha256 = tensors::sha256(&made);
    fifth.say(&ToGateway::Commit { chain: CHAIN, round: 1, sha256 }).await;
    fifth.settled().await;
    let sixth = fifth.kill().await.revive(&[(&top.segment, &top.fd)]).await;
    assert_eq!(sixth.hear("Hello", hello).await.0.3, Some(1));
    sixth.open(2, &["a"], 1, Tree::default()).await;
    assert_eq!(http::get(sixth.address, &path("/model?round=1"), None).await.body, made);
    let answer = sixth.update(Update::new("b", &b, "u"), &body).await;
    assert_eq!((answer.status, answer.json()["duplicate"].as_bool()), (202, Some(true)));
    // Nothing of the first lives is in use any more: their segments are given back.
    while sixth.store.lock().unwrap().contains_key("segment/7/0") {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_is_on_disk_survives_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let disk = |spec: &mut serde_json::Value| spec["ackLevel"] = "Disk".into();
    let body = tensors::model(ONES);
    let refusing = Node::start(json!({})).await;
    refusing.job(disk, &tensors::model([0.0; 5]), None).await;
    refusing.open(1, &["a"], 2, Tree::default()).await;
    let a = refusing.join("a").await;
    let answer = refusing.update(Update::new("a", &a, "u"), &body).await;
    assert_eq!((answer.status, answer.code().as_str()), (503, "journal_failed"));
    assert!(answer.header("retry-after").is_some());

    let config = json!({"journal_dir": dir.path()});
    let first = Node::start(config.clone()).await;
    first.job(disk, &tensors::model([0.0; 5]), None).await;
    first.open(1, &["a", "b"], 2, Tree::default()).await;
    let a = first.join("a").await;
    assert_eq!(first.update(Update::new("a", &a, "u"), &body).await.status, 202);
    drop(first.kill().await);

    // Another machine as far as memory goes: no ledger, no segment, the same disk and the same key of tokens.
    let second = Node::start(config).await;
    second.job(disk, &tensors::model([0.0; 5]), None).await;
    second.open(1, &["a", "b"], 2, Tree::default()).await;
    let sent = second.descriptor_of(Kind::Update).await;
    let segment = second.segment(sent.segment).await;
    let object = segment.described(&sent, 5).unwrap();
    assert_eq!((object.run_f32(&object.runs()[0]).unwrap(), sent.weight()), (&ONES[..], 10.0));
    let answer = second.update(Update::new("a", &a, "u"), &body).await;
    assert_eq!((answer.status, answer.json()["duplicate"].as_bool()), (202, Some(true)));
}

#[tokio::test]
async fn a_successor_of_an_aggregator_gets_what_was_not_contained() {
    let tree = Tree { leaves: vec![role::LEAF, role::LEAF + 1], middle: Some(role::MIDDLE) };
    let node = node(3, tree).await;
    let body = tensors::model(ONES);
    let mut sent = Vec::new();
    for client in ["a", "b", "c"] {
        let token = node.join(client).await;
        assert_eq!(node.update(Update::new(client, &token, "u"), &body).await.status, 202);
        sent.push(node.descriptor_of(Kind::Update).await);
    }
    let mut leaves: Vec<u32> = sent.iter().map(|update| update.dst).collect();
    leaves.sort_unstable();
    assert!(leaves == [16, 16, 17] || leaves == [16, 17, 17], "{leaves:?}");
    let mut closes = Vec::new();
    for _ in 0..4 {
        let close = node.descriptor_of(Kind::Close).await;
        closes.push((close.dst, close.count));
    }
    closes.sort_unstable();
    assert_eq!(closes[..2], [(role::TOP, 3), (role::MIDDLE, 3)]);
    assert_eq!(closes[2].1 + closes[3].1, 3);

    let busy = leaves[1];
    node.agent.channel.send(&FromAgent::Replaced { chain: CHAIN, role: busy }, &[]).await.unwrap();
    let mut again = [node.descriptor().await, node.descriptor().await];
    again.sort_by_key(Descriptor::key);
    let mut expected: Vec<ObjectKey> = sent.iter().filter(|u| u.dst == busy).map(Descriptor::key).collect();
    expected.sort_unstable();
    assert_eq!(again.map(|update| update.key()).to_vec(), expected);
    let close = node.descriptor().await;
    assert_eq!((close.kind, close.dst, close.count), (Kind::Close as u8, busy, 2));
}

#[tokio::test]
async fn nonsense_on_the_data_socket_is_ignored() {
    let node = node(1, Tree::default()).await;
    let a = node.join("a").await;
    assert_eq!(node.update(Update::new("a", &a, "u"), &tensors::model(ONES)).await.status, 202);
    let sent = node.descriptor_of(Kind::Update).await;
    let top = Top::new(&node, 4096).await;
    let model = top.seal(1, 1, 10.0, &tensors::model([2.0; 5]));
    let lies = [
        Descriptor { src: role::TOP, kind: 99, ..model },
        Descriptor { src: role::TOP, version: 9, ..model },
        Descriptor { chain: 99, ..model },
        Descriptor { src: role::GATEWAY, ..model },
        Descriptor { src: role::LEAF, ..model },
        Descriptor { round: 2, ..model },
        Descriptor { count: 2, ..model },
        Descriptor { length: 1, ..model },
        Descriptor { weight_bits: f64::NAN.to_bits(), ..model },
        model,
        Descriptor { kind: Kind::Update as u8, ..model },
        Descriptor { kind: Kind::Sealed as u8, src: role::LEAF, ..model },
    ];
    node.data.send_all(&lies).unwrap();
    // A release of another's input, and of nothing known.
    let foreign = group(&[sent.key()], Descriptor { src: role::LEAF, kind: Kind::Sealed as u8, ..model });
    let unknown = group(&[ObjectKey { segment: 9, slot: 9, generation: 9 }], model);
    node.data.send_all(&[foreign, unknown].concat()).unwrap();
    // Then the truth.
    node.data.send_all(&group(&[sent.key()], model)).unwrap();
    let done = |word: &FromGateway| matches!(word, FromGateway::RoundDone { count: 1, .. }).then_some(());
    node.hear("RoundDone", done).await;
    // The update's slot is free again: said once more, it changes nothing.
    node.data.send_all(&group(&[sent.key()], model)).unwrap();
    node.hear("RoundDone", done).await;
}

/// Clients find the gateway that has their job by an address of the coordinator's.
#[tokio::test]
async fn the_coordinators_listener_is_served_while_it_is_connected() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut node = node(1, Tree::default()).await;
    node.coordinator.send(&ToGateway::Clients, &[listener.as_fd()]).await.unwrap();
    assert_eq!(soon("an answer", http::get(address, &path(""), None)).await.status, 200);
    assert_eq!(http::get(node.address, &path(""), None).await.status, 200, "its own is served as before");

    // The coordinator is started again: who connects meanwhile waits for it.
    node.coordinator = node.supervisor.peer("coordinator").await.unwrap();
    node.hear("Hello", hello).await;
    let waiting = tokio::spawn(async move { http::get(address, &path(""), None).await });
    node.coordinator.send(&ToGateway::Clients, &[listener.as_fd()]).await.unwrap();
    assert_eq!(soon("an answer", waiting).await.unwrap().status, 200);

    // So it is with the gateway's next life.
    let node = node.kill().await.revive(&[]).await;
    let waiting = tokio::spawn(async move { http::get(address, &path(""), None).await });
    node.coordinator.send(&ToGateway::Clients, &[listener.as_fd()]).await.unwrap();
    assert_eq!(soon("an answer", waiting).await.unwrap().status, 200);

    // The coordinator's pod is gone, and its listener with it: no gateway holds it open.
    drop(listener);
    node.supervisor.peer("coordinator").await.unwrap();
    soon("the end of the listener", async {
        while tokio::net::TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
