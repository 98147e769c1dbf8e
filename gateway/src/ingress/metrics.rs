//! Counters of the ingress. Requests are counted in the backend that they went to, and read when asked for: a request
//! looks nothing up, and a service that is gone leaves no series behind.

use std::{
    collections::BTreeMap,
    sync::{
        Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use http::StatusCode;
use prometheus::{
    IntCounterVec, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use super::{
    rules::Listener,
    table::{Outcome, Report, Shared},
};

/// Classes of status codes, as labels.
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// Requests that went to one backend, by class of the answer.
#[derive(Debug, Default)]
pub(super) struct Counters([AtomicU64; 5]);

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
    ingresses: IntGaugeVec,
}

/// Requests of all backends, when asked for.
struct Requests {
    shared: Weak<Shared>,
    requests: IntCounterVec,
}

// === impl Counters ===

impl Counters {
    pub(super) fn count(&self, status: StatusCode) {
        let class = usize::from(status.as_u16() / 100).wrapping_sub(1);
        if let Some(counter) = self.0.get(class) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read(&self) -> [u64; 5] {
        std::array::from_fn(|class| self.0[class].load(Ordering::Relaxed))
    }
}

// === impl Refused ===

impl Refused {
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
        registry.register(Box::new(Requests { shared, requests }))
    }

    pub(super) fn show(&self, report: &Report) {
        for state in ["served", "waiting", "conflict", "failed"] {
            let of_state = |(_, outcome): &&(Option<String>, Outcome)| outcome.label() == state;
            let count = report.ingresses.values().filter(of_state).count();
            self.ingresses.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    pub(super) fn refused(&self, listener: Listener, reason: Refused) {
        self.refused.with_label_values(&[listener.label(), reason.label()]).inc();
    }
}

// === impl Requests ===

impl Collector for Requests {
    fn desc(&self) -> Vec<&Desc> {
        self.requests.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Some(shared) = self.shared.upgrade() else { return Vec::new() };
        // A service with rules for two of its ports has one row.
        let mut rows: BTreeMap<(String, String), [u64; 5]> = BTreeMap::new();
        for backend in shared.backends() {
            let row = rows.entry((backend.name.namespace.clone(), backend.name.service.clone())).or_default();
            for (sum, count) in row.iter_mut().zip(backend.counters.read()) {
                *sum += count;
            }
        }
        self.requests.reset();
        for ((namespace, service), row) in &rows {
            for (class, count) in CLASSES.iter().zip(row).filter(|(_, count)| **count > 0) {
                self.requests.with_label_values(&[namespace.as_str(), service, class]).inc_by(*count);
            }
        }
        self.requests.collect()
    }
}
