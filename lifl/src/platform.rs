//! The platform on one machine: the supervisor and its three components.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::Duration,
};

use futures_util::FutureExt as _;
use lifl_api::job::AckLevel;
use lifl_daemon::{ChildSpec, Deposit, GATEWAY_UID, Supervisor, SupervisorError, admin, logs::Format};
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{oneshot, watch},
};

use crate::folder::JobFile;

/// A port in use is tried so many times more, so far apart, before it counts as another's.
const BIND_TRIES: u32 = 5;
const BIND_PAUSE: Duration = Duration::from_millis(100);
/// A component that has not drained by then is killed.
pub(crate) const DRAIN: Duration = Duration::from_secs(20);

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct PlatformConfig {
    /// Where clients reach the gateway.
    pub listen: SocketAddr,
    /// Where requests to Knative's services come in, and the folder of their rules.
    pub ingress: Option<(SocketAddr, PathBuf)>,
    /// Where metrics and status are served.
    pub admin: SocketAddr,
    /// The jobs.
    pub jobs: Vec<JobFile>,
    /// Shared memory of all jobs, bytes; `None`: half of the memory there is.
    pub shm_limit: Option<u64>,
    /// Route descriptors in user space.
    pub userspace: bool,
    /// `component:name:n`.
    pub failpoints: Vec<String>,
    /// Settings of components beyond these, by component.
    pub settings: Value,
    /// Where the journals of jobs with `ackLevel: Disk` lie.
    pub state_dir: PathBuf,
    /// What components log: `error`, `warn`, `info`, `debug`.
    pub log_level: String,
    /// How it looks.
    pub log: Format,
}

/// The platform at work. Its components die with this process, whatever ends it.
#[derive(Debug)]
pub struct Platform {
    /// Address of the gateway, really bound.
    pub gateway: SocketAddr,
    /// Address of the ingress, really bound.
    pub ingress: Option<SocketAddr>,
    /// Address of the admin port, really bound.
    pub admin: SocketAddr,
    supervisor: Supervisor,
    stop: Option<oneshot::Sender<()>>,
    ended: watch::Receiver<Option<String>>,
    thread: Option<JoinHandle<Result<(), SupervisorError>>>,
}

/// Why the platform does not start.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// An address cannot be bound.
    #[error("cannot listen on {address} for {purpose}: {source}{hint}", hint = hint(source))]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What for, and how another is chosen.
        purpose: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The supervisor failed.
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => " (is another lifl running? choose another port)",
        io::ErrorKind::PermissionDenied => " (ports below 1024 need root)",
        _ => "",
    }
}

// === impl Platform ===

impl Platform {
    /// Binds the ports and starts the components; they are ready after [`Platform::ready`].
    ///
    /// # Errors
    /// [`PlatformError`].
    pub fn start(config: PlatformConfig) -> Result<Self, PlatformError> {
        let (gateway, listener) = bind(config.listen, "clients (--listen)")?;
        let (admin_address, admin_listener) = bind(config.admin, "admin (--admin)")?;
        let bound =
            config.ingress.as_ref().map(|(address, _)| bind(*address, "the ingress (--ingress)")).transpose()?;
        let (ingress, entrance) = bound.unzip();
        let specs = specs(&config, listener.into(), entrance.map(OwnedFd::from))?;
        let (stop, stopped) = oneshot::channel();
        let (started, begin) = oneshot::channel();
        let (end, ended) = watch::channel(None);
        // One thread for the supervisor's whole life: children are told to die with the thread that made them.
        let thread = thread::Builder::new().name("supervisor".into()).spawn(move || {
            let result = supervise(specs, admin_listener, started, stopped);
            end.send_replace(Some(result.as_ref().err().map(ToString::to_string).unwrap_or_default()));
            result
        })?;
        match begin.blocking_recv() {
            Ok(supervisor) => {
                let (admin, stop, thread) = (admin_address, Some(stop), Some(thread));
                Ok(Self { gateway, ingress, admin, supervisor, stop, ended, thread })
            }
            Err(_never_started) => match thread.join() {
                Ok(Err(error)) => Err(error.into()),
                _ => Err(io::Error::other("the supervisor ended at its start").into()),
            },
        }
    }

    /// The supervisor: status, metrics, processes.
    #[must_use]
    pub const fn supervisor(&self) -> &Supervisor {
        &self.supervisor
    }

    /// Resolves when all components serve.
    pub async fn ready(&self) {
        self.supervisor.ready().await;
    }

    /// Resolves when the platform has ended; `Some` says why it failed.
    pub async fn ended(&self) -> Option<String> {
        let mut ended = self.ended.clone();
        let why = ended.wait_for(Option::is_some).await.map(|why| why.clone());
        why.ok().flatten().filter(|why| !why.is_empty())
    }

    /// Drains and ends all components.
    ///
    /// # Errors
    /// What ended the platform before.
    pub fn stop(mut self) -> Result<(), SupervisorError> {
        if let Some(stop) = self.stop.take() {
            let _ended_already = stop.send(());
        }
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_panicked)) => Err(io::Error::other("the supervisor panicked").into()),
            None => Ok(()),
        }
    }
}

/// Binds an address. After a killed platform its gateway may hold the port for the moment that it takes to die.
pub(crate) fn bind(address: SocketAddr, purpose: &'static str) -> Result<(SocketAddr, TcpListener), PlatformError> {
    let bound = || {
        let mut tries = 0;
        let listener = loop {
            match TcpListener::bind(address) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries < BIND_TRIES => {
                    thread::sleep(BIND_PAUSE)
                }
                other => break other?,
            }
            tries += 1;
        };
        listener.set_nonblocking(true)?;
        Ok((listener.local_addr()?, listener))
    };
    bound().map_err(|source| PlatformError::Bind { address, purpose, source })
}

fn supervise(
    specs: Vec<ChildSpec>,
    admin_listener: TcpListener,
    started: oneshot::Sender<Supervisor>,
    stopped: oneshot::Receiver<()>,
) -> Result<(), SupervisorError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(
        async {
            let begun = |supervisor: &Supervisor| drop(started.send(supervisor.clone()));
            // Dropped without a word counts as stop.
            let stopped = async { drop(stopped.await) };
            keep(specs, admin_listener, DRAIN, begun, stopped).await
        }
        .boxed_local(),
    )
}

/// Keeps components alive and serves their admin port until `stop` resolves; then has them end in order.
pub(crate) async fn keep(
    specs: Vec<ChildSpec>,
    admin_listener: TcpListener,
    drain: Duration,
    begun: impl FnOnce(&Supervisor),
    stop: impl Future<Output = ()>,
) -> Result<(), SupervisorError> {
    let (supervisor, run) = Supervisor::start(specs)?;
    let listener = tokio::net::TcpListener::from_std(admin_listener)?;
    tokio::spawn(admin::serve(listener, supervisor.clone()).boxed());
    begun(&supervisor);
    tokio::pin!(run);
    tokio::select! {
        result = &mut run => return result,
        () = stop => {}
    }
    tokio::select! {
        result = &mut run => result,
        () = supervisor.drain(drain) => Ok(()),
    }
}

/// A component, which is this same program.
pub(crate) fn component(
    name: &'static str,
    peers: &[&'static str],
    config: Value,
    arguments: impl IntoIterator<Item = String>,
) -> ChildSpec {
    ChildSpec {
        name,
        program: PathBuf::from("/proc/self/exe"),
        args: std::iter::once(name.to_owned()).chain(arguments).collect(),
        environment: Vec::new(),
        config,
        peers: peers.to_vec(),
        uid: None,
        deposits: Vec::new(),
        failpoint: None,
    }
}

/// What has a component log as this process does.
pub(crate) fn log_arguments(log: Format, log_level: &str) -> [String; 2] {
    [format!("--log-level={log_level}"), format!("--log={log}")]
}

/// Resolves with SIGTERM or Ctrl-C; both are caught from this call on.
pub(crate) fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn specs(config: &PlatformConfig, listener: OwnedFd, ingress: Option<OwnedFd>) -> io::Result<Vec<ChildSpec>> {
    let shm_limit = config.shm_limit.unwrap_or_else(|| memory_limit() / 2);
    let root = rustix::process::geteuid().is_root();
    let jobs: Vec<Value> = config
        .jobs
        .iter()
        .map(|file| json!({"path": file.path, "document": file.job, "join_secret": file.join_secret}))
        .collect();
    let failpoint = |component: &str| {
        let of = |text: &String| text.strip_prefix(component)?.strip_prefix(':').map(str::to_owned);
        config.failpoints.iter().find_map(of)
    };
    let function_failpoint =
        ["leaf", "middle", "top"].iter().find_map(|role| Some(format!("{role}:{}", failpoint(role)?)));
    let with = |name: &str, base: Value| {
        let (Value::Object(mut all), more) = (base, &config.settings[name]) else { return Value::Null };
        all.extend(more.as_object().cloned().unwrap_or_default());
        Value::Object(all)
    };
    let spec = |name, peers: &[&'static str], settings, uid| {
        let arguments = log_arguments(config.log, &config.log_level);
        ChildSpec { uid, failpoint: failpoint(name), ..component(name, peers, settings, arguments) }
    };
    let agent = json!({
        "shm_limit": shm_limit,
        "userspace": config.userspace,
        "function_failpoint": function_failpoint,
        "log_level": config.log_level,
        "log": config.log,
    });
    let agent = spec("agent", &["gateway", "coordinator"], with("agent", agent), None);
    let mut settings = json!({});
    if config.jobs.iter().any(|file| file.job.spec.ack_level == AckLevel::Disk) {
        settings["journal_dir"] = json!(journal_dir(&config.state_dir, root)?);
    }
    if let Some((_, folder)) = &config.ingress {
        // Whoever ends it by hand does not wait for load balancers.
        settings["ingress"] = json!({"files": std::path::absolute(folder)?, "lame_duck_ms": 0});
    }
    let gateway_uid = root.then_some(GATEWAY_UID);
    let mut gateway = spec("gateway", &["agent", "coordinator"], with("gateway", settings), gateway_uid);
    let listeners = [("listener", Some(listener)), ("ingress-http", ingress)];
    let deposit =
        |(key, fd): (&str, Option<OwnedFd>)| Some(Deposit { key: key.into(), meta: Value::Null, fds: vec![fd?] });
    gateway.deposits.extend(listeners.into_iter().filter_map(deposit));
    let coordinator = with("coordinator", json!({"jobs": jobs, "shm_limit": shm_limit}));
    Ok(vec![agent, gateway, spec("coordinator", &["agent", "gateway"], coordinator, None)])
}

/// The gateway's own folder for journals.
pub(crate) fn journal_dir(state_dir: &Path, root: bool) -> io::Result<PathBuf> {
    let dir = std::path::absolute(state_dir.join("journal"))?;
    let told = |source: io::Error| {
        io::Error::new(
            source.kind(),
            format!("journal folder {}: {source} (choose another place with --state-dir)", dir.display()),
        )
    };
    fs::create_dir_all(&dir).map_err(told)?;
    if root {
        std::os::unix::fs::chown(&dir, Some(GATEWAY_UID), Some(GATEWAY_UID)).map_err(told)?;
    }
    Ok(dir)
}

/// Memory of this machine, or of the container that this process is in, whichever is less.
pub(crate) fn memory_limit() -> u64 {
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
    });
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limits = limits.iter().filter_map(|path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    limits.chain(total).min().unwrap_or(1 << 30)
}
