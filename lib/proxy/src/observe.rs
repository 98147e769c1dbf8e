//! What is seen of requests: figures, lines of a log, traces. Knows nothing of who asks for them.
//!
//! ```text
//!  request ─ who serves it ─┬─ Histogram   a few atomic additions, read when asked for
//!                           ├─ Lines       a buffer of bounded size ── one thread ──> a file
//!                           └─ Tracer      a queue of bounded length ── one task ──> OTLP over HTTP or gRPC
//! ```
//!
//! Nothing here makes a request wait: what a buffer or a queue has no room for is dropped and counted.

mod context;
mod export;
mod histogram;
mod lines;
mod otlp;
mod span;
mod template;
mod upload;

pub use context::{Context, SpanId, TRACEPARENT, TRACESTATE, TraceId, trace_id};
pub use export::{CollectorAddress, CollectorError, Exporter, SpanCounts, WeakExporter, Wire};
pub use histogram::{Counts, DURATIONS, Durations, Histogram, SIZES, Scale, Sizes, escape};
pub use lines::{LineCounts, Lines};
pub use otlp::Value;
pub use span::{Ended, Resource, ServerSpan, Span, SpanKind, Tracer, method_name};
pub use template::{Draft, Facts, Response, Template, TemplateError};
pub use upload::{GONE, Upload};
