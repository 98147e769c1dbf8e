//! `lifl status`.

use std::{
    fmt::Write as _,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::cli::{Output, StatusArgs};

const TIMEOUT: Duration = Duration::from_secs(5);

/// Prints the jobs of a running platform.
///
/// # Errors
/// When it does not answer.
pub fn run(args: &StatusArgs) -> Result<()> {
    let status = fetch(args.admin)?;
    let text = match args.output {
        Output::Json => format!("{status:#}\n"),
        Output::Table => table(&status),
    };
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

/// The status document of the platform at `admin`.
///
/// # Errors
/// When it does not answer.
pub fn fetch(admin: SocketAddr) -> Result<Value> {
    let ask = || -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&admin, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        write!(stream, "GET /status HTTP/1.0\r\nHost: {admin}\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer =
        ask().with_context(|| format!("no platform answers at {admin} (is `lifl up` running? see --admin)"))?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.") && head.contains(" 200 ") => Ok(serde_json::from_str(body)?),
        _ => bail!("{admin} is not the admin port of a platform: it answers '{}'", answer.lines().next().unwrap_or("")),
    }
}

/// One line a job.
#[must_use]
pub fn table(status: &Value) -> String {
    let mut out =
        format!("{:<24} {:<10} {:>11} {:>9} {:>9}  {}\n", "JOB", "PHASE", "ROUND", "CLIENTS", "REPORTED", "NOTE");
    let jobs = status["components"]["coordinator"]["status"]["jobs"].as_array();
    for entry in jobs.into_iter().flatten() {
        let job = &entry["job"];
        let name = format!(
            "{}/{}",
            job["metadata"]["namespace"].as_str().unwrap_or("default"),
            job["metadata"]["name"].as_str().unwrap_or("?")
        );
        let state = &job["status"];
        let conditions = state["conditions"].as_array();
        let bad = conditions.into_iter().flatten().find(|c| c["status"] == "False");
        let note = bad.and_then(|c| c["message"].as_str()).unwrap_or("");
        let round =
            format!("{} / {}", state["round"].as_u64().unwrap_or(0), job["spec"]["rounds"].as_u64().unwrap_or(0));
        let clients = state["clients"]["registered"].as_u64().unwrap_or(0);
        let reported = state["clients"]["reported"].as_u64().unwrap_or(0);
        let phase = state["phase"].as_str().unwrap_or("Pending");
        let _to_a_string = writeln!(out, "{name:<24} {phase:<10} {round:>11} {clients:>9} {reported:>9}  {note}");
    }
    let agent = &status["components"]["agent"]["status"];
    let mib = |value: &Value| value.as_u64().unwrap_or(0) >> 20;
    let _to_a_string = writeln!(
        out,
        "\npath {}   descriptors {}   shared memory {} MiB (peak {} MiB)",
        agent["path"].as_str().unwrap_or("?"),
        agent["descriptors"],
        mib(&agent["shmBytes"]),
        mib(&agent["shmPeakBytes"]),
    );
    out
}
