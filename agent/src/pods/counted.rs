//! What the kernel counts of the pods' connections, by the names of the pods.
//!
//! The gateway counts requests; this counts what it did with the network, whichever gateway it was, and what waits for one that is
//! not there. Nothing happens here while nobody asks.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use lifl_api::pod::{NodePod, PodPort};
use lifl_ebpf::{Connections, PathError, Traffic, side};
use prometheus::{
    IntCounterVec, IntGauge, IntGaugeVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

const NAMES: [&str; 3] = ["namespace", "pod", "revision"];
const SIDES: [(&str, u32); 2] = [("accepted", side::ACCEPTED), ("dialled", side::DIALLED)];

/// The counters of this node's pods; empty where the kernel does not count.
#[derive(Debug)]
pub struct Counted {
    kernel: Option<Traffic>,
    /// By place: namespace, pod, revision.
    names: Mutex<BTreeMap<u64, [String; 3]>>,
    complained: AtomicBool,
    metrics: Metrics,
}

/// [`Counted`] as metrics: read when they are asked for.
#[derive(Debug)]
pub struct Shown(pub Arc<Counted>);

#[derive(Debug)]
struct Metrics {
    works: IntGauge,
    opened: IntCounterVec,
    open: IntGaugeVec,
    bytes: IntCounterVec,
    retransmitted: IntCounterVec,
    failed: IntCounterVec,
}

// === impl Counted ===

impl Counted {
    /// With the kernel's counters, or without any.
    #[must_use]
    pub fn new(kernel: Option<Traffic>) -> Self {
        let metrics =
            Metrics::new().unwrap_or_else(|error| unreachable!("names and labels of metrics are constants: {error}"));
        metrics.works.set(i64::from(kernel.is_some()));
        Self { kernel, names: Mutex::default(), complained: AtomicBool::new(false), metrics }
    }

    /// Counts what comes over a pod's listeners for requests. Those beside them, for figures and for the drain, are not counted.
    pub(super) fn open<'a>(
        &self,
        place: u64,
        pod: &NodePod,
        listeners: impl Iterator<Item = (&'a PodPort, &'a OwnedFd)>,
    ) {
        let Some(kernel) = &self.kernel else { return };
        let begin = || {
            kernel.open(place)?;
            let serving = listeners.filter(|(port, _)| matches!(port, PodPort::Serving | PodPort::ServingTls));
            serving.into_iter().try_for_each(|(_, fd)| kernel.mark(fd.as_fd(), place, side::ACCEPTED))
        };
        self.complain(begin());
        let names = [&pod.namespace, &pod.name, &pod.settings.revision].map(Clone::clone);
        self.names().insert(place, names);
    }

    /// Counts what these sockets will be connected to.
    pub(super) fn dialling(&self, place: u64, sockets: &[OwnedFd]) {
        let Some(kernel) = &self.kernel else { return };
        self.complain(sockets.iter().try_for_each(|socket| kernel.mark(socket.as_fd(), place, side::DIALLED)));
    }

    /// The pod is gone, and its counters with it.
    pub(super) fn close(&self, place: u64) {
        if let Some(kernel) = &self.kernel {
            kernel.close(place);
            self.names().remove(&place);
        }
    }

    /// No place is counted but those that are open.
    pub(super) fn forget_others(&self) {
        if let Some(kernel) = &self.kernel {
            let open = self.names().keys().copied().collect();
            self.complain(kernel.keep(&open));
        }
    }

    /// As it is now, by place.
    pub fn read(&self) -> BTreeMap<u64, Connections> {
        let Some(kernel) = &self.kernel else { return BTreeMap::new() };
        if let Err(error) = kernel.settle() {
            tracing::debug!(%error, "connections that stand are not settled");
        }
        let places: Vec<u64> = self.names().keys().copied().collect();
        places.into_iter().filter_map(|place| Some((place, kernel.connections(place).ok()?))).collect()
    }

    /// Once: it would be the same with each connection.
    fn complain(&self, outcome: Result<(), PathError>) {
        if let Err(error) = outcome
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%error, "a pod's connections are not counted");
        }
    }

    fn names(&self) -> MutexGuard<'_, BTreeMap<u64, [String; 3]>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Shown ===

impl Collector for Shown {
    fn desc(&self) -> Vec<&Desc> {
        self.0.metrics.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let counts = self.0.read();
        let names = self.0.names();
        let of = &self.0.metrics;
        of.reset();
        for (place, counts) in &counts {
            let Some(names) = names.get(place) else { continue };
            let [namespace, pod, revision] = names.each_ref().map(String::as_str);
            let named = [namespace, pod, revision];
            of.failed.with_label_values(&named).inc_by(counts.failed);
            for (name, side) in SIDES {
                let (side, labels) = (side as usize, [namespace, pod, revision, name]);
                of.opened.with_label_values(&labels).inc_by(counts.opened[side]);
                let open = counts.opened[side].saturating_sub(counts.closed[side]);
                of.open.with_label_values(&labels).set(i64::try_from(open).unwrap_or(i64::MAX));
                of.retransmitted.with_label_values(&labels).inc_by(counts.retransmitted[side]);
                for (flow, bytes) in [("received", counts.received), ("sent", counts.sent)] {
                    of.bytes.with_label_values(&[namespace, pod, revision, name, flow]).inc_by(bytes[side]);
                }
            }
        }
        of.all().into_iter().flat_map(Collector::collect).collect()
    }
}

// === impl Metrics ===

impl Metrics {
    fn new() -> Result<Self, prometheus::Error> {
        let [namespace, pod, revision] = NAMES;
        let by_side = [namespace, pod, revision, "direction"];
        let by_flow = [namespace, pod, revision, "direction", "flow"];
        let counter = |name, help, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        Ok(Self {
            works: IntGauge::new("lifl_pod_counters", "1 where the kernel counts connections of pods (eBPF).")?,
            opened: counter("lifl_pod_connections_total", "Connections of a pod, as the kernel saw them.", &by_side)?,
            open: IntGaugeVec::new(Opts::new("lifl_pod_connections", "Of them, those that stand."), &by_side)?,
            bytes: counter("lifl_pod_bytes_total", "Bytes of a pod's connections.", &by_flow)?,
            retransmitted: counter(
                "lifl_pod_retransmits_total",
                "Segments sent again, of connections that have ended.",
                &by_side,
            )?,
            failed: counter(
                "lifl_pod_dial_failures_total",
                "Connections to a pod's app that did not come to stand.",
                &NAMES,
            )?,
        })
    }

    fn all(&self) -> [&dyn Collector; 6] {
        [&self.works, &self.opened, &self.open, &self.bytes, &self.retransmitted, &self.failed]
    }

    fn reset(&self) {
        self.opened.reset();
        self.open.reset();
        self.bytes.reset();
        self.retransmitted.reset();
        self.failed.reset();
    }
}
