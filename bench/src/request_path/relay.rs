//! The least that a hop can be on a kernel's sockets: one reads, writes what it has read, and knows nothing of HTTP. What it
//! loses against no hop is what any proxy that copies loses on this machine.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    process::Command,
    thread,
};

use anyhow::Context as _;

use super::contestant::{Contestant, free};

/// What is read at once.
const READ: usize = 256 << 10;

/// Starts it.
pub(super) fn start(to: SocketAddr) -> anyhow::Result<Contestant> {
    let at = free()?;
    let mut command = Command::new("/proc/self/exe");
    command.args(["request-path", "--part", "request-path-relay"]);
    command.env("LIFL_BENCH_LISTEN", at.to_string()).env("LIFL_BENCH_UPSTREAM", to.to_string());
    Contestant::start("relay", at, &mut command)
}

/// Part `request-path-relay` of this binary.
pub(crate) fn relay() -> anyhow::Result<()> {
    let address = |name: &str| -> anyhow::Result<SocketAddr> {
        Ok(std::env::var(name).context("started by the bench")?.parse()?)
    };
    let to = address("LIFL_BENCH_UPSTREAM")?;
    for client in TcpListener::bind(address("LIFL_BENCH_LISTEN")?)?.incoming() {
        let client = client?;
        let upstream = TcpStream::connect(to)?;
        client.set_nodelay(true)?;
        upstream.set_nodelay(true)?;
        let back = (upstream.try_clone()?, client.try_clone()?);
        // A connection that fails is a request that fails: the client says so.
        thread::spawn(move || pass(client, upstream));
        thread::spawn(move || pass(back.0, back.1));
    }
    Ok(())
}

fn pass(mut from: TcpStream, mut to: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; READ];
    loop {
        match from.read(&mut buffer)? {
            0 => return to.shutdown(Shutdown::Write),
            count => to.write_all(&buffer[..count])?,
        }
    }
}
