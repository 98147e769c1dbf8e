//! `lifl demo`: a real model learns to read digits, over eBPF and over the router in user space.

#[expect(dead_code, reason = "of the harness only a part is needed here")]
mod harness;

use std::{fs, process::Stdio};

use harness::{Outcome, ensure, no_ebpf, up::lifl};
use libtest_mimic::{Arguments, Trial};
use serde_json::Value;

/// What other programs read in `--json`.
const KEYS: [&str; 15] = [
    "schema",
    "succeeded",
    "accuracy",
    "goal",
    "rounds",
    "seconds",
    "cpu_seconds",
    "path",
    "descriptors",
    "updates_accepted",
    "updates_committed",
    "shm_peak_bytes",
    "failure",
    "measured",
    "history",
];

fn main() {
    let mut arguments = Arguments::from_args();
    // Each takes all processors.
    arguments.test_threads.get_or_insert(1);
    let trials = [("ebpf", no_ebpf()), ("userspace", None)].map(|(path, ignored)| {
        let why = ignored.map(|why| format!(" ({why})")).unwrap_or_default();
        Trial::test(format!("{path}::reaches_its_goal{why}"), move || demo(path)).with_ignored_flag(ignored.is_some())
    });
    libtest_mimic::run(&arguments, trials.into()).exit();
}

fn demo(path: &str) -> Outcome {
    let dir = tempfile::tempdir()?;
    let json = dir.path().join("run.json");
    let mut command = lifl(&["demo", "--json"]);
    command.arg(&json).stdout(Stdio::piped());
    if path == "userspace" {
        command.arg("--userspace");
    }
    let output = command.output()?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure(output.status.success(), || format!("{}: {said}", output.status))?;
    let run: Value = serde_json::from_slice(&fs::read(json)?)?;
    for key in KEYS {
        ensure(run.get(key).is_some(), || format!("{key} is missing: {run}"))?;
    }
    ensure(run["schema"] == "lifl.dev/demo/v1" && run["succeeded"] == true, || run.to_string())?;
    ensure(run["path"] == path, || format!("path {}", run["path"]))?;
    ensure(run["updates_accepted"] == run["updates_committed"] && run["updates_accepted"] != 0, || run.to_string())?;
    ensure(run["accuracy"].as_f64() >= run["goal"].as_f64(), || run.to_string())?;
    let history = run["history"].as_array().ok_or("no history")?;
    ensure(run["rounds"] == history.len(), || run.to_string())
}
