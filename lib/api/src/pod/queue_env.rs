//! queue-proxy's environment, read as queue-proxy reads it.

use std::{collections::BTreeMap, str::FromStr};

use k8s_openapi::api::core::v1::Probe;
use serde::Deserialize;

use super::{
    H2C_PORT,
    settings::{
        Exporter, Logging, PodSettings, Protocol, RequestLog, RevisionTimeouts, SettingsError, TlsSettings, Tracing,
    },
};

/// What queue-proxy takes from `OBSERVABILITY_CONFIG`; Go writes its fields in camelCase and leaves out what is empty.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Observability {
    tracing: Tracing,
    metrics: Exporter,
    request_metrics: Exporter,
    enable_request_log: bool,
    enable_probe_request_log: bool,
    request_log_template: String,
}

/// Variables by name.
#[derive(Clone, Copy)]
struct Env<'a>(&'a BTreeMap<String, String>);

// === impl Env ===

impl<'a> Env<'a> {
    /// Its value; an empty one is none, as Go's reader of environments has it.
    fn text(self, key: &str) -> Option<&'a str> {
        self.0.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn optional(self, key: &str) -> String {
        self.text(key).unwrap_or_default().to_owned()
    }

    fn required(self, key: &str) -> Result<&'a str, SettingsError> {
        self.text(key).ok_or_else(|| SettingsError::Missing { key: key.to_owned() })
    }

    fn number<T: FromStr>(key: &str, value: &str) -> Result<T, SettingsError> {
        value.parse().map_err(|_why| SettingsError::value(key, value, "is no number that fits".into()))
    }

    fn required_number<T: FromStr>(self, key: &str) -> Result<T, SettingsError> {
        Self::number(key, self.required(key)?)
    }

    fn optional_number<T: FromStr + Default>(self, key: &str) -> Result<T, SettingsError> {
        self.text(key).map_or_else(|| Ok(T::default()), |value| Self::number(key, value))
    }

    /// The words that Go takes for a truth value.
    fn truth(self, key: &str) -> Result<bool, SettingsError> {
        match self.text(key) {
            None | Some("0" | "f" | "F" | "false" | "False" | "FALSE") => Ok(false),
            Some("1" | "t" | "T" | "true" | "True" | "TRUE") => Ok(true),
            Some(other) => Err(SettingsError::value(key, other, "is neither true nor false".into())),
        }
    }

    fn json<T: for<'d> Deserialize<'d>>(key: &str, value: &str) -> Result<T, SettingsError> {
        let mut reader = serde_json::Deserializer::from_str(value);
        serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            SettingsError::value(key, value, format!("cannot be read at {}: {}", error.path(), error.inner()))
        })
    }

    fn probes(self) -> Result<Vec<Probe>, SettingsError> {
        const KEY: &str = "SERVING_READINESS_PROBE";
        let Some(text) = self.text(KEY) else { return Ok(Vec::new()) };
        if self.truth("ENABLE_MULTI_CONTAINER_PROBES")? {
            return Self::json(KEY, text);
        }
        Ok(vec![Self::json(KEY, text)?])
    }
}

// === impl PodSettings ===

impl PodSettings {
    /// Reads queue-proxy's environment. `tls_secret` is the Secret behind its certificates, if it has any: that they are
    /// mounted is how queue-proxy knows that it is to speak TLS.
    ///
    /// # Errors
    /// [`SettingsError`] with the variable's name and value.
    pub fn from_queue_env(env: &BTreeMap<String, String>, tls_secret: Option<&str>) -> Result<Self, SettingsError> {
        let env = Env(env);
        let observability: Observability = env
            .text("OBSERVABILITY_CONFIG")
            .map_or_else(|| Ok(Observability::default()), |text| Env::json("OBSERVABILITY_CONFIG", text))?;
        let serving_port = env.required_number("QUEUE_SERVING_PORT")?;
        let tls_port = env.required_number("QUEUE_SERVING_TLS_PORT")?;
        let enabled = observability.enable_request_log;
        let settings = Self {
            schema: Self::schema(),
            namespace: env.required("SERVING_NAMESPACE")?.to_owned(),
            service: env.optional("SERVING_SERVICE"),
            configuration: env.required("SERVING_CONFIGURATION")?.to_owned(),
            revision: env.required("SERVING_REVISION")?.to_owned(),
            system_namespace: env.optional("SYSTEM_NAMESPACE"),
            serving_port,
            protocol: if serving_port == H2C_PORT { Protocol::H2c } else { Protocol::Http1 },
            tls: tls_secret.map(|secret| TlsSettings {
                port: tls_port,
                secret: secret.to_owned(),
                min_version: env.optional("QUEUE_PROXY_TLS_MIN_VERSION"),
                max_version: env.optional("QUEUE_PROXY_TLS_MAX_VERSION"),
                cipher_suites: env.optional("QUEUE_PROXY_TLS_CIPHER_SUITES"),
                curve_preferences: env.optional("QUEUE_PROXY_TLS_CURVE_PREFERENCES"),
                root_ca: env.optional("ROOT_CA"),
            }),
            user_port: env.required_number("USER_PORT")?,
            container_concurrency: env.required_number("CONTAINER_CONCURRENCY")?,
            timeouts: RevisionTimeouts {
                request: env.required_number("REVISION_TIMEOUT_SECONDS")?,
                response_start: env.optional_number("REVISION_RESPONSE_START_TIMEOUT_SECONDS")?,
                idle: env.optional_number("REVISION_IDLE_TIMEOUT_SECONDS")?,
            },
            readiness: env.probes()?,
            http2_auto_detect: env.truth("ENABLE_HTTP2_AUTO_DETECTION")?,
            full_duplex: env.truth("ENABLE_HTTP_FULL_DUPLEX")?,
            request_log: RequestLog {
                enabled,
                probes: observability.enable_probe_request_log,
                template: if enabled { observability.request_log_template } else { String::new() },
            },
            request_metrics: observability.request_metrics,
            metrics: observability.metrics,
            tracing: observability.tracing,
            logging: Logging {
                level: env.optional("SERVING_LOGGING_LEVEL"),
                config: env.optional("SERVING_LOGGING_CONFIG"),
            },
        };
        settings.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLUE: &[(&str, &str)] = &[
        ("SERVING_NAMESPACE", "golden"),
        ("SERVING_SERVICE", "shop"),
        ("SERVING_CONFIGURATION", "shop"),
        ("SERVING_REVISION", "shop-blue"),
        ("QUEUE_SERVING_PORT", "8012"),
        ("QUEUE_SERVING_TLS_PORT", "8112"),
        ("CONTAINER_CONCURRENCY", "25"),
        ("REVISION_TIMEOUT_SECONDS", "120"),
        ("REVISION_RESPONSE_START_TIMEOUT_SECONDS", "0"),
        ("REVISION_IDLE_TIMEOUT_SECONDS", "0"),
        ("SERVING_LOGGING_LEVEL", ""),
        ("USER_PORT", "8080"),
        ("ENABLE_HTTP2_AUTO_DETECTION", "false"),
        ("ENABLE_MULTI_CONTAINER_PROBES", "false"),
        ("SERVING_READINESS_PROBE", r#"{"tcpSocket":{"port":8080,"host":"127.0.0.1"},"successThreshold":1}"#),
        (
            "OBSERVABILITY_CONFIG",
            r#"{"tracing":{"protocol":"grpc","endpoint":"otel:4317","samplingRate":0.5},"metrics":{"protocol":"none"},
                "runtime":{"profiling":"disabled","exportInterval":15000000000},
                "requestMetrics":{"protocol":"prometheus","exportInterval":30000000000},
                "enableRequestLog":true,"requestLogTemplate":"{{.Request.Method}}"}"#,
        ),
    ];

    fn env(changes: &[(&str, Option<&str>)]) -> BTreeMap<String, String> {
        let mut out: BTreeMap<String, String> = BLUE.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        for (key, value) in changes {
            match value {
                Some(value) => drop(out.insert((*key).into(), (*value).into())),
                None => drop(out.remove(*key)),
            }
        }
        out
    }

    #[test]
    fn an_environment_becomes_settings() {
        let settings = PodSettings::from_queue_env(&env(&[]), None).unwrap();
        assert_eq!((settings.serving_port, settings.protocol), (8012, Protocol::Http1));
        assert_eq!((settings.container_concurrency, settings.timeouts.request), (25, 120));
        assert_eq!(settings.readiness.len(), 1);
        assert!(settings.readiness[0].tcp_socket.is_some());
        assert_eq!(settings.request_metrics.protocol, "prometheus");
        assert_eq!(settings.request_metrics.export_interval, 30_000_000_000);
        assert_eq!(
            (settings.tracing.protocol.as_str(), settings.tracing.sampling_rate.to_string()),
            ("grpc", "0.5".into())
        );
        assert_eq!(
            (settings.request_log.enabled, settings.request_log.template.as_str()),
            (true, "{{.Request.Method}}")
        );
        assert_eq!(settings.tls, None);
        assert_eq!(PodSettings::from_annotation(&settings.to_annotation()).unwrap(), settings);
    }

    #[test]
    fn the_template_of_a_log_that_is_off_is_left_out() {
        let off = env(&[("OBSERVABILITY_CONFIG", Some(r#"{"requestLogTemplate":"long"}"#))]);
        let settings = PodSettings::from_queue_env(&off, None).unwrap();
        assert_eq!(settings.request_log, RequestLog::default());
        assert_eq!((settings.metrics.protocol.as_str(), settings.tracing.protocol.as_str()), ("none", "none"));
    }

    #[test]
    fn h2c_tls_and_several_probes() {
        let changes = [
            ("QUEUE_SERVING_PORT", Some("8013")),
            ("QUEUE_PROXY_TLS_MIN_VERSION", Some("1.2")),
            ("ENABLE_MULTI_CONTAINER_PROBES", Some("true")),
            ("SERVING_READINESS_PROBE", Some(r#"[{"tcpSocket":{"port":8080}},{"grpc":{"port":9999}}]"#)),
        ];
        let settings = PodSettings::from_queue_env(&env(&changes), Some("serving-certs")).unwrap();
        assert_eq!((settings.protocol, settings.readiness.len()), (Protocol::H2c, 2));
        let tls = settings.tls.unwrap();
        assert_eq!((tls.port, tls.secret.as_str(), tls.min_version.as_str()), (8112, "serving-certs", "1.2"));
    }

    #[test]
    fn errors_name_the_variable_and_its_value() {
        let rows = [
            ("USER_PORT", None, "USER_PORT: missing"),
            ("USER_PORT", Some(""), "USER_PORT: missing"),
            ("USER_PORT", Some("http"), "USER_PORT: 'http' is no number that fits"),
            ("CONTAINER_CONCURRENCY", Some("-1"), "CONTAINER_CONCURRENCY: '-1' is no number that fits"),
            ("ENABLE_HTTP_FULL_DUPLEX", Some("yes"), "ENABLE_HTTP_FULL_DUPLEX: 'yes' is neither true nor false"),
            ("SERVING_READINESS_PROBE", Some("[]"), "SERVING_READINESS_PROBE: '[]' cannot be read"),
            (
                "OBSERVABILITY_CONFIG",
                Some(r#"{"metrics":7}"#),
                "OBSERVABILITY_CONFIG: '{\"metrics\":7}' cannot be read at metrics",
            ),
            ("USER_PORT", Some("8012"), "userPort: '8012' is taken by the data plane"),
        ];
        for (key, value, begins) in rows {
            let error = PodSettings::from_queue_env(&env(&[(key, value)]), None).unwrap_err().to_string();
            assert!(error.starts_with(begins), "{key}: {error}");
        }
    }
}
