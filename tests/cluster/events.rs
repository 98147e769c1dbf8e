//! What people and Prometheus are told of pods by the agent, and that pods need no API server to be served.

use std::{
    fs,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    Case,
    functions::Golden,
    harness::{Outcome, ensure, http::Call, until, up::kill},
    machine::{Cluster, folder},
    platform::{platform, pod_on, processes},
    traces,
};

/// May run beside others.
pub(crate) const CASES: &[Case] = &[
    ("cluster_event_names_its_reason_and_is_said_once", event_names_its_reason_and_is_said_once),
    ("cluster_settings_that_cannot_be_understood_are_told_of", settings_not_understood_are_told_of),
    ("cluster_kernel_counts_connections_of_a_pod", kernel_counts_connections_of_a_pod),
];

/// Take things away that others need.
pub(crate) const ALONE: &[Case] = &[
    ("cluster_event_is_not_said_again_by_another_agent", event_is_not_said_again_by_another_agent),
    ("cluster_pods_are_served_while_the_api_server_is_away", pods_are_served_without_the_api_server),
];

const NODE: &str = "node1";
const LATE: Duration = Duration::from_secs(20);
/// How long the API server is away: longer than the agent's first pauses, and than most leases.
const AWAY: Duration = Duration::from_secs(20);

/// Events of a pod that the agent has said.
fn events(cluster: &Cluster, namespace: &str) -> Outcome<Vec<Value>> {
    let printed = cluster.kubectl(&format!("-n {namespace} get events --field-selector source=lifl-agent -o json"))?;
    let list: Value = serde_json::from_str(&printed)?;
    Ok(list["items"].as_array().ok_or("no list")?.clone())
}

fn said(cluster: &Cluster, namespace: &str) -> Outcome<Value> {
    let event = until("an Event of the agent", || events(cluster, namespace).ok()?.into_iter().next())?;
    ensure(events(cluster, namespace)?.len() == 1, || format!("more than one: {event}"))?;
    Ok(event)
}

/// A pod whose app takes a port that is the node's.
fn pod_that_takes_a_port(cluster: &Cluster, namespace: &str) -> Outcome<Value> {
    cluster.namespace(namespace)?;
    let listens = &["127.0.0.1:8080", "0.0.0.0:8022"];
    Golden { of: "one-revision.yaml", namespace, name: "blue", node: NODE, listens }.create(cluster, |_as_it_is| {})
}

/// Has the agent read the list of its pods again, so and so often.
fn touch(cluster: &Cluster, namespace: &str) -> Outcome {
    for round in 0..3 {
        cluster.kubectl(&format!("-n {namespace} annotate --overwrite pod blue test.lifl.dev/round={round}"))?;
    }
    Ok(())
}

fn event_names_its_reason_and_is_said_once() -> Outcome {
    let cluster = platform()?;
    let pod = pod_that_takes_a_port(&cluster, "event")?;
    let event = said(&cluster, "event")?;
    let about = &event["involvedObject"];
    ensure(about["kind"] == "Pod" && about["name"] == "blue" && about["uid"] == pod["metadata"]["uid"], || {
        event.to_string()
    })?;
    ensure(event["reason"] == "PodNotServed" && event["type"] == "Warning", || event.to_string())?;
    ensure(event["reportingComponent"] == "lifl-agent" && event["reportingInstance"] == NODE, || event.to_string())?;
    let message = event["message"].as_str().unwrap_or_default();
    ensure(message.contains("port 8022 is taken"), || message.to_owned())?;
    // As Knative's tools find it: by the pod.
    let described = cluster.kubectl("-n event describe pod blue")?;
    ensure(described.contains("PodNotServed"), || described)?;
    touch(&cluster, "event")?;
    // Another pod is told of meanwhile, so what was to be said has been.
    let marker = pod_that_takes_a_port(&cluster, "event-after")?;
    said(&cluster, "event-after")?;
    ensure(marker["metadata"]["uid"] != pod["metadata"]["uid"], || marker.to_string())?;
    said(&cluster, "event").map(drop)
}

fn settings_not_understood_are_told_of() -> Outcome {
    let cluster = platform()?;
    cluster.namespace("not-understood")?;
    cluster.test_program()?;
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "blue", "namespace": "not-understood",
            "annotations": {"lifl.dev/pod-settings": r#"{"schema": "lifl.dev/pod-settings/v99"}"#},
        },
        "spec": {
            "nodeName": NODE, "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "app", "image": "dev.local/cluster-test:1", "args": ["app", "127.0.0.1:8080"]}],
        },
    });
    cluster.apply(&pod.to_string())?;
    let event = said(&cluster, "not-understood")?;
    ensure(event["reason"] == "PodSettingsInvalid", || event.to_string())?;
    touch(&cluster, "not-understood")?;
    said(&cluster, "not-understood").map(drop)
}

/// The value of a metric of the agent, by a part of its labels.
fn metric(agent: SocketAddr, name: &str, labels: &[&str]) -> Outcome<Option<u64>> {
    let page = Call::get("/metrics").to(agent, LATE)?.text();
    let found = page.lines().find(|line| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    });
    Ok(found.and_then(|line| line.rsplit(' ').next()?.parse().ok()))
}

fn kernel_counts_connections_of_a_pod() -> Outcome {
    const REQUESTS: u64 = 20;
    let cluster = platform()?;
    let agent = pod_on(&cluster, "agent", NODE)?;
    let agent = format!("{}:9090", agent["status"]["podIP"].as_str().ok_or("no address")?).parse()?;
    // With the capabilities that its container has.
    let works = until("the gauge", || metric(agent, "lifl_pod_counters", &[]).ok().flatten())?;
    ensure(works == 1, || "the kernel does not count".to_owned())?;
    cluster.namespace("counted")?;
    let listens = &["127.0.0.1:8080"];
    let address =
        Golden { of: "one-revision.yaml", namespace: "counted", name: "blue", node: NODE, listens }.ready(&cluster)?;
    let labels = |direction: &'static str| [r#"namespace="counted""#, r#"pod="blue""#, direction];
    let (accepted, dialled) = (labels(r#"direction="accepted""#), labels(r#"direction="dialled""#));
    let connections = |labels: &[&str]| -> Outcome<u64> {
        Ok(metric(agent, "lifl_pod_connections_total", labels)?.ok_or("the pod has no counters")?)
    };
    let before = connections(&accepted)?;
    for _ in 0..REQUESTS {
        let answer = Call::get("/sleep/1").to(format!("{address}:8012").parse()?, LATE)?;
        ensure(answer.status == 200, || answer.text())?;
    }
    // Kubelet's probes come over the same port.
    let after = connections(&accepted)?;
    ensure(after >= before + REQUESTS, || format!("{before}, then {after}"))?;
    ensure(connections(&dialled)? >= 1, || "the app was reached without a connection".to_owned())?;
    for flow in [r#"flow="received""#, r#"flow="sent""#] {
        let mut labels = accepted.to_vec();
        labels.push(flow);
        let bytes = metric(agent, "lifl_pod_bytes_total", &labels)?.unwrap_or_default();
        ensure(bytes > REQUESTS * 20, || format!("{flow}: {bytes} bytes"))?;
    }
    // Who is gone leaves nothing.
    cluster.kubectl("-n counted delete pod blue --force --grace-period=0")?;
    until("the counters to go", || metric(agent, "lifl_pod_connections_total", &accepted).ok()?.is_none().then_some(()))
}

fn event_is_not_said_again_by_another_agent() -> Outcome {
    let cluster = platform()?;
    pod_that_takes_a_port(&cluster, "event-again")?;
    let event = said(&cluster, "event-again")?;
    let agent = pod_on(&cluster, "agent", NODE)?;
    let old = until("the agent", || processes(&agent, &["agent"]).first().copied())?;
    kill(old);
    until("another agent", || processes(&agent, &["agent"]).into_iter().find(|pid| *pid != old))?;
    // It has looked at the pod, as often as it takes to be heard, when it has told of another.
    pod_that_takes_a_port(&cluster, "event-later")?;
    said(&cluster, "event-later")?;
    let again = said(&cluster, "event-again")?;
    ensure(again == event, || format!("{event}, then {again}"))
}

/// Kills the API server and starts it again; while it is away, and while the agent dies too, no request goes unanswered, and
/// afterwards what happened is made up for.
fn pods_are_served_without_the_api_server() -> Outcome {
    let cluster = platform()?;
    cluster.namespace("away")?;
    let listens = &["127.0.0.1:8080"];
    let golden = |name| Golden { of: "one-revision.yaml", namespace: "away", name, node: NODE, listens };
    let to: SocketAddr = format!("{}:8012", golden("blue").ready(&cluster)?).parse()?;
    let agent = pod_on(&cluster, "agent", NODE)?;
    let server = ApiServer::find()?;
    let over = AtomicBool::new(false);
    let (answered, faults) = thread::scope(|scope| -> Outcome<(u32, Vec<String>)> {
        let client = scope.spawn(|| {
            let (mut answered, mut faults) = (0, Vec::new());
            while !over.load(Ordering::Relaxed) {
                match Call::get("/sleep/20").to(to, LATE) {
                    Ok(answer) if answer.status == 200 => answered += 1,
                    Ok(answer) => faults.push(answer.text()),
                    Err(error) => faults.push(error.to_string()),
                }
            }
            (answered, faults)
        });
        let away = || -> Outcome {
            let begun = Instant::now();
            kill(server.pid);
            ensure(cluster.kubectl("get --raw /readyz --request-timeout=2s").is_err(), || "it is there".to_owned())?;
            let old = processes(&agent, &["agent"]).first().copied().ok_or("no agent")?;
            thread::sleep(AWAY / 2);
            kill(old);
            until("another agent", || processes(&agent, &["agent"]).into_iter().find(|pid| *pid != old))?;
            thread::sleep(AWAY.saturating_sub(begun.elapsed()));
            server.start()?;
            cluster.kubectl_until("get --raw /readyz", |said| said == "ok").map(drop)
        };
        let gone = away();
        over.store(true, Ordering::Relaxed);
        let record = client.join().map_err(|_panic| "the client panics")?;
        gone?;
        Ok(record)
    })?;
    eprintln!("away: {answered} answered in {AWAY:?} without an API server");
    ensure(faults.is_empty() && answered > 0, || format!("{answered} answered, not: {faults:?}"))?;
    // The watches go on: a pod that is new, and one that goes.
    golden("green").ready(&cluster)?;
    cluster.kubectl("-n away delete pod blue --force --grace-period=0")?;
    until("the pod to be closed", || Call::get("/").to(to, Duration::from_secs(1)).is_err().then_some(()))
}

/// The API server's process.
struct ApiServer {
    pid: i32,
    /// The first process of its node.
    node: String,
    command: Vec<String>,
    environment: Vec<(String, String)>,
}

// === impl ApiServer ===

impl ApiServer {
    fn find() -> Outcome<Self> {
        let ours = folder().to_string_lossy().into_owned();
        let words = |pid: i32, file: &str| -> Vec<String> {
            let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            text.split_terminator('\0').map(str::to_owned).collect()
        };
        let is = |pid: &i32| {
            let command = words(*pid, "cmdline");
            command.first().is_some_and(|name| name.ends_with("kube-apiserver"))
                && command.iter().any(|word| word.contains(&ours))
        };
        let pid = traces::processes().into_iter().find(is).ok_or("no API server")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).ok_or("no parent")?;
        let pair = |word: String| word.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        let environment = words(pid, "environ").into_iter().filter_map(pair).collect();
        Ok(Self { pid, node: parent.trim().to_owned(), command: words(pid, "cmdline"), environment })
    }

    /// Another one, where the first was: it ends with its node.
    fn start(&self) -> Outcome {
        let log = folder().join("node0/log/kube-apiserver.log");
        let log = fs::OpenOptions::new().append(true).open(log)?;
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.node, "--mount", "--net", "--uts", "--pid", "--"]).args(&self.command);
        command.env_clear().envs(self.environment.iter().cloned()).process_group(0);
        drop(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?);
        Ok(())
    }
}
