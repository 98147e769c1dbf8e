//! What is scarce is refused honestly, and what one client or job does is not the others' trouble.

#[expect(dead_code, reason = "of the harness only a part is needed here")]
mod harness;

use std::{
    fs,
    io::{self, Write as _},
    net::TcpStream,
    sync::mpsc::{self, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::Duration,
};

use harness::{
    Outcome,
    client::{Clients, join, update_headers, values},
    ensure,
    http::{Call, read},
    job::{Job, file},
    no_ebpf, oracle, until,
    up::{Options, Up},
};
use rustix::process::{Resource, getrlimit, setrlimit};

/// Connections that say nothing.
const IDLE: usize = 1_000;

fn options(more: &[&str]) -> Options {
    let more = more.iter().map(|word| (*word).to_owned()).collect();
    Options { userspace: no_ebpf().is_some(), more, ..Options::default() }
}

/// A model of one tensor.
fn zeros(elements: usize) -> Vec<u8> {
    let header = format!(r#"{{"w":{{"dtype":"F32","shape":[{elements}],"data_offsets":[0,{}]}}}}"#, elements * 4);
    let header = format!("{header:<72}");
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.resize(file.len() + elements * 4, 0);
    file
}

fn joined(up: &Up, job: &str, client: u32) -> Outcome<String> {
    until("a token", || join(up.gateway, job, client, None).ok())
}

fn asked_to_train(up: &Up, job: &str, client: u32, token: &str) -> Outcome {
    let path = format!("/v1/namespaces/default/jobs/{job}/task?client=c{client}&wait=5s");
    let mut poll = Call::get(&path);
    poll.headers.push(("authorization", format!("Bearer {token}")));
    until("a task", || {
        let task = poll.to(up.gateway, Duration::from_secs(20)).ok()?;
        (task.json()["state"] == "train").then_some(())
    })
}

/// Sends the first half of a request.
fn half(up: &Up, call: &Call<'_>) -> Outcome<TcpStream> {
    let mut stream = TcpStream::connect(up.gateway)?;
    stream.set_read_timeout(Some(harness::PATIENCE))?;
    stream.write_all(call.head().as_bytes())?;
    stream.write_all(&call.body[..call.body.len() / 2])?;
    Ok(stream)
}

/// An upload that stays under way, a little every now and then, until it is told to end.
struct Held {
    end: mpsc::Sender<()>,
    thread: JoinHandle<io::Result<TcpStream>>,
}

impl Held {
    fn new(up: &Up, call: &Call<'_>) -> Outcome<Self> {
        let mut stream = half(up, call)?;
        let rest = call.body[call.body.len() / 2..].to_vec();
        let (end, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut sent = 0;
            while told.recv_timeout(Duration::from_millis(500)) == Err(RecvTimeoutError::Timeout) {
                let next = (sent + 1024).min(rest.len() - 1);
                stream.write_all(&rest[sent..next])?;
                sent = next;
            }
            stream.write_all(&rest[sent..])?;
            Ok(stream)
        });
        Ok(Self { end, thread })
    }

    fn finish(self) -> Outcome<TcpStream> {
        drop(self.end);
        Ok(self.thread.join().map_err(|_panic| "the sender panicked")??)
    }
}

/// A field of a job's chain in the gateway's status.
fn chain(up: &Up, job: &str, field: &str) -> Option<serde_json::Value> {
    let chains = up.status()?["components"]["gateway"]["status"]["chains"].as_array()?.clone();
    chains.into_iter().find(|chain| chain["job"] == job).map(|chain| chain[field].clone())
}

#[test]
fn a_chain_without_a_free_slot_sends_clients_away_for_a_while() -> Outcome {
    let dir = tempfile::tempdir()?;
    // Half of the limit is each job's: room for the sums, the models and two updates of this one.
    let tight =
        Job { more: "aggregation: {leafFanIn: 10}, overProvision: 1.0".into(), ..Job::new(dir.path(), "tight", 1, 3) };
    tight.write(dir.path())?;
    let body = zeros(1_100_000);
    fs::write(dir.path().join("tight.safetensors"), &body)?;
    let small = Job::new(dir.path(), "small", 2, 2);
    small.write(dir.path())?;
    let mut up = Up::start(dir.path(), &options(&["--shm-limit", "64Mi"]))?;
    let tokens = (0..3).map(|client| joined(&up, "tight", client)).collect::<Outcome<Vec<_>>>()?;
    let path = "/v1/namespaces/default/jobs/tight/events";
    let mut calls = Vec::new();
    for (client, token) in (0..).zip(&tokens) {
        asked_to_train(&up, "tight", client, token)?;
        calls.push(Call { method: "POST", path, headers: update_headers("tight", client, 1, token), body: &body });
    }
    let under_way = calls[..2].iter().map(|call| Held::new(&up, call)).collect::<Outcome<Vec<_>>>()?;
    until("two uploads", || chain(&up, "tight", "uploading").filter(|count| *count == 2))?;
    let refused = calls[2].to(up.gateway, Duration::from_secs(20))?;
    ensure(refused.status == 429 && refused.header("retry-after").is_some(), || refused.text())?;
    ensure(refused.text().contains("of the job's slots exist"), || refused.text())?;
    oracle::check(&small, &Clients::start(up.gateway, &small).done()?, false)?;
    for held in under_way {
        let answer = read(&mut held.finish()?)?;
        ensure(answer.status == 202, || answer.text())?;
    }
    until("a slot", || calls[2].to(up.gateway, Duration::from_secs(20)).ok().filter(|answer| answer.status == 202))?;
    until("the phase Succeeded", || (up.job("tight")?["phase"] == "Succeeded").then_some(()))?;
    up.end()
}

#[test]
fn a_job_without_memory_says_so_and_the_other_goes_on() -> Outcome {
    let dir = tempfile::tempdir()?;
    let big = Job::new(dir.path(), "big", 2, 2);
    big.write(dir.path())?;
    fs::write(dir.path().join("big.safetensors"), zeros(4_000_000))?;
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
    let told = until("the gateway's word", || {
        let token = join(up.gateway, "big", 0, None).ok()?;
        let mut poll = Call::get("/v1/namespaces/default/jobs/big/task?client=c0&wait=1s");
        poll.headers.push(("authorization", format!("Bearer {token}")));
        Some(poll.to(up.gateway, Duration::from_secs(20)).ok()?.json())
    })?;
    ensure(told["state"] != "train" && told["reason"].is_string(), || told.to_string())?;
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
    let token = joined(&up, "slow", 2)?;
    asked_to_train(&up, "slow", 2, &token)?;
    let body = file(&values(2, 1), false);
    let headers = update_headers("slow", 2, 1, &token);
    let path = "/v1/namespaces/default/jobs/slow/events";
    let call = Call { method: "POST", path, headers, body: &body };
    let mut stream = half(&up, &call)?;
    until("the others' updates", || chain(&up, "slow", "admitted").filter(|count| *count == 2))?;
    let answer = read(&mut stream)?;
    ensure(answer.status == 408, || answer.text())?;
    until("the slot", || chain(&up, "slow", "uploading").filter(|count| *count == 0))?;
    let again = call.to(up.gateway, Duration::from_secs(20))?;
    ensure(again.status == 202, || again.text())?;
    others.done()?;
    until("the phase Succeeded", || (up.job("slow")?["phase"] == "Succeeded").then_some(()))?;
    up.end()
}
