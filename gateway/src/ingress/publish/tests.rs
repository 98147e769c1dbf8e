use std::net::SocketAddr;

use serde_json::{Value, json};

use super::{
    super::backend::{BackendName, Port},
    *,
};

const NOW: &str = "2026-11-23T01:11:30Z";

fn gateway(n: u8, port: u16) -> (String, SocketAddr) {
    (format!("gateway-{n}"), SocketAddr::from(([10, 0, 0, n], port)))
}

fn gateways(all: &[u8]) -> Gateways {
    let at = |port| all.iter().map(|n| gateway(*n, port)).collect();
    Gateways { public: at(8080), private: at(8081) }
}

fn me(n: u8) -> Me {
    let hosts = ServiceHosts { public: "gateway.svc".into(), private: "inner.svc".into() };
    Me { pod: gateway(n, 0).0, hosts }
}

fn name() -> Key {
    Key { namespace: "golden".into(), name: "shop".into() }
}

fn king(version: &str, generation: i64, status: Value) -> Arc<KIngress> {
    let splits = json!([{"serviceNamespace": "golden", "serviceName": "shop", "servicePort": 80}]);
    let paths = json!([
        {"path": "/api/", "headers": {"Tag": {"exact": "next"}}, "splits": splits},
        {"path": "/api/", "splits": splits},
    ]);
    let rule =
        |host: &str, visibility: &str| json!({"hosts": [host], "visibility": visibility, "http": {"paths": paths}});
    let king = serde_json::from_value(json!({
        "apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress",
        "metadata": {"namespace": "golden", "name": "shop", "generation": generation, "resourceVersion": version},
        "spec": {"rules": [rule("shop.golden", "ClusterLocal"), rule("*.example.com", "")]}, "status": status,
    }));
    Arc::new(king.unwrap())
}

fn told(king: &Arc<KIngress>, hash: &str, outcome: Outcome, gateways: Gateways) -> Told {
    let report = Report { ingresses: BTreeMap::from([(name(), (Some(hash.into()), outcome))]), ..Report::default() };
    Told { kings: vec![Arc::clone(king)], gateways, report }
}

fn decide(standings: &mut Standings, told: &Told, n: u8) -> Vec<Action> {
    standings.decide(told, &me(n), NOW.parse().unwrap())
}

/// The king after a status was written.
fn after(actions: &[Action], version: &str) -> Arc<KIngress> {
    let written = actions.iter().find_map(|action| match action {
        Action::Write { king, status } => Some((king, status)),
        _ => None,
    });
    let (king, status) = written.unwrap_or_else(|| panic!("nothing is written: {actions:?}"));
    let mut king = KIngress::clone(king);
    king.status = Some(IngressStatus::clone(status));
    king.metadata.resource_version = Some(version.into());
    Arc::new(king)
}

fn ready(king: &KIngress) -> (&str, i64) {
    let status = king.status.as_ref().unwrap();
    let ready = status.conditions.iter().find(|condition| condition.kind == "Ready").unwrap();
    (&ready.status, status.observed_generation)
}

#[test]
fn an_ingress_is_ready_when_all_gateways_have_told_its_hash() {
    let mut standings = Standings::default();
    let first = king("1", 1, Value::Null);
    let actions = decide(&mut standings, &told(&first, "h1", Outcome::Served, gateways(&[1, 2])), 1);
    let Action::Probe { targets, hash, .. } = &actions[0] else { panic!("{actions:?}") };
    let asked: Vec<_> = targets.iter().map(|t| (t.address.to_string(), t.host.as_str(), t.path.as_str())).collect();
    let want = [
        ("10.0.0.1:8080".to_owned(), "any.example.com", "/api/"),
        ("10.0.0.1:8081".to_owned(), "shop.golden", "/api/"),
        ("10.0.0.2:8080".to_owned(), "any.example.com", "/api/"),
        ("10.0.0.2:8081".to_owned(), "shop.golden", "/api/"),
    ];
    assert_eq!((asked.as_slice(), hash.as_str()), (want.as_slice(), "h1"));
    assert!(targets.iter().all(|target| target.headers.is_empty()), "the path that wants no header");
    let unknown = after(&actions, "2");
    assert_eq!(ready(&unknown), ("Unknown", 1));

    // The same again, before and after the store has the status: nothing.
    assert_eq!(decide(&mut standings, &told(&first, "h1", Outcome::Served, gateways(&[1, 2])), 1), []);
    let seen = told(&unknown, "h1", Outcome::Served, gateways(&[1, 2]));
    assert_eq!(decide(&mut standings, &seen, 1), []);

    standings.probed(&name(), "of another version");
    assert_eq!(decide(&mut standings, &seen, 1), []);
    standings.probed(&name(), "h1");
    let done = after(&decide(&mut standings, &seen, 1), "3");
    assert_eq!(ready(&done), ("True", 1));
    assert_eq!(decide(&mut standings, &told(&done, "h1", Outcome::Served, gateways(&[1, 2])), 1), []);
    // A gateway more is no reason to ask again: it takes no requests before it has the rules.
    assert_eq!(decide(&mut standings, &told(&done, "h1", Outcome::Served, gateways(&[1, 2, 3])), 1), []);
    // Nor is another writer, which knows nothing.
    assert_eq!(decide(&mut Standings::default(), &told(&done, "h1", Outcome::Served, gateways(&[2])), 2), []);

    let mut next = KIngress::clone(&done);
    (next.metadata.generation, next.metadata.resource_version) = (Some(2), Some("4".into()));
    let actions = decide(&mut standings, &told(&Arc::new(next), "h2", Outcome::Served, gateways(&[1, 2])), 1);
    assert!(matches!(&actions[0], Action::Probe { hash, .. } if hash == "h2"), "{actions:?}");
    assert_eq!(ready(&after(&actions, "5")), ("Unknown", 2));
}

#[test]
fn the_gateway_of_the_lowest_name_writes_and_no_other() {
    let king = king("1", 1, Value::Null);
    let seen = told(&king, "h", Outcome::Served, gateways(&[1, 2]));
    let (mut first, mut second) = (Standings::default(), Standings::default());
    assert_eq!(decide(&mut first, &seen, 1).len(), 2);
    assert_eq!(decide(&mut second, &seen, 2), []);
    let alone = told(&king, "h", Outcome::Served, gateways(&[2]));
    assert_eq!(decide(&mut first, &alone, 1), [Action::Stop(name())]);
    assert_eq!(decide(&mut second, &alone, 2).len(), 2);
    let nobody = told(&king, "h", Outcome::Served, Gateways::default());
    assert_eq!(decide(&mut second, &nobody, 2), [Action::Stop(name())]);
}

#[test]
fn probes_follow_the_gateways_and_end_with_the_ingress() {
    let mut standings = Standings::default();
    let king = king("1", 1, Value::Null);
    decide(&mut standings, &told(&king, "h", Outcome::Served, gateways(&[1, 2])), 1);
    let actions = decide(&mut standings, &told(&king, "h", Outcome::Served, gateways(&[1, 3])), 1);
    let [Action::Probe { targets, .. }] = actions.as_slice() else { panic!("{actions:?}") };
    assert!(targets.iter().any(|target| target.address == gateway(3, 8080).1));
    // Outside nobody is there: not ready, whatever those inside say.
    let mut inside = gateways(&[1]);
    inside.public.clear();
    let mut fresh = Standings::default();
    let actions = decide(&mut fresh, &told(&king, "h", Outcome::Served, inside), 1);
    assert!(matches!(actions.as_slice(), [Action::Write { .. }]), "{actions:?}");
    let gone = Told { gateways: gateways(&[1]), ..Told::default() };
    assert_eq!(decide(&mut standings, &gone, 1), [Action::Stop(name())]);
}

#[test]
fn what_was_ready_stays_so_without_addresses_but_not_with_a_fault() {
    let backend = BackendName { namespace: "golden".into(), service: "shop".into(), port: Port::Number(80) };
    let mut standings = Standings::default();
    let first = king("1", 1, Value::Null);
    let seen = |king: &Arc<KIngress>, outcome| told(king, "h", outcome, gateways(&[1]));
    let waiting = after(&decide(&mut standings, &seen(&first, Outcome::Waiting(backend.clone())), 1), "2");
    assert_eq!(ready(&waiting), ("Unknown", 1));
    let waiting = after(&decide(&mut standings, &seen(&waiting, Outcome::Served), 1), "2b");
    standings.probed(&name(), "h");
    let done = after(&decide(&mut standings, &seen(&waiting, Outcome::Served), 1), "3");
    assert_eq!(decide(&mut standings, &seen(&done, Outcome::Waiting(backend.clone())), 1), []);
    assert_eq!(decide(&mut standings, &seen(&done, Outcome::Missing(backend)), 1), []);
    let failed = after(&decide(&mut standings, &seen(&done, Outcome::Failed("no secret".into())), 1), "4");
    assert_eq!(ready(&failed), ("Unknown", 1));
}

#[test]
fn a_status_of_another_class_settles_nothing() {
    let mut standings = Standings::default();
    let foreign = json!({
        "observedGeneration": 1,
        "conditions": [{"type": "Ready", "status": "True"}],
        "publicLoadBalancer": {"ingress": [{"ip": "10.200.0.1"}]},
    });
    let actions = decide(&mut standings, &told(&king("1", 1, foreign), "h", Outcome::Served, gateways(&[1])), 1);
    assert!(matches!(actions[0], Action::Probe { .. }), "{actions:?}");
}

#[test]
fn a_status_that_was_not_written_is_written_again() {
    let mut standings = Standings::default();
    let seen = told(&king("1", 1, Value::Null), "h", Outcome::Failed("no secret".into()), gateways(&[1]));
    assert_eq!(decide(&mut standings, &seen, 1).len(), 1);
    assert_eq!(decide(&mut standings, &seen, 1), []);
    standings.unwritten(&name());
    assert_eq!(decide(&mut standings, &seen, 1).len(), 1);
}
