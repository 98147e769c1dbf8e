//! Which pods lose their sidecar, which keep it and why, and what the others look like afterwards.

use std::{collections::BTreeSet, fs, path::Path};

use k8s_openapi::api::core::v1::Pod;
use lifl_api::pod::{KEPT_ANNOTATION, NodePod, PodSettings, Protocol, SETTINGS_ANNOTATION};
use lifl_webhook::{Config, Request, Verdict, mutate};
use serde::Deserialize as _;
use serde_json::{Value, json};

fn data(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)).expect("test data")
}

/// A pod as Knative rendered it and Kubernetes stored it, with the words by which it asks for the node.
fn golden(name: &str) -> Value {
    let mut pod: Value = serde_yaml_ng::from_str(&data(name)).expect("YAML");
    pod["metadata"]["annotations"]["lifl.dev/data-plane"] = json!("node");
    pod
}

fn judge(pod: &Value, namespace_asks: bool) -> Verdict {
    let plain_runtimes: BTreeSet<String> = ["runc".to_owned()].into();
    mutate(pod, &Request { namespace: "golden", namespace_asks, plain_runtimes: &plain_runtimes })
}

fn apply(pod: &Value, patch: &[Value]) -> Value {
    let mut out = pod.clone();
    let patch: json_patch::Patch = serde_json::from_value(Value::from(patch.to_vec())).expect("RFC 6902");
    json_patch::patch(&mut out, &patch).expect("a patch that fits");
    out
}

fn patched(pod: &Value) -> (Value, PodSettings) {
    match judge(pod, false) {
        Verdict::Patch { patch, settings } => (apply(pod, &patch), *settings),
        other => panic!("{other:?}"),
    }
}

fn container<'a>(pod: &'a Value, name: &str) -> Option<&'a Value> {
    pod["spec"]["containers"].as_array().expect("a list").iter().find(|container| container["name"] == name)
}

type Changes<'a> = &'a [(&'a str, Value)];

/// A change to the golden pod, by JSON pointers; `null` removes.
fn changed(changes: Changes<'_>) -> Value {
    let mut pod = golden("one-revision.yaml");
    for (pointer, value) in changes {
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        let key = key.replace("~1", "/");
        let parent = pod.pointer_mut(parent).expect("its place");
        match (parent, value) {
            (Value::Array(list), value) if key == "-" => list.push(value.clone()),
            (Value::Array(list), value) => list[key.parse::<usize>().expect("an index")] = value.clone(),
            (Value::Object(map), Value::Null) => drop(map.remove(&key)),
            (Value::Object(map), value) => drop(map.insert(key, value.clone())),
            (other, _) => panic!("{pointer}: {other}"),
        }
    }
    pod
}

/// Place of a variable of queue-proxy's environment.
fn variable(name: &str) -> String {
    let pod = golden("one-revision.yaml");
    let env = pod["spec"]["containers"][1]["env"].as_array().expect("a list");
    format!("/spec/containers/1/env/{}/value", env.iter().position(|v| v["name"] == name).expect("a variable"))
}

#[test]
fn the_golden_pods_become_pods_of_the_node() {
    for (name, port, protocol) in
        [("one-revision.yaml", 8012, Protocol::Http1), ("split-green.yaml", 8013, Protocol::H2c)]
    {
        let pod = golden(name);
        let (after, settings) = patched(&pod);
        let snapshot: Value = serde_yaml_ng::from_str(&data(&name.replace(".yaml", ".patched.yaml"))).unwrap();
        assert_eq!(after, snapshot, "{name}: now\n{}", serde_yaml_ng::to_string(&after).unwrap());
        assert_eq!((settings.serving_port, settings.protocol, settings.container_concurrency), (port, protocol, 25));
        // What the agent will read of it.
        let typed: Pod = serde_json::from_value(after).unwrap();
        assert_eq!(NodePod::of(&typed).unwrap().unwrap().settings, settings);
    }
}

#[test]
fn the_drain_hook_and_the_rest_of_the_user_container_stay_as_they_are() {
    let pod = golden("one-revision.yaml");
    let (mut after, _) = patched(&pod);
    assert!(container(&after, "queue-proxy").is_none());
    let before = container(&pod, "user-container").unwrap();
    let user = after.pointer_mut("/spec/containers/0").unwrap().as_object_mut().unwrap();
    assert_eq!(
        user["lifecycle"]["preStop"]["httpGet"],
        json!({"path": "/wait-for-drain", "port": 8022, "scheme": "HTTP"})
    );
    user.remove("readinessProbe").unwrap();
    user["ports"].as_array_mut().unwrap().truncate(1);
    assert_eq!(Value::Object(user.clone()), *before);
    assert_eq!(after["spec"]["volumes"], pod["spec"]["volumes"]);
}

#[test]
fn a_second_round_changes_nothing() {
    let (after, _) = patched(&golden("one-revision.yaml"));
    assert_eq!(judge(&after, true), Verdict::NotOurs);
    let kept = changed(&[("/spec/hostNetwork", json!(true))]);
    let Verdict::Keep { reason, patch } = judge(&kept, false) else { panic!("it must be kept") };
    let after = apply(&kept, &patch);
    assert_eq!(after["metadata"]["annotations"][KEPT_ANNOTATION], reason);
    assert_eq!(judge(&after, true), Verdict::NotOurs);
}

#[test]
fn who_asks() {
    const ASK: &str = "/metadata/annotations/lifl.dev~1data-plane";
    const LABEL: &str = "/metadata/labels/lifl.dev~1data-plane";
    let rows: [(&str, Changes<'_>, bool, bool); 6] = [
        ("the pod", &[], false, true),
        ("nobody", &[(ASK, Value::Null)], false, false),
        ("its namespace", &[(ASK, Value::Null)], true, true),
        ("its namespace, but not the pod", &[(ASK, json!("sidecar"))], true, false),
        ("the pod by a label", &[(ASK, Value::Null), (LABEL, json!("node"))], false, true),
        ("a pod without queue-proxy", &[("/spec/containers/1/name", json!("other"))], false, false),
    ];
    for (who, changes, namespace_asks, ours) in rows {
        let verdict = judge(&changed(changes), namespace_asks);
        assert_eq!(matches!(verdict, Verdict::Patch { .. }), ours, "{who}: {verdict:?}");
        assert_eq!(matches!(verdict, Verdict::NotOurs), !ours, "{who}: {verdict:?}");
    }
}

#[test]
fn pods_that_cannot_keep_their_sidecar_and_say_why() {
    const USER: &str = "/spec/containers/0";
    let port = |number: u16| (format!("{USER}/ports/-"), json!({"containerPort": number, "protocol": "TCP"}));
    let reserved =
        |number: u16| format!("container user-container takes port {number}, on which the node would listen");
    let exec = json!({"exec": {"command": ["true"]}});
    let mut rows = vec![
        (vec![("/spec/hostNetwork".to_owned(), json!(true))], "it uses the node's network".to_owned()),
        (vec![("/spec/runtimeClassName".into(), json!("gvisor"))], "runtime class gvisor may be a sandbox".into()),
        (vec![("/spec/os".into(), json!({"name": "windows"}))], "it runs on windows".into()),
        (
            vec![(format!("{USER}/readinessProbe"), exec.clone()), (format!("{USER}/startupProbe"), exec)],
            "its readiness and its start-up probe are both kubelet's".into(),
        ),
        (
            vec![(variable("USER_PORT"), json!("http"))],
            "environment of queue-proxy: USER_PORT: 'http' is no number".into(),
        ),
        (vec![(variable("USER_PORT"), json!("8022"))], "environment of queue-proxy: userPort: '8022' is taken".into()),
        (
            vec![(variable("SERVING_NAMESPACE"), json!("other"))],
            "it is of namespace golden and queue-proxy of other".into(),
        ),
        (
            vec![(
                "/spec/containers/1/env/0".into(),
                json!({"name": "SERVING_NAMESPACE", "valueFrom": {"secretKeyRef": {}}}),
            )],
            "environment of queue-proxy: SERVING_NAMESPACE: '{\"secretKeyRef\":{}}' is not known".into(),
        ),
        (
            vec![(
                "/spec/initContainers".into(),
                json!([{"name": "mesh", "restartPolicy": "Always", "ports": [{"containerPort": 9090}]}]),
            )],
            "container mesh takes port 9090".into(),
        ),
        (vec![(format!("{USER}/ports"), json!([]))], "no container has port 8080".into()),
    ];
    for number in [8012, 8013, 8022, 8112, 9090, 9091] {
        rows.push((vec![port(number)], reserved(number)));
    }
    for (changes, begins) in rows {
        let changes: Vec<(&str, Value)> = changes.iter().map(|(at, value)| (at.as_str(), value.clone())).collect();
        let pod = changed(&changes);
        let Verdict::Keep { reason, patch } = judge(&pod, false) else { panic!("{begins}: it must be kept") };
        assert!(reason.starts_with(&begins), "{reason}");
        let mut after = apply(&pod, &patch);
        let annotations = after["metadata"]["annotations"].as_object_mut().unwrap();
        assert_eq!(annotations.remove(KEPT_ANNOTATION), Some(json!(reason)));
        assert_eq!(after, pod, "nothing but the reason is written");
    }
}

#[test]
fn pods_that_only_look_as_if_they_could_not() {
    let udp = json!({"containerPort": 8112, "protocol": "UDP"});
    let rows: [Changes<'_>; 3] = [
        &[("/spec/runtimeClassName", json!("runc"))],
        &[("/spec/containers/0/ports/-", udp)],
        // It has ended before the app starts.
        &[("/spec/initContainers", json!([{"name": "prepare", "ports": [{"containerPort": 8012}]}]))],
    ];
    for changes in rows {
        let pod = changed(changes);
        assert!(matches!(judge(&pod, false), Verdict::Patch { .. }), "{changes:?}");
    }
}

#[test]
fn readiness_is_asked_of_the_gateway() {
    let of = |changes: &[(&str, Value)], probe: &str| {
        let (after, _) = patched(&changed(changes));
        container(&after, "user-container").unwrap()[probe].clone()
    };
    let timings = |probe: &Value| (probe["periodSeconds"].as_u64(), probe["failureThreshold"].as_u64());
    // The user's timings.
    let probe = of(&[], "readinessProbe");
    assert_eq!(probe["httpGet"]["port"], 8012);
    assert_eq!(probe["httpGet"]["httpHeaders"], json!([{"name": "K-Network-Probe", "value": "queue"}]));
    assert_eq!(timings(&probe), (Some(2), Some(3)));
    // Left to Knative: each second, and as patient as before.
    let aggressive = json!(r#"{"tcpSocket":{"port":8080,"host":"127.0.0.1"},"successThreshold":1}"#);
    let changes = [
        (variable("SERVING_READINESS_PROBE"), aggressive),
        ("/spec/containers/1/readinessProbe/periodSeconds".into(), json!(10)),
    ];
    let changes: Vec<(&str, Value)> = changes.iter().map(|(at, value)| (at.as_str(), value.clone())).collect();
    assert_eq!(timings(&of(&changes, "readinessProbe")), (Some(1), Some(30)));
    // A probe that only kubelet can run stays, and the start waits for the gateway.
    let exec = json!({"exec": {"command": ["true"]}, "periodSeconds": 5});
    let changes = [("/spec/containers/0/readinessProbe", exec.clone())];
    assert_eq!(of(&changes, "readinessProbe"), exec);
    let start = of(&changes, "startupProbe");
    assert_eq!((start["httpGet"]["port"].as_u64(), timings(&start)), (Some(8012), (Some(1), Some(600))));
}

#[test]
fn volumes_that_only_queue_proxy_mounted_go_with_it() {
    let volume = |name: &str| ("/spec/volumes/-", json!({"name": name, "secret": {"secretName": "serving-certs"}}));
    let mount = |name: &str, path: &str| json!({"name": name, "mountPath": path});
    let pod = changed(&[
        volume("pod-info"),
        volume("shared"),
        volume("server-certs"),
        ("/spec/containers/1/volumeMounts/-", mount("pod-info", "/etc/podinfo")),
        ("/spec/containers/1/volumeMounts/-", mount("shared", "/shared")),
        ("/spec/containers/1/volumeMounts/-", mount("server-certs", "/var/lib/knative/certs")),
        ("/spec/initContainers", json!([{"name": "prepare", "volumeMounts": [mount("shared", "/shared")]}])),
    ]);
    let (after, settings) = patched(&pod);
    let names: Vec<&str> =
        after["spec"]["volumes"].as_array().unwrap().iter().filter_map(|volume| volume["name"].as_str()).collect();
    assert_eq!(names, ["kube-api-access-qlnm9", "shared"]);
    let tls = settings.tls.unwrap();
    assert_eq!((tls.port, tls.secret.as_str()), (8112, "serving-certs"));
}

#[test]
fn a_pod_without_annotations_gets_them() {
    let mut pod = golden("one-revision.yaml");
    pod["metadata"].as_object_mut().unwrap().remove("annotations");
    let Verdict::Patch { patch, settings } = judge(&pod, true) else { panic!("it is ours") };
    let after = apply(&pod, &patch);
    assert_eq!(after["metadata"]["annotations"], json!({SETTINGS_ANNOTATION: settings.to_annotation()}));
}

#[test]
fn the_registration_never_stands_in_the_way() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/webhook.yaml");
    let manifest = fs::read_to_string(manifest).unwrap();
    let documents =
        serde_yaml_ng::Deserializer::from_str(&manifest).map(|document| Value::deserialize(document).unwrap());
    let manifest = documents.into_iter().find(|object| object["kind"] == "MutatingWebhookConfiguration").unwrap();
    let webhooks = manifest["webhooks"].as_array().unwrap();
    let paths: Vec<&str> = webhooks.iter().filter_map(|w| w["clientConfig"]["service"]["path"].as_str()).collect();
    assert_eq!(paths, [lifl_webhook::POD_PATH, lifl_webhook::NAMESPACE_PATH]);
    for webhook in webhooks {
        assert_eq!((&webhook["failurePolicy"], &webhook["sideEffects"]), (&json!("Ignore"), &json!("None")));
        assert!(webhook["timeoutSeconds"].as_u64().is_some_and(|seconds| seconds <= 5));
    }
}

#[test]
fn the_configuration_has_defaults() {
    let config: Config =
        serde_json::from_value(json!({"certificate": {"selfMade": {"names": ["webhook.lifl-system.svc"]}}})).unwrap();
    assert_eq!(config.listen.port(), 8443);
    assert!(config.plain_runtimes.contains("runc"));
}
