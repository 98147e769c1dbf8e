//! The three timeouts of a revision, as one clock of a request.
//!
//! | timeout | counts from | until |
//! |---|---|---|
//! | start | the request | the first byte of the response |
//! | idle | the request, then each byte of the response | the next byte |
//! | total | the request | the end, whatever has been answered by then |
//!
//! What is written to the client counts as response. The head of a `101 Switching Protocols` does not: Knative's own
//! tests upgrade at once and expect the *first frame* to be held to the start timeout. So a tunnel starts its clock's
//! response with the first byte that comes from upstream.
//!
//! One timer per request carries all three: it is set to the nearest deadline and, when it rings, asks again.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// How long a revision may take; zero is "no limit".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// Until the first byte of the response.
    pub start: Duration,
    /// Between bytes of the response.
    pub idle: Duration,
    /// For the whole request.
    pub total: Duration,
}

/// When one request has taken too long; pure, asked with `now`.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    limits: Timeouts,
    begun: Instant,
    wrote: Option<Instant>,
}

/// [`Deadlines`] with a timer.
#[derive(Debug)]
pub struct Clock {
    deadlines: Deadlines,
    /// Made when something is first waited for; boxed, since a request and its body hand it on.
    timer: Option<Pin<Box<Sleep>>>,
}

// === impl Timeouts ===

impl Timeouts {
    /// Whether nothing is limited.
    #[must_use]
    pub fn none(&self) -> bool {
        self.start.is_zero() && self.idle.is_zero() && self.total.is_zero()
    }

    /// The clock of a request that begins now; `None` if nothing is limited.
    #[must_use]
    pub fn begin(&self) -> Option<Clock> {
        (!self.none()).then(|| Clock { deadlines: Deadlines::new(*self, Instant::now()), timer: None })
    }
}

// === impl Deadlines ===

impl Deadlines {
    /// A request that began at `begun`.
    #[must_use]
    pub const fn new(limits: Timeouts, begun: Instant) -> Self {
        Self { limits, begun, wrote: None }
    }

    /// Bytes of the response went to the client.
    pub const fn wrote(&mut self, now: Instant) {
        self.wrote = Some(now);
    }

    /// When time is up if nothing happens until then.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        let after = |from: Instant, limit: Duration| (!limit.is_zero()).then(|| from.checked_add(limit)).flatten();
        let start = if self.wrote.is_none() { after(self.begun, self.limits.start) } else { None };
        let idle = after(self.wrote.unwrap_or(self.begun), self.limits.idle);
        [start, idle, self.end()].into_iter().flatten().min()
    }

    /// When time is up whatever happens until then.
    #[must_use]
    pub fn end(&self) -> Option<Instant> {
        (!self.limits.total.is_zero()).then(|| self.begun.checked_add(self.limits.total)).flatten()
    }

    /// Whether time is up.
    #[must_use]
    pub fn expired(&self, now: Instant) -> bool {
        self.next().is_some_and(|deadline| deadline <= now)
    }
}

// === impl Clock ===

impl Clock {
    /// When it rings at the latest.
    pub(crate) fn end(&self) -> Option<Instant> {
        self.deadlines.end()
    }

    /// Bytes of the response went to the client. An error: time was up before they came.
    ///
    /// # Errors
    /// `Err(())` if time is up.
    pub fn wrote(&mut self) -> Result<(), Expired> {
        let now = Instant::now();
        if self.deadlines.expired(now) {
            return Err(Expired);
        }
        self.deadlines.wrote(now);
        Ok(())
    }

    /// Ready when time is up.
    pub fn poll_expired(&mut self, cx: &mut Context<'_>) -> Poll<Expired> {
        loop {
            let Some(deadline) = self.deadlines.next() else { return Poll::Pending };
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
            // A timer that is set too early rings and is set again: cheaper than setting it at every byte.
            if timer.deadline() > deadline {
                timer.as_mut().reset(deadline);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if self.deadlines.expired(Instant::now()) {
                return Poll::Ready(Expired);
            }
            timer.as_mut().reset(deadline);
        }
    }
}

/// Time is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("request timeout")]
pub struct Expired;

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[tokio::test(start_paused = true)]
    async fn the_nearest_deadline_counts() {
        let begun = Instant::now();
        let at = |n: u64| begun + seconds(n);
        let limits = Timeouts { start: seconds(5), idle: seconds(3), total: seconds(10) };
        let mut deadlines = Deadlines::new(limits, begun);
        assert_eq!(deadlines.next(), Some(at(3)), "before the first byte, idle counts from the request");
        deadlines.wrote(at(2));
        assert_eq!(deadlines.next(), Some(at(5)), "idle from the last byte");
        deadlines.wrote(at(9));
        assert_eq!(deadlines.next(), Some(at(10)), "total is absolute");
        assert!(!deadlines.expired(at(9)) && deadlines.expired(at(10)));
        assert_eq!(Deadlines::new(Timeouts::default(), begun).next(), None);
        let only_start = Timeouts { start: seconds(1), ..Timeouts::default() };
        let mut deadlines = Deadlines::new(only_start, begun);
        deadlines.wrote(begun);
        assert_eq!(deadlines.next(), None, "a response that has begun has no start to wait for");
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_put_the_clock_off_and_it_rings_in_the_end() {
        let begun = Instant::now();
        let limits = Timeouts { idle: seconds(2), ..Timeouts::default() };
        let mut clock = limits.begin().expect("a limit");
        for _ in 0..5 {
            let tick = tokio::time::sleep(seconds(1));
            tokio::select! {
                biased;
                () = tick => clock.wrote().expect("in time"),
                _ = poll_fn(|cx| clock.poll_expired(cx)) => panic!("too early"),
            }
        }
        assert_eq!(poll_fn(|cx| clock.poll_expired(cx)).await, Expired);
        assert_eq!(begun.elapsed().as_secs(), 7);
        assert_eq!(clock.wrote(), Err(Expired));
    }
}
