//! The cluster of these tests: started when the first test wants it.

use std::{
    fs::File,
    io::Write as _,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::harness::{Outcome, ensure, until};

/// Its name: it is beside a cluster that a human has up.
pub(crate) const NAME: &str = "lifl-test";
const NODES: &str = "2";
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/cluster/cluster");

/// The cluster, while it is up.
#[derive(Debug)]
pub(crate) struct Cluster(());

/// Its folder, as its script names it.
pub(crate) fn folder() -> PathBuf {
    Path::new("/var/tmp").join(format!("{NAME}-cluster"))
}

/// What the manifests of the house are.
pub(crate) fn manifests() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests")).to_owned()
}

/// The pid that holds all of it.
pub(crate) fn pid() -> Outcome<i32> {
    Ok(std::fs::read_to_string(folder().join("pid"))?.trim().parse()?)
}

/// Why there can be no cluster here, if so.
pub(crate) fn missing() -> Option<String> {
    match script(&["check"], "") {
        Ok(_nothing) => None,
        Err(why) => Some(why.message().unwrap_or("no cluster here").lines().collect::<Vec<_>>().join("; ")),
    }
}

/// The cluster, started now if it is not yet; this thread and those that it starts stand beside its nodes from now on.
pub(crate) fn cluster() -> Outcome<Cluster> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let started = STARTED.get_or_init(|| {
        let up = || -> Outcome {
            script(&["down"], "")?;
            script(&["up", "--nodes", NODES], "")?;
            let probe = script(&["run", "sh", "-c", "command -v probe"], "")?;
            image("probe", probe.trim())
        };
        up().map_err(|why| why.message().unwrap_or_default().to_owned())
    });
    started.clone()?;
    let network = File::open(format!("/proc/{}/ns/net", pid()?))?;
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(Cluster(()))
}

/// Ends it, if it is up.
pub(crate) fn down() {
    if let Err(why) = script(&["down"], "") {
        eprintln!("{}", why.message().unwrap_or_default());
    }
}

fn image(name: &str, from: &str) -> Outcome {
    script(&["image", name, from], "").map(drop)
}

/// Runs the script, and returns what it prints.
fn script(arguments: &[&str], input: &str) -> Outcome<String> {
    let mut command = Command::new(SCRIPT);
    command.args(arguments).env("LIFL_CLUSTER", NAME);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // It may end without reading.
    drop(child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes())));
    let output = child.wait_with_output()?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure(output.status.success(), || format!("{printed}{}", String::from_utf8_lossy(&output.stderr)))?;
    Ok(printed)
}

// === impl Cluster ===

impl Cluster {
    /// `kubectl` with these arguments, separated by blanks.
    pub(crate) fn kubectl(&self, arguments: &str) -> Outcome<String> {
        let arguments: Vec<&str> = ["run", "kubectl"].into_iter().chain(arguments.split_whitespace()).collect();
        script(&arguments, "")
    }

    /// Loads a program as image `dev.local/NAME:1`, with what it is linked to.
    pub(crate) fn load(&self, name: &str, program: &Path) -> Outcome {
        image(name, &program.to_string_lossy())
    }

    /// Loads this very program as image `dev.local/cluster-test:1`.
    pub(crate) fn test_program(&self) -> Outcome {
        static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
        let load = || self.load("cluster-test", &std::env::current_exe()?);
        let said = |why: libtest_mimic::Failed| why.message().unwrap_or_default().to_owned();
        Ok(LOADED.get_or_init(|| load().map_err(said)).clone()?)
    }

    /// Applies a manifest.
    pub(crate) fn apply(&self, manifest: &str) -> Outcome {
        script(&["run", "kubectl", "apply", "-f", "-"], manifest).map(drop)
    }

    /// Makes a namespace of its own for a test.
    pub(crate) fn namespace(&self, name: &str) -> Outcome {
        self.kubectl(&format!("create namespace {name}"))?;
        // Pods are refused before this account is there.
        until("the namespace's account", || self.kubectl(&format!("-n {name} get serviceaccount default")).ok())
            .map(drop)
    }

    /// Waits until a command's output is accepted.
    pub(crate) fn kubectl_until(&self, arguments: &str, accept: impl Fn(&str) -> bool) -> Outcome<String> {
        let mut last = String::new();
        let found = until(arguments, || {
            last = match self.kubectl(arguments) {
                Ok(printed) if accept(&printed) => return Some(printed),
                Ok(printed) => printed,
                Err(why) => why.message().unwrap_or_default().to_owned(),
            };
            None
        });
        found.map_err(|late| format!("{}; last: {last}", late.message().unwrap_or_default()).into())
    }

    /// Where the API server's credentials are.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        folder().join("kubeconfig")
    }
}
