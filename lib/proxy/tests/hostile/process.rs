//! The proxy as a process, and the endpoint behind it.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{Child, ChildStdin, Command, ExitCode, Stdio},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use libtest_mimic::Failed;
use lifl_proxy::{
    Body, Direct, Handle, Limits, Peer, Pool, PoolLimits, Server, Timeouts,
    queue::{Queue, Settings},
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;

/// Argument of the process that is the proxy: then the endpoint's address, how many connections it takes, and for how many
/// seconds a client may take nothing.
pub(crate) const PROXY: &str = "proxy-of-the-hostile";
/// Short, so that a test need not wait long for what is cut off.
pub(crate) const HEAD: Duration = Duration::from_secs(2);
/// Seconds that a client may take nothing.
pub(crate) const STALL: u64 = 3;
/// Longer than any test.
pub(crate) const FOR_EVER: u64 = 3600;
/// Of an endless answer.
const PIECE: [u8; 16 << 10] = [b'x'; 16 << 10];

/// A proxy; ends with its value.
pub(crate) struct Proxy {
    child: Child,
    stop: Option<ChildStdin>,
    pub(crate) addr: SocketAddr,
}

/// Answers at `/`, never at `/wait` (and reads nothing of the request), without end at `/big`, a
/// piece at `/page`.
struct App;

/// Serves until its standard input ends.
pub(crate) fn proxy(endpoint: &str, connections: &str, stall: &str) -> ExitCode {
    let served = || -> io::Result<()> {
        all_descriptors()?;
        let endpoint = endpoint.parse().map_err(io::Error::other)?;
        let connections = connections.parse().map_err(io::Error::other)?;
        let stall = Duration::from_secs(stall.parse().map_err(io::Error::other)?);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        // Whoever may stall for ever may do so in its head.
        let head = if stall.as_secs() == FOR_EVER { stall } else { HEAD };
        let limits = Limits { connections, head, stall, ..Limits::default() };
        let addr = runtime.block_on(async {
            let pool = Pool::new(Direct, PoolLimits::default());
            let settings = Settings {
                pod_name: "pod".into(),
                concurrency: 0,
                timeouts: Timeouts { total: Duration::from_secs(300), ..Timeouts::default() },
                readiness: vec![],
                http2_auto_detect: false,
            };
            let server = Server::new(Arc::new(Queue::new(&pool, endpoint, 0, settings)), limits);
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let addr = listener.local_addr()?;
            tokio::spawn(async move { server.listen(&listener).await });
            io::Result::Ok(addr)
        })?;
        writeln!(io::stdout(), "{addr}")?;
        let _until_it_ends = io::stdin().lines().count();
        runtime.shutdown_background();
        Ok(())
    };
    match served() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// As many as this user may have.
pub(crate) fn all_descriptors() -> io::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// An endpoint of this process.
pub(crate) async fn endpoint() -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?;
    // It trusts the proxy: what it is flooded with is what the proxy lets pass.
    let limits = Limits { streams: 10_000, resets: 10_000, ..Limits::default() };
    let server = Server::new(Arc::new(App), limits);
    tokio::spawn(async move { server.listen(&listener).await });
    Ok(addr)
}

// === impl App ===

impl Handle for App {
    async fn handle(&self, request: Request<Body>, _: &Peer) -> Response<Body> {
        match request.uri().path() {
            "/wait" => {
                let _unread = request;
                std::future::pending().await
            }
            "/page" => Response::new(Bytes::from_static(&PIECE).into()),
            "/big" => {
                let piece = Bytes::from_static(&PIECE);
                let pieces = futures_util::stream::repeat_with(move || Ok(Frame::data(piece.clone())));
                Response::new(Body::boxed(StreamBody::new(pieces).boxed_unsync()))
            }
            _ => {
                let mut response = Response::new("ok".into());
                if request.into_body().collect().await.is_err() {
                    *response.status_mut() = StatusCode::BAD_REQUEST;
                }
                response
            }
        }
    }
}

// === impl Proxy ===

impl Proxy {
    pub(crate) fn start(endpoint: SocketAddr, connections: usize, stall: u64) -> io::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([PROXY, &endpoint.to_string(), &connections.to_string(), &stall.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stop = child.stdin.take();
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?).read_line(&mut line)?;
        Ok(Self { child, stop, addr: line.trim().parse().map_err(io::Error::other)? })
    }

    /// Memory that it has now, KiB.
    pub(crate) fn memory(&self) -> io::Result<u64> {
        self.status("VmRSS:")
    }

    /// Memory that it has with at least so many clients when it takes no more, KiB.
    pub(crate) async fn settled(&self, clients: usize) -> Result<u64, Failed> {
        /// What others' requests may make of it meanwhile.
        const WAVERS: u64 = 256;
        let mut before = self.memory()?;
        for _ in 0..300 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let now = self.memory()?;
            if self.clients()? >= clients && now.abs_diff(before) <= WAVERS {
                return Ok(now);
            }
            before = now;
        }
        Err(format!("it does not settle: {} of {clients} clients, {before} KiB", self.clients()?).into())
    }

    /// Most that it has had since [`Proxy::forget_peak`], KiB.
    pub(crate) fn peak(&self) -> io::Result<u64> {
        self.status("VmHWM:")
    }

    pub(crate) fn forget_peak(&self) -> io::Result<()> {
        fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5")
    }

    /// Waits until it has let go of all clients but `others`.
    pub(crate) async fn lets_go_but(&self, others: usize) -> Result<(), Failed> {
        for _ in 0..600 {
            if self.clients()? <= others {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(format!("it holds on to {} clients", self.clients()?).into())
    }

    /// Connections of clients that it holds on to: those without an inode are the kernel's to end.
    fn clients(&self) -> io::Result<usize> {
        const LISTENS: &str = "0A";
        let table = fs::read_to_string("/proc/net/tcp")?;
        let own = format!("0100007F:{:04X}", self.addr.port());
        let held = |line: &&str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.get(1) == Some(&&*own) && fields.get(3) != Some(&LISTENS) && fields.get(9) != Some(&"0")
        };
        Ok(table.lines().filter(held).count())
    }

    fn status(&self, name: &str) -> io::Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim().trim_end_matches("kB").trim().parse().map_err(io::Error::other)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ended_already = self.child.wait();
    }
}
