//! Request streams that have told servers apart. `{t}` becomes a token of the run; each stream is followed by a good
//! request that asks for the connection to be closed, so a stream that is understood ends by itself.

/// Name and bytes.
pub(crate) type Row = (String, String);

const GET: &str = "GET /{t}/a HTTP/1.1\r\nHost: h\r\n\r\n";
const SMUGGLED: &str = "GET /{t}/smuggled HTTP/1.1\r\nHost: h\r\n\r\n";

const LENGTHS: &[&str] = &[
    "5",
    "0",
    "00005",
    "+5",
    "-5",
    "5 ",
    " 5",
    "\t5",
    "5\t",
    "5, 5",
    "5,5",
    "5, 6",
    "6, 5",
    "0x5",
    "5;",
    "5a",
    "a5",
    "",
    "5.0",
    "1e1",
    "5 5",
    "99999999999999999999",
    "18446744073709551621",
    "\x0b5",
    "5\x0c",
    "\u{0}5",
    "\u{ff15}",
    "5\r\n 5",
];

const ENCODINGS: &[&str] = &[
    "chunked",
    "Chunked",
    "CHUNKED",
    " chunked",
    "chunked ",
    "\tchunked",
    "chunked\t",
    "chunked, chunked",
    "chunked,chunked",
    "identity",
    "identity, chunked",
    "chunked, identity",
    "gzip, chunked",
    "gzip",
    "x",
    "xchunked",
    "chunkedx",
    "\"chunked\"",
    "chunked;q=1",
    "chun ked",
    ",chunked",
    "chunked,",
    ", chunked",
    "\x0bchunked",
    "chunked\x0b",
    "\r\n chunked",
    "chunked\u{0}",
    "",
    "chunked\r\nTransfer-Encoding: chunked",
    "identity\r\nTransfer-Encoding: chunked",
    "chunked\r\nTransfer-Encoding: identity",
    "chunked\r\nTransfer-Encoding: x",
];

/// Instead of the name `Transfer-Encoding`.
const ENCODING_NAMES: &[&str] = &[
    "transfer-encoding",
    "TRANSFER-ENCODING",
    "Transfer-Encoding ",
    " Transfer-Encoding",
    "Transfer_Encoding",
    "Transfer-Encoding\u{0}",
    "Transfer-Encoding\t",
    "Transfer Encoding",
    "\tTransfer-Encoding",
    "X: y\nTransfer-Encoding",
    "X: y\rTransfer-Encoding",
];

/// Bodies of a chunked request; what follows them is the next request.
const CHUNKS: &[&str] = &[
    "5\r\nhello\r\n0\r\n\r\n",
    "05\r\nhello\r\n0\r\n\r\n",
    "00000000000000005\r\nhello\r\n0\r\n\r\n",
    "5;ext\r\nhello\r\n0\r\n\r\n",
    "5;ext=value\r\nhello\r\n0\r\n\r\n",
    "5;ext=\"a;b\"\r\nhello\r\n0\r\n\r\n",
    "5 ;ext\r\nhello\r\n0\r\n\r\n",
    "5 \r\nhello\r\n0\r\n\r\n",
    "5\t\r\nhello\r\n0\r\n\r\n",
    " 5\r\nhello\r\n0\r\n\r\n",
    "0x5\r\nhello\r\n0\r\n\r\n",
    "+5\r\nhello\r\n0\r\n\r\n",
    "-5\r\nhello\r\n0\r\n\r\n",
    "g\r\nhello\r\n0\r\n\r\n",
    "\r\nhello\r\n0\r\n\r\n",
    ";ext\r\nhello\r\n0\r\n\r\n",
    "5\nhello\r\n0\r\n\r\n",
    "5\rhello\r\n0\r\n\r\n",
    "5\r\nhello\n0\r\n\r\n",
    "5\r\nhello0\r\n\r\n",
    "5\r\nhello!\r\n0\r\n\r\n",
    "5\r\nhell\r\n0\r\n\r\n",
    "5;\nxx\r\nhello\r\n0\r\n\r\n",
    "5;a\rb\r\nhello\r\n0\r\n\r\n",
    "A\r\nhellohello\r\n0\r\n\r\n",
    "a\r\nhellohello\r\n0\r\n\r\n",
    "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    "5\r\nhello\r\n00\r\n\r\n",
    "5\r\nhello\r\n0;ext\r\n\r\n",
    "5\r\nhello\r\n0\n\n",
    "5\r\nhello\r\n0\r\n\n",
    "5\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n",
    "5\r\nhello\r\n0\r\nContent-Length: 3\r\n\r\n",
    "5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "5\r\nhello\r\n0\r\nno colon\r\n\r\n",
    "5\r\nhello\r\n0\r\n: empty\r\n\r\n",
    "ffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "10000000000000005\r\nhello\r\n0\r\n\r\n",
    "7fffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "0\r\n\r\n",
    "5\r\nhello\r\n0\r\n",
];

/// One header line of a GET.
const FIELDS: &[&str] = &[
    "X: y",
    "X:y",
    "X:",
    "X: ",
    "X:\ty",
    "X : y",
    "X\t: y",
    " X: y",
    "X",
    ": y",
    "X y: z",
    "X: a\rb",
    "X: a\u{0}b",
    "X: \u{e9}",
    "X: a\x7fb",
    "X: a\x01b",
    "X\x01: y",
    "(X): y",
    "X\"Y: z",
    "X@Y: z",
    "X: y\r\n z",
    "X: y\r\n\tz",
    "X: y\n z",
    "X: y\nZ: 1",
    "\u{e9}: y",
    "X{}: y",
    "Host: other",
    "Content-Length: 0",
    "Content-Length: 0\r\nContent-Length: 0",
    "Connection: close",
    "Connection: host",
    "Connection: content-length",
    "Connection: keep-alive, x",
    "Expect: other",
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    "Upgrade: websocket",
];

/// The first line, without its end.
const LINES: &[&str] = &[
    "GET /{t}/a HTTP/1.0",
    "GET /{t}/a HTTP/1.2",
    "GET /{t}/a HTTP/1.01",
    "GET /{t}/a HTTP/01.1",
    "GET /{t}/a HTTP/2.0",
    "GET /{t}/a HTTP/0.9",
    "GET /{t}/a http/1.1",
    "GET /{t}/a HTTP/1.1 ",
    "GET  /{t}/a HTTP/1.1",
    "GET /{t}/a  HTTP/1.1",
    "GET\t/{t}/a HTTP/1.1",
    "GET /{t}/a\tHTTP/1.1",
    " GET /{t}/a HTTP/1.1",
    "get /{t}/a HTTP/1.1",
    "G(T /{t}/a HTTP/1.1",
    "MINE /{t}/a HTTP/1.1",
    "GET /{t}/a b HTTP/1.1",
    "GET {t} HTTP/1.1",
    "GET http://h/{t}/a HTTP/1.1",
    "GET http://other/{t}/a HTTP/1.1",
    "GET http://h:80/{t}/a HTTP/1.1",
    "GET HTTP://h/{t}/a HTTP/1.1",
    "GET /{t}/%2e%2e/a HTTP/1.1",
    "GET /{t}/a%2fb HTTP/1.1",
    "GET /{t}/a?x=y&z HTTP/1.1",
    "GET /{t}/a#frag HTTP/1.1",
    "GET /{t}/a\u{e9} HTTP/1.1",
    "GET /{t}/a\x01 HTTP/1.1",
    "GET /{t}/a\u{0}b HTTP/1.1",
    "GET /{t}/\"<>\\^`{|} HTTP/1.1",
    "GET /{t}/%zz HTTP/1.1",
    "GET //{t}/a HTTP/1.1",
    "GET /{t}/a",
    "GET",
    "",
    "GET /{t}/a XTTP/1.1",
    "GET /{t}/a HTTP/1",
    "HEAD /{t}/a HTTP/1.1",
    "OPTIONS /{t}/a HTTP/1.1",
    "DELETE /{t}/a HTTP/1.1",
    "PATCH /{t}/a HTTP/1.1",
    "TRACE /{t}/a HTTP/1.1",
];

/// Streams that are none of the above.
const STREAMS: &[(&str, &str)] = &[
    (
        "three in a row",
        "GET /{t}/a HTTP/1.1\r\nHost: h\r\n\r\nGET /{t}/b HTTP/1.1\r\nHost: h\r\n\r\nGET /{t}/c HTTP/1.1\r\nHost: h\r\n\r\n",
    ),
    ("line feeds before", "\r\n\r\nGET /{t}/a HTTP/1.1\r\nHost: h\r\n\r\n"),
    ("bare line feed before", "\nGET /{t}/a HTTP/1.1\r\nHost: h\r\n\r\n"),
    ("line feeds between", "GET /{t}/a HTTP/1.1\r\nHost: h\r\n\r\n\r\n\r\nGET /{t}/b HTTP/1.1\r\nHost: h\r\n\r\n"),
    ("bare line feeds", "GET /{t}/a HTTP/1.1\nHost: h\n\n"),
    ("no host", "GET /{t}/a HTTP/1.1\r\n\r\n"),
    ("no host by http/1.0", "GET /{t}/a HTTP/1.0\r\n\r\n"),
    ("empty host", "GET /{t}/a HTTP/1.1\r\nHost:\r\n\r\n"),
    ("two hosts", "GET /{t}/a HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n"),
    ("host with a space", "GET /{t}/a HTTP/1.1\r\nHost: h h\r\n\r\n"),
    ("host with a path", "GET /{t}/a HTTP/1.1\r\nHost: h/x\r\n\r\n"),
    ("host with a comma", "GET /{t}/a HTTP/1.1\r\nHost: h,x\r\n\r\n"),
    ("host with a user", "GET /{t}/a HTTP/1.1\r\nHost: u@h\r\n\r\n"),
    ("host with a bad port", "GET /{t}/a HTTP/1.1\r\nHost: h:x\r\n\r\n"),
    ("host folded", "GET /{t}/a HTTP/1.1\r\nHost:\r\n h\r\n\r\n"),
    ("get with a body", "GET /{t}/a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"),
    ("get with chunks", "GET /{t}/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("head with a body", "HEAD /{t}/a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"),
    ("delete with a body", "DELETE /{t}/a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"),
    ("post without length", "POST /{t}/a HTTP/1.1\r\nHost: h\r\n\r\n"),
    (
        "a body that is a request",
        "POST /{t}/a HTTP/1.1\r\nHost: h\r\nContent-Length: 42\r\n\r\nGET /{t}/smuggled HTTP/1.1\r\nHost: h\r\n\r\n",
    ),
    (
        "length, then chunks",
        "POST /{t}/a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "chunks, then length",
        "POST /{t}/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    ),
    (
        "chunks by http/1.0",
        "POST /{t}/a HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ),
    ("kept alive by http/1.0", "GET /{t}/a HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\n\r\n"),
    (
        "a body by http/1.0",
        "POST /{t}/a HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
    ),
    ("two lengths, one body", "POST /{t}/a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello"),
    (
        "two lengths that differ",
        "POST /{t}/a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 0\r\n\r\nhello",
    ),
    (
        "two lengths that differ, turned",
        "POST /{t}/a HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\nhello",
    ),
    (
        "close, then more",
        "GET /{t}/a HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\nGET /{t}/b HTTP/1.1\r\nHost: h\r\n\r\n",
    ),
    ("expects to go on", "POST /{t}/a HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello"),
    ("expects without a body", "GET /{t}/a HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n\r\n"),
    (
        "a length and an upgrade",
        "POST /{t}/a HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: x\r\nContent-Length: 5\r\n\r\nhello",
    ),
    ("connect", "CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n"),
    ("asterisk", "OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n"),
    ("asterisk of a get", "GET * HTTP/1.1\r\nHost: h\r\n\r\n"),
    ("the preface of http/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ("nothing but line feeds", "\r\n\r\n\r\n\r\n"),
    ("nul bytes", "\u{0}\u{0}\u{0}\u{0}\r\n\r\n"),
];

/// All rows.
pub(crate) fn rows() -> Vec<Row> {
    let mut rows: Vec<Row> = vec![];
    let post = |fields: &str, body: &str| format!("POST /{{t}}/a HTTP/1.1\r\nHost: h\r\n{fields}\r\n\r\n{body}");
    for length in LENGTHS {
        rows.push((format!("Content-Length: {length:?}"), post(&format!("Content-Length: {length}"), "hello")));
    }
    for encoding in ENCODINGS {
        let fields = format!("Transfer-Encoding: {encoding}");
        rows.push((format!("Transfer-Encoding: {encoding:?}"), post(&fields, "5\r\nhello\r\n0\r\n\r\n")));
        // Who reads the length takes the chunks for a body, who reads the chunks takes what follows for a request.
        let both = format!("Content-Length: {}\r\n{fields}", 5 + SMUGGLED.len() + 1);
        rows.push((
            format!("a length and Transfer-Encoding: {encoding:?}"),
            post(&both, &format!("0\r\n\r\n{SMUGGLED}")),
        ));
    }
    for name in ENCODING_NAMES {
        let fields = format!("Content-Length: 5\r\n{name}: chunked");
        rows.push((format!("named {name:?}"), post(&fields, "0\r\n\r\n")));
    }
    for chunks in CHUNKS {
        rows.push((format!("chunks {chunks:?}"), post("Transfer-Encoding: chunked", chunks)));
    }
    for field in FIELDS {
        let bytes = format!("GET /{{t}}/a HTTP/1.1\r\nHost: h\r\n{field}\r\n\r\n");
        rows.push((format!("field {field:?}"), bytes));
    }
    for line in LINES {
        rows.push((format!("line {line:?}"), format!("{line}\r\nHost: h\r\n\r\n")));
    }
    rows.extend(STREAMS.iter().map(|(name, bytes)| ((*name).to_owned(), (*bytes).to_owned())));
    rows.push(("many requests".into(), GET.repeat(20)));
    rows
}
