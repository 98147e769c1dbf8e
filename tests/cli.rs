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
    says(&["plan"], 2, &["<FILE>"])?;
    for args in [&["--help"][..], &["--version"], &["up", "--help"], &["demo", "--help"], &["plan", "--help"]] {
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

/// A job of 20 clients and a place for more files.
fn to_plan(clients: u32) -> Outcome<(tempfile::TempDir, String)> {
    let dir = tempfile::tempdir()?;
    Job::new(dir.path(), "digits", 1, clients).write(dir.path())?;
    let file = dir.path().join("digits.yaml").to_str().ok_or("path")?.to_owned();
    Ok((dir, file))
}

#[test]
fn a_plan_is_for_people_and_for_programs() -> Outcome {
    let (dir, file) = to_plan(30)?;
    let nodes = dir.path().join("nodes.yaml");
    fs::write(
        &nodes,
        "nodes:\n- {name: n2, capacity: 20, arrivals: 10, execution: 500ms}\n- {name: n3, capacity: 20}\n",
    )?;
    let args = ["plan", &file, "--node", "n1=20,memory=1Gi", "--nodes", nodes.to_str().ok_or("path")?];
    let (code, table, said) = run(&args)?;
    // n2 has room for 15 and is the fullest; the rest goes to the first of the others.
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().take(5).collect()).collect();
    let has = |row: [&str; 5]| rows.iter().any(|found| *found == row);
    ensure(code == 0 && has(["n1", "15", "8", "yes", "yes"]) && has(["n2", "15", "8", "yes", "-"]), || {
        table.clone() + &said
    })?;
    ensure(table.contains("2 of 3 nodes: 16 leaves") && table.contains("not needed: n3"), || table)?;
    let (_, json, _) = run(&[&args[..], &["-o", "json"]].concat())?;
    let plan: lifl_api::plan::Plan = serde_json::from_str(&json)?;
    ensure(plan.schema == "lifl.dev/plan/v1" && plan.leaves() == 16 && plan.nodes["n2"].clients == 15, || json)?;
    let (_, yaml, _) = run(&[&args[..], &["-o", "yaml", "--policy", "BestFit"]].concat())?;
    ensure(serde_yaml_ng::from_str::<lifl_api::plan::Plan>(&yaml)? == plan, || yaml)?;
    let (code, local, _) = run(&["plan", &file])?;
    ensure(code == 0 && local.contains("local") && local.contains("1 of 1 node"), || local)
}

#[test]
fn a_plan_is_compared_with_an_older_one() -> Outcome {
    let (dir, file) = to_plan(20)?;
    let older = dir.path().join("older.json");
    let nodes = ["plan", &file, "--node", "n1=20", "--node", "n2=20"];
    fs::write(&older, run(&[&nodes[..], &["-o", "json"]].concat())?.1)?;
    let against = ["--diff", older.to_str().ok_or("path")?];
    let (code, same, _) = run(&[&nodes[..], &against].concat())?;
    ensure(code == 0 && same == "no difference\n", || format!("{code}: {same}"))?;
    let wide = [&nodes[..], &against, &["--policy", "worstfit"]].concat();
    let (code, text, _) = run(&wide)?;
    ensure(code == 3 && text.contains("~ job: policy BestFit -> WorstFit"), || format!("{code}: {text}"))?;
    ensure(text.contains("~ n2: clients 0 -> 10"), || text)?;
    let (code, json, _) = run(&[&wide[..], &["-o", "json"]].concat())?;
    let diff: serde_json::Value = serde_json::from_str(&json)?;
    let first = serde_json::json!({"path": "/nodes/n1/clients", "before": 20, "after": 10});
    ensure(code == 3 && diff["schema"] == "lifl.dev/plan-diff/v1" && diff["changes"][0] == first, || json)?;
    says(&["plan", &file, "--diff", "/does/not/exist"], 1, &["--diff /does/not/exist"])?;
    says(&["plan", &file, "--diff", &file], 1, &["--diff", "is not a plan", "-o json"])
}

#[test]
fn what_cannot_be_planned_is_named_with_its_value() -> Outcome {
    let (dir, file) = to_plan(50)?;
    let other = |name: &str, text: &str| -> Outcome<String> {
        let path = dir.path().join(name);
        fs::write(&path, text)?;
        Ok(path.to_str().ok_or("path")?.to_owned())
    };
    let two = ["--node", "n1=20", "--node", "n2=20"];
    says(
        &[&["plan", &file][..], &two].concat(),
        1,
        &["50 clients", "room for 40", "2 nodes", "capacity", "clientsPerRound"],
    )?;
    says(&["plan", &file, "--node", "n1=99", "--node", "n1=99"], 1, &["n1", "twice"])?;
    says(&["plan", &file, "--node", "n1=0"], 1, &["n1", "capacity of 0", "at least 1"])?;
    says(&["plan", &file, "--node", "n1=99,memory=20k"], 1, &["update of 4000 bytes", "n1", "20000", "memory"])?;
    says(&["plan", &file, "--node", "n1"], 2, &["n1", "no capacity", "n1=20"])?;
    says(&["plan", &file, "--policy", "tightfit"], 2, &["'tightfit'", "bestfit", "roundrobin"])?;
    let nodes = other("nodes.yaml", "nodes:\n- {name: n7}\n")?;
    says(&["plan", &file, "--nodes", &nodes], 1, &["n7", "no capacity"])?;
    let nodes = other("nodes.yaml", "nodes:\n- {name: n7, capacity: 20, disk: 5}\n")?;
    says(&["plan", &file, "--nodes", &nodes], 1, &["nodes.yaml", "disk", "line 2"])?;
    says(&["plan", "/does/not/exist.yaml"], 1, &["/does/not/exist.yaml"])?;
    let text = fs::read_to_string(&file)?;
    let several = other("several.yaml", &format!("{text}---\n{}", text.replace("name: digits,", "name: letters,")))?;
    says(&["plan", &several], 1, &["digits, letters", "--job"])?;
    says(&["plan", &several, "--job", "words"], 1, &["words", "digits, letters"])?;
    let (code, out, _) = run(&["plan", &several, "--job", "letters"])?;
    ensure(code == 0 && out.starts_with("default/letters"), || out)?;
    let broken = other("broken.yaml", &text.replace("clientsPerRound: 50", "clientsPerRound: 0"))?;
    says(&["plan", &broken], 1, &["broken.yaml:1", "clientsPerRound", "0"])?;
    fs::write(dir.path().join("digits.safetensors"), b"no model")?;
    says(&["plan", &file], 1, &["digits.safetensors", "digits"])
}
