//! The annotation: what queue-proxy would have read from its environment, in one versioned document.

use k8s_openapi::api::core::v1::Probe;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ADMIN_PORT, SETTINGS_ANNOTATION, STATS_PORT, USER_METRICS_PORT};

/// `lifl.dev/NAME/v1`.
const SCHEMA: &str = "pod-settings";
/// Of a value that cannot be understood, so much is shown.
const SHOWN: usize = 120;

/// How a pod is to be served.
///
/// Fields that this version does not know are passed over: webhook and agent are rolled out one after the other, and a field
/// that must not be passed over makes another schema.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSettings {
    /// `lifl.dev/pod-settings/v1`.
    pub schema: String,
    /// Namespace of the revision.
    pub namespace: String,
    /// The Service, or nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub service: String,
    /// The Configuration.
    pub configuration: String,
    /// The Revision.
    pub revision: String,
    /// Namespace of Knative itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub system_namespace: String,
    /// Where requests come in: 8012, or 8013 for h2c.
    pub serving_port: u16,
    /// Protocol of the revision.
    pub protocol: Protocol,
    /// Requests come in over TLS too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSettings>,
    /// Where the app listens, on its loopback.
    pub user_port: u16,
    /// Requests that the app takes at once; 0: any number.
    pub container_concurrency: u32,
    /// How long a request may take.
    pub timeouts: RevisionTimeouts,
    /// The user's probes, one for each container that has one; none: always ready.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub readiness: Vec<Probe>,
    /// Ask the app whether it speaks h2c before it is probed.
    #[serde(default)]
    pub http2_auto_detect: bool,
    /// Answers may begin before the request has ended.
    #[serde(default)]
    pub full_duplex: bool,
    /// The log of requests.
    #[serde(default)]
    pub request_log: RequestLog,
    /// Metrics of requests (port 9091 when `prometheus`).
    #[serde(default)]
    pub request_metrics: Exporter,
    /// Metrics of queue-proxy itself.
    #[serde(default)]
    pub metrics: Exporter,
    /// Traces.
    #[serde(default)]
    pub tracing: Tracing,
    /// Its own log.
    #[serde(default)]
    pub logging: Logging,
}

/// Protocol of a revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// HTTP/1.1.
    #[serde(rename = "http1")]
    Http1,
    /// HTTP/2 without TLS.
    #[serde(rename = "h2c")]
    H2c,
}

/// TLS between ingress or activator and the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TlsSettings {
    /// Where it listens.
    pub port: u16,
    /// Secret of the pod's namespace with `tls.crt` and `tls.key`.
    pub secret: String,
    /// Lowest version, or nothing for the default.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub min_version: String,
    /// Highest version, or nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub max_version: String,
    /// Cipher suites, comma between, or nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cipher_suites: String,
    /// Curves, comma between, or nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub curve_preferences: String,
    /// PEM of a further root, or nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub root_ca: String,
}

/// The three timeouts of a revision, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RevisionTimeouts {
    /// The whole request.
    pub request: u64,
    /// Until the answer begins; 0: off.
    #[serde(default)]
    pub response_start: u64,
    /// Between two pieces of the answer; 0: off.
    #[serde(default)]
    pub idle: u64,
}

/// The log of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestLog {
    /// It is written.
    #[serde(default)]
    pub enabled: bool,
    /// Probes are in it.
    #[serde(default)]
    pub probes: bool,
    /// Go template of a line. Left out where the log is off: it is long, and as the default it is in every pod.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub template: String,
}

/// Where metrics go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exporter {
    /// `none`, `prometheus`, `grpc`, `http/protobuf`.
    #[serde(default = "none")]
    pub protocol: String,
    /// Receiver of OTLP.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub endpoint: String,
    /// Between two exports, nanoseconds; 0: the default.
    #[serde(default)]
    pub export_interval: u64,
}

/// Where traces go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tracing {
    /// `none`, `grpc`, `http/protobuf`, `stdout`.
    #[serde(default = "none")]
    pub protocol: String,
    /// Receiver of OTLP.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub endpoint: String,
    /// Share of requests, 0 to 1.
    #[serde(default)]
    pub sampling_rate: f64,
}

/// queue-proxy's own log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Logging {
    /// `info`, ..., or nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub level: String,
    /// Zap's configuration, JSON, or nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub config: String,
}

/// What a listener in a pod is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PodPort {
    /// Requests and probes.
    Serving,
    /// The same over TLS.
    ServingTls,
    /// The drain hook.
    Admin,
    /// Statistics for the autoscaler.
    Stats,
    /// Metrics for Prometheus.
    UserMetrics,
}

/// Settings that cannot be understood. `key` is a name of queue-proxy's environment, or a path in the annotation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// It must be there.
    #[error("{key}: missing")]
    Missing {
        /// What is missing.
        key: String,
    },
    /// It is there and wrong.
    #[error("{key}: '{value}' {why}")]
    Value {
        /// What is wrong.
        key: String,
        /// Its value, or the beginning of it.
        value: String,
        /// What is wrong with it.
        why: String,
    },
}

fn none() -> String {
    "none".to_owned()
}

// === impl PodSettings ===

impl PodSettings {
    /// The name of this version of the document.
    #[must_use]
    pub fn schema() -> String {
        crate::http::schema(SCHEMA)
    }

    /// Reads the annotation.
    ///
    /// # Errors
    /// [`SettingsError`] with the path and the value that it stumbled over.
    pub fn from_annotation(text: &str) -> Result<Self, SettingsError> {
        let document: Value = serde_json::from_str(text)
            .map_err(|e| SettingsError::value(SETTINGS_ANNOTATION, text, format!("is not JSON: {e}")))?;
        match document.get("schema").and_then(Value::as_str) {
            Some(schema) if schema == Self::schema() => {}
            Some(schema) => {
                return Err(SettingsError::value(
                    "schema",
                    schema,
                    format!("is not {}, which I speak", Self::schema()),
                ));
            }
            None => return Err(SettingsError::Missing { key: "schema".into() }),
        }
        let settings: Self = serde_path_to_error::deserialize(&document).map_err(|error| {
            let at = error.path().iter().try_fold(&document, |at, segment| match segment {
                serde_path_to_error::Segment::Seq { index } => at.get(index),
                serde_path_to_error::Segment::Map { key } => at.get(key),
                _ => None,
            });
            let value = at.map_or_else(String::new, Value::to_string);
            SettingsError::value(&error.path().to_string(), &value, format!("cannot be read: {}", error.inner()))
        })?;
        settings.check()
    }

    /// The annotation.
    #[must_use]
    pub fn to_annotation(&self) -> String {
        // Strings, numbers and Kubernetes' own types: none of them fails to be written.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Ports to listen on inside the pod, and what for. One serving port, the revision's, as queue-proxy has it: on the other
    /// one a stock pod refuses too.
    #[must_use]
    pub fn ports(&self) -> Vec<(PodPort, u16)> {
        let mut out = vec![(PodPort::Serving, self.serving_port)];
        out.extend(self.tls.as_ref().map(|tls| (PodPort::ServingTls, tls.port)));
        out.extend([(PodPort::Admin, ADMIN_PORT), (PodPort::Stats, STATS_PORT)]);
        out.extend(
            (self.request_metrics.protocol == "prometheus").then_some((PodPort::UserMetrics, USER_METRICS_PORT)),
        );
        out
    }

    pub(super) fn check(self) -> Result<Self, SettingsError> {
        let own = self.ports();
        let names = [("servingPort", self.serving_port), ("userPort", self.user_port)];
        if let Some((key, port)) = names.into_iter().find(|(_, port)| *port == 0) {
            return Err(SettingsError::value(key, &port.to_string(), "is no port".into()));
        }
        if own.iter().any(|(_, port)| *port == self.user_port) {
            return Err(SettingsError::value(
                "userPort",
                &self.user_port.to_string(),
                "is taken by the data plane".into(),
            ));
        }
        if !(0.0..=1.0).contains(&self.tracing.sampling_rate) {
            let rate = self.tracing.sampling_rate.to_string();
            return Err(SettingsError::value("tracing.samplingRate", &rate, "is not between 0 and 1".into()));
        }
        Ok(self)
    }
}

// === impl Exporter ===

impl Default for Exporter {
    fn default() -> Self {
        Self { protocol: none(), endpoint: String::new(), export_interval: 0 }
    }
}

// === impl Tracing ===

impl Default for Tracing {
    fn default() -> Self {
        Self { protocol: none(), endpoint: String::new(), sampling_rate: 0.0 }
    }
}

// === impl SettingsError ===

impl SettingsError {
    pub(super) fn value(key: &str, value: &str, why: String) -> Self {
        let mut shown: String = value.chars().take(SHOWN).collect();
        if shown.len() < value.len() {
            shown.push_str("...");
        }
        Self::Value { key: key.to_owned(), value: shown, why }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    pub(in crate::pod) fn settings() -> PodSettings {
        PodSettings {
            schema: PodSettings::schema(),
            namespace: "golden".into(),
            service: "shop".into(),
            configuration: "shop".into(),
            revision: "shop-blue".into(),
            system_namespace: "knative-serving".into(),
            serving_port: 8012,
            protocol: Protocol::Http1,
            tls: None,
            user_port: 8080,
            container_concurrency: 25,
            timeouts: RevisionTimeouts { request: 120, response_start: 0, idle: 0 },
            readiness: serde_json::from_value(json!([{"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 2}]))
                .unwrap(),
            http2_auto_detect: false,
            full_duplex: false,
            request_log: RequestLog::default(),
            request_metrics: Exporter::default(),
            metrics: Exporter::default(),
            tracing: Tracing::default(),
            logging: Logging::default(),
        }
    }

    #[test]
    fn an_annotation_is_read_as_it_was_written() {
        let mut rich = settings();
        rich.tls = Some(TlsSettings {
            port: 8112,
            secret: "serving-certs".into(),
            min_version: "1.3".into(),
            max_version: String::new(),
            cipher_suites: String::new(),
            curve_preferences: "X25519".into(),
            root_ca: "-----BEGIN".into(),
        });
        rich.protocol = Protocol::H2c;
        rich.serving_port = 8013;
        rich.request_log = RequestLog { enabled: true, probes: true, template: "{{.Request.Method}} \"x\"\n".into() };
        rich.request_metrics = Exporter { protocol: "prometheus".into(), endpoint: String::new(), export_interval: 7 };
        rich.tracing = Tracing { protocol: "grpc".into(), endpoint: "otel:4317".into(), sampling_rate: 0.25 };
        rich.logging = Logging { level: "debug".into(), config: "{}".into() };
        for one in [settings(), rich] {
            assert_eq!(PodSettings::from_annotation(&one.to_annotation()).unwrap(), one);
        }
    }

    #[test]
    fn ports_are_those_that_queue_proxy_would_open() {
        let mut one = settings();
        let ports = |s: &PodSettings| s.ports().into_iter().map(|(_, port)| port).collect::<Vec<_>>();
        assert_eq!(ports(&one), [8012, 8022, 9090]);
        one.request_metrics.protocol = "prometheus".into();
        one.serving_port = 8013;
        one.tls = Some(TlsSettings {
            port: 8112,
            secret: "s".into(),
            min_version: String::new(),
            max_version: String::new(),
            cipher_suites: String::new(),
            curve_preferences: String::new(),
            root_ca: String::new(),
        });
        assert_eq!(ports(&one), [8013, 8112, 8022, 9090, 9091]);
    }

    #[test]
    fn errors_name_key_and_value() {
        let with = |pointer: &str, value: Value| {
            let mut document = serde_json::to_value(settings()).unwrap();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            document.pointer_mut(parent).unwrap()[key] = value;
            PodSettings::from_annotation(&document.to_string()).unwrap_err().to_string()
        };
        let rows = [
            ("/userPort", json!("http"), "userPort: '\"http\"' cannot be read: invalid type"),
            ("/userPort", json!(70000), "userPort: '70000' cannot be read: invalid value"),
            ("/userPort", json!(0), "userPort: '0' is no port"),
            ("/userPort", json!(8022), "userPort: '8022' is taken by the data plane"),
            ("/containerConcurrency", json!(-1), "containerConcurrency: '-1' cannot be read"),
            ("/timeouts/idle", json!("5s"), "timeouts.idle: '\"5s\"' cannot be read"),
            ("/protocol", json!("h3"), "protocol: '\"h3\"' cannot be read: unknown variant"),
            ("/schema", json!("lifl.dev/pod-settings/v2"), "schema: 'lifl.dev/pod-settings/v2' is not"),
            ("/tracing/samplingRate", json!(2), "tracing.samplingRate: '2' is not between"),
        ];
        for (pointer, value, begins) in rows {
            let error = with(pointer, value);
            assert!(error.starts_with(begins), "{pointer}: {error}");
        }
        let error = PodSettings::from_annotation("{").unwrap_err().to_string();
        assert!(error.starts_with("lifl.dev/pod-settings: '{' is not JSON"), "{error}");
        assert_eq!(PodSettings::from_annotation("{}").unwrap_err().to_string(), "schema: missing");
    }

    #[test]
    fn a_field_of_a_later_version_is_passed_over() {
        let mut document = serde_json::to_value(settings()).unwrap();
        document["later"] = json!(1);
        assert_eq!(PodSettings::from_annotation(&document.to_string()).unwrap(), settings());
    }
}
