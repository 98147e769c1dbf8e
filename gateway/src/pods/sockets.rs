//! Dialling inside pods: the agent makes sockets in their network namespaces, this process connects them.
//!
//! They are asked for ahead, as many as a pod was dialled with of late: while an agent is started again connections are made all
//! the same. Whoever finds none waits for the agent, in order, whichever agent it is. A pod that nobody calls keeps a few.

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::TcpStream as StdStream,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use lifl_api::pod::{MAX_SOCKETS, PodAsk};
use lifl_proxy::{Dial, Endpoint};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};

/// A connection that is not made by then is given up, as queue-proxy does.
const CONNECT: Duration = Duration::from_secs(10);
/// An agent whose process died is back within 50 ms, one whose pod is replaced within seconds. By then it is not expected any more.
const AGENT_COMES: Duration = Duration::from_secs(60);
/// What a pod was dialled with in as long is what it is to have at hand, and half of it is when more is asked for.
const SPAN: Duration = Duration::from_secs(1);
/// Sockets that a pod keeps however little it is called: about 2 KB each, all of them the kernel's.
const FEW: usize = 4;
/// Sockets at hand for the busiest pod.
const MOST: usize = 256;
/// What is more than is needed is closed so often; nothing runs when there is no such thing.
const SWEEP: Duration = Duration::from_secs(10);

/// Sockets of pods, not connected yet. Clones share them.
#[derive(Clone, Debug)]
pub struct Sockets {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    stocks: Mutex<HashMap<u64, Stock>>,
    ask: mpsc::UnboundedSender<PodAsk>,
    /// Somebody closes what is too many.
    swept: AtomicBool,
}

/// What is there for one place.
#[derive(Debug)]
struct Stock {
    idle: Vec<OwnedFd>,
    waiting: VecDeque<oneshot::Sender<io::Result<OwnedFd>>>,
    /// Asked for and not here yet, a number for each question: an agent answers them in their order.
    asked: VecDeque<usize>,
    taken: Taken,
    /// It was given sockets before: there will be more calls.
    known: bool,
}

/// How many sockets were taken of late: in this span and in the one before.
#[derive(Debug)]
struct Taken {
    since: Instant,
    now: usize,
    before: usize,
}

// === impl Sockets ===

impl Sockets {
    /// The longest that [`Dial::dial`] takes.
    pub(super) const PATIENCE: Duration = AGENT_COMES.saturating_add(CONNECT);

    /// No sockets yet; more are asked for over `ask`.
    #[must_use]
    pub fn new(ask: mpsc::UnboundedSender<PodAsk>) -> Self {
        Self { shared: Arc::new(Shared { stocks: Mutex::default(), ask, swept: AtomicBool::new(false) }) }
    }

    /// A place that can be dialled from now on.
    pub(super) fn open(&self, place: u64) {
        self.shared.stocks().entry(place).or_insert_with(|| Stock::new(Instant::now()));
    }

    /// The place is gone: its sockets are closed, whoever waits for one is told.
    pub(super) fn close(&self, place: u64) {
        let gone = self.shared.stocks().remove(&place);
        // Outside the lock: each is a system call.
        drop(gone);
    }

    /// More sockets of a place. Needs a tokio runtime around it.
    pub(super) fn filled(&self, place: u64, fds: Vec<OwnedFd>) {
        let many = {
            let mut stocks = self.shared.stocks();
            let Some(stock) = stocks.get_mut(&place) else { return };
            stock.fill(fds);
            stock.forget_who_gave_up();
            self.shared.ask(place, stock, Instant::now());
            stock.idle.len() > FEW
        };
        if many {
            self.keep_swept();
        }
    }

    /// None can be had: whoever was to get them is told.
    pub(super) fn refused(&self, place: u64, reason: &str) {
        let told: Vec<_> = {
            let mut stocks = self.shared.stocks();
            let Some(stock) = stocks.get_mut(&place) else { return };
            let count = stock.asked.pop_front().unwrap_or(usize::MAX).min(stock.waiting.len());
            let told = stock.waiting.drain(..count).collect();
            stock.forget_who_gave_up();
            // What nobody waits for is asked for again when somebody comes: by then it may be had.
            if !stock.waiting.is_empty() {
                self.shared.ask(place, stock, Instant::now());
            }
            told
        };
        for waiting in told {
            let _gave_up = waiting.send(Err(io::Error::other(reason.to_owned())));
        }
    }

    /// Another agent than the one that was asked: it is asked for what is wanted still.
    pub(super) fn agent_is_new(&self) {
        for (place, stock) in self.shared.stocks().iter_mut() {
            stock.asked.clear();
            stock.forget_who_gave_up();
            self.shared.ask(*place, stock, Instant::now());
        }
    }

    async fn take(&self, place: u64) -> io::Result<OwnedFd> {
        let coming = {
            let mut stocks = self.shared.stocks();
            let stock = stocks.get_mut(&place).ok_or_else(gone)?;
            let now = Instant::now();
            let taken = stock.take(now);
            self.shared.ask(place, stock, now);
            match taken {
                Ok(fd) => return Ok(fd),
                Err(coming) => coming,
            }
        };
        coming.await.unwrap_or_else(|_closed| Err(gone()))
    }

    /// Closes what is too many from time to time, as long as there is any.
    fn keep_swept(&self) {
        if self.shared.swept.swap(true, Ordering::AcqRel) {
            return;
        }
        let shared = Arc::downgrade(&self.shared);
        tokio::spawn(
            async move {
                loop {
                    sleep(SWEEP).await;
                    let Some(shared) = shared.upgrade() else { return };
                    if shared.sweep(Instant::now()) {
                        return;
                    }
                }
            }
            .boxed(),
        );
    }
}

impl Dial for Sockets {
    async fn dial(&self, to: &Endpoint) -> io::Result<TcpStream> {
        let late = |_late| io::Error::from(io::ErrorKind::TimedOut);
        if to.place == 0 {
            return timeout(CONNECT, TcpStream::connect(to.addr)).await.map_err(late)?;
        }
        let fd = timeout(AGENT_COMES, self.take(to.place)).await.map_err(|_late| agent_is_away())??;
        timeout(CONNECT, TcpSocket::from_std_stream(StdStream::from(fd)).connect(to.addr)).await.map_err(late)?
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the pod is gone")
}

fn agent_is_away() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no socket in the pod: the node's agent is away")
}

// === impl Shared ===

impl Shared {
    /// Asks for what is wanted of a place.
    fn ask(&self, place: u64, stock: &mut Stock, now: Instant) {
        let mut wanted = stock.wanted(now);
        while wanted > 0 {
            let count = u32::try_from(wanted).unwrap_or(u32::MAX).min(MAX_SOCKETS);
            let _the_process_ends = self.ask.send(PodAsk::Sockets { place, count });
            stock.asked.push_back(count as usize);
            wanted -= count as usize;
        }
    }

    /// Closes surplus sockets; true when none is left that a later sweep would close.
    fn sweep(&self, now: Instant) -> bool {
        let mut closed = Vec::new();
        let mut stocks = self.stocks();
        for stock in stocks.values_mut() {
            closed.extend(stock.surplus(now));
        }
        let none_is_left = stocks.values().all(|stock| stock.idle.len() <= FEW);
        if none_is_left {
            // Under the lock: who fills a stock after this finds that nobody sweeps.
            self.swept.store(false, Ordering::Release);
        }
        drop(stocks);
        drop(closed);
        none_is_left
    }

    fn stocks(&self) -> MutexGuard<'_, HashMap<u64, Stock>> {
        self.stocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Stock ===

impl Stock {
    fn new(now: Instant) -> Self {
        let taken = Taken { since: now, now: 0, before: 0 };
        Self { idle: Vec::new(), waiting: VecDeque::new(), asked: VecDeque::new(), taken, known: false }
    }

    /// A socket, or when it comes.
    fn take(&mut self, now: Instant) -> Result<OwnedFd, oneshot::Receiver<io::Result<OwnedFd>>> {
        self.taken.note(now);
        self.idle.pop().ok_or_else(|| {
            // Each call would look at all of them: they are looked at when they would take more room.
            if self.waiting.len() == self.waiting.capacity() {
                self.forget_who_gave_up();
            }
            let (waiting, coming) = oneshot::channel();
            self.waiting.push_back(waiting);
            coming
        })
    }

    fn forget_who_gave_up(&mut self) {
        self.waiting.retain(|waiting| !waiting.is_closed());
    }

    /// The answer to the oldest question: those who wait come first, in order.
    fn fill(&mut self, fds: Vec<OwnedFd>) {
        self.asked.pop_front();
        self.idle.extend(fds);
        while let Some(fd) = self.idle.pop() {
            let Some(waiting) = self.waiting.pop_front() else {
                self.idle.push(fd);
                return;
            };
            // Who gave up leaves it to the next.
            if let Err(Ok(fd)) = waiting.send(Ok(fd)) {
                self.idle.push(fd);
            }
        }
    }

    /// How many are to be asked for. Of the first call nobody knows whether there will be another.
    fn wanted(&mut self, now: Instant) -> usize {
        let (have, waiting) = (self.idle.len() + self.asked.iter().sum::<usize>(), self.waiting.len());
        let reserve = self.taken.reserve(now);
        if have >= waiting + reserve / 2 {
            return 0;
        }
        let ahead = if std::mem::replace(&mut self.known, true) { reserve.max(FEW) } else { 0 };
        (waiting + ahead).saturating_sub(have)
    }

    /// What it does not need any more.
    fn surplus(&mut self, now: Instant) -> Vec<OwnedFd> {
        let keep = self.taken.reserve(now).max(FEW).min(self.idle.len());
        let surplus = self.idle.split_off(keep);
        self.idle.shrink_to(FEW);
        surplus
    }
}

// === impl Taken ===

impl Taken {
    fn note(&mut self, at: Instant) {
        self.turn(at);
        self.now += 1;
    }

    /// As many are to be at hand.
    fn reserve(&mut self, at: Instant) -> usize {
        self.turn(at);
        self.now.max(self.before).min(MOST)
    }

    fn turn(&mut self, at: Instant) {
        let past = at.saturating_duration_since(self.since);
        if past < SPAN {
            return;
        }
        self.before = if past < 2 * SPAN { self.now } else { 0 };
        self.now = 0;
        self.since = at;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use lifl_proxy::Protocol;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    use tokio::{net::TcpListener, task::JoinHandle, task::yield_now, time::advance};

    use super::*;

    type Asked = mpsc::UnboundedReceiver<PodAsk>;

    fn socket() -> OwnedFd {
        socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
            .unwrap()
    }

    fn sockets() -> (Sockets, Asked) {
        let (ask, asked) = mpsc::unbounded_channel();
        let sockets = Sockets::new(ask);
        sockets.open(7);
        (sockets, asked)
    }

    fn dial(sockets: &Sockets, addr: SocketAddr) -> JoinHandle<io::Result<TcpStream>> {
        let (sockets, to) = (sockets.clone(), Endpoint { addr, protocol: Protocol::H1, place: 7 });
        tokio::spawn(async move { sockets.dial(&to).await })
    }

    fn nowhere() -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, 1))
    }

    /// Answers every question that there is, as an agent; how many sockets that were.
    fn answer(sockets: &Sockets, asked: &mut Asked) -> usize {
        let mut given = 0;
        while let Ok(PodAsk::Sockets { place: 7, count }) = asked.try_recv() {
            assert!((1..=MAX_SOCKETS).contains(&count));
            given += count as usize;
            sockets.filled(7, (0..count).map(|_| socket()).collect());
        }
        given
    }

    fn idle(sockets: &Sockets) -> usize {
        sockets.shared.stocks()[&7].idle.len()
    }

    /// Takes as many as that, with an agent that answers at once.
    async fn take(sockets: &Sockets, asked: &mut Asked, count: usize) {
        for _ in 0..count {
            let taken = tokio::spawn({
                let sockets = sockets.clone();
                async move { sockets.take(7).await }
            });
            while !taken.is_finished() {
                answer(sockets, asked);
                yield_now().await;
            }
            taken.await.unwrap().unwrap();
        }
        answer(sockets, asked);
    }

    #[tokio::test]
    async fn a_pod_is_dialled_with_sockets_that_are_asked_for_when_it_is_called() {
        let (sockets, mut asked) = sockets();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let nobodys = Endpoint { addr, protocol: Protocol::H1, place: 8 };
        assert!(sockets.dial(&nobodys).await.is_err(), "a place that nobody told of");
        assert!(asked.try_recv().is_err(), "an idle pod costs nothing");
        for count in [1, 2, 100] {
            let dials: Vec<_> = (0..count).map(|_| dial(&sockets, addr)).collect();
            while dials.iter().any(|dial| !dial.is_finished()) {
                answer(&sockets, &mut asked);
                yield_now().await;
            }
            for dial in dials {
                assert_eq!(dial.await.unwrap().unwrap().peer_addr().unwrap(), addr);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_pod_has_half_a_second_of_sockets_at_hand_and_an_idle_one_a_few() {
        let (sockets, mut asked) = sockets();
        take(&sockets, &mut asked, 1).await;
        assert_eq!(idle(&sockets), 0, "one call does not make a second");
        // 100 a second, for three seconds: the agent may be away for half a second at any time.
        for round in 0..30 {
            take(&sockets, &mut asked, 10).await;
            assert!(round < 10 || idle(&sockets) >= 50, "{} after {round}", idle(&sockets));
            advance(SPAN / 10).await;
        }
        let (before, reserve) = (idle(&sockets), 100);
        assert!((reserve / 2..=2 * reserve).contains(&before), "{before}");
        // Nobody calls any more.
        let swept = || sockets.shared.swept.load(Ordering::Relaxed);
        assert!(swept());
        advance(SWEEP).await;
        while swept() {
            yield_now().await;
        }
        assert_eq!(idle(&sockets), FEW);
        assert!(asked.try_recv().is_err(), "nothing is asked for when nobody calls");
        // Calls that are few and far between neither pile up sockets nor wake anybody.
        for _ in 0..50 {
            take(&sockets, &mut asked, 1).await;
            assert!(idle(&sockets) <= FEW);
            advance(SWEEP).await;
        }
        assert!(!swept());
    }

    #[tokio::test(start_paused = true)]
    async fn the_busiest_pod_has_bounded_many_at_hand() {
        let (sockets, mut asked) = sockets();
        take(&sockets, &mut asked, 20 * MOST).await;
        assert!((MOST / 2..=2 * MOST).contains(&idle(&sockets)), "{}", idle(&sockets));
    }

    #[tokio::test]
    async fn who_waits_is_told_of_refusals_and_ends_and_a_new_agent_is_asked_again() {
        let (sockets, mut asked) = sockets();
        let first = dial(&sockets, nowhere());
        assert_eq!(asked.recv().await, Some(PodAsk::Sockets { place: 7, count: 1 }));
        sockets.agent_is_new();
        assert!(matches!(asked.recv().await, Some(PodAsk::Sockets { place: 7, .. })));
        sockets.refused(7, "no such namespace");
        assert!(first.await.unwrap().unwrap_err().to_string().contains("no such namespace"));
        let second = dial(&sockets, nowhere());
        assert!(asked.recv().await.is_some());
        sockets.close(7);
        assert_eq!(second.await.unwrap().unwrap_err().kind(), io::ErrorKind::NotConnected);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_refused_is_not_asked_for_again_before_somebody_comes() {
        let (sockets, mut asked) = sockets();
        // Busy enough for a reserve.
        take(&sockets, &mut asked, 10).await;
        let calls: Vec<_> = (0..idle(&sockets) + 5).map(|_| dial(&sockets, nowhere())).collect();
        let mut refused = 0;
        while calls.iter().any(|call| !call.is_finished()) {
            yield_now().await;
            while let Ok(PodAsk::Sockets { .. }) = asked.try_recv() {
                sockets.refused(7, "no such namespace");
                refused += 1;
                assert!(refused < 20, "asked again and again for what is refused");
            }
        }
        assert!(refused > 0);
        assert!(asked.try_recv().is_err(), "nobody waits");
        let another = dial(&sockets, nowhere());
        assert!(matches!(asked.recv().await, Some(PodAsk::Sockets { place: 7, .. })));
        sockets.refused(7, "no such namespace");
        assert!(another.await.unwrap().is_err());
    }

    /// Calls that give up while no agent is there are not kept.
    #[tokio::test(start_paused = true)]
    async fn who_gave_up_takes_no_room() {
        let (sockets, _asked) = sockets();
        for _ in 0..1000 {
            let mut call = Box::pin(sockets.take(7));
            assert!(futures_poll(call.as_mut()).await.is_none());
        }
        let room = sockets.shared.stocks()[&7].waiting.capacity();
        assert!(room <= 16, "{room}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_an_agent_gets_the_next_ones_sockets_in_order_or_gives_up() {
        let (sockets, mut asked) = sockets();
        let mut waiting: Vec<_> = (0..5)
            .map(|_| {
                let sockets = sockets.clone();
                Box::pin(async move { sockets.take(7).await })
            })
            .collect();
        for one in &mut waiting {
            assert!(futures_poll(one.as_mut()).await.is_none());
        }
        // The agent dies with all these questions; one of those who wait goes.
        while asked.try_recv().is_ok() {}
        drop(waiting.remove(1));
        sockets.agent_is_new();
        let counts: Vec<_> = std::iter::from_fn(|| asked.try_recv().ok()).collect();
        let PodAsk::Sockets { place: 7, count } = counts[0] else { panic!("{counts:?}") };
        assert!(counts.len() == 1 && (4..=4 + MAX_SOCKETS / 2).contains(&count), "{counts:?}");
        // Two come at first: the two that have waited longest get them.
        sockets.filled(7, vec![socket(), socket()]);
        let mut served = Vec::new();
        for one in &mut waiting {
            served.push(futures_poll(one.as_mut()).await.is_some());
        }
        assert_eq!(served, [true, true, false, false]);
        // No agent comes: nobody waits for ever.
        let late = dial(&sockets, nowhere());
        let began = Instant::now();
        let error = late.await.unwrap().unwrap_err();
        assert_eq!((error.kind(), began.elapsed()), (io::ErrorKind::TimedOut, AGENT_COMES));
        assert!(error.to_string().contains("the node's agent is away"), "{error}");
    }

    /// What is there now.
    async fn futures_poll<T>(mut future: std::pin::Pin<&mut (impl Future<Output = T> + ?Sized)>) -> Option<T> {
        std::future::poll_fn(|context| match future.as_mut().poll(context) {
            std::task::Poll::Ready(done) => std::task::Poll::Ready(Some(done)),
            std::task::Poll::Pending => std::task::Poll::Ready(None),
        })
        .await
    }
}
