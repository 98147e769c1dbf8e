//! The Python clients against this platform: their own live tests, nothing mocked.

#[expect(dead_code, reason = "of the harness only a part is needed here")]
mod harness;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use harness::{
    Outcome, ensure, no_ebpf,
    up::{Options, Up},
};
use libtest_mimic::{Arguments, Trial};

/// What their tests import.
const MODULES: &str = "import cloudevents, httpx, numpy, pytest, safetensors";

fn main() {
    let arguments = Arguments::from_args();
    let python = std::env::var("LIFL_PYTHON").unwrap_or_else(|_unset| "python3".into());
    let tried = Command::new(&python).args(["-c", MODULES]).stdin(Stdio::null()).output();
    let missing = match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => String::from_utf8_lossy(&output.stderr).lines().last().map(str::to_owned),
        Err(error) => Some(error.to_string()),
    };
    let why = missing.as_ref().map(|why| format!(" (LIFL_PYTHON={python}: {why})")).unwrap_or_default();
    let trial = Trial::test(format!("live_tests_pass{why}"), move || live(&python));
    libtest_mimic::run(&arguments, vec![trial.with_ignored_flag(missing.is_some())]).exit();
}

fn run(command: &mut Command) -> Outcome<String> {
    let output = command.stdin(Stdio::null()).output()?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure(output.status.success(), || format!("{command:?}: {}\n{said}", output.status))?;
    Ok(said)
}

fn job(dir: &Path, name: &str, model: &str, rounds: u32, clients: u32) -> Outcome {
    let at = dir.display();
    let text = format!(
        "apiVersion: fl.lifl.dev/v1alpha1\nkind: FederatedJob\nmetadata: {{name: {name}}}\nspec: {{model: {{name: {name}, initial: \
         {{uri: 'file://{at}/{model}.safetensors'}}}}, rounds: {rounds}, clientsPerRound: {clients}, minClients: {clients}, \
         checkpoint: {{uri: 'file://{at}/{name}.checkpoint'}}}}\n"
    );
    Ok(fs::write(dir.join(format!("{name}.yaml")), text)?)
}

fn live(python: &str) -> Outcome {
    let clients = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../clients/python"));
    let dir = tempfile::tempdir()?;
    let source = clients.join("src");
    let library = if source.exists() { source } else { clients.to_owned() };
    run(Command::new(python).arg(clients.join("tests/make_models.py")).arg(dir.path()).env("PYTHONPATH", &library))?;
    job(dir.path(), "three", "three", 3, 3)?;
    job(dir.path(), "resnet", "resnet18", 1, 2)?;
    let more = ["--shm-limit", "2Gi"].map(str::to_owned).to_vec();
    let mut up = Up::start(dir.path(), &Options { userspace: no_ebpf().is_some(), more, ..Options::default() })?;
    let mut tests = Command::new(python);
    tests.args(["-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/test_live.py"]).current_dir(clients);
    tests
        .env("PYTHONPATH", &library)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("LIFL_URL", format!("http://{}", up.gateway));
    let said = run(tests.env("LIFL_JOB", "three").env("LIFL_RESNET_JOB", "resnet"));
    let said = said.map_err(|failed| format!("{}\n{}", failed.message().unwrap_or_default(), up.log()))?;
    ensure(said.contains("2 passed"), || said)?;
    up.end()
}
