//! Descriptors on their way to aggregators: sent where they arise, queued only while the socket takes no more.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use lifl_ebpf::{
    Descriptor,
    wire::{DescriptorSocket, SendCause},
};
use serde_json::{Value, json};
use tokio::{
    io::unix::AsyncFd,
    sync::{Notify, mpsc},
};

use super::data::Command;
use crate::{chain::Ignored, state::Gateway};

/// The data socket, shared by reader and writer.
pub(crate) type Socket = Arc<AsyncFd<DescriptorSocket>>;

/// Nothing says when the kernel has memory again.
const NO_MEMORY: Duration = Duration::from_millis(5);
/// A receiver that has no socket yet is tried again after this, and ever more rarely up to the second.
const REFUSED: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The queue and its socket.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Descriptor>,
    socket: Option<Socket>,
    /// Receivers that the path refused: (chain, dst). What they missed is in the ledger.
    refused: BTreeSet<(u32, u32)>,
    sent: u64,
    received: u64,
    refusals: u64,
}

/// How far a flush came.
#[derive(Debug)]
enum Flush {
    Done,
    Blocked(Socket),
    NoMemory,
    NoSocket,
}

// === impl Outbox ===

impl Outbox {
    /// Sends, or queues behind what is queued.
    pub(crate) fn push(&self, descriptors: &[Descriptor]) {
        if descriptors.is_empty() {
            return;
        }
        let mut state = self.state();
        let first = state.queue.is_empty();
        state.queue.extend(descriptors);
        if first && (!matches!(state.flush(), Flush::Done | Flush::NoSocket) || !state.refused.is_empty()) {
            self.wake.notify_one();
        }
    }

    /// Takes another socket.
    pub(crate) fn connect(&self, socket: Option<Socket>) {
        self.state().socket = socket;
        self.wake.notify_one();
    }

    /// Forgets what was not sent: nobody is there for it.
    pub(crate) fn clear(&self) {
        let mut state = self.state();
        state.queue.clear();
        state.refused.clear();
    }

    pub(crate) fn received(&self, descriptors: usize) {
        self.state().received += descriptors as u64;
    }

    pub(crate) fn figures(&self) -> Value {
        let state = self.state();
        json!({"sent": state.sent, "received": state.received, "refused": state.refusals, "queued": state.queue.len()})
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    fn flush(&mut self) -> Flush {
        let Some(socket) = self.socket.clone() else { return Flush::NoSocket };
        while !self.queue.is_empty() {
            let Err(error) = socket.get_ref().send_all(self.queue.make_contiguous()) else {
                self.sent += self.queue.len() as u64;
                self.queue.clear();
                break;
            };
            self.sent += error.delivered as u64;
            self.queue.drain(..error.delivered);
            match error.cause {
                SendCause::WouldBlock => return Flush::Blocked(socket),
                SendCause::Full => return Flush::NoMemory,
                SendCause::Refused => {
                    if let Some(refused) = self.queue.pop_front() {
                        self.refusals += 1;
                        self.refused.insert((refused.chain, refused.dst));
                    }
                }
                SendCause::Closed | SendCause::Io(_) => {
                    tracing::warn!(error = %error.cause, "data socket is closed");
                    self.socket = None;
                    return Flush::NoSocket;
                }
            }
        }
        Flush::Done
    }
}

/// Sends what could not be sent at once, and has refused receivers tried again.
pub(crate) async fn run(gateway: Arc<Gateway>, commands: mpsc::UnboundedSender<Command>) {
    let mut pause = REFUSED.0;
    loop {
        gateway.outbox.wake.notified().await;
        drive(&gateway.outbox).await;
        let refused = std::mem::take(&mut gateway.outbox.state().refused);
        if refused.is_empty() {
            pause = REFUSED.0;
            continue;
        }
        for _ in &refused {
            gateway.metrics.dropped(Ignored::Refused);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(REFUSED.1);
        for (chain, role) in refused {
            let _the_process_ends = commands.send(Command::Resend { chain, role });
        }
    }
}

async fn drive(outbox: &Outbox) {
    loop {
        let flushed = outbox.state().flush();
        match flushed {
            Flush::Done | Flush::NoSocket => return,
            Flush::NoMemory => tokio::time::sleep(NO_MEMORY).await,
            Flush::Blocked(socket) => {
                let Ok(mut guard) = socket.writable().await else { return };
                // The readiness may be older than the refusal: forget it if the socket still says no.
                if matches!(outbox.state().flush(), Flush::Blocked(_)) {
                    guard.clear_ready();
                }
            }
        }
    }
}
