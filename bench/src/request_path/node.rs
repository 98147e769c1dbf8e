//! Ours: the gateway's data plane of pods in a process of its own, as the gateway runs it.
//!
//! What stands between client and container is what stands there in a gateway: its table of pods, each pod's queue and server,
//! sockets that somebody else made, one runtime with a thread per processor. What is missing is who tells the gateway of pods:
//! this process tells itself.

use std::{
    io::{BufRead as _, BufReader, Seek as _, Write as _},
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    process::{Command, Stdio},
};

use anyhow::Context as _;
use lifl_api::pod::{NodePod, PodAsk, PodPort, PodSettings, PodWord};
use lifl_gateway::pods::Pods;
use lifl_proxy::Limits;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::mpsc;

use super::contestant::{Contestant, free};

/// A pod to serve.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Served {
    /// Of its container, and where its requests come in.
    pub(super) at: SocketAddr,
    /// Where its container listens.
    pub(super) user: SocketAddr,
    pub(super) concurrency: u32,
    /// It has the ports of figures and of drain as well.
    pub(super) whole: bool,
}

/// Serves one pod.
pub(super) fn start(name: &'static str, user: SocketAddr, concurrency: u32) -> anyhow::Result<Contestant> {
    let at = free()?;
    start_all(name, &[Served { at, user, concurrency, whole: false }])
}

/// Serves these pods; asked at the first one's address.
pub(super) fn start_all(name: &'static str, pods: &[Served]) -> anyhow::Result<Contestant> {
    let first = pods.first().context("no pod")?;
    let mut input = tempfile::tempfile()?;
    serde_json::to_writer(&mut input, pods)?;
    input.write_all(b"\n")?;
    input.rewind()?;
    let mut command = Command::new("/proc/self/exe");
    command.args(["request-path", "--part", "request-path-node"]).stdin(Stdio::from(input));
    Contestant::start(name, first.at, &mut command)
}

/// Part `request-path-node` of this binary.
pub(crate) fn node() -> anyhow::Result<()> {
    let mut line = String::new();
    BufReader::new(std::io::stdin()).read_line(&mut line)?;
    let pods: Vec<Served> = serde_json::from_str(&line)?;
    lifl_daemon::raise_limit();
    // As the gateway's own process has it.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let (ask, mut asked) = mpsc::unbounded_channel();
        let node = Pods::new(ask, Limits::default());
        // Asked last: its listener says that all are served.
        for (number, pod) in pods.iter().enumerate().rev() {
            serve(&node, number as u64 + 1, pod)?;
        }
        while let Some(PodAsk::Sockets { place, count }) = asked.recv().await {
            let sockets = (0..count).map(|_| socket()).collect::<anyhow::Result<_>>()?;
            node.heed(PodWord::Sockets { place }, sockets);
        }
        Ok(())
    })
}

fn serve(node: &Pods, place: u64, pod: &Served) -> anyhow::Result<()> {
    let ports = match pod.whole {
        true => vec![PodPort::Serving, PodPort::Admin, PodPort::Stats],
        false => vec![PodPort::Serving],
    };
    let listeners = (0_u16..).zip(&ports).map(|(further, _)| listen(pod.at, further)).collect::<anyhow::Result<_>>()?;
    let settings = json!({
        "schema": PodSettings::schema(), "namespace": "bench", "service": "bench", "configuration": "bench",
        "revision": "bench-00001", "systemNamespace": "knative-serving", "servingPort": pod.at.port(), "protocol": "http1",
        "userPort": pod.user.port(), "containerConcurrency": pod.concurrency,
        "timeouts": {"request": 300},
        "readiness": [{"tcpSocket": {"port": pod.user.port()}}],
    });
    let pod = NodePod {
        uid: place.to_string(),
        namespace: "bench".into(),
        name: format!("bench-00001-deployment-{place}"),
        address: pod.at.ip(),
        draining: false,
        settings: serde_json::from_value(settings)?,
    };
    node.heed(PodWord::Serve { place, pod: Box::new(pod), ports }, listeners);
    Ok(())
}

/// As the agent makes them.
fn listen(at: SocketAddr, further: u16) -> anyhow::Result<OwnedFd> {
    let listener = TcpListener::bind(SocketAddr::from((at.ip(), at.port() + further)))
        .with_context(|| format!("cannot listen at {at}"))?;
    listener.set_nonblocking(true)?;
    rustix::net::listen(&listener, 4096)?;
    Ok(listener.into())
}

fn socket() -> anyhow::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?)
}
