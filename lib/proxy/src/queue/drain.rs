//! The end of a pod: probes fail first, so that traffic stays away, and it is over when traffic has.
//!
//! `Open => Draining` on SIGTERM, or when the container's preStop hook asks. `Draining => Draining` with each request: the
//! quiet time counts anew. `Draining => Drained` after the quiet time. Either `=> Open` if a hook has asked and no SIGTERM
//! follows: the container alone is restarted, and its pod must not fail probes for ever. After a SIGTERM there is no way back.

use std::{
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};

use super::QUIET;

/// A hook that asks without a SIGTERM within this was called for a restart of the container. Long enough for a word that comes
/// late, over a watch or an agent that is being restarted: a pod that drains for nothing costs less than one that takes
/// requests at its end.
const TERM: Duration = Duration::from_secs(10);

/// How far the end of a pod has come.
#[derive(Debug)]
pub struct Drain {
    inner: Mutex<Inner>,
    /// Not `Open`: read at each request without the lock.
    begun: AtomicBool,
    changed: Notify,
}

#[derive(Debug)]
struct Inner {
    state: State,
    terminated: bool,
    /// Hooks that have asked: the last one alone decides whether it was a restart.
    hooks: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Draining { since: Instant },
    Drained,
}

// === impl Drain ===

impl Drain {
    /// A pod that is open.
    pub(super) fn new() -> Self {
        Self {
            inner: Mutex::new(Inner { state: State::Open, terminated: false, hooks: 0 }),
            begun: AtomicBool::new(false),
            changed: Notify::new(),
        }
    }

    /// Whether probes fail.
    #[must_use]
    pub fn draining(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// The pod's SIGTERM.
    pub fn terminate(&self) {
        let mut inner = self.lock();
        inner.terminated = true;
        self.begin(&mut inner);
    }

    /// A request has come.
    pub fn touch(&self) {
        if self.draining()
            && let State::Draining { since } = &mut self.lock().state
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
                let mut inner = self.lock();
                match inner.state {
                    State::Open | State::Drained => return,
                    State::Draining { since } if since + QUIET <= Instant::now() => {
                        inner.state = State::Drained;
                        self.changed.notify_waiters();
                        return;
                    }
                    State::Draining { since } => since + QUIET,
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
        let hook = {
            let mut inner = this.lock();
            inner.hooks += 1;
            this.begin(&mut inner);
            inner.hooks
        };
        // Goes on if the hook goes away: a pod must not stay in between.
        tokio::spawn(
            async move {
                sleep(TERM).await;
                asked.reopen(hook);
            }
            .boxed(),
        );
        this.done().await;
    }

    fn begin(&self, inner: &mut Inner) {
        if inner.state == State::Open {
            inner.state = State::Draining { since: Instant::now() };
            self.begun.store(true, Ordering::Release);
            self.changed.notify_waiters();
        }
    }

    /// Under the same lock as the SIGTERM, which may come at this very moment.
    fn reopen(&self, hook: u64) {
        let mut inner = self.lock();
        if inner.terminated || inner.hooks != hook {
            return;
        }
        inner.state = State::Open;
        self.begun.store(false, Ordering::Release);
        self.changed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hooks one after another, each within the time of the last one: the pod is drained before it is known whether it ends.
    async fn drained_by_hooks(drain: &Arc<Drain>) {
        let mut hooks = vec![];
        for _ in 0..2 * QUIET.as_secs() / TERM.as_secs() {
            let drain = Arc::clone(drain);
            hooks.push(tokio::spawn(async move { Drain::wait(&drain).await }));
            sleep(TERM / 2).await;
        }
        for hook in hooks {
            hook.await.unwrap();
        }
        assert_eq!(drain.lock().state, State::Drained);
    }

    #[tokio::test(start_paused = true)]
    async fn a_drained_pod_opens_again_if_only_its_container_was_restarted() {
        for terminates in [false, true] {
            let drain = Arc::new(Drain::new());
            drained_by_hooks(&drain).await;
            if terminates {
                drain.terminate();
            }
            sleep(TERM).await;
            assert_eq!(drain.draining(), terminates);
        }
    }
}
