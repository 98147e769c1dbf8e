//! The ingress over real sockets: rules, redirects, certificates, upgrades, trailers, addresses that do not answer.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, header};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use lifl_cluster::Key;
use lifl_gateway::ingress::{Outcome, Snapshot};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::world::{
    World, add, ask, ask_http2, ask_on, backend, certificate, get, http1_on, http2_on, king, nobody, read, rule, soon,
    split, tls, whole,
};

fn name(name: &str) -> Key {
    Key { namespace: "n".into(), name: name.into() }
}

#[tokio::test]
async fn requests_find_their_way_by_host_path_and_header() {
    let world = World::new().await;
    let mut snapshot = Snapshot::default();
    for service in ["root", "foo", "tagged"] {
        add(&mut snapshot, service, "http", &[backend(service).await]);
    }
    let paths = json!([
        {"splits": [split("root", 100)], "appendHeaders": {"Which": "root", "Foo": "set"}},
        {"path": "/foo", "splits": [split("foo", 100)], "rewriteHost": "inner.n.svc.cluster.local"},
        {"path": "/foo", "headers": {"Knative-Serving-Tag": {"exact": "next"}}, "splits": [split("tagged", 100)]},
    ]);
    let inner = rule("s.n.svc.cluster.local", "ClusterLocal", json!([{"splits": [split("root", 100)]}]));
    snapshot.ingresses.push(king("k", json!({"rules": [rule("shop.example.com", "ExternalIP", paths), inner]})));
    let report = world.ingress.apply(&snapshot);
    assert_eq!(report.ingresses[&name("k")].1, Outcome::Served);
    let at = world.at["external"];

    let mut request = get("Shop.example.com:8080", "/fo?q=1");
    request.headers_mut().insert("foo", HeaderValue::from_static("bogus"));
    request.headers_mut().insert("knative-serving-revision", HeaderValue::from_static("forged"));
    // A client takes away what is its own, and not what the rule appends.
    request.headers_mut().insert("connection", HeaderValue::from_static("x-hop, which, Foo, x-forwarded-proto"));
    request.headers_mut().insert("k-proxy-request", HeaderValue::from_static("activator"));
    request.headers_mut().insert("x-hop", HeaderValue::from_static("1"));
    let saw = ask(at, request).await.saw();
    assert_eq!(saw["backend"], "root");
    assert_eq!(saw["host"], "Shop.example.com:8080");
    for (header, want) in [
        ("foo", "set"),
        ("which", "root"),
        ("knative-serving-revision", "root"),
        ("knative-serving-namespace", "n"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-proto", "http"),
    ] {
        assert_eq!(saw["headers"][header], json!([want]), "{header}");
    }
    assert_eq!(saw["headers"].get("x-hop"), None);
    assert_eq!(saw["headers"].get("k-proxy-request"), None, "it did not come by way of the activator");

    let saw = ask(at, get("shop.example.com", "/food")).await.saw();
    assert_eq!((&saw["backend"], &saw["host"]), (&json!("foo"), &json!("inner.n.svc.cluster.local")));
    let mut tagged = get("shop.example.com", "/foo");
    tagged.headers_mut().insert("knative-serving-tag", HeaderValue::from_static("next"));
    assert_eq!(ask(at, tagged).await.backend(), "tagged");

    for (host, listener, want) in [
        ("nobody.example.com", "external", 404),
        ("s.n.svc.cluster.local", "external", 404),
        ("s.n.svc.cluster.local", "local", 200),
        ("s.n", "local", 200),
        ("shop.example.com", "local", 200),
    ] {
        let answer = ask(world.at[listener], get(host, "/")).await;
        assert_eq!(answer.status, want, "{host} {listener}");
        assert_eq!(answer.body.is_empty(), want == 404);
    }
    assert_eq!(world.counted("lifl_ingress_refused_total", &[("listener", "external"), ("reason", "unknown")]), "2");
    assert_eq!(world.counted("lifl_ingress_requests_total", &[("service", "tagged"), ("code", "2xx")]), "1");
    assert_eq!(world.counted("lifl_ingress_objects", &[("state", "served")]), "1");
    world.end().await;
}

/// Whom a request is for is said once: where it goes, what the backend reads and where a client is sent are the same host.
#[tokio::test]
async fn a_user_in_the_target_is_no_host() {
    let world = World::new().await;
    let mut snapshot = Snapshot::default();
    for service in ["a", "b"] {
        add(&mut snapshot, service, "http", &[backend(service).await]);
    }
    snapshot.ingresses.push(king("k", json!({"rules": [whole("a.example", "a"), whole("b.example", "b")]})));
    let moved = json!({"rules": [whole("c.example", "a")], "httpOption": "Redirected"});
    snapshot.ingresses.push(king("moved", moved));
    world.ingress.apply(&snapshot);
    let at = world.at["external"];
    let answer = async |target: &str| {
        let mut stream = TcpStream::connect(at).await.unwrap();
        let head = format!("GET {target} HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        soon("an answer", stream.read_to_string(&mut answer)).await.unwrap();
        answer
    };
    for target in ["http://a.example:x@b.example/", "http://a.example@b.example/"] {
        let answer = answer(target).await;
        let body = answer.rsplit("\r\n\r\n").next().unwrap();
        let saw: serde_json::Value = serde_json::from_str(body).expect(&answer);
        assert_eq!((&saw["saw"]["backend"], &saw["saw"]["host"]), (&json!("b"), &json!("b.example")), "{target}");
    }
    let answer = answer("http://u:p@c.example/p").await.to_ascii_lowercase();
    assert!(answer.contains("location: https://c.example/p\r\n"), "{answer}");
    world.end().await;
}

#[tokio::test]
async fn shares_are_kept() {
    let world = World::new().await;
    let mut snapshot = Snapshot::default();
    for service in ["blue", "green"] {
        add(&mut snapshot, service, "http", &[backend(service).await]);
    }
    let splits = json!([{"splits": [split("blue", 90), split("green", 10)]}]);
    snapshot.ingresses.push(king("k", json!({"rules": [rule("h.example.com", "ExternalIP", splits)]})));
    world.ingress.apply(&snapshot);
    let mut counts = BTreeMap::<String, u32>::new();
    let mut sender = http1_on(TcpStream::connect(world.at["external"]).await.unwrap()).await;
    for _ in 0..600 {
        let saw = ask_on(&mut sender, get("h.example.com", "/")).await.saw();
        assert_eq!(saw["headers"]["knative-serving-revision"], json!([saw["backend"]]));
        *counts.entry(saw["backend"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    // Sixty are meant; seven standard deviations are 51.
    assert!((9..=111).contains(&counts["green"]), "{counts:?}");
    drop(sender);
    world.end().await;
}

#[tokio::test]
async fn probes_travel_to_the_backend_and_tell_the_version() {
    let world = World::new().await;
    let mut snapshot = Snapshot::default();
    add(&mut snapshot, "s", "http", &[backend("s").await]);
    snapshot.ingresses.push(king("k", json!({"rules": [whole("h.example.com", "s")]})));
    let report = world.ingress.apply(&snapshot);
    let hash = report.ingresses[&name("k")].0.clone().unwrap();
    let mut defaulted = (*snapshot.ingresses[0]).clone();
    defaulted.set_defaults();
    assert_eq!(hash, defaulted.hash().unwrap());
    for (sent, want) in [("override", hash.as_str()), ("2701a1b2", "2701a1b2")] {
        let mut probe = get("h.example.com", "/healthz");
        for (header, value) in [("k-network-probe", "probe"), ("k-network-hash", sent)] {
            probe.headers_mut().insert(header, HeaderValue::from_str(value).unwrap());
        }
        let answer = ask(world.at["external"], probe).await;
        assert_eq!((answer.status, answer.header("k-network-hash")), (200, want));
        assert_eq!(answer.saw()["path"], "/healthz");
    }
    // A prober of Ingresses asks for the rules: backends, which need not know that path, are not bothered.
    let mut probe = get("h.example.com", "/healthz");
    for (header, value) in [("user-agent", "Knative-Ingress-Probe"), ("k-network-hash", "override")] {
        probe.headers_mut().insert(header, HeaderValue::from_static(value));
    }
    let answer = ask(world.at["external"], probe).await;
    assert_eq!((answer.status, answer.header("k-network-hash")), (200, hash.as_str()));
    assert!(answer.body.is_empty(), "{answer:?}");
    let unprobed = ask(world.at["external"], get("h.example.com", "/")).await;
    assert_eq!(unprobed.headers.get("k-network-hash"), None);
    world.end().await;
}

#[tokio::test]
async fn what_is_redirected_goes_to_https() {
    let world = World::new().await;
    let mut snapshot = Snapshot::default();
    add(&mut snapshot, "s", "http", &[backend("s").await]);
    let (secret, der) = certificate("cert", &["h.example.com"]);
    snapshot.secrets.push(secret);
    let spec = json!({"httpOption": "Redirected", "rules": [whole("h.example.com", "s")],
                      "tls": [{"hosts": ["h.example.com"], "secretName": "cert"}]});
    snapshot.ingresses.push(king("k", spec));
    world.ingress.apply(&snapshot);
    for (host, want) in [
        ("h.example.com", "https://h.example.com/a?b=c"),
        ("h.example.com:80", "https://h.example.com/a?b=c"),
        ("h.example.com:8080", "https://h.example.com:8080/a?b=c"),
    ] {
        for listener in ["external", "local"] {
            let answer = ask(world.at[listener], get(host, "/a?b=c")).await;
            assert_eq!((answer.status, answer.header("location")), (301, want));
        }
    }
    let stream = tls(world.at["external-tls"], "h.example.com", &der, &["http/1.1"]).await.unwrap();
    let saw = ask_on(&mut http1_on(stream).await, get("h.example.com", "/")).await.saw();
    assert_eq!(saw["headers"]["x-forwarded-proto"], json!(["https"]));
    world.end().await;
}

#[tokio::test]
async fn certificates_are_chosen_by_name_and_replaced_while_served() {
    let world = World::new().await;
    let mut snapshot = Snapshot::default();
    add(&mut snapshot, "s", "http", &[backend("s").await]);
    let (first, first_der) = certificate("first", &["a.example.com"]);
    let (second, second_der) = certificate("second", &["b.example.com"]);
    snapshot.secrets = vec![first, second];
    let secure = |host: &str, secret: &str| json!({"rules": [whole(host, "s")], "tls": [{"hosts": [host], "secretName": secret}]});
    snapshot.ingresses =
        vec![king("a", secure("a.example.com", "first")), king("b", secure("b.example.com", "second"))];
    world.ingress.apply(&snapshot);
    let at = world.at["external-tls"];

    let old = tls(at, "a.example.com", &first_der, &["h2", "http/1.1"]).await.unwrap();
    assert_eq!(old.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let mut old = http2_on(old).await;
    let request = || Request::get("https://a.example.com/").body(Full::default()).unwrap();
    assert_eq!(ask_http2(&mut old, request()).await.backend(), "s");
    let other = tls(at, "b.example.com", &second_der, &["http/1.1"]).await.unwrap();
    assert_eq!(ask_on(&mut http1_on(other).await, get("b.example.com", "/")).await.backend(), "s");
    assert!(tls(at, "a.example.com", &second_der, &[]).await.is_err(), "another's certificate");
    assert!(tls(at, "c.example.com", &first_der, &[]).await.is_err(), "a name that nobody has");
    assert!(tls(world.at["local-tls"], "a.example.com", &first_der, &[]).await.is_err(), "served outside only");

    let (renewed, renewed_der) = certificate("first", &["a.example.com"]);
    snapshot.secrets[0] = renewed;
    world.ingress.apply(&snapshot);
    assert!(tls(at, "a.example.com", &first_der, &[]).await.is_err(), "the old certificate is gone");
    let new = tls(at, "a.example.com", &renewed_der, &["http/1.1"]).await.unwrap();
    assert_eq!(ask_on(&mut http1_on(new).await, get("a.example.com", "/")).await.backend(), "s");
    assert_eq!(ask_http2(&mut old, request()).await.backend(), "s", "the old connection goes on");

    snapshot.secrets[0] = read(json!({"apiVersion": "v1", "kind": "Secret",
        "metadata": {"namespace": "n", "name": "first"}, "stringData": {"tls.crt": "torn", "tls.key": "torn"}}));
    let report = world.ingress.apply(&snapshot);
    assert_eq!(
        report.ingresses[&name("a")].1,
        Outcome::Failed("secret 'n/first': 'tls.crt' holds no certificate".into())
    );
    assert!(tls(at, "a.example.com", &renewed_der, &[]).await.is_ok(), "a torn secret ends nothing");
    drop(old);
    world.end().await;
}

#[tokio::test]
async fn websockets_pass_and_count_until_their_end() {
    let world = World::new().await;
    let mut snapshot = Snapshot::default();
    add(&mut snapshot, "s", "http", &[backend("s").await]);
    snapshot.ingresses.push(king("k", json!({"rules": [whole("h.example.com", "s")]})));
    world.ingress.apply(&snapshot);
    let mut sender = http1_on(TcpStream::connect(world.at["external"]).await.unwrap()).await;
    let mut request = get("h.example.com", "/ws");
    request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    request.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    let response = soon("the upgrade", sender.send_request(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut tunnel = TokioIo::new(soon("a tunnel", hyper::upgrade::on(response)).await.unwrap());
    for text in [&b"hello"[..], b"again"] {
        tunnel.write_all(text).await.unwrap();
        let mut back = [0; 5];
        soon("an echo", tunnel.read_exact(&mut back)).await.unwrap();
        assert_eq!(back, text);
    }
    // The rules change; the tunnel stays.
    world.ingress.apply(&Snapshot::default());
    assert_eq!(ask(world.at["external"], get("h.example.com", "/")).await.status, 404);
    tunnel.write_all(b"still").await.unwrap();
    let mut back = [0; 5];
    soon("an echo", tunnel.read_exact(&mut back)).await.unwrap();
    tunnel.shutdown().await.unwrap();
    assert_eq!(soon("the end", tunnel.read(&mut back)).await.unwrap(), 0);
    world.end().await;
}

#[tokio::test]
async fn grpc_keeps_its_trailers() {
    let world = World::new().await;
    let mut snapshot = Snapshot::default();
    add(&mut snapshot, "s", "http2", &[backend("s").await]);
    snapshot.ingresses.push(king("k", json!({"rules": [whole("h.example.com", "s")]})));
    world.ingress.apply(&snapshot);
    let mut sender = http2_on(TcpStream::connect(world.at["external"]).await.unwrap()).await;
    let request = Request::post("http://h.example.com/trailers").header(header::TE, "trailers");
    let request = request.body(Full::new(Bytes::from_static(b"message"))).unwrap();
    let answer = ask_http2(&mut sender, request).await;
    assert_eq!((answer.status, &answer.body[..]), (200, &b"message"[..]));
    assert_eq!(answer.trailers.get("grpc-status").unwrap(), "0");
    // HTTP/1.1 clients reach a backend of HTTP/2 as well.
    let saw = ask(world.at["external"], get("h.example.com", "/")).await.saw();
    assert_eq!((&saw["version"], &saw["host"]), (&json!(2), &json!("h.example.com")));
    drop(sender);
    world.end().await;
}

#[tokio::test]
async fn an_address_that_does_not_answer_is_passed_over() {
    let world = World::new().await;
    let mut snapshot = Snapshot::default();
    add(&mut snapshot, "s", "http", &[nobody().await, backend("s").await]);
    add(&mut snapshot, "dead", "http", &[nobody().await]);
    let rules =
        json!([whole("h.example.com", "s"), whole("dead.example.com", "dead"), whole("none.example.com", "none")]);
    snapshot.ingresses.push(king("k", json!({"rules": rules})));
    let report = world.ingress.apply(&snapshot);
    assert!(matches!(report.ingresses[&name("k")].1, Outcome::Missing(_)));
    let at = world.at["external"];
    for _ in 0..50 {
        assert_eq!(ask(at, get("h.example.com", "/")).await.status, 200);
    }
    let dead = ask(at, get("dead.example.com", "/")).await;
    assert_eq!((dead.status, &dead.body[..]), (503, &b"no answer from upstream"[..]));
    let none = ask(at, get("none.example.com", "/")).await;
    assert_eq!((none.status, &none.body[..]), (503, &b"no healthy upstream"[..]));
    world.end().await;
}

#[tokio::test]
async fn a_pod_of_this_process_is_not_dialled() {
    let world = World::new().await;
    let mut snapshot = Snapshot::default();
    let at = nobody().await;
    add(&mut snapshot, "s", "http2", &[at]);
    snapshot.ingresses.push(king("k", json!({"rules": [whole("h.example.com", "s")]})));
    world.ingress.apply(&snapshot);
    world.near.serve(at);
    let mut request = get("h.example.com", "/");
    request.headers_mut().insert("x-forwarded-for", HeaderValue::from_static("10.0.0.9"));
    let saw = ask(world.at["external"], request).await.saw();
    let want = json!({"backend": "near", "at": at.to_string(), "version": "HTTP/2.0", "revision": "s",
                      "for": "10.0.0.9, 127.0.0.1"});
    assert_eq!(saw, want);
    world.end().await;
}
