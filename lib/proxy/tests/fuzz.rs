//! Strangers' bytes into our parsers: seeds, and thousands of changes of them. `fuzz/` has the same targets for libFuzzer.

#[path = "../../../fuzz/targets/mutate.rs"]
mod mutate;
#[path = "corpus/rows.rs"]
mod rows;
#[path = "../../../fuzz/targets/proxy.rs"]
mod targets;

use mutate::run;

#[test]
fn connections() {
    const HTTP2: &[u8] = b"\x40PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\
        \0\0\x06\x01\x05\0\0\0\x01\x82\x86\x84\x41\x01h\
        \0\0\x06\x01\x04\0\0\0\x03\x83\x86\x84\x41\x01h\0\0\x02\0\x01\0\0\0\x03hi\
        \0\0\x08\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x04\x08\0\0\0\0\0\0\0\0\x01";
    const UPGRADE: &[u8] = b"\x07GET /a HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
        HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64\
        \0\0\x06\x01\x05\0\0\0\x03\x82\x86\x84\x41\x01h";
    let streams: Vec<Vec<u8>> = rows::rows()
        .into_iter()
        .map(|(_, text)| format!("\u{40}{text}").chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect())
        .collect();
    let seeds: Vec<&[u8]> = streams.iter().map(Vec::as_slice).chain([HTTP2; 40]).chain([UPGRADE; 40]).collect();
    run(&seeds, 1500, targets::connection);
}

#[test]
fn responses() {
    let seeds: [&[u8]; 6] = [
        b"\x40HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello",
        b"\x03HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\nA\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n",
        b"\x10HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 Fine\r\nConnection: keep-alive\r\nContent-Length: 2, 2\r\n\r\nok",
        b"\x02HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end",
        b"\x20HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"\x08HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x02hi",
    ];
    run(&seeds, 6_000, targets::response);
}

#[test]
fn heads() {
    let seeds: [&[u8]; 4] = [
        b"/a/b?c\nhost:h\nconnection:close, x-gone, te\nx-gone:1\nte:trailers\ntransfer-encoding:chunked",
        b"http://other:81/p\nhost:h\nx-forwarded-for:192.0.2.1, ::1\nx-forwarded-host:a\nx-forwarded-proto:http",
        b"*\nhost:h\nconnection:Upgrade\nupgrade:websocket\nk-original-host:shop.example.com\nproxy-authorization:x",
        b"/\nhost:[::1]:80\nforwarded:for=1\nconnection:host, keep-alive\nkeep-alive:5\nhttp2-settings:AA\nupgrade:h2c",
    ];
    run(&seeds, 60_000, targets::heads);
}

#[test]
fn probes() {
    let seeds: [&[u8]; 3] = [
        br#"{"httpGet":{"path":"/ok","port":8080,"host":"127.0.0.1","scheme":"HTTP","httpHeaders":[{"name":"a","value":"b"}]}}"#,
        br#"[{"tcpSocket":{"port":"user-port"}},{"grpc":{"port":82,"service":null},"periodSeconds":1}]"#,
        br#"{"exec":{"command":["true"]},"timeoutSeconds":4294967295,"successThreshold":3}"#,
    ];
    run(&seeds, 60_000, targets::probe);
}

#[test]
fn stats() {
    let seeds: [&[u8]; 2] =
        [b"\x0a\x03pod\x11\0\0\0\0\0\0\xf0\x3f\x31\0\0\0\0\0\0\x3e\x40", b"\x0a\x00\x38\xff\xff\xff\xff\x0f"];
    run(&seeds, 60_000, targets::stat);
}
