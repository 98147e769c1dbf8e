//! A client that sends exactly the bytes it is told to.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::soon;

#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// The stable word of a problem.
    pub(crate) fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }
}

pub(crate) fn head(method: &str, path: &str, headers: &[(&str, String)], length: Option<usize>) -> Vec<u8> {
    let mut out = format!("{method} {path} HTTP/1.1\r\n");
    if headers.iter().all(|(name, _)| *name != "host") {
        out.push_str("host: gateway\r\n");
    }
    for (name, value) in headers {
        out.push_str(&format!("{name}: {value}\r\n"));
    }
    if let Some(length) = length {
        out.push_str(&format!("content-length: {length}\r\n"));
    }
    out.push_str("\r\n");
    out.into_bytes()
}

pub(crate) async fn call(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, String)],
    body: &[u8],
) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = (method == "POST").then_some(body.len());
    stream.write_all(&head(method, path, headers, length)).await.unwrap();
    // The gateway may answer and close before it has read all.
    let _refused_early = stream.write_all(body).await;
    answer(&mut stream, method).await
}

pub(crate) async fn get(address: SocketAddr, path: &str, token: Option<&str>) -> Answer {
    let headers: Vec<_> = token.map(|token| ("authorization", format!("Bearer {token}"))).into_iter().collect();
    call(address, "GET", path, &headers, &[]).await
}

/// Begins an upload; once this returns its head is judged, and the gateway waits for its body.
pub(crate) async fn begin(address: SocketAddr, path: &str, headers: &[(&str, String)], length: usize) -> TcpStream {
    let mut headers = headers.to_vec();
    headers.push(("expect", "100-continue".to_owned()));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&head("POST", path, &headers, Some(length))).await.unwrap();
    let mut told = [0; 25];
    soon("100 Continue", stream.read_exact(&mut told)).await.unwrap();
    assert!(told.starts_with(b"HTTP/1.1 100 Continue"), "{}", String::from_utf8_lossy(&told));
    stream
}

/// Reads one answer; 100 Continue is passed over.
pub(crate) async fn answer(stream: &mut TcpStream, method: &str) -> Answer {
    soon("an answer", async {
        let mut bytes = Vec::new();
        loop {
            if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                let text = String::from_utf8(bytes[..end].to_vec()).unwrap();
                let mut lines = text.split("\r\n");
                let status: u16 = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
                bytes.drain(..end + 4);
                if status == 100 {
                    continue;
                }
                let pair = |line: &str| line.split_once(": ").map(|(a, b)| (a.to_owned(), b.to_owned()));
                let mut answer = Answer { status, headers: lines.filter_map(pair).collect(), body: bytes };
                let length = answer.header("content-length").map_or(0, |length| length.parse().unwrap());
                while answer.body.len() < length && method != "HEAD" && status != 304 {
                    let got = stream.read_buf(&mut answer.body).await.unwrap();
                    assert_ne!(got, 0, "the body broke off after {} of {length} bytes", answer.body.len());
                }
                return answer;
            }
            let got = stream.read_buf(&mut bytes).await.unwrap();
            assert_ne!(got, 0, "closed without an answer: {}", String::from_utf8_lossy(&bytes));
        }
    })
    .await
}
