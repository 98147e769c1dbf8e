//! How many requests a container works on at once, and how many wait for it.
//!
//! A place is taken and given back by one atomic step each while nobody waits; who must wait stands in line (first come, first
//! served) and leaves it by dropping the future. The line holds ten times what is worked on; beyond that a request is refused
//! at once.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use crate::upstream::Keep;

/// Length of the line, in containers' worth.
const LINE: usize = 10;

/// Bounds the requests of one container. Cloning shares it.
#[derive(Clone)]
pub struct Breaker {
    shared: Arc<Shared>,
}

/// Leave to work on a request; gives its place back when dropped.
pub struct Permit(Arc<Shared>);

/// Neither a place nor one in the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pending request queue full")]
pub struct Full;

struct Shared {
    /// Requests worked on and waiting. Beyond `concurrency` it changes under the line's lock only, so that under the lock the
    /// line is as long as what is beyond.
    present: AtomicUsize,
    concurrency: usize,
    line: usize,
    waiting: Mutex<Line>,
}

/// Who waits, by the turn in which they came.
#[derive(Default)]
struct Line {
    turns: u64,
    wakers: BTreeMap<u64, Waker>,
}

/// One in the line. Who is no longer there has been given a place.
struct Waiting<'a> {
    shared: &'a Shared,
    turn: u64,
    /// Whoever waits has heard of the place.
    told: bool,
}

// === impl Breaker ===

impl Breaker {
    /// A breaker for `concurrency` requests at once and ten times as many in line; `None` for 0, which is "no limit".
    #[must_use]
    pub fn for_concurrency(concurrency: usize) -> Option<Self> {
        (concurrency > 0).then(|| Self::new(concurrency, concurrency.saturating_mul(LINE)))
    }

    /// A breaker for `concurrency` requests at once and `line` waiting.
    #[must_use]
    pub fn new(concurrency: usize, line: usize) -> Self {
        let (present, waiting) = (AtomicUsize::new(0), Mutex::default());
        Self { shared: Arc::new(Shared { present, concurrency, line, waiting }) }
    }

    /// Takes a place, in turn.
    ///
    /// # Errors
    /// [`Full`] at once if the line is full.
    pub async fn acquire(&self) -> Result<Permit, Full> {
        if self.shared.enter(self.shared.concurrency) {
            return Ok(Permit(Arc::clone(&self.shared)));
        }
        let Some(turn) = self.shared.stand_in_line()? else { return Ok(Permit(Arc::clone(&self.shared))) };
        Waiting { shared: &self.shared, turn, told: false }.await;
        Ok(Permit(Arc::clone(&self.shared)))
    }

    /// Requests worked on and waiting.
    #[must_use]
    pub fn present(&self) -> usize {
        self.shared.present.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Breaker")
            .field("concurrency", &self.shared.concurrency)
            .field("line", &self.shared.line)
            .field("present", &self.present())
            .finish()
    }
}

// === impl Shared ===

impl Shared {
    /// Counts one more, if there are fewer than `bound`.
    fn enter(&self, bound: usize) -> bool {
        let more = |present: usize| (present < bound).then_some(present + 1);
        self.present.fetch_update(Ordering::AcqRel, Ordering::Relaxed, more).is_ok()
    }

    /// A turn in the line; `None` if a place has become free meanwhile.
    fn stand_in_line(&self) -> Result<Option<u64>, Full> {
        let mut line = self.lock();
        loop {
            if self.enter(self.concurrency) {
                return Ok(None);
            }
            let present = self.present.load(Ordering::Relaxed);
            if present < self.concurrency {
                continue;
            }
            if present >= self.concurrency.saturating_add(self.line) {
                return Err(Full);
            }
            // Fails only if a place became free: the line itself grows under the lock.
            if self.present.compare_exchange(present, present + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                line.turns += 1;
                let turn = line.turns;
                line.wakers.insert(turn, Waker::noop().clone());
                return Ok(Some(turn));
            }
        }
    }

    /// Gives a place back, to the first in line if there is one.
    fn leave(&self) {
        let less = |present: usize| (present <= self.concurrency).then(|| present - 1);
        if self.present.fetch_update(Ordering::AcqRel, Ordering::Relaxed, less).is_ok() {
            return;
        }
        let mut line = self.lock();
        let next = line.wakers.pop_first();
        self.present.fetch_sub(1, Ordering::AcqRel);
        drop(line);
        if let Some((_, waker)) = next {
            waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Waiting ===

impl Future for Waiting<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        match this.shared.lock().wakers.get_mut(&this.turn) {
            Some(waker) => {
                waker.clone_from(cx.waker());
                Poll::Pending
            }
            None => {
                this.told = true;
                Poll::Ready(())
            }
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.told {
            return;
        }
        let mut line = self.shared.lock();
        let waited = line.wakers.remove(&self.turn).is_some();
        if waited {
            self.shared.present.fetch_sub(1, Ordering::AcqRel);
        }
        drop(line);
        if !waited {
            // A place that nobody has heard of goes on to the next.
            self.shared.leave();
        }
    }
}

// === impl Permit ===

impl Keep for Permit {}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit").finish_non_exhaustive()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.leave();
    }
}

#[cfg(test)]
mod tests;
