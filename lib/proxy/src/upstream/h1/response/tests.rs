use proptest::prelude::*;

use super::*;

const BOUND: usize = 2 << 10;

/// A response as its reader sees it: status, fields, body, trailers, and whether another request may follow.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    status: u16,
    fields: Vec<(String, String)>,
    body: Vec<u8>,
    trailers: Vec<(String, String)>,
    keep_alive: bool,
    /// Bytes that belong to no response.
    left: usize,
}

/// Reads a response that comes in these pieces and then ends.
fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, bodiless: bool) -> Result<Seen, Broken> {
    let (mut buffer, mut seen, mut head) = (BytesMut::new(), 0, None);
    let (mut body, mut trailers, mut ended) = (Vec::new(), Vec::new(), false);
    for piece in pieces {
        buffer.extend_from_slice(piece);
        if head.is_none() {
            head = super::head(&mut buffer, &mut seen, BOUND, bodiless)?;
            body.extend(head.iter().filter_map(|head| head.whole.clone()).flatten());
        }
        let Some(head) = &mut head else { continue };
        while let Some(piece) = head.body.next(&mut buffer)? {
            match piece {
                Piece::Data(data) => body.extend_from_slice(&data),
                Piece::Trailers(all) => trailers = pairs(&all),
                Piece::End => {
                    ended = true;
                    break;
                }
            }
        }
    }
    let Some(Head { response, body: mut decoder, keep_alive, .. }) = head else { return Err(Broken::Closed) };
    if !ended {
        decoder.ended()?;
    }
    let (status, fields) = (response.status().as_u16(), pairs(response.headers()));
    Ok(Seen { status, fields, body, trailers, keep_alive, left: buffer.len() })
}

fn pairs(headers: &HeaderMap) -> Vec<(String, String)> {
    headers.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect()
}

/// `Ok((body, keep-alive, bytes left over))`, or what is wrong.
fn told(response: &str) -> Result<(String, bool, usize), String> {
    let seen = read([response.as_bytes()], false).map_err(|broken| broken.to_string())?;
    Ok((String::from_utf8(seen.body).unwrap(), seen.keep_alive, seen.left))
}

#[test]
fn bodies_end_where_their_heads_say() {
    for (response, body, keep_alive, left) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "hello", true, 0),
        ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\nCONTENT-LENGTH: 5\r\n\r\nhello", "hello", true, 0),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhellomore", "hello", true, 4),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "", true, 0),
        ("HTTP/1.1 200 OK\nContent-Length: 2\n\nok", "ok", true, 0),
        ("HTTP/1.1 200 OK\r\n\r\nuntil the end", "until the end", false, 0),
        ("HTTP/1.1 204 No Content\r\n\r\n", "", true, 0),
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "", true, 0),
        ("HTTP/1.1 200 OK\r\nConnection: foo, Close\r\nContent-Length: 1\r\n\r\n1", "1", false, 0),
        ("HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n1", "1", false, 0),
        ("HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 1\r\n\r\n1", "1", true, 0),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n",
            "abc0123456789",
            true,
            0,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n1\r\na\r\n0\r\n\r\nx",
            "a",
            true,
            1,
        ),
    ] {
        assert_eq!(told(response), Ok((body.to_owned(), keep_alive, left)), "{response:?}");
    }
}

#[test]
fn what_two_readers_may_read_as_two_things_is_refused() {
    for (response, fault) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", "several Content-Length"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello!", "Content-Length"),
        ("HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello", "Content-Length"),
        ("HTTP/1.1 200 OK\r\nContent-Length: \r\n\r\nhello", "Content-Length"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551616\r\n\r\n", "Content-Length"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding"),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "Transfer-Encoding",
        ),
        ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding in HTTP/1.0"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\nab\r\n", "chunk size"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nab\r\n", "chunk size"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000000\r\nab\r\n", "chunk size"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", "chunk without end"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\n", "trailers"),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
            "connection closed before the end of the response",
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", "connection closed before the end of the response"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", "connection closed before the response"),
        ("HTTP/1.1 200 OK\r\nA b: 5\r\n\r\n", "header name"),
        ("HTTP/1.1 099 OK\r\n\r\n", "status"),
        ("HTTP/2.0 200 OK\r\n\r\n", "version"),
        ("\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", "empty line"),
        ("SSH-2.0-OpenSSH\r\n\r\n", "version"),
    ] {
        let told = told(response).expect_err(response);
        assert!(told.contains(fault), "{response:?}: {told}");
    }
    let long = format!("HTTP/1.1 200 OK\r\nA: {}", "a".repeat(BOUND));
    assert!(matches!(read([long.as_bytes()], false), Err(Broken::Long(BOUND))), "a head without end");
    let ended = format!("{long}\r\n\r\n");
    assert!(matches!(read([ended.as_bytes()], false), Err(Broken::Long(BOUND))), "a head that is too long");
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a:\r\n".repeat(FIELDS + 1));
    assert!(matches!(read([many.as_bytes()], false), Err(Broken::Parse(httparse::Error::TooManyHeaders))));
    let size = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;{}", "a".repeat(SIZE_LINE));
    assert!(matches!(read([size.as_bytes()], false), Err(Broken::Malformed("chunk size"))), "an extension without end");
}

#[test]
fn heads_are_passed_on_as_they_are() {
    let response =
        "HTTP/1.1 200 Fine With Me\r\nX-One:  1 \r\nSet-Cookie: a\r\nset-cookie: b\r\nContent-Length: 2\r\n\r\n";
    let mut buffer = BytesMut::from(response);
    let head = head(&mut buffer, &mut 0, BOUND, true).unwrap().unwrap();
    assert_eq!(
        head.response.extensions().get::<ReasonPhrase>().map(ReasonPhrase::as_bytes),
        Some(&b"Fine With Me"[..])
    );
    let fields: Vec<_> = pairs(head.response.headers());
    let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (&**name, &**value)).collect();
    assert_eq!(fields, [("x-one", "1"), ("set-cookie", "a"), ("set-cookie", "b"), ("content-length", "2")]);
    assert_eq!((head.body, head.keep_alive, head.whole), (Decoder::End, true, None), "the answer to a HEAD");
}

#[test]
fn a_length_is_passed_on_once_and_as_a_number() {
    for said in
        ["Content-Length: 2\r\nContent-Length: 2", "Content-Length: 2, 2", "Content-Length: 002", "Content-Length: 2"]
    {
        let response = format!("HTTP/1.1 200 OK\r\n{said}\r\n\r\nok");
        let seen = read([response.as_bytes()], false).expect(said);
        assert_eq!(seen.fields, [("content-length".to_owned(), "2".to_owned())], "{said}");
    }
}

#[test]
fn trailers_come_without_what_frames() {
    let response = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Sum: 7\r\nContent-Length: 9\r\nHost: b\r\n\r\n";
    let seen = read([response.as_bytes()], false).unwrap();
    assert_eq!((seen.trailers, seen.left), (vec![("x-sum".to_owned(), "7".to_owned())], 0));
}

/// A response in parts that are mostly right, so that cutting it matters.
fn responses() -> impl Strategy<Value = Vec<u8>> {
    let fields = prop::collection::vec(
        prop::sample::select(vec![
            "X-A: b\r\n",
            "Connection: close\r\n",
            "Connection: keep-alive\r\n",
            "Content-Length: 7\r\n",
            "Transfer-Encoding: chunked\r\n",
            "Empty:\r\n",
            "Bad header\r\n",
        ]),
        0..4,
    );
    let body = prop::sample::select(vec![
        "7 bytes",
        "7\r\n7 bytes\r\n0\r\n\r\n",
        "3;a=b\r\nabc\r\n0\r\nX-T: 1\r\n\r\n",
        "3\r\nabcd\r\n",
        "",
    ]);
    let first = prop::sample::select(vec!["HTTP/1.1 200 OK\r\n", "HTTP/1.0 200 OK\r\n", "HTTP/1.1 204 No Content\r\n"]);
    (first, fields, body, prop::sample::select(vec!["", "left over"]))
        .prop_map(|(first, fields, body, left)| format!("{first}{}\r\n{body}{left}", fields.concat()).into_bytes())
}

proptest! {
    /// However the network cuts a response, it is the same one.
    #[test]
    fn pieces_make_no_difference(response in responses(), cuts in prop::collection::vec(0_usize..200, 0..8)) {
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(response.len())).collect();
        cuts.sort_unstable();
        cuts.push(response.len());
        let mut from = 0;
        let pieces = cuts.iter().map(|to| &response[std::mem::replace(&mut from, *to)..*to]);
        let (cut, whole) = (read(pieces, false), read([&*response], false));
        let told = |read: Result<Seen, Broken>| read.map(|seen| Seen { left: 0, ..seen }).map_err(|broken| broken.to_string());
        prop_assert_eq!(told(cut), told(whole));
    }
}
