//! Benches against real opponents, interleaved in one run: `cargo run --profile image -p lifl-bench -- NAME [--json FILE]`.
//!
//! A bench is a module with `pub(crate) fn run(args: &Args) -> anyhow::Result<Report>` and a line in [`BENCHES`]. It measures with
//! [`measure`], checks what it computed, and returns figures in a [`report::Report`]; printing and writing happen here. Its head
//! says what its figures mean. A bench whose opponent is missing returns an error that says so: it never measures something else
//! instead.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Parser;
use lifl::{
    cli::{Cli, Command},
    component::main_as,
};
use mimalloc::MiMalloc;
use mockalloc::Mockalloc;

mod descriptor;
mod fold;
mod handoff;
mod ingest;
mod measure;
mod paper_overhead;
mod plot;
mod report;
mod request_path;

use report::Report;

type Bench = fn(&Args) -> anyhow::Result<Report>;
type Part = fn() -> anyhow::Result<()>;

/// As `lifl` has it: parts of this binary stand for its processes. Around it stands what counts allocations: it looks at a flag of the
/// thread, and does nothing more where nobody counts.
#[global_allocator]
static ALLOCATOR: Mockalloc<MiMalloc> = Mockalloc(MiMalloc);

/// Every bench by its name.
const BENCHES: &[(&str, Bench)] = &[
    ("descriptor", descriptor::run),
    ("fold", fold::run),
    ("handoff", handoff::run),
    ("ingest", ingest::run),
    ("paper-overhead", paper_overhead::run),
    ("request-path", request_path::run),
];

/// What benches run in processes of their own: this binary, started with `--part`.
const PARTS: &[(&str, Part)] = &[
    ("handoff-top", handoff::top),
    ("ingest-sink", ingest::sink),
    ("ingest-store", ingest::store),
    ("request-path-node", request_path::node),
    ("request-path-upstream", request_path::upstream),
    ("request-path-relay", request_path::relay),
];

/// Benches against real opponents, interleaved in one run.
#[derive(Debug, Parser)]
struct Args {
    /// Which one.
    #[arg(value_parser = names())]
    name: String,

    /// Where to write the report as JSON, besides printing it.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Where to write the report as a picture, besides printing it.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// How often each opponent gets its turn.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(5..))]
    rounds: u32,

    /// Python interpreter that has what `bench/requirements.txt` lists.
    #[arg(long, env = "LIFL_PYTHON", default_value = "python3")]
    python: PathBuf,

    /// request-path: few and short rounds, to see that everything works; nothing is promised of them.
    #[arg(long)]
    quick: bool,

    /// request-path: folder with Knative's `queue`, built from its cmd/queue.
    #[arg(long, value_name = "DIR")]
    knative_bin: Option<PathBuf>,

    /// Be this part of the bench instead: what runs in a process of its own.
    #[arg(long, hide = true)]
    part: Option<String>,
}

fn main() -> anyhow::Result<()> {
    // A platform starts its components from the binary that it is in.
    if let Ok(Cli { command: Command::Component(component), log, log_level }) = Cli::try_parse() {
        return main_as(component, log, &log_level);
    }
    let args = Args::parse();
    if let Some(part) = &args.part {
        let (_, run) = PARTS.iter().find(|(name, _)| name == part).context("no such part")?;
        return run().with_context(|| format!("{part} ended"));
    }
    let (_, run) = BENCHES.iter().find(|(name, _)| *name == args.name).context("no such bench")?;
    let report = run(&args).with_context(|| format!("bench {} is void", args.name))?;
    report.print(&mut std::io::stdout().lock())?;
    if let Some(path) = &args.json {
        report.write(path)?;
    }
    if let Some(path) = &args.svg {
        report.draw(path)?;
    }
    Ok(())
}

fn names() -> Vec<&'static str> {
    BENCHES.iter().map(|(name, _)| *name).collect()
}
