//! Targets of `lib/proxy`: a client's bytes, heads, probes, stats.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, Uri, header};
use http_body_util::BodyExt as _;
use lifl_proxy::{
    Body, Dial, Endpoint, Handle, Limits, Peer, Pool, PoolLimits, Protocol, Server, head, queue::Probe, stats::Stat,
    upstream::Sent,
};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// Client of every request.
const CLIENT: &str = "192.0.2.7:1234";
/// What must not go further than one connection.
const HOP_BY_HOP: [HeaderName; 4] =
    [header::CONNECTION, header::UPGRADE, header::TRANSFER_ENCODING, header::PROXY_AUTHORIZATION];

/// Does with each request what a proxy does, but sends it nowhere.
struct Sink;

impl Handle for Sink {
    async fn handle(&self, request: Request<Body>, peer: &Peer) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let protocol = if parts.version == http::Version::HTTP_2 { Protocol::H2c } else { Protocol::H1 };
        passed_on(parts, peer, protocol);
        let _cut_off = body.collect().await;
        Response::new("ok".into())
    }
}

/// What a client sends, in pieces: the first byte says how long they are. The server must come to an end by itself.
pub(crate) fn connection(input: &[u8]) {
    let Some((first, bytes)) = input.split_first() else { return };
    let piece = usize::from(*first).max(1) * 3;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let (client, server) = tokio::io::duplex(1 << 16);
        let (mut from, mut to) = tokio::io::split(client);
        let limits = Limits { head: Duration::from_secs(5), stall: Duration::from_secs(60), ..Limits::default() };
        let peer = Peer::new(CLIENT.parse().expect("an address"));
        let serving = tokio::spawn(async move { Server::new(Arc::new(Sink), limits).connection(server, peer).await });
        let writing = async {
            for piece in bytes.chunks(piece) {
                if to.write_all(piece).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            let _closed_already = to.shutdown().await;
        };
        let reading = async { from.read_to_end(&mut vec![]).await };
        let (_, _read) = tokio::join!(writing, reading);
        serving.await.expect("no panic");
    });
}

/// An endpoint that answers everything with these bytes, and then has nothing more to say.
#[derive(Clone)]
struct Says(Arc<[u8]>, usize);

impl Dial for Says {
    async fn dial(&self, _: &Endpoint) -> io::Result<TcpStream> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (ours, theirs) = tokio::try_join!(TcpStream::connect(listener.local_addr()?), listener.accept())?;
        let (Self(says, piece), mut theirs) = (self.clone(), theirs.0);
        tokio::spawn(async move {
            let _head = theirs.read(&mut [0; 4096]).await;
            for piece in says.chunks(piece) {
                if theirs.write_all(piece).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            // An end with unread bytes before it would be a reset, which may overtake what was said.
            let _ended = theirs.shutdown().await;
            let _rest = theirs.read_to_end(&mut vec![]).await;
        });
        Ok(ours)
    }
}

/// What an endpoint answers, in pieces: the first byte says how long they are. It must come to an end by itself, and have one
/// meaning for whoever reads it after us.
pub(crate) fn response(input: &[u8]) {
    let Some((first, bytes)) = input.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let pool = Pool::new(Says(bytes.into(), usize::from(*first).max(1) * 3), PoolLimits::default());
        let upstream = pool.upstream(Endpoint::plain(CLIENT.parse().expect("an address"), Protocol::H1));
        let answer = async {
            let Ok(Sent::Response(response)) = upstream.send(Request::new(Body::from("a request"))).await else {
                return;
            };
            let (head, body) = response.into_parts();
            let (length, encoding) = (head.headers.get(header::CONTENT_LENGTH), header::TRANSFER_ENCODING);
            assert!(length.is_none() || !head.headers.contains_key(encoding), "framed in two ways");
            let Ok(body) = body.collect().await.map(|body| body.to_bytes()) else { return };
            let bodiless = [204, 304].contains(&head.status.as_u16());
            if let Some(length) = length.filter(|_| !bodiless) {
                let said = length.to_str().ok().and_then(|length| length.split(',').next()?.trim().parse().ok());
                assert_eq!(said, Some(body.len()), "a body of another length than {length:?}");
            }
        };
        timeout(Duration::from_secs(20), answer).await.expect("an end");
    });
}

/// Fields, one a line, the first line a target: for HTTP/1.1 and for HTTP/2.
pub(crate) fn heads(input: &[u8]) {
    let mut lines = input.split(|byte| *byte == b'\n');
    let Some(target) = lines.next().and_then(|line| Uri::try_from(line).ok()) else { return };
    let mut fields = HeaderMap::new();
    for line in lines {
        let Some(at) = line.iter().position(|byte| *byte == b':') else { continue };
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(&line[..at]), HeaderValue::from_bytes(&line[at + 1..])) {
            fields.append(name, value);
        }
    }
    let peer = Peer::new(CLIENT.parse::<SocketAddr>().expect("an address"));
    for protocol in [Protocol::H1, Protocol::H2c] {
        let (mut parts, ()) = Request::new(()).into_parts();
        (parts.uri, parts.headers) = (target.clone(), fields.clone());
        head::shim_forwarded(&mut parts.headers);
        head::restore_host(&mut parts);
        head::strip_revision(&mut parts.headers);
        passed_on(parts, &peer, protocol);
    }
    let (mut parts, ()) = Response::new(()).into_parts();
    parts.headers = fields.clone();
    let _not_asked_for = head::switched(&mut parts, head::wanted_upgrade(&fields).as_ref());
}

fn passed_on(mut parts: http::request::Parts, peer: &Peer, protocol: Protocol) {
    let endpoint = Endpoint::plain(CLIENT.parse().expect("an address"), protocol);
    let Ok(upgrading) = head::to_endpoint(&mut parts, peer, &endpoint) else { return };
    for name in HOP_BY_HOP.iter().filter(|_| !upgrading) {
        assert!(!parts.headers.contains_key(name), "{name} goes on");
    }
    let by = parts.headers.get_all(head::X_FORWARDED_FOR);
    assert!(by.iter().next_back().is_some_and(|last| last.as_bytes().ends_with(b"192.0.2.7")), "who asked is not told");
    match protocol {
        Protocol::H1 => assert!(parts.uri.authority().is_none(), "a path, or *: {}", parts.uri),
        Protocol::H2c => assert!(parts.uri.authority().is_some() && !parts.headers.contains_key(header::HOST)),
    }
}

/// `SERVING_READINESS_PROBE`.
pub(crate) fn probe(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input) {
        let _no_probe = Probe::parse(text);
    }
}

/// What stands at port 9090: it is read as it was written.
pub(crate) fn stat(input: &[u8]) {
    if let Ok(stat) = Stat::decode(input) {
        let again = Stat::decode(&*stat.encode_to_vec()).expect("what was written");
        assert_eq!(again.pod_name, stat.pod_name);
    }
}
