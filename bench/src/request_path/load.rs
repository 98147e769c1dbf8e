//! Closed loops: wrk and h2load, and one request of our own.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, ensure};

use super::contestant::{Contestant, Turn};

/// HTTP/2: connections, and streams on each.
pub(super) const STREAMS: (usize, usize) = (4, 16);

/// The body that a GET is answered with.
pub(super) fn get(at: SocketAddr) -> anyhow::Result<String> {
    get_path(at, "/")
}

/// The same of another path.
pub(super) fn get_path(at: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(at)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("{at} answered {answer:?}"))?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{at} answered {head}");
    Ok(body.to_owned())
}

/// wrk with one thread, over so many connections that are kept.
pub(super) fn wrk(contestant: &Contestant, connections: usize, time: Duration) -> anyhow::Result<Turn> {
    let before = contestant.cpu()?;
    let text = run(Command::new("wrk").args(["-t1", "--latency"]).args([
        format!("-c{connections}"),
        // Whole seconds only.
        format!("-d{}s", time.as_secs().max(1)),
        format!("http://{}/", contestant.at),
    ]))?;
    let cpu = contestant.cpu()? - before;
    ensure!(!text.contains("Non-2xx") && !text.contains("Socket errors"), "{}: {text}", contestant.name);
    let answers: u64 = word(&text, " requests in")?;
    ensure!(answers > 0, "{}: nothing answered", contestant.name);
    let rate = line(&text, "Requests/sec:")?.trim().parse()?;
    Ok(Turn { rate, cpu: cpu.as_secs_f64() * 1e6 / answers as f64, p99: milliseconds(line(&text, "99%")?)?, answers })
}

/// h2load with one thread; gRPC if there is a message.
pub(super) fn h2load(contestant: &Contestant, message: Option<&Path>, time: Duration) -> anyhow::Result<Turn> {
    let before = contestant.cpu()?;
    let (connections, streams) = STREAMS;
    let mut command = Command::new("h2load");
    command.args([
        "-t1",
        &format!("-c{connections}"),
        &format!("-m{streams}"),
        &format!("-D{}", time.as_secs().max(1)),
    ]);
    if let Some(message) = message {
        command.arg("-d").arg(message).args(["-H", "content-type: application/grpc", "-H", "te: trailers"]);
    }
    let text = run(command.arg(format!("http://{}/bench.Echo/Echo", contestant.at)))?;
    let cpu = contestant.cpu()? - before;
    let answers: u64 = word(&text, " succeeded")?;
    let failed: u64 = word(&text, " failed")?;
    ensure!(answers > 0 && failed == 0, "{}: {text}", contestant.name);
    let rate = word(&text, " req/s")?;
    Ok(Turn { rate, cpu: cpu.as_secs_f64() * 1e6 / answers as f64, p99: f64::NAN, answers })
}

fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    Ok(text)
}

fn line<'a>(text: &'a str, begin: &str) -> anyhow::Result<&'a str> {
    let found = text.lines().find_map(|line| line.trim().strip_prefix(begin));
    found.with_context(|| format!("no {begin:?} in {text}"))
}

/// The word before `mark`, where it stands first.
fn word<T: std::str::FromStr>(text: &str, mark: &str) -> anyhow::Result<T> {
    let at = text.find(mark).with_context(|| format!("no {mark:?} in {text}"))?;
    let word = text[..at].rsplit([' ', '\n', ',']).next().unwrap_or_default();
    word.parse().ok().with_context(|| format!("{word:?} before {mark:?}"))
}

/// A time as wrk prints it.
fn milliseconds(text: &str) -> anyhow::Result<f64> {
    let text = text.trim();
    let at = text.find(|c: char| c.is_ascii_alphabetic()).with_context(|| format!("no unit: {text}"))?;
    let factor = match &text[at..] {
        "us" => 1e-3,
        "ms" => 1.0,
        "s" => 1e3,
        "m" => 6e4,
        unit => anyhow::bail!("unknown unit {unit}"),
    };
    Ok(text[..at].parse::<f64>()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_tools_print_is_read() {
        let wrk = "  Latency Distribution\n     50%  301.00us\n     99%    1.20ms\n  1234 requests in 1.01s, 2MB read\nRequests/sec:  1221.78\n";
        assert_eq!(word::<u64>(wrk, " requests in").unwrap(), 1234);
        assert!((milliseconds(line(wrk, "99%").unwrap()).unwrap() - 1.2).abs() < 1e-9);
        assert!((line(wrk, "Requests/sec:").unwrap().trim().parse::<f64>().unwrap() - 1221.78).abs() < 1e-9);
        let h2load = "finished in 1.00s, 48888.00 req/s, 2.10MB/s\nrequests: 48888 total, 48952 started, 48888 done, 48888 succeeded, 0 failed, 0 errored, 0 timeout\n";
        assert_eq!(word::<u64>(h2load, " succeeded").unwrap(), 48888);
        assert_eq!(word::<u64>(h2load, " failed").unwrap(), 0);
        assert!((word::<f64>(h2load, " req/s").unwrap() - 48888.0).abs() < 1e-9);
        assert!(milliseconds("3 fortnights").is_err());
    }
}
