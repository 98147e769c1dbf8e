//! What strangers may write, into the words that we read: seeds, and thousands of changes of them. `fuzz/` has the same targets for
//! libFuzzer.

#[path = "../../../fuzz/targets/mutate.rs"]
mod mutate;
#[path = "../../../fuzz/targets/api.rs"]
mod targets;

use mutate::run;

const POD: &str = include_str!("../../../webhook/tests/data/one-revision.patched.yaml");
const SIDECAR: &str = include_str!("../../../webhook/tests/data/one-revision.yaml");

fn json(yaml: &str) -> serde_json::Value {
    serde_yaml_ng::from_str(yaml).expect("YAML")
}

#[test]
fn annotations() {
    let pod = json(POD);
    let text = pod["metadata"]["annotations"]["lifl.dev/pod-settings"].as_str().expect("settings");
    run(&[text.as_bytes()], 40_000, targets::annotation);
}

#[test]
fn environments() {
    let pod = json(SIDECAR);
    let containers = pod["spec"]["containers"].as_array().expect("containers");
    let sidecar = containers.iter().find(|container| container["name"] == "queue-proxy").expect("queue-proxy");
    let line = |pair: &serde_json::Value| {
        format!("{}={}", pair["name"].as_str().unwrap_or_default(), pair["value"].as_str().unwrap_or_default())
    };
    let text: Vec<String> = sidecar["env"].as_array().expect("env").iter().map(line).collect();
    run(&[text.join("\n").as_bytes()], 10_000, targets::environment);
}

#[test]
fn quantities() {
    let seeds: [&[u8]; 10] =
        [b"64Mi", b"1Gi", b"1500", b"0.5Gi", b"1e3", b"20s", b"1m30s", b"500ms", b"2h", b"18446744073709551615"];
    run(&seeds, 100_000, targets::quantity);
}

#[test]
fn headers_of_tensors() {
    let header = br#"{"__metadata__":{"a":"b"},"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}}"#;
    let whole = [&(header.len() as u64).to_le_bytes()[..], header].concat();
    run(&[&whole, header], 60_000, targets::safetensors);
}

#[test]
fn pods() {
    let (ours, sidecar) = (json(POD).to_string(), json(SIDECAR).to_string());
    let word =
        br#"{"Serve":{"place":7,"pod":{"uid":"u","namespace":"n","name":"p","address":"10.0.0.1","draining":false}}}"#;
    run(&[ours.as_bytes(), sidecar.as_bytes(), word], 6000, targets::pod);
}

#[test]
fn ingresses() {
    let ingress = br#"{"apiVersion":"networking.internal.knative.dev/v1alpha1","kind":"Ingress",
        "metadata":{"name":"shop","namespace":"golden","annotations":{"a":"b"}},"spec":{"httpOption":"Enabled",
        "rules":[{"hosts":["shop.golden.svc.cluster.local"],"visibility":"ClusterLocal","http":{"paths":[{"path":"/a",
        "headers":{"K-Network-Hash":{"exact":"override"}},"rewriteHost":"x.y","appendHeaders":{"c":"d"},
        "splits":[{"serviceName":"s","serviceNamespace":"golden","servicePort":80,"percent":100,"appendHeaders":{"e":"f"}}]}]}}],
        "tls":[{"hosts":["h"],"secretName":"s","secretNamespace":"n"}]}}"#;
    run(&[ingress], 20_000, targets::ingress);
}
