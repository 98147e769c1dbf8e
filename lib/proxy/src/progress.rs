//! What a connection has done, told apart from time: whoever watches it reads these counts now and then.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{task::AbortHandle, time::Instant};

/// Counts of one connection; written by its own task (HTTP/2: its streams' tasks), read by its watch.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    read: AtomicU64,
    wrote: AtomicU64,
    begun: AtomicU64,
    full: AtomicBool,
    answers: Mutex<Answers>,
}

/// A request that is under way until dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    progress: Arc<Progress>,
    answer: Arc<Answer>,
    waiting: bool,
}

/// A look at the counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// Bytes read.
    pub(crate) read: u64,
    /// Requests begun.
    pub(crate) begun: u64,
    /// Requests under way.
    pub(crate) present: usize,
    /// The connection takes no more bytes.
    pub(crate) full: bool,
    /// Bytes written.
    pub(crate) wrote: u64,
}

/// As many as were ever under way at once, used again: a request makes none of its own.
#[derive(Debug, Default)]
struct Answers {
    all: Vec<Arc<Answer>>,
    free: Vec<Arc<Answer>>,
    /// Of the last request, until it has its task.
    last: Option<Arc<Answer>>,
}

/// What the client has taken of the answer to one request.
#[derive(Debug, Default)]
struct Answer {
    /// For us or the endpoint, not for the client.
    waiting: AtomicBool,
    /// Pieces that have been taken, of this and all former answers.
    pieces: AtomicU64,
    watched: Mutex<Watched>,
}

/// What whoever watches knows of an answer.
#[derive(Debug, Default)]
struct Watched {
    under_way: bool,
    deadline: Option<Instant>,
    /// Alone in charge of it: it can be ended without the connection.
    task: Option<AbortHandle>,
    seen: u64,
    untaken: bool,
    /// Looks in a row at which the client had taken nothing of what there is for it.
    stuck: u32,
}

// === impl Progress ===

impl Progress {
    pub(crate) fn read(&self, bytes: usize) {
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn wrote(&self, bytes: usize) {
        self.wrote.fetch_add(bytes as u64, Ordering::Relaxed);
        // Read first: a store would take the line from whoever has it, at each write.
        if self.full.load(Ordering::Relaxed) {
            self.full.store(false, Ordering::Relaxed);
        }
    }

    pub(crate) fn full(&self) {
        self.full.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    pub(crate) fn has_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed) > 0
    }

    pub(crate) fn begin(self: &Arc<Self>) -> Turn {
        self.begun.fetch_add(1, Ordering::Relaxed);
        let mut answers = self.answers();
        let answer = answers.free.pop().unwrap_or_else(|| {
            let made = Arc::<Answer>::default();
            answers.all.push(Arc::clone(&made));
            made
        });
        answer.waiting.store(true, Ordering::Relaxed);
        *answer.watched() = Watched { under_way: true, ..Watched::default() };
        answers.last = Some(Arc::clone(&answer));
        drop(answers);
        Turn { progress: Arc::clone(self), answer, waiting: true }
    }

    /// The last request that has begun has a task of its own.
    pub(crate) fn spawned(&self, task: AbortHandle) {
        let last = self.answers().last.take();
        if let Some(answer) = last {
            let mut watched = answer.watched();
            if watched.under_way {
                watched.task = Some(task);
            }
        }
    }

    pub(crate) fn look(&self) -> Look {
        let answers = self.answers();
        let present = answers.all.len() - answers.free.len();
        drop(answers);
        Look {
            read: self.has_read(),
            begun: self.begun.load(Ordering::Relaxed),
            present,
            full: self.is_full(),
            wrote: self.wrote.load(Ordering::Relaxed),
        }
    }

    /// Ends the answers that are past their deadline, and those of which nothing has been taken for `stall` (zero: for ever).
    /// While a client does not read nobody asks an answer's body for more, so that its own clock does not ring. True if that
    /// needs the connection's end, or nothing at all is taken on it. Called at each look, `every` so often.
    pub(crate) fn cut_off(&self, now: Instant, every: Duration, stall: Duration) -> bool {
        let all = self.answers().all.clone();
        let (mut whole, mut present, mut stuck) = (false, 0, 0);
        for answer in all {
            let (waiting, pieces) = (answer.waiting.load(Ordering::Relaxed), answer.pieces.load(Ordering::Relaxed));
            let mut watched = answer.watched();
            let stalled = watched.look(waiting, pieces, every, stall);
            present += usize::from(watched.under_way);
            stuck += usize::from(stalled);
            if watched.under_way && (stalled || watched.late(now, every)) {
                match &watched.task {
                    Some(task) => task.abort(),
                    None => whole = true,
                }
            }
        }
        whole || (stuck > 0 && stuck == present)
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Turn ===

impl Turn {
    /// There is something for the client, until `deadline`.
    pub(crate) fn answered(&mut self, deadline: Option<Instant>) {
        self.has();
        if deadline.is_some() {
            self.answer.watched().deadline = deadline;
        }
    }

    /// The client has taken a piece.
    pub(crate) fn took(&mut self) {
        self.has();
        self.answer.pieces.fetch_add(1, Ordering::Relaxed);
    }

    /// The client would take more, and there is none yet.
    pub(crate) fn waits(&mut self) {
        if !std::mem::replace(&mut self.waiting, true) {
            self.answer.waiting.store(true, Ordering::Relaxed);
        }
    }

    fn has(&mut self) {
        if std::mem::replace(&mut self.waiting, false) {
            self.answer.waiting.store(false, Ordering::Relaxed);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *self.answer.watched() = Watched::default();
        self.progress.answers().free.push(Arc::clone(&self.answer));
    }
}

// === impl Answer ===

impl Answer {
    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Watched ===

impl Watched {
    /// Whether the client has taken nothing for `stall`.
    fn look(&mut self, waiting: bool, pieces: u64, every: Duration, stall: Duration) -> bool {
        let untaken = self.under_way && !waiting;
        let still = self.untaken && untaken && self.seen == pieces;
        (self.seen, self.untaken) = (pieces, untaken);
        self.stuck = if still { self.stuck + 1 } else { 0 };
        self.stuck > 0 && every * self.stuck >= stall && !stall.is_zero()
    }

    /// Whether its clock would have rung by now, had anybody asked it.
    fn late(&self, now: Instant, every: Duration) -> bool {
        self.deadline.and_then(|deadline| deadline.checked_add(every)).is_some_and(|last| last <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(30);

    /// Of one answer, at each look: whether it waits for the endpoint, and the pieces taken.
    fn stalls(looks: &[(bool, u64)]) -> Vec<bool> {
        let mut watched = Watched { under_way: true, ..Watched::default() };
        looks.iter().map(|(waiting, pieces)| watched.look(*waiting, *pieces, EVERY, EVERY * 2)).collect()
    }

    #[test]
    fn an_answer_that_nobody_takes_is_cut_off_and_one_that_is_awaited_is_not() {
        assert_eq!(stalls(&[(true, 5); 5]), [false; 5], "the endpoint takes its time");
        assert_eq!(stalls(&[(false, 5); 3]), [false, false, true], "no window");
        let slow: Vec<_> = (0..5).map(|n| (false, n)).collect();
        assert_eq!(stalls(&slow), [false; 5], "it takes a little, now and then");
    }

    #[tokio::test(start_paused = true)]
    async fn each_answer_has_a_deadline_of_its_own() {
        let progress = Arc::<Progress>::default();
        let now = Instant::now();
        let stall = Duration::ZERO;
        let (mut first, mut second) = (progress.begin(), progress.begin());
        let task = tokio::spawn(std::future::pending::<()>());
        progress.spawned(task.abort_handle());
        first.answered(Some(now + EVERY * 9));
        second.answered(Some(now + EVERY));
        assert!(!progress.cut_off(now + EVERY * 2 - Duration::from_secs(1), EVERY, stall));
        assert!(!progress.cut_off(now + EVERY * 2, EVERY, stall), "its task is enough");
        assert!(task.await.expect_err("aborted").is_cancelled());
        drop(second);
        assert!(progress.cut_off(now + EVERY * 10, EVERY, stall), "one without a task takes the connection with it");
        drop(first);
        assert!(!progress.cut_off(now + EVERY * 99, EVERY, stall));
        let _next = progress.begin();
        assert!(!progress.cut_off(now + EVERY * 99, EVERY, stall), "nothing is left over for the next one");
        assert_eq!((progress.look().present, progress.look().begun), (1, 3));
    }
}
