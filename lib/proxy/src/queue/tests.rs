//! The parts of a queue that need no wire.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use super::*;
use crate::{endpoint::Direct, upstream::PoolLimits};

fn queue(readiness: &str, user: SocketAddr) -> Arc<Queue<Direct>> {
    let settings = Settings {
        pod_name: "pod".into(),
        concurrency: 0,
        timeouts: Timeouts::default(),
        readiness: Probe::parse(readiness).expect("probes"),
        http2_auto_detect: false,
    };
    Arc::new(Queue::new(&Pool::new(Direct, PoolLimits::default()), user, 0, settings))
}

fn closed() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address")
}

#[tokio::test(start_paused = true)]
async fn knative_a_drain_ends_after_thirty_quiet_seconds() {
    let queue = queue("[]", closed());
    let begun = Instant::now();
    queue.drain().done().await;
    assert_eq!(begun.elapsed().as_secs(), 0, "an open pod has nothing to wait for");
    queue.terminate();
    assert!(queue.drain().draining());
    let drain = Arc::clone(queue.drain());
    let requests = tokio::spawn(async move {
        for _ in 0..4 {
            sleep(Duration::from_secs(10)).await;
            drain.touch();
        }
    });
    queue.drain().done().await;
    assert_eq!(begun.elapsed().as_secs(), 40 + 30, "each request puts the end off");
    requests.await.expect("requests");
    queue.drain().touch();
    queue.drain().done().await;
    assert_eq!(begun.elapsed().as_secs(), 70, "drained is for good");
    assert!(queue.drain().draining(), "and probes go on failing");
}

#[tokio::test(start_paused = true)]
async fn knative_a_hook_without_sigterm_is_a_restart() {
    let queue = queue("[]", closed());
    let begun = Instant::now();
    Drain::wait(queue.drain()).await;
    assert_eq!((begun.elapsed().as_secs(), queue.drain().draining()), (10, false), "the container is restarted");
    let (hook, term) = (Drain::wait(queue.drain()), async {
        sleep(Duration::from_secs(9)).await;
        queue.terminate();
    });
    tokio::join!(hook, term);
    assert_eq!((begun.elapsed().as_secs(), queue.drain().draining()), (40, true), "with SIGTERM the hook waits");
    drop(tokio::time::timeout(Duration::ZERO, Drain::wait(queue.drain())).await);
    sleep(Duration::from_secs(15)).await;
    assert!(queue.drain().draining(), "a hook that comes later opens nothing");
}

#[tokio::test(start_paused = true)]
async fn the_last_hook_alone_opens_a_pod_again() {
    let queue = queue("[]", closed());
    let hook = || async { drop(tokio::time::timeout(Duration::from_secs(7), Drain::wait(queue.drain())).await) };
    hook().await;
    hook().await;
    assert!(queue.drain().draining(), "14 s after the first hook, 7 s after the second");
    sleep(Duration::from_secs(4)).await;
    assert!(!queue.drain().draining());
}

#[test]
fn knative_probes_are_read_as_kubernetes_writes_them() {
    let one = r#"{"httpGet":{"path":"/ok","port":8080,"host":"127.0.0.1","scheme":"HTTP","httpHeaders":[{"name":"a","value":"b"}]},
        "successThreshold":1}"#;
    let user = "127.0.0.1:8080".parse().expect("address");
    assert_eq!(Probe::parse(one).expect("a probe").len(), 1);
    assert_eq!(Probe::parse(&format!("[{one},{one}]")).expect("probes").len(), 2);
    assert!(Probe::parse("nonsense").is_err());
    let rows = [
        (r#"{"tcpSocket":{"port":81}}"#, "127.0.0.1:81", Protocol::H1),
        (r#"{"tcpSocket":{"port":"user-port","host":"127.0.0.2"}}"#, "127.0.0.2:8080", Protocol::H1),
        (r#"{"grpc":{"port":82,"service":null}}"#, "127.0.0.1:82", Protocol::H2c),
        (r#"{"exec":{"command":["true"]}}"#, "127.0.0.1:8080", Protocol::H1),
        (r#"{"httpGet":{"port":0}}"#, "127.0.0.1:8080", Protocol::H1),
    ];
    for (text, addr, protocol) in rows {
        let expected = Endpoint { addr: addr.parse().expect("address"), protocol, place: 7 };
        assert_eq!(Probe::parse(text).expect("a probe")[0].endpoint(user, 7), expected, "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn knative_an_aggressive_probe_tries_for_ten_seconds() {
    let queue = queue(r#"{"tcpSocket":{"port":0},"successThreshold":1}"#, closed());
    let begun = Instant::now();
    assert!(!queue.ready().await);
    let waited = begun.elapsed();
    assert!(waited > Duration::from_millis(9_800) && waited <= Duration::from_secs(10), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn knative_a_probe_with_a_period_tries_once() {
    let queue = queue(r#"{"tcpSocket":{"port":0},"periodSeconds":1,"timeoutSeconds":3}"#, closed());
    let begun = Instant::now();
    assert!(!queue.ready().await);
    assert!(begun.elapsed() <= Duration::from_secs(3));
}

#[tokio::test(start_paused = true)]
async fn knative_successes_must_be_in_a_row() {
    let probe = &Probe::parse(r#"{"tcpSocket":{"port":0},"successThreshold":3}"#).expect("a probe")[0];
    let tries = AtomicUsize::new(0);
    // Fails at the third try: passes at the sixth.
    let passed = readiness::repeat(probe, || async { tries.fetch_add(1, Ordering::SeqCst) != 2 }).await;
    assert_eq!((passed, tries.load(Ordering::SeqCst)), (true, 6));
}

#[tokio::test]
async fn checks_that_overlap_share_one_run() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let user = listener.local_addr().expect("an address");
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let accepting = tokio::spawn(async move {
        let mut kept = vec![];
        loop {
            kept.push(listener.accept().await.expect("a connection"));
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let queue = queue(r#"{"tcpSocket":{"port":0}}"#, user);
    let (a, b, c) = tokio::join!(queue.ready(), queue.ready(), queue.ready());
    assert!(a && b && c);
    assert!(queue.ready().await);
    while seen.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    accepting.abort();
    assert_eq!(seen.load(Ordering::SeqCst), 2, "three at once are one run, a later one is another");
}

#[tokio::test]
async fn a_handler_goes_into_a_stack_of_tower_layers() {
    let peer = Peer::new("192.0.2.1:5000".parse().expect("an address"));
    let service = tower::ServiceBuilder::new()
        .map_request(|mut request: Request<Body>| {
            request.headers_mut().insert(K_NETWORK_PROBE, HeaderValue::from_static("probe"));
            request.headers_mut().insert(K_NETWORK_HASH, HeaderValue::from_static("abc"));
            request
        })
        .service(Service::new(queue("[]", closed()), peer));
    let response = tower::ServiceExt::oneshot(service, Request::new(Body::empty())).await.expect("an answer");
    assert_eq!(
        (response.status(), &response.headers()[K_NETWORK_HASH]),
        (StatusCode::OK, &HeaderValue::from_static("abc"))
    );
}
