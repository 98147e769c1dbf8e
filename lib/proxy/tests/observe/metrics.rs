//! Port 9091 against what stock queue-proxy exposed (`golden/`, recorded).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use lifl_proxy::queue::{Metrics, Observe};

use crate::rig::{App, Pod, ask, eventually, facts, get, listen};

const GOLDEN: &str = include_str!("golden/queue-proxy-9091.txt");
/// Of queue-proxy's process, which there is none of.
const ITS_PROCESS: [&str; 2] = ["process_", "promhttp_"];

/// One family: its type, its help, the names of labels of each of its series in their order, the bounds of buckets.
#[derive(Debug, Default, PartialEq, Eq)]
struct Family {
    kind: String,
    help: String,
    labels: BTreeSet<(String, Vec<String>)>,
    bounds: BTreeSet<String>,
}

fn families(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (what, name, rest) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
            current = name.to_owned();
            let family = families.entry(current.clone()).or_default();
            if what == "TYPE" {
                family.kind = rest.into()
            } else {
                family.help = rest.into()
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').expect("a value");
        assert!(value.parse::<f64>().is_ok(), "{line}");
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let labels = labels.trim_end_matches('}').split_inclusive("\",");
        let labels: Vec<_> = labels.filter_map(|label| label.split_once('=')).collect();
        let family = families.get_mut(&current).expect("a comment comes first");
        let bound = labels.iter().find(|(name, _)| *name == "le").map(|(_, bound)| bound.trim_matches('"').to_owned());
        family.bounds.extend(bound);
        family.labels.insert((name.to_owned(), labels.iter().map(|(name, _)| (*name).to_owned()).collect()));
    }
    families
}

fn value(text: &str, begins: &str, has: &str) -> f64 {
    let mut lines = text.lines().filter(|line| line.starts_with(begins) && line.contains(has));
    let line = lines.next().unwrap_or_else(|| panic!("no {begins} {has}:\n{text}"));
    assert_eq!(lines.next(), None, "more than one {begins} {has}");
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

fn metrics() -> Observe {
    Observe { facts: facts(), port: 8012, metrics: true, ..Observe::default() }
}

async fn scrape(pod: &Pod) -> String {
    let at = listen(Arc::new(Metrics(Arc::clone(&pod.queue)))).await;
    let answer = get(at, "/metrics", "").await;
    let (head, text) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain; version=0.0.4"), "{head}");
    text.to_owned()
}

#[tokio::test]
async fn knative_names_labels_and_types_are_queue_proxys() {
    let pod = Pod::new(25, metrics()).await;
    for _ in 0..10 {
        assert!(get(pod.at, "/", "").await.ends_with("body"));
    }
    let ours = families(&scrape(&pod).await);
    let mut golden = families(GOLDEN);
    golden.retain(|name, _| !ITS_PROCESS.iter().any(|of| name.starts_with(of)));
    assert_eq!(ours.keys().collect::<Vec<_>>(), golden.keys().collect::<Vec<_>>());
    for (name, golden) in &golden {
        let ours = &ours[name];
        assert_eq!((&ours.kind, &ours.help), (&golden.kind, &golden.help), "{name}");
        assert_eq!(ours.labels, golden.labels, "{name}");
        // Of most buckets the recording says nothing.
        assert!(golden.bounds.is_subset(&ours.bounds), "{name}: {:?}", ours.bounds);
    }
    let bounds =
        ["0.005", "0.01", "0.025", "0.05", "0.075", "0.1", "0.25", "0.5", "0.75", "1", "2.5", "5", "7.5", "10"];
    let bounds: BTreeSet<String> = bounds.iter().chain(&["+Inf"]).map(|bound| (*bound).to_owned()).collect();
    for name in ["kn_serving_invocation_duration_seconds", "http_server_request_duration_seconds"] {
        assert_eq!(ours[name].bounds, bounds, "{name}");
    }
}

#[tokio::test]
async fn values_of_labels_are_those_of_the_recording() {
    let pod = Pod::new(25, metrics()).await;
    for _ in 0..10 {
        get(pod.at, "/", "").await;
    }
    let ours = scrape(&pod).await;
    // The app's port and the version of the instrumentation are another's; the rest of a series is the same.
    let shape = |line: &str| {
        let (series, _) = line.rsplit_once(' ').unwrap();
        let series = series.replace(&format!("server_port=\"{}\"", pod.user.port()), "server_port=\"8080\"");
        series.replace(env!("CARGO_PKG_VERSION"), "0.69.0")
    };
    let ours: BTreeSet<String> = ours.lines().filter(|line| !line.starts_with('#')).map(shape).collect();
    let golden = GOLDEN.lines().filter(|line| line.starts_with("http_") || line.starts_with("kn_"));
    for line in golden {
        let (series, _) = line.rsplit_once(' ').unwrap();
        assert!(ours.contains(series), "{series} is not among {ours:#?}");
    }
}

#[tokio::test]
async fn requests_are_counted_with_their_sizes_and_what_became_of_them() {
    let pod = Pod::new(1, metrics()).await;
    let head = "Host: h\r\nConnection: close\r\n";
    ask(pod.at, &format!("POST /201 HTTP/1.1\r\n{head}Content-Length: 6\r\n\r\nupload")).await;
    ask(
        pod.at,
        &format!("POST /201 HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"),
    )
    .await;
    // Probes are nobody's requests, whoever answers them.
    get(pod.at, "/", "K-Network-Probe: queue\r\n").await;
    get(pod.at, "/", "User-Agent: kube-probe/1.34\r\nK-Network-Probe: queue\r\n").await;
    let text = scrape(&pod).await;
    let post = "http_request_method=\"POST\",http_response_status_code=\"201\"";
    for name in ["http_server_request_body_size_bytes", "http_client_request_body_size_bytes"] {
        assert_eq!(value(&text, &format!("{name}_sum"), post).to_string(), "11", "{name}");
        assert_eq!(value(&text, &format!("{name}_count"), "").to_string(), "2", "{name}");
    }
    assert_eq!(value(&text, "http_server_response_body_size_bytes_sum", post).to_string(), "8");
    assert_eq!(value(&text, "kn_serving_invocation_duration_seconds_count", "201").to_string(), "2");
    assert_eq!(value(&text, "kn_serving_queue_depth", "").to_string(), "0");
    // Whole requests take longer than what is in them.
    let sum = |name: &str| value(&text, &format!("{name}_sum"), "");
    let app = sum("kn_serving_invocation_duration_seconds");
    assert!(sum("http_server_request_duration_seconds") >= app && app >= sum("http_client_request_duration_seconds"));
}

#[tokio::test]
async fn an_app_that_does_not_answer_and_a_client_that_leaves_are_told_apart() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let pod = Pod::at(Arc::new(App::default()), closed, 0, metrics()).await;
    assert!(get(pod.at, "/", "").await.starts_with("HTTP/1.1 502"));
    let text = scrape(&pod).await;
    assert_eq!(value(&text, "http_server_request_duration_seconds_count", "status_code=\"502\"").to_string(), "1");
    assert_eq!(value(&text, "http_client_request_duration_seconds_count", "error_type=\"502\"").to_string(), "1");
    assert!(!text.contains("kn_serving_queue_depth"), "a pod without a line has no depth");

    // An app that takes connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let pod = Pod::at(Arc::new(App::default()), silent.local_addr().unwrap(), 0, metrics()).await;
    let request = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
    let mut client = std::net::TcpStream::connect(pod.at).unwrap();
    std::io::Write::write_all(&mut client, request.as_bytes()).unwrap();
    eventually("the request", || pod.queue.stats().present() == 1).await;
    drop(client);
    eventually("its end", || pod.queue.stats().present() == 0).await;
    let text = scrape(&pod).await;
    assert_eq!(value(&text, "http_server_request_duration_seconds_count", "").to_string(), "1");
    assert_eq!(value(&text, "http_server_request_duration_seconds_count", "status_code=\"499\"").to_string(), "1");
}

#[tokio::test]
async fn a_pod_that_was_not_asked_to_has_no_metrics() {
    let pod = Pod::new(0, Observe::default()).await;
    let at = listen(Arc::new(Metrics(Arc::clone(&pod.queue)))).await;
    assert!(get(at, "/metrics", "").await.starts_with("HTTP/1.1 404"));
    let pod = Pod::new(0, metrics()).await;
    let at = listen(Arc::new(Metrics(Arc::clone(&pod.queue)))).await;
    assert!(get(at, "/else", "").await.starts_with("HTTP/1.1 404"));
    let text = get(at, "/metrics", "").await;
    assert!(text.contains("target_info{container_name=\"queue-proxy\"") && !text.contains("http_server"), "{text}");
}
