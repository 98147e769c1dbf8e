//! A node with functions: their network namespaces, an API server that tells of them, and the platform, with the figures of its
//! processes.
//!
//! The platform's processes are this program started again: [`component`] must be asked first by `main`.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdin, Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use lifl::{
    cli::{Component, LogFormat},
    component::main_as,
    platform::{Platform, PlatformConfig},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    cluster,
    namespaces::{Namespaces, USER_PORT, address},
};

/// What the kubelet asks of each pod.
const PROBE: &str = "GET / HTTP/1.1\r\nHost: pod\r\nUser-Agent: kube-probe/1.34\r\nK-Network-Probe: queue\r\n\
    Connection: close\r\n\r\n";
/// Argument of the process that is the platform's supervisor.
const PLATFORM: &str = "platform-of-functions";

/// The node; ends with its value.
pub(crate) struct World {
    namespaces: Namespaces,
    count: usize,
    admin: SocketAddr,
    supervisor: Child,
    /// Its end is the supervisor's.
    stop: Option<ChildStdin>,
    _folder: TempDir,
}

/// `supervisor`, `agent`, `gateway`, `coordinator`, by number.
pub(crate) type Processes = BTreeMap<u32, String>;

/// What one process has used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Used {
    /// Processor time, in the kernel's ticks.
    pub(crate) ticks: u64,
    /// Proportional set, KiB.
    pub(crate) pss: u64,
}

/// This process as one of the platform's, if it was started as one.
pub(crate) fn component() -> Option<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let run = |component| main_as(component, LogFormat::Text, "warn");
    let ended = match words.first()?.as_str() {
        PLATFORM => platform(Path::new(words.get(1)?)),
        "agent" => run(Component::Agent),
        "gateway" => run(Component::Gateway),
        "coordinator" => run(Component::Coordinator),
        _ => return None,
    };
    Some(match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

fn platform(settings: &Path) -> Result<()> {
    lifl_daemon::logs::start(lifl_daemon::logs::Format::Text, "warn");
    lifl_daemon::raise_limit();
    let free = SocketAddr::from(([127, 0, 0, 1], 0));
    let platform = Platform::start(PlatformConfig {
        listen: free,
        ingress: None,
        admin: free,
        jobs: Vec::new(),
        shm_limit: Some(64 << 20),
        userspace: true,
        failpoints: Vec::new(),
        settings: serde_json::from_str(&fs::read_to_string(settings)?)?,
        state_dir: settings.with_file_name("state"),
        log_level: "warn".into(),
        log: lifl_daemon::logs::Format::Text,
    })?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(platform.ready());
    writeln!(std::io::stdout(), "{}", platform.admin)?;
    let _until_it_ends = std::io::stdin().lines().count();
    Ok(platform.stop()?)
}

// === impl World ===

impl World {
    /// A node of `count` functions, each served.
    pub(crate) fn start(count: usize) -> Result<Self> {
        lifl_daemon::raise_limit();
        let (folder, namespaces) = (tempfile::tempdir()?, Namespaces::new(count)?);
        let pods = (0..count).map(|number| cluster::pod(number, &address(number).to_string(), USER_PORT));
        let server = cluster::serve(pods.collect::<Result<_, _>>()?)?;
        let (kubeconfig, settings) = (folder.path().join("kubeconfig"), folder.path().join("settings"));
        cluster::kubeconfig(server, &kubeconfig)?;
        let agent = json!({"netns": namespaces.folder(), "node": {"name": "node", "kubeconfig": kubeconfig}});
        fs::write(&settings, json!({ "agent": agent }).to_string())?;
        let mut command = Command::new(std::env::current_exe()?);
        let mut supervisor =
            command.arg(PLATFORM).arg(&settings).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stop = supervisor.stdin.take();
        let mut line = String::new();
        BufReader::new(supervisor.stdout.take().context("standard output")?).read_line(&mut line)?;
        let admin = line.trim().parse().context("the platform does not start")?;
        Ok(Self { namespaces, count, admin, supervisor, stop, _folder: folder })
    }

    /// Pods that the gateway serves.
    pub(crate) fn served(&self) -> usize {
        self.status().and_then(|s| Some(s["components"]["gateway"]["status"]["pods"].as_array()?.len())).unwrap_or(0)
    }

    /// Asks every pod whether it is ready, as its kubelet does.
    pub(crate) fn probe(&self) -> Result<()> {
        for number in 0..self.count {
            let answer = self.namespaces.ask(number, 8012, PROBE).with_context(|| format!("pod {number}"))?;
            ensure!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\nqueue"), "pod {number}: {answer}");
        }
        Ok(())
    }

    /// All processes of the platform: name and number.
    pub(crate) fn processes(&self) -> Result<Processes> {
        let mut processes = BTreeMap::from([(self.supervisor.id(), "supervisor".to_owned())]);
        let status = self.status().context("no status")?;
        for (name, component) in status["components"].as_object().context("no components")? {
            let pid = component["pid"].as_u64().with_context(|| format!("no process: {name}"))?;
            processes.insert(u32::try_from(pid)?, name.clone());
        }
        Ok(processes)
    }

    fn status(&self) -> Option<Value> {
        lifl::status::fetch(self.admin).ok()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ended_already = self.supervisor.wait();
    }
}

/// What these have used. Only the kernel is asked: a question to them would be work.
pub(crate) fn used(processes: &Processes) -> Result<BTreeMap<u32, Used>> {
    processes.keys().map(|pid| Ok((*pid, of(*pid)?))).collect()
}

fn of(pid: u32) -> Result<Used> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(") ").context("stat")?.1.split(' ').collect();
    let ticks = fields.get(11).context("utime")?.parse::<u64>()? + fields.get(12).context("stime")?.parse::<u64>()?;
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("Pss")?;
    let pss = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(Used { ticks, pss })
}
