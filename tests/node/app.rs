//! The pod's app, and clients of the pod on a cable to it: each request on a connection of its own.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    harness::{Outcome, PATIENCE, ensure},
    namespaces::POD,
    parts::World,
    until,
};

/// Clients at once.
const CLIENTS: usize = 4;
/// So many answers more show that requests go on being answered; more than the sockets that a gateway has in stock for a pod.
const ENOUGH: u64 = 150;

/// What the app and the test know of its requests.
#[derive(Debug, Default)]
struct Book {
    answered: AtomicU64,
    slow: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Gate {
    waiting: u32,
    open: bool,
}

/// The app, on the pod's loopback.
pub(crate) struct App(Arc<Book>);

// === impl App ===

impl App {
    pub(crate) fn start(world: &World) -> Outcome<Self> {
        let listener = world.in_pod(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 8080)))?;
        let book = Arc::new(Book::default());
        let shared = Arc::clone(&book);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let book = Arc::clone(&shared);
                std::thread::spawn(move || drop(book.serve(stream)));
            }
        });
        Ok(Self(book))
    }

    pub(crate) fn answered(&self) -> u64 {
        self.0.answered.load(Ordering::Relaxed)
    }

    /// Waits until a slow request is there.
    pub(crate) fn has_slow(&self) -> Outcome {
        until("the slow request", || Ok(self.0.gate().waiting > 0))
    }

    pub(crate) fn let_slow_go(&self) {
        self.0.gate().open = true;
        self.0.changed.notify_all();
    }
}

// === impl Book ===

impl Book {
    fn gate(&self) -> std::sync::MutexGuard<'_, Gate> {
        self.slow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request a connection, so that each needs a socket of the agent's.
    fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        if head.starts_with("GET /slow ") {
            let mut gate = self.gate();
            gate.waiting += 1;
            drop(self.changed.wait_while(gate, |gate| !gate.open));
        }
        self.answered.fetch_add(1, Ordering::Relaxed);
        stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello")
    }
}

/// Asks the pod, from a thread that is in the client's namespace.
fn request(path: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((POD, 8012)), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    match text.starts_with("HTTP/1.1 200 ") && text.ends_with("hello") {
        true => Ok(()),
        false => Err(io::Error::other(format!("answer: '{text}'"))),
    }
}

/// One request from the client's side of the cable.
pub(crate) fn ask(world: &World, path: &'static str) -> Outcome<io::Result<()>> {
    Ok(world.in_client(move || Ok(request(path)))?)
}

/// A request that is answered when the test says so.
pub(crate) struct Slow(JoinHandle<io::Result<()>>);

// === impl Slow ===

impl Slow {
    pub(crate) fn start(world: &World) -> Outcome<Self> {
        // Threads that a thread in the namespace starts are in it, too.
        Ok(Self(world.in_client(|| Ok(std::thread::spawn(|| request("/slow"))))?))
    }

    pub(crate) fn is_done(&self) -> bool {
        self.0.is_finished()
    }

    pub(crate) fn answered(self) -> Outcome {
        Ok(self.0.join().map_err(|_panic| "the client panicked")??)
    }
}

/// Clients that ask on and on.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    faults: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<()>>,
}

// === impl Load ===

impl Load {
    pub(crate) fn start(world: &World) -> Outcome<Self> {
        let (stop, answered, faults) = <(Arc<AtomicBool>, Arc<AtomicU64>, Arc<Mutex<Vec<String>>>)>::default();
        let mut threads = Vec::new();
        for _ in 0..CLIENTS {
            let (stop, answered, faults) = (Arc::clone(&stop), Arc::clone(&answered), Arc::clone(&faults));
            let client = move || {
                while !stop.load(Ordering::Relaxed) {
                    match request("/") {
                        Ok(()) => drop(answered.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => faults.lock().unwrap_or_else(PoisonError::into_inner).push(error.to_string()),
                    }
                    // A node is not to be kept busy by its test.
                    std::thread::sleep(Duration::from_millis(2));
                }
            };
            threads.push(world.in_client(move || Ok(std::thread::spawn(client)))?);
        }
        Ok(Self { stop, answered, faults, threads })
    }

    fn faultless(&self) -> Outcome {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        ensure(faults.is_empty(), || format!("{} requests failed: {:?}", faults.len(), &faults[..faults.len().min(5)]))
    }

    /// Waits for many more answers; not one request fails.
    pub(crate) fn goes_on(&self, when: &str) -> Outcome {
        self.answers(ENOUGH, when)
    }

    /// Waits for so many more answers.
    pub(crate) fn answers(&self, more: u64, when: &str) -> Outcome {
        let before = self.answered.load(Ordering::Relaxed);
        until(&format!("answers {when}"), || {
            self.faultless()?;
            Ok(self.answered.load(Ordering::Relaxed) >= before + more)
        })
    }

    /// The last requests are answered, too.
    pub(crate) fn ended(mut self) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_panic| "a client panicked")?;
        }
        self.faultless()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
