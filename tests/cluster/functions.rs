//! Pods as Knative rendered them, through the real webhook, on a real kubelet: no queue-proxy, and its answers all the same.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use lifl_api::pod::{KEPT_ANNOTATION, SETTINGS_ANNOTATION};
use serde_json::{Value, json};

use crate::{
    Case,
    app::APP,
    harness::{
        Outcome, ensure,
        http::{Answer, Call},
        until,
    },
    machine::Cluster,
    platform::platform,
};

pub(crate) const CASES: &[Case] = &[
    ("cluster_golden_pod_is_served_without_queue_proxy", golden_pod_is_served_without_queue_proxy),
    ("cluster_golden_pod_of_h2c_is_served_without_queue_proxy", golden_pod_of_h2c_is_served_without_queue_proxy),
    ("cluster_namespace_asks_for_its_pods", namespace_asks_for_its_pods),
    ("cluster_deleted_pod_drains", deleted_pod_drains),
    ("cluster_pod_on_the_nodes_network_keeps_its_sidecar", pod_on_the_nodes_network_keeps_its_sidecar),
    ("cluster_pod_that_takes_a_port_is_told_of", pod_that_takes_a_port_is_told_of),
];

const ANSWERS: Duration = Duration::from_secs(10);
const ACTIVATOR: &str = "Knative-Activator-Probe";

/// A pod to be made of one that Knative rendered.
#[derive(Clone, Debug)]
pub(crate) struct Golden<'a> {
    /// Which: a file of the webhook's test data.
    pub(crate) of: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) node: &'a str,
    /// Where its app listens.
    pub(crate) listens: &'a [&'a str],
}

/// A request, and the answer that stock Knative gave to it.
struct Row {
    port: u16,
    path: &'static str,
    headers: &'static [(&'static str, &'static str)],
    status: u16,
    /// Headers beside date and length; what begins with `!` is not there.
    has: &'static [(&'static str, &'static str)],
    body: Option<&'static str>,
}

const TEXT: (&str, &str) = ("content-type", "text/plain; charset=utf-8");
const NOSNIFF: (&str, &str) = ("x-content-type-options", "nosniff");

/// `answers/queue-answers.txt`, as recorded.
const ROWS: &[Row] = &[
    Row {
        port: 8012,
        path: "/healthz",
        headers: &[("user-agent", ACTIVATOR), ("k-network-probe", "queue")],
        status: 200,
        has: &[TEXT, ("content-length", "5"), ("!x-content-type-options", "")],
        body: Some("queue"),
    },
    Row {
        port: 8012,
        path: "/healthz",
        headers: &[("user-agent", ACTIVATOR), ("k-network-probe", "activator")],
        status: 400,
        has: &[TEXT, NOSNIFF, ("content-length", "41")],
        body: Some("unexpected probe header value: activator\n"),
    },
    Row {
        port: 8012,
        path: "/",
        headers: &[("user-agent", "kube-probe/1.34"), ("k-network-probe", "queue")],
        status: 200,
        has: &[TEXT, ("content-length", "5")],
        body: Some("queue"),
    },
    Row {
        port: 8012,
        path: "/",
        headers: &[("user-agent", "kube-probe/1.34")],
        status: 400,
        has: &[TEXT, NOSNIFF, ("content-length", "32")],
        body: Some("unexpected probe header value: \n"),
    },
    Row {
        port: 8012,
        path: "/",
        headers: &[("k-network-probe", "probe"), ("k-network-hash", "abc")],
        status: 200,
        has: &[("k-network-hash", "abc"), ("content-length", "0")],
        body: Some(""),
    },
    Row {
        port: 8022,
        path: "/wait-for-drain",
        headers: &[],
        status: 200,
        has: &[("content-length", "0")],
        body: Some(""),
    },
    Row {
        port: 9090,
        path: "/metrics",
        headers: &[],
        status: 200,
        has: &[("content-type", "application/protobuf")],
        body: None,
    },
    // A probe of somebody else is the user's.
    Row {
        port: 8012,
        path: "/sleep/1",
        headers: &[("k-network-probe", "queue")],
        status: 200,
        has: &[],
        body: Some("slept"),
    },
];

// === impl Golden ===

impl Golden<'_> {
    /// What is created: what of the recorded pod was Knative's; the rest is the API server's to add.
    pub(crate) fn render(&self) -> Outcome<Value> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../webhook/tests/data").join(self.of);
        let mut pod: Value = serde_yaml_ng::from_str(&fs::read_to_string(file)?)?;
        let metadata = &pod["metadata"];
        pod["metadata"] = json!({
            "name": self.name, "namespace": self.namespace,
            "labels": metadata["labels"], "annotations": metadata["annotations"],
        });
        pod["metadata"]["labels"]["lifl.dev/data-plane"] = json!("node");
        pod.as_object_mut().ok_or("no pod")?.remove("status");
        let spec = pod["spec"].as_object_mut().ok_or("no spec")?;
        for key in ["volumes", "serviceAccount", "serviceAccountName", "priority", "preemptionPolicy", "tolerations"] {
            spec.remove(key);
        }
        spec.insert("nodeName".into(), json!(self.node));
        let containers = spec["containers"].as_array_mut().ok_or("no containers")?;
        for container in containers.iter_mut() {
            let container = container.as_object_mut().ok_or("no container")?;
            container.remove("volumeMounts");
            // The namespace is told by the environment too, and Knative would have rendered this one's.
            for variable in container.get_mut("env").and_then(Value::as_array_mut).into_iter().flatten() {
                if variable["name"] == "SERVING_NAMESPACE" {
                    variable["value"] = json!(self.namespace);
                }
            }
        }
        containers[0]["image"] = json!("dev.local/cluster-test:1");
        containers[0]["args"] = [APP].iter().chain(self.listens).copied().collect();
        Ok(pod)
    }

    /// Creates it, and gives it back as it is stored.
    pub(crate) fn create(&self, cluster: &Cluster, change: impl FnOnce(&mut Value)) -> Outcome<Value> {
        cluster.test_program()?;
        let mut pod = self.render()?;
        change(&mut pod);
        cluster.apply(&pod.to_string())?;
        stored(cluster, self.namespace, self.name)
    }

    /// Creates it, waits until kubelet has found it ready, and gives back its address.
    pub(crate) fn ready(&self, cluster: &Cluster) -> Outcome<String> {
        let pod = self.create(cluster, |_as_it_is| {})?;
        is_the_nodes(&pod)?;
        let Self { namespace, name, .. } = self;
        // A kubelet that has lost the API server looks for it again after half a minute to a whole one.
        let ready = cluster.kubectl(&format!("-n {namespace} wait pod/{name} --for=condition=Ready --timeout=180s"));
        ready.map_err(|late| {
            let described = cluster.kubectl(&format!("-n {namespace} describe pod {name}")).unwrap_or_default();
            format!("{}\n{described}", late.message().unwrap_or_default())
        })?;
        let pod = stored(cluster, namespace, name)?;
        Ok(pod["status"]["podIP"].as_str().ok_or("no address")?.to_owned())
    }
}

fn stored(cluster: &Cluster, namespace: &str, name: &str) -> Outcome<Value> {
    Ok(serde_json::from_str(&cluster.kubectl(&format!("-n {namespace} get pod {name} -o json"))?)?)
}

/// The webhook has taken queue-proxy out and kept its settings.
fn is_the_nodes(pod: &Value) -> Outcome {
    let names: Vec<&str> =
        pod["spec"]["containers"].as_array().into_iter().flatten().filter_map(|c| c["name"].as_str()).collect();
    ensure(names == ["user-container"], || format!("{names:?}"))?;
    let settings = pod["metadata"]["annotations"][SETTINGS_ANNOTATION].as_str().ok_or("no settings")?;
    let settings: Value = serde_json::from_str(settings)?;
    ensure(settings["userPort"] == 8080 && settings["containerConcurrency"] == 25, || settings.to_string())
}

fn ask(address: &str, port: u16, path: &str, headers: &[(&str, &str)]) -> Outcome<Answer> {
    let to: SocketAddr = format!("{address}:{port}").parse()?;
    let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    Ok(Call { headers, ..Call::get(path) }.to(to, ANSWERS)?)
}

fn golden_pod_is_served_without_queue_proxy() -> Outcome {
    let cluster = platform()?;
    cluster.namespace("golden")?;
    // Its app is to be reached from inside the pod only.
    let pod = Golden {
        of: "one-revision.yaml",
        namespace: "golden",
        name: "blue",
        node: "node0",
        listens: &["127.0.0.1:8080"],
    };
    let address = pod.ready(&cluster)?;
    for row in ROWS {
        let what = format!("{}{} {:?}", row.port, row.path, row.headers);
        let answer = ask(&address, row.port, row.path, row.headers)?;
        ensure(answer.status == row.status, || format!("{what}: {}", answer.text()))?;
        for (name, value) in row.has {
            match name.strip_prefix('!') {
                Some(absent) => ensure(answer.header(absent).is_none(), || format!("{what}: {}", answer.head))?,
                None => ensure(answer.header(name) == Some(value), || format!("{what}: {}", answer.head))?,
            }
        }
        if let Some(body) = row.body {
            ensure(answer.body == body.as_bytes(), || format!("{what}: {}", answer.text()))?;
        }
    }
    // Statistics of the last second bear the pod's name.
    let stat = until("the first statistics", || {
        ask(&address, 9090, "/metrics", &[]).ok().filter(|stat| stat.body.windows(4).any(|four| four == b"blue"))
    })?;
    ensure(stat.body.len() <= 336, || format!("{} bytes", stat.body.len()))?;
    // What the app sees of a request that came through an ingress.
    let headers = [
        ("k-original-host", "shop.example.com"),
        ("x-forwarded-for", "192.0.2.1"),
        ("knative-serving-revision", "shop-blue"),
        ("knative-serving-namespace", "golden"),
        ("connection", "close, x-hop"),
        ("x-hop", "1"),
    ];
    let seen = ask(&address, 8012, "/", &headers)?.json();
    let headers = &seen["headers"];
    ensure(headers["host"] == "shop.example.com" && headers["forwarded"] == "for=192.0.2.1", || seen.to_string())?;
    for gone in ["k-original-host", "knative-serving-revision", "knative-serving-namespace", "x-hop"] {
        ensure(headers[gone].is_null(), || format!("{gone}: {seen}"))?;
    }
    // Nobody else reaches the app.
    let direct = format!("{address}:8080").parse()?;
    ensure(Call::get("/").to(direct, ANSWERS).is_err(), || "an app on the loopback is reached from outside".to_owned())
}

/// The second revision of `split/`.
fn golden_pod_of_h2c_is_served_without_queue_proxy() -> Outcome {
    let cluster = platform()?;
    cluster.namespace("golden-h2c")?;
    let pod = Golden {
        of: "split-green.yaml",
        namespace: "golden-h2c",
        name: "green",
        node: "node1",
        listens: &["127.0.0.1:8080"],
    };
    let address = pod.ready(&cluster)?;
    let probe = [("user-agent", ACTIVATOR), ("k-network-probe", "queue")];
    let probed = ask(&address, 8013, "/", &probe)?;
    ensure(probed.text() == "200 queue", || probed.text())?;
    // HTTP/1.1 stays HTTP/1.1, and h2c with prior knowledge goes to the app as h2c.
    let seen = ask(&address, 8013, "/", &[])?.json();
    ensure(seen["version"] == "HTTP/1.1", || seen.to_string())?;
    let seen = over_h2c(&format!("{address}:8013"))?;
    ensure(seen["version"] == "HTTP/2.0", || seen.to_string())
}

fn over_h2c(authority: &str) -> Outcome<Value> {
    use http_body_util::{BodyExt as _, Empty};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let asked = async {
            let stream = tokio::net::TcpStream::connect(authority).await?;
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            let request = http::Request::get(format!("http://{authority}/")).body(Empty::<bytes::Bytes>::new())?;
            let body = sender.send_request(request).await?.into_body().collect().await?.to_bytes();
            Outcome::Ok(serde_json::from_slice(&body)?)
        };
        tokio::time::timeout(ANSWERS, asked).await?
    })
}

/// A label of the namespace is enough.
fn namespace_asks_for_its_pods() -> Outcome {
    let cluster = platform()?;
    cluster.namespace("asking")?;
    cluster.kubectl("label namespace asking lifl.dev/data-plane=node")?;
    let pod = Golden {
        of: "one-revision.yaml",
        namespace: "asking",
        name: "blue",
        node: "node0",
        listens: &["127.0.0.1:8080"],
    };
    let unlabelled = |pod: &mut Value| {
        drop(pod["metadata"]["labels"].as_object_mut().map(|labels| labels.remove("lifl.dev/data-plane")))
    };
    // Namespaces reach the webhook's selector by a watch of the API server's.
    let found = until("the namespace's word to be heard", || {
        let stored = pod.create(&cluster, unlabelled).ok()?;
        let ours = is_the_nodes(&stored).is_ok();
        if !ours {
            cluster.kubectl("-n asking delete pod blue --force --grace-period=0").ok()?;
        }
        ours.then_some(())
    });
    found?;
    cluster.kubectl("-n asking wait pod/blue --for=condition=Ready --timeout=60s").map(drop)
}

/// As queue-proxy after SIGTERM: probes fail, requests are served, and the end comes after 30 s without one.
fn deleted_pod_drains() -> Outcome {
    let cluster = platform()?;
    cluster.namespace("draining")?;
    let pod = Golden {
        of: "one-revision.yaml",
        namespace: "draining",
        name: "blue",
        node: "node0",
        listens: &["127.0.0.1:8080"],
    };
    let address = pod.ready(&cluster)?;
    cluster.kubectl("-n draining delete pod blue --wait=false")?;
    let probe = [("user-agent", ACTIVATOR), ("k-network-probe", "queue")];
    let refused =
        until("probes to fail", || ask(&address, 8012, "/", &probe).ok().filter(|answer| answer.status == 503))?;
    ensure(refused.body.starts_with(b"shutting down"), || refused.text())?;
    let served = ask(&address, 8012, "/sleep/1", &[])?;
    ensure(served.text() == "200 slept", || served.text())?;
    // Its hook waits for the end of the drain, and the kubelet for the hook.
    cluster.kubectl("-n draining wait pod/blue --for=delete --timeout=60s").map(drop)
}

fn pod_on_the_nodes_network_keeps_its_sidecar() -> Outcome {
    let cluster = platform()?;
    cluster.namespace("host-network")?;
    let pod = Golden {
        of: "one-revision.yaml",
        namespace: "host-network",
        name: "blue",
        node: "node0",
        listens: &["127.0.0.1:8080"],
    };
    let stored = pod.create(&cluster, |pod| pod["spec"]["hostNetwork"] = json!(true))?;
    let containers = stored["spec"]["containers"].as_array().ok_or("no containers")?;
    ensure(containers.iter().any(|container| container["name"] == "queue-proxy"), || stored.to_string())?;
    let why = stored["metadata"]["annotations"][KEPT_ANNOTATION].as_str().ok_or("no reason")?;
    ensure(why.starts_with("it uses the node's network"), || why.to_owned())?;
    event_says(&cluster, "host-network", "it uses the node's network")
}

/// Nobody declared the port, so only the agent finds that it is taken.
fn pod_that_takes_a_port_is_told_of() -> Outcome {
    let cluster = platform()?;
    cluster.namespace("taken")?;
    let listens = &["127.0.0.1:8080", "0.0.0.0:9090"];
    let pod = Golden { of: "one-revision.yaml", namespace: "taken", name: "blue", node: "node1", listens };
    is_the_nodes(&pod.create(&cluster, |_as_it_is| {})?)?;
    event_says(&cluster, "taken", "9090")
}

fn event_says(cluster: &Cluster, namespace: &str, what: &str) -> Outcome {
    let printed = format!(
        "-n {namespace} get events --field-selector involvedObject.name=blue,type=Warning -o jsonpath={{.items[*].message}}"
    );
    cluster.kubectl_until(&printed, |said| said.contains(what)).map(drop)
}
