//! `lifl demo`: a real model learns to read digits, over eBPF and over the router in user space.

#[expect(dead_code, reason = "of the harness only a part is needed here")]
mod harness;

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::{Command, Stdio},
};

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
    let is_root = rustix::process::geteuid().is_root();
    let mut trials: Vec<Trial> = [("ebpf", no_ebpf()), ("userspace", None)]
        .into_iter()
        .map(|(path, ignored)| {
            let why = ignored.map(|why| format!(" ({why})")).unwrap_or_default();
            let run =
                move || demo(path, lifl(if path == "ebpf" { &["demo"] } else { &["demo", "--userspace"] })).map(drop);
            Trial::test(format!("{path}::reaches_its_goal{why}"), run).with_ignored_flag(ignored.is_some())
        })
        .collect();
    let why = if is_root { "" } else { " (the other trials ran as one)" };
    let ordinary = Trial::test(format!("ordinary_user::reaches_its_goal_and_hears_of_ebpf{why}"), ordinary_user);
    trials.push(ordinary.with_ignored_flag(!is_root));
    libtest_mimic::run(&arguments, trials).exit();
}

/// Without privileges all of it works over the router, and the demo says what root would see.
fn ordinary_user() -> Outcome {
    const NOBODY: u32 = 65534;
    let dir = tempfile::tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    // Where the binary was built may be closed to others.
    let program = dir.path().join("lifl");
    fs::copy(env!("CARGO_BIN_EXE_lifl"), &program)?;
    let mut command = Command::new(program);
    command.arg("demo").stdin(Stdio::null()).env("TMPDIR", "/tmp").uid(NOBODY).gid(NOBODY);
    let said = demo("userspace", command)?;
    ensure(said.contains("as root"), || said)
}

/// Runs it to its end; what it said.
fn demo(path: &str, mut command: Command) -> Outcome<String> {
    let dir = tempfile::tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777))?;
    let json = dir.path().join("run.json");
    let output = command.arg("--json").arg(&json).stdout(Stdio::piped()).stderr(Stdio::piped()).output()?;
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
    ensure(run["rounds"] == history.len(), || run.to_string())?;
    Ok(said)
}
