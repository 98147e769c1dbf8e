//! `lifl node`: a component in a pod of its own, with a supervisor of its own.
//!
//! The supervisor is the pod's process 1: it binds ports, keeps descriptors, starts its component again when it dies (kubelet
//! would pause ever longer before it did), serves the admin port, and links the component to those of the node's other pods.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Result;
use futures_util::FutureExt as _;
use lifl_api::quantity::Bytes;
use lifl_daemon::{ChildSpec, Deposit, GATEWAY_UID, NodeSocket, Supervisor, logs, raise_limit};
use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::{Value, json};

use crate::{
    cli::{LogFormat, NodeAgentArgs, NodeArgs, NodeCommand, NodeCoordinatorArgs, NodeGatewayArgs},
    component::single,
    platform::{self, DRAIN},
    secret,
};

/// What a client of the API server in a pod, or one with a kubeconfig, finds in its environment.
const ENVIRONMENT: [&str; 4] = ["KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "KUBECONFIG", "HOME"];
/// What a gateway needs beside the times that it waits for others.
const GATEWAY_ENDS: Duration = Duration::from_secs(5);

/// A part of a node.
struct Part {
    spec: ChildSpec,
    drain: Duration,
}

/// Runs a part of a node until SIGTERM, and until it has drained.
///
/// # Errors
/// A port or socket that cannot be had, or a component that does not live.
pub fn run(command: &NodeCommand, log: LogFormat, log_level: &str) -> Result<()> {
    logs::start(log.into(), log_level);
    raise_limit();
    let (args, part) = match command {
        NodeCommand::Agent(args) => (&args.node, agent(args, log.into(), log_level)),
        NodeCommand::Gateway(args) => (&args.node, gateway(args)?),
        NodeCommand::Coordinator(args) => (&args.node, coordinator(args)?),
    };
    let arguments = platform::log_arguments(log.into(), log_level);
    let spec = ChildSpec { args: part.spec.args.into_iter().chain(arguments).collect(), ..part.spec };
    let part = Part { spec, ..part };
    single(serve(args, part))
}

async fn serve(args: &NodeArgs, part: Part) -> Result<()> {
    let stop = platform::stop_signal()?.inspect(|()| tracing::info!("draining"));
    tokio::pin!(stop);
    let (admin, listener) = platform::bind(args.admin, "--admin")?;
    let name = part.spec.name;
    let hub = match name {
        "agent" => tokio::select! {
            socket = NodeSocket::bind(&args.socket) => Some(socket?),
            () = &mut stop => return Ok(()),
        },
        _ => None,
    };
    let path = args.socket.clone();
    let begun = |supervisor: &Supervisor| {
        match hub {
            Some(socket) => drop(tokio::spawn(supervisor.clone().take_links(socket).boxed())),
            None => drop(tokio::spawn(supervisor.clone().keep_link(path, name).boxed())),
        }
        let supervisor = supervisor.clone();
        tokio::spawn(
            async move {
                supervisor.ready().await;
                tracing::info!(component = name, %admin, "ready");
            }
            .boxed(),
        );
    };
    Ok(platform::keep(vec![part.spec], listener, part.drain, begun, stop).await?)
}

fn part(name: &'static str, peers: &[&'static str], config: Value) -> Part {
    let spec = platform::component(name, peers, config, []);
    Part { spec: ChildSpec { environment: ENVIRONMENT.to_vec(), ..spec }, drain: DRAIN }
}

fn agent(args: &NodeAgentArgs, log: logs::Format, log_level: &str) -> Part {
    let config = json!({
        "shm_limit": bytes(args.shm_limit.as_ref()).unwrap_or_else(|| platform::memory_limit() / 2),
        "userspace": args.userspace,
        "log_level": log_level,
        "log": log,
        "netns": args.netns,
        "node": {"name": args.node_name, "kubeconfig": args.node.kubeconfig},
    });
    part("agent", &["gateway", "coordinator"], config)
}

fn gateway(args: &NodeGatewayArgs) -> Result<Part> {
    let (lame_duck, drain) = (args.lame_duck.0, args.drain.0);
    let config = json!({
        "drain_ms": millis(drain),
        "join_secret": join_secret(args)?,
        "journal_dir": journal_dir(args)?,
        "ingress": {
            "kubernetes": {"kubeconfig": args.node.kubeconfig},
            "lame_duck_ms": millis(lame_duck),
            "access_log": args.access_log,
            "otlp": args.otlp,
            "trace_sample": args.trace_sample,
        },
    });
    let mut part = part("gateway", &[], config);
    let listeners = [
        ("listener", args.clients, "--clients"),
        ("ingress-http", args.http, "--http"),
        ("ingress-https", args.https, "--https"),
        ("ingress-local-http", args.local_http, "--local-http"),
        ("ingress-local-https", args.local_https, "--local-https"),
    ];
    for (key, address, purpose) in listeners {
        part.spec.deposits.push(listener(key, address, purpose)?);
    }
    // Where a pod gives no user, strangers' bytes are not for root all the same.
    part.spec.uid = rustix::process::geteuid().is_root().then_some(GATEWAY_UID);
    part.drain = lame_duck + drain + GATEWAY_ENDS;
    Ok(part)
}

fn coordinator(args: &NodeCoordinatorArgs) -> Result<Part> {
    let config = json!({
        "shm_limit": bytes(args.shm_limit.as_ref()),
        "kubernetes": {"kubeconfig": args.node.kubeconfig, "jobs_at_once": args.jobs_at_once},
    });
    let mut part = part("coordinator", &[], config);
    part.spec.deposits.push(listener("clients", args.clients, "--clients")?);
    Ok(part)
}

fn listener(key: &str, address: SocketAddr, purpose: &'static str) -> Result<Deposit> {
    let (_, listener) = platform::bind(address, purpose)?;
    Ok(Deposit { key: key.to_owned(), meta: Value::Null, fds: vec![listener.into()] })
}

/// What clients present to jobs without a secret of their own. The port is open to the cluster, or to the world: unless it is
/// said to be meant so, such jobs have a secret that nobody knows.
fn join_secret(args: &NodeGatewayArgs) -> Result<Option<String>> {
    match &args.join_token_file {
        Some(path) => Ok(Some(secret::read(path)?)),
        None if args.insecure || args.clients.ip().is_loopback() => Ok(None),
        None => {
            let mut random = [0; 32];
            getrandom(&mut random, GetRandomFlags::empty())?;
            tracing::info!("jobs without auth cannot be joined: see --join-token-file and --insecure");
            Ok(Some(random.iter().map(|byte| format!("{byte:02x}")).collect()))
        }
    }
}

fn journal_dir(args: &NodeGatewayArgs) -> Result<Option<PathBuf>> {
    let root = rustix::process::geteuid().is_root();
    Ok(args.state_dir.as_deref().map(|state_dir| platform::journal_dir(state_dir, root)).transpose()?)
}

fn bytes(size: Option<&Bytes>) -> Option<u64> {
    size.map(|size| size.0)
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn part_of(arguments: &[&str]) -> Result<Part, String> {
        let cli = Cli::try_parse_from(["lifl", "node"].iter().chain(arguments)).map_err(|error| error.to_string())?;
        match cli.command {
            Command::Node(NodeCommand::Gateway(args)) => gateway(&args).map_err(|error| format!("{error:#}")),
            Command::Node(NodeCommand::Coordinator(args)) => coordinator(&args).map_err(|error| format!("{error:#}")),
            other => Err(format!("{other:?}")),
        }
    }

    fn gateway_of(more: &[&str]) -> Result<Value, String> {
        let ports = ["--clients", "--http", "--https", "--local-http", "--local-https"];
        let free: Vec<&str> = ports.into_iter().flat_map(|port| [port, "127.0.0.1:0"]).collect();
        part_of(&[&["gateway"], &free[..], more].concat()).map(|part| part.spec.config)
    }

    #[test]
    fn a_share_of_requests_is_traced_where_there_is_a_receiver() {
        let receiver = "--otlp=http://collector:4318";
        assert_eq!(gateway_of(&[receiver]).unwrap()["ingress"]["trace_sample"], 1.0);
        assert_eq!(gateway_of(&[receiver, "--trace-sample=0.25"]).unwrap()["ingress"]["trace_sample"], 0.25);
        for wrong in ["1.01", "-0.5", "NaN", "half"] {
            let said = gateway_of(&[receiver, &format!("--trace-sample={wrong}")]).unwrap_err();
            let named = said.contains(&format!("'{wrong}' for '--trace-sample"));
            assert!(named && said.contains("a share is a number from 0 to 1"), "{said}");
        }
        let said = gateway_of(&["--trace-sample=0.25"]).unwrap_err();
        assert!(said.contains("--otlp"), "{said}");
    }

    #[test]
    fn journals_lie_where_it_is_said_or_nowhere() {
        assert_eq!(gateway_of(&[]).unwrap()["journal_dir"], Value::Null);
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let config = gateway_of(&["--state-dir", state.to_str().unwrap()]).unwrap();
        assert_eq!(config["journal_dir"].as_str().unwrap(), state.join("journal").to_str().unwrap());
        assert!(state.join("journal").is_dir());
        let said = gateway_of(&["--state-dir=/proc/nowhere"]).unwrap_err();
        assert!(said.contains("/proc/nowhere/journal") && said.contains("--state-dir"), "{said}");
    }

    #[test]
    fn jobs_at_once_are_counted_from_one() {
        let jobs = |arguments: &[&str]| {
            let part = part_of(&[&["coordinator", "--clients=127.0.0.1:0"], arguments].concat())?;
            Ok::<_, String>(part.spec.config["kubernetes"]["jobs_at_once"].clone())
        };
        assert_eq!(jobs(&[]).unwrap(), 4);
        assert_eq!(jobs(&["--jobs-at-once=2"]).unwrap(), 2);
        let said = jobs(&["--jobs-at-once=0"]).unwrap_err();
        assert!(said.contains("'0' for '--jobs-at-once"), "{said}");
    }
}
