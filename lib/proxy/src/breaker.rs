//! How many requests a container works on at once, and how many wait for it.
//!
//! A place is taken by one atomic step while there is one; who must wait stands in line (first come, first served) and
//! leaves it by dropping the future. The line holds ten times what is worked on; beyond that a request is refused at once.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Length of the line, in containers' worth.
const LINE: usize = 10;

/// Bounds the requests of one container. Cloning shares it.
#[derive(Clone)]
pub struct Breaker {
    shared: Arc<Shared>,
}

/// Leave to work on a request; gives its place back when dropped.
pub struct Permit {
    /// Dropped first: the place goes to the next in line before the count of all sinks.
    _place: OwnedSemaphorePermit,
    _ticket: Ticket,
}

/// Neither a place nor one in the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pending request queue full")]
pub struct Full;

struct Shared {
    places: Arc<Semaphore>,
    /// Requests worked on and waiting.
    present: AtomicUsize,
    concurrency: usize,
    line: usize,
}

/// One of the requests counted in `present`.
struct Ticket(Arc<Shared>);

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
        let concurrency = concurrency.min(Semaphore::MAX_PERMITS);
        let places = Arc::new(Semaphore::new(concurrency));
        Self { shared: Arc::new(Shared { places, present: AtomicUsize::new(0), concurrency, line }) }
    }

    /// Takes a place, in turn.
    ///
    /// # Errors
    /// [`Full`] at once if the line is full.
    pub async fn acquire(&self) -> Result<Permit, Full> {
        let ticket = self.enter()?;
        let places = Arc::clone(&self.shared.places);
        if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
            return Ok(Permit { _place: place, _ticket: ticket });
        }
        // The semaphore is never closed.
        let place = places.acquire_owned().await.map_err(|_closed| Full)?;
        Ok(Permit { _place: place, _ticket: ticket })
    }

    /// Requests worked on and waiting.
    #[must_use]
    pub fn present(&self) -> usize {
        self.shared.present.load(Ordering::Relaxed)
    }

    fn enter(&self) -> Result<Ticket, Full> {
        let bound = self.shared.concurrency.saturating_add(self.shared.line);
        let more = |present: usize| (present < bound).then_some(present + 1);
        match self.shared.present.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(Ticket(Arc::clone(&self.shared))),
            Err(_) => Err(Full),
        }
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

// === impl Permit ===

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit").finish_non_exhaustive()
    }
}

// === impl Ticket ===

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.present.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
