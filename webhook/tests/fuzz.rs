//! Reviews that are none: seeds, and thousands of changes of them. `fuzz/` has the same target for libFuzzer.

#[path = "../../fuzz/targets/mutate.rs"]
mod mutate;
#[path = "../../fuzz/targets/webhook.rs"]
mod targets;

use serde_json::{Value, json};

const PODS: [&str; 2] = [include_str!("data/one-revision.yaml"), include_str!("data/one-revision.patched.yaml")];

#[test]
fn reviews() {
    let seeds = PODS.map(|pod| {
        let pod: Value = serde_yaml_ng::from_str(pod).expect("YAML");
        let request = json!({"uid": "u", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "operation": "CREATE",
            "namespace": "golden", "object": pod});
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}).to_string()
    });
    mutate::run(&seeds.each_ref().map(String::as_bytes), 4000, targets::review);
}
