//! `lifl-cluster` against a real API server, and the manifests of the house.

use std::{io::Write as _, net::SocketAddr, path::Path, process::ExitCode, sync::Arc, time::Duration};

use k8s_openapi::{
    api::core::v1::{ConfigMap, Node, Pod},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::CustomResourceExt as _;
use lifl_api::job::{FederatedJob, FederatedJobStatus};
use lifl_cluster::{Client, Kind, Objects, Selection, StatusWrite, Store, Writer, connect};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::{
    Case,
    harness::{Outcome, PATIENCE, ensure},
    machine::{Cluster, cluster, manifests},
};

pub(crate) const CASES: &[Case] = &[
    ("cluster_kustomization_renders_what_the_types_say", kustomization_renders_what_the_types_say),
    ("cluster_client_certificate_opens_the_door", client_certificate_opens_the_door),
    ("cluster_federated_job_makes_the_round_trip", federated_job_makes_the_round_trip),
    ("cluster_store_waits_for_its_kind", store_waits_for_its_kind),
    ("cluster_store_goes_on_after_a_cut", store_goes_on_after_a_cut),
    ("cluster_pod_reads_with_its_service_account", pod_reads_with_its_service_account),
];

/// The argument by which this program is what runs in a pod.
pub(crate) const IN_POD: &str = "in-pod";

/// Runs `test` on this thread, which stands beside the nodes.
fn block_on(test: impl Future<Output = Outcome>) -> Outcome {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(test)
}

async fn client(cluster: &Cluster) -> Outcome<Client> {
    Ok(connect(Some(&cluster.kubeconfig())).await?)
}

/// A store, kept by a task of this test.
async fn opened<K: Kind>(client: &Client, selection: Selection) -> Outcome<Store<K>> {
    let (store, keeper) = tokio::time::timeout(PATIENCE, Store::open(client, &selection)).await?;
    tokio::spawn(keeper.run());
    Ok(store)
}

/// Waits until the store's objects are as wanted.
async fn until<K: Kind>(
    store: &mut Store<K>,
    what: &str,
    wanted: impl Fn(&Objects<K>) -> bool,
) -> Outcome<Arc<Objects<K>>> {
    let mut objects = store.snapshot();
    while !wanted(&objects) {
        objects =
            tokio::time::timeout(PATIENCE, store.changed()).await.map_err(|_late| format!("waited for {what}"))??;
    }
    Ok(objects)
}

fn kustomization_renders_what_the_types_say() -> Outcome {
    let rendered = cluster()?.kubectl(&format!("kustomize {}", manifests().display()))?;
    let documents = serde_yaml_ng::Deserializer::from_str(&rendered);
    let documents: Vec<Value> = documents.map(Deserialize::deserialize).collect::<Result<_, _>>()?;
    let kind = |kind: &'static str| documents.iter().filter(move |object| object["kind"] == kind);
    let definitions: Vec<CustomResourceDefinition> = kind("CustomResourceDefinition")
        .map(|object| serde_json::from_value(object.clone()))
        .collect::<Result<_, _>>()?;
    ensure(definitions == [FederatedJob::crd()], || {
        format!("`lifl crd` says something else than manifests/:\n{rendered}")
    })?;
    // No image is left that only kustomize knows.
    let workloads = kind("DaemonSet").chain(kind("Deployment"));
    let images: Vec<&Value> =
        workloads.map(|object| &object["spec"]["template"]["spec"]["containers"][0]["image"]).collect();
    ensure(images == ["dev.local/lifl:1"; 4], || format!("{images:?}"))
}

/// The cluster knows its administrator by certificate alone.
fn client_certificate_opens_the_door() -> Outcome {
    let cluster = cluster()?;
    block_on(async {
        let nodes: Store<Node> = opened(&client(&cluster).await?, Selection::default()).await?;
        let names: Vec<String> = nodes.snapshot().iter().map(|(key, _)| key.to_string()).collect();
        ensure(names == ["node0", "node1"], || format!("{names:?}"))
    })
}

fn job(name: &str, min_clients: Option<u32>) -> Outcome<FederatedJob> {
    let mut job: FederatedJob = serde_json::from_value(json!({
        "apiVersion": "fl.lifl.dev/v1alpha1",
        "kind": "FederatedJob",
        "metadata": {"name": name, "namespace": "jobs"},
        "spec": {
            "model": {"name": name, "initial": {"fromFirstClient": true}},
            "rounds": 5, "clientsPerRound": 3, "roundDeadline": "90s",
            "checkpoint": {"uri": "file:///var/lib/lifl/round-trip"},
        },
    }))?;
    job.spec.min_clients = min_clients;
    Ok(job)
}

fn federated_job_makes_the_round_trip() -> Outcome {
    let cluster = cluster()?;
    cluster.kubectl(&format!("apply -f {}", manifests().join("federatedjob.yaml").display()))?;
    cluster.kubectl("wait crd/federatedjobs.fl.lifl.dev --for=condition=Established --timeout=60s")?;
    cluster.namespace("jobs")?;
    // The API server's reading of the schema accepts our examples.
    cluster.kubectl(&format!("apply -f {}", manifests().join("examples").display()))?;
    cluster.kubectl(&format!("apply --dry-run=server -f {}", manifests().join("examples/kubernetes").display()))?;
    block_on(async {
        let client = client(&cluster).await?;
        let mut jobs: Store<FederatedJob> = opened(&client, Selection::namespace("jobs")).await?;
        ensure(jobs.snapshot().is_empty(), || "jobs of another namespace".to_owned())?;
        let writer = Writer::new(client, "lifl-test");

        let wanted = job("round-trip", Some(2))?;
        writer.apply(&wanted).await?;
        let objects = until(&mut jobs, "the job", |objects| objects.len() == 1).await?;
        let (key, seen) = objects.iter().next().ok_or("no job")?;
        ensure(seen.spec == wanted.spec, || format!("{:?}", seen.spec))?;

        // A field that is no longer applied is no longer there.
        writer.apply(&job("round-trip", None)?).await?;
        let objects = until(&mut jobs, "the field to go", |objects| {
            objects.get(key).is_some_and(|job| job.spec.min_clients.is_none())
        });
        let objects = objects.await?;
        let seen = objects.get(key).ok_or("no job")?;

        let status = |round| FederatedJobStatus { round, observed_generation: 2, ..FederatedJobStatus::default() };
        let StatusWrite::Written(written) = writer.status(&**seen, status(3)).await? else {
            return Err("the status is not written".into());
        };
        ensure(written.metadata.generation == seen.metadata.generation, || "a status is no new generation".to_owned())?;
        let again = writer.status(&written, status(3)).await?;
        ensure(again == StatusWrite::Unchanged, || "an equal status is written".to_owned())?;
        let stale = writer.status(&**seen, status(4)).await?;
        ensure(stale == StatusWrite::Stale, || "an old snapshot overwrites".to_owned())?;
        until(&mut jobs, "the status", |objects| {
            objects.get(key).is_some_and(|job| job.metadata.resource_version == written.metadata.resource_version)
        })
        .await?;
        let printed = cluster.kubectl("-n jobs get federatedjob round-trip -o jsonpath={.status.round}")?;
        ensure(printed == "3", || printed)?;

        cluster.kubectl("-n jobs delete federatedjob round-trip")?;
        until(&mut jobs, "the end of the job", Objects::is_empty).await.map(drop)
    })
}

/// A store of a kind that the API server does not know yet opens when it does.
fn store_waits_for_its_kind() -> Outcome {
    let cluster = cluster()?;
    let definition = r#"{"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "lates.test.lifl.dev"},
        "spec": {"group": "test.lifl.dev", "scope": "Cluster", "names": {"kind": "Late", "plural": "lates"}, "versions": [{"name": "v1", "served": true,
        "storage": true, "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}}"#;
    block_on(async {
        let client = client(&cluster).await?;
        let mut opening = tokio::spawn(async move { opened::<Late>(&client, Selection::default()).await });
        let early = tokio::time::timeout(Duration::from_secs(1), &mut opening).await;
        ensure(early.is_err(), || "a store of a kind that is not there".to_owned())?;
        cluster.apply(definition)?;
        let lates = opening.await??;
        ensure(lates.snapshot().is_empty(), || "objects".to_owned())
    })
}

/// A kind of this test only.
#[derive(kube::CustomResource, Clone, Debug, Serialize, Deserialize)]
#[kube(group = "test.lifl.dev", version = "v1", kind = "Late", schema = "disabled")]
struct LateSpec {}

fn pod_reads_with_its_service_account() -> Outcome {
    let cluster = cluster()?;
    cluster.test_program()?;
    cluster.namespace("in-pod")?;
    cluster.kubectl("-n in-pod create rolebinding view --clusterrole=view --serviceaccount=in-pod:default")?;
    cluster.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: reader, namespace: in-pod}}\nspec:\n  restartPolicy: Never\n  containers:\n  - name: \
         reader\n    image: dev.local/cluster-test:1\n    args: [{IN_POD}]\n    securityContext: {{runAsNonRoot: true}}\n"
    ))?;
    let ended = |phase: &str| matches!(phase, "Succeeded" | "Failed");
    cluster.kubectl_until("-n in-pod get pod reader -o jsonpath={.status.phase}", ended)?;
    let said = cluster.kubectl("-n in-pod logs reader")?;
    ensure(said == "in-pod/reader\n", || said)
}

/// In the pod: says which pods it sees.
pub(crate) fn in_pod() -> ExitCode {
    let seen = block_on(async {
        let client = connect(None).await?;
        let namespace = client.default_namespace().to_owned();
        let pods: Store<Pod> = opened(&client, Selection::namespace(namespace)).await?;
        let names: String = pods.snapshot().iter().map(|(key, _)| format!("{key}\n")).collect();
        Ok(std::io::stdout().write_all(names.as_bytes())?)
    });
    if let Err(why) = &seen {
        eprintln!("{}", why.message().unwrap_or_default());
    }
    if seen.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A way to the API server that can be cut.
struct Way {
    address: SocketAddr,
    listener: Arc<TcpListener>,
    connections: JoinSet<()>,
}

fn store_goes_on_after_a_cut() -> Outcome {
    let cluster = cluster()?;
    cluster.namespace("cut")?;
    block_on(async {
        let mut way = Way::new().await?;
        let kubeconfig = way.kubeconfig(&cluster.kubeconfig())?;
        let cuttable = connect(Some(kubeconfig.path())).await?;
        let writer = Writer::new(client(&cluster).await?, "lifl-test");
        let map = |name: &str| -> Outcome<ConfigMap> {
            Ok(serde_json::from_value(json!({"metadata": {"name": name, "namespace": "cut"}}))?)
        };
        let selection = Selection { labels: Some("!root-ca".into()), ..Selection::namespace("cut") };
        writer.apply(&map("before")?).await?;
        let mut maps: Store<ConfigMap> = opened(&cuttable, selection).await?;
        let has = |name: &'static str| move |maps: &Objects<ConfigMap>| maps.iter().any(|(key, _)| key.name == name);
        until(&mut maps, "the first", has("before")).await?;

        for name in ["one", "two"] {
            way.cut().await;
            writer.apply(&map(name)?).await?;
            ensure(!has(name)(&maps.snapshot()), || "the way is not cut".to_owned())?;
            way.open();
            until(&mut maps, "what happened meanwhile", has(name)).await?;
        }
        Ok(())
    })
}

// === impl Way ===

impl Way {
    async fn new() -> Outcome<Self> {
        let listener = Arc::new(TcpListener::bind("127.0.0.1:0").await?);
        let mut way = Self { address: listener.local_addr()?, listener, connections: JoinSet::new() };
        way.open();
        Ok(way)
    }

    /// Accepts, and passes bytes on.
    fn open(&mut self) {
        let listener = Arc::clone(&self.listener);
        self.connections.spawn(async move {
            let mut passing = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                passing.spawn(async move {
                    if let Ok(mut far) = TcpStream::connect("10.200.0.1:6443").await {
                        // Whichever end closes, the other learns it by the close.
                        drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
                    }
                });
            }
        });
    }

    /// Ends all connections, and lets no new one through until it is opened.
    async fn cut(&mut self) {
        self.connections.shutdown().await;
    }

    /// The kubeconfig that goes this way.
    fn kubeconfig(&self, of: &Path) -> Outcome<tempfile::NamedTempFile> {
        let file = tempfile::NamedTempFile::new()?;
        let text = std::fs::read_to_string(of)?.replace("10.200.0.1:6443", &self.address.to_string());
        std::fs::write(file.path(), text)?;
        Ok(file)
    }
}
