//! Uploads of 46.8 MB over one connection that is kept: a blocking client that writes one prepared buffer.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    time::Instant,
};

use anyhow::{Context as _, ensure};

use super::contestant::Contestant;

/// ResNet-18 in `f32`.
pub(super) const BYTES: usize = 46_800_000;

/// Gigabytes a second, and milliseconds of processor time of the contestant per upload.
pub(super) fn upload(contestant: &Contestant, body: &[u8], count: u32) -> anyhow::Result<(f64, f64)> {
    let stream = TcpStream::connect(contestant.at)?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let mut one = || -> anyhow::Result<()> {
        let to = stream.get_mut();
        write!(to, "POST /upload HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n", contestant.at, body.len())?;
        to.write_all(body)?;
        let answer = answer(&mut stream)?;
        ensure!(answer.parse() == Ok(body.len()), "{}: {answer} of {} bytes", contestant.name, body.len());
        Ok(())
    };
    // The first one makes the connection to the upstream.
    one()?;
    let (begun, before) = (Instant::now(), contestant.cpu()?);
    for _ in 0..count {
        one()?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = contestant.cpu()? - before;
    Ok((f64::from(count) * body.len() as f64 / seconds / 1e9, cpu.as_secs_f64() * 1e3 / f64::from(count)))
}

/// The body of a 200; with its length, or in chunks.
fn answer(stream: &mut BufReader<TcpStream>) -> anyhow::Result<String> {
    let mut line = String::new();
    let (mut length, mut status) = (None, None);
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        if status.is_none() {
            status = Some(line.clone());
        } else if let Some((name, value)) = line.trim_end().split_once(':') {
            if name.eq_ignore_ascii_case("content-length") {
                length = Some(value.trim().parse()?);
            }
        } else {
            break;
        }
    }
    ensure!(status.as_ref().is_some_and(|line| line.starts_with("HTTP/1.1 200")), "answered {status:?}");
    if let Some(length) = length {
        let mut body = vec![0; length];
        stream.read_exact(&mut body)?;
        return Ok(String::from_utf8(body)?);
    }
    let mut body = String::new();
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        let chunk = usize::from_str_radix(line.trim_end(), 16).with_context(|| format!("chunk of {line:?}"))?;
        let mut bytes = vec![0; chunk + 2];
        stream.read_exact(&mut bytes)?;
        if chunk == 0 {
            return Ok(body);
        }
        body.push_str(std::str::from_utf8(&bytes[..chunk])?);
    }
}
