//! Spans on their way to a collector: OTLP over HTTP/1.1 or gRPC, in batches, from a queue of bounded length.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::FutureExt as _;
use http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Limited};
use prost::Message as _;
use tokio::{
    net::lookup_host,
    sync::{mpsc, oneshot},
    time::{sleep, sleep_until, timeout},
};

use super::{otlp, span::Span};
use crate::{
    endpoint::{Dial, Endpoint, Protocol},
    upstream::{Body, Pool, Sent, Upstream},
};

/// Spans that wait.
const QUEUE: usize = 2048;
/// Spans sent at once.
const BATCH: usize = 512;
/// The first span of a batch waits at most so long for others.
const GATHER: Duration = Duration::from_secs(1);
/// A collector must answer within this.
const PATIENCE: Duration = Duration::from_secs(10);
/// A batch that a collector could not take is sent again after these.
const AGAIN: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
/// An answer is read so far.
const ANSWER: usize = 64 << 10;

/// What is spoken with a collector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// A POST of protobuf.
    Http,
    /// gRPC.
    Grpc,
}

/// A collector's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectorAddress {
    host: String,
    port: u16,
    target: Uri,
    wire: Wire,
}

/// An address where no spans can be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("collector '{address}': {why}")]
pub struct CollectorError {
    address: String,
    why: &'static str,
}

/// What became of spans. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct SpanCounts(Arc<[AtomicU64; 3]>);

/// The near end of the queue. Cloning shares it; the task behind it ends with the last clone.
#[derive(Clone, Debug)]
pub struct Exporter {
    queue: mpsc::Sender<Item>,
    counts: SpanCounts,
}

/// An [`Exporter`] whose task ends without regard to this.
#[derive(Clone, Debug)]
pub struct WeakExporter {
    queue: mpsc::WeakSender<Item>,
    counts: SpanCounts,
}

#[derive(Debug)]
enum Item {
    Span(Box<Span>),
    /// To be told when all before it has gone.
    Flush(oneshot::Sender<()>),
}

/// The far end.
struct Sender<D> {
    pool: Pool<D>,
    place: u64,
    collector: CollectorAddress,
    /// Where the collector's name led to, and the connections to there.
    upstream: Option<Upstream<D>>,
    counts: SpanCounts,
}

/// Why a batch has not gone.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("name: {0}")]
    Name(io::Error),
    #[error(transparent)]
    Send(#[from] crate::upstream::SendError),
    #[error("no answer in time")]
    Late,
    #[error("answered {0}")]
    Status(StatusCode),
    #[error("gRPC status {0}")]
    Grpc(String),
    #[error("answer: {0}")]
    Answer(String),
    #[error("request: {0}")]
    Request(#[from] http::Error),
}

// === impl CollectorAddress ===

impl CollectorAddress {
    /// Reads an address: `http://HOST:PORT`, with `/v1/traces` where it has no path.
    ///
    /// # Errors
    /// [`CollectorError`]: it is no such address, or asks for TLS, which is not spoken here.
    pub fn parse(address: &str, wire: Wire) -> Result<Self, CollectorError> {
        let wrong = |why| CollectorError { address: address.to_owned(), why };
        let uri: Uri = address.parse().map_err(|_invalid| wrong("is no address"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(wrong("TLS is not spoken here: use http://, as to a collector on the node")),
            // What Go takes for https.
            _ => return Err(wrong("must begin with http://")),
        }
        let host = uri.host().ok_or_else(|| wrong("names no host"))?;
        let port = uri.port_u16().unwrap_or(match wire {
            Wire::Http => 4318,
            Wire::Grpc => 4317,
        });
        let path = match wire {
            Wire::Grpc => "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
            Wire::Http if uri.path() == "/" => "/v1/traces",
            Wire::Http => uri.path(),
        };
        let target = Uri::builder().scheme("http").authority(format!("{host}:{port}")).path_and_query(path);
        let target = target.build().map_err(|_invalid| wrong("is no address"))?;
        Ok(Self { host: host.trim_matches(['[', ']']).to_owned(), port, target, wire })
    }

    const fn protocol(&self) -> Protocol {
        match self.wire {
            Wire::Http => Protocol::H1,
            Wire::Grpc => Protocol::H2c,
        }
    }

    fn request(&self, message: &[u8]) -> Result<Request<Body>, http::Error> {
        let request = Request::builder().method(Method::POST);
        match self.wire {
            Wire::Http => request
                .uri(self.target.path())
                .header(header::HOST, self.target.authority().map_or("", |authority| authority.as_str()))
                .header(header::CONTENT_TYPE, "application/x-protobuf")
                .body(Bytes::copy_from_slice(message).into()),
            Wire::Grpc => {
                let mut framed = BytesMut::with_capacity(message.len() + 5);
                framed.put_u8(0);
                framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
                framed.put_slice(message);
                request
                    .uri(self.target.clone())
                    .version(http::Version::HTTP_2)
                    .header(header::CONTENT_TYPE, "application/grpc")
                    .header(header::TE, HeaderValue::from_static("trailers"))
                    .body(framed.freeze().into())
            }
        }
    }
}

// === impl SpanCounts ===

impl SpanCounts {
    /// Spans that a collector has.
    #[must_use]
    pub fn exported(&self) -> u64 {
        self.0[0].load(Ordering::Relaxed)
    }

    /// Spans that the queue had no room for.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.0[1].load(Ordering::Relaxed)
    }

    /// Spans that no collector took.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.0[2].load(Ordering::Relaxed)
    }

    fn add(&self, which: usize, spans: usize) {
        self.0[which].fetch_add(spans as u64, Ordering::Relaxed);
    }
}

// === impl Exporter ===

impl Exporter {
    /// Begins to send to a collector, dialled in network namespace `place` by `pool`. Needs a tokio runtime around it.
    #[must_use]
    pub fn start<D: Dial>(pool: &Pool<D>, place: u64, collector: CollectorAddress, counts: &SpanCounts) -> Self {
        let (queue, items) = mpsc::channel(QUEUE);
        let counts = counts.clone();
        let sender = Sender { pool: pool.clone(), place, collector, upstream: None, counts: counts.clone() };
        tokio::spawn(sender.run(items).boxed());
        Self { queue, counts }
    }

    pub(super) fn send(&self, span: Span) {
        if self.queue.try_send(Item::Span(Box::new(span))).is_err() {
            self.counts.add(1, 1);
        }
    }

    /// The same, for who only wants to flush it.
    #[must_use]
    pub fn downgrade(&self) -> WeakExporter {
        WeakExporter { queue: self.queue.downgrade(), counts: self.counts.clone() }
    }

    /// Waits until what was sent so far has gone, or was given up.
    pub async fn flush(&self) {
        let (tell, told) = oneshot::channel();
        if self.queue.send(Item::Flush(tell)).await.is_ok() {
            let _the_task_is_gone = told.await;
        }
    }
}

// === impl WeakExporter ===

impl WeakExporter {
    /// The exporter, if anybody still has it.
    #[must_use]
    pub fn upgrade(&self) -> Option<Exporter> {
        Some(Exporter { queue: self.queue.upgrade()?, counts: self.counts.clone() })
    }
}

// === impl Sender ===

impl<D: Dial> Sender<D> {
    /// Until the last clone of the near end is gone.
    async fn run(mut self, mut items: mpsc::Receiver<Item>) {
        let mut batch = Vec::new();
        while let Some(item) = items.recv().await {
            let mut flushed = take(item, &mut batch);
            let until = tokio::time::Instant::now() + GATHER;
            while flushed.is_none() && batch.len() < BATCH {
                tokio::select! {
                    item = items.recv() => match item {
                        Some(item) => flushed = take(item, &mut batch),
                        None => break,
                    },
                    () = sleep_until(until) => break,
                }
            }
            self.deliver(std::mem::take(&mut batch)).await;
            if let Some(tell) = flushed {
                let _who_asked_is_gone = tell.send(());
            }
        }
    }

    /// Sends a batch, if need be again.
    async fn deliver(&mut self, batch: Vec<Span>) {
        let spans = batch.len();
        if spans == 0 {
            return;
        }
        let message = otlp::export(batch).encode_to_vec();
        let mut waits = AGAIN.iter();
        loop {
            let error = match timeout(PATIENCE, self.post(&message)).await {
                Ok(Ok(())) => return self.counts.add(0, spans),
                Ok(Err(error)) => error,
                Err(_late) => ExportError::Late,
            };
            self.upstream = None;
            match waits.next().filter(|_| error.passes()) {
                Some(wait) => sleep(*wait).await,
                None => {
                    tracing::warn!(%error, collector = %self.collector.target, spans, "spans are not exported");
                    return self.counts.add(2, spans);
                }
            }
        }
    }

    async fn post(&mut self, message: &[u8]) -> Result<(), ExportError> {
        if self.upstream.is_none() {
            let addr = self.resolve().await.map_err(ExportError::Name)?;
            let endpoint = Endpoint { addr, protocol: self.collector.protocol(), place: self.place };
            self.upstream = Some(self.pool.upstream(endpoint));
        }
        let Some(upstream) = &self.upstream else { return Err(ExportError::Late) };
        let Sent::Response(response) = upstream.send(self.collector.request(message)?).await? else {
            return Err(ExportError::Status(StatusCode::SWITCHING_PROTOCOLS));
        };
        let (parts, body) = response.into_parts();
        // Read to the end, or the connection is not used again.
        let body =
            Limited::new(body, ANSWER).collect().await.map_err(|error| ExportError::Answer(error.to_string()))?;
        if !parts.status.is_success() {
            return Err(ExportError::Status(parts.status));
        }
        if self.collector.wire == Wire::Grpc {
            let of = |headers: &http::HeaderMap| headers.get("grpc-status").cloned();
            let status = body.trailers().and_then(of).or_else(|| of(&parts.headers));
            if status.as_ref().is_none_or(|status| status != "0") {
                let status = status.map_or_else(String::new, |s| String::from_utf8_lossy(s.as_bytes()).into_owned());
                return Err(ExportError::Grpc(status));
            }
        }
        Ok(())
    }

    /// IPv4 first: sockets of pods know nothing else.
    async fn resolve(&self) -> io::Result<SocketAddr> {
        let all: Vec<SocketAddr> = lookup_host((self.collector.host.as_str(), self.collector.port)).await?.collect();
        let first = all.iter().find(|addr| addr.is_ipv4()).or_else(|| all.first());
        first.copied().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no address"))
    }
}

/// Puts a span into the batch; gives back who is to be told when it has gone.
fn take(item: Item, batch: &mut Vec<Span>) -> Option<oneshot::Sender<()>> {
    match item {
        Item::Span(span) => {
            batch.push(*span);
            None
        }
        Item::Flush(tell) => Some(tell),
    }
}

// === impl ExportError ===

impl ExportError {
    /// Whether the same batch may be taken later, by OTLP's own list.
    fn passes(&self) -> bool {
        match self {
            Self::Name(_) | Self::Send(_) | Self::Late | Self::Answer(_) => true,
            Self::Status(status) => matches!(status.as_u16(), 429 | 502 | 503 | 504),
            // UNAVAILABLE, and who is out of resources.
            Self::Grpc(status) => status == "14" || status == "8",
            Self::Request(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_collectors_are_read_as_opentelemetry_reads_them() {
        let rows = [
            ("http://otel:4318", Wire::Http, "otel", 4318, "http://otel:4318/v1/traces"),
            ("http://otel", Wire::Http, "otel", 4318, "http://otel:4318/v1/traces"),
            ("http://jaeger.o:80/api/otlp", Wire::Http, "jaeger.o", 80, "http://jaeger.o:80/api/otlp"),
            ("http://[::1]:5", Wire::Http, "::1", 5, "http://[::1]:5/v1/traces"),
        ];
        for (address, wire, host, port, target) in rows {
            let collector = CollectorAddress::parse(address, wire).expect("an address");
            assert_eq!((collector.host.as_str(), collector.port), (host, port), "{address}");
            assert_eq!(collector.target.to_string(), target);
        }
        let grpc = CollectorAddress::parse("http://otel", Wire::Grpc).expect("an address");
        assert_eq!((grpc.port, grpc.target.path().rsplit('/').next()), (4317, Some("Export")));
        for (address, why) in [("https://otel", "TLS"), ("otel:4317", "http://"), ("", "no address")] {
            let error = CollectorAddress::parse(address, Wire::Http).expect_err("no address").to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
