//! What autoscalers ask a container's proxy: how many requests at once, how many in all, in the last second.
//!
//! Nothing ticks: a second that has passed is closed by whoever looks next, a request or a scrape. An idle container
//! costs nothing, and a scrape sees the same as if somebody had closed each second in time.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prost::Message;
use tokio::time::Instant;

use crate::upstream::Keep;

/// What a report covers.
const PERIOD: Duration = Duration::from_secs(1);

/// The message of Knative's autoscaler, as scraped from port 9090 and as sent by activators.
#[derive(Clone, PartialEq, Message)]
pub struct Stat {
    /// Whose it is.
    #[prost(string, tag = "1")]
    pub pod_name: String,
    /// Mean number of requests at once, queued ones included.
    #[prost(double, tag = "2")]
    pub average_concurrent_requests: f64,
    /// The same of those that came by way of the activator, which counts them as well.
    #[prost(double, tag = "3")]
    pub average_proxied_concurrent_requests: f64,
    /// Requests that came.
    #[prost(double, tag = "4")]
    pub request_count: f64,
    /// Requests that came by way of the activator.
    #[prost(double, tag = "5")]
    pub proxied_request_count: f64,
    /// Seconds since the process began.
    #[prost(double, tag = "6")]
    pub process_uptime: f64,
    /// Unset by proxies of containers.
    #[prost(int64, tag = "7")]
    pub timestamp: i64,
}

/// One period's figures.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Time-weighted mean of requests at once.
    pub concurrency: f64,
    /// The same of proxied ones.
    pub proxied_concurrency: f64,
    /// Requests that came.
    pub count: f64,
    /// Proxied ones that came.
    pub proxied_count: f64,
}

/// Figures of one container. Pure: every call is told the time.
#[derive(Debug)]
pub struct Window {
    begun: Instant,
    changed: Instant,
    present: [u32; 2],
    /// Request-nanoseconds since the period began, all and proxied; whole numbers, so that one all the time is 1.
    busy: [u64; 2],
    came: [u32; 2],
    last: Option<Report>,
}

/// [`Window`] shared by all requests of a container. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Stats {
    window: Arc<Mutex<Window>>,
    began: Instant,
}

/// A request that is counted until dropped.
#[derive(Debug)]
pub struct Present {
    window: Arc<Mutex<Window>>,
    proxied: bool,
}

// === impl Window ===

impl Window {
    /// Nobody is there.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self { begun: now, changed: now, present: [0; 2], busy: [0; 2], came: [0; 2], last: None }
    }

    /// A request comes.
    pub fn come(&mut self, proxied: bool, now: Instant) {
        self.advance(now);
        for which in 0..=usize::from(proxied) {
            self.present[which] += 1;
            self.came[which] += 1;
        }
    }

    /// A request ends.
    pub fn go(&mut self, proxied: bool, now: Instant) {
        self.advance(now);
        for which in 0..=usize::from(proxied) {
            self.present[which] = self.present[which].saturating_sub(1);
        }
    }

    /// The last whole period; `None` before there has been one.
    pub fn report(&mut self, now: Instant) -> Option<Report> {
        self.advance(now);
        self.last
    }

    /// Requests that are there.
    #[must_use]
    pub const fn present(&self) -> u32 {
        self.present[0]
    }

    fn advance(&mut self, now: Instant) {
        let end = self.begun + PERIOD;
        if now < end {
            self.weigh(now);
            return;
        }
        self.weigh(end);
        let mean = |busy: u64| Duration::from_nanos(busy).as_secs_f64() / PERIOD.as_secs_f64();
        self.last = Some(Report {
            concurrency: mean(self.busy[0]),
            proxied_concurrency: mean(self.busy[1]),
            count: self.came[0].into(),
            proxied_count: self.came[1].into(),
        });
        (self.busy, self.came) = ([0; 2], [0; 2]);
        let periods = now.saturating_duration_since(self.begun).as_secs();
        self.begun += Duration::from_secs(periods);
        if periods > 1 {
            // Whole periods in which nobody came or went.
            let [all, proxied] = self.present.map(f64::from);
            self.last = Some(Report { concurrency: all, proxied_concurrency: proxied, ..Report::default() });
        }
        self.changed = self.begun;
        self.weigh(now);
    }

    fn weigh(&mut self, now: Instant) {
        // At most a period.
        let passed = u64::try_from(now.saturating_duration_since(self.changed).as_nanos()).unwrap_or(u64::MAX);
        for which in 0..2 {
            self.busy[which] = self.busy[which].saturating_add(u64::from(self.present[which]).saturating_mul(passed));
        }
        self.changed = self.changed.max(now);
    }
}

// === impl Stats ===

impl Stats {
    /// Figures of a container that begins now.
    #[must_use]
    pub fn new() -> Self {
        let now = Instant::now();
        Self { window: Arc::new(Mutex::new(Window::new(now))), began: now }
    }

    /// Counts a request until it is dropped.
    #[must_use]
    pub fn come(&self, proxied: bool) -> Present {
        let now = Instant::now();
        lock(&self.window).come(proxied, now);
        Present { window: Arc::clone(&self.window), proxied }
    }

    /// Requests that are there.
    #[must_use]
    pub fn present(&self) -> u32 {
        lock(&self.window).present()
    }

    /// The last whole second; before there has been one, nothing but the name.
    #[must_use]
    pub fn stat(&self, pod_name: &str) -> Stat {
        let now = Instant::now();
        let named = Stat { pod_name: pod_name.to_owned(), ..Stat::default() };
        let Some(report) = lock(&self.window).report(now) else { return named };
        Stat {
            average_concurrent_requests: report.concurrency,
            average_proxied_concurrent_requests: report.proxied_concurrency,
            request_count: report.count,
            proxied_request_count: report.proxied_count,
            process_uptime: now.saturating_duration_since(self.began).as_secs_f64(),
            ..named
        }
    }
}

impl Default for Stats {
    fn default() -> Self {
        Self::new()
    }
}

fn lock(window: &Mutex<Window>) -> MutexGuard<'_, Window> {
    window.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Present ===

impl Keep for Present {}

impl Drop for Present {
    fn drop(&mut self) {
        let now = Instant::now();
        lock(&self.window).go(self.proxied, now);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Longest name that Kubernetes allows: the autoscaler reads no more than 336 bytes.
    #[test]
    fn knative_a_stat_is_small() {
        let stat = Stat {
            pod_name: "p".repeat(253),
            average_concurrent_requests: f64::MAX,
            average_proxied_concurrent_requests: f64::MAX,
            request_count: f64::MAX,
            proxied_request_count: f64::MAX,
            process_uptime: f64::MAX,
            timestamp: 0,
        };
        assert!(stat.encoded_len() <= 336, "{}", stat.encoded_len());
    }

    /// As recorded from an idle queue-proxy: name and uptime, 47 bytes.
    #[test]
    fn knative_an_idle_stat_is_name_and_uptime() {
        let pod_name = "shop-blue-deployment-b6df94869-hkmcb".to_owned();
        let bytes = Stat { pod_name, process_uptime: 30.5, ..Stat::default() }.encode_to_vec();
        assert_eq!((bytes.len(), bytes[0], bytes[1], bytes[38]), (47, 0x0a, 36, 0x31));
    }

    #[test]
    fn the_mean_is_weighted_by_time() {
        let start = Instant::now();
        let mut window = Window::new(start);
        assert_eq!(window.report(start + ms(999)), None, "no second has passed");
        let mut window = Window::new(start);
        window.come(false, start + ms(250));
        window.come(true, start + ms(500));
        window.go(true, start + ms(750));
        let report = window.report(start + ms(1000)).expect("a second");
        assert_eq!(report, Report { concurrency: 1.0, proxied_concurrency: 0.25, count: 2.0, proxied_count: 1.0 });
        let report = window.report(start + ms(5500)).expect("seconds");
        assert_eq!(report, Report { concurrency: 1.0, ..Report::default() }, "one stayed, nobody came");
        window.go(false, start + ms(5500));
        let report = window.report(start + ms(6100)).expect("seconds");
        assert_eq!(report, Report { concurrency: 0.5, ..Report::default() });
    }

    proptest! {
        /// Whoever looks in between changes nothing.
        #[test]
        fn looking_changes_nothing(
            moves in proptest::collection::vec((0_u64..700, any::<bool>(), any::<bool>()), 1..60),
            looks in proptest::collection::vec(0_u64..20_000, 0..40),
        ) {
            let start = Instant::now();
            let mut events: Vec<(u64, Option<(bool, bool)>)> = looks.into_iter().map(|at| (at, None)).collect();
            let mut at = 0;
            for (wait, comes, proxied) in moves {
                at += wait;
                events.push((at, Some((comes, proxied))));
            }
            events.sort_by_key(|(at, _)| *at);
            let (mut quiet, mut watched) = (Window::new(start), Window::new(start));
            for (at, what) in events {
                let now = start + ms(at);
                match what {
                    Some((true, proxied)) => { quiet.come(proxied, now); watched.come(proxied, now); }
                    Some((false, proxied)) => { quiet.go(proxied, now); watched.go(proxied, now); }
                    None => { watched.report(now); }
                }
                let (mut a, mut b) = (Window { ..clone(&quiet) }, Window { ..clone(&watched) });
                match (a.report(now), b.report(now)) {
                    (Some(a), Some(b)) => {
                        prop_assert!((a.concurrency - b.concurrency).abs() < 1e-9);
                        prop_assert!((a.proxied_concurrency - b.proxied_concurrency).abs() < 1e-9);
                        prop_assert!((a.count - b.count).abs() < 1e-9);
                    }
                    (a, b) => prop_assert_eq!(a, b),
                }
            }
        }
    }

    fn clone(window: &Window) -> Window {
        Window { ..*window }
    }
}
