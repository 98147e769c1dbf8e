//! The admin port: `/metrics`, `/healthz`, `/readyz`, `/status`, served by the supervisor, so that no component needs a
//! port for it and no stranger's bytes share a thread with it.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::Semaphore};

use crate::Supervisor;

/// Connections served at once; a scraper needs one.
const MAX_CONNECTIONS: usize = 32;

/// Serves until the task is dropped.
pub async fn serve(listener: TcpListener, supervisor: Supervisor) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "admin port");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let supervisor = supervisor.clone();
        tokio::spawn(
            async move {
                let service = service_fn(|request: Request<Incoming>| answer(request, supervisor.clone()));
                let _the_scraper_left = hyper::server::conn::http1::Builder::new()
                    .timer(hyper_util::rt::TokioTimer::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                drop(permit);
            }
            .boxed(),
        );
    }
}

pub(crate) async fn answer<B>(
    request: Request<B>,
    supervisor: Supervisor,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/healthz") => match supervisor.stuck().as_slice() {
            [] => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
            stuck => {
                let text = format!("no answer from: {}\n", stuck.join(", "));
                (StatusCode::SERVICE_UNAVAILABLE, "text/plain", text)
            }
        },
        (&Method::GET | &Method::HEAD, "/readyz") => match (supervisor.is_ready(), supervisor.is_draining()) {
            (true, _) => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
            (false, true) => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", "draining\n".to_owned()),
            (false, false) => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", "a component is not ready\n".to_owned()),
        },
        (&Method::GET | &Method::HEAD, "/metrics") => {
            (StatusCode::OK, "text/plain; version=0.0.4", metrics(&supervisor).await)
        }
        (&Method::GET | &Method::HEAD, "/status") => {
            (StatusCode::OK, "application/json", status(&supervisor).await.to_string())
        }
        (_, path) => {
            (StatusCode::NOT_FOUND, "text/plain", format!("{path}: not here; see /metrics /healthz /readyz /status\n"))
        }
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    Ok(response)
}

/// Status of all components, `lifl.dev/status/v1`.
pub async fn status(supervisor: &Supervisor) -> Value {
    let mut components = serde_json::Map::new();
    for scrape in supervisor.scrape().await {
        let document = json!({"pid": scrape.pid, "restarts": scrape.restarts, "status": scrape.status});
        components.insert(scrape.name.to_owned(), document);
    }
    json!({"schema": "lifl.dev/status/v1", "version": env!("CARGO_PKG_VERSION"), "ready": supervisor.is_ready(), "components": components})
}

/// Metrics of all components as one exposition.
async fn metrics(supervisor: &Supervisor) -> String {
    use std::fmt::Write as _;
    let mut own = format!(
        "# HELP lifl_build_info Version of this build.\n# TYPE lifl_build_info gauge\nlifl_build_info{{version=\"{}\"}} 1\n",
        env!("CARGO_PKG_VERSION")
    );
    let scrapes = supervisor.scrape().await;
    own.push_str("# HELP lifl_component_restarts_total Times a component was started again.\n");
    own.push_str("# TYPE lifl_component_restarts_total counter\n");
    for scrape in &scrapes {
        let (name, restarts) = (scrape.name, scrape.restarts);
        let _to_a_string = writeln!(own, "lifl_component_restarts_total{{component=\"{name}\"}} {restarts}");
    }
    merge(scrapes.iter().map(|scrape| scrape.metrics.as_str()).chain([own.as_str()]))
}

/// One family a name, as the format demands: two components may count drops, each its own. Series keep their order:
/// buckets must stand by size.
fn merge<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    use std::fmt::Write as _;
    /// Comment lines, and series with their values.
    type Family<'a> = (Vec<&'a str>, Vec<(&'a str, f64)>);
    let mut families: BTreeMap<&str, Family<'a>> = BTreeMap::new();
    let mut family = "";
    for line in texts.flat_map(str::lines) {
        if let Some(comment) = line.strip_prefix("# ") {
            family = comment.split(' ').nth(1).unwrap_or_default();
            let comments = &mut families.entry(family).or_default().0;
            if comments.len() < 2 {
                comments.push(line);
            }
        } else if let Some((name, value)) = line.rsplit_once(' ') {
            let value = value.parse().unwrap_or(0.0);
            let series = &mut families.entry(family).or_default().1;
            match series.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += value,
                None => series.push((name, value)),
            }
        }
    }
    let mut out = String::new();
    for (comments, series) in families.values() {
        for line in comments {
            let _to_a_string = writeln!(out, "{line}");
        }
        for (name, value) in series {
            let _to_a_string = writeln!(out, "{name} {value}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::merge;

    #[test]
    fn a_family_of_two_components_is_one() {
        let a = "# HELP d Drops.\n# TYPE d counter\nd{reason=\"full\"} 2\nd{reason=\"chain\"} 1\n";
        let b = "# HELP a Other.\n# TYPE a gauge\na 0.5\n# HELP d Drops.\n# TYPE d counter\nd{reason=\"full\"} 3\n";
        let merged = "# HELP a Other.\n# TYPE a gauge\na 0.5\n# HELP d Drops.\n# TYPE d counter\nd{reason=\"full\"} 5\nd{reason=\"chain\"} 1\n";
        assert_eq!(merge([a, b].into_iter()), merged);
    }
}
