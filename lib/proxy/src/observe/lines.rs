//! Lines of a log, written by a thread of their own: a reader that stalls costs lines, never a request's time.

use std::{
    fmt,
    io::{self, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// What waits to be written, in bytes.
const ROOM: usize = 1 << 20;
/// The first line of a batch waits so long for others: a wake-up for each line would cost requests more than the lines do.
const GATHER: Duration = Duration::from_millis(20);

/// Where lines go. Cloning shares it; the thread begins with the first line and ends with the last clone.
#[derive(Clone)]
pub struct Lines {
    handle: Arc<Handle>,
}

/// What became of lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineCounts {
    /// Written.
    pub written: u64,
    /// There was no room for them, or the file took none.
    pub dropped: u64,
}

/// Closes the buffer when the last clone goes.
struct Handle(Arc<Shared>);

struct Shared {
    buffer: Mutex<Buffer>,
    /// There is something to write, or nobody left to write for.
    more: Condvar,
    /// All that was there is written.
    empty: Condvar,
    room: usize,
    written: AtomicU64,
    dropped: AtomicU64,
}

struct Buffer {
    bytes: Vec<u8>,
    lines: u64,
    /// Until the thread has begun.
    to: Option<Box<dyn Write + Send>>,
    writing: bool,
    /// Somebody waits for what is there to be written.
    hurry: bool,
    /// Nobody is left to write for, or nobody writes.
    closed: bool,
}

// === impl Lines ===

impl Lines {
    /// To standard output.
    #[must_use]
    pub fn stdout() -> Self {
        Self::to(Box::new(std::io::stdout()), ROOM)
    }

    /// To anything; `room` bytes may wait.
    #[must_use]
    pub fn to(to: Box<dyn Write + Send>, room: usize) -> Self {
        let buffer = Buffer { bytes: Vec::new(), lines: 0, to: Some(to), writing: false, hurry: false, closed: false };
        Self {
            handle: Arc::new(Handle(Arc::new(Shared {
                buffer: Mutex::new(buffer),
                more: Condvar::new(),
                empty: Condvar::new(),
                room,
                written: AtomicU64::new(0),
                dropped: AtomicU64::new(0),
            }))),
        }
    }

    /// Has a line written; its line feed is added. The lock is held for a copy, never while something is written.
    pub fn push(&self, line: &str) {
        let shared = &self.handle.0;
        let mut buffer = shared.lock();
        let fits = buffer.bytes.len() + line.len() < shared.room;
        if !fits || !buffer.has_writer(|to| shared.begin(to)) {
            drop(buffer);
            shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let before = buffer.bytes.len();
        buffer.bytes.extend_from_slice(line.as_bytes());
        buffer.bytes.push(b'\n');
        buffer.lines += 1;
        let half = shared.room / 2;
        let wakes = before == 0 || (before < half && buffer.bytes.len() >= half);
        drop(buffer);
        if wakes {
            shared.more.notify_one();
        }
    }

    /// Waits until all is written that was pushed; `false` if that takes longer than `patience`. Blocks.
    #[must_use]
    pub fn flush(&self, patience: Duration) -> bool {
        let shared = &self.handle.0;
        let until = Instant::now() + patience;
        let mut buffer = shared.lock();
        buffer.hurry = true;
        shared.more.notify_one();
        while buffer.writing || !buffer.bytes.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            buffer = shared.empty.wait_timeout(buffer, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// What became of lines.
    #[must_use]
    pub fn counts(&self) -> LineCounts {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        LineCounts { written: of(&self.handle.0.written), dropped: of(&self.handle.0.dropped) }
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

// === impl Handle ===

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.more.notify_one();
    }
}

// === impl Shared ===

impl Shared {
    /// Begins the thread.
    fn begin(self: &Arc<Self>, to: Box<dyn Write + Send>) -> io::Result<()> {
        let shared = Arc::clone(self);
        std::thread::Builder::new().name("log-lines".into()).spawn(move || shared.run(to)).map(drop)
    }

    fn run(&self, mut to: Box<dyn Write + Send>) {
        let mut spare = Vec::new();
        loop {
            let mut buffer = self.lock();
            while buffer.bytes.is_empty() {
                if buffer.closed {
                    return;
                }
                buffer.hurry = false;
                buffer = self.more.wait(buffer).unwrap_or_else(PoisonError::into_inner);
            }
            if !buffer.closed && !buffer.hurry && buffer.bytes.len() < self.room / 2 {
                buffer = self.more.wait_timeout(buffer, GATHER).unwrap_or_else(PoisonError::into_inner).0;
            }
            buffer.writing = true;
            std::mem::swap(&mut buffer.bytes, &mut spare);
            let lines = std::mem::take(&mut buffer.lines);
            drop(buffer);
            let count = match to.write_all(&spare).and_then(|()| to.flush()) {
                Ok(()) => &self.written,
                Err(_nobody_reads) => &self.dropped,
            };
            count.fetch_add(lines, Ordering::Relaxed);
            spare.clear();
            self.lock().writing = false;
            self.empty.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Buffer ===

impl Buffer {
    /// Whether there is a thread; begins it at the first line. One that cannot be begun has taken the file with it.
    fn has_writer(&mut self, begin: impl FnOnce(Box<dyn Write + Send>) -> io::Result<()>) -> bool {
        if let Some(to) = self.to.take()
            && let Err(error) = begin(to)
        {
            tracing::error!(%error, "no thread for lines of logs: there are none");
            self.closed = true;
        }
        !self.closed
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Takes nothing before it is told to.
    struct Gate {
        open: mpsc::Receiver<()>,
        wrote: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.open.recv().map_err(io::Error::other)?;
            self.wrote.lock().expect("no panic").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_nobody_writes_are_counted_and_not_kept() {
        let lines = Lines::to(Box::new(Vec::new()), 100);
        let failed = lines.handle.0.lock().has_writer(|_| Err(io::ErrorKind::OutOfMemory.into()));
        assert!(!failed);
        for _ in 0..3 {
            lines.push("line");
        }
        assert_eq!(lines.counts(), LineCounts { written: 0, dropped: 3 });
        assert!(lines.flush(PATIENCE), "there is nothing to wait for");
    }

    #[test]
    fn a_reader_that_stalls_costs_lines_and_nothing_else() {
        let (tell, open) = mpsc::channel();
        let wrote = Arc::default();
        let lines = Lines::to(Box::new(Gate { open, wrote: Arc::clone(&wrote) }), 100);
        // Of any of these, none waits for the gate.
        for number in 0..1000 {
            lines.push(&format!("line {number}"));
        }
        assert!(!lines.flush(Duration::from_millis(1)), "nothing is written yet");
        assert!(lines.counts().dropped > 900, "{:?}", lines.counts());
        // The writer asks once per batch, of which there are two at most: one in its hands, one in the buffer.
        for _ in 0..2 {
            tell.send(()).expect("a reader");
        }
        assert!(lines.flush(PATIENCE));
        let counts = lines.counts();
        assert_eq!(counts.written + counts.dropped, 1000, "every line is counted");
        let text = String::from_utf8(wrote.lock().expect("no panic").clone()).expect("text");
        assert_eq!(text.lines().count() as u64, counts.written);
        assert!(text.starts_with("line 0\nline 1\n"), "{text}");
    }
}
