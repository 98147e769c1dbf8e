//! Idle HTTP/1.1 connections to one endpoint.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::h1::Lease;

/// Rows of a shelf; a thread prefers its own, so that a connection mostly stays with the core that has it in its cache.
const ROWS: usize = 8;

thread_local! {
    static ROW: usize = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed) % ROWS
    };
}

/// Idle connections, the last one first.
#[derive(Debug)]
pub(super) struct Shelf {
    rows: [Mutex<Vec<Lease>>; ROWS],
    /// Connections on all rows: at most `bound`, give or take one per thread.
    idle: AtomicUsize,
    bound: usize,
    age: Duration,
}

// === impl Shelf ===

impl Shelf {
    pub(super) fn new(bound: usize, age: Duration) -> Self {
        Self { rows: Default::default(), idle: AtomicUsize::new(0), bound, age }
    }

    /// Idle connections.
    pub(super) fn idle(&self) -> usize {
        self.idle.load(Ordering::Relaxed)
    }

    /// An idle connection that is open as far as can be known.
    pub(super) fn take(&self, now: Instant) -> Option<Lease> {
        if self.idle() == 0 {
            return None;
        }
        let own = ROW.with(|row| *row);
        for row in 0..ROWS {
            loop {
                // The guard is gone before the connection is polled.
                let taken = self.row((own + row) % ROWS).pop();
                let Some(lease) = taken else { break };
                self.idle.fetch_sub(1, Ordering::Relaxed);
                if now.saturating_duration_since(lease.idle_since()) < self.age && lease.usable(now) {
                    return Some(lease);
                }
            }
        }
        None
    }

    /// Keeps a connection; closes it if there are enough.
    pub(super) fn put(&self, lease: Lease) {
        if self.idle.fetch_add(1, Ordering::Relaxed) >= self.bound {
            self.idle.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        self.row(ROW.with(|row| *row)).push(lease);
    }

    /// Closes what is too old or was closed by the other side.
    pub(super) fn sweep(&self, now: Instant) {
        if self.idle() == 0 {
            return;
        }
        for row in 0..ROWS {
            let mut held = std::mem::take(&mut *self.row(row));
            let before = held.len();
            held.retain(|lease| now.saturating_duration_since(lease.idle_since()) < self.age && lease.open());
            self.idle.fetch_sub(before - held.len(), Ordering::Relaxed);
            // Older ones below those that came back meanwhile.
            let mut row = self.row(row);
            held.append(&mut row);
            *row = held;
        }
    }

    fn row(&self, row: usize) -> MutexGuard<'_, Vec<Lease>> {
        self.rows[row].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
