//! The cases of the Autobahn test suite, through the proxy: frames as bytes, against an endpoint of tokio-tungstenite.
//!
//! The suite itself needs Python 2, which no registry here has. A tunnel owes its two ends one thing: that each sees what it
//! would see without it. So each case is asked twice, directly and through the proxy, and both answers are the same bytes and
//! the same end; and what a case's answer is to be stands in its row, so that both are not wrong alike.

use std::net::SocketAddr;

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_tungstenite::tungstenite::Message;

use crate::rig::{Aborts, Served, answers, settings};

const FIN: u8 = 0x80;
const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
const MASK: [u8; 4] = [0x11, 0x92, 0x53, 0xd4];

/// What a case's answer is.
enum Answer {
    /// These messages, each whole, then the closing handshake.
    Echo(Vec<(u8, Vec<u8>)>),
    /// The endpoint fails the connection.
    Fails,
    /// Whatever it is without the proxy.
    Same,
}

struct Case {
    /// As the suite numbers them.
    name: String,
    bytes: Vec<u8>,
    answer: Answer,
}

/// A client's frame.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let length = payload.len();
    let mut frame = vec![first];
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short @ ..=125), _) => frame.push(0x80 | short),
        (_, Ok(middle)) => {
            frame.push(0x80 | 126);
            frame.extend_from_slice(&middle.to_be_bytes());
        }
        _ => {
            frame.push(0x80 | 127);
            frame.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(&MASK);
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// A message in pieces of this length.
fn pieces(kind: u8, payload: &[u8], length: usize) -> Vec<u8> {
    let parts: Vec<&[u8]> = payload.chunks(length).collect();
    let one = |(number, part): (usize, &&[u8])| {
        let kind = if number == 0 { kind } else { CONTINUATION };
        frame(if number + 1 == parts.len() { FIN | kind } else { kind }, part)
    };
    parts.iter().enumerate().flat_map(one).collect()
}

fn close(code: u16, reason: &[u8]) -> Vec<u8> {
    frame(FIN | CLOSE, &[&code.to_be_bytes()[..], reason].concat())
}

fn cases() -> Vec<Case> {
    [messages(), control(), fragments(), texts(), closing()].into_iter().flatten().collect()
}

fn echoed(kind: u8, payload: &[u8]) -> Answer {
    Answer::Echo(vec![(kind, payload.to_vec())])
}

fn messages() -> Vec<Case> {
    let mut cases = vec![];
    let mut case = |name: String, bytes: Vec<u8>, answer| cases.push(Case { name, bytes, answer });
    let end = || close(1000, b"");
    // 1: messages of all lengths, whole and chopped; 9: long ones.
    for (number, kind) in [(1, TEXT), (2, BINARY)] {
        for (at, length) in [0, 1, 125, 126, 127, 128, 65_535, 65_536, 65_537].into_iter().enumerate() {
            let payload = vec![b'*'; length];
            let whole = [frame(FIN | kind, &payload), end()].concat();
            case(format!("1.{number}.{}", at + 1), whole, echoed(kind, &payload));
        }
        for length in [64, 997, 65_536] {
            let payload = vec![b'*'; 65_536];
            case(
                format!("10.{number}.{length}"),
                [pieces(kind, &payload, length), end()].concat(),
                echoed(kind, &payload),
            );
        }
        for length in [256 << 10, 1 << 20, 4 << 20] {
            let payload = vec![b'*'; length];
            case(format!("9.{number}.{length}"), [frame(FIN | kind, &payload), end()].concat(), echoed(kind, &payload));
        }
        for length in [4 << 10, 64 << 10, 1 << 20] {
            let payload = vec![b'*'; 4 << 20];
            case(
                format!("9.{}.{length}", number + 2),
                [pieces(kind, &payload, length), end()].concat(),
                echoed(kind, &payload),
            );
        }
    }
    cases
}

fn control() -> Vec<Case> {
    let mut cases = vec![];
    let mut case = |name: String, bytes: Vec<u8>, answer| cases.push(Case { name, bytes, answer });
    let end = || close(1000, b"");
    // 2: pings, and pongs that nobody asked for.
    for (at, payload) in
        [&b""[..], b"Hello", &[0, 0xff, 0xfe, 0xfd, 0xfc, 0xfb, 0, 0xff], &[0xfe; 125]].into_iter().enumerate()
    {
        case(format!("2.{}", at + 1), [frame(FIN | PING, payload), end()].concat(), echoed(PONG, payload));
    }
    case("2.5".into(), frame(FIN | PING, &[0xfe; 126]), Answer::Fails);
    case("2.7".into(), [frame(FIN | PONG, b""), end()].concat(), Answer::Echo(vec![]));
    case("2.9".into(), [frame(FIN | PONG, b"x"), frame(FIN | PING, b"y"), end()].concat(), echoed(PONG, b"y"));
    // Whether each of many pings has an answer of its own is the endpoint's affair (RFC 6455 5.5.3).
    case("2.10".into(), [frame(FIN | PING, b"payload").repeat(10), end()].concat(), Answer::Same);
    // 3: reserved bits, 4: reserved kinds.
    for bits in 1..8 {
        case(format!("3.{bits}"), frame(FIN | bits << 4 | TEXT, b"x"), Answer::Fails);
        case(
            format!("3.{bits} after a message"),
            [frame(FIN | TEXT, b"a"), frame(FIN | bits << 4 | BINARY, b"x")].concat(),
            Answer::Same,
        );
    }
    for kind in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15] {
        case(format!("4.{kind}"), frame(FIN | kind, b"x"), Answer::Fails);
    }
    cases
}

fn fragments() -> Vec<Case> {
    let mut cases = vec![];
    let mut case = |name: String, bytes: Vec<u8>, answer| cases.push(Case { name, bytes, answer });
    let end = || close(1000, b"");
    // 5: fragments.
    case("5.1".into(), [frame(PING, b"a"), frame(FIN | CONTINUATION, b"b")].concat(), Answer::Fails);
    case("5.2".into(), [frame(PONG, b"a"), frame(FIN | CONTINUATION, b"b")].concat(), Answer::Fails);
    case("5.3".into(), [frame(TEXT, b"a"), frame(FIN | CONTINUATION, b"b"), end()].concat(), echoed(TEXT, b"ab"));
    let between = [frame(TEXT, b"a"), frame(FIN | PING, b"p"), frame(FIN | CONTINUATION, b"b"), end()].concat();
    case("5.6".into(), between, Answer::Echo(vec![(PONG, b"p".to_vec()), (TEXT, b"ab".to_vec())]));
    case("5.9".into(), frame(FIN | CONTINUATION, b"a"), Answer::Fails);
    case("5.12".into(), frame(CONTINUATION, b"a"), Answer::Fails);
    case("5.18".into(), [frame(TEXT, b"a"), frame(FIN | TEXT, b"b")].concat(), Answer::Fails);
    let five: Vec<u8> =
        [&b"f1"[..], b"f2", b"f3", b"f4"].into_iter().flat_map(|part| frame(CONTINUATION, part)).collect();
    let many = [frame(TEXT, b"f0"), five, frame(FIN | CONTINUATION, b"f5"), end()].concat();
    case("5.19".into(), many, echoed(TEXT, b"f0f1f2f3f4f5"));
    cases
}

fn texts() -> Vec<Case> {
    let mut cases = vec![];
    let mut case = |name: String, bytes: Vec<u8>, answer| cases.push(Case { name, bytes, answer });
    let end = || close(1000, b"");
    // 6: UTF-8.
    for (at, text) in [
        "",
        "Hello-µ@ßöäüàá-UTF-8!!",
        "κόσμε",
        "\u{0}",
        "\u{80}",
        "\u{7ff}",
        "\u{800}",
        "\u{ffff}",
        "\u{10000}",
        "\u{10ffff}",
    ]
    .into_iter()
    .enumerate()
    {
        case(
            format!("6.{} whole", at + 1),
            [frame(FIN | TEXT, text.as_bytes()), end()].concat(),
            echoed(TEXT, text.as_bytes()),
        );
        if !text.is_empty() {
            // Between the bytes of a letter too.
            let cut = [pieces(TEXT, text.as_bytes(), 1), end()].concat();
            case(format!("6.{} byte by byte", at + 1), cut, echoed(TEXT, text.as_bytes()));
        }
    }
    let wrong: [&[u8]; 9] = [
        b"\x80",
        b"\xbf",
        b"\xfe",
        b"\xff",
        b"\xc0\xaf",
        b"\xe0\x80\xaf",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",
    ];
    for (at, text) in wrong.into_iter().enumerate() {
        case(format!("6.{} wrong", at + 12), frame(FIN | TEXT, text), Answer::Fails);
        case(format!("6.{} wrong, byte by byte", at + 12), pieces(TEXT, text, 1), Answer::Fails);
    }
    cases
}

fn closing() -> Vec<Case> {
    let mut cases = vec![];
    let mut case = |name: String, bytes: Vec<u8>, answer| cases.push(Case { name, bytes, answer });
    let end = || close(1000, b"");
    // 7: closing.
    for code in [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999] {
        case(format!("7.7 {code}"), close(code, b"why"), Answer::Echo(vec![]));
    }
    for code in [0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65_535] {
        case(format!("7.9 {code}"), close(code, b""), Answer::Same);
    }
    case("7.3.1".into(), frame(FIN | CLOSE, b""), Answer::Same);
    case("7.3.2".into(), frame(FIN | CLOSE, b"a"), Answer::Same);
    case("7.3.5".into(), close(1000, &[b'*'; 123]), Answer::Echo(vec![]));
    case("7.3.6".into(), close(1000, &[b'*'; 124]), Answer::Same);
    case("7.5.1".into(), close(1000, b"\xce\xba\xed\xa0\x80"), Answer::Same);
    case("7.1.2".into(), [end(), end()].concat(), Answer::Same);
    case("7.1.3".into(), [end(), frame(FIN | PING, b"late")].concat(), Answer::Same);
    case("7.1.5".into(), [frame(TEXT, b"a"), end(), frame(FIN | CONTINUATION, b"b")].concat(), Answer::Same);
    cases
}

/// Sends messages back.
async fn echo() -> (SocketAddr, Aborts) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let task = async move {
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            tokio::spawn(async move {
                let mut socket = tokio_tungstenite::accept_async(stream).await.expect("a handshake");
                while let Some(Ok(message)) = socket.next().await {
                    if matches!(message, Message::Text(_) | Message::Binary(_)) && socket.send(message).await.is_err() {
                        break;
                    }
                }
            });
        }
    };
    (addr, Aborts::new(task))
}

/// All that comes back, and whether the connection ended in order.
async fn ask(to: SocketAddr, bytes: &[u8]) -> (Vec<u8>, bool) {
    let mut stream = TcpStream::connect(to).await.expect("connected");
    let head = "GET /chat HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("written");
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("a head"));
    }
    let head = String::from_utf8(head).expect("text").to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 ") && head.contains("s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
    let (mut from, mut to) = stream.split();
    let mut all = vec![];
    // The other side may end before it has taken all.
    let (_sent, read) = tokio::join!(to.write_all(bytes), from.read_to_end(&mut all));
    (all, read.is_ok())
}

/// Frames of a server.
fn frames(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut frames = vec![];
    while let [first, length, rest @ ..] = bytes {
        let (length, rest) = match length {
            126 => (usize::from(u16::from_be_bytes([rest[0], rest[1]])), &rest[2..]),
            127 => {
                let eight = rest.first_chunk::<8>().expect("a length");
                (usize::try_from(u64::from_be_bytes(*eight)).expect("a length"), &rest[8..])
            }
            short => (usize::from(*short), rest),
        };
        assert_eq!(first & 0xf0, FIN, "whole messages");
        frames.push((first & 0x0f, rest[..length].to_vec()));
        bytes = &rest[length..];
    }
    frames
}

#[tokio::test]
async fn autobahns_cases() {
    let (addr, _echo) = echo().await;
    let served = Served::new(addr, settings()).await;
    let cases = cases();
    assert!(cases.len() >= 120, "{} cases", cases.len());
    for case in cases {
        let name = &case.name;
        let (through, _) = ask(served.addr, &case.bytes).await;
        let (direct, _) = ask(addr, &case.bytes).await;
        let told = frames(&through);
        match case.answer {
            Answer::Echo(mut expected) => {
                assert!(told.last().is_some_and(|(kind, _)| *kind == CLOSE), "case {name}: no closing handshake");
                expected.push(told.last().cloned().expect("a close"));
                assert!(told == expected, "case {name}");
                assert!(through == direct, "case {name}");
            }
            // A connection that fails may be reset before all of the answer is read, with the proxy or without.
            Answer::Fails => {
                let echoed = told.iter().any(|(kind, _)| matches!(*kind, TEXT | BINARY | PONG));
                assert!(!echoed, "case {name}: answered");
            }
            Answer::Same => assert!(through.starts_with(&direct) || direct.starts_with(&through), "case {name}"),
        }
    }
    crate::rig::eventually("all tunnels have ended", || served.queue.tunnels().count() == 0).await;
}

/// 12 and 13: compression is for the two ends to agree on, and its frames for them to read.
#[tokio::test]
async fn autobahns_compression_is_negotiated_through() {
    let offer = "permessage-deflate; client_max_window_bits; server_no_context_takeover, permessage-deflate";
    let accept = "permessage-deflate; server_no_context_takeover";
    // "Hello", compressed (RFC 7692 7.2.3.1), as a server sends it.
    const HELLO: &[u8] = &[0xc1, 0x07, 0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00];
    let (addr, _task) = crate::rig::endpoint(move |_, mut wire| async move {
        let asked = wire.head().await;
        assert_eq!(asked.headers["sec-websocket-extensions"], [offer]);
        assert_eq!(asked.header("sec-websocket-protocol"), "chat, superchat");
        wire.write(&format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
            Sec-WebSocket-Extensions: {accept}\r\nSec-WebSocket-Protocol: chat\r\n\r\n"
        ))
        .await;
        let came = wire.bytes(frame(0xc1, &HELLO[2..]).len()).await;
        assert_eq!(came, frame(0xc1, &HELLO[2..]), "the client's bytes, RSV1 and all");
        wire.write_bytes(HELLO).await;
    })
    .await;
    let served = Served::new(addr, settings()).await;
    let mut client = served.client().await;
    client
        .write(&format!(
            "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
            Sec-WebSocket-Extensions: {offer}\r\nSec-WebSocket-Protocol: chat, superchat\r\n\r\n"
        ))
        .await;
    let head = client.head().await;
    assert_eq!((head.status(), head.header("sec-websocket-extensions")), ("101", accept));
    assert_eq!(head.header("sec-websocket-protocol"), "chat");
    client.write_bytes(&frame(0xc1, &HELLO[2..])).await;
    assert_eq!(client.bytes(HELLO.len()).await, HELLO);
}

/// A client of tokio-tungstenite: what it sends whole it gets back whole.
#[tokio::test]
async fn a_websocket_client_and_a_websocket_server() {
    let (addr, _echo) = echo().await;
    let served = Served::new(addr, settings()).await;
    let url = format!("ws://{}/chat", served.addr);
    let (mut socket, response) = tokio_tungstenite::connect_async(url).await.expect("a handshake");
    assert_eq!(response.status(), 101);
    for length in [0, 1, 125, 126, 65_536, 1 << 20] {
        let message = Message::binary(vec![7; length]);
        socket.send(message.clone()).await.expect("sent");
        assert_eq!(socket.next().await.expect("open").expect("a message"), message);
    }
    socket.close(None).await.expect("closed");
    while let Some(Ok(_)) = socket.next().await {}
    let (refused, _asked, _task) = answers("HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n").await;
    let served = Served::new(refused, settings()).await;
    let told = tokio_tungstenite::connect_async(format!("ws://{}/chat", served.addr)).await;
    assert!(told.is_err_and(|error| error.to_string().contains("403")), "a refusal comes through");
}
