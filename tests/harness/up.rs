//! `lifl up` as a child of the test.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{Outcome, PATIENCE, http::Call, until};

/// How it is started.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    pub(crate) userspace: bool,
    /// Addresses to take again after a restart.
    pub(crate) addresses: Option<(SocketAddr, SocketAddr)>,
    /// `component:name:n`.
    pub(crate) failpoints: Vec<String>,
    pub(crate) more: Vec<String>,
}

/// What it has logged so far.
#[derive(Debug, Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    more: Condvar,
}

/// The platform, serving.
#[derive(Debug)]
pub(crate) struct Up {
    child: Child,
    log: Arc<Log>,
    pub(crate) gateway: SocketAddr,
    pub(crate) admin: SocketAddr,
}

// === impl Log ===

impl Log {
    fn wait_for<T>(&self, what: &str, find: impl Fn(&str) -> Option<T>) -> Outcome<T> {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = lines.0.iter().find_map(|line| find(line)) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if lines.1 || left.is_zero() {
                return Err(format!("no {what} in the log:\n{}", lines.0.join("\n")).into());
            }
            (lines, _) = self.more.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn push(&self, line: Option<String>) {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        match line {
            Some(line) => lines.0.push(line),
            None => lines.1 = true,
        }
        self.more.notify_all();
    }
}

/// A command of the binary under test, nothing of it on this terminal.
pub(crate) fn lifl(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lifl"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Ends a process at once.
pub(crate) fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ended_already = kill_process(pid, Signal::KILL);
    }
}

// === impl Up ===

impl Up {
    /// Starts it and waits until it is ready.
    pub(crate) fn start(dir: &Path, options: &Options) -> Outcome<Self> {
        let free = SocketAddr::from(([127, 0, 0, 1], 0));
        let (listen, admin) = options.addresses.unwrap_or((free, free));
        let mut command = lifl(&["up"]);
        command.arg(dir).arg("--state-dir").arg(dir.join("state")).args([
            "--listen",
            &listen.to_string(),
            "--admin",
            &admin.to_string(),
        ]);
        if !options.more.iter().any(|word| word == "--shm-limit") {
            command.args(["--shm-limit", "64Mi"]);
        }
        if options.userspace {
            command.arg("--userspace");
        }
        for point in &options.failpoints {
            command.args(["--failpoint", point]);
        }
        let mut child = command.args(&options.more).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let log = Arc::new(Log::default());
        let said = child.stderr.take().ok_or("standard error")?;
        let to = log.clone();
        std::thread::spawn(move || {
            BufReader::new(said).lines().map_while(Result::ok).for_each(|line| to.push(Some(line)));
            to.push(None);
        });
        let mut up = Self { child, log, gateway: listen, admin };
        (up.gateway, up.admin) = up.log.wait_for("line 'ready gateway=.. admin=..'", |line| {
            let word = |name: &str| line.split(name).nth(1)?.split(' ').next()?.parse().ok();
            if line.contains(" ready ") { word("gateway=").zip(word("admin=")) } else { None }
        })?;
        Ok(up)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// The status document.
    pub(crate) fn status(&self) -> Option<Value> {
        let answer = Call::get("/status").to(self.admin, Duration::from_secs(10)).ok()?;
        (answer.status == 200).then(|| answer.json())
    }

    /// Process of a component, or of a function in a role.
    pub(crate) fn process(&self, name: &str) -> Option<i32> {
        let components = &self.status()?["components"];
        let pid = match name {
            "agent" | "gateway" | "coordinator" => components[name]["pid"].as_i64(),
            role => {
                let number = match role {
                    "top" => 1,
                    "middle" => 2,
                    _ => 16,
                };
                let chains = components["agent"]["status"]["chains"].as_array()?;
                let mut members = chains.iter().filter_map(|chain| chain["members"].as_array()).flatten();
                members.find(|member| member["role"] == number)?["pid"].as_i64()
            }
        };
        i32::try_from(pid?).ok()
    }

    /// The status of a job.
    pub(crate) fn job(&self, name: &str) -> Option<Value> {
        let status = self.status()?;
        let jobs = status["components"]["coordinator"]["status"]["jobs"].as_array()?;
        let job = jobs.iter().find(|entry| entry["job"]["metadata"]["name"] == name)?;
        Some(job["job"]["status"].clone())
    }

    /// All it has logged.
    pub(crate) fn log(&self) -> String {
        self.log.lines.lock().unwrap_or_else(PoisonError::into_inner).0.join("\n")
    }

    /// Waits for a line that holds all of `words`.
    pub(crate) fn wait_log(&self, words: &[&str]) -> Outcome<String> {
        let all = |line: &str| words.iter().all(|word| line.contains(word)).then(|| line.to_owned());
        self.log.wait_for(&format!("line with {words:?}"), all)
    }

    /// `kill -9` on the supervisor.
    pub(crate) fn kill(&mut self) -> Outcome {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, without waiting.
    pub(crate) fn terminate(&self) {
        if let Some(pid) = Pid::from_raw(self.pid()) {
            let _ended_already = kill_process(pid, Signal::TERM);
        }
    }

    /// Waits for its end.
    pub(crate) fn ended(&mut self) -> Outcome<ExitStatus> {
        until("the end of lifl", || self.child.try_wait().ok().flatten())
    }

    /// SIGTERM; it must end in order.
    pub(crate) fn end(&mut self) -> Outcome {
        self.terminate();
        let status = self.ended()?;
        super::ensure(status.success(), || format!("lifl ended with {status}:\n{}", self.log()))
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ended_already = self.child.kill();
            let _reaped = self.child.wait();
        }
    }
}
