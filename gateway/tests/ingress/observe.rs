//! The access log of the ingress, and its figures.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, header};
use http_body_util::Full;
use lifl_gateway::{ingress::Snapshot, observe::Observe};
use lifl_proxy::observe::Lines;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use crate::world::{PATIENCE, World, add, ask, backend, get, king, nobody, soon, whole};

#[derive(Clone, Debug, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

async fn world(written: &Written) -> (World, Lines) {
    let lines = Lines::to(Box::new(written.clone()), 1 << 16);
    let world = World::observed(Observe { log: Some(lines.clone()), traces: None }).await;
    let mut snapshot = Snapshot::default();
    add(&mut snapshot, "s", "http", &[backend("s").await]);
    add(&mut snapshot, "away", "http", &[nobody().await]);
    let rules = [whole("s.example", "s"), whole("away.example", "away")];
    snapshot.ingresses.push(king("k", json!({"rules": rules})));
    world.ingress.apply(&snapshot);
    (world, lines)
}

/// Lines as soon as there are so many.
async fn read(written: &Written, lines: &Lines, count: usize) -> Vec<Value> {
    soon("lines", async {
        loop {
            let flushed = lines.clone();
            assert!(tokio::task::spawn_blocking(move || flushed.flush(PATIENCE)).await.unwrap());
            let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
            let all: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            if all.len() >= count {
                assert_eq!(all.len(), count, "{text}");
                return all;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
}

#[tokio::test]
async fn each_request_has_a_line_that_says_what_became_of_it() {
    let written = Written::default();
    let (world, lines) = world(&written).await;
    let at = world.at["external"];
    let request = Request::post("/a?b=c").header(header::HOST, "s.example");
    let mut request = request.body(Full::new(Bytes::from("upload"))).unwrap();
    let agent = HeaderValue::from_static("me \"quoted\"");
    request.headers_mut().insert(header::USER_AGENT, agent);
    let parent = HeaderValue::from_static("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    request.headers_mut().insert("traceparent", parent);
    let answer = ask(at, request).await;
    ask(at, get("unknown.example", "/")).await;
    ask(at, get("away.example", "/")).await;
    let mut probe = get("s.example", "/");
    probe.headers_mut().insert("k-network-probe", HeaderValue::from_static("probe"));
    ask(at, probe).await;

    let all = read(&written, &lines, 4).await;
    let line = &all[0];
    let expected = json!({
        "listener": "external", "method": "POST", "host": "s.example", "protocol": "HTTP/1.1", "status": 200,
        "path": "/a?b=c", "requestBytes": 6, "bytes": answer.body.len(), "complete": true, "namespace": "n", "service": "s",
        "revision": "s", "userAgent": "me \"quoted\"", "traceId": "0af7651916cd43dd8448eb211c80319c",
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&line[key], value, "{key}");
    }
    assert!(line["duration"].as_f64().unwrap() > 0.0);
    assert!(line["time"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok(), "{line}");
    assert!(line["client"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert!(line["upstream"].as_str().unwrap().starts_with("127.0.0.1:"));
    let refused: Vec<_> = all[1..].iter().map(|line| (&line["status"], &line["reason"], &line["service"])).collect();
    assert_eq!(refused[0], (&404.into(), &"unknown".into(), &Value::Null));
    assert_eq!(refused[1], (&503.into(), &"upstream".into(), &"away".into()));

    let served = [("service", "s"), ("namespace", "n")];
    assert_eq!(world.counted("lifl_ingress_requests_total", &served), "2", "the probe as well");
    let families = world.registry.gather();
    let durations = families.iter().find(|family| family.name() == "lifl_ingress_request_duration_seconds").unwrap();
    let [of_s] = durations.get_metric() else { panic!("one service has answered: {durations:?}") };
    let histogram = of_s.get_histogram();
    assert_eq!((histogram.get_sample_count(), histogram.get_bucket().len()), (2, 14));
    world.end().await;
}

#[tokio::test]
async fn a_client_that_leaves_has_a_line_too() {
    let written = Written::default();
    let lines = Lines::to(Box::new(written.clone()), 1 << 16);
    let world = World::observed(Observe { log: Some(lines.clone()), traces: None }).await;
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut snapshot = Snapshot::default();
    add(&mut snapshot, "silent", "http", &[silent.local_addr().unwrap()]);
    snapshot.ingresses.push(king("k", json!({"rules": [whole("s.example", "silent")]})));
    world.ingress.apply(&snapshot);
    let mut client = tokio::net::TcpStream::connect(world.at["external"]).await.unwrap();
    client.write_all(b"GET /x HTTP/1.1\r\nHost: s.example\r\n\r\n").await.unwrap();
    // The backend has it: it is under way.
    let accepted = tokio::task::spawn_blocking(move || silent.accept().unwrap());
    let _kept = soon("the request", accepted).await.unwrap();
    drop(client);
    let line = read(&written, &lines, 1).await.remove(0);
    assert_eq!((&line["status"], &line["complete"]), (&499.into(), &false.into()), "{line}");
    assert!(line["upstream"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
    world.end().await;
}
