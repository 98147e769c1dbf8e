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
//! One timer per request carries all three: it is set to the nearest deadline and, when it rings, asks again. The requests of a
//! connection lend it to each other: one that is set already costs neither memory nor the runtime's lock, and rings for nothing
//! once per timeout.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
    /// Taken when something is first waited for; boxed, since a request and its body hand it on.
    timer: Option<Pin<Box<Sleep>>>,
    /// Where it is taken from, and goes back to.
    spare: Spare,
}

/// The timer of a connection's requests, while none of them has it. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Spare(Arc<Mutex<Option<Pin<Box<Sleep>>>>>);

// === impl Timeouts ===

impl Timeouts {
    /// Whether nothing is limited.
    fn none(&self) -> bool {
        self.start.is_zero() && self.idle.is_zero() && self.total.is_zero()
    }

    /// The clock of a request that begins now, on a connection with this timer; `None` if nothing is limited.
    #[must_use]
    pub fn begin(&self, spare: &Spare) -> Option<Clock> {
        let deadlines = (!self.none()).then(|| Deadlines::new(*self, Instant::now()))?;
        Some(Clock { deadlines, timer: None, spare: spare.clone() })
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
            let new = || self.spare.lock().take().unwrap_or_else(|| Box::pin(sleep_until(deadline)));
            let timer = self.timer.get_or_insert_with(new);
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

impl Drop for Clock {
    fn drop(&mut self) {
        if let Some(timer) = self.timer.take() {
            self.spare.lock().get_or_insert(timer);
        }
    }
}

// === impl Spare ===

impl Spare {
    fn lock(&self) -> MutexGuard<'_, Option<Pin<Box<Sleep>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut clock = limits.begin(&Spare::default()).expect("a limit");
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

    #[tokio::test(start_paused = true)]
    async fn a_timer_that_another_request_has_set_rings_in_time() {
        let spare = Spare::default();
        let begin = |total| Timeouts { total: seconds(total), ..Timeouts::default() }.begin(&spare).expect("a limit");
        for (former, total) in [(9, 2), (1, 8), (3, 3), (4, 7)] {
            let mut answered = begin(former);
            assert!(poll_fn(|cx| Poll::Ready(answered.poll_expired(cx))).await.is_pending());
            drop(answered);
            assert!(spare.lock().is_some());
            let (begun, mut clock) = (Instant::now(), begin(total));
            poll_fn(|cx| clock.poll_expired(cx)).await;
            assert_eq!(begun.elapsed(), seconds(total), "after one of {former} s");
        }
    }
}
