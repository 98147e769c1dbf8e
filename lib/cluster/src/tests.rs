//! Stores and writes against an API server that is played by the test.

mod server;

use std::time::Duration;

use futures_util::FutureExt as _;
use k8s_openapi::{
    api::core::v1::{ConfigMap, Namespace},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use lifl_api::job::{FederatedJob, FederatedJobStatus};
use serde_json::{Value, json};
use server::{Server, Watcher};

use crate::{Closed, Keeper, Key, Notice, Notices, Selection, StatusWrite, Store, Writer, get};

/// The map of this name and version, with nothing in it.
pub(crate) fn map(name: &str, version: &str) -> ConfigMap {
    let (name, version) = (Some(name.to_owned()), Some(version.to_owned()));
    let (namespace, uid) = (Some("default".to_owned()), name.clone());
    ConfigMap {
        metadata: ObjectMeta { name, namespace, uid, resource_version: version, ..ObjectMeta::default() },
        ..ConfigMap::default()
    }
}

/// The key of the map of this name.
pub(crate) fn key(name: &str) -> Key {
    Key { namespace: "default".into(), name: name.into() }
}

fn list(version: &str, more: Option<&str>, maps: &[ConfigMap]) -> Value {
    json!({"kind": "ConfigMapList", "apiVersion": "v1", "metadata": {"resourceVersion": version, "continue": more}, "items": maps})
}

fn event(kind: &str, map: &ConfigMap) -> Value {
    json!({"type": kind, "object": map})
}

fn gone() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"})
}

/// Names and versions of what a store holds.
fn held(store: &Store<ConfigMap>) -> Vec<String> {
    let objects = store.snapshot();
    let version = |map: &ConfigMap| map.metadata.resource_version.clone().unwrap();
    objects.iter().map(|(key, map)| format!("{}@{}", key.name, version(map))).collect()
}

/// A store with `maps` at version 10, its watch begun.
async fn opened(maps: &[ConfigMap]) -> (Server, Store<ConfigMap>, Watcher) {
    let (client, mut server) = Server::start();
    let opening = tokio::spawn(async move { Store::open(&client, &Selection::default()).await });
    server.asked("GET", "/api/v1/configmaps?limit=500").await.answer(200, &list("10", None, maps));
    let (store, keeper) = opening.await.unwrap();
    tokio::spawn(Keeper::run(keeper));
    let watcher = server.watched_from("10").await;
    (server, store, watcher)
}

#[tokio::test(start_paused = true)]
async fn a_store_is_there_when_its_list_is_whole() {
    let (client, mut server) = Server::start();
    let selection = Selection { labels: Some("app=web".into()), ..Selection::namespace("default") };
    let opening = tokio::spawn(async move { Store::<ConfigMap>::open(&client, &selection).await });
    let first = server.asked("GET", "/api/v1/namespaces/default/configmaps?labelSelector=app%3Dweb&limit=500").await;
    first.answer(200, &list("10", Some("rest"), &[map("a", "1")]));
    let second = server.asked("GET", "").await;
    assert!(second.path.contains("continue=rest"), "{}", second.path);
    assert!(!opening.is_finished(), "half a list is no store");
    second.answer(200, &list("10", None, &[map("b", "2")]));
    let (store, _keeper) = opening.await.unwrap();
    assert_eq!(held(&store), ["a@1", "b@2"]);
}

#[tokio::test(start_paused = true)]
async fn changes_come_by_the_watch() {
    let (_server, mut store, watcher) = opened(&[map("a", "1"), map("b", "2")]).await;
    let before = store.snapshot();
    watcher.say(&event("MODIFIED", &map("a", "11")));
    store.changed().await.unwrap();
    assert_eq!(held(&store), ["a@11", "b@2"]);
    watcher.say(&event("DELETED", &map("b", "12")));
    let now = store.changed().await.unwrap();
    assert_eq!(held(&store), ["a@11"]);
    assert_eq!(now.changed_since(&before).count(), 2);
    assert_eq!(before.len(), 2, "a snapshot stays as it was");
}

#[tokio::test(start_paused = true)]
async fn a_burst_is_one_snapshot() {
    let (_server, mut store, watcher) = opened(&[]).await;
    let burst: Vec<Value> = (0..100).map(|n| event("ADDED", &map(&format!("m{n}"), &format!("{}", 11 + n)))).collect();
    watcher.say_all(&burst);
    assert_eq!(store.changed().await.unwrap().len(), 100);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_watch_goes_on_from_the_last_version() {
    let (mut server, mut store, watcher) = opened(&[map("a", "1")]).await;
    watcher.say(&event("MODIFIED", &map("a", "11")));
    store.changed().await.unwrap();
    watcher.break_off();
    let watcher = server.watched_from("11").await;
    watcher.say(&event("ADDED", &map("b", "12")));
    store.changed().await.unwrap();
    assert_eq!(held(&store), ["a@11", "b@12"]);
    watcher.end();
    server.watched_from("12").await;
}

#[tokio::test(start_paused = true)]
async fn a_bookmark_moves_the_version_and_tells_nobody() {
    let (mut server, mut store, watcher) = opened(&[map("a", "1")]).await;
    let mark = json!({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"resourceVersion": "50"}});
    watcher.say(&json!({"type": "BOOKMARK", "object": mark}));
    watcher.end();
    server.watched_from("50").await;
    assert!(store.changed().now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn after_410_everything_is_listed_and_swapped_at_once() {
    for within in [true, false] {
        let (mut server, mut store, watcher) = opened(&[map("a", "1"), map("b", "2")]).await;
        if within {
            watcher.say(&json!({"type": "ERROR", "object": gone()}));
        } else {
            watcher.end();
            server.asked("GET", "/api/v1/configmaps?").await.answer(410, &gone());
        }
        let first = server.asked("GET", "/api/v1/configmaps?limit=500").await;
        assert!(!first.path.contains("watch"), "{}", first.path);
        first.answer(200, &list("90", Some("rest"), &[map("a", "80")]));
        let second = server.asked("GET", "/api/v1/configmaps?limit=500").await;
        assert_eq!(held(&store), ["a@1", "b@2"], "half a list is not seen");
        second.answer(200, &list("90", None, &[map("c", "81")]));
        store.changed().await.unwrap();
        assert_eq!(held(&store), ["a@80", "c@81"]);
        server.watched_from("90").await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_list_that_expires_between_pages_begins_again() {
    let (client, mut server) = Server::start();
    let opening = tokio::spawn(async move { Store::<ConfigMap>::open(&client, &Selection::default()).await });
    server.asked("GET", "").await.answer(200, &list("10", Some("rest"), &[map("gone", "1")]));
    server.asked("GET", "").await.answer(410, &gone());
    let again = server.asked("GET", "").await;
    assert!(!again.path.contains("continue"), "{}", again.path);
    again.answer(200, &list("20", None, &[map("a", "15")]));
    assert_eq!(held(&opening.await.unwrap().0), ["a@15"]);
}

#[tokio::test(start_paused = true)]
async fn a_silent_watch_is_begun_again() {
    let (mut server, _store, _silent) = opened(&[]).await;
    let begun = tokio::time::Instant::now();
    server.watched_from("10").await;
    assert!(begun.elapsed() > Duration::from_secs(60), "a live watch may be silent between bookmarks");
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_is_away_is_asked_less_and_less_often() {
    let (client, mut server) = Server::start();
    let opening = tokio::spawn(async move { Store::<ConfigMap>::open(&client, &Selection::default()).await });
    let mut pauses = Vec::new();
    for _ in 0..12 {
        let begun = tokio::time::Instant::now();
        server.asked("GET", "").await.answer(503, &json!({"kind": "Status", "code": 503, "message": "away"}));
        pauses.push(begun.elapsed());
    }
    assert!(pauses[1] <= Duration::from_millis(100) && pauses[1] >= Duration::from_millis(50), "{pauses:?}");
    assert!(pauses[11] <= Duration::from_secs(30) && pauses[11] >= Duration::from_secs(15), "{pauses:?}");
    server.asked("GET", "").await.answer(200, &list("10", None, &[]));
    assert!(held(&opening.await.unwrap().0).is_empty());
}

#[tokio::test(start_paused = true)]
async fn one_object_that_cannot_be_read_hides_no_other() {
    let (mut server, mut store, watcher) = opened(&[map("a", "1")]).await;
    let broken = json!({"metadata": {"name": "a", "namespace": "default", "resourceVersion": "11"}, "data": "no map"});
    watcher.say_all(&[json!({"type": "MODIFIED", "object": broken}), event("ADDED", &map("b", "12"))]);
    store.changed().await.unwrap();
    assert_eq!(held(&store), ["a@1", "b@12"]);
    watcher.say(&json!({"type": "MODIFIED", "object": "no object"}));
    server.asked("GET", "/api/v1/configmaps?limit=500").await.answer(200, &list("20", None, &[map("b", "12")]));
    store.changed().await.unwrap();
    assert_eq!(held(&store), ["b@12"], "a change may have been missed: everything is listed");
}

#[tokio::test(start_paused = true)]
async fn who_has_no_reader_stops_and_who_has_no_keeper_learns_it() {
    let (client, mut server) = Server::start();
    let opening = tokio::spawn(async move { Store::<Namespace>::open(&client, &Selection::default()).await });
    server.asked("GET", "/api/v1/namespaces?limit=500").await.answer(200, &list("10", None, &[]));
    let (mut store, keeper) = opening.await.unwrap();
    drop(keeper);
    assert_eq!(store.changed().await.unwrap_err(), Closed);

    let (mut server, store, _watcher) = opened(&[]).await;
    drop(store);
    server.closed().await;
}

#[tokio::test(start_paused = true)]
async fn what_nobody_looks_at_is_not_kept() {
    let (client, mut server) = Server::start();
    let full = |name, version| {
        let data = [("kept", "a"), ("large", "b")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        ConfigMap { data: Some(data.into()), ..map(name, version) }
    };
    let trim = |map: &mut ConfigMap| map.data.iter_mut().for_each(|data| data.retain(|key, _| key == "kept"));
    let opening = tokio::spawn(async move { Store::open_trimmed(&client, &Selection::default(), trim).await });
    server.asked("GET", "/api/v1/configmaps?limit=500").await.answer(200, &list("10", None, &[full("a", "1")]));
    let (mut store, keeper) = opening.await.unwrap();
    tokio::spawn(Keeper::run(keeper));
    server.watched_from("10").await.say(&event("ADDED", &full("b", "11")));
    let objects = store.changed().await.unwrap();
    for name in ["a", "b"] {
        let data = objects.get(&key(name)).unwrap().data.as_ref().unwrap();
        assert_eq!(data.keys().collect::<Vec<_>>(), ["kept"], "{name}");
    }
}

fn job(status: Option<FederatedJobStatus>) -> FederatedJob {
    let spec = json!({"model": {"name": "m", "initial": {"fromFirstClient": true}}, "rounds": 1, "clientsPerRound": 1, "checkpoint": {"uri": "file:///m"}});
    let mut job = FederatedJob::new("digits", serde_json::from_value(spec).unwrap());
    job.metadata.namespace = Some("default".into());
    job.metadata.resource_version = Some("7".into());
    job.metadata.managed_fields = Some(Vec::new());
    job.status = status;
    job
}

const JOB: &str = "/apis/fl.lifl.dev/v1alpha1/namespaces/default/federatedjobs/digits";

#[tokio::test]
async fn an_equal_status_is_not_written() {
    let (client, mut server) = Server::start();
    let writer = Writer::new(client, "lifl");
    let status = FederatedJobStatus::default();
    let seen = job(Some(status.clone()));
    assert_eq!(writer.status(&seen, status).await.unwrap(), StatusWrite::Unchanged);
    drop(writer);
    server.closed().await;
}

#[tokio::test]
async fn another_status_is_written_to_the_version_that_was_seen() {
    for (code, expected) in [(200, None), (409, Some(StatusWrite::Stale)), (404, Some(StatusWrite::Stale))] {
        let (client, mut server) = Server::start();
        let writer = Writer::new(client, "lifl");
        let next = FederatedJobStatus { round: 3, ..FederatedJobStatus::default() };
        let written = job(Some(next.clone()));
        let writing = tokio::spawn(async move { writer.status(&job(None), next).await });
        let call = server.asked("PUT", &format!("{JOB}/status?fieldManager=lifl")).await;
        assert_eq!(call.body["metadata"]["resourceVersion"], "7");
        assert_eq!(call.body["status"]["round"], 3);
        let refused = json!({"kind": "Status", "code": code, "message": "no"});
        call.answer(code, &if code == 200 { serde_json::to_value(&written).unwrap() } else { refused });
        assert_eq!(writing.await.unwrap().unwrap(), expected.unwrap_or(StatusWrite::Written(written)));
    }
}

#[tokio::test]
async fn what_is_applied_has_our_name_and_no_one_elses_bookkeeping() {
    let (client, mut server) = Server::start();
    let writer = Writer::new(client, "lifl");
    let applying = tokio::spawn(async move { writer.apply(&job(None)).await });
    let call = server.asked("PATCH", JOB).await;
    assert!(call.path.contains("force=true") && call.path.contains("fieldManager=lifl"), "{}", call.path);
    assert_eq!(call.body["kind"], "FederatedJob");
    assert_eq!(call.body["metadata"], json!({"name": "digits", "namespace": "default"}));
    call.answer(403, &json!({"kind": "Status", "code": 403, "message": "no"}));
    let error = applying.await.unwrap().unwrap_err().to_string();
    assert!(error.starts_with("FederatedJob default/digits: "), "{error}");
}

#[tokio::test]
async fn one_object_is_read_by_its_name() {
    for (code, answer) in [
        (200, serde_json::to_value(map("a", "1")).unwrap()),
        (404, json!({"kind": "Status", "code": 404, "reason": "NotFound", "message": "no"})),
        (403, json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "no"})),
    ] {
        let (client, mut server) = Server::start();
        let reading = tokio::spawn(async move { get::<ConfigMap>(&client, &key("a")).await });
        server.asked("GET", "/api/v1/namespaces/default/configmaps/a").await.answer(code, &answer);
        match (code, reading.await.unwrap()) {
            (200, Ok(Some(found))) => assert_eq!(found, map("a", "1")),
            (404, Ok(None)) => {}
            (403, Err(error)) => assert!(error.to_string().starts_with("ConfigMap default/a: "), "{error}"),
            (_, other) => panic!("{code}: {other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_is_sent_until_the_api_server_has_it_or_will_not() {
    let (client, mut server) = Server::start();
    let (notices, crier) = Notices::new("lifl-agent", "node0");
    tokio::spawn(crier.run(client));
    let about = |uid: &str| k8s_openapi::api::core::v1::ObjectReference {
        namespace: Some("default".into()),
        name: Some("web".into()),
        uid: Some(uid.into()),
        ..Default::default()
    };
    let notice = |uid: &str| Notice { about: about(uid), warning: true, reason: "PodNotServed", message: "no".into() };
    for uid in ["u1", "u1", "u2", "u3", "u4"] {
        notices.say(notice(uid));
    }
    const EVENTS: &str = "/api/v1/namespaces/default/events?";
    let status = |code: u16| json!({"kind": "Status", "code": code, "message": "no"});
    // Away, too busy, then it takes it; one that it has already; one that it refuses; and the next.
    let rows = [("u1", 503), ("u1", 429), ("u1", 401), ("u1", 408), ("u1", 201), ("u2", 409), ("u3", 403), ("u4", 201)];
    for (uid, code) in rows {
        let call = server.asked("POST", EVENTS).await;
        assert_eq!(call.body["involvedObject"]["uid"], uid);
        assert_eq!((&call.body["reason"], &call.body["reportingInstance"]), (&json!("PodNotServed"), &json!("node0")));
        let body = call.body.clone();
        call.answer(code, &if code == 201 { body } else { status(code) });
    }
    // What was refused is not said over and over, and not never again.
    for uid in ["u2", "u3", "u4"] {
        assert!(!notices.say(notice(uid)), "{uid}");
    }
    tokio::time::advance(Duration::from_secs(600)).await;
    for uid in ["u2", "u3", "u4"] {
        assert_eq!(notices.say(notice(uid)), uid == "u3", "{uid}");
    }
    let call = server.asked("POST", EVENTS).await;
    let body = call.body.clone();
    assert_eq!(body["involvedObject"]["uid"], "u3");
    call.answer(201, &body);
    drop(notices);
    server.closed().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_delays_a_request() {
    let (client, mut server) = Server::start();
    let begun = tokio::time::Instant::now();
    let writer = Writer::new(client, "lifl");
    for _ in 0..500 {
        let writer = writer.clone();
        tokio::spawn(async move { writer.apply(&map("a", "1")).await });
    }
    let mut calls = Vec::new();
    for _ in 0..500 {
        calls.push(server.asked("PATCH", "").await);
    }
    assert_eq!(begun.elapsed(), Duration::ZERO, "all are under way at once");
}
