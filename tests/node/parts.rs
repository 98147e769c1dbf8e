//! The node: namespaces, the folder that its parts share, and the parts.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use lifl::status;
use lifl_api::pod::{PodSettings, SETTINGS_ANNOTATION};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::{
    api::{self, Patches},
    harness::{Outcome, ensure},
    namespaces::{Node, POD},
    until,
};

/// A node with a pod.
pub(crate) struct World {
    node: Node,
    folder: tempfile::TempDir,
    kubeconfig: PathBuf,
    patches: Patches,
    started: AtomicU32,
}

/// A part of the node: a supervisor, its component, what both log. Killed when dropped.
pub(crate) struct Part {
    process: std::cell::RefCell<Child>,
    component: &'static str,
    admin: SocketAddr,
    log: PathBuf,
}

// === impl World ===

impl World {
    pub(crate) fn new() -> Outcome<Self> {
        let folder = tempfile::tempdir()?;
        // The gateway's user reaches the socket.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let patches = Patches::default();
        let server = api::start(pod(), patches.clone())?;
        let kubeconfig = folder.path().join("kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{server}")}}],
            "users": [{"name": "c", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        });
        fs::write(&kubeconfig, text.to_string())?;
        Ok(Self { node: Node::new()?, folder, kubeconfig, patches, started: AtomicU32::new(0) })
    }

    pub(crate) fn in_pod<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.node.in_pod(work)
    }

    pub(crate) fn in_client<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.node.in_client(work)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lifl"));
        command.arg("--log-level=info").args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        command.arg("--kubeconfig").arg(&self.kubeconfig);
        command
    }

    fn part(&self, component: &'static str, arguments: &[&str]) -> Outcome<Part> {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let log = self.folder.path().join(format!("{component}-{number}.log"));
        let admin = free_port()?;
        let mut command = self.command(arguments);
        command.arg("--admin").arg(admin.to_string());
        if component != "webhook" {
            command.arg("--socket").arg(self.folder.path().join("node.sock"));
        }
        let process = command.stderr(File::create(&log)?).spawn()?;
        Ok(Part { process: process.into(), component, admin, log })
    }

    pub(crate) fn agent(&self) -> Outcome<Part> {
        let netns = self.node.folder().to_string_lossy().into_owned();
        self.part("agent", &["node", "agent", "--node-name=node", "--userspace", "--netns", &netns])
    }

    pub(crate) fn gateway(&self) -> Outcome<Part> {
        self.gateway_with("1s")
    }

    /// One that accepts for so long after SIGTERM.
    pub(crate) fn gateway_with(&self, lame_duck: &str) -> Outcome<Part> {
        let free = ["--clients", "--http", "--https", "--local-http", "--local-https"];
        let arguments: Vec<&str> = free.iter().flat_map(|flag| [*flag, "127.0.0.1:0"]).collect();
        self.part("gateway", &[&["node", "gateway"], &arguments[..], &["--lame-duck", lame_duck]].concat())
    }

    pub(crate) fn webhook(&self) -> Outcome<Part> {
        self.part("webhook", &["webhook", "--listen=127.0.0.1:0"])
    }

    /// The first patch that the API server was sent.
    pub(crate) fn patch(&self) -> Option<Value> {
        self.patches.lock().unwrap_or_else(PoisonError::into_inner).first().cloned()
    }

    /// What a part says that cannot begin.
    pub(crate) fn refused(&self, arguments: &[&str]) -> Outcome<String> {
        let admin = free_port()?.to_string();
        let out = self.command(&[&["node"], arguments, &["--admin", &admin]].concat()).output()?;
        ensure(out.status.code() == Some(1), || format!("{arguments:?}: {}", out.status))?;
        Ok(String::from_utf8_lossy(&out.stderr).into_owned())
    }
}

fn free_port() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

fn pod() -> Value {
    let settings = json!({
        "schema": PodSettings::schema(), "namespace": "n", "configuration": "c", "revision": "r", "servingPort": 8012,
        "protocol": "http1", "userPort": 8080, "containerConcurrency": 0, "timeouts": {"request": 300},
    });
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "pod", "namespace": "n", "uid": "u1", "resourceVersion": "1",
            "annotations": {SETTINGS_ANNOTATION: settings.to_string()},
        },
        "spec": {"containers": [], "nodeName": "node"},
        "status": {"phase": "Running", "podIP": IpAddr::V4(POD).to_string()},
    })
}

// === impl Part ===

impl Part {
    pub(crate) fn admin(&self) -> SocketAddr {
        self.admin
    }

    pub(crate) fn status(&self) -> Outcome<Value> {
        Ok(status::fetch(self.admin).map_err(|error| format!("{error:#}; {}", self.logged()))?)
    }

    pub(crate) fn ready(&self) -> Outcome {
        until(&format!("readiness of the {}", self.component), || {
            self.lives()?;
            Ok(status::fetch(self.admin).is_ok_and(|status| status["ready"] == true))
        })
    }

    /// It answers, and says that it is not ready.
    pub(crate) fn not_ready(&self) -> Outcome {
        until("the end of its readiness", || Ok(self.status()?["ready"] == false))
    }

    /// It has not ended.
    pub(crate) fn lives(&self) -> Outcome {
        let ended = self.process.borrow_mut().try_wait()?;
        ensure(ended.is_none(), || format!("{} ended: {ended:?}: {}", self.component, self.logged()))
    }

    fn logged(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn has_said(&self, text: &str) -> Outcome<bool> {
        Ok(fs::read_to_string(&self.log)?.contains(text))
    }

    pub(crate) fn says(&self, text: &str) -> Outcome {
        until(&format!("'{text}'"), || {
            self.lives()?;
            self.has_said(text)
        })
    }

    fn child(&self) -> Outcome<Pid> {
        let status = self.status()?;
        let pid = status["components"][self.component]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        Ok(pid.and_then(Pid::from_raw).ok_or_else(|| format!("no child: {status}"))?)
    }

    /// Soft and hard limit of open files of the component.
    pub(crate) fn limit_of_child(&self) -> Outcome<(String, String)> {
        let limits = fs::read_to_string(format!("/proc/{}/limits", self.child()?.as_raw_nonzero()))?;
        let line = limits.lines().find(|line| line.starts_with("Max open files")).ok_or("no such limit")?;
        let mut words = line.split_whitespace().skip(3).map(str::to_owned);
        Ok((words.next().unwrap_or_default(), words.next().unwrap_or_default()))
    }

    pub(crate) fn kill_child(&self) -> Outcome {
        Ok(kill_process(self.child()?, Signal::KILL)?)
    }

    /// Supervisor and component, as when their container is gone.
    pub(crate) fn kill_all(self) -> Outcome {
        let child = self.child()?;
        self.process.borrow_mut().kill()?;
        // It may have found out, and ended.
        let _ended_already = kill_process(child, Signal::KILL);
        self.process.borrow_mut().wait()?;
        Ok(())
    }

    pub(crate) fn terminate(&self) -> Outcome {
        let pid = i32::try_from(self.process.borrow().id())?;
        Ok(kill_process(Pid::from_raw(pid).ok_or("a process")?, Signal::TERM)?)
    }

    /// It drains and ends in order.
    pub(crate) fn exits(&self) -> Outcome {
        let mut status = None;
        until("its end", || {
            status = self.process.borrow_mut().try_wait()?;
            Ok(status.is_some())
        })?;
        ensure(status.is_some_and(|status| status.success()), || format!("{status:?}: {}", self.logged()))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let process = self.process.get_mut();
        let _ended_already = process.kill();
        let _reaped_already = process.wait();
    }
}
