//! The floor under uploads: no fixed deadline, but a stalled or trickling sender must not hold a slot.

use std::time::Duration;

use tokio::time::Instant;

/// Judges one upload by what came so far. Trips when the sender is silent for the grace, or when after the grace the
/// average since its start is below the floor; never recovers: the upload is over.
#[derive(Debug)]
pub(crate) struct Pace {
    start: Instant,
    last: Instant,
    bytes: u64,
    grace: Duration,
    floor: u64,
}

// === impl Pace ===

impl Pace {
    pub(crate) fn new(now: Instant, grace: Duration, floor: u64) -> Self {
        Self { start: now, last: now, bytes: 0, grace, floor: floor.max(1) }
    }

    /// Something came.
    pub(crate) fn progress(&mut self, now: Instant, bytes: usize) {
        self.bytes += bytes as u64;
        self.last = now;
    }

    /// The sender had to wait for us: that time does not count.
    pub(crate) fn pardon(&mut self, waited: Duration) {
        self.start += waited;
        self.last += waited;
    }

    /// When the upload is too slow unless more comes.
    pub(crate) fn deadline(&self) -> Instant {
        let earned = Duration::from_millis(self.bytes.saturating_mul(1000) / self.floor);
        let average = self.start + earned.max(self.grace);
        average.min(self.last + self.grace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(10);

    #[test]
    fn silence_trickle_and_our_own_waits() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pace = Pace::new(start, GRACE, 8192);
        assert_eq!(pace.deadline(), at(10));
        // Fast at first: what it earned does not excuse silence.
        pace.progress(at(1), 100 << 20);
        assert_eq!(pace.deadline(), at(11));
        pace.pardon(Duration::from_secs(5));
        assert_eq!(pace.deadline(), at(16));
        // A byte a second is no silence, but too slow on average.
        let mut trickle = Pace::new(start, GRACE, 8192);
        for second in 0..15 {
            trickle.progress(at(second), 1);
        }
        assert_eq!(trickle.deadline(), at(10));
        // Just above the floor goes on as long as it likes.
        let mut steady = Pace::new(start, GRACE, 8192);
        for second in 0..1000 {
            assert!(steady.deadline() > at(second));
            steady.progress(at(second), 8200);
        }
    }
}
