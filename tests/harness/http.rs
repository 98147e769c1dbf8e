//! One HTTP/1.1 request on a connection of its own.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use serde_json::Value;

/// What came back, whole.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

/// A request, repeatable.
#[derive(Clone, Debug, Default)]
pub(crate) struct Call<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) headers: Vec<(&'a str, String)>,
    pub(crate) body: &'a [u8],
}

// === impl Answer ===

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        format!("{} {}", self.status, String::from_utf8_lossy(&self.body))
    }

    /// Value of a header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let line = |line: &&str| line.split_once(':').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name));
        Some(self.head.lines().find(line)?.split_once(':')?.1.trim())
    }
}

// === impl Call ===

impl<'a> Call<'a> {
    pub(crate) fn get(path: &'a str) -> Self {
        Self { method: "GET", path, ..Self::default() }
    }

    /// The request's head as it goes over the wire.
    pub(crate) fn head(&self) -> String {
        let mut head = format!("{} {} HTTP/1.1\r\nConnection: close\r\n", self.method, self.path);
        if self.headers.iter().all(|(name, _)| !name.eq_ignore_ascii_case("host")) {
            head.push_str("Host: lifl\r\n");
        }
        self.headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        head.push_str(&format!("Content-Length: {}\r\n\r\n", self.body.len()));
        head
    }

    /// Sends it and reads the whole answer; an answer that breaks off is an error.
    pub(crate) fn to(&self, address: SocketAddr, timeout: Duration) -> io::Result<Answer> {
        let mut stream = TcpStream::connect_timeout(&address, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        stream.write_all(self.head().as_bytes())?;
        // A refusal may come before the body is through.
        let sent = stream.write_all(self.body);
        let answer = read(&mut stream);
        if answer.is_err() {
            sent?;
        }
        answer
    }
}

/// Reads an answer to the end of its connection.
pub(crate) fn read(stream: &mut TcpStream) -> io::Result<Answer> {
    let mut all = Vec::new();
    let ended = stream.read_to_end(&mut all);
    let broken = || io::Error::new(io::ErrorKind::UnexpectedEof, "the answer breaks off");
    let Some(end) = all.windows(4).position(|four| four == b"\r\n\r\n") else {
        ended?;
        return Err(broken());
    };
    let head = String::from_utf8_lossy(&all[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|text| text.parse().ok()).ok_or_else(broken)?;
    let mut answer = Answer { status, head, body: all.split_off(end + 4) };
    if answer.header("transfer-encoding") == Some("chunked") {
        answer.body = unchunked(&answer.body).ok_or_else(broken)?;
    } else if let Some(length) = answer.header("content-length").and_then(|text| text.parse().ok()) {
        if answer.body.len() < length {
            return Err(broken());
        }
        answer.body.truncate(length);
    }
    Ok(answer)
}

fn unchunked(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|two| two == b"\r\n")?;
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?.trim(), 16).ok()?;
        if length == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(end + 2..end + 2 + length)?);
        rest = rest.get(end + 4 + length..)?;
    }
}
