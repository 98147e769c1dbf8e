//! An open loop: requests are due at fixed times, whether answers come or not, and an answer's time counts from when its request
//! was due. So a server that stops for a while is charged for every request that should have come meanwhile.
//!
//! One thread, one epoll, one timer set to the next request: nothing is rounded to milliseconds, and nothing spins.

use std::{
    collections::VecDeque,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustix::{
    event::epoll::{self, CreateFlags, EventData, EventFlags},
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

/// Answers that come later than this do not come.
const LATE: Duration = Duration::from_secs(5);
/// Of all requests, the first tenth is not counted: caches and connections are made meanwhile.
const WARM: usize = 10;
/// The timer, among the numbers of connections.
const TIMER: u64 = u64::MAX;

/// Milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Latency {
    pub(super) p50: f64,
    pub(super) p99: f64,
}

/// So many requests a second over so many connections.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) rate: f64,
    pub(super) connections: usize,
    pub(super) time: Duration,
}

struct Connection {
    stream: TcpStream,
    /// When the request under way was due.
    due: Option<Instant>,
    read: Vec<u8>,
}

struct Run<'a> {
    body: &'a str,
    request: String,
    connections: Vec<Connection>,
    free: Vec<usize>,
    /// Due, and no connection is free.
    late: VecDeque<Instant>,
    latencies: Vec<Duration>,
}

/// Runs the plan; every answer's body must be `body`.
pub(super) fn open_loop(at: SocketAddr, body: &str, plan: Plan) -> anyhow::Result<Latency> {
    let poll = epoll::create(CreateFlags::CLOEXEC)?;
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
    epoll::add(&poll, &timer, EventData::new_u64(TIMER), EventFlags::IN)?;
    let mut run = Run::connect(at, body, plan.connections)?;
    for (number, connection) in (0..).zip(&run.connections) {
        epoll::add(&poll, &connection.stream, EventData::new_u64(number), EventFlags::IN)?;
    }
    let interval = Duration::from_secs_f64(1.0 / plan.rate);
    let start = Instant::now();
    let end = start + plan.time;
    let mut next = start;
    let mut events = Vec::with_capacity(plan.connections + 1);
    loop {
        let now = Instant::now();
        while next <= now && next < end {
            run.late.push_back(next);
            next += interval;
        }
        run.send()?;
        if next >= end && run.free.len() == plan.connections && run.late.is_empty() {
            break;
        }
        ensure!(now < end + LATE, "{at}: {} requests without an answer", plan.connections - run.free.len());
        let wait =
            if next < end { next } else { end + LATE }.saturating_duration_since(now).max(Duration::from_nanos(1));
        arm(&timer, wait)?;
        events.clear();
        match epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &events {
            let number = event.data.u64();
            if number != TIMER {
                run.readable(usize::try_from(number)?)?;
            }
        }
    }
    run.latency()
}

fn arm(timer: &impl std::os::fd::AsFd, wait: Duration) -> anyhow::Result<()> {
    let never = Timespec { tv_sec: 0, tv_nsec: 0 };
    let once = Itimerspec { it_interval: never, it_value: Timespec::try_from(wait)? };
    timerfd_settime(timer, TimerfdTimerFlags::empty(), &once)?;
    Ok(())
}

// === impl Run ===

impl<'a> Run<'a> {
    fn connect(at: SocketAddr, body: &'a str, connections: usize) -> anyhow::Result<Self> {
        let connect = |_| -> io::Result<Connection> {
            let stream = TcpStream::connect(at)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            Ok(Connection { stream, due: None, read: Vec::new() })
        };
        Ok(Self {
            body,
            request: format!("GET / HTTP/1.1\r\nHost: {at}\r\n\r\n"),
            connections: (0..connections).map(connect).collect::<io::Result<_>>()?,
            free: (0..connections).collect(),
            late: VecDeque::new(),
            latencies: Vec::new(),
        })
    }

    /// Sends what is due over what is free.
    fn send(&mut self) -> anyhow::Result<()> {
        while !self.late.is_empty()
            && let Some(number) = self.free.pop()
        {
            let connection = &mut self.connections[number];
            connection.due = self.late.pop_front();
            connection.stream.write_all(self.request.as_bytes())?;
        }
        Ok(())
    }

    fn readable(&mut self, number: usize) -> anyhow::Result<()> {
        let connection = &mut self.connections[number];
        let mut bytes = [0; 4096];
        match connection.stream.read(&mut bytes) {
            Ok(0) => anyhow::bail!("a connection was closed"),
            Ok(read) => connection.read.extend_from_slice(&bytes[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let text = std::str::from_utf8(&connection.read)?;
        let Some((head, body)) = text.split_once("\r\n\r\n") else { return Ok(()) };
        if body.len() < self.body.len() {
            return Ok(());
        }
        ensure!(head.starts_with("HTTP/1.1 200") && body == self.body, "answered {text:?}");
        connection.read.clear();
        let due = connection.due.take().context("an answer without a request")?;
        self.latencies.push(due.elapsed());
        self.free.push(number);
        Ok(())
    }

    fn latency(mut self) -> anyhow::Result<Latency> {
        let warm = self.latencies.len() / WARM;
        let counted = &mut self.latencies[warm..];
        ensure!(counted.len() >= 100, "{} answers are too few", counted.len());
        counted.sort_unstable();
        let at = |percent: usize| counted[(counted.len() - 1) * percent / 100].as_secs_f64() * 1e3;
        Ok(Latency { p50: at(50), p99: at(99) })
    }
}
