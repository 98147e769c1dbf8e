//! A corpus of raw HTTP/1.1 request streams, sent through us and through Debian's nginx and haproxy: endpoints must see
//! the same requests, or we refuse. A stream that two servers cut into different requests is how requests are smuggled.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use libtest_mimic::{Arguments, Failed, Trial};
use lifl_proxy::{
    Body, Direct, Endpoint, Handle, Limits, Peer, Pool, PoolLimits, Protocol, Server, Timeouts,
    queue::{Queue, Settings},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};

mod rows;

/// Follows each row; a server that has understood the row closes after it.
const END: &str = "GET /{t}/end HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
/// A server that still waits after this waits for more of a body.
const WAITS: Duration = Duration::from_secs(3);
/// Rows at once.
const AT_ONCE: usize = 16;

/// Rows that we pass on and an opponent refuses, with the reason why that is right. By the beginning of the name.
const LAXER: &[(&str, &str)] = &[
    ("a length and Transfer-Encoding: ", CHUNKS_WIN),
    ("named ", CHUNKS_WIN),
    ("length, then chunks", CHUNKS_WIN),
    ("chunks, then length", CHUNKS_WIN),
    ("Content-Length: \"\\t5\"", TAB),
    ("Content-Length: \"5\\t\"", TAB),
    ("Transfer-Encoding: \"\\tchunked\"", TAB),
    ("Transfer-Encoding: \"chunked\\t\"", TAB),
    ("Content-Length: \"0\"", "what follows is 'helloGET', a method: methods are tokens"),
    ("line \"get", "methods are tokens, and Go passes them on"),
    ("line \"TRACE", "RFC 9110 has it, and Go passes it on"),
    ("line \"GET http://other", "RFC 9112 3.2.2: the target's host counts, Host is replaced"),
    ("line \"GET /{t}/a#frag", "the fragment is not passed on"),
    ("empty host", "RFC 9112 3.2 allows it, and Go passes it on"),
    ("field \"Content-Length: 0\\r\\nContent-Length: 0\"", SAME),
    ("two lengths, one body", SAME),
    ("asterisk", "RFC 9110 9.3.7 has it, and Go passes it on"),
];
const CHUNKS_WIN: &str = "RFC 9112 6.3: chunks win, the length is not passed on, and the connection is closed after it";
const SAME: &str = "RFC 9112 6.3: equal lengths are one, which hyper makes of them";
const TAB: &str = "RFC 9110 5.6.3: optional white space";

/// A request as an endpoint saw it: method, target, body.
type Seen = (String, String, Bytes);

/// Requests by token; those whose body was cut off are not in it.
#[derive(Clone, Default)]
struct Record(Arc<Mutex<HashMap<String, Vec<Seen>>>>);

struct Opponent(Child);

fn main() {
    let arguments = Arguments::from_args();
    let trials = [("nginx", nginx as Start), ("haproxy", haproxy as Start)].map(|(name, start)| {
        let found = ["/usr/sbin", "/usr/bin", "/usr/local/sbin"].iter().any(|at| Path::new(at).join(name).exists());
        let title = format!("corpus_{name}{}", if found { "" } else { " (not installed: apt install it)" });
        Trial::test(title, move || against(name, start)).with_ignored_flag(!found)
    });
    let hyper = Trial::test("corpus_hyper", against_hyper);
    let enough = Trial::test("corpus_size", || {
        let count = rows::rows().len();
        if count >= 150 { Ok(()) } else { Err(format!("{count} rows").into()) }
    });
    libtest_mimic::run(&arguments, trials.into_iter().chain([hyper, enough]).collect()).exit();
}

type Start = fn(&Path, SocketAddr, SocketAddr) -> std::io::Result<Child>;

fn nginx(folder: &Path, listen: SocketAddr, endpoint: SocketAddr) -> std::io::Result<Child> {
    let at = folder.display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {at}/{kind};"))
        .concat();
    let text = format!(
        "daemon off; master_process off; pid {at}/pid; error_log {at}/error; events {{}}
        http {{ access_log off; {temporary} server {{ listen {listen}; location / {{
            proxy_pass http://{endpoint}; proxy_http_version 1.1; proxy_set_header Connection \"\"; }} }} }}"
    );
    let file = folder.join("nginx.conf");
    std::fs::write(&file, text)?;
    Command::new("nginx")
        .env("PATH", "/usr/sbin:/usr/bin:/usr/local/sbin")
        .arg("-c")
        .arg(file)
        .stderr(Stdio::null())
        .spawn()
}

fn haproxy(folder: &Path, listen: SocketAddr, endpoint: SocketAddr) -> std::io::Result<Child> {
    let text = format!(
        "defaults\n mode http\n timeout client 30s\n timeout server 30s\n timeout connect 5s\n\
        frontend f\n bind {listen}\n default_backend b\nbackend b\n server s {endpoint}\n"
    );
    let file = folder.join("haproxy.cfg");
    std::fs::write(&file, text)?;
    Command::new("haproxy")
        .env("PATH", "/usr/sbin:/usr/bin:/usr/local/sbin")
        .args(["-db", "-f"])
        .arg(file)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
}

fn against(name: &str, start: Start) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let (theirs, endpoint) = Record::listen().await?;
        let listen = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
        let opponent = Opponent(start(folder.path(), listen, endpoint)?);
        let mut tries = 0;
        while TcpStream::connect(listen).await.is_err() {
            tries += 1;
            if tries > 500 {
                return Err(format!("{name} does not listen").into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (ours, endpoint) = Record::listen().await?;
        let proxy = us(endpoint).await?;
        let rows = Arc::new(rows::rows());
        let (their_seen, our_seen) = tokio::join!(run(&rows, listen, &theirs), run(&rows, proxy, &ours));
        drop(opponent);
        compare(name, &rows, &their_seen, &our_seen)
    })
}

/// hyper's own server as a judge: it is asked directly, so what it sees is what stands in the stream.
fn against_hyper() -> Result<(), Failed> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let theirs = Record::default();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let listen = listener.local_addr()?;
        let record = theirs.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let record = record.clone();
                let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                    let record = record.clone();
                    async move {
                        record.note(request).await;
                        Ok::<_, std::convert::Infallible>(Response::new(String::new()))
                    }
                });
                let io = hyper_util::rt::TokioIo::new(stream);
                tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
            }
        });
        let (ours, endpoint) = Record::listen().await?;
        let proxy = us(endpoint).await?;
        let rows = Arc::new(rows::rows());
        let (their_seen, our_seen) = tokio::join!(run(&rows, listen, &theirs), run(&rows, proxy, &ours));
        compare("hyper", &rows, &their_seen, &our_seen)
    })
}

fn compare(name: &str, rows: &[rows::Row], their_seen: &[Vec<Seen>], our_seen: &[Vec<Seen>]) -> Result<(), Failed> {
    let mut faults = vec![];
    for (number, (row, bytes)) in rows.iter().enumerate() {
        let (theirs, ours) = (&their_seen[number], &our_seen[number]);
        let known = LAXER.iter().any(|(begins, _)| row.starts_with(begins));
        // Fewer is a refusal: what was passed on is the same.
        let refused = theirs.starts_with(ours);
        let laxer = ours.starts_with(theirs) && ours.len() > theirs.len();
        let smuggled = |seen: &[Seen]| seen.iter().any(|(_, target, _)| target.ends_with("/smuggled"));
        let right = refused || laxer && known;
        if !right || smuggled(ours) && !smuggled(theirs) {
            let word = if laxer { "we pass on what is refused" } else { "other requests" };
            faults.push(format!("{number} {row}: {word}\n  stream {bytes:?}\n  {name} {theirs:?}\n  ours {ours:?}"));
        }
    }
    let ends = our_seen.iter().filter(|seen| !seen.is_empty()).count();
    if ends < rows.len() / 4 {
        faults.push(format!("only {ends} of {} rows are understood at all", rows.len()));
    }
    if faults.is_empty() { Ok(()) } else { Err(format!("{}\n{} faults", faults.join("\n"), faults.len()).into()) }
}

async fn us(endpoint: SocketAddr) -> std::io::Result<SocketAddr> {
    let pool = Pool::new(Direct, PoolLimits::default());
    let settings = Settings {
        pod_name: "pod".into(),
        concurrency: 0,
        timeouts: Timeouts::default(),
        readiness: vec![],
        http2_auto_detect: false,
    };
    debug_assert_eq!(pool.upstream(Endpoint::plain(endpoint, Protocol::H1)).idle(), 0);
    let server = Server::new(Arc::new(Queue::new(&pool, endpoint, 0, settings)), Limits::default());
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?;
    tokio::spawn(async move { server.listen(&listener).await });
    Ok(addr)
}

/// What the endpoint behind `proxy` saw of each row.
async fn run(rows: &Arc<Vec<rows::Row>>, proxy: SocketAddr, record: &Record) -> Vec<Vec<Seen>> {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let tasks: Vec<_> = (0..rows.len())
        .map(|number| {
            let (rows, places) = (Arc::clone(rows), Arc::clone(&places));
            tokio::spawn(async move {
                let _place = places.acquire().await;
                let token = format!("row{number}");
                // Latin-1: a row's letters are bytes.
                let text = format!("{}{END}", rows[number].1).replace("{t}", &token);
                let bytes: Vec<u8> = text.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect();
                let Ok(mut stream) = TcpStream::connect(proxy).await else { return };
                if stream.write_all(&bytes).await.is_ok() {
                    let mut answer = vec![];
                    let _waits = timeout(WAITS, stream.read_to_end(&mut answer)).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    let seen = record.0.lock().expect("no panic");
    (0..rows.len()).map(|number| seen.get(&format!("row{number}")).cloned().unwrap_or_default()).collect()
}

// === impl Record ===

impl Record {
    async fn listen() -> std::io::Result<(Self, SocketAddr)> {
        let record = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let server = Server::new(Arc::new(record.clone()), Limits::default());
        tokio::spawn(async move { server.listen(&listener).await });
        Ok((record, addr))
    }
}

impl Handle for Record {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        self.note(request).await;
        Response::new(Body::empty())
    }
}

impl Record {
    /// Keeps a request, if its body comes to its end.
    async fn note<B: hyper::body::Body>(&self, request: Request<B>) {
        let (parts, body) = request.into_parts();
        if let Ok(body) = body.collect().await {
            let target = parts.uri.path_and_query().map_or_else(|| parts.uri.to_string(), ToString::to_string);
            let token =
                target.split(['/', '?', '#']).find(|part| part.starts_with("row")).unwrap_or_default().to_owned();
            let seen = (parts.method.to_string(), target, body.to_bytes());
            self.0.lock().expect("no panic").entry(token).or_default().push(seen);
        }
    }
}

// === impl Opponent ===

impl Drop for Opponent {
    fn drop(&mut self) {
        // Ours by its handle, whatever else runs under this name.
        let _gone_already = self.0.kill();
        let _status = self.0.wait();
    }
}
