//! The verdict on a pod, and the patch. Pure.

use std::collections::{BTreeMap, BTreeSet};

use lifl_api::pod::{
    DATA_PLANE, DATA_PLANE_NODE, KEPT_ANNOTATION, PodSettings, QUEUE_PROXY, RESERVED_PORTS, SETTINGS_ANNOTATION,
};
use serde_json::{Map, Value, json};

/// Name that Knative gives to the port of the user's app.
const USER_PORT_NAME: &str = "user-port";
/// Where queue-proxy finds its certificates, if it is to speak TLS.
const CERTIFICATES: &str = "/var/lib/knative/certs";
/// What kubelet does where a probe does not say how often, seconds; Kubernetes writes it into every pod.
const DEFAULT_PERIOD: u64 = 10;
const DEFAULT_FAILURES: u64 = 3;
/// How long a start may take where only a start-up probe can wait for the gateway, seconds: as long as Knative waits for a
/// Deployment.
const START_DEADLINE: u64 = 600;

/// What is known of a pod besides the pod.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Namespace that the pod is created in.
    pub namespace: &'a str,
    /// The namespace asks for the node's data plane.
    pub namespace_asks: bool,
    /// Runtime classes that are no sandbox.
    pub plain_runtimes: &'a BTreeSet<String>,
}

/// What is to be done with a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// The node serves it.
    Patch {
        /// JSON patch (RFC 6902).
        patch: Vec<Value>,
        /// What the patch writes into the annotation.
        settings: Box<PodSettings>,
    },
    /// It was to be served by the node, but cannot: the sidecar stays.
    Keep {
        /// Why.
        reason: String,
        /// JSON patch that writes the reason into the pod.
        patch: Vec<Value>,
    },
    /// Nobody asked, or it was done already.
    NotOurs,
}

/// Where things stand in the pod.
struct Containers<'a> {
    queue: (usize, &'a Value),
    /// The one with the port; others of the user's stand beside it.
    user: (usize, &'a Value),
}

/// Judges a pod as it is created.
#[must_use]
pub fn mutate(pod: &Value, request: &Request<'_>) -> Verdict {
    if !asks(pod, request.namespace_asks) || queue_of(pod).is_none() {
        return Verdict::NotOurs;
    }
    match take_over(pod, request) {
        Ok((patch, settings)) => Verdict::Patch { patch, settings: Box::new(settings) },
        // Said already, by this webhook in an earlier round of the same admission.
        Err(reason) if pod["metadata"]["annotations"][KEPT_ANNOTATION] == *reason => Verdict::NotOurs,
        Err(reason) => {
            let patch = annotate(pod, &[(KEPT_ANNOTATION, reason.clone())]);
            Verdict::Keep { reason, patch }
        }
    }
}

/// The pod's own word counts, whatever it is; without one its namespace's.
fn asks(pod: &Value, namespace_asks: bool) -> bool {
    let metadata = &pod["metadata"];
    let own = [&metadata["annotations"], &metadata["labels"]].into_iter().find_map(|of| of[DATA_PLANE].as_str());
    own.map_or(namespace_asks, |word| word == DATA_PLANE_NODE)
}

fn containers<'a>(pod: &'a Value, kind: &str) -> impl Iterator<Item = (usize, &'a Value)> {
    pod["spec"][kind].as_array().into_iter().flatten().enumerate()
}

fn queue_of(pod: &Value) -> Option<(usize, &Value)> {
    containers(pod, "containers").find(|(_, container)| container["name"] == QUEUE_PROXY)
}

fn take_over(pod: &Value, request: &Request<'_>) -> Result<(Vec<Value>, PodSettings), String> {
    refuse_sandboxes(pod, request.plain_runtimes)?;
    refuse_reserved_ports(pod)?;
    let queue = queue_of(pod).ok_or("it has no queue-proxy")?;
    let settings = PodSettings::from_queue_env(&environment(queue.1)?, certificates_of(pod, queue.1)?)
        .map_err(|error| format!("environment of queue-proxy: {error}"))?;
    if settings.namespace != request.namespace {
        return Err(format!("it is of namespace {} and queue-proxy of {}", request.namespace, settings.namespace));
    }
    let user =
        user_of(pod, settings.user_port).ok_or_else(|| format!("no container has port {}", settings.user_port))?;
    // The preStop hooks stay as they are: they ask port 8022 of the pod's address, where the gateway answers from now on.
    let at = Containers { queue, user };
    let mut patch =
        vec![json!({"op": "test", "path": format!("/spec/containers/{}/name", queue.0), "value": QUEUE_PROXY})];
    patch.append(&mut annotate(pod, &[(SETTINGS_ANNOTATION, settings.to_annotation())]));
    patch.push(readiness(&at, &settings)?);
    patch.append(&mut declare_ports(&at));
    // Last, and from behind: every step finds what it names where it was.
    patch.push(json!({"op": "remove", "path": format!("/spec/containers/{}", queue.0)}));
    patch.append(&mut drop_volumes(pod, queue.1));
    Ok((patch, settings))
}

fn refuse_sandboxes(pod: &Value, plain_runtimes: &BTreeSet<String>) -> Result<(), String> {
    let spec = &pod["spec"];
    if spec["hostNetwork"] == true {
        return Err("it uses the node's network: there is no network namespace of its own to serve it in".into());
    }
    if let Some(other) = spec["os"]["name"].as_str().filter(|name| *name != "linux") {
        return Err(format!("it runs on {other}"));
    }
    match spec["runtimeClassName"].as_str() {
        Some(class) if !plain_runtimes.contains(class) => Err(format!(
            "runtime class {class} may be a sandbox with a network of its own, in which nothing can be opened from outside"
        )),
        _ => Ok(()),
    }
}

/// Ports that a container declares. One that it takes without declaring it shows when the agent wants to open it.
fn refuse_reserved_ports(pod: &Value) -> Result<(), String> {
    let stays = |container: &&Value| container["name"] != QUEUE_PROXY;
    let users = containers(pod, "containers").map(|(_, container)| container).filter(stays);
    // Init containers have ended when the app starts, unless they are sidecars.
    let sidecars = containers(pod, "initContainers").map(|(_, c)| c).filter(|c| c["restartPolicy"] == "Always");
    for container in users.chain(sidecars) {
        for port in container["ports"].as_array().into_iter().flatten() {
            let tcp = port["protocol"].as_str().is_none_or(|protocol| protocol == "TCP");
            if let Some(taken) = RESERVED_PORTS.iter().find(|reserved| tcp && port["containerPort"] == **reserved) {
                let name = container["name"].as_str().unwrap_or_default();
                return Err(format!("container {name} takes port {taken}, on which the node would listen"));
            }
        }
    }
    Ok(())
}

/// Variables with a value. Those that come from the pod's own fields (its name, its addresses) are the pod's to tell.
fn environment(queue: &Value) -> Result<BTreeMap<String, String>, String> {
    let mut out = BTreeMap::new();
    for variable in queue["env"].as_array().into_iter().flatten() {
        let name = variable["name"].as_str().unwrap_or_default();
        match variable.get("valueFrom").filter(|from| !from.is_null()) {
            None => drop(out.insert(name.to_owned(), variable["value"].as_str().unwrap_or_default().to_owned())),
            Some(from) if from.get("fieldRef").is_some() => {}
            Some(from) => return Err(format!("environment of queue-proxy: {name}: '{from}' is not known here")),
        }
    }
    match queue["envFrom"].as_array().is_some_and(|from| !from.is_empty()) {
        true => Err("environment of queue-proxy: envFrom is not known here".into()),
        false => Ok(out),
    }
}

/// The Secret behind queue-proxy's certificates.
fn certificates_of<'a>(pod: &'a Value, queue: &Value) -> Result<Option<&'a str>, String> {
    let mounts = queue["volumeMounts"].as_array().into_iter().flatten();
    let Some(mount) = mounts.into_iter().find(|mount| mount["mountPath"] == CERTIFICATES) else { return Ok(None) };
    let volume = containers(pod, "volumes").find(|(_, volume)| volume["name"] == mount["name"]);
    let secret = volume.and_then(|(_, volume)| volume["secret"]["secretName"].as_str());
    secret.map(Some).ok_or_else(|| format!("certificates of queue-proxy: volume {} is no Secret", mount["name"]))
}

fn user_of(pod: &Value, user_port: u16) -> Option<(usize, &Value)> {
    let users = || containers(pod, "containers").filter(|(_, container)| container["name"] != QUEUE_PROXY);
    let ports = |container: &Value| container["ports"].as_array().cloned().unwrap_or_default();
    let named = users().find(|(_, c)| ports(c).iter().any(|port| port["name"] == USER_PORT_NAME));
    named.or_else(|| users().find(|(_, c)| ports(c).iter().any(|port| port["containerPort"] == user_port)))
}

fn annotate(pod: &Value, annotations: &[(&str, String)]) -> Vec<Value> {
    if pod["metadata"]["annotations"].is_object() {
        let escaped = |key: &str| key.replace('~', "~0").replace('/', "~1");
        let add = |(key, value): &(&str, String)| json!({"op": "add", "path": format!("/metadata/annotations/{}", escaped(key)), "value": value});
        return annotations.iter().map(add).collect();
    }
    let all: Map<String, Value> = annotations.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    vec![json!({"op": "add", "path": "/metadata/annotations", "value": all})]
}

/// Gives the user container what keeps `PodReady` true to its word.
///
/// Knative took the user's probe off the container and put it into queue-proxy's environment; kubelet asked queue-proxy, which
/// asked the app. To put the user's probe back would say that the app is ready while nobody listens on the serving port: the
/// gateway opens it only after the pod has an address. So the user container gets **queue-proxy's** probe: kubelet asks the
/// gateway inside the pod, on the port that requests will come to, and the gateway asks the app, every 50 ms while it starts.
///
/// - Where the user left the rate to Knative, kubelet would ask every 10 s. queue-proxy was up before the app; the gateway's
///   listeners come some milliseconds after it, and one refused probe would cost 10 s. So kubelet asks each second, and gives up
///   after as many seconds as before. The price is a probe a second for each such pod.
/// - A readiness probe that is still there is one that only kubelet can run (`exec`). It stays, and the gateway is waited for by
///   the start-up probe; where that is taken too, the pod keeps its sidecar.
fn readiness(at: &Containers<'_>, settings: &PodSettings) -> Result<Value, String> {
    let (index, user) = at.user;
    let mut probe = json!({
        "httpGet": {
            "path": "/",
            "port": settings.serving_port,
            "scheme": "HTTP",
            "httpHeaders": [{"name": "K-Network-Probe", "value": "queue"}],
        },
    });
    let present = |key: &str| user.get(key).is_some_and(|probe| !probe.is_null());
    if present("readinessProbe") {
        if present("startupProbe") {
            return Err(
                "its readiness and its start-up probe are both kubelet's to run: none is left to ask the node".into()
            );
        }
        probe["periodSeconds"] = json!(1);
        probe["failureThreshold"] = json!(START_DEADLINE);
        return Ok(json!({"op": "add", "path": format!("/spec/containers/{index}/startupProbe"), "value": probe}));
    }
    let stock = &at.queue.1["readinessProbe"];
    for key in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        if let Some(value) = stock.get(key) {
            probe[key] = value.clone();
        }
    }
    let left_to_knative = settings.readiness.iter().all(|probe| probe.period_seconds.unwrap_or_default() == 0);
    if left_to_knative {
        let period = stock["periodSeconds"].as_u64().unwrap_or(DEFAULT_PERIOD).max(1);
        let failures = stock["failureThreshold"].as_u64().unwrap_or(DEFAULT_FAILURES);
        probe["periodSeconds"] = json!(1);
        probe["failureThreshold"] = json!(period * failures);
    }
    Ok(json!({"op": "add", "path": format!("/spec/containers/{index}/readinessProbe"), "value": probe}))
}

/// queue-proxy's ports become the user container's: it is still there that they are reached, and Services and monitors that name
/// `http-autometric` or `http-usermetric` go on finding them.
fn declare_ports(at: &Containers<'_>) -> Vec<Value> {
    let own = at.user.1["ports"].as_array().cloned().unwrap_or_default();
    let new = at.queue.1["ports"].as_array().into_iter().flatten();
    let new = new.filter(|port| own.iter().all(|other| other["name"] != port["name"]));
    let path = format!("/spec/containers/{}/ports/-", at.user.0);
    new.map(|port| json!({"op": "add", "path": path, "value": port})).collect()
}

/// Volumes that only queue-proxy mounted.
fn drop_volumes(pod: &Value, queue: &Value) -> Vec<Value> {
    let names = |container: &Value| {
        let of = |key: &str| container[key].as_array().cloned().unwrap_or_default();
        let mounts: Vec<Value> = of("volumeMounts").into_iter().chain(of("volumeDevices")).collect();
        mounts.iter().filter_map(|mount| mount["name"].as_str().map(str::to_owned)).collect::<BTreeSet<_>>()
    };
    let all = containers(pod, "containers").chain(containers(pod, "initContainers"));
    let others: BTreeSet<String> = all.filter(|(_, c)| c["name"] != QUEUE_PROXY).flat_map(|(_, c)| names(c)).collect();
    let own: BTreeSet<String> = names(queue).difference(&others).cloned().collect();
    let volumes: Vec<(usize, &Value)> = containers(pod, "volumes").collect();
    let dropped =
        volumes.into_iter().rev().filter(|(_, volume)| volume["name"].as_str().is_some_and(|n| own.contains(n)));
    dropped.map(|(index, _)| json!({"op": "remove", "path": format!("/spec/volumes/{index}")})).collect()
}
