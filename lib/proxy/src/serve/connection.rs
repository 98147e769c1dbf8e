//! Drives a connection: to its end, to its graceful end when the server closes, or to the end of its patience.
//!
//! One timer per connection, set only while the connection could be waiting for a head, and then once per half of a
//! head's time: a request costs no timer. So a slow head is cut off between one and one and a half times its time, and an
//! idle connection without a limit costs nothing at all.
//!
//! A client that does not take its answer is cut off by the same timer: neither its socket nor its HTTP/2 windows may stay
//! full for too long. While they are, nobody asks the answer's body for more, so the request's own timeouts do not ring:
//! an answer past its deadline is cut off here too.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use hyper::{
    body::Incoming,
    rt::{Read, Write},
    server::conn::{http1, http2},
    service::HttpService,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::{
    Limits,
    end::{End, Phase, reached},
    streams::Streams,
};
use crate::{
    progress::{Look, Progress},
    upstream::Body,
};

/// For the first request of a connection that was there when the server closed.
pub(super) const LAST: Duration = Duration::from_secs(1);

/// A connection of either version.
pub(super) trait Connection: Future<Output = hyper::Result<()>> {
    /// Whether bytes without a request are the head of one; HTTP/2 has others.
    const BYTES_ARE_HEADS: bool;
    /// When it begins to close: HTTP/2 can be told to without the loss of a request.
    const LEAVES: Phase;

    fn begin_close(self: Pin<&mut Self>);
}

/// What a connection was doing when it was looked at.
#[derive(Debug, Default)]
struct Patience {
    seen: Look,
    /// Looks in a row at which no request was under way or had come.
    quiet: u32,
    /// Looks in a row at which bytes had come, but no request.
    slow: u32,
    /// Looks in a row at which the client had taken not a byte of those that wait for it.
    stuck: u32,
}

/// What follows from a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Close,
    LookAgain,
    /// Nothing can change before bytes come.
    Rest,
}

/// Serves until the end; dropping the connection is the end of those that are too slow.
pub(super) async fn drive<C: Connection>(
    connection: C,
    told: &mut watch::Receiver<Phase>,
    end: &End,
    progress: &Progress,
    limits: &Limits,
) -> hyper::Result<()> {
    let mut connection = pin!(connection);
    // Only to be woken: `end` is asked for what it means.
    let mut told = pin!(async {
        for phase in [C::LEAVES, Phase::Closing] {
            reached(told, phase).await;
        }
    });
    let (mut waiting, mut all_told, mut leaving) = (false, false, false);
    let mut last = None;
    let every = (limits.head / 2).max(Duration::from_millis(1));
    let mut timer = pin!(sleep(every));
    let (mut armed, mut patience) = (true, Patience::default());
    poll_fn(|cx| {
        loop {
            if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
                return Poll::Ready(ended);
            }
            // Asked once: it has this task's waker then, and asking takes a lock that all connections share. A first word uses the
            // waker up, whether it is the one that is waited for or not.
            if !all_told && (!waiting || end.has_reached(Phase::Draining)) {
                waiting = true;
                all_told = told.as_mut().poll(cx).is_ready();
            }
            if leaving || !end.has_reached(C::LEAVES) {
                break;
            }
            // A client that has just come is let have its first request: it may be on its way.
            if progress.has_begun() {
                leaving = true;
                connection.as_mut().begin_close();
                continue;
            }
            if end.has_reached(Phase::Closing)
                && last.get_or_insert_with(|| Box::pin(sleep(LAST))).as_mut().poll(cx).is_ready()
            {
                return Poll::Ready(Ok(()));
            }
            break;
        }
        if !armed && (progress.has_read() != patience.seen.read || progress.is_full()) {
            armed = true;
            timer.as_mut().reset(Instant::now() + every);
        }
        while armed && timer.as_mut().poll(cx).is_ready() {
            if progress.cut_off(Instant::now(), every, limits.stall) {
                return Poll::Ready(Ok(()));
            }
            match patience.look(progress.look(), C::BYTES_ARE_HEADS, every, limits) {
                Verdict::Close => return Poll::Ready(Ok(())),
                Verdict::Rest => armed = false,
                Verdict::LookAgain => timer.as_mut().reset(Instant::now() + every),
            }
        }
        Poll::Pending
    })
    .await
}

// === impl Patience ===

impl Patience {
    /// Two looks in a row see all of a head's time.
    const LOOKS: u32 = 2;

    fn look(&mut self, now: Look, bytes_are_heads: bool, every: Duration, limits: &Limits) -> Verdict {
        let before = std::mem::replace(&mut self.seen, now);
        let shut = before.full && now.full && now.wrote == before.wrote;
        self.stuck = if shut { self.stuck + 1 } else { 0 };
        if self.stuck > 0 && every * self.stuck >= limits.stall && !limits.stall.is_zero() {
            return Verdict::Close;
        }
        let idle = limits.idle;
        if now.present > 0 || now.full || now.begun != before.begun {
            (self.quiet, self.slow) = (0, 0);
            return Verdict::LookAgain;
        }
        self.quiet += 1;
        let fresh = now.begun == 0;
        let bytes = now.read != before.read || self.slow > 0;
        self.slow = if fresh || (bytes && bytes_are_heads) { self.slow + 1 } else { 0 };
        if self.slow >= Self::LOOKS {
            return Verdict::Close;
        }
        if !idle.is_zero() {
            return if every * self.quiet >= idle { Verdict::Close } else { Verdict::LookAgain };
        }
        if self.slow > 0 { Verdict::LookAgain } else { Verdict::Rest }
    }
}

// === impl Connection ===

impl<I, S> Connection for http1::UpgradeableConnection<I, S>
where
    I: Read + Write + Unpin + Send + 'static,
    S: HttpService<Incoming, ResBody = Body, Error = Infallible>,
{
    const BYTES_ARE_HEADS: bool = true;
    const LEAVES: Phase = Phase::Closing;

    fn begin_close(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<I, S> Connection for http2::Connection<I, S, Streams>
where
    I: Read + Write + Unpin + Send + 'static,
    S: HttpService<Incoming, ResBody = Body, Error = Infallible>,
    S::Future: Send + 'static,
{
    const BYTES_ARE_HEADS: bool = false;
    const LEAVES: Phase = Phase::Draining;

    fn begin_close(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(30);

    fn at(read: u64, begun: u64, present: usize) -> Look {
        Look { read, begun, present, ..Look::default() }
    }

    fn verdicts(looks: &[Look], idle: Duration) -> Vec<Verdict> {
        let (mut patience, limits) = (Patience::default(), Limits { idle, stall: EVERY * 2, ..Limits::default() });
        looks.iter().map(|look| patience.look(*look, true, EVERY, &limits)).collect()
    }

    #[test]
    fn who_takes_nothing_is_cut_off_and_who_waits_is_not() {
        use Verdict::{Close, LookAgain};
        let never = Duration::ZERO;
        let busy = |full, wrote| Look { full, wrote, ..at(9, 1, 1) };
        assert_eq!(verdicts(&[busy(false, 5); 5], never), [LookAgain; 5], "the endpoint takes its time");
        assert_eq!(verdicts(&[busy(true, 5); 3], never), [LookAgain, LookAgain, Close], "a full socket");
        let slow: Vec<Look> = (0..5).map(|n| busy(true, n)).collect();
        assert_eq!(verdicts(&slow, never), [LookAgain; 5], "it takes a little, now and then");
        let answered = Look { full: true, ..at(9, 1, 0) };
        assert_eq!(verdicts(&[answered; 3], never), [LookAgain, LookAgain, Close], "all is said, and not taken");
    }

    #[test]
    fn heads_have_their_time_and_no_more() {
        use Verdict::{Close, LookAgain, Rest};
        let never = Duration::ZERO;
        assert_eq!(verdicts(&[at(0, 0, 0), at(0, 0, 0)], never), [LookAgain, Close], "nothing came");
        assert_eq!(verdicts(&[at(1, 0, 0), at(2, 0, 0)], never), [LookAgain, Close], "drop by drop");
        let looks = [at(90, 1, 0), at(90, 1, 0), at(95, 1, 0), at(96, 1, 0)];
        assert_eq!(verdicts(&looks, never), [LookAgain, Rest, LookAgain, Close], "a second head");
        let looks = [at(90, 1, 1), at(99, 1, 1), at(99, 1, 1)];
        assert_eq!(verdicts(&looks, never), [LookAgain; 3], "a request under way may take its time");
        let looks = [at(9, 1, 0), at(9, 1, 0), at(9, 1, 0), at(9, 1, 0)];
        assert_eq!(verdicts(&looks, EVERY * 3), [LookAgain, LookAgain, LookAgain, Close], "idle for too long");
    }
}
