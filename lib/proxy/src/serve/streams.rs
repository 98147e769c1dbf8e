//! Tasks of an HTTP/2 connection's streams.

use std::sync::Arc;

use futures_util::FutureExt as _;
use hyper::rt::Executor;

use crate::progress::Progress;

/// Spawns each stream so that it can be ended alone: its client is told by RST_STREAM.
#[derive(Clone, Debug)]
pub(super) struct Streams(pub(super) Arc<Progress>);

impl<F> Executor<F> for Streams
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        // Its request has begun just now, in this same poll of the connection.
        self.0.spawned(tokio::spawn(stream.boxed()).abort_handle());
    }
}
