//! The command line as its users meet it: messages that say what to do, and exit codes.

#[expect(dead_code, reason = "of the harness only a part is needed here")]
mod harness;

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::Path,
    process::Stdio,
};

use harness::{
    Outcome, ensure,
    job::Job,
    no_ebpf,
    up::{Options, Up, lifl},
};

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Runs to its end; exit code, standard output, standard error.
fn run(args: &[&str]) -> Outcome<(i32, String, String)> {
    let output = lifl(args).stdout(Stdio::piped()).stderr(Stdio::piped()).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code().ok_or("ended by a signal")?, text(&output.stdout), text(&output.stderr)))
}

/// It must end with the code, and say all of the words on standard error.
fn says(args: &[&str], code: i32, words: &[&str]) -> Outcome {
    let (got, _, said) = run(args)?;
    ensure(got == code, || format!("{args:?} ended with {got}, not {code}: {said}"))?;
    ensure(words.iter().all(|word| said.contains(word)), || format!("{args:?} said, of {words:?}: {said}"))
}

fn folder(job: &Job, dir: &Path) -> Outcome<String> {
    job.write(dir)?;
    Ok(dir.to_str().ok_or("path")?.to_owned())
}

#[test]
fn usage_is_2_and_help_is_0() -> Outcome {
    says(&["nonsense"], 2, &["nonsense", "Usage"])?;
    says(&["up"], 2, &["<DIR>"])?;
    says(&["up", "/tmp", "--listen", "nowhere"], 2, &["--listen", "nowhere"])?;
    says(&["demo", "--rounds", "0"], 2, &["--rounds", "0"])?;
    for args in [&["--help"][..], &["--version"], &["up", "--help"], &["demo", "--help"]] {
        let (code, out, _) = run(args)?;
        ensure(code == 0 && out.contains("lifl"), || format!("{args:?}: {code} {out}"))?;
    }
    Ok(())
}

#[test]
fn a_manifest_that_cannot_be_read_is_named_with_its_line() -> Outcome {
    let dir = tempfile::tempdir()?;
    let job = Job::new(dir.path(), "good", 1, 1);
    let path = folder(&job, dir.path())?;
    let text = fs::read_to_string(dir.path().join("good.yaml"))?;
    fs::write(dir.path().join("bad.yaml"), format!("{text}---\n{}", text.replace("rounds: 1", "rounds: many")))?;
    fs::write(dir.path().join("torn.yaml"), "a: [\n")?;
    says(&["up", &path], 1, &["bad.yaml:6", "spec.rounds", "torn.yaml:1"])?;
    says(&["up", "/does/not/exist"], 1, &["/does/not/exist"])
}

#[test]
fn a_folder_without_jobs_is_no_platform() -> Outcome {
    let dir = tempfile::tempdir()?;
    says(&["up", dir.path().to_str().ok_or("path")?], 1, &["no FederatedJob", ".yaml"])
}

#[test]
fn a_port_in_use_is_named_with_what_to_do() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = folder(&Job::new(dir.path(), "job", 1, 1), dir.path())?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let free = "127.0.0.1:0";
    says(&["up", &path, "--listen", &address, "--admin", free], 1, &[&address, "clients", "--listen"])?;
    says(&["up", &path, "--listen", free, "--admin", &address], 1, &[&address, "admin", "--admin"])
}

#[test]
fn a_demo_that_cannot_succeed_says_so_at_once() -> Outcome {
    says(&["demo", "--plot", "/does/not/exist.svg"], 1, &["--plot", "/does/not/exist.svg"])?;
    let free = ["demo", "--userspace", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--shm-limit", "1"];
    says(&free, 1, &["bytes of shared memory", "--shm-limit"])
}

#[test]
fn strangers_are_not_let_in_by_default() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = folder(&Job::new(dir.path(), "open", 1, 1), dir.path())?;
    says(&["up", &path, "--listen", "0.0.0.0:0", "--admin", "127.0.0.1:0"], 1, &["loopback", "open", "--insecure"])?;
    let secret = dir.path().join("secret");
    fs::write(&secret, "\n")?;
    says(&["up", &path, "--join-token-file", secret.to_str().ok_or("path")?], 1, &["--join-token-file", "empty"])
}

#[test]
fn components_are_not_started_by_hand() -> Outcome {
    for component in ["agent", "gateway", "coordinator", "aggregator"] {
        let (code, _, said) = run(&[component])?;
        ensure(code == 1 && said.contains("started by"), || format!("{component}: {code} {said}"))?;
    }
    Ok(())
}

#[test]
fn the_crd_is_the_one_in_the_repository() -> Outcome {
    let (code, crd, _) = run(&["crd"])?;
    let kept = fs::read_to_string(root().join("manifests/federatedjob.yaml"))?;
    ensure(code == 0 && crd == kept, || "run `lifl crd > manifests/federatedjob.yaml`".to_owned())
}

#[test]
fn the_examples_can_be_served() -> Outcome {
    let jobs = lifl::folder::read(&root().join("manifests/examples"), false)?;
    ensure(!jobs.is_empty(), || "no example".to_owned())?;
    for file in jobs {
        file.job.spec.validate()?;
    }
    Ok(())
}

#[test]
fn status_is_for_people_and_for_programs() -> Outcome {
    says(&["status", "--admin", "127.0.0.1:1"], 1, &["127.0.0.1:1", "lifl up"])?;
    let dir = tempfile::tempdir()?;
    Job::new(dir.path(), "shown", 3, 2).write(dir.path())?;
    let mut up = Up::start(dir.path(), &Options { userspace: no_ebpf().is_some(), ..Options::default() })?;
    let admin = up.admin.to_string();
    harness::until("the job", || up.job("shown"))?;
    let (code, table, _) = run(&["status", "--admin", &admin])?;
    ensure(code == 0 && table.contains("default/shown") && table.contains("PHASE"), || table)?;
    let (code, json, _) = run(&["status", "--admin", &admin, "-o", "json"])?;
    let status: serde_json::Value = serde_json::from_str(&json)?;
    ensure(code == 0 && status["schema"] == "lifl.dev/status/v1" && status["ready"] == true, || json)?;
    says(&["status", "--admin", &up.gateway.to_string()], 1, &["is not the admin port"])?;
    up.end()
}

#[test]
fn components_log_as_they_are_told() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = folder(&Job::new(dir.path(), "logged", 3, 2), dir.path())?;
    let state = dir.path().join("state").to_string_lossy().into_owned();
    let free = "127.0.0.1:0";
    let args = ["--log=json", "up", &path, "--userspace", "--listen", free, "--admin", free, "--state-dir", &state];
    let mut child = lifl(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let pid = rustix::process::Pid::from_child(&child);
    let mut said = Vec::new();
    for line in BufReader::new(child.stderr.take().ok_or("standard error")?).lines() {
        let line: serde_json::Value = line.map(|line| serde_json::from_str(&line).map_err(|_text| line))??;
        if line["message"] == "ready" {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        said.push(line);
    }
    let ended = child.wait()?;
    let by = |target: &str| said.iter().any(|line| line["target"].as_str().is_some_and(|of| of.starts_with(target)));
    let all = ["lifl::", "lifl_agent", "lifl_gateway", "lifl_coordinator"].into_iter().all(by);
    ensure(ended.success() && all, || format!("{ended}: {said:#?}"))
}
