//! The platform on one machine: the supervisor and its three components.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    path::PathBuf,
    thread::{self, JoinHandle},
    time::Duration,
};

use lifl_api::job::AckLevel;
use lifl_daemon::{ChildSpec, Deposit, Supervisor, SupervisorError, admin};
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};

use crate::folder::JobFile;

/// User of the gateway where the supervisor is root: parses strangers' bytes, owns nothing.
const GATEWAY_UID: u32 = 65_532;

/// A port in use is tried so many times more, so far apart, before it counts as another's.
const BIND_TRIES: u32 = 5;
const BIND_PAUSE: Duration = Duration::from_millis(100);

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct PlatformConfig {
    /// Where clients reach the gateway.
    pub listen: SocketAddr,
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
}

/// The platform at work. Its components die with this process, whatever ends it.
#[derive(Debug)]
pub struct Platform {
    /// Address of the gateway, really bound.
    pub gateway: SocketAddr,
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
        /// Clients, or admin.
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
        io::ErrorKind::AddrInUse => " (is another lifl running? choose another port with --listen or --admin)",
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
        let bind = |address: SocketAddr, purpose| {
            bind(address).map_err(|source| PlatformError::Bind { address, purpose, source })
        };
        let (gateway, listener) = bind(config.listen, "clients")?;
        let (admin_address, admin_listener) = bind(config.admin, "admin")?;
        let specs = specs(&config, listener.into())?;
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
                Ok(Self { gateway, admin: admin_address, supervisor, stop: Some(stop), ended, thread: Some(thread) })
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
fn bind(address: SocketAddr) -> io::Result<(SocketAddr, TcpListener)> {
    let mut tries = 0;
    let listener = loop {
        match TcpListener::bind(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries < BIND_TRIES => thread::sleep(BIND_PAUSE),
            other => break other?,
        }
        tries += 1;
    };
    listener.set_nonblocking(true)?;
    Ok((listener.local_addr()?, listener))
}

fn supervise(
    specs: Vec<ChildSpec>,
    admin_listener: TcpListener,
    started: oneshot::Sender<Supervisor>,
    stopped: oneshot::Receiver<()>,
) -> Result<(), SupervisorError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let (supervisor, run) = Supervisor::start(specs)?;
        let listener = tokio::net::TcpListener::from_std(admin_listener)?;
        tokio::spawn(admin::serve(listener, supervisor.clone()));
        let _the_platform_waits = started.send(supervisor.clone());
        tokio::pin!(run);
        tokio::select! {
            result = &mut run => return result,
            // Dropped without a word counts as stop.
            _ = stopped => {}
        }
        tokio::select! {
            result = &mut run => result,
            () = supervisor.drain() => Ok(()),
        }
    })
}

fn specs(config: &PlatformConfig, listener: OwnedFd) -> io::Result<Vec<ChildSpec>> {
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
    let spec = |name, peers: &[&'static str], settings, uid| ChildSpec {
        name,
        program: PathBuf::from("/proc/self/exe"),
        args: vec![name.to_owned(), format!("--log-level={}", config.log_level)],
        config: settings,
        peers: peers.to_vec(),
        uid,
        deposits: Vec::new(),
        failpoint: failpoint(name),
    };
    let agent = json!({"shm_limit": shm_limit, "userspace": config.userspace, "function_failpoint": function_failpoint, "log_level": config.log_level});
    let agent = spec("agent", &["gateway", "coordinator"], with("agent", agent), None);
    let journals = match config.jobs.iter().any(|file| file.job.spec.ack_level == AckLevel::Disk) {
        true => json!({"journal_dir": journal_dir(config, root)?}),
        false => json!({}),
    };
    let gateway_uid = root.then_some(GATEWAY_UID);
    let mut gateway = spec("gateway", &["agent", "coordinator"], with("gateway", journals), gateway_uid);
    gateway.deposits.push(Deposit { key: "listener".into(), meta: Value::Null, fds: vec![listener] });
    let coordinator = with("coordinator", json!({"jobs": jobs, "shm_limit": shm_limit}));
    Ok(vec![agent, gateway, spec("coordinator", &["agent", "gateway"], coordinator, None)])
}

/// The gateway's own folder for journals.
fn journal_dir(config: &PlatformConfig, root: bool) -> io::Result<PathBuf> {
    let dir = std::path::absolute(config.state_dir.join("journal"))?;
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
fn memory_limit() -> u64 {
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
    });
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limits = limits.iter().filter_map(|path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    limits.chain(total).min().unwrap_or(1 << 30)
}
