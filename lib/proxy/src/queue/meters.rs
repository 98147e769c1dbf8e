//! Port 9091: what Prometheus reads of one pod, with queue-proxy's names, labels, types and buckets.
//!
//! A pod that nobody has called yet holds three short texts. Its first request makes the table of series (1 KiB), the
//! first one of each kind a series (1 KiB); every further one costs a dozen atomic additions, and no lock or allocation.
//!
//! Left out are the figures of queue-proxy's own process (`process_*`, `promhttp_*`, Go's): there is no such process, and
//! those of the one that serves all pods of the node would be counted once per pod.

use std::{collections::BTreeMap, fmt::Write as _, sync::OnceLock, time::Duration};

use http::{HeaderMap, HeaderName, Method, Version};

use crate::observe::{Counts, DURATIONS, Durations, Facts, SIZES, Sizes, escape, method_name};

const TAG: HeaderName = HeaderName::from_static("knative-serving-tag");
const DEFAULT_ROUTE: HeaderName = HeaderName::from_static("knative-serving-default-route");

/// Series of one pod. Clients choose methods, and apps statuses: what comes beyond is added up in one series, as
/// OpenTelemetry's SDKs do it.
const SERIES: usize = 64;
/// Names of tags of one pod; a client may send any.
const TAGS: usize = 16;

/// What a pod's requests add to.
#[derive(Debug)]
pub(super) struct Meters {
    /// Labels of `target_info`.
    target: String,
    /// `server_address` and `server_port` as clients and as the user's container have them.
    server: String,
    client: String,
    table: OnceLock<Box<Table>>,
}

/// What distinguishes series: method, version, tag and status in one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SeriesKey(u32);

/// One request, over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) key: SeriesKey,
    /// From its first byte to the last one of the response.
    pub(super) whole: Duration,
    /// The same without the time in line; none if it has never left the line.
    pub(super) app: Option<Duration>,
    /// From the end of the line to the head of the response; none without such a head.
    pub(super) head: Option<Duration>,
    pub(super) sent: u64,
    pub(super) received: u64,
}

#[derive(Debug)]
struct Table {
    series: [OnceLock<Box<Series>>; SERIES],
    rest: OnceLock<Box<Series>>,
    tags: [OnceLock<Box<str>>; TAGS],
}

#[derive(Debug)]
struct Series {
    key: SeriesKey,
    duration: Durations,
    sent: Sizes,
    received: Sizes,
    app: Durations,
    /// Requests to the user's container, with an answer and without.
    answered: OnceLock<Box<Client>>,
    failed: OnceLock<Box<Client>>,
}

#[derive(Debug)]
struct Client {
    duration: Durations,
    sent: Sizes,
}

const HTTP_SCOPE: &str = concat!(
    "otel_scope_name=\"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp\",otel_scope_schema_url=\"\",",
    "otel_scope_version=\"",
    env!("CARGO_PKG_VERSION"),
    "\","
);
const QUEUE_SCOPE: &str =
    "otel_scope_name=\"knative.dev/serving/pkg/queue\",otel_scope_schema_url=\"\",otel_scope_version=\"\",";

const METHODS: [&str; 10] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "_OTHER"];
/// What a route's tag is where the ingress names none, in the order of [`tag`], and of names that had no room.
const TAG_WORDS: [&str; 4] = ["kn:disabled", "kn:default", "kn:undefined", "kn:other"];

// === impl SeriesKey ===

impl SeriesKey {
    fn new(method: &Method, version: Version, tag: usize) -> Self {
        let (_, name) = method_name(method);
        let method = METHODS.iter().position(|known| *known == name).unwrap_or(METHODS.len() - 1);
        let version = match version {
            Version::HTTP_10 => 0,
            Version::HTTP_2 => 2,
            _ => 1,
        };
        let packed = method | version << 4 | tag << 6;
        Self(u32::try_from(packed).unwrap_or_default() << 10)
    }

    /// The same with a status.
    pub(super) fn with(self, status: u16) -> Self {
        Self(self.0 & !0x3ff | u32::from(status) & 0x3ff)
    }

    const fn status(self) -> u32 {
        self.0 & 0x3ff
    }

    const fn method(self) -> &'static str {
        METHODS[((self.0 >> 10) & 0xf) as usize % METHODS.len()]
    }

    const fn version(self) -> &'static str {
        match (self.0 >> 14) & 3 {
            0 => "1.0",
            2 => "2.0",
            _ => "1.1",
        }
    }

    const fn tag(self) -> usize {
        (self.0 >> 16) as usize
    }

    /// Where its series is looked for first.
    const fn slot(self) -> usize {
        (self.0.wrapping_mul(0x9E37_79B1) >> 26) as usize % SERIES
    }
}

// === impl Meters ===

impl Meters {
    pub(super) fn new(facts: &Facts, port: u16, user: std::net::SocketAddr) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        let labels = [
            ("container_name", "queue-proxy"),
            ("k8s_namespace_name", &facts.namespace),
            ("k8s_pod_name", &facts.pod),
            ("kn_configuration_name", &facts.configuration),
            ("kn_revision_name", &facts.revision),
            ("kn_service_name", &facts.service),
            ("service_instance_id", &facts.pod),
            ("service_name", facts.service_name()),
            ("service_version", version),
            ("telemetry_sdk_language", "rust"),
            ("telemetry_sdk_name", "lifl"),
            ("telemetry_sdk_version", version),
        ];
        let known = labels.iter().filter(|(_, value)| !value.is_empty());
        let target: Vec<String> = known.map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
        let server = |address: &str, port| format!("server_address=\"{}\",server_port=\"{port}\",", escape(address));
        Self {
            target: target.join(","),
            server: server(&facts.address, port),
            client: server(&user.ip().to_string(), user.port()),
            table: OnceLock::new(),
        }
    }

    /// What kind of request it is, but for its status.
    pub(super) fn key<B>(&self, request: &http::Request<B>) -> SeriesKey {
        SeriesKey::new(request.method(), request.version(), self.tag(request.headers()))
    }

    pub(super) fn add(&self, sample: &Sample) {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let series = self.table().series(sample.key);
        series.duration.add(nanos(sample.whole));
        series.sent.add(sample.sent);
        series.received.add(sample.received);
        let Some(app) = sample.app else { return };
        series.app.add(nanos(app));
        let client = if sample.head.is_some() { &series.answered } else { &series.failed };
        let client = client.get_or_init(Box::default);
        client.duration.add(nanos(sample.head.unwrap_or(app)));
        client.sent.add(sample.sent);
    }

    /// The text that Prometheus reads. `depth`: requests worked on and waiting, of a pod that has a line.
    pub(super) fn text(&self, depth: Option<usize>) -> String {
        let mut out = String::new();
        self.clients(&mut out);
        self.servers(&mut out);
        self.queue(&mut out, depth);
        let _to_a_string = writeln!(
            out,
            "# HELP target_info Target metadata\n# TYPE target_info gauge\ntarget_info{{{}}} 1",
            self.target
        );
        out
    }

    fn table(&self) -> &Table {
        self.table.get_or_init(Table::new)
    }

    /// The tag of the route that the ingress took, by what it says of it.
    fn tag(&self, headers: &HeaderMap) -> usize {
        let text = |name| headers.get(name).map_or(&[][..], |value| value.as_bytes());
        match (text(TAG), text(DEFAULT_ROUTE)) {
            (b"", b"") => 0,
            (b"", _) => 1,
            (_, b"true") => 2,
            (name, _) => self.table().tag(name),
        }
    }

    /// Labels of a series; those that its name begins with come first, as OpenTelemetry's exporter sorts them.
    fn labels(&self, key: SeriesKey, failed: bool, server: &str) -> String {
        let Some(table) = self.table.get() else { return String::new() };
        if key == SeriesKey(u32::MAX) {
            return format!("otel_metric_overflow=\"true\",{HTTP_SCOPE}");
        }
        let (method, status, version, tag) = (key.method(), key.status(), key.version(), table.tag_of(key.tag()));
        let (error, status) = match failed {
            true => (format!("error_type=\"{status}\","), String::new()),
            false => (String::new(), format!("http_response_status_code=\"{status}\",")),
        };
        format!(
            "{error}http_request_method=\"{method}\",{status}kn_route_tag=\"{}\",network_protocol_name=\"http\",\
             network_protocol_version=\"{version}\",{HTTP_SCOPE}{server}url_scheme=\"http\",",
            escape(tag)
        )
    }

    fn all(&self) -> impl Iterator<Item = &Series> {
        self.table
            .get()
            .into_iter()
            .flat_map(|table| table.series.iter().chain([&table.rest]).filter_map(OnceLock::get))
            .map(AsRef::as_ref)
    }

    fn clients(&self, out: &mut String) {
        let clients = || {
            self.all().flat_map(|series| {
                let both = [(&series.answered, false), (&series.failed, true)];
                both.into_iter().filter_map(|(client, failed)| Some((client.get()?, series.key, failed)))
            })
        };
        let labels = |key, failed| self.labels(key, failed, &self.client);
        let (size, time) = ("http_client_request_body_size_bytes", "http_client_request_duration_seconds");
        family(out, size, "Size of HTTP client request bodies.", clients(), |out, (client, key, failed)| {
            client.sent.read().write(out, size, &labels(key, failed));
        });
        family(out, time, "Duration of HTTP client requests.", clients(), |out, (client, key, failed)| {
            client.duration.read().write(out, time, &labels(key, failed));
        });
    }

    fn servers(&self, out: &mut String) {
        let labels = |key| self.labels(key, false, &self.server);
        let name = "http_server_request_body_size_bytes";
        family(out, name, "Size of HTTP server request bodies.", self.all(), |out, series| {
            series.sent.read().write(out, name, &labels(series.key));
        });
        let name = "http_server_request_duration_seconds";
        family(out, name, "Duration of HTTP server requests.", self.all(), |out, series| {
            series.duration.read().write(out, name, &labels(series.key));
        });
        let name = "http_server_response_body_size_bytes";
        family(out, name, "Size of HTTP server response bodies.", self.all(), |out, series| {
            series.received.read().write(out, name, &labels(series.key));
        });
    }

    fn queue(&self, out: &mut String, depth: Option<usize>) {
        // Of all series with one status it is one.
        let mut by_status: BTreeMap<u32, Counts<15>> = BTreeMap::new();
        for series in self.all() {
            let app = series.app.read();
            if app.count() > 0 {
                let status = if series.key == SeriesKey(u32::MAX) { 0 } else { series.key.status() };
                by_status.entry(status).and_modify(|sum| sum.add(&app)).or_insert(app);
            }
        }
        let name = "kn_serving_invocation_duration_seconds";
        family(out, name, "The duration of task execution", by_status.iter(), |out, (status, counts)| {
            let label = match status {
                0 => "otel_metric_overflow=\"true\",".to_owned(),
                status => format!("http_response_status_code=\"{status}\","),
            };
            counts.write(out, name, &format!("{label}{QUEUE_SCOPE}"));
        });
        if let Some(depth) = depth {
            let name = "kn_serving_queue_depth";
            let labels = QUEUE_SCOPE.trim_end_matches(',');
            let _to_a_string = writeln!(
                out,
                "# HELP {name} Number of current requests in the queue\n# TYPE {name} gauge\n{name}{{{labels}}} {depth}"
            );
        }
    }
}

/// A family of histograms; nothing of one that has no series.
fn family<T>(out: &mut String, name: &str, help: &str, all: impl Iterator<Item = T>, write: impl Fn(&mut String, T)) {
    for (number, one) in all.enumerate() {
        if number == 0 {
            let _to_a_string = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        }
        write(out, one);
    }
}

// === impl Table ===

impl Table {
    fn new() -> Box<Self> {
        Box::new(Self {
            series: [const { OnceLock::new() }; SERIES],
            rest: OnceLock::new(),
            tags: [const { OnceLock::new() }; TAGS],
        })
    }

    fn series(&self, key: SeriesKey) -> &Series {
        let first = key.slot();
        for step in 0..SERIES {
            let slot = &self.series[(first + step) % SERIES];
            let series = slot.get_or_init(|| Box::new(Series::new(key)));
            if series.key == key {
                return series;
            }
        }
        self.rest.get_or_init(|| Box::new(Series::new(SeriesKey(u32::MAX))))
    }

    fn tag(&self, name: &[u8]) -> usize {
        let known = self.tags.iter().position(|tag| {
            let tag = tag.get_or_init(|| String::from_utf8_lossy(name).into());
            tag.as_bytes() == name
        });
        known.map_or(TAG_WORDS.len() - 1, |at| TAG_WORDS.len() + at)
    }

    fn tag_of(&self, number: usize) -> &str {
        match TAG_WORDS.get(number) {
            Some(word) => word,
            None => self.tags.get(number - TAG_WORDS.len()).and_then(OnceLock::get).map_or("", AsRef::as_ref),
        }
    }
}

// === impl Series ===

impl Series {
    fn new(key: SeriesKey) -> Self {
        Self {
            key,
            duration: Durations::new(&DURATIONS),
            sent: Sizes::new(&SIZES),
            received: Sizes::new(&SIZES),
            app: Durations::new(&DURATIONS),
            answered: OnceLock::new(),
            failed: OnceLock::new(),
        }
    }
}

// === impl Client ===

impl Default for Client {
    fn default() -> Self {
        Self { duration: Durations::new(&DURATIONS), sent: Sizes::new(&SIZES) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meters() -> Meters {
        let facts = Facts { pod: "p\"".into(), address: "10.0.0.7".into(), ..Facts::default() };
        Meters::new(&facts, 8012, "127.0.0.1:8080".parse().expect("an address"))
    }

    fn sample(key: SeriesKey) -> Sample {
        let some = Duration::from_millis(1);
        Sample { key, whole: some, app: Some(some), head: Some(some), sent: 1, received: 2 }
    }

    fn request(method: &str, tag: &str, default: &str) -> http::Request<()> {
        let request = http::Request::builder().method(method);
        let request = if tag.is_empty() { request } else { request.header(TAG, tag) };
        let request = if default.is_empty() { request } else { request.header(DEFAULT_ROUTE, default) };
        request.body(()).expect("a request")
    }

    #[test]
    fn series_and_tags_are_bounded_whatever_clients_send() {
        let meters = meters();
        for number in 0..100_u16 {
            let key = meters.key(&request("BREW", &format!("tag-{number}"), ""));
            meters.add(&sample(key.with(200 + number % 7)));
        }
        let text = meters.text(None);
        let tags: std::collections::BTreeSet<&str> =
            text.split("kn_route_tag=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert_eq!(tags.len(), TAGS + 1, "{tags:?}");
        let counts = text.lines().filter(|line| line.starts_with("http_server_request_duration_seconds_count"));
        let counts: Vec<&str> = counts.collect();
        assert!(counts.len() <= SERIES + 1, "{}", counts.len());
        let sum: u64 = counts.iter().filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum();
        assert_eq!(sum, 100, "nothing is lost");
        assert!(text.contains("http_request_method=\"_OTHER\"") && text.contains("k8s_pod_name=\"p\\\"\""));
    }

    #[test]
    fn more_kinds_than_series_are_added_up() {
        let meters = meters();
        for status in 200..300 {
            meters.add(&sample(meters.key(&request("GET", "", "")).with(status)));
        }
        let text = meters.text(None);
        let rest = text
            .lines()
            .find(|line| line.starts_with("http_server_request_duration_seconds_count{otel_metric_overflow"));
        assert_eq!(rest.and_then(|line| line.rsplit(' ').next()), Some("36"), "{rest:?}");
    }

    #[test]
    fn knative_a_route_tag_is_what_the_ingress_says() {
        let meters = meters();
        let rows = [
            ("", "", "kn:disabled"),
            ("", "false", "kn:default"),
            ("", "true", "kn:default"),
            ("blue", "true", "kn:undefined"),
            ("blue", "", "blue"),
            ("blue", "false", "blue"),
        ];
        for (tag, default, expected) in rows {
            let key = meters.key(&request("GET", tag, default));
            assert_eq!(meters.table().tag_of(key.tag()), expected, "{tag} {default}");
        }
    }
}
