//! Changes of the rules: under load, in any order, from files.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use lifl_cluster::Key;
use lifl_gateway::ingress::{Outcome, Snapshot, follow, read, watch_folder};
use serde_json::{Value, json};
use tokio::{net::TcpStream, sync::watch};

use crate::world::{World, add, ask, ask_on, backend, get, http1_on, king, rule, soon, split, whole};

fn outcome(report: &lifl_gateway::ingress::Report, name: &str) -> Outcome {
    report.ingresses[&Key { namespace: "n".into(), name: name.into() }].1.clone()
}

/// Whole revisions and whole sets of addresses are exchanged under clients that never stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_falls_between_two_versions() {
    const CLIENTS: usize = 4;
    let world = World::new().await;
    let version = |name: &str, at| {
        let mut snapshot = Snapshot::default();
        add(&mut snapshot, name, "http", &[at]);
        snapshot.ingresses.push(king("k", json!({"rules": [whole("h.example.com", name)]})));
        snapshot
    };
    let (a, b) = (backend("a").await, backend("b").await);
    // The service changes, and then the addresses of one and the same service.
    let versions = [version("one", a), version("two", b), version("two", a), version("one", b)];
    world.ingress.apply(&versions[0]);
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (stop, done, at) = (Arc::clone(&stop), Arc::clone(&done), world.at["external"]);
            tokio::spawn(async move {
                let mut seen = BTreeMap::<String, usize>::new();
                let mut sender = http1_on(TcpStream::connect(at).await.unwrap()).await;
                while !stop.load(Ordering::Relaxed) {
                    let answer = ask_on(&mut sender, get("h.example.com", "/")).await;
                    assert_eq!(answer.status, 200, "{answer:?}");
                    *seen.entry(answer.backend()).or_default() += 1;
                    done.fetch_add(1, Ordering::Relaxed);
                }
                seen
            })
        })
        .collect();
    for turn in 1..=200 {
        let before = done.load(Ordering::Relaxed);
        world.ingress.apply(&versions[turn % versions.len()]);
        soon("requests after a change", async {
            while done.load(Ordering::Relaxed) < before + CLIENTS && clients.iter().all(|client| !client.is_finished())
            {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut seen = BTreeMap::<String, usize>::new();
    for client in clients {
        for (backend, count) in client.await.unwrap() {
            *seen.entry(backend).or_default() += count;
        }
    }
    assert_eq!(seen.keys().collect::<Vec<_>>(), ["a", "b"], "both versions were served: {seen:?}");
    world.end().await;
}

/// Objects come in any order: what cannot be served yet does not end what is.
#[tokio::test]
async fn a_version_without_addresses_or_certificate_waits() {
    let world = World::new().await;
    let at = world.at["external"];
    let mut snapshot = Snapshot::default();
    add(&mut snapshot, "old", "http", &[backend("old").await]);
    snapshot.ingresses = vec![king("k", json!({"rules": [whole("h.example.com", "old")]}))];
    let first = world.ingress.apply(&snapshot);
    assert_eq!(outcome(&first, "k"), Outcome::Served);

    snapshot.ingresses = vec![king("k", json!({"rules": [whole("h.example.com", "new")]}))];
    let report = world.ingress.apply(&snapshot);
    assert!(matches!(outcome(&report, "k"), Outcome::Missing(backend) if backend.to_string() == "n/new:80"));
    assert_eq!(ask(at, get("h.example.com", "/")).await.backend(), "old");
    let mut probe = get("h.example.com", "/healthz");
    probe.headers_mut().insert("k-network-hash", "override".parse().unwrap());
    let told = ask(at, probe).await.header("k-network-hash").to_owned();
    let hash = |report: &lifl_gateway::ingress::Report| report.ingresses.values().next().unwrap().0.clone().unwrap();
    assert_eq!(told, hash(&first), "a prober learns that the old one is served");
    assert_ne!(told, hash(&report));

    add(&mut snapshot, "new", "http", &[backend("new").await]);
    assert_eq!(outcome(&world.ingress.apply(&snapshot), "k"), Outcome::Served);
    assert_eq!(ask(at, get("h.example.com", "/")).await.backend(), "new");

    let tls = json!([{"hosts": ["h.example.com"], "secretName": "none"}]);
    snapshot.ingresses = vec![king("k", json!({"rules": [whole("h.example.com", "old")], "tls": tls}))];
    let report = world.ingress.apply(&snapshot);
    assert_eq!(outcome(&report, "k"), Outcome::Failed("secret 'n/none': it is not there".into()));
    assert_eq!(ask(at, get("h.example.com", "/")).await.backend(), "new");

    snapshot.ingresses.clear();
    world.ingress.apply(&snapshot);
    assert_eq!(ask(at, get("h.example.com", "/")).await.status, 404);
    world.end().await;
}

#[tokio::test]
async fn a_host_is_the_first_ones_until_it_is_gone() {
    let world = World::new().await;
    let at = world.at["external"];
    let mut snapshot = Snapshot::default();
    for service in ["a", "b"] {
        add(&mut snapshot, service, "http", &[backend(service).await]);
        snapshot.ingresses.push(king(service, json!({"rules": [whole("h.example.com", service)]})));
    }
    let report = world.ingress.apply(&snapshot);
    assert_eq!(outcome(&report, "a"), Outcome::Served);
    assert_eq!(outcome(&report, "b"), Outcome::Conflict(Key { namespace: "n".into(), name: "a".into() }));
    assert_eq!(ask(at, get("h.example.com", "/")).await.backend(), "a");
    snapshot.ingresses.remove(0);
    assert_eq!(outcome(&world.ingress.apply(&snapshot), "b"), Outcome::Served);
    assert_eq!(ask(at, get("h.example.com", "/")).await.backend(), "b");
    let mut other = (*snapshot.ingresses[0]).clone();
    other.metadata.annotations = None;
    snapshot.ingresses = vec![Arc::new(other)];
    assert!(world.ingress.apply(&snapshot).ingresses.is_empty(), "of no class is nobody's");
    world.end().await;
}

/// One file with everything for a host, as a list.
fn file(service: &str, at: std::net::SocketAddr) -> String {
    file_of("h.example.com", service, at)
}

fn file_of(host: &str, service: &str, at: std::net::SocketAddr) -> String {
    let mut snapshot = Snapshot::default();
    add(&mut snapshot, service, "http", &[at]);
    let king = king(host, json!({"rules": [whole(host, service)]}));
    let items: Vec<Value> = vec![
        serde_json::to_value(&*king).unwrap(),
        serde_json::to_value(&*snapshot.services[0]).unwrap(),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "of no interest"}}),
    ];
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    let slice = serde_yaml_ng::to_string(&*snapshot.slices[0]).unwrap();
    format!("{}---\n{slice}", serde_yaml_ng::to_string(&list).unwrap())
}

#[tokio::test]
async fn rules_come_from_files_and_follow_them() {
    let world = World::new().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rules.yaml");
    fs::write(&path, file("one", backend("one").await)).unwrap();
    let (sender, receiver) = watch::channel(Snapshot::default());
    let watching = tokio::spawn(watch_folder(folder.path().to_owned(), sender));
    let (told, mut reports) = watch::channel(lifl_gateway::ingress::Report::default());
    let following = tokio::spawn(follow(world.ingress.clone(), receiver, move |_, report| {
        told.send_replace(report.clone());
    }));
    let served =
        |report: &lifl_gateway::ingress::Report| report.ingresses.values().any(|(_, state)| *state == Outcome::Served);
    soon("the first rules", reports.wait_for(|report| served(report))).await.unwrap();
    let first = reports.borrow_and_update().clone();
    assert_eq!(ask(world.at["external"], get("h.example.com", "/")).await.backend(), "one");

    // A file is replaced whole, as editors and kubelet do; what is hidden or of another kind is not read.
    let other = folder.path().join(".new");
    fs::write(&other, "torn: [").unwrap();
    fs::write(folder.path().join("notes.txt"), "torn: [").unwrap();
    fs::write(&other, file("two", backend("two").await)).unwrap();
    fs::rename(&other, &path).unwrap();
    soon("the second rules", reports.wait_for(|report| *report != first && served(report))).await.unwrap();
    assert_eq!(ask(world.at["external"], get("h.example.com", "/")).await.backend(), "two");

    fs::write(folder.path().join("torn.yaml"), "apiVersion: v1\nkind: Service\nmetadata: [").unwrap();
    let faults = read(folder.path()).unwrap_err();
    assert_eq!(faults.len(), 1);
    assert!(faults[0].to_string().contains("torn.yaml: "), "{}", faults[0]);
    assert_eq!(ask(world.at["external"], get("h.example.com", "/")).await.backend(), "two");
    following.abort();
    soon("the watcher's end", watching).await.unwrap().unwrap();
    world.end().await;
}

/// What a file said before it was wrong stays, and the other files go on.
#[tokio::test]
async fn a_bad_file_is_refused_with_the_place_in_it() {
    let world = World::new().await;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // Files are replaced whole: what is written bit by bit is bad for a moment.
    let write = |name: &str, text: String| {
        fs::write(path(".new"), text).unwrap();
        fs::rename(path(".new"), path(name)).unwrap();
    };
    let (one, two, three) = (backend("one").await, backend("two").await, backend("three").await);
    write("a.yaml", file_of("a.example.com", "one", one));
    write("b.yaml", file_of("b.example.com", "two", two));
    let (sender, receiver) = watch::channel(Snapshot::default());
    let watching = tokio::spawn(watch_folder(folder.path().to_owned(), sender));
    let following = tokio::spawn(follow(world.ingress.clone(), receiver, |_, _| {}));
    let at = world.at["external"];
    let is = |host: &'static str, backend: &'static str| async move {
        soon(backend, async {
            loop {
                let answer = ask(at, get(host, "/")).await;
                if answer.status == 200 && answer.backend() == backend {
                    return;
                }
            }
        })
        .await;
    };
    is("a.example.com", "one").await;
    is("b.example.com", "two").await;

    write("b.yaml", file_of("b.example.com", "three", three).replace("percent: 100", "percent: many"));
    write("a.yaml", file_of("a.example.com", "three", three));
    is("a.example.com", "three").await;
    assert_eq!(ask(at, get("b.example.com", "/")).await.backend(), "two");
    let told = |faults: Vec<lifl_gateway::ingress::FileFault>| {
        assert_eq!(faults.len(), 1, "{faults:?}");
        faults[0].to_string()
    };
    let fault = told(read(folder.path()).unwrap_err());
    let place = "b.yaml: Ingress 'b.example.com': spec.rules[0].http.paths[0].splits[0].percent: invalid type";
    assert!(fault.contains(place), "{fault}");

    write("b.yaml", file_of("b.example.com", "three", three).replace("percent: 100", "percent: -1"));
    let fault = told(read(folder.path()).unwrap_err());
    assert!(fault.contains("b.yaml: Ingress 'n/b.example.com': the splits of path"), "{fault}");
    write("a.yaml", file_of("a.example.com", "one", one));
    is("a.example.com", "one").await;
    assert_eq!(ask(at, get("b.example.com", "/")).await.backend(), "two");

    write("b.yaml", file_of("b.example.com", "three", three));
    is("b.example.com", "three").await;
    fs::remove_file(path("b.yaml")).unwrap();
    soon("the end of the rule", async {
        while ask(at, get("b.example.com", "/")).await.status != 404 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    following.abort();
    soon("the watcher's end", watching).await.unwrap().unwrap();
    world.end().await;
}

/// As a DomainMapping does it: a vanity host is rewritten to that of a service inside, and goes to an external name that
/// is the ingress's own entrance for clients inside.
#[tokio::test]
async fn external_names_are_resolved_and_followed() {
    let world = World::new().await;
    let mut snapshot = Snapshot::default();
    add(&mut snapshot, "s", "http", &[backend("s").await]);
    let port = world.at["local"].port();
    snapshot.services.push(crate::world::read(json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "n", "name": "entrance"},
        "spec": {"type": "ExternalName", "externalName": "localhost",
                 "ports": [{"name": "http", "port": port, "targetPort": 80}]}})));
    let to_entrance =
        json!({"serviceNamespace": "n", "serviceName": "entrance", "servicePort": "http", "percent": 100});
    let vanity = json!([{"rewriteHost": "s.n.svc.cluster.local", "splits": [to_entrance]}]);
    let inner = rule("s.n.svc.cluster.local", "ClusterLocal", json!([{"splits": [split("s", 100)]}]));
    snapshot.ingresses.push(king("vanity", json!({"rules": [rule("vanity.example.com", "ExternalIP", vanity)]})));
    snapshot.ingresses.push(king("s", json!({"rules": [inner]})));
    let (_sender, receiver) = watch::channel(snapshot);
    let (told, mut reports) = watch::channel(lifl_gateway::ingress::Report::default());
    let following = tokio::spawn(follow(world.ingress.clone(), receiver, move |_, report| {
        told.send_replace(report.clone());
    }));
    let all = |report: &lifl_gateway::ingress::Report| {
        report.ingresses.len() == 2 && report.ingresses.values().all(|(_, state)| *state == Outcome::Served)
    };
    let report = soon("the name", reports.wait_for(|report| all(report))).await.unwrap().clone();
    let mut probe = get("vanity.example.com", "/healthz");
    probe.headers_mut().insert("k-network-hash", "override".parse().unwrap());
    let answer = ask(world.at["external"], probe).await;
    let saw = answer.saw();
    assert_eq!((&saw["backend"], &saw["host"]), (&json!("s"), &json!("s.n.svc.cluster.local")));
    assert_eq!(saw["headers"]["x-forwarded-for"], json!(["127.0.0.1, 127.0.0.1"]));
    let vanity = &report.ingresses[&Key { namespace: "n".into(), name: "vanity".into() }];
    assert_eq!(Some(answer.header("k-network-hash")), vanity.0.as_deref(), "the hash of the first of the two");
    following.abort();
    world.end().await;
}
