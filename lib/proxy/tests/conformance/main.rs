//! h2spec against the server: `LIFL_H2SPEC` names it. `h2spec/go.mod` here pins it; it is built by
//! `go build github.com/summerwind/h2spec/cmd/h2spec` in that folder.

use std::{
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    sync::Arc,
};

use http::{Request, Response};
use http_body_util::BodyExt as _;
use libtest_mimic::{Arguments, Failed, Trial};
use lifl_proxy::{
    Body, Direct, Handle, Limits, Peer, Pool, PoolLimits, Server, Timeouts,
    queue::{Queue, Settings},
};
use tokio::net::TcpListener;

/// Fewer would be another suite.
const CASES: usize = 145;
/// Cases that fail, by package and text, and why that is right.
const EXCEPTIONS: &[(&str, &str)] = &[(
    "Sends invalid connection preface",
    "what does not begin with the preface is HTTP/1.1 on this port: it is answered 400 and closed, as by every server that \
     speaks both, and h2spec takes the text of the answer for a frame",
)];

/// Reads all, answers shortly.
struct App;

impl Handle for App {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        let _whole_or_not = request.into_body().collect().await;
        Response::new("some bytes, for the cases that count windows".into())
    }
}

fn main() -> ExitCode {
    let found = h2spec();
    let why = if found.is_some() { "" } else { " (LIFL_H2SPEC is not set: see tests/conformance/main.rs)" };
    let ignored = found.is_none();
    let trial = Trial::test(format!("h2spec{why}"), move || run(found.unwrap_or_default()));
    libtest_mimic::run(&Arguments::from_args(), vec![trial.with_ignored_flag(ignored)]).exit_code()
}

fn h2spec() -> Option<PathBuf> {
    std::env::var_os("LIFL_H2SPEC").map(PathBuf::from)
}

fn run(h2spec: PathBuf) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let folder = tempfile::tempdir()?;
    let report = folder.path().join("report.xml");
    let addr = runtime.block_on(async {
        let app = TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = app.local_addr()?;
        tokio::spawn(async move { Server::new(Arc::new(App), Limits::default()).listen(&app).await });
        let pool = Pool::new(Direct, PoolLimits::default());
        let (pod_name, timeouts) = ("pod".to_owned(), Timeouts::default());
        let settings = Settings { pod_name, concurrency: 0, timeouts, readiness: vec![], http2_auto_detect: false };
        let server = Server::new(Arc::new(Queue::new(&pool, endpoint, 0, settings)), Limits::default());
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        tokio::spawn(async move { server.listen(&listener).await });
        std::io::Result::Ok(addr)
    })?;
    let port = addr.port().to_string();
    // Its status tells of failures, which are looked at one by one.
    Command::new(h2spec)
        .args(["-h", "127.0.0.1", "-p", &port, "-o", "10", "-j"])
        .arg(&report)
        .stdout(Stdio::null())
        .status()?;
    let report = std::fs::read_to_string(report)?;
    let cases: Vec<&str> = report.split("<testcase ").skip(1).collect();
    let failed = |case: &&&str| case.contains("<failure") || case.contains("<error");
    let excepted = |case: &&&str| EXCEPTIONS.iter().any(|(text, _)| case.contains(text));
    let faults: Vec<String> =
        cases.iter().filter(failed).filter(|case| !excepted(case)).map(|case| (*case).to_owned()).collect();
    if cases.len() < CASES {
        return Err(format!("{} cases, {CASES} expected", cases.len()).into());
    }
    if !faults.is_empty() {
        return Err(faults.join("\n").into());
    }
    let needed = cases.iter().filter(failed).filter(excepted).count();
    if needed < EXCEPTIONS.len() { Err("an exception that is not needed any more".into()) } else { Ok(()) }
}
