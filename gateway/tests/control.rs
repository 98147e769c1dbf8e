//! Control events: who may send them is judged before they are read, and all of them together are bounded.

mod harness;

use harness::{Node, http, path, soon, source, tensors};
use lifl_api::{
    event::types,
    node::{FromGateway, Tree},
};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

type Headers = Vec<(&'static str, String)>;

const STRUCTURED: &str = "application/cloudevents+json";

async fn node(config: Value, secret: Option<&str>) -> Node {
    let node = Node::start(config).await;
    node.job(|_| {}, &tensors::model([0.0; 5]), secret).await;
    node.open(1, &["a"], 1, Tree::default()).await;
    node
}

fn binary(kind: &str, client: &str, token: Option<&str>) -> Headers {
    let mut headers = vec![
        ("ce-specversion", "1.0".to_owned()),
        ("ce-id", "1".to_owned()),
        ("ce-source", source(client)),
        ("ce-type", kind.to_owned()),
        ("content-type", "application/json".to_owned()),
    ];
    headers.extend(token.map(|token| ("authorization", format!("Bearer {token}"))));
    headers
}

fn structured(token: Option<&str>) -> Headers {
    let mut headers = vec![("content-type", STRUCTURED.to_owned())];
    headers.extend(token.map(|token| ("authorization", format!("Bearer {token}"))));
    headers
}

/// An event of metrics with a filling of so many bytes.
fn filled(client: &str, bytes: usize) -> Vec<u8> {
    let data = json!({"round": 0, "samples": 1, "metrics": {"accuracy": 0.5}});
    let event = json!({"specversion": "1.0", "id": "1", "type": types::METRICS, "source": source(client),
        "filling": "x".repeat(bytes), "data": data});
    event.to_string().into_bytes()
}

/// The answer to a head alone, whose sender waits to be told to go on.
#[expect(clippy::unwrap_used, reason = "a test ends where its surroundings fail")]
async fn asked(node: &Node, mut headers: Headers, length: usize) -> (u16, String) {
    headers.push(("expect", "100-continue".to_owned()));
    let mut stream = TcpStream::connect(node.address).await.unwrap();
    stream.write_all(&http::head("POST", &path("/events"), &headers, Some(length))).await.unwrap();
    let answer = http::answer(&mut stream, "POST").await;
    (answer.status, answer.code())
}

#[tokio::test]
async fn who_may_not_send_is_told_before_the_body() {
    let node = node(json!({}), Some("open sesame")).await;
    let mut joining = binary(types::AVAILABLE, "a", Some("open sesame"));
    joining.remove(4);
    let joined = http::call(node.address, "POST", &path("/events"), &joining, &[]).await;
    assert_eq!(joined.status, 200, "{}", joined.text());
    let token = joined.json()["token"].as_str().unwrap().to_owned();
    let refused = |status: u16, code: &str| (status, code.to_owned());
    for (headers, answer) in [
        (binary(types::AVAILABLE, "a", None), refused(401, "no_token")),
        (binary(types::AVAILABLE, "a", Some("open sesam")), refused(403, "foreign_token")),
        (binary(types::AVAILABLE, "no name", Some("open sesame")), refused(400, "bad_attribute")),
        (binary(types::METRICS, "a", None), refused(401, "no_token")),
        (binary(types::METRICS, "a", Some("open sesame")), refused(403, "foreign_token")),
        (binary(types::METRICS, "b", Some(&token)), refused(403, "foreign_token")),
        (binary("some.other", "a", Some(&token)), refused(400, "bad_attribute")),
        (structured(None), refused(401, "no_token")),
        (structured(Some("open sesam")), refused(403, "foreign_token")),
    ] {
        assert_eq!(asked(&node, headers.clone(), 1000).await, answer, "{headers:?}");
    }
    for headers in
        [structured(Some(&token)), structured(Some("open sesame")), binary(types::METRICS, "a", Some(&token))]
    {
        drop(http::begin(node.address, &path("/events"), &headers, 8 << 20).await);
    }
}

#[tokio::test]
async fn strangers_may_say_little() {
    let node = node(json!({}), None).await;
    for headers in [structured(None), structured(Some("x.y")), binary(types::AVAILABLE, "a", None)] {
        assert_eq!(asked(&node, headers, (64 << 10) + 1).await, (413, "too_large".to_owned()));
    }
    // Without saying how much it will be.
    let mut headers = structured(None);
    headers.push(("transfer-encoding", "chunked".to_owned()));
    let mut stream = TcpStream::connect(node.address).await.unwrap();
    stream.write_all(&http::head("POST", &path("/events"), &headers, None)).await.unwrap();
    stream.write_all(format!("{:x}\r\n{}", 65 << 10, " ".repeat(65 << 10)).as_bytes()).await.unwrap();
    assert_eq!(http::answer(&mut stream, "POST").await.code(), "too_large");

    let a = node.join("a").await;
    let large = filled("a", 200 << 10);
    let answer = http::call(node.address, "POST", &path("/events"), &structured(Some(&a)), &large).await;
    assert_eq!(answer.status, 202, "{}", answer.text());
}

#[tokio::test]
async fn bodies_that_are_held_are_bounded_together() {
    // 300 kB for members, 100 kB for strangers.
    let node = node(json!({"control_bytes": 400_000}), None).await;
    let a = node.join("a").await;
    let (large, strange) = (filled("a", 200_000), filled("a", 60_000));
    for (headers, body, taken) in [(structured(Some(&a)), &large, 202), (structured(None), &strange, 401)] {
        let (almost, last) = body.split_at(body.len() - 1);
        soon("a refusal of the second of two", async {
            loop {
                let mut held = http::begin(node.address, &path("/events"), &headers, body.len()).await;
                held.write_all(almost).await.unwrap();
                let second = http::call(node.address, "POST", &path("/events"), &headers, body).await;
                if second.status == 503 {
                    assert_eq!(second.code(), "busy");
                    assert!(second.header("retry-after").is_some());
                    // The others are not touched by it.
                    node.join("b").await;
                    let small = structured(Some(&a));
                    let third = http::call(node.address, "POST", &path("/events"), &small, &filled("a", 9)).await;
                    assert_eq!(third.status, 202);
                }
                // The second may have been faster: then the first is refused, or was not read yet.
                let _refused_already = held.write_all(last).await;
                let first = http::answer(&mut held, "POST").await;
                if second.status == 503 && first.status == taken {
                    return;
                }
            }
        })
        .await;
        // What was held is given back.
        let alone = http::call(node.address, "POST", &path("/events"), &headers, body).await;
        assert_eq!(alone.status, taken, "{}", alone.text());
    }
}

#[tokio::test]
async fn slow_control_events_are_given_up() {
    let node = node(json!({"upload_grace_ms": 100}), None).await;
    let body = filled("a", 1000);
    let mut slow = http::begin(node.address, &path("/events"), &structured(None), body.len()).await;
    slow.write_all(&body[..body.len() - 1]).await.unwrap();
    let answer = http::answer(&mut slow, "POST").await;
    assert_eq!((answer.status, answer.code().as_str()), (408, "too_slow"));
}

#[tokio::test]
async fn metrics_are_few_short_and_finite() {
    let node = node(json!({}), None).await;
    let a = node.join("a").await;
    let headers = binary(types::METRICS, "a", Some(&a));
    let send = async |metrics: Value| {
        let body = json!({"round": 0, "samples": 1, "metrics": metrics}).to_string();
        http::call(node.address, "POST", &path("/events"), &headers, body.as_bytes()).await
    };
    let many = |count: usize| Value::Object((0..count).map(|n| (format!("m{n}"), json!(0.5))).collect());
    let named = |length: usize| json!({"n".repeat(length): 1.0});
    assert_eq!(send(many(64)).await.status, 202);
    assert_eq!(send(named(128)).await.status, 202);
    for bad in [many(65), named(129), named(1 << 20)] {
        let answer = send(bad).await;
        assert_eq!((answer.status, answer.code().as_str()), (422, "bad_metrics"));
        assert!(answer.body.len() < 1000);
    }
    for bad in ["1e999", "NaN", "null"] {
        let body = format!(r#"{{"round": 0, "samples": 1, "metrics": {{"loss": {bad}}}}}"#);
        let answer = http::call(node.address, "POST", &path("/events"), &headers, body.as_bytes()).await;
        assert_eq!(answer.status, 400, "{}", answer.text());
    }
    let metrics = |word: &FromGateway| match word {
        FromGateway::Metrics { data, .. } => Some(data.metrics.len()),
        _ => None,
    };
    assert_eq!((node.hear("Metrics", metrics).await.0, node.hear("Metrics", metrics).await.0), (64, 1));
}
