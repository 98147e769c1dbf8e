//! Runs the demo: the platform, the clients against it, and the screen between them.

use std::{
    fs,
    path::Path as File,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use futures_util::FutureExt as _;
use lifl_api::job::FederatedJob;
use lifl_daemon::{admin, logs};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    client::{ClientsConfig, Outcome, Progress, run_clients},
    job::{CLIENTS_PER_ROUND, GOAL, NAME, NAMESPACE, initial_model, job_manifest},
    split::Split,
    ui::{Intro, Path, RoundLine, Summary, Ui},
};
use crate::{
    cli::DemoArgs,
    cpu,
    folder::JobFile,
    platform::{self, Platform, PlatformConfig},
};

/// How long the platform may take to be ready.
const START: Duration = Duration::from_secs(30);

/// Runs the demo.
///
/// # Errors
/// When the platform does not start, the job fails or the goal is not reached.
pub fn run(args: &DemoArgs) -> Result<()> {
    logs::start(logs::Format::Text, "warn");
    // `cargo run` becomes this process: what building took is not the demo's.
    let before = cpu::seconds();
    // Said now, not after the run.
    for (option, file) in [("--json", &args.json), ("--plot", &args.plot)] {
        if let Some(file) = file {
            let opened = fs::OpenOptions::new().create(true).append(true).open(file);
            opened.with_context(|| format!("{option} {}", file.display()))?;
        }
    }
    let folder = tempfile::tempdir().context("a folder for model and checkpoints")?;
    let model = folder.path().join("initial.safetensors");
    fs::write(&model, initial_model(args.seed)?)?;
    let uri = |path: &File| format!("file://{}", path.display());
    let mut job = FederatedJob::from_yaml(&job_manifest(&uri(&model), &uri(&folder.path().join("checkpoint"))))?;
    job.spec.rounds = args.rounds;
    let platform = Platform::start(PlatformConfig {
        listen: args.listen,
        ingress: None,
        admin: args.admin,
        jobs: vec![JobFile { path: "demo".into(), job, join_secret: None }],
        shm_limit: args.platform.shm_limit.map(|size| size.0),
        userspace: args.platform.userspace,
        failpoints: args.platform.failpoint.clone(),
        settings: json!({"coordinator": {"gathering_ms": 500}}),
        state_dir: folder.path().to_owned(),
        log_level: "error".into(),
        log: logs::Format::Text,
    })?;
    let config = ClientsConfig { split: Split { seed: args.seed, ..Split::DEMO }, ..ClientsConfig::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let summary = runtime.block_on(Box::pin(play(&platform, config)));
    // Clients that still wait for an answer are not waited for.
    runtime.shutdown_background();
    let stopped = platform.stop();
    let (mut summary, mut ui) = summary?;
    stopped?;
    // With the components ended their time is all counted.
    summary.cpu_seconds = cpu::seconds() - before;
    ui.finish(&summary, "cargo run --release --")?;
    if let Some(file) = &args.json {
        summary.write_json(file).with_context(|| format!("--json {}", file.display()))?;
    }
    if let Some(file) = &args.plot {
        summary.write_plot(file).with_context(|| format!("--plot {}", file.display()))?;
    }
    if !summary.succeeded() {
        bail!("the demo did not reach its goal: {}", summary.failure.as_deref().unwrap_or("accuracy too low"));
    }
    Ok(())
}

/// Between two looks at the job's status.
const LOOK: Duration = Duration::from_secs(1);

/// What the platform says of itself.
struct Figures {
    lines: Vec<RoundLine>,
    path: Path,
    descriptors: u64,
    shm_peak: u64,
    failure: Option<String>,
}

async fn play(platform: &Platform, config: ClientsConfig) -> Result<(Summary, Ui)> {
    tokio::select! {
        () = platform.ready() => {}
        why = platform.ended() => bail!("the platform ended: {}", why.unwrap_or_default()),
        () = tokio::time::sleep(START) => bail!("the platform is not ready after {START:?}: see its log with `lifl up`"),
    }
    let images = super::digits::Dataset::new(config.split.seed);
    let intro = Intro {
        clients: config.split.clients as u64,
        per_round: u64::from(CLIENTS_PER_ROUND),
        training_images: images.training.len() as u64,
        held_out_images: images.held_out.len() as u64,
        goal: GOAL,
    };
    let mut ui = Ui::new(&intro);
    ui.intro(&intro)?;
    let (events, mut heard) = mpsc::channel(1024);
    let base = format!("http://{}", platform.gateway).parse().context("address of the gateway")?;
    let clients = tokio::spawn(run_clients(base, NAMESPACE, NAME, config, events).boxed());
    let stop = platform::stop_signal()?;
    tokio::pin!(stop);
    let (mut began, mut told, mut seen) = (None, 0, 0);
    let mut measured = Vec::new();
    // A job that fails before it has told its clients anything tells it here.
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            _ = look.tick() => {
                if let Some(failure) = tell_rounds(platform, &mut ui, &mut told, &mut seen).await?.failure {
                    clients.abort();
                    bail!("the job failed: {failure}");
                }
            }
            progress = heard.recv() => {
                let Some(progress) = progress else { break };
                if matches!(progress, Progress::Training { .. }) {
                    began.get_or_insert_with(Instant::now);
                }
                if let Progress::Measured { round, accuracy } = progress {
                    measured.push((round, accuracy));
                }
                ui.progress(&progress)?;
                if matches!(progress, Progress::Measured { .. }) {
                    tell_rounds(platform, &mut ui, &mut told, &mut seen).await?;
                }
            }
            why = platform.ended() => bail!("the platform ended: {}", why.unwrap_or_default()),
            () = &mut stop => bail!("told to end"),
        }
    }
    let seconds = began.map_or(0.0, |began| began.elapsed().as_secs_f64());
    let outcome: Outcome = clients.await??;
    let figures = tell_rounds(platform, &mut ui, &mut told, &mut seen).await?;
    let rounds = ui.rounds()?.to_vec();
    let summary = Summary {
        goal: GOAL,
        measured,
        seconds,
        cpu_seconds: 0.0,
        path: figures.path,
        descriptors: figures.descriptors,
        updates_accepted: outcome.accepted,
        updates_committed: rounds.iter().map(|line| line.updates).sum(),
        shm_peak_bytes: figures.shm_peak,
        failure: outcome.failure.or(figures.failure),
        rounds,
    };
    Ok((summary, ui))
}

/// Hands the rounds committed since the last time to the screen.
async fn tell_rounds(platform: &Platform, ui: &mut Ui, told: &mut u32, seen: &mut u64) -> Result<Figures> {
    let figures = read(&admin::status(platform.supervisor()).await);
    let new: Vec<RoundLine> = figures.lines.iter().filter(|line| line.round > *told).cloned().collect();
    // Descriptors are counted by the node, not by round: what came since the last line is shared by the new ones.
    let since = figures.descriptors.saturating_sub(*seen);
    let count = new.len() as u64;
    for (index, mut line) in (0..).zip(new) {
        *told = line.round;
        line.descriptors = since * (index + 1) / count - since * index / count;
        ui.committed(line)?;
    }
    if count > 0 {
        *seen = figures.descriptors;
    }
    Ok(figures)
}

fn read(status: &Value) -> Figures {
    let agent = &status["components"]["agent"]["status"];
    let job = &status["components"]["coordinator"]["status"]["jobs"][0];
    let chain = &agent["chains"][0];
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let small = |value: &Value| u32::try_from(number(value)).unwrap_or(u32::MAX);
    let path = if agent["path"] == "ebpf" { Path::Ebpf } else { Path::Userspace };
    let history = job["rounds"].as_array();
    let lines = history.into_iter().flatten().map(|round| RoundLine {
        round: small(&round["round"]),
        accuracy: None,
        updates: number(&round["count"]),
        seconds: round["seconds"].as_f64().unwrap_or(0.0),
        leaves: small(&job["leaves"]),
        middles: small(&job["middle"]),
        tops: small(&job["top"]),
        // When the job is over its functions have given their memory back already.
        shm_bytes: number(if job["aggregatorsRun"] == true { &chain["shmBytes"] } else { &agent["shmPeakBytes"] }),
        descriptors: 0,
        path,
    });
    let failed = job["job"]["status"]["phase"] == "Failed";
    let conditions = job["job"]["status"]["conditions"].as_array();
    let reason =
        conditions.into_iter().flatten().find(|c| c["type"] == "Succeeded").and_then(|c| c["message"].as_str());
    Figures {
        lines: lines.collect(),
        path,
        descriptors: number(&agent["descriptors"]),
        shm_peak: number(&agent["shmPeakBytes"]),
        failure: failed.then(|| reason.unwrap_or("the job failed").to_owned()),
    }
}
