//! Updates over HTTP into a sealed sum: the whole platform against servers that do less.
//!
//! Every contestant is processes of its own, asked by the same blocking sockets: HTTP/1.1, keep-alive, ResNet-18's 46.8 MB with
//! `Content-Length`. Ours is a platform with one job and the top alone (its fan-in is not less than the clients of a round): head
//! judged, CRC and finite check of every element, slot, ledger, descriptor, fold, and after each round the division and the
//! coordinator's commit. Time runs from the first byte sent until every update of the round is contained in a sealed sum; processor
//! time is that of gateway, agent, aggregator and coordinator until the next round is open. The sink is hyper with the gateway's
//! settings that reads bodies and drops them. Store-then-add is the same server that copies each body into a memfd made for it (its
//! pages taken at once, which is the cheapest way) and then adds it with our kernel. Neither checks anything.
//!
//! | figure | what is divided |
//! |---|---|
//! | `vs_sink` | updates per second: ours over the sink's, the worse of 1 and 4 connections |
//! | `vs_store_then_add` | the same over store-then-add, the worse of 1 and 4 connections |
//! | `cpu_vs_sink` | processor time per update, 4 connections: ours over the sink's |
//! | `peak_models_k10`, `peak_models_k200` | of a fresh platform, 10 updates of 46.8 MB, and 200 of 8 MB, 4 at a time: the most memory it had above what it had before the first, over the size of the model |
//!
//! Memory is all pages of memfds that any process of the platform holds, each file once, and the anonymous memory of gateway, agent and
//! aggregators, looked at every millisecond. After every round the model is fetched and compared with the weighted mean in `f64`.

use anyhow::ensure;

use crate::{
    Args,
    measure::Rounds,
    report::{Report, median},
};

mod http;
mod model;
mod ours;
mod processes;
mod server;

use model::Updates;
use ours::Ours;
use server::{Opponent, Server};

pub(crate) use server::{sink, store};

/// Updates of a measured turn.
const UPDATES: usize = 40;

/// Connections of the two settings.
const CONNECTIONS: [usize; 2] = [1, 4];

/// Fresh platforms per figure of memory.
const MEMORY_RUNS: usize = 3;

/// What one turn cost, per update.
struct Cost {
    seconds: f64,
    cpu: f64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Report> {
    let mut report = Report::new("ingest");
    let small = Updates::small();
    let resnet = Updates::resnet18();
    for (figure, updates, clients) in [("peak_models_k10", &resnet, 10), ("peak_models_k200", &small, 200)] {
        let mut peaks = Vec::new();
        for _ in 0..MEMORY_RUNS {
            peaks.push(ours::peak(updates, clients)?);
        }
        let models =
            |of: fn(&ours::Peak) -> u64| peaks.iter().map(|p| of(p) as f64 / updates.model_bytes() as f64).collect();
        report.figure(figure, "models", models(|peak| peak.shared + peak.anonymous));
        report.series(&format!("{figure}: shared"), "models", models(|peak| peak.shared));
        report.series(&format!("{figure}: anonymous"), "models", models(|peak| peak.anonymous));
    }
    let mut rounds = Rounds::default();
    let mut platform = Ours::start(&resnet, UPDATES)?;
    let mut servers = [Server::start(Opponent::Sink, &resnet)?, Server::start(Opponent::Store, &resnet)?];
    turn(&mut platform, &mut servers, &resnet, &mut Rounds::default())?;
    for _ in 0..args.rounds {
        turn(&mut platform, &mut servers, &resnet, &mut rounds)?;
    }
    platform.stop()?;
    fill(&mut report, &rounds, &resnet)?;
    Ok(report)
}

/// One round: every contestant with every number of connections.
fn turn(platform: &mut Ours, servers: &mut [Server; 2], updates: &Updates, rounds: &mut Rounds) -> anyhow::Result<()> {
    for connections in CONNECTIONS {
        let [sink, store] = servers;
        let ours = platform.round(updates, connections)?;
        push(rounds, names("ours", connections), &ours);
        push(rounds, names("sink", connections), &sink.turn(updates, UPDATES, connections)?);
        push(rounds, names("store then add", connections), &store.turn(updates, UPDATES, connections)?);
    }
    Ok(())
}

fn push(rounds: &mut Rounds, (time, cpu): (&'static str, &'static str), cost: &Cost) {
    rounds.push(time, cost.seconds * 1e3);
    rounds.push(cpu, cost.cpu * 1e3);
}

fn names(who: &str, connections: usize) -> (&'static str, &'static str) {
    match (who, connections) {
        ("ours", 1) => ("ours, 1 connection", "ours, 1 connection, cpu"),
        ("ours", _) => ("ours, 4 connections", "ours, 4 connections, cpu"),
        ("sink", 1) => ("sink, 1 connection", "sink, 1 connection, cpu"),
        ("sink", _) => ("sink, 4 connections", "sink, 4 connections, cpu"),
        (_, 1) => ("store then add, 1 connection", "store then add, 1 connection, cpu"),
        _ => ("store then add, 4 connections", "store then add, 4 connections, cpu"),
    }
}

fn fill(report: &mut Report, rounds: &Rounds, updates: &Updates) -> anyhow::Result<()> {
    report.note("update", format!("{:.1} MB, {} tensors", updates.body(0).len() as f64 / 1e6, updates.tensors()));
    report.note("turn", format!("{UPDATES} updates"));
    report.note("client", "blocking sockets, one thread per connection, in the process of the bench");
    for (figure, opponent) in [("vs_sink", "sink"), ("vs_store_then_add", "store then add")] {
        let mut settings = Vec::new();
        for connections in CONNECTIONS {
            let ratio = rounds.ratio(names(opponent, connections).0, names("ours", connections).0)?;
            report.series(&format!("{figure}, connections: {connections}"), "x", ratio.clone());
            settings.push(ratio);
        }
        settings.sort_by(|a, b| median(a).total_cmp(&median(b)));
        report.figure(figure, "x", settings.swap_remove(0));
    }
    report.figure("cpu_vs_sink", "x", rounds.ratio("ours, 4 connections, cpu", "sink, 4 connections, cpu")?);
    report.series(
        "cpu_vs_sink, connections: 1",
        "x",
        rounds.ratio("ours, 1 connection, cpu", "sink, 1 connection, cpu")?,
    );
    for (name, series) in rounds.iter() {
        ensure!(series.iter().all(|value| *value > 0.0), "{name} took no time");
        report.series(name, "ms per update", series.to_vec());
    }
    Ok(())
}
