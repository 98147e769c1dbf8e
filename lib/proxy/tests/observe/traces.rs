//! Spans of a pod, as a collector decodes them.

use std::sync::atomic::Ordering;

use lifl_proxy::{
    Direct, Pool, PoolLimits,
    observe::{CollectorAddress, Exporter, SpanCounts, Tracer, Wire},
    queue::{Observe, resource},
};

use crate::{
    collector::{Collector, Seen},
    rig::{Pod, eventually, facts, get},
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn tracer(at: std::net::SocketAddr, wire: Wire, sample: f64, counts: &SpanCounts) -> Tracer {
    let pool = Pool::new(Direct, PoolLimits::default());
    let address = CollectorAddress::parse(&format!("http://{at}"), wire).expect("an address");
    Tracer::new(Exporter::start(&pool, 0, address, counts), resource(&facts()), sample)
}

async fn pod(concurrency: usize, tracer: &Tracer) -> Pod {
    Pod::new(concurrency, Observe { facts: facts(), traces: Some(tracer.clone()), ..Observe::default() }).await
}

fn one<'a>(spans: &'a [Seen], name: &str, kind: i32) -> &'a Seen {
    let mut found = spans.iter().filter(|span| span.name == name && span.kind == kind);
    let span = found.next().unwrap_or_else(|| panic!("no {name} among {spans:#?}"));
    assert!(found.next().is_none(), "two {name}");
    span
}

#[tokio::test]
async fn a_request_that_is_traced_has_spans_down_to_the_app() {
    for wire in [Wire::Http, Wire::Grpc] {
        let (collector, at) = Collector::start().await;
        let counts = SpanCounts::default();
        let tracer = tracer(at, wire, 0.0, &counts);
        let pod = pod(1, &tracer).await;
        let headers = format!("traceparent: 00-{TRACE}-{PARENT}-01\r\ntracestate: a=1,b=2\r\nUser-Agent: me\r\n");
        get(pod.at, "/503?secret=1", &headers).await;
        tracer.flush().await;
        let spans = collector.spans(4).await;
        let server = one(&spans, "GET", 2);
        let (proxy, wait) = (one(&spans, "kn.queueproxy.proxy", 1), one(&spans, "kn.queueproxy.wait", 1));
        let client = one(&spans, "GET", 3);
        assert!(spans.iter().all(|span| span.trace == TRACE && span.times.0 <= span.times.1), "{spans:#?}");
        let parents = [&server.parent, &proxy.parent, &wait.parent, &client.parent];
        assert_eq!(parents, [PARENT, server.id.as_str(), proxy.id.as_str(), proxy.id.as_str()]);
        assert!(wait.times.1 == client.times.0 && client.times.1 <= server.times.1);
        assert_eq!(pod.saw("traceparent"), format!("00-{TRACE}-{}-01", client.id), "the app's parent");
        assert_eq!(pod.saw("tracestate"), "a=1,b=2");
        let rows = [
            ("http.request.method", "GET"),
            ("http.response.status_code", "503"),
            ("url.path", "/503"),
            ("url.scheme", "http"),
            ("server.address", "shop.example"),
            ("server.port", "81"),
            ("network.protocol.version", "1.1"),
            ("client.address", "127.0.0.1"),
            ("user_agent.original", "me"),
            ("error.type", "503"),
            ("http.response.body.size", "4"),
        ];
        for (key, value) in rows {
            assert_eq!(server.attribute(key), value, "{key}");
        }
        assert!(server.failed && client.failed && !wait.failed);
        assert_eq!(client.attribute("server.port"), pod.user.port().to_string());
        assert_eq!(server.resource("service.name"), "meter");
        assert_eq!(server.resource("k8s.pod.name"), "meter-one-deployment-1");
        assert_eq!((counts.exported(), counts.dropped(), counts.failed()), (4, 0, 0));
    }
}

#[tokio::test]
async fn who_asks_decides_and_where_nobody_does_the_share() {
    let (collector, at) = Collector::start().await;
    let counts = SpanCounts::default();
    let (always, never) = (tracer(at, Wire::Http, 1.0, &counts), tracer(at, Wire::Http, 0.0, &counts));
    let pod_of = pod(0, &always).await;
    get(pod_of.at, "/", &format!("traceparent: 00-{TRACE}-{PARENT}-00\r\n")).await;
    assert_eq!(pod_of.saw("traceparent"), format!("00-{TRACE}-{PARENT}-00"), "passed on as it was");
    get(pod_of.at, "/", "traceparent: nonsense\r\ntracestate: of=it\r\n").await;
    always.flush().await;
    let spans = collector.spans(3).await;
    let server = one(&spans, "GET", 2);
    assert_eq!((server.parent.as_str(), server.trace.len()), ("", 32), "a trace begins");
    assert_eq!(pod_of.saw("traceparent"), format!("00-{}-{}-01", server.trace, one(&spans, "GET", 3).id));
    assert_eq!(pod_of.saw("tracestate"), "", "of a trace that was none");

    let pod_of = pod(0, &never).await;
    get(pod_of.at, "/", "").await;
    let told = pod_of.saw("traceparent");
    assert!(told.ends_with("-00") && told.len() == 55, "the dice are thrown once: {told:?}");
    never.flush().await;
    collector.spans(3).await;
}

#[tokio::test]
async fn without_a_tracer_headers_are_passed_on_and_nothing_else() {
    let pod = Pod::new(0, Observe::default()).await;
    get(pod.at, "/", &format!("traceparent: 00-{TRACE}-{PARENT}-01\r\ntracestate: a=1\r\n")).await;
    assert_eq!(pod.saw("traceparent"), format!("00-{TRACE}-{PARENT}-01"));
    assert_eq!(pod.saw("tracestate"), "a=1");
    get(pod.at, "/", "").await;
    assert_eq!(pod.saw("traceparent"), "");
}

#[tokio::test]
async fn a_collector_that_cannot_take_spans_is_asked_again_and_one_that_is_away_costs_no_request() {
    let (collector, at) = Collector::start().await;
    collector.refuses.store(1, Ordering::SeqCst);
    let counts = SpanCounts::default();
    let tracer_of = tracer(at, Wire::Http, 1.0, &counts);
    let pod_of = pod(0, &tracer_of).await;
    get(pod_of.at, "/", "").await;
    tracer_of.flush().await;
    collector.spans(3).await;
    assert_eq!((collector.posts.load(Ordering::SeqCst), counts.exported()), (2, 3));

    let away = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let tracer_of = tracer(away, Wire::Http, 1.0, &counts);
    let pod_of = pod(0, &tracer_of).await;
    for _ in 0..5 {
        assert!(get(pod_of.at, "/", "").await.ends_with("body"));
    }
    drop((pod_of, tracer_of));
    eventually("an end of the tries", || counts.failed() == 15).await;
}
