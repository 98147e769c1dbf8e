//! Knative's request log: a template a pod, lines for requests and, if wanted, for probes.

use std::time::Duration;

use lifl_proxy::{
    observe::{Lines, Template},
    queue::{Observe, RequestLog},
};

use crate::rig::{Pod, Written, facts, get};

async fn logged(template: &str, probes: bool) -> String {
    let written = Written::default();
    let lines = Lines::to(Box::new(written.clone()), 1 << 16);
    let template = Template::parse(template).expect("a template");
    let log = Some(RequestLog { lines: lines.clone(), template, probes });
    let pod = Pod::new(1, Observe { facts: facts(), log, ..Observe::default() }).await;
    let trace = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n";
    get(pod.at, "/404?a=%22b", &format!("User-Agent: x\"y\r\n{trace}")).await;
    get(pod.at, "/healthz", "User-Agent: kube-probe/1.34\r\nK-Network-Probe: queue\r\n").await;
    assert!(lines.flush(Duration::from_secs(20)));
    written.text()
}

#[tokio::test]
async fn knative_a_line_tells_of_a_request_and_not_of_probes() {
    let text = logged(Template::DEFAULT, false).await;
    assert_eq!(text.lines().count(), 1, "{text}");
    let line: serde_json::Value = serde_json::from_str(text.trim()).expect("JSON");
    let request = &line["httpRequest"];
    assert_eq!((&request["status"], &request["responseSize"]), (&404.into(), &"4".into()));
    assert_eq!((&request["requestUrl"], &request["userAgent"]), (&"/404?a=%22b".into(), &"x\"y".into()));
    assert_eq!((&request["serverIp"], &request["protocol"]), (&"10.244.0.66".into(), &"HTTP/1.1".into()));
    assert_eq!(line["traceId"], "0af7651916cd43dd8448eb211c80319c");
    let latency = request["latency"].as_str().and_then(|text| text.strip_suffix('s')).expect("seconds");
    assert!(latency.parse::<f64>().is_ok_and(|seconds| seconds > 0.0), "{latency}");
}

#[tokio::test]
async fn probes_have_lines_where_they_are_wanted() {
    let text = logged("{{.Request.URL.Path}} {{.Response.Code}} {{.Response.Size}} {{.Revision.Name}}", true).await;
    assert_eq!(text, "/404 404 4 meter-one\n/healthz 200 5 meter-one\n");
}
