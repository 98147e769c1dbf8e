//! The client: blocking sockets that write prepared buffers, so that it is never what is waited for.

use std::{
    io::{BufRead as _, BufReader, IoSlice, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Barrier,
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// A connection that is kept.
pub(super) struct Connection {
    stream: BufReader<TcpStream>,
    host: SocketAddr,
}

/// When a load began and ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// Before the first byte of the first upload.
    pub(super) first: Instant,
    /// After the last answer.
    pub(super) last: Instant,
}

/// One upload: everything of the head but its first line and what all requests have.
pub(super) struct Upload<'a> {
    pub(super) headers: String,
    pub(super) body: &'a [u8],
}

/// Sends uploads over so many connections, each taking every n-th.
pub(super) fn load(server: SocketAddr, path: &str, uploads: &[Upload<'_>], connections: usize) -> anyhow::Result<Load> {
    let lanes = (0..connections).map(|_| Connection::open(server)).collect::<anyhow::Result<Vec<_>>>()?;
    let begin = Barrier::new(connections);
    let work = |(lane, mut connection): (usize, Connection)| {
        begin.wait();
        let first = Instant::now();
        for upload in uploads.iter().skip(lane).step_by(connections) {
            let answer = connection.call("POST", path, &upload.headers, upload.body)?;
            ensure!(answer.status == 202, "{}: {}", answer.status, String::from_utf8_lossy(&answer.body));
        }
        Ok(Load { first, last: Instant::now() })
    };
    std::thread::scope(|scope| {
        let lanes: Vec<_> = lanes.into_iter().enumerate().map(|lane| scope.spawn(|| work(lane))).collect();
        let mut all: Option<Load> = None;
        for lane in lanes {
            let Ok(load) = lane.join() else { bail!("a client panicked") };
            let Load { first, last } = load?;
            all =
                Some(all.map_or(Load { first, last }, |all| Load {
                    first: all.first.min(first),
                    last: all.last.max(last),
                }));
        }
        all.context("no connection")
    })
}

// === impl Connection ===

impl Connection {
    pub(super) fn open(host: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(host).with_context(|| format!("cannot connect to {host}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream), host })
    }

    /// One request, and its answer.
    pub(super) fn call(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) -> anyhow::Result<Answer> {
        let host = self.host;
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
        let mut slices = [IoSlice::new(head.as_bytes()), IoSlice::new(body)];
        let mut left = &mut slices[..];
        while left.iter().any(|slice| !slice.is_empty()) {
            let written = self.stream.get_mut().write_vectored(left)?;
            ensure!(written > 0, "the server closed the connection");
            IoSlice::advance_slices(&mut left, written);
        }
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<Answer> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
        let status = status.with_context(|| format!("the server answered {line:?}"))?;
        let mut length = 0;
        loop {
            line.clear();
            self.stream.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse()?;
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok(Answer { status, body })
    }
}
