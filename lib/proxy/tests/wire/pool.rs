//! Connections to endpoints: how long they are kept, and what a dial costs that comes to nothing.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{Request, header};
use http_body_util::BodyExt as _;
use lifl_proxy::{Body, Dial, Endpoint, Pool, PoolLimits, Protocol, queue::Settings, upstream::Sent};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};

use crate::rig::{Counted, Served, answers, eventually, probe, settings};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const PROBE: &str = "GET / HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1\r\nK-Network-Probe: queue\r\n\r\n";

fn get() -> Request<Body> {
    Request::get("/").header(header::HOST, "h").body(Body::empty()).expect("a request")
}

#[tokio::test]
async fn connections_end_with_the_last_who_sends_there() {
    let (addr, _asked, _task) = answers(OK).await;
    let pool = Pool::new(Counted::default(), PoolLimits::default());
    let upstream = pool.upstream(Endpoint { addr, protocol: Protocol::H1, place: 0 });
    let Sent::Response(response) = upstream.send(get()).await.expect("an answer") else { panic!("a switch") };
    response.into_body().collect().await.expect("a body");
    assert_eq!((upstream.idle(), pool.connections()), (1, 1));
    let Sent::Response(late) = upstream.send(get()).await.expect("an answer") else { panic!("a switch") };
    drop(upstream);
    late.into_body().collect().await.expect("a body that was under way is whole");
    eventually("it is closed", || pool.connections() == 0).await;
    let upstream = pool.upstream(Endpoint { addr, protocol: Protocol::H1, place: 0 });
    let Sent::Response(response) = upstream.send(get()).await.expect("an answer") else { panic!("a switch") };
    response.into_body().collect().await.expect("a body");
    drop(upstream);
    eventually("an idle one is closed too", || pool.connections() == 0).await;
}

#[tokio::test]
async fn probes_of_another_port_leave_no_connections() {
    let (user, _asked, _user) = answers(OK).await;
    let (other, _asked, _other) = answers(OK).await;
    let port = other.port();
    let readiness =
        probe(&format!(r#"{{"httpGet":{{"path":"/","port":{port}}},"periodSeconds":1,"timeoutSeconds":5}}"#));
    let served = Served::new(user, Settings { readiness, ..settings() }).await;
    for _ in 0..10 {
        assert_eq!(served.ask(PROBE).await.status(), "200");
    }
    assert_eq!(served.dialled.0.load(Ordering::SeqCst), 10);
    eventually("they are closed", || served.pool.connections() <= 1).await;
}

/// Answers no dial, and says so late.
#[derive(Clone, Default)]
struct Deaf(Arc<AtomicUsize>);

impl Dial for Deaf {
    async fn dial(&self, _: &Endpoint) -> io::Result<TcpStream> {
        self.0.fetch_add(1, Ordering::SeqCst);
        sleep(Duration::from_secs(5)).await;
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_dial_shares_what_it_comes_to() {
    let deaf = Deaf::default();
    let pool = Pool::new(deaf.clone(), PoolLimits::default());
    let addr = "127.0.0.1:1".parse().expect("an address");
    let upstream = pool.upstream(Endpoint { addr, protocol: Protocol::H2c, place: 0 });
    let begun = Instant::now();
    let ask = || async {
        let error = upstream.send(get()).await.expect_err("no connection");
        (begun.elapsed().as_secs(), error.to_string())
    };
    let late = async {
        sleep(Duration::from_secs(6)).await;
        ask().await
    };
    let (a, b, c, late) = tokio::join!(ask(), ask(), ask(), late);
    assert_eq!((a.0, b.0, c.0), (5, 5, 5));
    assert_eq!((&a.1, &a.1), (&b.1, &c.1));
    assert_eq!((late.0, deaf.0.load(Ordering::SeqCst)), (11, 2), "who comes later tries anew");
}
