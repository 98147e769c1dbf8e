//! The ingress on a real cluster: Knative's Ingresses as it writes them, asked for at each gateway, and their statuses.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    Case,
    app::APP,
    functions::Golden,
    harness::{
        Outcome, ensure,
        http::{Answer, Call},
        until,
    },
    machine::Cluster,
    platform::{platform, pods_of},
};

pub(crate) const CASES: &[Case] = &[
    ("cluster_golden_ingress_is_served_by_every_gateway", golden_ingress_is_served_by_every_gateway),
    ("cluster_ingress_sets_headers_and_hosts", ingress_sets_headers_and_hosts),
    ("cluster_ingress_redirects_to_https", ingress_redirects_to_https),
    ("cluster_ingress_swaps_certificates_while_it_serves", ingress_swaps_certificates_while_it_serves),
    ("cluster_ingress_says_what_it_waits_for", ingress_says_what_it_waits_for),
];

const ANSWERS: Duration = Duration::from_secs(10);
/// Ports of a gateway's pod.
const EXTERNAL: u16 = 8080;
const LOCAL: u16 = 8081;
const TLS: u16 = 8443;

/// As Knative installs it, without its schema: what is written here was accepted by that one.
const DEFINITION: &str = r#"{"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
    "metadata": {"name": "ingresses.networking.internal.knative.dev"}, "spec": {
    "group": "networking.internal.knative.dev", "scope": "Namespaced",
    "names": {"kind": "Ingress", "plural": "ingresses", "singular": "ingress", "shortNames": ["kingress", "king"]},
    "versions": [{"name": "v1alpha1", "served": true, "storage": true, "subresources": {"status": {}},
    "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}}"#;

/// The cluster with the platform and Knative's Ingresses.
pub(crate) fn with_ingresses() -> Outcome<Cluster> {
    static DEFINED: OnceLock<Result<(), String>> = OnceLock::new();
    let cluster = platform()?;
    let define = || -> Outcome {
        cluster.apply(DEFINITION)?;
        cluster
            .kubectl("wait crd/ingresses.networking.internal.knative.dev --for=condition=Established --timeout=60s")?;
        cluster.test_program()
    };
    DEFINED.get_or_init(|| define().map_err(|why| why.message().unwrap_or_default().to_owned())).clone()?;
    Ok(cluster)
}

/// Addresses of the gateways.
fn gateways(cluster: &Cluster) -> Outcome<Vec<String>> {
    let pods = pods_of(cluster, "gateway")?;
    let addresses: Vec<String> =
        pods.iter().filter_map(|pod| pod["status"]["podIP"].as_str().map(str::to_owned)).collect();
    ensure(addresses.len() == 2, || format!("{addresses:?}"))?;
    Ok(addresses)
}

fn ask(gateway: &str, port: u16, host: &str, path: &str) -> Outcome<Answer> {
    let to: SocketAddr = format!("{gateway}:{port}").parse()?;
    Ok(Call { headers: vec![("Host", host.to_owned())], ..Call::get(path) }.to(to, ANSWERS)?)
}

/// What the app saw.
fn seen(gateway: &str, port: u16, host: &str, path: &str) -> Outcome<Value> {
    let answer = ask(gateway, port, host, path)?;
    ensure(answer.status == 200, || format!("{host}{path} at {gateway}:{port}: {}", answer.text()))?;
    Ok(answer.json())
}

/// A recorded Ingress, as somebody else of another class and namespace would write it.
fn golden(text: &str, namespace: &str) -> Outcome<Value> {
    let text = text.replace("mini.ingress", "lifl.ingress").replace("golden", namespace);
    let mut list: Value = serde_yaml_ng::from_str(&text)?;
    let mut king = list["items"][0].take();
    king.as_object_mut().ok_or("no object")?.remove("status");
    let metadata = king["metadata"].as_object_mut().ok_or("no metadata")?;
    // Its owner is not here, and what has none is collected.
    metadata.retain(|key, _| matches!(key.as_str(), "name" | "namespace" | "annotations" | "labels"));
    Ok(king)
}

fn king(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress",
        "metadata": {"name": name, "namespace": namespace,
            "annotations": {"networking.knative.dev/ingress.class": "lifl.ingress.networking.knative.dev"}},
        "spec": spec,
    })
}

fn status(cluster: &Cluster, namespace: &str, name: &str) -> Outcome<Value> {
    let printed = cluster.kubectl(&format!("-n {namespace} get king {name} -o json"))?;
    let mut king: Value = serde_json::from_str(&printed)?;
    Ok(king["status"].take())
}

fn condition<'a>(status: &'a Value, kind: &str) -> &'a Value {
    status["conditions"].as_array().into_iter().flatten().find(|one| one["type"] == kind).unwrap_or(&Value::Null)
}

/// Waits until an Ingress is said to be ready, of this generation.
fn ready(cluster: &Cluster, namespace: &str, name: &str, generation: u64) -> Outcome<Value> {
    let mut last = Value::Null;
    let found = until("the Ingress to be ready", || {
        last = status(cluster, namespace, name).ok()?;
        let ready = condition(&last, "Ready")["status"] == "True" && last["observedGeneration"] == generation;
        ready.then(|| last.clone())
    });
    found.map_err(|late| format!("{}; last: {last}", late.message().unwrap_or_default()).into())
}

/// A service of a revision, as Knative makes it, with pods behind it by their label.
fn service(namespace: &str, name: &str, ports: Value, selector: Value) -> String {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
        "spec": {"ports": ports, "selector": selector}})
    .to_string()
}

/// The app in a plain pod, and a service before it.
fn app(cluster: &Cluster, namespace: &str, name: &str) -> Outcome {
    cluster.namespace(namespace)?;
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {"nodeName": "node1", "terminationGracePeriodSeconds": 1, "containers": [{
            "name": "app", "image": "dev.local/cluster-test:1", "args": [APP, "0.0.0.0:8080"],
            "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1}}]},
    });
    cluster.apply(&pod.to_string())?;
    cluster.apply(&service(
        namespace,
        name,
        json!([{"name": "http", "port": 80, "targetPort": 8080}]),
        json!({"app": name}),
    ))?;
    cluster.kubectl(&format!("-n {namespace} wait pod/{name} --for=condition=Ready --timeout=60s")).map(drop)
}

fn split(namespace: &str, service: &str) -> Value {
    json!([{"serviceNamespace": namespace, "serviceName": service, "servicePort": 80, "percent": 100}])
}

/// What stock Knative wrote for a service with one revision, and then with two, with revisions of its own kind behind.
fn golden_ingress_is_served_by_every_gateway() -> Outcome {
    const SPACE: &str = "wares";
    let cluster = with_ingresses()?;
    cluster.namespace(SPACE)?;
    let listens: &[&str] = &["127.0.0.1:8080"];
    let blue = Golden { of: "one-revision.yaml", namespace: SPACE, name: "blue", node: "node0", listens };
    let green = Golden { of: "split-green.yaml", namespace: SPACE, name: "green", node: "node1", listens };
    let of = |revision: &str| json!({"serving.knative.dev/revision": revision});
    for text in [
        service(SPACE, "shop-blue", json!([{"name": "http", "port": 80, "targetPort": 8012}]), of("shop-blue")),
        service(
            SPACE,
            "shop-green",
            json!([{"name": "http2", "port": 81, "targetPort": 8013, "appProtocol": "kubernetes.io/h2c"}]),
            of("shop-green"),
        ),
    ] {
        cluster.apply(&text)?;
    }
    blue.ready(&cluster)?;
    green.ready(&cluster)?;

    cluster.apply(&golden(include_str!("golden/king-one-revision.yaml"), SPACE)?.to_string())?;
    let mut first = ready(&cluster, SPACE, "shop", 1)?;
    for condition in first["conditions"].as_array_mut().ok_or("no conditions")? {
        ensure(condition["lastTransitionTime"].take().is_string(), || condition.to_string())?;
    }
    let says = |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": null});
    let at = |name: &str| json!({"ingress": [{"domainInternal": format!("{name}.lifl-system.svc.cluster.local")}]});
    let wanted = json!({
        "conditions": [says("LoadBalancerReady"), says("NetworkConfigured"), says("Ready")],
        "observedGeneration": 1,
        "publicLoadBalancer": at("lifl-gateway"), "privateLoadBalancer": at("lifl-gateway-local"),
    });
    ensure(first == wanted, || format!("{first:#}"))?;
    for gateway in gateways(&cluster)? {
        // Ready was said: so it is, at every gateway, at the first request.
        for (port, host) in [
            (EXTERNAL, "shop.wares.example.com"),
            (LOCAL, "shop.wares"),
            (LOCAL, "shop.wares.svc"),
            (LOCAL, "shop.wares.svc.cluster.local"),
            (LOCAL, "shop.wares.example.com"),
        ] {
            let saw = seen(&gateway, port, host, "/")?;
            ensure(saw["version"] == "HTTP/1.1" && saw["headers"]["host"] == host, || saw.to_string())?;
        }
        let hidden = ask(&gateway, EXTERNAL, "shop.wares.svc.cluster.local", "/")?;
        ensure(hidden.status == 404, || format!("what is for clients inside: {}", hidden.text()))?;
    }

    cluster.apply(&golden(include_str!("golden/king-split.yaml"), SPACE)?.to_string())?;
    ready(&cluster, SPACE, "shop", 2)?;
    for gateway in gateways(&cluster)? {
        // The app of one revision is spoken to in HTTP/1.1, that of the other in h2c.
        let tagged = |tag: &str| seen(&gateway, EXTERNAL, &format!("{tag}-shop.wares.example.com"), "/");
        ensure(tagged("current")?["version"] == "HTTP/1.1", || "the tag of the old revision".to_owned())?;
        ensure(tagged("next")?["version"] == "HTTP/2.0", || "the tag of the new revision".to_owned())?;
        let mut new = 0;
        for _ in 0..500 {
            new += u32::from(seen(&gateway, EXTERNAL, "shop.wares.example.com", "/")?["version"] == "HTTP/2.0");
        }
        // Ten of a hundred: 50, and seven standard deviations off is a rule that is none.
        ensure((4..=97).contains(&new), || format!("{new} of 500 requests to a tenth"))?;
    }
    // As the rest of the cluster finds it.
    let address = cluster.kubectl("-n lifl-system get service lifl-gateway -o jsonpath={.spec.clusterIP}")?;
    seen(&address, 80, "shop.wares.example.com", "/").map(drop)
}

fn ingress_sets_headers_and_hosts() -> Outcome {
    const SPACE: &str = "dressed";
    let cluster = with_ingresses()?;
    app(&cluster, SPACE, "app")?;
    let mut splits = split(SPACE, "app");
    splits[0]["appendHeaders"] = json!({"Knative-Serving-Revision": "app-1", "X-Both": "split"});
    let paths = json!([
        {"headers": {"Knative-Serving-Tag": {"exact": "tagged"}}, "splits": split(SPACE, "app"), "appendHeaders": {"X-Tag": "yes"}},
        {"splits": splits, "rewriteHost": "inner.example.com", "appendHeaders": {"X-Both": "path"}},
        {"path": "/none", "splits": split(SPACE, "app")},
    ]);
    let rule = json!({"hosts": ["dressed.example.com"], "visibility": "ExternalIP", "http": {"paths": paths}});
    cluster.apply(&king(SPACE, "app", json!({"rules": [rule]})).to_string())?;
    ready(&cluster, SPACE, "app", 1)?;
    for gateway in gateways(&cluster)? {
        let saw = seen(&gateway, EXTERNAL, "dressed.example.com", "/")?;
        let headers = &saw["headers"];
        let set = [&headers["host"], &headers["knative-serving-revision"], &headers["x-both"], &headers["x-tag"]];
        let wanted = [json!("inner.example.com"), json!("app-1"), json!("path"), Value::Null];
        ensure(set.into_iter().eq(&wanted), || saw.to_string())?;
        let to: SocketAddr = format!("{gateway}:{EXTERNAL}").parse()?;
        let headers = vec![("Host", "dressed.example.com".to_owned()), ("knative-serving-tag", "tagged".to_owned())];
        let tagged = Call { headers, ..Call::get("/") }.to(to, ANSWERS)?.json();
        ensure(tagged["headers"]["x-tag"] == "yes", || tagged.to_string())?;
        ensure(seen(&gateway, EXTERNAL, "dressed.example.com", "/none").is_err(), || {
            "an app without that path".to_owned()
        })?;
    }
    Ok(())
}

/// A certificate that signs itself, in a Secret; the file that says to trust it.
fn certificate(
    cluster: &Cluster,
    folder: &Path,
    namespace: &str,
    name: &str,
    host: &str,
    serial: u32,
) -> Outcome<PathBuf> {
    let (certificate, key) = (folder.join(format!("{serial}.crt")), folder.join(format!("{serial}.key")));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", &format!("/CN=test {serial}"), "-addext", &format!("subjectAltName=DNS:{host}")])
        .args(["-out".as_ref(), certificate.as_os_str(), "-keyout".as_ref(), key.as_os_str()])
        .output()?;
    ensure(made.status.success(), || String::from_utf8_lossy(&made.stderr).into_owned())?;
    let (pem, key) = (fs::read_to_string(&certificate)?, fs::read_to_string(key)?);
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": name, "namespace": namespace}, "stringData": {"tls.crt": pem, "tls.key": key}});
    cluster.apply(&secret.to_string())?;
    Ok(certificate)
}

/// A request over TLS that trusts one certificate; its body.
fn over_tls(gateway: &str, host: &str, trusted: &Path) -> Outcome<String> {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--fail", "--max-time", "10", "--cacert"])
        .arg(trusted)
        .args(["--resolve", &format!("{host}:{TLS}:{gateway}"), &format!("https://{host}:{TLS}/")])
        .output()?;
    ensure(output.status.success(), || String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn secure(namespace: &str, host: &str, option: &str) -> Value {
    let rule =
        json!({"hosts": [host], "visibility": "ExternalIP", "http": {"paths": [{"splits": split(namespace, "app")}]}});
    json!({"rules": [rule], "httpOption": option, "tls": [{"hosts": [host], "secretName": "cert", "secretNamespace": namespace}]})
}

/// The gateway may read certificates of those namespaces only that say so.
fn let_it_read(cluster: &Cluster, namespace: &str) -> Outcome {
    let binding =
        "create rolebinding lifl-certificates --clusterrole=lifl-certificates --serviceaccount=lifl-system:gateway";
    cluster.kubectl(&format!("-n {namespace} {binding}")).map(drop)
}

fn ingress_redirects_to_https() -> Outcome {
    const SPACE: &str = "redirected";
    const HOST: &str = "redirected.example.com";
    let cluster = with_ingresses()?;
    app(&cluster, SPACE, "app")?;
    let_it_read(&cluster, SPACE)?;
    let folder = tempfile::tempdir()?;
    let trusted = certificate(&cluster, folder.path(), SPACE, "cert", HOST, 1)?;
    cluster.apply(&king(SPACE, "app", secure(SPACE, HOST, "Redirected")).to_string())?;
    ready(&cluster, SPACE, "app", 1)?;
    for gateway in gateways(&cluster)? {
        let redirect = ask(&gateway, EXTERNAL, HOST, "/path?and=query")?;
        let location = redirect.header("location").unwrap_or_default();
        ensure(redirect.status == 301 && location == format!("https://{HOST}/path?and=query"), || {
            redirect.head.clone()
        })?;
        let saw: Value = serde_json::from_str(&over_tls(&gateway, HOST, &trusted)?)?;
        ensure(saw["headers"]["x-forwarded-proto"] == "https", || saw.to_string())?;
    }
    Ok(())
}

fn ingress_swaps_certificates_while_it_serves() -> Outcome {
    const SPACE: &str = "secure";
    const HOST: &str = "secure.example.com";
    let cluster = with_ingresses()?;
    app(&cluster, SPACE, "app")?;
    let folder = tempfile::tempdir()?;
    let first = certificate(&cluster, folder.path(), SPACE, "cert", HOST, 1)?;
    cluster.apply(&king(SPACE, "app", secure(SPACE, HOST, "Enabled")).to_string())?;
    // Nobody has let the gateway read that secret.
    until("the reason to be told", || {
        let status = status(&cluster, SPACE, "app").ok()?;
        let message = condition(&status, "Ready")["message"].as_str()?;
        (message.starts_with("secret 'secure/cert': ") && message.contains("forbidden")).then_some(())
    })?;
    let_it_read(&cluster, SPACE)?;
    ready(&cluster, SPACE, "app", 1)?;
    let gateways = gateways(&cluster)?;
    for gateway in &gateways {
        over_tls(gateway, HOST, &first)?;
        ensure(over_tls(gateway, "other.example.com", &first).is_err(), || "a name without a certificate".to_owned())?;
    }
    // Whoever asks all the time meets the one or the other, and never nothing.
    let stop = Arc::new(AtomicBool::new(false));
    let second = certificate(&cluster, folder.path(), SPACE, "cert", HOST, 2)?;
    let both = folder.path().join("both.crt");
    fs::write(&both, fs::read_to_string(&first)? + &fs::read_to_string(&second)?)?;
    let asking: Vec<_> = gateways
        .iter()
        .cloned()
        .map(|gateway| {
            let (stop, both) = (Arc::clone(&stop), both.clone());
            thread::spawn(move || -> Result<u32, String> {
                let mut asked = 0;
                while !stop.load(Ordering::Relaxed) {
                    over_tls(&gateway, HOST, &both).map_err(|why| why.message().unwrap_or_default().to_owned())?;
                    asked += 1;
                }
                Ok(asked)
            })
        })
        .collect();
    let swapped = gateways
        .iter()
        .try_for_each(|gateway| until("the second certificate", || over_tls(gateway, HOST, &second).ok()).map(drop));
    stop.store(true, Ordering::Relaxed);
    for asked in asking {
        let asked = asked.join().map_err(|_panic| "it panics")??;
        ensure(asked > 0, || "nobody asked".to_owned())?;
    }
    swapped?;
    ensure(over_tls(&gateways[0], HOST, &first).is_err(), || "the first certificate is still there".to_owned())
}

fn ingress_says_what_it_waits_for() -> Outcome {
    const SPACE: &str = "waiting";
    let cluster = with_ingresses()?;
    cluster.namespace(SPACE)?;
    let rule = |service: &str| {
        let paths = json!([{"splits": split(SPACE, service)}]);
        json!({"rules": [{"hosts": ["waiting.example.com"], "visibility": "ExternalIP", "http": {"paths": paths}}]})
    };
    cluster.apply(&king(SPACE, "app", rule("app")).to_string())?;
    let said = |text: &str| {
        until(text, || {
            let status = status(&cluster, SPACE, "app").ok()?;
            let ready = condition(&status, "Ready");
            (ready["status"] == "Unknown" && ready["message"].as_str()?.ends_with(text)).then_some(status)
        })
    };
    let missing = said(": there is no Service 'waiting/app'")?;
    ensure(missing["observedGeneration"] == 1 && missing["publicLoadBalancer"].is_null(), || missing.to_string())?;
    cluster.apply(&service(SPACE, "app", json!([{"name": "http", "port": 80}]), json!({"app": "nobody"})))?;
    said(": 'waiting/app:80' has no ready address")?;
    // Another one wants the same host; the older keeps it.
    cluster.apply(&king(SPACE, "second", rule("app")).to_string())?;
    until("the conflict", || {
        let status = status(&cluster, SPACE, "second").ok()?;
        (condition(&status, "Ready")["reason"] == "DomainConflict").then_some(())
    })?;
    cluster.kubectl("-n waiting delete king --all").map(drop)
}
