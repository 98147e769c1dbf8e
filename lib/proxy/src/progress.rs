//! What a connection has done, told apart from time: whoever watches it reads these counts now and then.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

/// Counts of one connection; written by its own task (HTTP/2: its streams' tasks), read by its watch.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    read: AtomicU64,
    begun: AtomicU64,
    present: AtomicU32,
}

/// A request that is under way until dropped.
#[derive(Debug)]
pub(crate) struct Turn(Arc<Progress>);

/// A look at the counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// Bytes read.
    pub(crate) read: u64,
    /// Requests begun.
    pub(crate) begun: u64,
    /// Requests under way.
    pub(crate) present: u32,
}

// === impl Progress ===

impl Progress {
    pub(crate) fn read(&self, bytes: usize) {
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn begin(self: &Arc<Self>) -> Turn {
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.present.fetch_add(1, Ordering::Relaxed);
        Turn(Arc::clone(self))
    }

    pub(crate) fn look(&self) -> Look {
        Look {
            read: self.read.load(Ordering::Relaxed),
            begun: self.begun.load(Ordering::Relaxed),
            present: self.present.load(Ordering::Relaxed),
        }
    }
}

// === impl Turn ===

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.present.fetch_sub(1, Ordering::Relaxed);
    }
}
