//! A FederatedJob of the cluster, on one of its nodes: applied, trained for, read back.

use std::{fs, net::SocketAddr};

use serde_json::Value;

use crate::{
    Case,
    harness::{
        Outcome, PATIENCE,
        client::{Clients, Sent, join, source, update_headers, values, weight},
        ensure,
        http::Call,
        job::{ELEMENTS, Job, file},
        oracle, until,
        up::kill,
    },
    machine::Cluster,
    platform::{checkpoints, platform, pod_on, pods_of, processes},
};

pub(crate) const CASES: &[Case] = &[
    ("cluster_federated_job_is_trained_on_a_node", federated_job_is_trained_on_a_node),
    ("cluster_coordinator_killed_in_a_round_goes_on", coordinator_killed_in_a_round_goes_on),
    ("cluster_federated_job_follows_its_spec_until_it_is_deleted", federated_job_follows_its_spec_until_it_is_deleted),
    ("cluster_federated_job_that_cannot_run_says_why", federated_job_that_cannot_run_says_why),
];

/// Where the coordinator sees its volume.
const VOLUME: &str = "/var/lib/lifl";

fn federated_job_is_trained_on_a_node() -> Outcome {
    let cluster = platform()?;
    let secret = Some("of the clients".to_owned());
    let job = Job { secret, ..Job::new(&checkpoints(), "on-kubernetes", 3, 4) };
    cluster.apply(
        "apiVersion: v1\nkind: Secret\nmetadata: {name: on-kubernetes, namespace: default}\nstringData: {token: of the clients}\n",
    )?;
    // As manifests/coordinator.yaml says: secrets are read where their owner has allowed it.
    cluster.kubectl(
        "-n default create rolebinding lifl-job-secrets --clusterrole=lifl-job-secrets --serviceaccount=lifl-system:coordinator",
    )?;
    let more = format!(", minClients: {}, auth: {{tokenSecretRef: {{name: on-kubernetes, key: token}}}}", job.clients);
    apply(&cluster, &job, &more)?;
    let book = Clients::start(service(&cluster)?, &job).done()?;
    let status = status_until(&cluster, &job.name, |status| status["phase"] == "Succeeded")?;
    ensure(status["round"] == job.rounds, || status.to_string())?;
    oracle::check(&job, &book, false)
}

/// Where the Service of clients leads: to one address, whose gateway has the jobs. Other gateways know of none.
fn service(cluster: &Cluster) -> Outcome<SocketAddr> {
    let selected = "-n lifl-system get endpointslices -l kubernetes.io/service-name=lifl-jobs -o json";
    let ready = |slices: &Value| -> Vec<Value> {
        let all = slices["items"].as_array().into_iter().flatten();
        let endpoints = all.flat_map(|slice| slice["endpoints"].as_array().cloned().unwrap_or_default());
        endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true).collect()
    };
    let read = |printed: &str| ready(&serde_json::from_str(printed).unwrap_or_default());
    let endpoints = read(&cluster.kubectl_until(selected, |printed| read(printed).len() == 1)?);
    let (coordinator, elsewhere) = (pods_of(cluster, "coordinator")?, pods_of(cluster, "gateway")?);
    let pod = coordinator.first().ok_or("no coordinator")?;
    let address = endpoints[0]["addresses"][0].as_str().ok_or("no address")?;
    ensure(pod["status"]["podIP"] == address, || format!("{endpoints:?}, {pod}"))?;
    let strangers = elsewhere.iter().filter(|gateway| gateway["spec"]["nodeName"] != pod["spec"]["nodeName"]);
    for gateway in strangers.filter_map(|gateway| gateway["status"]["podIP"].as_str()) {
        let answer =
            Call::get("/v1/namespaces/default/jobs/on-kubernetes").to(format!("{gateway}:8088").parse()?, PATIENCE)?;
        ensure(answer.status == 404, || answer.text())?;
    }
    Ok(format!("{address}:8088").parse()?)
}

/// Applies a job whose first model is in the coordinator's volume; more fields of its spec in YAML flow style.
fn apply(cluster: &Cluster, job: &Job, more: &str) -> Outcome {
    fs::write(checkpoints().join(format!("{}.safetensors", job.name)), file(&[0.0; ELEMENTS], false))?;
    let Job { name, rounds, clients, more: also, .. } = job;
    cluster.apply(&format!(
        "apiVersion: fl.lifl.dev/v1alpha1\nkind: FederatedJob\nmetadata: {{name: {name}, namespace: default}}\nspec: {{model: {{name: m, \
         initial: {{uri: 'file://{VOLUME}/{name}.safetensors'}}}}, rounds: {rounds}, clientsPerRound: {clients}, \
         checkpoint: {{uri: 'file://{VOLUME}/{name}.checkpoint', keep: 1000}}, {also}{more}}}\n"
    ))
}

/// Waits for a status.
fn status_until(cluster: &Cluster, name: &str, wanted: impl Fn(&Value) -> bool) -> Outcome<Value> {
    let read = |printed: &str| serde_json::from_str::<Value>(printed).unwrap_or_default();
    let arguments = format!("-n default get federatedjob {name} -o jsonpath={{.status}}");
    cluster.kubectl_until(&arguments, |printed| wanted(&read(printed))).map(|printed| read(&printed))
}

/// A condition of a status: its status, reason and message.
fn condition(status: &Value, kind: &str) -> (String, String, String) {
    let found = status["conditions"].as_array().and_then(|all| all.iter().find(|one| one["type"] == kind));
    let text = |field: &str| found.and_then(|one| one[field].as_str()).unwrap_or_default().to_owned();
    (text("status"), text("reason"), text("message"))
}

/// The coordinator's pod, and the gateway of its node as clients see it.
fn coordinator_and_gateway(cluster: &Cluster) -> Outcome<(Value, SocketAddr)> {
    let coordinator = pods_of(cluster, "coordinator")?.into_iter().next().ok_or("no coordinator")?;
    let node = coordinator["spec"]["nodeName"].as_str().ok_or("on no node")?;
    let gateway = pod_on(cluster, "gateway", node)?;
    let address = gateway["status"]["podIP"].as_str().ok_or("no address")?;
    Ok((coordinator.clone(), format!("{address}:8088").parse()?))
}

/// A job of two clients that present a Secret.
fn two_clients(cluster: &Cluster, name: &str, rounds: u32) -> Outcome<Job> {
    // Another name than the case beside this one gives to the same: they may run at the same time.
    cluster.apply(
        "apiVersion: v1\nkind: Secret\nmetadata: {name: clients, namespace: default}\nstringData: {token: of the clients}\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\nmetadata: {name: join-secrets, namespace: default}\nroleRef: \
         {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: lifl-job-secrets}\nsubjects: [{kind: ServiceAccount, name: \
         coordinator, namespace: lifl-system}]\n",
    )?;
    let job = Job { secret: Some("of the clients".to_owned()), ..Job::new(&checkpoints(), name, rounds, 2) };
    apply(cluster, &job, ", auth: {tokenSecretRef: {name: clients, key: token}}")?;
    Ok(job)
}

/// Has both clients join and the first one train for round 1: the round waits for the other. What it sent, for the book.
fn begin_round(cluster: &Cluster, address: SocketAddr, job: &Job) -> Outcome<((String, String), Sent)> {
    let name = job.name.as_str();
    let joined = |client| until("joining", || join(address, name, client, job.secret.as_deref()).ok());
    let token = joined(0)?;
    joined(1)?;
    status_until(cluster, name, |status| status["clients"]["selected"] == 2)?;
    let (path, body) = (format!("/v1/namespaces/default/jobs/{name}/events"), file(&values(0, 1), false));
    let call = Call { method: "POST", path: &path, headers: update_headers(name, 0, 1, &token), body: &body };
    let answer = call.to(address, PATIENCE)?;
    ensure(answer.status == 202, || answer.text())?;
    let sent = Sent { client: 0, round: 1, weight: weight(0, 1), acknowledged: true };
    Ok(((source(name, 0), format!("{name}.1.c0")), sent))
}

fn coordinator_killed_in_a_round_goes_on() -> Outcome {
    let cluster = platform()?;
    let job = two_clients(&cluster, "survives", 4)?;
    let (coordinator, address) = coordinator_and_gateway(&cluster)?;
    let (key, sent) = begin_round(&cluster, address, &job)?;
    status_until(&cluster, "survives", |status| status["clients"]["reported"] == 1)?;
    let pids = processes(&coordinator, &["coordinator"]);
    ensure(!pids.is_empty(), || "no process of the coordinator".to_owned())?;
    pids.into_iter().for_each(kill);
    let book = Clients::start(address, &job).done()?;
    book.lock().map_err(|_poisoned| "a client panicked")?.insert(key, sent);
    let status = status_until(&cluster, "survives", |status| status["phase"] == "Succeeded")?;
    ensure(status["round"] == 4, || status.to_string())?;
    oracle::check(&job, &book, false)
}

fn federated_job_follows_its_spec_until_it_is_deleted() -> Outcome {
    let cluster = platform()?;
    let job = two_clients(&cluster, "changes", 4)?;
    let (_, address) = coordinator_and_gateway(&cluster)?;
    begin_round(&cluster, address, &job)?;
    let patch = |fields: &str| {
        cluster.kubectl(&format!("-n default patch federatedjob changes --type=merge -p {{\"spec\":{fields}}}"))
    };
    patch("{\"clientsPerRound\":3}")?;
    let status = status_until(&cluster, "changes", |status| condition(status, "SpecAccepted").0 == "False")?;
    let message = condition(&status, "SpecAccepted").2;
    ensure(message.starts_with("spec.clientsPerRound cannot change"), || message)?;
    patch("{\"clientsPerRound\":2,\"minClients\":1}")?;
    status_until(&cluster, "changes", |status| {
        condition(status, "SpecAccepted").0 == "True" && status["observedGeneration"] == 3
    })?;
    let row = cluster.kubectl("-n default get federatedjob changes --no-headers")?;
    ensure(row.split_whitespace().nth(1) == Some("Running"), || row)?;
    // Gone: who comes finds nothing, and the checkpoint stays.
    cluster.kubectl("-n default delete federatedjob changes --wait")?;
    until("404", || {
        let answer = Call::get("/v1/namespaces/default/jobs/changes").to(address, PATIENCE).ok()?;
        (answer.status == 404).then_some(())
    })?;
    ensure(job.checkpoint.join("job.json").exists(), || "the checkpoint is gone".to_owned())
}

fn federated_job_that_cannot_run_says_why() -> Outcome {
    let cluster = platform()?;
    for (name, more, phase, reason, words) in [
        ("impossible", ", minClients: 5", "Failed", "Invalid", "spec.minClients: 5 is not within 1..=2"),
        ("on-disk", ", ackLevel: Disk", "Failed", "NoJournal", "spec.ackLevel: Disk asks for a journal"),
        (
            "keyless",
            ", auth: {tokenSecretRef: {name: nowhere, key: token}}",
            "Pending",
            "SecretMissing",
            "spec.auth.tokenSecretRef: Secret default/nowhere",
        ),
    ] {
        apply(&cluster, &Job::new(&checkpoints(), name, 1, 2), more)?;
        let status = status_until(&cluster, name, |status| condition(status, "Ready").1 == reason)?;
        let message = condition(&status, "Ready").2;
        ensure(status["phase"] == phase && message.starts_with(words), || status.to_string())?;
        cluster.kubectl(&format!("-n default delete federatedjob {name} --wait"))?;
    }
    Ok(())
}
