//! What the agent shows of itself, read when it is asked.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use lifl_ebpf::Path;
use lifl_ebpf_common::{
    maps::{DropReason, STRANGERS},
    role,
};
use prometheus::{
    IntCounterVec, IntGaugeVec, Opts,
    core::{Collector as Collect, Desc},
    proto::MetricFamily,
};
use serde_json::{Value, json};

use crate::state::{Chain, GATEWAY_SEAT, State};

/// Reads maps and state at each scrape: nothing is counted twice, and idle costs nothing.
#[derive(Debug)]
pub(crate) struct Collector {
    state: Arc<Mutex<State>>,
    path: Arc<Path>,
    name: &'static str,
    descriptors: IntCounterVec,
    drops: IntCounterVec,
    aggregators: IntGaugeVec,
    quota: IntGaugeVec,
    folded: prometheus::CounterVec,
}

// === impl Collector ===

impl Collector {
    pub(crate) fn new(state: Arc<Mutex<State>>, path: Arc<Path>, name: &'static str) -> Self {
        let job = &["namespace", "job"];
        let opts = Opts::new;
        // The names are constants of the surface: they are well formed.
        let counter = |name, help, labels: &[&str]| IntCounterVec::new(opts(name, help), labels);
        let gauge = |name, help, labels: &[&str]| IntGaugeVec::new(opts(name, help), labels);
        let valid = "names and labels of metrics are constants";
        let build = || {
            Ok::<_, prometheus::Error>(Self {
                descriptors: counter("lifl_descriptors_total", "Descriptors delivered, by path.", &["path"])?,
                drops: counter("lifl_descriptor_drops_total", "Descriptors refused, by reason.", &["reason"])?,
                aggregators: gauge("lifl_aggregators", "Aggregators that run.", &["namespace", "job", "role"])?,
                quota: gauge("lifl_shm_quota_bytes", "Shared memory that a job may use.", job)?,
                folded: prometheus::CounterVec::new(opts("lifl_fold_seconds_total", "Time in the kernels."), job)?,
                state: state.clone(),
                path: path.clone(),
                name,
            })
        };
        build().unwrap_or_else(|error| unreachable!("{valid}: {error}"))
    }
}

/// Descriptors delivered and refused since the node began, members that are gone included where the path remembers them.
fn totals(state: &State, path: &Path) -> (u64, u64, [u64; DropReason::COUNT]) {
    let seats = state.chains.values().flat_map(|chain| chain.members.values().map(|member| member.meta.seat));
    let (mut messages, mut bytes, mut drops) = state.gone;
    for seat in seats.chain([GATEWAY_SEAT, STRANGERS]) {
        if let Ok(counters) = path.counters(seat) {
            messages += counters.messages;
            bytes += counters.bytes;
            drops.iter_mut().zip(counters.drops).for_each(|(sum, one)| *sum += one);
        }
    }
    (messages, bytes, drops)
}

fn by_role(chain: &Chain) -> BTreeMap<&'static str, i64> {
    let mut counts = BTreeMap::from([("leaf", 0), ("middle", 0), ("top", 0)]);
    for number in chain.members.keys() {
        let name = match *number {
            role::TOP => "top",
            role::MIDDLE => "middle",
            _ => "leaf",
        };
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// The agent's part of the admin page.
pub(crate) fn status(state: &State, path: &Path, name: &str) -> Value {
    let (messages, bytes, drops) = totals(state, path);
    let drops: HashMap<&str, u64> = DropReason::LABELS.into_iter().zip(drops).collect();
    let chains: Vec<Value> = state
        .chains
        .iter()
        .map(|(id, chain)| {
            let members: Vec<Value> = chain
                .members
                .iter()
                .map(|(role, m)| json!({"role": role, "pid": m.meta.pid, "settled": m.meta.settled}))
                .collect();
            json!({
                "chain": id, "namespace": chain.meta.namespace, "job": chain.meta.job,
                "aggregators": by_role(chain), "members": members,
                "shmBytes": state.quota.used_by(*id), "shmQuotaBytes": chain.meta.quota,
            })
        })
        .collect();
    json!({
        "path": name, "descriptors": messages, "descriptorPayloadBytes": bytes, "drops": drops,
        "shmBytes": state.shm_bytes(), "shmPeakBytes": state.shm_peak, "chains": chains,
    })
}

impl Collect for Collector {
    fn desc(&self) -> Vec<&Desc> {
        let all: [&dyn Collect; 5] = [&self.descriptors, &self.drops, &self.aggregators, &self.quota, &self.folded];
        all.into_iter().flat_map(Collect::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (messages, _, drops) = totals(&state, &self.path);
        self.descriptors.reset();
        self.descriptors.with_label_values(&[self.name]).inc_by(messages);
        self.drops.reset();
        for (reason, count) in DropReason::LABELS.iter().zip(drops) {
            self.drops.with_label_values(&[reason]).inc_by(count);
        }
        self.aggregators.reset();
        self.quota.reset();
        self.folded.reset();
        for chain in state.chains.values() {
            let (namespace, job) = (chain.meta.namespace.as_str(), chain.meta.job.as_str());
            for (role, count) in by_role(chain) {
                self.aggregators.with_label_values(&[namespace, job, role]).set(count);
            }
            self.quota.with_label_values(&[namespace, job]).set(i64::try_from(chain.meta.quota).unwrap_or(i64::MAX));
            let seconds = std::time::Duration::from_nanos(chain.folded_ns).as_secs_f64();
            self.folded.with_label_values(&[namespace, job]).inc_by(seconds);
        }
        let all: [&dyn Collect; 5] = [&self.descriptors, &self.drops, &self.aggregators, &self.quota, &self.folded];
        all.into_iter().flat_map(Collect::collect).collect()
    }
}
