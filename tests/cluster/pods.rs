//! The cluster itself: nodes are ready, names are answered, services reach pods on other nodes.

use std::time::Duration;

use crate::{
    Case,
    harness::{Outcome, ensure, http::Call, until},
    machine::{Cluster, cluster},
};

pub(crate) const CASES: &[Case] = &[
    ("cluster_has_two_ready_nodes", has_two_ready_nodes),
    ("cluster_dns_answers_in_a_pod", dns_answers_in_a_pod),
    ("cluster_service_reaches_a_pod_on_another_node", service_reaches_a_pod_on_another_node),
    ("cluster_nodes_share_nothing", nodes_share_nothing),
];

/// A pod of `probe` on each node, and a service before the one on node1.
fn web(cluster: &Cluster, namespace: &str) -> Outcome {
    cluster.namespace(namespace)?;
    let pod = |name: &str, node: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\nspec:\n  nodeName: \
             {node}\n  terminationGracePeriodSeconds: 1\n  containers:\n  - name: probe\n    image: dev.local/probe:1\n    args: [serve, \
             ':8080']\n    securityContext: {{runAsNonRoot: true}}\n    readinessProbe: {{httpGet: {{port: 8080}}, periodSeconds: 1}}\n---\n"
        )
    };
    let service = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: {namespace}}}\nspec:\n  selector: {{app: web}}\n  ports: \
         [{{port: 80, targetPort: 8080}}]\n"
    );
    cluster.apply(&(pod("client", "node0") + &pod("web", "node1") + &service))?;
    cluster.kubectl(&format!("-n {namespace} wait pod --all --for=condition=Ready --timeout=60s")).map(drop)
}

fn has_two_ready_nodes() -> Outcome {
    let cluster = cluster()?;
    let ready = r#"get nodes -o jsonpath={range.items[*]}{.metadata.name}={.status.conditions[?(@.type=="Ready")].status};{end}"#;
    let nodes = cluster.kubectl(ready)?;
    ensure(nodes == "node0=True;node1=True;", || nodes)
}

fn dns_answers_in_a_pod() -> Outcome {
    let cluster = cluster()?;
    web(&cluster, "dns")?;
    let address = cluster.kubectl("-n dns get service web -o jsonpath={.spec.clusterIP}")?;
    for name in ["web", "web.dns", "web.dns.svc.cluster.local"] {
        cluster
            .kubectl_until(&format!("-n dns exec client -- /probe lookup {name}"), |found| found.trim() == address)?;
    }
    let unknown = cluster.kubectl("-n dns exec client -- /probe lookup nobody.dns.svc.cluster.local");
    ensure(unknown.is_err(), || "a name that is none".to_owned())
}

fn service_reaches_a_pod_on_another_node() -> Outcome {
    let cluster = cluster()?;
    web(&cluster, "service")?;
    cluster.kubectl_until("-n service exec client -- /probe get http://web", |said| said == "web as 65532\n")?;
    // And from beside the nodes, where the tests stand.
    let address = cluster.kubectl("-n service get service web -o jsonpath={.spec.clusterIP}")?;
    let address = format!("{address}:80").parse()?;
    let answer = until("the service", || Call::get("/").to(address, Duration::from_secs(5)).ok())?;
    ensure(answer.text().contains("web as 65532"), || answer.text())
}

/// A folder of a node is not its neighbour's, nor the machine's; nor are its processes.
fn nodes_share_nothing() -> Outcome {
    let cluster = cluster()?;
    cluster.namespace("nodes")?;
    for node in ["node0", "node1"] {
        cluster.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {node}, namespace: nodes}}\nspec:\n  nodeName: {node}\n  hostPID: true\n  \
             hostNetwork: true\n  terminationGracePeriodSeconds: 1\n  containers:\n  - name: probe\n    image: dev.local/probe:1\n    args: \
             [serve, ':18080']\n    volumeMounts: [{{name: run, mountPath: /of-node, mountPropagation: HostToContainer}}]\n  volumes: \
             [{{name: run, hostPath: {{path: /run/of-{node}, type: DirectoryOrCreate}}}}]\n"
        ))?;
    }
    // Both have the same port of their own network.
    cluster.kubectl("-n nodes wait pod --all --for=condition=Ready --timeout=60s")?;
    for (node, address) in [("node0", "10.200.0.1:18080"), ("node1", "10.200.0.2:18080")] {
        let answer = until("the node", || Call::get("/").to(address.parse().ok()?, Duration::from_secs(5)).ok())?;
        ensure(answer.text().contains(&format!("{node} as")), || answer.text())?;
        ensure(!std::path::Path::new(&format!("/run/of-{node}")).exists(), || {
            format!("/run/of-{node} is on the machine")
        })?;
    }
    Ok(())
}
