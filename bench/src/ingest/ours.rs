//! The platform, with one job.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use lifl::{
    folder::JobFile,
    platform::{Platform, PlatformConfig},
};
use lifl_api::{
    event::{SAFETENSORS, types},
    http::{Joined, Task, TaskState},
    job::FederatedJob,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    Cost,
    http::{Connection, Upload, load},
    model::Updates,
    processes::{self, Memory, Process},
};

const NAMESPACE: &str = "default";
const JOB: &str = "bench";
const BASE: &str = "/v1/namespaces/default/jobs/bench";

/// How often status and memory are looked at.
const TICK: Duration = Duration::from_millis(1);

/// Nothing here takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running platform whose clients have joined.
pub(super) struct Ours {
    platform: Platform,
    processes: Vec<Process>,
    tokens: Vec<String>,
    _folder: TempDir,
}

/// Bytes above what there was before the first update.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peak {
    pub(super) shared: u64,
    pub(super) anonymous: u64,
}

/// The most memory that a fresh platform had in its first round.
pub(super) fn peak(updates: &Updates, clients: usize) -> anyhow::Result<Peak> {
    let ours = Ours::start(updates, clients)?;
    let round = ours.open_round()?;
    let base = processes::memory(&ours.processes);
    let over = Arc::new(AtomicBool::new(false));
    let (watched, stop) = (ours.processes.clone(), Arc::clone(&over));
    let watch = thread::spawn(move || {
        let mut most = Memory::default();
        while !stop.load(Ordering::Relaxed) {
            let now = processes::memory(&watched);
            if now.shared + now.anonymous > most.shared + most.anonymous {
                most = now;
            }
            thread::sleep(TICK);
        }
        most
    });
    let sent = ours.send(updates, round, 4).and_then(|_| ours.wait_committed(round));
    over.store(true, Ordering::Relaxed);
    let Ok(most) = watch.join() else { bail!("the watch over memory panicked") };
    sent?;
    ours.check(updates, round)?;
    ours.stop()?;
    let above = |most: u64, base: u64| most.saturating_sub(base);
    Ok(Peak { shared: above(most.shared, base.shared), anonymous: above(most.anonymous, base.anonymous) })
}

// === impl Ours ===

impl Ours {
    pub(super) fn start(updates: &Updates, clients: usize) -> anyhow::Result<Self> {
        let folder = TempDir::with_prefix("lifl-bench-")?;
        let model = folder.path().join("model.safetensors");
        std::fs::write(&model, updates.initial())?;
        let manifest = json!({
            "apiVersion": "fl.lifl.dev/v1alpha1",
            "kind": "FederatedJob",
            "metadata": {"name": JOB, "namespace": NAMESPACE},
            "spec": {
                "model": {"name": "bench", "initial": {"uri": format!("file://{}", model.display())}},
                "update": {"kind": "Full", "dtypes": ["F32"]},
                "rounds": 100_000,
                "clientsPerRound": clients,
                "overProvision": 1.0,
                "roundDeadline": "1h",
                "aggregation": {"rule": "FedAvg", "timing": "Eager", "leafFanIn": clients},
                "checkpoint": {"uri": format!("file://{}", folder.path().join("rounds").display()), "keep": 1},
            },
        });
        let job = FederatedJob::from_yaml(&manifest.to_string())?;
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let platform = Platform::start(PlatformConfig {
            listen: any,
            ingress: None,
            admin: any,
            jobs: vec![JobFile { path: "bench.yaml".into(), job, join_secret: None }],
            shm_limit: None,
            userspace: false,
            failpoints: Vec::new(),
            // Between its turns the platform's clients are silent while others have theirs.
            settings: json!({"gateway": {"heartbeat_ms": 3_600_000}}),
            state_dir: folder.path().to_owned(),
            log_level: "warn".into(),
            log: lifl_daemon::logs::Format::Text,
        })?;
        let ready = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let in_time = ready.block_on(async {
            tokio::select! {
                () = platform.ready() => true,
                () = tokio::time::sleep(PATIENCE) => false,
            }
        });
        ensure!(in_time, "the platform was not ready within {PATIENCE:?}");
        let mut ours = Self { platform, processes: Vec::new(), tokens: Vec::new(), _folder: folder };
        ours.tokens = (0..clients).map(|i| ours.join(i)).collect::<anyhow::Result<_>>()?;
        ours.open_round()?;
        ours.processes = processes::of_platform()?;
        let count = |component: &str| ours.processes.iter().filter(|p| p.component == component).count();
        for (component, want) in [("gateway", 1), ("agent", 1), ("coordinator", 1), ("aggregator", 1)] {
            let found = count(component);
            ensure!(found == want, "{found} processes are {component}, expected {want}");
        }
        Ok(ours)
    }

    pub(super) fn stop(self) -> anyhow::Result<()> {
        Ok(self.platform.stop()?)
    }

    /// A round: what one update cost.
    pub(super) fn round(&mut self, updates: &Updates, connections: usize) -> anyhow::Result<Cost> {
        let count = self.tokens.len() as f64;
        let round = self.open_round()?;
        let pids = || self.processes.iter().map(Process::pid);
        let before = processes::cpu(pids())?;
        let first = self.send(updates, round, connections)?;
        let contained = self.wait_contained(round)?;
        self.wait_committed(round)?;
        self.open_round()?;
        let cpu = processes::cpu(pids())? - before;
        self.check(updates, round)?;
        Ok(Cost { seconds: (contained - first).as_secs_f64() / count, cpu: cpu / count })
    }

    fn join(&self, client: usize) -> anyhow::Result<String> {
        let event = json!({
            "specversion": "1.0",
            "id": format!("join-{client}"),
            "type": types::AVAILABLE,
            "source": source(client),
            "fljob": JOB,
            "flclient": name(client),
        });
        let mut connection = Connection::open(self.platform.gateway)?;
        let path = format!("{BASE}/events");
        let event = event.to_string();
        let begun = Instant::now();
        loop {
            let answer =
                connection.call("POST", &path, "content-type: application/cloudevents+json\r\n", event.as_bytes())?;
            // The job may not have reached the gateway yet.
            if answer.status == 404 && begun.elapsed() < PATIENCE {
                thread::sleep(TICK);
                continue;
            }
            ensure!(answer.status == 200, "joining: {} {}", answer.status, String::from_utf8_lossy(&answer.body));
            return Ok(serde_json::from_slice::<Joined>(&answer.body)?.token);
        }
    }

    /// Waits until every client is to train; for which round.
    fn open_round(&self) -> anyhow::Result<u32> {
        let path = format!("{BASE}/task?client={}&wait=30s", name(0));
        let answer =
            Connection::open(self.platform.gateway)?.call("GET", &path, &authorization(&self.tokens[0]), &[])?;
        ensure!(answer.status == 200, "task: {} {}", answer.status, String::from_utf8_lossy(&answer.body));
        let task: Task = serde_json::from_slice(&answer.body)?;
        ensure!(task.state == TaskState::Train, "the first client is to {:?}: {:?}", task.state, task.reason);
        Ok(task.round)
    }

    /// Every client's update; when the first byte went out.
    fn send(&self, updates: &Updates, round: u32, connections: usize) -> anyhow::Result<Instant> {
        let uploads: Vec<_> = self
            .tokens
            .iter()
            .enumerate()
            .map(|(i, token)| Upload { headers: head(i, round, token), body: updates.body(i) })
            .collect();
        Ok(load(self.platform.gateway, &format!("{BASE}/events"), &uploads, connections)?.first)
    }

    /// When every update of the round was contained in a sealed sum.
    fn wait_contained(&self, round: u32) -> anyhow::Result<Instant> {
        self.wait("contained", |chain| {
            let number = |value: &Value| value.as_u64();
            let is = number(&chain["round"])?;
            let all = number(&chain["admitted"])? == self.tokens.len() as u64 && number(&chain["slots"]["live"])? == 0;
            Some(is > u64::from(round) || (is == u64::from(round) && all))
        })
    }

    /// When its model was committed.
    fn wait_committed(&self, round: u32) -> anyhow::Result<Instant> {
        self.wait("committed", |chain| Some(chain["modelRound"].as_u64()? >= u64::from(round)))
    }

    fn wait(&self, what: &str, is_so: impl Fn(&Value) -> Option<bool>) -> anyhow::Result<Instant> {
        let mut admin = Connection::open(self.platform.admin)?;
        let begun = Instant::now();
        loop {
            let answer = admin.call("GET", "/status", "", &[])?;
            let now = Instant::now();
            let status: Value = serde_json::from_slice(&answer.body)?;
            let chain = &status["components"]["gateway"]["status"]["chains"][0];
            if is_so(chain).with_context(|| format!("the status of the job is {chain}"))? {
                return Ok(now);
            }
            ensure!(begun.elapsed() < PATIENCE, "the updates of a round were not {what} within {PATIENCE:?}: {chain}");
            thread::sleep(TICK);
        }
    }

    /// Fetches the model and compares it.
    fn check(&self, updates: &Updates, round: u32) -> anyhow::Result<()> {
        let path = format!("{BASE}/model?round={round}");
        let answer =
            Connection::open(self.platform.gateway)?.call("GET", &path, &authorization(&self.tokens[0]), &[])?;
        ensure!(answer.status == 200, "model: {} {}", answer.status, String::from_utf8_lossy(&answer.body));
        let (begin, elements) = updates.floats();
        ensure!(answer.body.len() == begin + elements * size_of::<f32>(), "a model of {} bytes", answer.body.len());
        updates.check(&answer.body[begin..], self.tokens.len(), 1.0)
    }
}

fn name(client: usize) -> String {
    format!("client-{client}")
}

fn source(client: usize) -> String {
    lifl_api::event::client_source(NAMESPACE, JOB, &name(client))
}

fn authorization(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

fn head(client: usize, round: u32, token: &str) -> String {
    [
        ("authorization", format!("Bearer {token}")),
        ("content-type", SAFETENSORS.to_owned()),
        ("ce-specversion", "1.0".to_owned()),
        ("ce-type", types::UPDATE.to_owned()),
        ("ce-id", format!("round-{round}")),
        ("ce-source", source(client)),
        ("ce-fljob", JOB.to_owned()),
        ("ce-flclient", name(client)),
        ("ce-flround", round.to_string()),
        ("ce-flsamples", Updates::weight(client).to_string()),
        ("ce-flkind", "full".to_owned()),
        ("ce-fldtype", "f32".to_owned()),
    ]
    .map(|(name, value)| format!("{name}: {value}\r\n"))
    .concat()
}
