//! The platform on the cluster: rolled out from `manifests/` as anybody would, with this build as its image.

use std::{collections::BTreeMap, fs, path::Path, sync::OnceLock};

use serde_json::Value;

use crate::{
    Case,
    harness::{Outcome, ensure, until},
    machine::{Cluster, cluster, folder, manifests},
    traces,
};

pub(crate) const CASES: &[Case] = &[
    ("cluster_platform_is_ready_on_both_nodes", is_ready_on_both_nodes),
    ("cluster_no_container_may_more_than_it_needs", no_container_may_more_than_it_needs),
    ("cluster_accounts_may_what_they_need_and_no_more", accounts_may_what_they_need_and_no_more),
];

const NAMESPACE: &str = "lifl-system";
/// Who is rolled out, and how many pods each has on two nodes.
const COMPONENTS: &[(&str, &str, usize)] = &[
    ("daemonset", "agent", 2),
    ("daemonset", "gateway", 2),
    ("deployment", "coordinator", 1),
    ("deployment", "webhook", 1),
];
/// What of the agent's is more than nothing: bits of `CapEff`, by number.
const AGENT: &[(&str, u32)] =
    &[("KILL", 5), ("SETGID", 6), ("SETUID", 7), ("NET_ADMIN", 12), ("SYS_ADMIN", 21), ("BPF", 39)];

/// The cluster with the platform on it, rolled out when the first test wants it.
pub(crate) fn platform() -> Outcome<Cluster> {
    static ROLLED_OUT: OnceLock<Result<(), String>> = OnceLock::new();
    let cluster = cluster()?;
    let said = |why: libtest_mimic::Failed| why.message().unwrap_or_default().to_owned();
    ROLLED_OUT.get_or_init(|| roll_out(&cluster).map_err(said)).clone()?;
    Ok(cluster)
}

/// Where the coordinator's checkpoints are, as this machine sees them.
pub(crate) fn checkpoints() -> std::path::PathBuf {
    folder().join("node0/lib/lifl-checkpoints")
}

fn roll_out(cluster: &Cluster) -> Outcome {
    // Another build, an optimised one for long runs, or the one under test.
    let program = std::env::var_os("LIFL_IMAGE").unwrap_or_else(|| env!("CARGO_BIN_EXE_lifl").into());
    cluster.load("lifl", Path::new(&program))?;
    // The claim of manifests/ takes any volume; this is one that a node has.
    fs::create_dir_all(checkpoints())?;
    cluster.apply(
        "apiVersion: v1\nkind: PersistentVolume\nmetadata: {name: checkpoints}\nspec:\n  capacity: {storage: 10Gi}\n  accessModes: \
         [ReadWriteOnce]\n  local: {path: /var/lib/lifl-checkpoints}\n  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: \
         [{key: kubernetes.io/hostname, operator: In, values: [node0]}]}]}}\n",
    )?;
    cluster.kubectl(&format!("apply -k {}", manifests().display()))?;
    cluster.kubectl("wait crd/federatedjobs.fl.lifl.dev --for=condition=Established --timeout=60s")?;
    for (kind, name, _) in COMPONENTS {
        rolled_out(cluster, kind, name)?;
    }
    Ok(())
}

/// Waits for the end of a rollout; what the pods said goes into the failure.
pub(crate) fn rolled_out(cluster: &Cluster, kind: &str, name: &str) -> Outcome {
    // A gateway with streams goes on for as long as its pod may, and the next node waits for that.
    let done = cluster.kubectl(&format!("-n {NAMESPACE} rollout status {kind}/{name} --timeout=400s"));
    done.map(drop).map_err(|late| {
        let say = |command: String| {
            cluster.kubectl(&command).unwrap_or_else(|why| why.message().unwrap_or_default().to_owned())
        };
        let selected = format!("-l app.kubernetes.io/component={name}");
        let described = say(format!("-n {NAMESPACE} describe pods {selected}"));
        let logged = say(format!("-n {NAMESPACE} logs {selected} --tail=40 --prefix"));
        let events: String = described
            .split("Events:")
            .skip(1)
            .filter_map(|part| part.split("\n\n").next())
            .collect::<Vec<_>>()
            .join("\n");
        format!("{name}: {}\n{events}\n{logged}", late.message().unwrap_or_default()).into()
    })
}

/// Pods of a component: node, uid and address of each.
pub(crate) fn pods_of(cluster: &Cluster, component: &str) -> Outcome<Vec<Value>> {
    let printed =
        cluster.kubectl(&format!("-n {NAMESPACE} get pods -l app.kubernetes.io/component={component} -o json"))?;
    let list: Value = serde_json::from_str(&printed)?;
    let pods = list["items"].as_array().ok_or("no list")?.iter();
    Ok(pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).cloned().collect())
}

/// The pod of a component on a node.
pub(crate) fn pod_on(cluster: &Cluster, component: &str, node: &str) -> Outcome<Value> {
    let mut pods = pods_of(cluster, component)?.into_iter();
    Ok(pods.find(|pod| pod["spec"]["nodeName"] == node).ok_or_else(|| format!("no {component} on {node}"))?)
}

/// Processes of a pod whose command line begins with these words behind the program, as this machine counts them.
pub(crate) fn processes(pod: &Value, words: &[&str]) -> Vec<i32> {
    let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
    let ours = |pid: &i32| {
        let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        group.contains(uid)
            && line.split('\0').skip(1).zip(words).filter(|(is, wanted)| is == *wanted).count() == words.len()
    };
    traces::processes().into_iter().filter(ours).collect()
}

fn is_ready_on_both_nodes() -> Outcome {
    let cluster = platform()?;
    for (_, component, count) in COMPONENTS {
        let pods = pods_of(&cluster, component)?;
        let ready = |pod: &&Value| pod["status"]["containerStatuses"][0]["ready"] == true;
        ensure(pods.iter().filter(ready).count() == *count, || format!("{component}: {pods:#?}"))?;
    }
    let services = cluster.kubectl(&format!(
        "-n {NAMESPACE} get services -o jsonpath={{range.items[*]}}{{.metadata.name}}:{{.spec.ports[*].port}};{{end}}"
    ))?;
    ensure(services == "lifl-gateway:80 443;lifl-gateway-local:80 443;lifl-jobs:8088;webhook:443;", || services)
}

/// What the API says, and what the kernel says of each process.
fn no_container_may_more_than_it_needs() -> Outcome {
    let cluster = platform()?;
    for (_, component, _) in COMPONENTS {
        for pod in pods_of(&cluster, component)? {
            let spec = &pod["spec"];
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            for host in ["hostNetwork", "hostPID", "hostIPC"] {
                ensure(spec[host].is_null(), || format!("{name}: {host}"))?;
            }
            let container = &spec["containers"][0];
            let context = &container["securityContext"];
            ensure(spec["containers"].as_array().is_some_and(|all| all.len() == 1), || format!("{name}: {spec}"))?;
            ensure(context["readOnlyRootFilesystem"] == true && context["allowPrivilegeEscalation"] == false, || {
                format!("{name}: {context}")
            })?;
            ensure(spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", || {
                format!("{name}: {spec}")
            })?;
            let process = until("its process", || processes(&pod, &[]).into_iter().find(|pid| is_lifl(*pid)))?;
            for pid in processes(&pod, &[]).into_iter().filter(|pid| is_lifl(*pid)).chain([process]) {
                let status = status_of(pid)?;
                let (uid, capabilities) = match *component {
                    "agent" => ("0", AGENT.iter().map(|(_, bit)| 1u64 << bit).sum()),
                    "coordinator" => ("65533", 0),
                    _ => ("65532", 0),
                };
                let field = |key: &str| status.get(key).map(String::as_str).unwrap_or_default();
                ensure(field("Uid").split_whitespace().all(|one| one == uid), || format!("{name}: {status:?}"))?;
                for set in ["CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"] {
                    let has = u64::from_str_radix(field(set), 16)?;
                    ensure(has & !capabilities == 0, || format!("{name}, {pid}: {set} {has:x}, not {capabilities:x}"))?;
                }
                ensure(field("NoNewPrivs") == "1", || format!("{name}: NoNewPrivs {}", field("NoNewPrivs")))?;
                ensure(field("Seccomp") == "2", || format!("{name}: Seccomp {}", field("Seccomp")))?;
                let mounts = fs::read_to_string(format!("/proc/{pid}/mounts"))?;
                let root = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/")).unwrap_or_default();
                ensure(root.split(' ').nth(3).is_some_and(|flags| flags.starts_with("ro")), || {
                    format!("{name}: {root}")
                })?;
            }
        }
    }
    Ok(())
}

fn is_lifl(pid: i32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| program == Path::new("/lifl"))
}

fn status_of(pid: i32) -> Outcome<BTreeMap<String, String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect())
}

fn accounts_may_what_they_need_and_no_more() -> Outcome {
    // Of a kind that is not defined nobody may do anything.
    let cluster = crate::ingress::with_ingresses()?;
    let may = |account: &str, what: &str| {
        let asked = cluster.kubectl(&format!("auth can-i {what} -A --as=system:serviceaccount:{NAMESPACE}:{account}"));
        // It exits with 1 for a no.
        asked.is_ok_and(|said| said.trim() == "yes")
    };
    let rows: &[(&str, &str, bool)] = &[
        ("agent", "watch pods", true),
        ("agent", "create events", true),
        ("agent", "create events.events.k8s.io", false),
        ("agent", "patch events", false),
        ("agent", "get pods", false),
        ("gateway", "watch services", true),
        ("gateway", "watch endpointslices.discovery.k8s.io", true),
        ("gateway", "watch ingresses.networking.internal.knative.dev", true),
        ("gateway", "update ingresses.networking.internal.knative.dev --subresource=status", true),
        ("gateway", "get ingresses.networking.internal.knative.dev", false),
        ("gateway", "update ingresses.networking.internal.knative.dev", false),
        ("coordinator", "watch federatedjobs.fl.lifl.dev", true),
        ("coordinator", "update federatedjobs.fl.lifl.dev --subresource=status", true),
        ("coordinator", "update federatedjobs.fl.lifl.dev", false),
        ("webhook", "patch mutatingwebhookconfigurations/data-plane.lifl.dev", true),
        ("webhook", "patch mutatingwebhookconfigurations", false),
        ("webhook", "watch pods", false),
        ("gateway", "watch pods", false),
    ];
    for (account, what, allowed) in rows {
        ensure(may(account, what) == *allowed, || format!("{account}: {what} is not {allowed}"))?;
    }
    for account in ["agent", "gateway", "coordinator", "webhook"] {
        for what in [
            "get secrets",
            "list secrets",
            "create pods",
            "create pods --subresource=exec",
            "patch nodes",
            "impersonate users",
        ] {
            ensure(!may(account, what), || format!("{account} may {what}"))?;
        }
    }
    Ok(())
}
