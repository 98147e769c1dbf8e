//! Memory that many requests share: taken as bytes come, never by what a request claims.

use std::sync::atomic::{AtomicUsize, Ordering};

/// So many bytes, whoever holds them.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: usize,
    used: AtomicUsize,
}

/// What one request holds; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share<'a> {
    budget: &'a Budget,
    bytes: usize,
}

// === impl Budget ===

impl Budget {
    pub(crate) const fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0) }
    }

    /// A share of nothing yet.
    pub(crate) const fn share(&self) -> Share<'_> {
        Share { budget: self, bytes: 0 }
    }
}

// === impl Share ===

impl Share<'_> {
    /// Takes so many bytes more; false when others hold too much.
    pub(crate) fn take(&mut self, bytes: usize) -> bool {
        let more = |used: usize| used.checked_add(bytes).filter(|used| *used <= self.budget.limit);
        let taken = self.budget.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok();
        if taken {
            self.bytes += bytes;
        }
        taken
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_given_back_whole_and_once() {
        let budget = Budget::new(10);
        let (mut one, mut two) = (budget.share(), budget.share());
        assert!(one.take(4) && one.take(3));
        assert!(!two.take(4) && two.take(3) && !two.take(1) && !two.take(usize::MAX));
        drop(one);
        assert!(two.take(7) && !two.take(1));
        drop(two);
        assert!(budget.share().take(10));
    }
}
