//! The table against an interpreter that reads the Ingresses themselves, and rows that tell what is meant.

use std::collections::BTreeMap;

use lifl_api::ingress::KIngress;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::ingress::{
    backend::{Backend, BackendName},
    metrics::Counters,
};

/// What is compared: service, headers, Host, whether the hash is set.
#[derive(Clone, Debug, PartialEq)]
enum Got {
    Unknown,
    Redirect,
    Forward(String, BTreeMap<String, String>, Option<String>, Option<String>),
}

#[derive(Clone, Debug)]
struct Ask {
    listener: Listener,
    authority: String,
    path: String,
    headers: Vec<(String, String)>,
    random: u64,
}

fn king(namespace: &str, name: &str, age: Option<u8>, spec: Value) -> KIngress {
    let mut metadata = json!({"namespace": namespace, "name": name});
    if let Some(age) = age {
        metadata["creationTimestamp"] = json!(format!("2026-11-23T01:11:{age:02}Z"));
    }
    serde_json::from_value(json!({
        "apiVersion": "networking.internal.knative.dev/v1alpha1", "kind": "Ingress",
        "metadata": metadata, "spec": spec,
    }))
    .unwrap()
}

fn translate(kings: &[KIngress]) -> Vec<Arc<Translated>> {
    let backend = |name: BackendName| Arc::new(Backend::new(name, Counters::default()));
    let mut all: Vec<Arc<Translated>> =
        kings.iter().filter_map(|king| Translated::new(king, backend).ok()).map(Arc::new).collect();
    all.sort_by(|a, b| a.precedence(b));
    all
}

fn ask(rules: &Rules, ask: &Ask) -> Got {
    let mut headers = HeaderMap::new();
    for (name, value) in &ask.headers {
        headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
    }
    let head = Head { authority: &ask.authority, path: &ask.path, headers: &headers };
    let text = |value: &HeaderValue| value.to_str().unwrap().to_owned();
    match rules.decide(ask.listener, &head, ask.random) {
        Decision::Unknown => Got::Unknown,
        Decision::Redirect(_) => Got::Redirect,
        Decision::Forward(to) => Got::Forward(
            to.backend.name.service.clone(),
            to.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
            to.host.map(text),
            to.hash.map(text),
        ),
    }
}

/// Reads the Ingresses afresh for each request, the slow and obvious way.
fn interpret(kings: &[KIngress], ask: &Ask) -> Got {
    let mut kings: Vec<KIngress> = kings.to_vec();
    kings.iter_mut().for_each(KIngress::set_defaults);
    kings.retain(|king| {
        let paths = king.spec.rules.iter().flat_map(|rule| &rule.http.as_ref().unwrap().paths);
        paths.filter(|path| !path.splits.is_empty()).all(|path| path.splits.iter().any(|split| split.percent > 0))
    });
    kings.sort_by_key(|king| {
        let created = king.metadata.creation_timestamp.clone();
        (created.is_none(), created, king.metadata.namespace.clone(), king.metadata.name.clone())
    });
    let declared = |king: &KIngress| -> Vec<String> {
        let rules = king.spec.rules.iter();
        let rules = rules.filter(|rule| rule.http.as_ref().unwrap().paths.iter().any(|path| !path.splits.is_empty()));
        let hosts = |rule: &lifl_api::ingress::IngressRule| match rule.hosts.as_slice() {
            [] => vec!["*".to_owned()],
            hosts => hosts.to_vec(),
        };
        rules.flat_map(hosts).collect()
    };
    let mut accepted: Vec<KIngress> = Vec::new();
    for king in kings {
        let taken: Vec<String> = accepted.iter().flat_map(declared).collect();
        if !declared(&king).iter().any(|host| taken.contains(host)) {
            accepted.push(king);
        }
    }
    let host = ask.authority.split(':').next().unwrap().to_lowercase();
    let mut patterns = vec![host.clone()];
    patterns.extend(host.match_indices('.').map(|(at, _)| format!("*{}", &host[at..])));
    patterns.push("*".to_owned());
    for pattern in patterns {
        let is_declared = accepted.iter().any(|king| declared(king).contains(&pattern));
        let names = |king: &KIngress, pattern: &String| -> bool {
            let hosts = declared(king);
            let short = |host: &String| short_forms(host, "cluster.local").any(|form| form == pattern);
            if is_declared { hosts.contains(pattern) } else { hosts.iter().any(short) }
        };
        let Some(owner) = accepted.iter().find(|king| names(king, &pattern)) else { continue };
        let mut routes = Vec::new();
        for rule in &owner.spec.rules {
            let alone = KIngress {
                spec: lifl_api::ingress::IngressSpec { rules: vec![rule.clone()], ..owner.spec.clone() },
                ..owner.clone()
            };
            let external = rule.visibility == "ExternalIP";
            let tls = !owner.spec.tls.is_empty();
            let here = match ask.listener {
                Listener::External => external,
                Listener::ExternalTls => external && tls,
                Listener::Local => true,
                Listener::LocalTls => !external && tls,
            };
            if here && names(&alone, &pattern) {
                let redirect = external && owner.spec.http_option == "Redirected" && !ask.listener.is_tls();
                let paths = rule.http.as_ref().unwrap().paths.iter().filter(|path| !path.splits.is_empty());
                routes.extend(paths.map(|path| (path, redirect)));
            }
        }
        if routes.is_empty() {
            continue;
        }
        routes.sort_by_key(|(path, _)| (usize::MAX - path.path.len().max(1), path.headers.is_empty()));
        return interpret_routes(owner, &routes, ask);
    }
    Got::Unknown
}

fn interpret_routes(owner: &KIngress, routes: &[(&lifl_api::ingress::IngressPath, bool)], ask: &Ask) -> Got {
    let value = |name: &str| {
        let of_name = ask.headers.iter().filter(|(other, _)| other.eq_ignore_ascii_case(name));
        let values: Vec<&str> = of_name.map(|(_, value)| value.as_str()).collect();
        (!values.is_empty()).then(|| values.join(","))
    };
    for (path, redirect) in routes {
        let prefix = if path.path.is_empty() { "/" } else { &path.path };
        let met = |name: &String, exact: &String| value(name).is_some_and(|value| exact.is_empty() || value == *exact);
        if !ask.path.starts_with(prefix) || !path.headers.iter().all(|(name, wanted)| met(name, &wanted.exact)) {
            continue;
        }
        if *redirect {
            return Got::Redirect;
        }
        let shares = path.splits.iter().flat_map(|split| (0..split.percent).map(move |_| split));
        let shares: Vec<_> = shares.collect();
        let at = u128::from(ask.random) * shares.len() as u128 / (1 << 64);
        let split = shares[usize::try_from(at).unwrap()];
        let mut headers: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in split.append_headers.iter().chain(&path.append_headers) {
            headers.insert(name.to_lowercase(), value.clone());
        }
        let host = Some(path.rewrite_host.clone()).filter(|host| !host.is_empty());
        let asked = value("K-Network-Hash").is_some_and(|value| value == "override");
        return Got::Forward(split.service_name.clone(), headers, host, asked.then(|| owner.hash().unwrap()));
    }
    Got::Unknown
}

const HOSTS: [&str; 9] = [
    "a.n.svc.cluster.local",
    "a.n.svc",
    "a.n",
    "b.example.com",
    "c.example.com",
    "*.example.com",
    "*.com",
    "b.n.svc.cluster.local",
    "d.cluster.local",
];
const PATHS: [&str; 5] = ["", "/", "/p", "/p/q", "/pq"];

fn some<T: Clone + std::fmt::Debug + 'static>(of: &'static [T]) -> impl Strategy<Value = T> {
    prop::sample::select(of)
}

fn path() -> impl Strategy<Value = Value> {
    let header = (some(&["Tag", "Other"]), some(&["x", "", "y,x"]));
    let append = || prop::collection::btree_map(some(&["Set", "set-too"]), some(&["1", "2"]), 0..3);
    let split = (some(&["s", "t", "u"]), some(&[0_i64, 1, 10, 50, 100]), append());
    let splits = prop::collection::vec(split, 0..4);
    let headers = prop::collection::vec(header, 0..3);
    (some(&PATHS), headers, splits, append(), some(&["", "inner.svc"])).prop_map(
        |(path, headers, splits, append, host)| {
            let headers: BTreeMap<_, _> =
                headers.into_iter().map(|(name, exact)| (name, json!({"exact": exact}))).collect();
            let split = |(service, percent, append)| {
                json!({"serviceNamespace": "n", "serviceName": service, "servicePort": 80, "percent": percent,
                   "appendHeaders": append})
            };
            let splits: Vec<Value> = splits.into_iter().map(split).collect();
            json!({"path": path, "headers": headers, "splits": splits, "appendHeaders": append, "rewriteHost": host})
        },
    )
}

fn kings() -> impl Strategy<Value = Vec<KIngress>> {
    let hosts = prop::collection::vec(some(&HOSTS), 0..3);
    let rule = (hosts, some(&["", "ExternalIP", "ClusterLocal"]), prop::collection::vec(path(), 1..4)).prop_map(
        |(hosts, visibility, paths)| json!({"hosts": hosts, "visibility": visibility, "http": {"paths": paths}}),
    );
    let spec = (prop::collection::vec(rule, 1..4), some(&["", "Enabled", "Redirected"]), any::<bool>()).prop_map(
        |(rules, option, tls)| {
            let tls = if tls { json!([{"hosts": ["z"], "secretName": "z"}]) } else { json!([]) };
            json!({"rules": rules, "httpOption": option, "tls": tls})
        },
    );
    let one = (prop::option::of(0_u8..3), spec);
    prop::collection::vec(one, 1..5).prop_map(|all| {
        let named = |(number, (age, spec))| king("n", &format!("k{number}"), age, spec);
        all.into_iter().enumerate().map(named).collect()
    })
}

fn asks() -> impl Strategy<Value = Ask> {
    let host = some(&[
        "a.n.svc.cluster.local",
        "A.n.svc:8080",
        "a.n",
        "b.example.com",
        "C.Example.com:80",
        "x.y.example.com",
        "x.com",
        "b.n",
        "d",
        "nobody",
    ]);
    let header = (some(&["tag", "other", "k-network-hash", "set"]), some(&["x", "y", "override", ""]));
    let headers = prop::collection::vec(header, 0..4);
    let path = some(&["/", "/p", "/p/q/r", "/pq", "/other", "*", ""]);
    (some(&Listener::ALL), host, path, headers, any::<u64>()).prop_map(|(listener, host, path, headers, random)| Ask {
        listener,
        authority: host.to_owned(),
        path: path.to_owned(),
        headers: headers.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        random,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn decisions_are_those_of_the_interpreter(kings in kings(), asks in prop::collection::vec(asks(), 1..24)) {
        let all = translate(&kings);
        let (rules, _) = Rules::compile(&all, "cluster.local");
        for one in &asks {
            prop_assert_eq!(ask(&rules, one), interpret(&kings, one), "{:?}", one);
        }
    }
}

fn simple(authority: &str, path: &str) -> Ask {
    Ask { listener: Listener::External, authority: authority.into(), path: path.into(), headers: vec![], random: 0 }
}

fn to(rules: &Rules, one: &Ask) -> String {
    match ask(rules, one) {
        Got::Forward(service, ..) => service,
        other => format!("{other:?}"),
    }
}

fn split(service: &str, percent: u8) -> Value {
    json!({"serviceNamespace": "n", "serviceName": service, "servicePort": 80, "percent": percent})
}

#[test]
fn the_longest_path_wins_and_headers_come_before_none() {
    let paths = json!([
        {"splits": [split("root", 100)]},
        {"path": "/foo", "splits": [split("foo", 100)]},
        {"path": "/foo/bar", "splits": [split("bar", 100)]},
        {"path": "/foo", "headers": {"Tag": {"exact": "next"}}, "splits": [split("tagged", 100)]},
    ]);
    let spec = json!({"rules": [{"hosts": ["h"], "http": {"paths": paths}}]});
    let all = translate(&[king("n", "k", None, spec)]);
    let (rules, _) = Rules::compile(&all, "cluster.local");
    for (path, want) in [("/", "root"), ("/foo", "foo"), ("/food", "foo"), ("/foo/bar/x", "bar"), ("/fo", "root")] {
        assert_eq!(to(&rules, &simple("h", path)), want, "{path}");
    }
    let mut tagged = simple("h:80", "/foo");
    tagged.headers = vec![("tag".into(), "next".into())];
    assert_eq!(to(&rules, &tagged), "tagged");
    tagged.headers = vec![("tag".into(), "not-next".into())];
    assert_eq!(to(&rules, &tagged), "foo");
}

#[test]
fn shares_are_kept_to_the_last_random_number() {
    let spec = json!({"rules": [{"hosts": ["h"], "http": {"paths": [{"splits": [split("a", 90), split("none", 0), split("b", 10)]}]}}]});
    let all = translate(&[king("n", "k", None, spec)]);
    let (rules, _) = Rules::compile(&all, "cluster.local");
    let of = |random| to(&rules, &Ask { random, ..simple("h", "/") });
    let edge = u64::MAX / 100 * 90;
    assert_eq!(of(0), "a");
    assert_eq!(of(edge - 100), "a");
    assert_eq!(of(edge + 100), "b");
    assert_eq!(of(u64::MAX), "b");
}

#[test]
fn a_host_belongs_to_the_elder() {
    let spec =
        |service| json!({"rules": [{"hosts": ["h", service], "http": {"paths": [{"splits": [split(service, 100)]}]}}]});
    let kings = [king("n", "a", Some(2), spec("young")), king("n", "b", Some(1), spec("old"))];
    let all = translate(&kings);
    let (rules, conflicts) = Rules::compile(&all, "cluster.local");
    assert_eq!(to(&rules, &simple("h", "/")), "old");
    assert_eq!(to(&rules, &simple("young", "/")), "Unknown", "who has a conflict is left out whole");
    let names: Vec<_> = conflicts.iter().map(|(own, other)| (own.name.as_str(), other.name.as_str())).collect();
    assert_eq!(names, [("a", "b")]);
}

#[test]
fn what_is_declared_is_never_anothers_short_form() {
    let spec = |host, service| {
        json!({"rules": [{"hosts": [host], "visibility": "ClusterLocal",
                          "http": {"paths": [{"splits": [split(service, 100)]}]}}]})
    };
    let long = king("n", "a", Some(1), spec("s.n.svc.cluster.local", "long"));
    let short = king("n", "b", Some(2), spec("s.n", "short"));
    let local = |host| Ask { listener: Listener::Local, ..simple(host, "/") };
    let all = translate(std::slice::from_ref(&long));
    let (rules, _) = Rules::compile(&all, "cluster.local");
    assert_eq!(to(&rules, &local("s.n")), "long");
    assert_eq!(to(&rules, &simple("s.n", "/")), "Unknown", "inside only");
    let all = translate(&[long, short]);
    let (rules, conflicts) = Rules::compile(&all, "cluster.local");
    assert_eq!(conflicts, []);
    assert_eq!(to(&rules, &local("s.n")), "short");
    assert_eq!(to(&rules, &local("s.n.svc")), "long");
}

#[test]
fn what_cannot_be_served_says_why() {
    for (spec, want) in [
        (json!({"rules": [{"hosts": ["h"]}]}), "a rule for [\"h\"] has no 'http'"),
        (
            json!({"rules": [{"http": {"paths": [{"splits": [split("a", 0), split("b", 0)]}]}}]}),
            "the splits of path '' have no share of the requests, or a negative one",
        ),
        (
            json!({"rules": [{"http": {"paths": [{"splits": [split("a", 1)], "appendHeaders": {"a b": "c"}}]}}]}),
            "'a b' is not the name of a header",
        ),
        (
            json!({"rules": [{"http": {"paths": [{"splits": [split("a", 1)], "appendHeaders": {"a": "c\n"}}]}}]}),
            "'c\n' cannot be the value of 'a'",
        ),
    ] {
        let backend = |name: BackendName| Arc::new(Backend::new(name, Counters::default()));
        let fault = Translated::new(&king("n", "k", None, spec), backend).unwrap_err();
        assert_eq!(fault.to_string(), want);
    }
}
