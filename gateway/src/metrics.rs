//! Metrics of the gateway (`surface.md` 4). Never a label per client.

use std::sync::{Arc, Weak};

use prometheus::{
    IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::{chain::Ignored, state::Gateway};

/// Counters that events move.
#[derive(Debug)]
pub(crate) struct Metrics {
    updates: IntCounterVec,
    update_bytes: IntCounter,
    drops: IntCounterVec,
}

/// Gauges that are read when asked for: nothing has to be kept in step.
struct Shm {
    gateway: Weak<Gateway>,
    bytes: IntGaugeVec,
}

// === impl Metrics ===

impl Metrics {
    pub(crate) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let updates = Opts::new("lifl_updates_total", "Model updates received, by what became of them.");
        let drops = Opts::new("lifl_descriptor_drops_total", "Descriptors refused or ignored, by reason.");
        let metrics = Self {
            updates: IntCounterVec::new(updates, &["namespace", "job", "outcome"])?,
            update_bytes: IntCounter::new("lifl_update_bytes_total", "Bytes of update bodies received.")?,
            drops: IntCounterVec::new(drops, &["reason"])?,
        };
        registry.register(Box::new(metrics.updates.clone()))?;
        registry.register(Box::new(metrics.update_bytes.clone()))?;
        registry.register(Box::new(metrics.drops.clone()))?;
        Ok(metrics)
    }

    /// Adds the gauges of shared memory.
    pub(crate) fn watch(gateway: &Arc<Gateway>) -> Result<(), prometheus::Error> {
        let opts = Opts::new("lifl_shm_bytes", "Shared memory of a job's upload slots, by state.");
        let bytes = IntGaugeVec::new(opts, &["namespace", "job", "state"])?;
        let shm = Shm { gateway: Arc::downgrade(gateway), bytes };
        gateway.child.registry().register(Box::new(shm))
    }

    pub(crate) fn update(&self, namespace: &str, job: &str, outcome: &str) {
        self.updates.with_label_values(&[namespace, job, outcome]).inc();
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.update_bytes.inc_by(bytes as u64);
    }

    pub(crate) fn dropped(&self, reason: Ignored) {
        self.drops.with_label_values(&[reason.label()]).inc();
    }
}

// === impl Shm ===

impl Collector for Shm {
    fn desc(&self) -> Vec<&Desc> {
        self.bytes.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Some(gateway) = self.gateway.upgrade() else { return Vec::new() };
        for chain in gateway.chains() {
            let inner = chain.lock();
            let Some(arena) = &inner.arena else { continue };
            let slot = i64::try_from(arena.spec().payload_bytes).unwrap_or(i64::MAX);
            let (live, free) = (arena.live_slots(), arena.free_slots());
            let old: u64 = inner.own.values().filter(|own| own.old.is_some()).map(|own| own.bytes).sum();
            let of = |slots: usize| slot.saturating_mul(i64::try_from(slots).unwrap_or(i64::MAX));
            for (state, bytes) in
                [("live", of(live)), ("free", of(free)), ("old", i64::try_from(old).unwrap_or(i64::MAX))]
            {
                self.bytes.with_label_values(&[chain.namespace.as_str(), chain.job.as_str(), state]).set(bytes);
            }
        }
        self.bytes.collect()
    }
}
