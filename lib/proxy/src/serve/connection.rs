//! Drives a connection: to its end, to its graceful end when the server closes, or to the end of its patience.
//!
//! One timer per connection, set only while the connection could be waiting for a head, and then once per half of a
//! head's time: a request costs no timer. So a slow head is cut off between one and one and a half times its time, and an
//! idle connection without a limit costs nothing at all.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::atomic::{AtomicBool, Ordering},
    task::Poll,
    time::Duration,
};

use hyper::{
    body::Incoming,
    rt::{Read, Write},
    server::conn::{http1, http2},
    service::HttpService,
};
use hyper_util::rt::TokioExecutor;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::Limits;
use crate::{
    progress::{Look, Progress},
    upstream::Body,
};

/// A connection of either version.
pub(super) trait Connection: Future<Output = hyper::Result<()>> {
    /// Whether bytes without a request are the head of one; HTTP/2 has others.
    const BYTES_ARE_HEADS: bool;

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
    closing: &mut watch::Receiver<bool>,
    closed: &AtomicBool,
    progress: &Progress,
    limits: &Limits,
) -> hyper::Result<()> {
    let mut connection = pin!(connection);
    let mut told = pin!(closing.wait_for(|closing| *closing));
    let (mut waiting, mut open) = (false, true);
    let every = (limits.head / 2).max(Duration::from_millis(1));
    let mut timer = pin!(sleep(every));
    let (mut armed, mut patience) = (true, Patience::default());
    poll_fn(|cx| {
        loop {
            if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
                return Poll::Ready(ended);
            }
            // Asked once: it has this task's waker then, and asking takes a lock that all connections share.
            if open && (!waiting || closed.load(Ordering::Acquire)) {
                waiting = true;
                if told.as_mut().poll(cx).is_ready() {
                    open = false;
                    connection.as_mut().begin_close();
                    continue;
                }
            }
            break;
        }
        if !armed && progress.look().read != patience.seen.read {
            armed = true;
            timer.as_mut().reset(Instant::now() + every);
        }
        while armed && timer.as_mut().poll(cx).is_ready() {
            match patience.look(progress.look(), C::BYTES_ARE_HEADS, every, limits.idle) {
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

    fn look(&mut self, now: Look, bytes_are_heads: bool, every: Duration, idle: Duration) -> Verdict {
        let before = std::mem::replace(&mut self.seen, now);
        if now.present > 0 || now.begun != before.begun {
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

    fn begin_close(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<I, S> Connection for http2::Connection<I, S, TokioExecutor>
where
    I: Read + Write + Unpin + Send + 'static,
    S: HttpService<Incoming, ResBody = Body, Error = Infallible>,
    S::Future: Send + 'static,
{
    const BYTES_ARE_HEADS: bool = false;

    fn begin_close(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(30);

    fn at(read: u64, begun: u64, present: u32) -> Look {
        Look { read, begun, present }
    }

    fn verdicts(looks: &[Look], idle: Duration) -> Vec<Verdict> {
        let mut patience = Patience::default();
        looks.iter().map(|look| patience.look(*look, true, EVERY, idle)).collect()
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
