//! The command line. Exit codes: 0 done, 1 failed, 2 usage; 3 of `lifl plan --diff`: the plans differ.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use lifl_api::{
    plan::Policy,
    quantity::{Bytes, Span},
};

use crate::nodes::NodeSpec;

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
    /// Show where a job's updates would be aggregated, and why; nothing is started.
    Plan(PlanArgs),
    /// Print the CustomResourceDefinition of FederatedJob.
    Crd,
    /// Be a part of a Kubernetes node: what the pods of manifests/ run.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Take queue-proxy out of pods that ask for the node's data plane, as they are admitted.
    Webhook(WebhookArgs),
    /// A component; started by `lifl up` or `lifl node`, not by hand.
    #[command(flatten)]
    Component(Component),
}

/// A part of a Kubernetes node.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Sockets of the node's pods, eBPF, aggregators; needs root. The other parts on the node find each other through it.
    Agent(NodeAgentArgs),
    /// The node's data plane: its pods, the ingress, federated clients.
    Gateway(Box<NodeGatewayArgs>),
    /// Rounds of the cluster's FederatedJobs; one in a cluster.
    Coordinator(NodeCoordinatorArgs),
}

/// Arguments that all parts of a node share.
#[derive(Clone, Debug, Args)]
pub struct NodeArgs {
    /// Credentials for Kubernetes; by default those of the pod.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Where the parts of a node find each other: in a folder of the node that all of them have.
    #[arg(long, value_name = "PATH", default_value = "/run/lifl/node.sock")]
    pub socket: PathBuf,
    /// Where /metrics, /healthz, /readyz and /status are served.
    #[arg(long, default_value = "0.0.0.0:9090")]
    pub admin: SocketAddr,
}

/// Arguments of `lifl node agent`.
#[derive(Clone, Debug, Args)]
pub struct NodeAgentArgs {
    /// What all parts share.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Name of the node whose pods are served.
    #[arg(long, value_name = "NAME")]
    pub node_name: String,
    /// Where the network namespaces of pods are mounted.
    #[arg(long, value_name = "FOLDER", default_value = "/run/netns")]
    pub netns: PathBuf,
    /// Shared memory that all jobs on the node may use; default: half of the machine's (or container's) memory.
    #[arg(long, value_name = "SIZE")]
    pub shm_limit: Option<Bytes>,
    /// Route descriptors in user space even where eBPF could be loaded.
    #[arg(long)]
    pub userspace: bool,
}

/// Arguments of `lifl node gateway`.
#[derive(Clone, Debug, Args)]
pub struct NodeGatewayArgs {
    /// What all parts share.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Where federated clients reach it.
    #[arg(long, default_value = "0.0.0.0:8088")]
    pub clients: SocketAddr,
    /// The ingress, from outside of the cluster.
    #[arg(long, default_value = "0.0.0.0:8080")]
    pub http: SocketAddr,
    /// ... over TLS.
    #[arg(long, default_value = "0.0.0.0:8443")]
    pub https: SocketAddr,
    /// The ingress, from within the cluster.
    #[arg(long, default_value = "0.0.0.0:8081")]
    pub local_http: SocketAddr,
    /// ... over TLS.
    #[arg(long, default_value = "0.0.0.0:8444")]
    pub local_https: SocketAddr,
    /// Connections are accepted for so long after SIGTERM: those who send them have yet to hear of it.
    #[arg(long, default_value = "5s")]
    pub lame_duck: Span,
    /// Requests under way after that are waited for as long; the pod's grace period must be longer than both.
    #[arg(long, default_value = "280s")]
    pub drain: Span,
    /// Log a line for each request of the ingress.
    #[arg(long)]
    pub access_log: bool,
    /// Receiver of traces, OTLP over HTTP.
    #[arg(long, value_name = "URL")]
    pub otlp: Option<String>,
    /// Of requests that say nothing of a trace, so many begin one: 0 to 1.
    #[arg(long, value_name = "SHARE", default_value = "1.0", value_parser = share, requires = "otlp")]
    pub trace_sample: f64,
    /// File with the secret that clients present when they join jobs without `auth` of their own; without it nobody joins those.
    #[arg(long, value_name = "FILE", conflicts_with = "insecure")]
    pub join_token_file: Option<PathBuf>,
    /// Let everybody who reaches it join jobs without `auth`.
    #[arg(long)]
    pub insecure: bool,
    /// Where the journals of jobs with `ackLevel: Disk` lie; as root the gateway's own user must be able to reach it. Without it
    /// such jobs are refused.
    #[arg(long, value_name = "FOLDER")]
    pub state_dir: Option<PathBuf>,
}

/// Arguments of `lifl node coordinator`.
#[derive(Clone, Debug, Args)]
pub struct NodeCoordinatorArgs {
    /// What all parts share.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Where federated clients reach the gateway of this node, which has the jobs: it serves this address of the coordinator's.
    #[arg(long, default_value = "0.0.0.0:8088")]
    pub clients: SocketAddr,
    /// Shared memory that all jobs may use; default: what the node's agent has.
    #[arg(long, value_name = "SIZE")]
    pub shm_limit: Option<Bytes>,
    /// Jobs that run at the same time: each may use as large a share of the memory; further jobs wait.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub jobs_at_once: u32,
}

/// Arguments of `lifl webhook`.
#[derive(Clone, Debug, Args)]
pub struct WebhookArgs {
    /// Credentials for Kubernetes; by default those of the pod.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Where reviews come in, and /healthz and /readyz are answered; over TLS.
    #[arg(long, default_value = "0.0.0.0:8443")]
    pub listen: SocketAddr,
    /// Where /healthz, /readyz and /metrics are served without TLS.
    #[arg(long, default_value = "0.0.0.0:9090")]
    pub admin: SocketAddr,
    /// Name of its Service, for the certificate that it makes itself.
    #[arg(long, default_value = "webhook.lifl-system.svc")]
    pub name: String,
    /// Certificate chain, PEM; with --key, in place of a self-made one. Read again when it changes.
    #[arg(long, value_name = "FILE", requires = "key")]
    pub certificate: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, value_name = "FILE", requires = "certificate")]
    pub key: Option<PathBuf>,
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
    /// Folder of manifests: FederatedJob and Secret, in files ending in .yaml or .yml; with --ingress Knative's Ingresses too.
    pub dir: PathBuf,
    /// Where clients reach the gateway.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Serve the folder's Knative Ingresses here, to the Services, EndpointSlices and Endpoints beside them; changes of files are
    /// followed.
    #[arg(long, value_name = "ADDR")]
    pub ingress: Option<SocketAddr>,
    /// Where /metrics, /healthz, /readyz and /status are served.
    #[arg(long, default_value = "127.0.0.1:9090")]
    pub admin: SocketAddr,
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
    /// What the platform itself is made of and may use.
    #[command(flatten)]
    pub platform: PlatformArgs,
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

/// Arguments of `lifl plan`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Without --nodes and --node the one node is this machine, as `lifl up` uses it.\n\n\
    Exit codes: 0 planned (with --diff: no difference), 1 the job cannot be planned or a file not be read, 2 usage, \
    3 with --diff: the plans differ.")]
pub struct PlanArgs {
    /// File with a FederatedJob, as `lifl up` reads it.
    pub file: PathBuf,
    /// Which job, if the file has several.
    #[arg(long, value_name = "NAME")]
    pub job: Option<String>,
    /// A node, and how many updates it aggregates at once before each takes longer; once for each node. What more is known of it stands
    /// behind: n1=20,memory=8Gi,bandwidth=125M,cores=64,arrivals=10,execution=250ms (bytes a second of its link; updates a second
    /// that it has already, and the time of each).
    #[arg(long, value_name = "NAME=CAPACITY[,..]")]
    pub node: Vec<NodeSpec>,
    /// YAML file of nodes: a list `nodes` of {name, capacity, memory, bandwidth, cores, arrivals, execution}.
    #[arg(long, value_name = "FILE")]
    pub nodes: Option<PathBuf>,
    /// Which of the nodes that have room takes a client: bestfit (LIFL's: fewest nodes), worstfit (Knative's least connections),
    /// firstfit, roundrobin.
    #[arg(long, default_value_t = Policy::BestFit)]
    pub policy: Policy,
    /// `json` or `yaml` for programs, and to compare with later.
    #[arg(short, long, value_enum, default_value_t = PlanOutput::Table)]
    pub output: PlanOutput,
    /// Print what has changed since this plan (written with -o json or -o yaml) instead.
    #[arg(long, value_name = "OLD")]
    pub diff: Option<PathBuf>,
}

/// How `lifl plan` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlanOutput {
    /// A table for people; with --diff a line for each node that differs.
    Table,
    /// The plan, or its differences, as YAML.
    Yaml,
    /// As JSON.
    Json,
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "a share is a number from 0 to 1".to_owned())
}
