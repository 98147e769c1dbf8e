//! What this process lets be seen of requests to Knative's services: lines on standard output, spans to a collector, and
//! what became of both.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use lifl_api::pod::{NodePod, PodSettings};
use lifl_proxy::{
    Dial, Direct, Pool, PoolLimits,
    observe::{
        CollectorAddress, CollectorError, Exporter, Facts, Lines, Resource, SpanCounts, Template, Tracer, WeakExporter,
        Wire,
    },
    queue::{self, RequestLog, resource},
};
use prometheus::{
    IntCounterVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};
use tokio::{task::JoinSet, time::timeout};

use crate::config::IngressConfig;

/// What was not written or sent by then is lost.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is to be seen of requests through the ingress. By default: nothing. Clones share what is behind it.
#[derive(Clone, Debug, Default)]
pub struct Observe {
    /// The access log.
    pub log: Option<Lines>,
    /// Traces.
    pub traces: Option<Tracer>,
}

/// Lines and spans of this process. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Observers {
    lines: Lines,
    access_log: bool,
    traces: Option<Tracer>,
    /// All exporters of this process, the pods' own among them.
    exporters: Arc<Mutex<Vec<WeakExporter>>>,
    spans: SpanCounts,
}

/// What became of lines and spans, when asked for.
struct Counts {
    lines: Lines,
    spans: SpanCounts,
    lines_total: IntCounterVec,
    spans_total: IntCounterVec,
}

/// Traces cannot be sent, or metrics cannot be registered.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The configured collector.
    #[error("ingress.otlp: {0}")]
    Collector(#[from] CollectorError),
    /// The configured share.
    #[error("ingress.trace_sample: '{0}' is not between 0 and 1")]
    Sample(f64),
    /// A metric is there already.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

// === impl Observers ===

impl Observers {
    /// As the ingress is configured; without one there are only the lines and spans that pods ask for. Needs a tokio runtime
    /// around it.
    ///
    /// # Errors
    /// [`ObserveError`].
    pub fn new(config: Option<&IngressConfig>, registry: &Registry) -> Result<Self, ObserveError> {
        let (lines, spans) = (Lines::stdout(), SpanCounts::default());
        let node = config.map_or("", |config| config.node.as_str());
        let sample = config.map_or(1.0, |config| config.trace_sample);
        if !(0.0..=1.0).contains(&sample) {
            return Err(ObserveError::Sample(sample));
        }
        Counts::register(&lines, &spans, registry)?;
        let access_log = config.is_some_and(|config| config.access_log);
        let mut observers = Self { lines, access_log, traces: None, exporters: Arc::default(), spans };
        if let Some(address) = config.and_then(|config| config.otlp.as_deref()) {
            let pool = Pool::new(Direct, PoolLimits::default());
            let exporter = observers.export(&pool, 0, CollectorAddress::parse(address, Wire::Http)?);
            observers.traces = Some(Tracer::new(exporter, of_node(node), sample));
        }
        Ok(observers)
    }

    /// What the ingress lets be seen.
    #[must_use]
    pub fn ingress(&self) -> Observe {
        Observe { log: self.access_log.then(|| self.lines.clone()), traces: self.traces.clone() }
    }

    /// What a pod's settings ask to be seen. Its collector is dialled from its own network, as queue-proxy did: an annotation
    /// must not make this process speak to whom the pod itself may not. A pod without one has its spans in the node's traces.
    pub(crate) fn pod<D: Dial>(&self, pod: &NodePod, pool: &Pool<D>, place: u64) -> queue::Observe {
        let settings = &pod.settings;
        let facts = Facts {
            revision: settings.revision.clone(),
            namespace: settings.namespace.clone(),
            service: settings.service.clone(),
            configuration: settings.configuration.clone(),
            pod: pod.name.clone(),
            address: pod.address.to_string(),
        };
        let traces = self.pods_own(settings, &facts, pool, place);
        let traces = traces.or_else(|| self.traces.as_ref().map(|tracer| tracer.of(resource(&facts), tracer.sample())));
        queue::Observe {
            metrics: settings.request_metrics.protocol == "prometheus",
            log: self.log(settings, &pod.name),
            traces,
            port: settings.serving_port,
            facts,
        }
    }

    /// Waits until what was seen so far is written and sent, a little.
    pub async fn flush(&self) {
        let lines = self.lines.clone();
        let written = tokio::task::spawn_blocking(move || lines.flush(PATIENCE));
        let exporters: Vec<Exporter> = self.exporters().iter().filter_map(WeakExporter::upgrade).collect();
        let mut flushes: JoinSet<()> =
            exporters.into_iter().map(|exporter| async move { exporter.flush().await }).collect();
        let sent = timeout(PATIENCE, async { while flushes.join_next().await.is_some() {} });
        let (written, sent) = tokio::join!(written, sent);
        if !written.unwrap_or_default() || sent.is_err() {
            tracing::warn!("some lines or spans of requests are lost");
        }
    }

    fn export<D: Dial>(&self, pool: &Pool<D>, place: u64, address: CollectorAddress) -> Exporter {
        let exporter = Exporter::start(pool, place, address, &self.spans);
        let mut exporters = self.exporters();
        exporters.retain(|known| known.upgrade().is_some());
        exporters.push(exporter.downgrade());
        exporter
    }

    fn exporters(&self) -> MutexGuard<'_, Vec<WeakExporter>> {
        self.exporters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pods_own<D: Dial>(&self, settings: &PodSettings, facts: &Facts, pool: &Pool<D>, place: u64) -> Option<Tracer> {
        let tracing = &settings.tracing;
        let wire = match tracing.protocol.as_str() {
            "http/protobuf" => Wire::Http,
            "grpc" => Wire::Grpc,
            "" | "none" => return None,
            other => {
                tracing::warn!(pod = facts.pod, protocol = other, "traces are not sent that way");
                return None;
            }
        };
        match CollectorAddress::parse(&tracing.endpoint, wire) {
            Ok(address) => {
                let exporter = self.export(pool, place, address);
                Some(Tracer::new(exporter, resource(facts), tracing.sampling_rate))
            }
            Err(error) => {
                tracing::warn!(pod = facts.pod, %error, "traces are not sent");
                None
            }
        }
    }

    fn log(&self, settings: &PodSettings, pod: &str) -> Option<RequestLog> {
        let log = &settings.request_log;
        if !log.enabled || log.template.is_empty() {
            // An empty template turns the log off, as with queue-proxy.
            return None;
        }
        let template = Template::parse(&log.template).or_else(|error| {
            tracing::warn!(pod, %error, "request log: lines have Knative's default shape");
            Template::parse(Template::DEFAULT)
        });
        Some(RequestLog { lines: self.lines.clone(), template: template.ok()?, probes: log.probes })
    }
}

fn of_node(node: &str) -> Resource {
    let mut attributes = vec![
        ("service.name", "lifl-gateway".to_owned()),
        ("service.version", env!("CARGO_PKG_VERSION").to_owned()),
        ("telemetry.sdk.language", "rust".to_owned()),
        ("telemetry.sdk.name", "lifl".to_owned()),
    ];
    if !node.is_empty() {
        attributes.push(("k8s.node.name", node.to_owned()));
    }
    Resource { attributes, scope: "lifl.dev/gateway" }
}

// === impl Counts ===

impl Counts {
    fn register(lines: &Lines, spans: &SpanCounts, registry: &Registry) -> Result<(), prometheus::Error> {
        let of_lines = Opts::new("lifl_log_lines_total", "Lines of access and request logs, by what became of them.");
        let of_spans = Opts::new("lifl_trace_spans_total", "Spans of requests, by what became of them.");
        registry.register(Box::new(Self {
            lines: lines.clone(),
            spans: spans.clone(),
            lines_total: IntCounterVec::new(of_lines, &["outcome"])?,
            spans_total: IntCounterVec::new(of_spans, &["outcome"])?,
        }))
    }
}

impl Collector for Counts {
    fn desc(&self) -> Vec<&Desc> {
        self.lines_total.desc().into_iter().chain(self.spans_total.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let set = |family: &IntCounterVec, outcome: &str, count: u64| {
            let counter = family.with_label_values(&[outcome]);
            counter.reset();
            counter.inc_by(count);
        };
        let lines = self.lines.counts();
        set(&self.lines_total, "written", lines.written);
        set(&self.lines_total, "dropped", lines.dropped);
        set(&self.spans_total, "exported", self.spans.exported());
        set(&self.spans_total, "dropped", self.spans.dropped());
        set(&self.spans_total, "failed", self.spans.failed());
        self.lines_total.collect().into_iter().chain(self.spans_total.collect()).collect()
    }
}
