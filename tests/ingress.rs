//! `lifl up DIR --ingress`: rules from files, followed while they change; a gateway that dies is not missed.

#[expect(dead_code, reason = "of the harness only a part is needed here")]
mod harness;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::ExitCode,
    thread,
    time::Duration,
};

use harness::{
    Outcome, ensure,
    http::{Answer, Call},
    until,
    up::{Options, Up, kill, lifl},
};
use libtest_mimic::{Arguments, Trial};

const ANSWERS: Duration = Duration::from_secs(30);

/// A test of this target.
type Case = (&'static str, fn() -> Outcome);

fn main() -> ExitCode {
    let cases: [Case; 2] = [
        ("rules_of_files_are_followed", rules_of_files_are_followed),
        ("a_folder_with_faults_is_refused", folder_with_faults_is_refused),
    ];
    let trials = cases.map(|(name, case)| Trial::test(name, case));
    libtest_mimic::run(&Arguments::from_args(), trials.into()).exit_code()
}

/// Answers each request with its name.
fn backend(name: &'static str) -> Outcome<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (mut head, mut part) = (Vec::new(), [0; 1024]);
            while !head.windows(4).any(|four| four == b"\r\n\r\n") {
                match stream.read(&mut part) {
                    Ok(1..) => head.extend_from_slice(&part),
                    _ => break,
                }
            }
            let answer =
                format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{name}", name.len());
            let _gone = stream.write_all(answer.as_bytes());
        }
    });
    Ok(address)
}

/// Everything for a host: its Ingress, its Service and where that is.
fn rules(host: &str, at: SocketAddr, percent: &str) -> String {
    let name = host.replace('.', "-");
    format!(
        "apiVersion: networking.internal.knative.dev/v1alpha1\nkind: Ingress\nmetadata: {{name: {name}}}\nspec:\n  rules:\n  - hosts: \
         [{host}]\n    visibility: ExternalIP\n    http: {{paths: [{{splits: [{{serviceNamespace: default, serviceName: {name}, servicePort: \
         80, percent: {percent}}}]}}]}}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{name: http, port: \
         80}}]}}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {{name: {name}-1, labels: \
         {{kubernetes.io/service-name: {name}}}}}\nports: [{{name: http, port: {}}}]\nendpoints: [{{addresses: ['{}']}}]\n",
        at.port(),
        at.ip()
    )
}

/// Files are replaced whole: what is written bit by bit is bad for a moment.
fn write(folder: &Path, name: &str, text: &str) -> Outcome {
    fs::write(folder.join(".new"), text)?;
    Ok(fs::rename(folder.join(".new"), folder.join(name))?)
}

/// A folder that the gateway's user can read.
fn folder() -> Outcome<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    Ok(folder)
}

fn ask(at: SocketAddr, host: &str) -> Outcome<Answer> {
    Ok(Call { headers: vec![("Host", host.to_owned())], ..Call::get("/") }.to(at, ANSWERS)?)
}

fn comes(at: SocketAddr, host: &str, body: &str) -> Outcome {
    until(&format!("'{body}' at {host}"), || ask(at, host).ok().filter(|answer| answer.body == body.as_bytes()))
        .map(drop)
}

fn rules_of_files_are_followed() -> Outcome {
    let folder = folder()?;
    let (one, two) = (backend("one")?, backend("two")?);
    write(folder.path(), "a.yaml", &rules("a.example.com", one, "100"))?;
    let more = ["--ingress", "127.0.0.1:0"].map(str::to_owned).into();
    let mut up = Up::start(folder.path(), &Options { userspace: true, more, ..Options::default() })?;
    let line = up.wait_log(&[" ready ", "ingress="])?;
    let at: SocketAddr =
        line.split("ingress=").nth(1).and_then(|rest| rest.split(' ').next()).ok_or("no address")?.parse()?;
    // It is ready: so rules are in force.
    let first = ask(at, "a.example.com")?;
    ensure(first.text() == "200 one", || first.text())?;

    write(folder.path(), "b.yaml", &rules("b.example.com", two, "many"))?;
    let line = up.wait_log(&["b.yaml", "refused"])?;
    ensure(line.contains("spec.rules[0].http.paths[0].splits[0].percent"), || line.clone())?;
    write(folder.path(), "a.yaml", &rules("a.example.com", two, "100"))?;
    comes(at, "a.example.com", "two")?;
    write(folder.path(), "b.yaml", &rules("b.example.com", one, "100"))?;
    comes(at, "b.example.com", "one")?;

    // Whoever comes while the gateway is dead waits for the next one.
    let dead = up.process("gateway").ok_or("no gateway")?;
    kill(dead);
    until("the end of the gateway", || (!Path::new(&format!("/proc/{dead}")).exists()).then_some(()))?;
    let answer = ask(at, "a.example.com")?;
    ensure(answer.text() == "200 two", || answer.text())?;

    fs::remove_file(folder.path().join("b.yaml"))?;
    until("the end of the rule", || ask(at, "b.example.com").ok().filter(|answer| answer.status == 404))?;
    up.end()
}

fn folder_with_faults_is_refused() -> Outcome {
    let folder = folder()?;
    let at = SocketAddr::from(([127, 0, 0, 1], 1));
    write(folder.path(), "bad.yaml", &rules("a.example.com", at, "many"))?;
    let folder = folder.path().to_str().ok_or("a path")?;
    let refused =
        lifl(&["up", folder, "--ingress", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    let place = "bad.yaml: Ingress 'a-example-com': spec.rules[0].http.paths[0].splits[0].percent: ";
    ensure(!refused.status.success() && said.contains(place), || said.into_owned())?;
    let refused = lifl(&["up", folder, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]).output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure(
        said.contains(
            "bad.yaml:1: networking.internal.knative.dev/v1alpha1 Ingress is not served here without --ingress",
        ),
        || said.into_owned(),
    )
}
