//! What is scarce is refused honestly, and what one client or job does is not the others' trouble.

#[expect(dead_code, reason = "of the harness only a part is needed here")]
mod harness;

use std::{fs, io::Write as _, net::TcpStream, time::Duration};

use harness::{
    Outcome,
    client::{Clients, join, update_headers, values},
    ensure,
    http::{Call, read},
    job::{Job, file},
    no_ebpf, oracle,
    up::{Options, Up},
    until,
};
use rustix::process::{Resource, getrlimit, setrlimit};

/// Connections that say nothing.
const IDLE: usize = 1_000;

fn options(more: &[&str]) -> Options {
    let more = more.iter().map(|word| (*word).to_owned()).collect();
    Options { userspace: no_ebpf().is_some(), more, ..Options::default() }
}

#[test]
fn a_job_without_memory_says_so_and_the_other_goes_on() -> Outcome {
    let dir = tempfile::tempdir()?;
    let big = Job::new(dir.path(), "big", 2, 2);
    big.write(dir.path())?;
    let header = r#"{"w":{"dtype":"F32","shape":[4000000],"data_offsets":[0,16000000]}}  "#;
    let mut model = (header.len() as u64).to_le_bytes().to_vec();
    model.extend(header.as_bytes());
    model.resize(model.len() + 16_000_000, 0);
    fs::write(dir.path().join("big.safetensors"), model)?;
    let small = Job::new(dir.path(), "small", 2, 2);
    small.write(dir.path())?;
    let mut up = Up::start(dir.path(), &options(&["--shm-limit", "16Mi"]))?;
    let why = until("a reason", || {
        let status = up.job("big")?;
        let conditions = status["conditions"].as_array()?.clone();
        conditions.into_iter().find(|condition| condition["reason"] == "QuotaTooSmall")
    })?;
    let message = why["message"].as_str().unwrap_or_default();
    ensure(message.contains("--shm-limit") && message.contains("bytes of shared memory"), || why.to_string())?;
    let refused = join(up.gateway, "big", 0);
    ensure(refused.is_err(), || "a job that cannot run took a client".to_owned())?;
    let book = Clients::start(up.gateway, &small).done()?;
    oracle::check(&small, &book, false)?;
    up.end()
}

#[test]
fn a_thousand_idle_connections_hinder_nobody() -> Outcome {
    // Ours and, inherited, the gateway's.
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    setrlimit(Resource::Nofile, files)?;
    let dir = tempfile::tempdir()?;
    let job = Job::new(dir.path(), "busy", 3, 4);
    job.write(dir.path())?;
    let mut up = Up::start(dir.path(), &options(&[]))?;
    let idle = (0..IDLE).map(|_| TcpStream::connect(up.gateway)).collect::<Result<Vec<_>, _>>()?;
    let book = Clients::start(up.gateway, &job).done()?;
    oracle::check(&job, &book, false)?;
    drop(idle);
    up.end()
}

#[test]
fn a_client_that_stops_in_the_middle_is_let_go() -> Outcome {
    let dir = tempfile::tempdir()?;
    let job = Job::new(dir.path(), "slow", 1, 3);
    job.write(dir.path())?;
    let mut up = Up::start(dir.path(), &options(&[]))?;
    // Two that send at once, and one by hand.
    let others = Clients::start(up.gateway, &Job { clients: 2, ..job.clone() });
    let token = until("a token", || join(up.gateway, "slow", 2).ok())?;
    let mut poll = Call::get("/v1/namespaces/default/jobs/slow/task?client=c2&wait=5s");
    poll.headers.push(("authorization", format!("Bearer {token}")));
    until("a task", || {
        let task = poll.to(up.gateway, Duration::from_secs(20)).ok()?;
        (task.json()["state"] == "train").then_some(())
    })?;
    let body = file(&values(2, 1), false);
    let headers = update_headers("slow", 2, 1, &token);
    let path = "/v1/namespaces/default/jobs/slow/events";
    let call = Call { method: "POST", path, headers, body: &body };
    let mut stream = TcpStream::connect(up.gateway)?;
    stream.set_read_timeout(Some(harness::PATIENCE))?;
    stream.write_all(call.head().as_bytes())?;
    stream.write_all(&body[..body.len() / 2])?;
    let chain = |field: &str| up.status().map(|s| s["components"]["gateway"]["status"]["chains"][0][field].clone());
    until("the others' updates", || chain("admitted").filter(|count| *count == 2))?;
    let answer = read(&mut stream)?;
    ensure(answer.status == 408, || answer.text())?;
    until("the slot", || chain("uploading").filter(|count| *count == 0))?;
    let again = call.to(up.gateway, Duration::from_secs(20))?;
    ensure(again.status == 202, || again.text())?;
    others.done()?;
    until("the phase Succeeded", || (up.job("slow")?["phase"] == "Succeeded").then_some(()))?;
    up.end()
}
