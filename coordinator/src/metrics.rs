//! What Prometheus is told.

use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts, Registry};

/// Rounds last from the second of a demo to the hours of phones at night.
const BUCKETS: [f64; 14] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 14400.0];

/// Metrics of the coordinator.
#[derive(Debug)]
pub(crate) struct Metrics {
    rounds: IntCounterVec,
    seconds: Histogram,
}

// === impl Metrics ===

impl Metrics {
    /// Registers them.
    pub(crate) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let rounds = IntCounterVec::new(
            Opts::new("lifl_rounds_total", "Rounds that ended, by outcome: committed, unused, failed."),
            &["namespace", "job", "outcome"],
        )?;
        let seconds = Histogram::with_opts(
            HistogramOpts::new("lifl_round_duration_seconds", "From the opening of a round to its commit.")
                .buckets(BUCKETS.to_vec()),
        )?;
        registry.register(Box::new(rounds.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        Ok(Self { rounds, seconds })
    }

    /// A round ended.
    pub(crate) fn ended(&self, namespace: &str, job: &str, outcome: &str) {
        self.rounds.with_label_values(&[namespace, job, outcome]).inc();
    }

    /// The job is no more.
    pub(crate) fn forget(&self, namespace: &str, job: &str) {
        for outcome in ["committed", "unused", "failed"] {
            let _there_were_none = self.rounds.remove_label_values(&[namespace, job, outcome]);
        }
    }

    /// How long a committed round took.
    pub(crate) fn took(&self, seconds: f64) {
        self.seconds.observe(seconds);
    }
}
