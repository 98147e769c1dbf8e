//! Debian's nginx and haproxy, Knative's queue-proxy, and the nginx that they all ask.
//!
//! All have as many workers as there are processors, connections to the upstream that are kept, no log of requests, and no
//! bound on what one connection may ask.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, bail};
use serde_json::json;

use super::contestant::{Contestant, free, installed};

/// What the upstream answers.
pub(super) const HELLO: &str = "hello, world\n";

/// Where opponents have their configurations; one folder per bench.
#[derive(Debug)]
pub(super) struct Opponents {
    folder: PathBuf,
    workers: usize,
    queue_proxy: Option<PathBuf>,
}

/// The nginx that answers small GETs, and where it tells how many it has answered.
#[derive(Debug)]
pub(super) struct Upstream {
    pub(super) server: Contestant,
    pub(super) status: SocketAddr,
}

// === impl Opponents ===

impl Opponents {
    pub(super) fn new(folder: &Path, knative: Option<&Path>) -> anyhow::Result<Self> {
        for program in ["nginx", "haproxy", "wrk", "h2load"] {
            installed(program)?;
        }
        let found =
            |folder: &Path| ["queue", "queue-proxy"].map(|name| folder.join(name)).into_iter().find(|p| p.is_file());
        let queue_proxy = match knative {
            Some(folder) => Some(found(folder).with_context(|| format!("no queue-proxy in {}", folder.display()))?),
            None => None,
        };
        Ok(Self { folder: folder.to_owned(), workers: thread::available_parallelism()?.get(), queue_proxy })
    }

    pub(super) const fn workers(&self) -> usize {
        self.workers
    }

    /// One worker that answers at once.
    pub(super) fn upstream(&self) -> anyhow::Result<Upstream> {
        let (at, status) = (free()?, free()?);
        let servers = format!(
            "server {{ listen {at} backlog=4096; location / {{ default_type text/plain; return 200 \"{}\"; }} }}
             server {{ listen {status}; location / {{ stub_status; }} }}",
            HELLO.escape_default()
        );
        Ok(Upstream { server: self.nginx("upstream", at, 1, &servers)?, status })
    }

    /// nginx as a proxy of HTTP/1.1.
    pub(super) fn nginx_http1(&self, to: SocketAddr) -> anyhow::Result<Contestant> {
        let at = free()?;
        let servers = format!(
            "upstream app {{ server {to}; keepalive 512; keepalive_requests 1000000000; keepalive_timeout 600s; }}
             server {{ listen {at} backlog=4096; location / {{
                proxy_pass http://app; proxy_http_version 1.1; proxy_request_buffering off;
                proxy_set_header Connection \"\"; proxy_set_header Host $host;
                proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; }} }}"
        );
        self.nginx("nginx", at, self.workers, &servers)
    }

    /// nginx as a proxy of gRPC.
    pub(super) fn nginx_grpc(&self, to: SocketAddr) -> anyhow::Result<Contestant> {
        let at = free()?;
        let servers = format!(
            "upstream app {{ server {to}; keepalive 512; keepalive_requests 1000000000; keepalive_timeout 600s; }}
             server {{ listen {at} http2 backlog=4096; http2_max_concurrent_streams 250; location / {{
                grpc_pass grpc://app; grpc_set_header X-Forwarded-For $proxy_add_x_forwarded_for; }} }}"
        );
        self.nginx("nginx", at, self.workers, &servers)
    }

    /// haproxy; `proto` is empty, or `proto h2` for HTTP/2 by prior knowledge on both sides.
    pub(super) fn haproxy(&self, to: SocketAddr, proto: &str) -> anyhow::Result<Contestant> {
        let (at, workers) = (free()?, self.workers);
        let file = self.folder.join(format!("haproxy-{}.cfg", at.port()));
        let text = format!(
            "global\n  nbthread {workers}\n  maxconn 4096\ndefaults\n  mode http\n  option forwardfor\n  http-reuse always\n  \
             timeout connect 10s\n  timeout client 300s\n  timeout server 300s\nfrontend in\n  bind {at} {proto}\n  \
             default_backend app\nbackend app\n  server app {to} {proto}\n"
        );
        fs::write(&file, text)?;
        Contestant::start("haproxy", at, Command::new("haproxy").args(["-db", "-q", "-f"]).arg(&file))
    }

    /// Knative's queue-proxy, if its binary was given: with the environment that Knative's controller renders.
    pub(super) fn queue_proxy(&self, to: SocketAddr) -> anyhow::Result<Option<Contestant>> {
        let Some(binary) = &self.queue_proxy else { return Ok(None) };
        let at = free()?;
        let probe = json!({"tcpSocket": {"port": to.port(), "host": "127.0.0.1"}, "successThreshold": 1});
        let log = self.folder.join("queue-proxy.log");
        let said = fs::File::create(&log)?;
        let mut command = Command::new(binary);
        command.env_clear().stdout(said.try_clone()?).stderr(said);
        let names = ["SERVICE", "CONFIGURATION", "REVISION", "NAMESPACE", "POD"];
        command.envs(names.map(|name| (format!("SERVING_{name}"), "bench")));
        command.envs([
            ("QUEUE_SERVING_PORT", at.port().to_string()),
            ("QUEUE_SERVING_TLS_PORT", free()?.port().to_string()),
            ("USER_PORT", to.port().to_string()),
            ("SERVING_READINESS_PROBE", probe.to_string()),
        ]);
        command.envs([
            ("CONTAINER_CONCURRENCY", "0"),
            ("REVISION_TIMEOUT_SECONDS", "300"),
            ("REVISION_RESPONSE_START_TIMEOUT_SECONDS", "0"),
            ("REVISION_IDLE_TIMEOUT_SECONDS", "0"),
            ("SERVING_POD_IP", "127.0.0.1"),
            ("HOST_IP", "127.0.0.1"),
            ("SERVING_LOGGING_CONFIG", ""),
            ("SERVING_LOGGING_LEVEL", "error"),
            ("SYSTEM_NAMESPACE", "knative-serving"),
            ("METRICS_DOMAIN", "knative.dev/internal/serving"),
            ("METRICS_COLLECTOR_ADDRESS", ""),
            ("OBSERVABILITY_CONFIG", "{}"),
            ("ENABLE_HTTP2_AUTO_DETECTION", "false"),
            ("ENABLE_HTTP_FULL_DUPLEX", "false"),
            ("ENABLE_MULTI_CONTAINER_PROBES", "false"),
            ("ENABLE_PROFILING", "false"),
            ("ROOT_CA", ""),
        ]);
        match Contestant::start("queue-proxy", at, &mut command) {
            Ok(started) => Ok(Some(started)),
            Err(error) => bail!("{error:#}: {}", fs::read_to_string(&log).unwrap_or_default()),
        }
    }

    fn nginx(&self, name: &'static str, at: SocketAddr, workers: usize, servers: &str) -> anyhow::Result<Contestant> {
        let folder = self.folder.join(format!("nginx-{}", at.port()));
        fs::create_dir_all(&folder)?;
        let temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
        let temp: String = temp.iter().map(|of| format!("{of}_temp_path {}/{of};\n", folder.display())).collect();
        let text = format!(
            "worker_processes {workers};\ndaemon off;\npid {0}/pid;\nerror_log {0}/error.log;\n\
             events {{ worker_connections 8192; }}\nhttp {{ access_log off; keepalive_requests 1000000000;\n\
             keepalive_timeout 600s; client_max_body_size 0;\n{temp}{servers} }}\n",
            folder.display()
        );
        let file = folder.join("nginx.conf");
        fs::write(&file, text)?;
        let mut command = Command::new("nginx");
        command.arg("-e").arg(folder.join("error.log")).arg("-c").arg(&file).stderr(Stdio::null());
        let started = Contestant::start(name, at, &mut command);
        started.with_context(|| fs::read_to_string(folder.join("error.log")).unwrap_or_default())
    }
}

// === impl Upstream ===

impl Upstream {
    /// Requests answered so far, those for this number included.
    pub(super) fn answered(&self) -> anyhow::Result<u64> {
        let text = super::load::get(self.status)?;
        // Three numbers below "server accepts handled requests".
        let numbers = text.lines().nth(2).context("unknown form of stub_status")?;
        Ok(numbers.split_whitespace().nth(2).context("unknown form of stub_status")?.parse()?)
    }
}
