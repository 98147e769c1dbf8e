//! Heads, as rows.

use http::{Request, Response};

use super::*;

fn to(protocol: Protocol) -> Endpoint {
    Endpoint::plain("10.0.0.9:8080".parse().expect("an address"), protocol)
}

fn peer() -> Peer {
    Peer::new("192.0.2.7:4711".parse().expect("address"))
}

fn request(uri: &str, version: Version, headers: &[(&str, &str)]) -> request::Parts {
    let mut builder = Request::builder().uri(uri).version(version);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(()).expect("request").into_parts().0
}

fn lines(headers: &HeaderMap) -> Vec<String> {
    let mut lines: Vec<String> =
        headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().expect("text"))).collect();
    lines.sort();
    lines
}

#[test]
fn hop_by_hop_headers_end_here() {
    let mut head = request(
        "/",
        Version::HTTP_11,
        &[
            ("host", "h"),
            ("connection", "close, X-Mine, host"),
            ("connection", "x-other"),
            ("x-mine", "1"),
            ("x-other", "2"),
            ("x-kept", "3"),
            ("keep-alive", "5"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "secret"),
            ("te", "gzip, trailers"),
            ("trailer", "x-sum"),
            ("upgrade", "websocket"),
            ("k-proxy-request", "activator"),
        ],
    );
    assert!(!to_endpoint(&mut head, &peer(), &to(Protocol::H1)).expect("a request"), "not named by Connection");
    let expected = [
        "host: h",
        "k-proxy-request: activator",
        "te: trailers",
        "trailer: x-sum",
        "x-forwarded-for: 192.0.2.7",
        "x-kept: 3",
    ];
    assert_eq!(lines(&head.headers), expected);
}

#[test]
fn an_upgrade_is_passed_on_by_http_1_only() {
    let headers = [("host", "h"), ("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")];
    let mut head = request("/", Version::HTTP_11, &headers);
    assert!(to_endpoint(&mut head, &peer(), &to(Protocol::H1)).expect("a request"));
    let expected = ["connection: Upgrade", "host: h", "upgrade: websocket", "x-forwarded-for: 192.0.2.7"];
    assert_eq!(lines(&head.headers), expected);
    for (version, protocol) in [(Version::HTTP_10, Protocol::H1), (Version::HTTP_11, Protocol::H2c)] {
        let mut head = request("/", version, &headers);
        assert!(!to_endpoint(&mut head, &peer(), &to(protocol)).expect("a request"));
        assert!(!head.headers.contains_key(UPGRADE));
    }
    let mut head = request("/", Version::HTTP_11, &[("host", "h"), ("connection", "upgrade"), ("upgrade", "h2c")]);
    assert!(!to_endpoint(&mut head, &peer(), &to(Protocol::H1)).expect("a request"), "h2c is ours to answer");
}

#[test]
fn addresses_are_appended() {
    let mut head =
        request("/", Version::HTTP_11, &[("host", "h"), ("x-forwarded-for", "a, b"), ("x-forwarded-for", "c")]);
    to_endpoint(&mut head, &peer(), &to(Protocol::H1)).expect("a request");
    assert_eq!(head.headers[X_FORWARDED_FOR], "a, b, c, 192.0.2.7");
    assert_eq!(head.headers.get_all(X_FORWARDED_FOR).iter().count(), 1);
    let mapped = Peer::new("[::ffff:192.0.2.8]:1".parse().expect("address"));
    assert_eq!(mapped.forwarded, "192.0.2.8");
}

#[test]
fn targets_get_the_form_of_the_protocol() {
    type Row =
        (&'static str, Version, Option<&'static str>, Protocol, Result<(&'static str, Option<&'static str>), ()>);
    let rows: &[Row] = &[
        ("/p?q", Version::HTTP_11, Some("h"), Protocol::H1, Ok(("/p?q", Some("h")))),
        ("http://t:80/p", Version::HTTP_11, Some("h"), Protocol::H1, Ok(("/p", Some("t:80")))),
        ("http://u:s@t/p", Version::HTTP_11, Some("h"), Protocol::H1, Ok(("/p", Some("t")))),
        ("http://t/p", Version::HTTP_2, None, Protocol::H1, Ok(("/p", Some("t")))),
        ("*", Version::HTTP_11, Some("h"), Protocol::H1, Ok(("*", Some("h")))),
        ("/", Version::HTTP_10, None, Protocol::H1, Ok(("/", Some("10.0.0.9:8080")))),
        ("http://t?q", Version::HTTP_11, Some("h"), Protocol::H1, Ok(("/?q", Some("t")))),
        ("http://t?q", Version::HTTP_2, None, Protocol::H2c, Ok(("http://t/?q", None))),
        ("/p?q", Version::HTTP_11, Some("h:81"), Protocol::H2c, Ok(("http://h:81/p?q", None))),
        ("http://t/p", Version::HTTP_2, None, Protocol::H2c, Ok(("http://t/p", None))),
        ("http://a:x@t:81/p", Version::HTTP_11, Some("h"), Protocol::H2c, Ok(("http://t:81/p", None))),
        ("/p", Version::HTTP_11, Some("u@h"), Protocol::H2c, Ok(("http://h/p", None))),
        ("/", Version::HTTP_10, None, Protocol::H2c, Err(())),
        ("/", Version::HTTP_11, Some("a b"), Protocol::H2c, Err(())),
    ];
    for (uri, version, host, protocol, expected) in rows {
        let headers: Vec<(&str, &str)> = host.iter().map(|host| ("host", *host)).collect();
        let mut head = request(uri, *version, &headers);
        let made = to_endpoint(&mut head, &peer(), &to(*protocol));
        let host = head.headers.get(HOST).map(|host| host.to_str().expect("text"));
        let uri = head.uri.to_string();
        assert_eq!(made.map(|_| (&*uri, host)).map_err(drop), *expected, "{uri} {protocol:?}");
    }
}

#[test]
fn knative_the_original_host_comes_back() {
    for (uri, version) in [("/p", Version::HTTP_11), ("http://10.0.0.1:8012/p", Version::HTTP_2)] {
        for protocol in [Protocol::H1, Protocol::H2c] {
            let mut head = request(uri, version, &[("host", "10.0.0.1:8012"), ("k-original-host", "shop.example.com")]);
            restore_host(&mut head);
            to_endpoint(&mut head, &peer(), &to(protocol)).expect("a request");
            assert!(!head.headers.contains_key(K_ORIGINAL_HOST));
            match protocol {
                Protocol::H1 => assert_eq!(head.headers[HOST], "shop.example.com"),
                Protocol::H2c => assert_eq!(head.uri.authority().expect("authority"), "shop.example.com"),
            }
        }
    }
}

#[test]
fn knative_forwarded_is_made_of_its_forerunners() {
    let rows: &[(&str, &str, &str, &str, &str)] = &[
        ("127.0.0.1, ::1", "h", "p", "", "for=127.0.0.1;host=h;proto=p, for=\"[::1]\""),
        ("127.0.0.1", "h", "p", "", "for=127.0.0.1;host=h;proto=p"),
        ("127.0.0.1, ::1", "", "", "", "for=127.0.0.1, for=\"[::1]\""),
        ("127.0.0.1, ::1", "", "p", "", "for=127.0.0.1;proto=p, for=\"[::1]\""),
        ("127.0.0.1, ::1", "h", "", "", "for=127.0.0.1;host=h, for=\"[::1]\""),
        ("", "h", "", "", "host=h"),
        ("", "", "p", "", "proto=p"),
        ("", "h", "p", "", "host=h;proto=p"),
        ("::1", "h", "", "", "for=\"[::1]\";host=h"),
        (", a", "h", "", "", "for=;host=h, for=a"),
        ("127.0.0.1, ::1", "h", "p", "for=a, for=b", "for=a, for=b"),
        ("", "", "", "", ""),
    ];
    for (addresses, host, scheme, forwarded, expected) in rows {
        let mut headers = HeaderMap::new();
        let values = [
            (X_FORWARDED_FOR, addresses),
            (X_FORWARDED_HOST, host),
            (X_FORWARDED_PROTO, scheme),
            (FORWARDED, forwarded),
        ];
        for (name, value) in values {
            if !value.is_empty() {
                headers.insert(name, HeaderValue::from_static(value));
            }
        }
        shim_forwarded(&mut headers);
        let made = headers.get(FORWARDED).map_or("", |value| value.to_str().expect("text"));
        assert_eq!(made, *expected, "{addresses} {host} {scheme}");
    }
}

#[test]
fn a_switch_must_be_what_was_asked_for() {
    let answer = |to: &str| {
        let mut response =
            Response::builder().status(101).header("connection", "upgrade, x-mine").header("x-mine", "1");
        if !to.is_empty() {
            response = response.header("upgrade", to);
        }
        response.body(()).expect("response").into_parts().0
    };
    let asked = HeaderValue::from_static("websocket");
    let mut head = answer("WebSocket");
    switched(&mut head, Some(&asked)).expect("what was asked for");
    assert_eq!(lines(&head.headers), ["connection: Upgrade", "upgrade: WebSocket"]);
    for (to, asked) in [("other", Some(&asked)), ("websocket", None), ("", Some(&asked))] {
        assert!(switched(&mut answer(to), asked).is_err(), "{to}");
    }
}
