//! Counters of the ingress. Requests are counted in the backend that they went to, and read when asked for: a request
//! looks nothing up, and a service that is gone leaves no series behind.

use std::{
    collections::BTreeMap,
    sync::{
        OnceLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::StatusCode;
use lifl_proxy::observe::{Counts, DURATIONS, Durations};
use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::{self, Bucket, LabelPair, Metric, MetricFamily},
};

use super::{
    rules::Listener,
    table::{Outcome, Report, Shared},
};

/// Classes of status codes, as labels.
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// Requests that went to one backend: by class of the answer, and how long the heads of answers took.
#[derive(Debug, Default)]
pub(super) struct Counters {
    classes: [AtomicU64; 5],
    /// Made by the first request: most backends of a cluster have none here.
    waits: OnceLock<Box<Durations>>,
}

/// Why the gateway itself answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// No rule.
    Unknown,
    /// Sent to HTTPS.
    Redirected,
    /// No address.
    NoEndpoint,
    /// An address, but no answer.
    Upstream,
}

/// What is counted apart from backends.
#[derive(Debug)]
pub(super) struct Metrics {
    refused: IntCounterVec,
    /// The same by listener and reason, looked up once: a flood of requests for nobody is to cost little.
    refused_by: [[OnceLock<IntCounter>; Refused::COUNT]; Listener::ALL.len()],
    ingresses: IntGaugeVec,
}

/// Requests of all backends, when asked for.
struct Requests {
    shared: Weak<Shared>,
    requests: IntCounterVec,
    waits: HistogramVec,
}

/// What the backends of one service have counted.
#[derive(Default)]
struct Row {
    classes: [u64; 5],
    waits: Option<Counts<15>>,
}

// === impl Counters ===

impl Counters {
    /// An answer, the head of which took so long.
    pub(super) fn count(&self, status: StatusCode, wait: Duration) {
        let nanos = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        self.waits.get_or_init(|| Box::new(Durations::new(&DURATIONS))).add(nanos);
        let class = usize::from(status.as_u16() / 100).wrapping_sub(1);
        if let Some(counter) = self.classes.get(class) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn add_to(&self, row: &mut Row) {
        for (sum, count) in row.classes.iter_mut().zip(&self.classes) {
            *sum += count.load(Ordering::Relaxed);
        }
        let Some(waits) = self.waits.get().map(|waits| waits.read()) else { return };
        match &mut row.waits {
            Some(sum) => sum.add(&waits),
            none => *none = Some(waits),
        }
    }
}

// === impl Refused ===

impl Refused {
    const COUNT: usize = Self::Upstream as usize + 1;

    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Redirected => "redirected",
            Self::NoEndpoint => "no-endpoint",
            Self::Upstream => "upstream",
        }
    }
}

// === impl Metrics ===

impl Metrics {
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let refused = Opts::new("lifl_ingress_refused_total", "Requests that the ingress answered itself, by reason.");
        let ingresses = Opts::new("lifl_ingress_objects", "Ingresses of our class, by what became of them.");
        let metrics = Self {
            refused: IntCounterVec::new(refused, &["listener", "reason"])?,
            refused_by: Default::default(),
            ingresses: IntGaugeVec::new(ingresses, &["state"])?,
        };
        registry.register(Box::new(metrics.refused.clone()))?;
        registry.register(Box::new(metrics.ingresses.clone()))?;
        Ok(metrics)
    }

    /// Adds the counters of backends.
    pub(super) fn watch(registry: &Registry, shared: Weak<Shared>) -> Result<(), prometheus::Error> {
        let opts =
            Opts::new("lifl_ingress_requests_total", "Requests that a service answered, by class of the status.");
        let requests = IntCounterVec::new(opts, &["namespace", "service", "code"])?;
        let name = "lifl_ingress_request_duration_seconds";
        let opts = HistogramOpts::new(name, "Time until the head of a service's answer.");
        let waits = HistogramVec::new(opts.buckets(DURATIONS.shown().collect()), &["namespace", "service"])?;
        registry.register(Box::new(Requests { shared, requests, waits }))
    }

    pub(super) fn show(&self, report: &Report) {
        for state in ["served", "waiting", "conflict", "failed"] {
            let of_state = |(_, outcome): &&(Option<String>, Outcome)| outcome.label() == state;
            let count = report.ingresses.values().filter(of_state).count();
            self.ingresses.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    pub(super) fn refused(&self, listener: Listener, reason: Refused) {
        let counter = &self.refused_by[listener.index()][reason as usize];
        counter.get_or_init(|| self.refused.with_label_values(&[listener.label(), reason.label()])).inc();
    }
}

// === impl Requests ===

impl Collector for Requests {
    fn desc(&self) -> Vec<&Desc> {
        self.requests.desc().into_iter().chain(self.waits.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Some(shared) = self.shared.upgrade() else { return Vec::new() };
        // A service with rules for two of its ports has one row.
        let mut rows: BTreeMap<(String, String), Row> = BTreeMap::new();
        for backend in shared.backends() {
            let row = rows.entry((backend.name.namespace.clone(), backend.name.service.clone())).or_default();
            backend.counters.add_to(row);
        }
        self.requests.reset();
        let mut waits = self.waits.collect().pop().unwrap_or_default();
        for ((namespace, service), row) in &rows {
            for (class, count) in CLASSES.iter().zip(&row.classes).filter(|(_, count)| **count > 0) {
                self.requests.with_label_values(&[namespace.as_str(), service, class]).inc_by(*count);
            }
            if let Some(counts) = &row.waits {
                waits.mut_metric().push(metric(namespace, service, counts));
            }
        }
        let mut families = self.requests.collect();
        families.push(waits);
        families
    }
}

/// A histogram that was counted elsewhere.
fn metric(namespace: &str, service: &str, counts: &Counts<15>) -> Metric {
    let mut histogram = proto::Histogram::default();
    histogram.set_sample_count(counts.count());
    histogram.set_sample_sum(counts.sum());
    let buckets = counts.cumulative().map(|(bound, count)| {
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(bound);
        bucket.set_cumulative_count(count);
        bucket
    });
    histogram.set_bucket(buckets.collect());
    let label = |name: &str, value: &str| {
        let mut label = LabelPair::default();
        label.set_name(name.to_owned());
        label.set_value(value.to_owned());
        label
    };
    let labels = vec![label("namespace", namespace), label("service", service)];
    let mut metric = Metric::from_label(labels);
    metric.set_histogram(histogram);
    metric
}
