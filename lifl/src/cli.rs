//! The command line. Exit codes: 0 done, 1 failed, 2 usage.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use lifl_api::quantity::Bytes;

/// Serverless aggregation of federated-learning updates: gateway, shared memory, eBPF, one machine or many.
#[derive(Debug, Parser)]
#[command(name = "lifl", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// How log lines look.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log: LogFormat,
    /// What is logged: error, warn, info, debug, or a filter such as lifl_gateway=debug.
    #[arg(long, global = true, default_value = "info")]
    pub log_level: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a real model on this machine: 100 clients, handwritten digits, a hierarchy of aggregators.
    Demo(DemoArgs),
    /// Serve the jobs of a folder of manifests.
    Up(UpArgs),
    /// Show the jobs of a running `lifl up` or `lifl demo`.
    Status(StatusArgs),
    /// Print the CustomResourceDefinition of FederatedJob.
    Crd,
    /// A component; started by `lifl up`, not by hand.
    #[command(flatten)]
    Component(Component),
}

/// A component of the platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
#[command(hide = true)]
pub enum Component {
    /// The node agent.
    #[command(hide = true)]
    Agent,
    /// The node gateway.
    #[command(hide = true)]
    Gateway,
    /// The coordinator of federated jobs.
    #[command(hide = true)]
    Coordinator,
    /// The aggregator function.
    #[command(hide = true)]
    Aggregator,
}

/// Arguments of `lifl up`.
#[derive(Clone, Debug, Args)]
pub struct UpArgs {
    /// Folder of manifests: FederatedJob and Secret, in files ending in .yaml or .yml.
    pub dir: PathBuf,
    /// Where clients reach the gateway.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// What the platform itself is made of and may use.
    #[command(flatten)]
    pub platform: PlatformArgs,
    /// File with the secret that clients present when they join, for jobs without `auth` of their own.
    #[arg(long)]
    pub join_token_file: Option<PathBuf>,
    /// Where the journals of jobs with `ackLevel: Disk` lie; as root the gateway's own user must be able to reach it.
    #[arg(long, value_name = "FOLDER", default_value = "/var/lib/lifl")]
    pub state_dir: PathBuf,
    /// Listen on other addresses than loopback although there is neither TLS nor a join secret.
    #[arg(long)]
    pub insecure: bool,
}

/// Arguments that `lifl up` and `lifl demo` share.
#[derive(Clone, Debug, Args)]
pub struct PlatformArgs {
    /// Where /metrics, /healthz, /readyz and /status are served.
    #[arg(long, default_value = "127.0.0.1:9090")]
    pub admin: SocketAddr,
    /// Shared memory that all jobs together may use; default: half of this machine's (or container's) memory.
    #[arg(long, value_name = "SIZE")]
    pub shm_limit: Option<Bytes>,
    /// Route descriptors in user space even where eBPF could be loaded.
    #[arg(long)]
    pub userspace: bool,
    /// `component:name:n`: where a component's first life ends (for tests of failures).
    #[arg(long, hide = true)]
    pub failpoint: Vec<String>,
}

/// Arguments of `lifl demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Where clients reach the gateway; by default a free port of this machine.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Where /metrics, /healthz, /readyz and /status are served; by default a free port.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub admin: SocketAddr,
    /// Shared memory that the demo may use.
    #[arg(long, value_name = "SIZE")]
    pub shm_limit: Option<Bytes>,
    /// Route descriptors in user space even where eBPF could be loaded.
    #[arg(long)]
    pub userspace: bool,
    /// Seed of data split, selection and training.
    #[arg(long, default_value_t = 2)]
    pub seed: u64,
    /// Rounds at most.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Draw accuracy by round as SVG.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Write the run's figures as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// `component:name:n`: where a component's first life ends (for tests of failures).
    #[arg(long, hide = true)]
    pub failpoint: Vec<String>,
}

/// Arguments of `lifl status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Admin address of the platform.
    #[arg(long, default_value = "127.0.0.1:9090")]
    pub admin: SocketAddr,
    /// `json` for programs.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// How `lifl status` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table for people.
    Table,
    /// The status document.
    Json,
}
