//! Dialling inside pods: the agent makes sockets in their network namespaces, this process connects them.

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::TcpStream as StdStream,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lifl_api::pod::{MAX_SOCKETS, PodAsk};
use lifl_proxy::{Dial, Endpoint};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::{mpsc, oneshot},
};

/// Sockets of pods, not connected yet. Clones share them.
#[derive(Clone, Debug)]
pub struct Sockets {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    stocks: Mutex<HashMap<u64, Stock>>,
    ask: mpsc::UnboundedSender<PodAsk>,
}

/// What is there for one place. An idle pod holds none; each time it runs out it is given twice as many.
#[derive(Debug, Default)]
struct Stock {
    idle: Vec<OwnedFd>,
    waiting: VecDeque<oneshot::Sender<io::Result<OwnedFd>>>,
    /// As many are asked for, and not here yet.
    asked: u32,
    batch: u32,
}

// === impl Sockets ===

impl Sockets {
    /// No sockets yet; more are asked for over `ask`.
    #[must_use]
    pub fn new(ask: mpsc::UnboundedSender<PodAsk>) -> Self {
        Self { shared: Arc::new(Shared { stocks: Mutex::default(), ask }) }
    }

    /// A place that can be dialled from now on.
    pub(super) fn open(&self, place: u64) {
        self.stocks().entry(place).or_default();
    }

    /// The place is gone: its sockets are closed, whoever waits for one is told.
    pub(super) fn close(&self, place: u64) {
        // Dropped outside the lock: each is a system call.
        drop(self.stocks().remove(&place));
    }

    /// More sockets of a place.
    pub(super) fn filled(&self, place: u64, fds: Vec<OwnedFd>) {
        let mut stocks = self.stocks();
        let Some(stock) = stocks.get_mut(&place) else { return };
        stock.asked = 0;
        stock.idle.extend(fds);
        while let Some(fd) = stock.idle.pop() {
            let Some(waiting) = stock.waiting.pop_front() else {
                stock.idle.push(fd);
                break;
            };
            if let Err(Ok(fd)) = waiting.send(Ok(fd)) {
                stock.idle.push(fd);
            }
        }
        self.ask(place, stock);
    }

    /// None can be had.
    pub(super) fn refused(&self, place: u64, reason: &str) {
        let waiting = match self.stocks().get_mut(&place) {
            Some(stock) => {
                stock.asked = 0;
                std::mem::take(&mut stock.waiting)
            }
            None => return,
        };
        for waiting in waiting {
            let _gave_up = waiting.send(Err(io::Error::other(reason.to_owned())));
        }
    }

    /// Another agent than the one that was asked.
    pub(super) fn agent_is_new(&self) {
        for (place, stock) in self.stocks().iter_mut() {
            stock.asked = 0;
            self.ask(*place, stock);
        }
    }

    /// Asks for more, if more are wanted than are under way.
    fn ask(&self, place: u64, stock: &mut Stock) {
        stock.waiting.retain(|waiting| !waiting.is_closed());
        let wanted = u32::try_from(stock.waiting.len()).unwrap_or(u32::MAX);
        if wanted == 0 || stock.asked > 0 {
            return;
        }
        stock.batch = stock.batch.saturating_mul(2).max(wanted).clamp(1, MAX_SOCKETS);
        stock.asked = stock.batch;
        let _the_process_ends = self.shared.ask.send(PodAsk::Sockets { place, count: stock.batch });
    }

    async fn take(&self, place: u64) -> io::Result<OwnedFd> {
        let coming = {
            let mut stocks = self.stocks();
            let stock = stocks.get_mut(&place).ok_or_else(gone)?;
            if let Some(fd) = stock.idle.pop() {
                return Ok(fd);
            }
            let (waiting, coming) = oneshot::channel();
            stock.waiting.push_back(waiting);
            self.ask(place, stock);
            coming
        };
        coming.await.unwrap_or_else(|_closed| Err(gone()))
    }

    fn stocks(&self) -> MutexGuard<'_, HashMap<u64, Stock>> {
        self.shared.stocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dial for Sockets {
    async fn dial(&self, to: &Endpoint) -> io::Result<TcpStream> {
        if to.place == 0 {
            return TcpStream::connect(to.addr).await;
        }
        let fd = self.take(to.place).await?;
        TcpSocket::from_std_stream(StdStream::from(fd)).connect(to.addr).await
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the pod is gone")
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use lifl_proxy::Protocol;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    use tokio::net::TcpListener;

    use super::*;

    fn socket() -> OwnedFd {
        socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
            .unwrap()
    }

    #[tokio::test]
    async fn sockets_are_asked_for_when_they_are_needed_and_twice_as_many_each_time() {
        let (ask, mut asked) = mpsc::unbounded_channel();
        let sockets = Sockets::new(ask);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let to = Endpoint { addr: listener.local_addr().unwrap(), protocol: Protocol::H1, place: 7 };
        assert!(sockets.dial(&to).await.is_err(), "a place that nobody told of");
        sockets.open(7);
        assert!(asked.try_recv().is_err(), "an idle pod costs nothing");
        for count in [1, 2, 4] {
            let mut dials: Vec<_> = (0..count)
                .map(|_| {
                    tokio::spawn({
                        let s = sockets.clone();
                        async move { s.dial(&to).await }
                    })
                })
                .collect();
            let PodAsk::Sockets { place: 7, count: told } = asked.recv().await.unwrap() else { panic!() };
            assert!((1..=MAX_SOCKETS).contains(&told));
            sockets.filled(7, (0..told).map(|_| socket()).collect());
            while dials.iter().any(|dial| !dial.is_finished()) {
                tokio::select! {
                    Some(PodAsk::Sockets { count, .. }) = asked.recv() => sockets.filled(7, (0..count).map(|_| socket()).collect()),
                    () = tokio::task::yield_now() => {}
                }
            }
            for dial in dials.drain(..) {
                assert_eq!(dial.await.unwrap().unwrap().peer_addr().unwrap(), to.addr);
            }
            // What is left would answer the next round without a question.
            sockets.stocks().get_mut(&7).unwrap().idle.clear();
        }
        assert!(sockets.stocks()[&7].batch >= 4);
    }

    #[tokio::test]
    async fn who_waits_is_told_of_refusals_and_ends_and_a_new_agent_is_asked_again() {
        let (ask, mut asked) = mpsc::unbounded_channel();
        let sockets = Sockets::new(ask);
        let to = Endpoint { addr: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), protocol: Protocol::H1, place: 7 };
        sockets.open(7);
        let dial = || {
            tokio::spawn({
                let s = sockets.clone();
                async move { s.dial(&to).await }
            })
        };
        let first = dial();
        assert_eq!(asked.recv().await, Some(PodAsk::Sockets { place: 7, count: 1 }));
        sockets.agent_is_new();
        assert!(matches!(asked.recv().await, Some(PodAsk::Sockets { place: 7, .. })));
        sockets.refused(7, "no such namespace");
        assert!(first.await.unwrap().unwrap_err().to_string().contains("no such namespace"));
        let second = dial();
        assert!(asked.recv().await.is_some());
        sockets.close(7);
        assert_eq!(second.await.unwrap().unwrap_err().kind(), io::ErrorKind::NotConnected);
    }
}
