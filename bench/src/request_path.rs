//! One hop to a container: ours, against nginx, haproxy and Knative's queue-proxy.
//!
//! Ours is the gateway's data plane of pods in a process of its own: the table of pods, each pod's queue with everything that
//! queue-proxy does (Knative's timeout of 300 s included), sockets made by somebody else. Opponents are Debian's nginx and
//! haproxy as proxies that do nothing else, as many workers as ours has threads, connections to the upstream kept, no log; and
//! queue-proxy where `--knative-bin` names a folder with its binary (`queue`). All ask the same upstream over loopback: small GETs
//! an nginx with one worker, uploads and gRPC a hyper server with one thread. wrk and h2load have one thread.
//!
//! In each round all contestants take their turns at each load, every round beginning with another one; ratios are taken within a
//! round. Processor time is that of a contestant's processes, all threads, kernel included. Bodies are compared before the first
//! round, and in every answer of the open loop, of uploads; the upstreams' own counts must cover every answer that a load counted.
//!
//! | figure | what is divided |
//! |---|---|
//! | `rps_vs_nginx`, `cpu_vs_nginx` | requests per second, and processor time per request, of small GETs over 32 connections: ours over nginx's |
//! | `rps_cc100_vs_cc0` | the same requests per second with a container concurrency of 100, over those without a limit |
//! | `p99_vs_nginx` | open loop at half the rate that the slower of the two takes over 32 connections: 99th percentile, ours over nginx's |
//! | `upload_vs_direct` | bytes per second of 46.8 MB uploads over one connection: through ours over none between |
//! | `upload_vs_relay` | the same over those through a loop that reads and writes, and does nothing else |
//! | `grpc_vs_nginx`, `h2c_vs_nginx` | calls (GETs) per second over HTTP/2, 4 connections with 16 streams: ours over nginx's `grpc_pass` |
//! | `idle_ticks` | processor time, in ticks of 10 ms, that a node with 1,000 warm functions takes in 60 s without requests |
//! | `rss_kb_per_function` | resident memory that one of these functions adds |
//! | `.._vs_haproxy`, `.._vs_queue_proxy` | the same against these; queue-proxy's open loop runs at half its own rate |

use std::{path::Path, time::Duration};

use anyhow::{Context as _, ensure};

use crate::{
    Args,
    measure::Rounds,
    report::{Report, median},
};

mod contestant;
mod idle;
mod load;
mod node;
mod open;
mod opponents;
mod relay;
mod upload;
mod upstream;

use contestant::{Contestant, Turn};
use open::Plan;
use opponents::{HELLO, Opponents};

pub(crate) use node::node;
pub(crate) use relay::relay;
pub(crate) use upstream::upstream;

/// Connections of small GETs; the first one is what figures are of.
const CONNECTIONS: [usize; 3] = [32, 1, 256];

/// What a contestant is called when it has a container concurrency of 100.
const LIMITED: &str = "ours, CC 100";

/// How long everything takes.
#[derive(Clone, Copy, Debug)]
struct Times {
    rounds: u32,
    /// A turn of the load that figures are of.
    turn: Duration,
    open: Duration,
    uploads: u32,
    idle: Duration,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Report> {
    let folder = tempfile::tempdir()?;
    let opponents = Opponents::new(folder.path(), args.knative_bin.as_deref())?;
    let times = Times::new(args);
    let mut report = Report::new("request-path");
    let mut rounds = Rounds::default();
    small(&opponents, &times, &mut rounds)?;
    large(&opponents, folder.path(), &times, &mut rounds)?;
    report.note("workers", format!("{} of every contestant", opponents.workers()));
    report.note("turn", format!("{} s, {} rounds", times.turn.as_secs(), times.rounds));
    fill(&mut report, &rounds)?;
    let idle = idle::idle(&opponents, times.idle)?;
    report.note("idle", format!("{} functions for {} s", idle::FUNCTIONS, times.idle.as_secs()));
    report.figure("idle_ticks", "ticks", vec![idle.ticks as f64]);
    report.figure("rss_kb_per_function", "kB", vec![idle.each]);
    report.series("rss of a node with one function", "kB", vec![idle.base]);
    if let Some((ticks, rss)) = idle.queue_proxy {
        report.series("idle ticks of one queue-proxy", "ticks", vec![ticks as f64]);
        report.series("rss of one queue-proxy", "kB", vec![rss]);
    }
    Ok(report)
}

/// Small GETs, closed and open loop.
fn small(opponents: &Opponents, times: &Times, rounds: &mut Rounds) -> anyhow::Result<()> {
    let upstream = opponents.upstream()?;
    let to = upstream.server.at;
    let mut field = vec![
        opponents.nginx_http1(to)?,
        node::start("ours", to, 0)?,
        opponents.haproxy(to, "")?,
        node::start(LIMITED, to, 100)?,
    ];
    field.extend(opponents.queue_proxy(to)?);
    for contestant in &field {
        ensure!(load::get(contestant.at)? == HELLO, "{}: another body", contestant.name);
    }
    let mut warm = Rounds::default();
    for contestant in &field {
        let turn = load::wrk(contestant, CONNECTIONS[0], times.turn)?;
        warm.push(contestant.name, turn.rate);
    }
    let knee = |name: &str| warm.series(name).map(median);
    let shared = knee("nginx")?.min(knee("ours")?);
    for number in 0..times.rounds {
        let before = upstream.answered()?;
        let mut answers = 0;
        let first = usize::try_from(number)? % field.len();
        let order = || field[first..].iter().chain(&field[..first]);
        for connections in CONNECTIONS {
            let time = if connections == CONNECTIONS[0] { times.turn } else { times.turn / 2 };
            for contestant in order() {
                let turn = load::wrk(contestant, connections, time)?;
                answers += turn.answers;
                push(rounds, contestant.name, &format!("{connections} connections"), &turn);
            }
            let direct = load::wrk(&upstream.server, connections, Duration::from_secs(1))?;
            answers += direct.answers;
            rounds.push(format!("direct, {connections} connections: rate"), direct.rate);
        }
        let counted = upstream.answered()? - before;
        ensure!(counted >= answers, "{answers} answers, but the upstream gave {counted}");
        for contestant in order().filter(|contestant| contestant.name != LIMITED) {
            let knee = if contestant.name == "queue-proxy" { knee("queue-proxy")? } else { shared };
            let plan = Plan { rate: knee / 2.0, connections: CONNECTIONS[0], time: times.open };
            let latency = open::open_loop(contestant.at, HELLO, plan)
                .with_context(|| format!("{}, open loop at {:.0}/s", contestant.name, plan.rate))?;
            rounds.push(format!("{}, open loop: rate", contestant.name), plan.rate);
            rounds.push(format!("{}, open loop: p50", contestant.name), latency.p50);
            rounds.push(format!("{}, open loop: p99", contestant.name), latency.p99);
        }
    }
    Ok(())
}

/// Uploads, and HTTP/2.
fn large(opponents: &Opponents, folder: &Path, times: &Times, rounds: &mut Rounds) -> anyhow::Result<()> {
    let direct = upstream::start()?;
    let to = direct.at;
    let ours = node::start("ours", to, 0)?;
    let queue_proxy = opponents.queue_proxy(to)?;
    let nginx = (opponents.nginx_http1(to)?, opponents.nginx_grpc(to)?);
    let haproxy = (opponents.haproxy(to, "")?, opponents.haproxy(to, "proto h2")?);
    let relay = relay::start(to)?;
    let mut uploads = vec![&direct, &ours, &nginx.0, &haproxy.0, &relay];
    let mut streams = vec![&nginx.1, &ours, &haproxy.1];
    uploads.extend(&queue_proxy);
    streams.extend(&queue_proxy);
    for contestant in streams.iter().chain([&&direct]) {
        upstream::check(contestant.at).with_context(|| contestant.name)?;
    }
    let body = vec![0x5a_u8; upload::BYTES];
    let message = upstream::message(folder)?;
    let count = || -> anyhow::Result<u64> { load_count(&direct) };
    for number in 0..=times.rounds {
        // The first one warms.
        let mut ignored = Rounds::default();
        let rounds = if number == 0 { &mut ignored } else { &mut *rounds };
        uploads.rotate_left(1);
        for contestant in &uploads {
            let (rate, cpu) = upload::upload(contestant, &body, times.uploads)?;
            rounds.push(format!("{}, upload: GB/s", contestant.name), rate);
            rounds.push(format!("{}, upload: cpu ms", contestant.name), cpu);
        }
        streams.rotate_left(1);
        for (what, message) in [("gRPC", Some(message.as_path())), ("h2c", None)] {
            for contestant in &streams {
                let before = count()?;
                let turn = load::h2load(contestant, message, times.turn)?;
                let counted = count()? - before;
                ensure!(counted >= turn.answers, "{}: {} calls, upstream: {counted}", contestant.name, turn.answers);
                push(rounds, contestant.name, what, &turn);
            }
        }
    }
    Ok(())
}

fn load_count(upstream: &Contestant) -> anyhow::Result<u64> {
    Ok(load::get_path(upstream.at, "/count")?.parse()?)
}

fn push(rounds: &mut Rounds, name: &str, load: &str, turn: &Turn) {
    rounds.push(format!("{name}, {load}: rate"), turn.rate);
    rounds.push(format!("{name}, {load}: cpu"), turn.cpu);
    if turn.p99.is_finite() {
        rounds.push(format!("{name}, {load}: p99"), turn.p99);
    }
}

fn fill(report: &mut Report, rounds: &Rounds) -> anyhow::Result<()> {
    let limited = rounds.ratio("ours, CC 100, 32 connections: rate", "ours, 32 connections: rate")?;
    report.figure("rps_cc100_vs_cc0", "x", limited);
    report.series(
        "cpu_cc100_vs_cc0",
        "x",
        rounds.ratio("ours, CC 100, 32 connections: cpu", "ours, 32 connections: cpu")?,
    );
    let uploads =
        |name: &str, over: &str| rounds.ratio(&format!("{name}, upload: GB/s"), &format!("{over}, upload: GB/s"));
    report.figure("upload_vs_direct", "x", uploads("ours", "direct")?);
    report.figure("upload_vs_relay", "x", uploads("ours", "relay")?);
    report.series("upload, relay vs direct", "x", uploads("relay", "direct")?);
    let compared = [
        ("rps", "32 connections: rate"),
        ("cpu", "32 connections: cpu"),
        ("p99", "open loop: p99"),
        ("grpc", "gRPC: rate"),
        ("h2c", "h2c: rate"),
    ];
    for (opponent, suffix) in [("nginx", "nginx"), ("haproxy", "haproxy"), ("queue-proxy", "queue_proxy")] {
        if rounds.series(&format!("{opponent}, 32 connections: rate")).is_err() {
            continue;
        }
        let ratio = |what: &str| rounds.ratio(&format!("ours, {what}"), &format!("{opponent}, {what}"));
        for (name, what) in compared {
            report.figure(&format!("{name}_vs_{suffix}"), "x", ratio(what)?);
        }
        report.series(&format!("upload_vs_{suffix}"), "x", ratio("upload: GB/s")?);
        for connections in &CONNECTIONS[1..] {
            let what = format!("{connections} connections");
            report.series(&format!("rps_vs_{suffix}, {what}"), "x", ratio(&format!("{what}: rate"))?);
            report.series(&format!("cpu_vs_{suffix}, {what}"), "x", ratio(&format!("{what}: cpu"))?);
        }
    }
    for (name, series) in rounds.iter() {
        let unit = match name.rsplit(": ").next() {
            Some("rate") => "requests/s",
            Some("cpu") => "us of processor per request",
            Some("cpu ms") => "ms of processor per upload",
            Some("GB/s") => "GB/s",
            _ => "ms",
        };
        report.series(name, unit, series.to_vec());
    }
    Ok(())
}

// === impl Times ===

impl Times {
    const fn new(args: &Args) -> Self {
        let seconds = Duration::from_secs;
        if args.quick {
            return Self { rounds: 3, turn: seconds(1), open: seconds(1), uploads: 8, idle: seconds(10) };
        }
        Self { rounds: args.rounds, turn: seconds(2), open: seconds(3), uploads: 15, idle: seconds(60) }
    }
}
