//! The end of a pod: probes fail first, so that traffic stays away, and it is over when traffic has.
//!
//! `Open => Draining` on SIGTERM, or when the container's preStop hook asks. `Draining => Draining` with each request: the
//! quiet time counts anew. `Draining => Open` if a hook has asked and no SIGTERM follows: the container alone is
//! restarted. `Draining => Drained` after the quiet time, for good.

use std::{
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};

/// A hook that asks without a SIGTERM within this was called for a restart of the container.
const TERM: Duration = Duration::from_secs(1);

/// How far the end of a pod has come.
#[derive(Debug)]
pub struct Drain {
    state: Mutex<State>,
    /// Not `Open`: read at each request without the lock.
    begun: AtomicBool,
    terminated: AtomicBool,
    changed: Notify,
    quiet: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Draining { since: Instant },
    Drained,
}

// === impl Drain ===

impl Drain {
    /// A pod that is open, and over after `quiet` without a request.
    #[must_use]
    pub fn new(quiet: Duration) -> Self {
        Self {
            state: Mutex::new(State::Open),
            begun: AtomicBool::new(false),
            terminated: AtomicBool::new(false),
            changed: Notify::new(),
            quiet,
        }
    }

    /// Whether probes fail.
    #[must_use]
    pub fn draining(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// The pod's SIGTERM.
    pub fn terminate(&self) {
        self.terminated.store(true, Ordering::Release);
        self.begin();
    }

    /// A request has come.
    pub fn touch(&self) {
        if self.draining()
            && let State::Draining { since } = &mut *self.lock()
        {
            *since = Instant::now();
        }
    }

    /// Waits until the pod is drained, or is open (again).
    pub async fn done(&self) {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            let until = {
                let mut state = self.lock();
                match *state {
                    State::Open | State::Drained => return,
                    State::Draining { since } if since + self.quiet <= Instant::now() => {
                        *state = State::Drained;
                        self.changed.notify_waiters();
                        return;
                    }
                    State::Draining { since } => since + self.quiet,
                }
            };
            tokio::select! {
                () = changed => {}
                () = sleep_until(until) => {}
            }
        }
    }

    /// The container's preStop hook: begins to drain and waits for the end of it.
    pub async fn wait(this: &Arc<Self>) {
        let asked = Arc::clone(this);
        // Goes on if the hook goes away: a pod must not stay in between.
        tokio::spawn(async move {
            sleep(TERM).await;
            if !asked.terminated.load(Ordering::Acquire) {
                asked.reopen();
            }
        });
        this.begin();
        this.done().await;
    }

    fn begin(&self) {
        let mut state = self.lock();
        if *state == State::Open {
            *state = State::Draining { since: Instant::now() };
            self.begun.store(true, Ordering::Release);
            self.changed.notify_waiters();
        }
    }

    fn reopen(&self) {
        let mut state = self.lock();
        *state = State::Open;
        self.begun.store(false, Ordering::Release);
        self.changed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
