//! What watching costs a request: nanoseconds of one that is refused at once, by what is seen of it.

use std::{io, sync::Arc, time::Instant};

use http::{Request, header};
use lifl_proxy::{
    Body, Dial, Endpoint, Handle, Peer, Pool, PoolLimits, Timeouts,
    observe::{CollectorAddress, Exporter, Facts, Lines, SpanCounts, Template, Tracer, Wire},
    queue::{Observe, Queue, RequestLog, Settings, resource},
};
use tokio::{net::TcpStream, runtime::Builder};

struct Never;

impl Dial for Never {
    async fn dial(&self, _: &Endpoint) -> io::Result<TcpStream> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

fn request() -> Request<Body> {
    Request::get("/some/path?a=b")
        .header(header::HOST, "shop.example.com")
        .header(header::USER_AGENT, "curl/8.5.0")
        .header(header::ACCEPT, "*/*")
        .header("x-forwarded-proto", "http")
        .body(Body::empty())
        .expect("a request")
}

fn main() {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let out = runtime.block_on(async { tokio::spawn(measure()).await }).expect("no panic");
    for (name, nanos) in out {
        eprintln!("{name:30} {nanos:6} ns");
    }
}

async fn measure() -> Vec<(&'static str, u128)> {
    let facts = Facts { pod: "p".into(), revision: "r".into(), address: "10.0.0.1".into(), ..Facts::default() };
    let counts = SpanCounts::default();
    let to = CollectorAddress::parse("http://127.0.0.1:9", Wire::Http).expect("an address");
    let tracer = |sample| {
        let exporter = Exporter::start(&Pool::new(Never, PoolLimits::default()), 0, to.clone(), &counts);
        Tracer::new(exporter, resource(&facts), sample)
    };
    let off = || Observe { facts: facts.clone(), port: 8012, ..Observe::default() };
    let log = || RequestLog {
        lines: Lines::to(Box::new(io::sink()), 1 << 20),
        template: Template::parse(Template::DEFAULT).expect("a template"),
        probes: false,
    };
    let kinds: Vec<(&str, Observe)> = vec![
        ("nothing", off()),
        ("metrics", Observe { metrics: true, ..off() }),
        ("log", Observe { log: Some(log()), ..off() }),
        ("traces, none sampled", Observe { traces: Some(tracer(0.0)), ..off() }),
        ("traces, all sampled", Observe { traces: Some(tracer(1.0)), ..off() }),
    ];
    let peer = Peer::new("10.0.0.9:1234".parse().expect("an address"));
    let mut best = vec![u128::MAX; kinds.len()];
    for _round in 0..400 {
        for (at, (_, observe)) in kinds.iter().enumerate() {
            let pool = Pool::new(Never, PoolLimits::default());
            let settings = Settings {
                pod_name: "p".into(),
                concurrency: 10,
                timeouts: Timeouts::default(),
                readiness: vec![],
                http2_auto_detect: false,
            };
            let user = "127.0.0.1:8080".parse().expect("an address");
            let queue = Arc::new(Queue::new(&pool, user, 0, settings).observed(observe.clone()));
            const COUNT: u128 = 200;
            for _ in 0..5 {
                drop(queue.handle(request(), &peer).await);
            }
            let begun = Instant::now();
            for _ in 0..COUNT {
                drop(queue.handle(request(), &peer).await);
            }
            best[at] = best[at].min(begun.elapsed().as_nanos() / COUNT);
        }
    }
    kinds.iter().zip(best).map(|((name, _), nanos)| (*name, nanos)).collect()
}
