//! The body of a request as it comes: judged by its pace, digested, and drained where it is no longer wanted.

use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::time::{Instant, timeout_at};

use crate::{
    config::Config,
    intake::Digester,
    pace::Pace,
    problem::{Code, Refusal},
};

/// Bytes of a refused body that are still read, so that a client that only writes gets to read why.
const LINGER: u64 = 256 << 20;

/// A body under way.
#[derive(Debug)]
pub(crate) struct Upload {
    body: Option<Incoming>,
    pace: Pace,
    digest: Digester,
    received: usize,
    /// The client waits for our word before it sends.
    expects: bool,
}

// === impl Upload ===

impl Upload {
    pub(crate) fn new(headers: &HeaderMap, body: Incoming, sha256: bool, config: &Config) -> Self {
        let grace = Duration::from_millis(config.upload_grace_ms);
        Self {
            body: Some(body),
            pace: Pace::new(Instant::now(), grace, config.upload_floor),
            digest: Digester::new(sha256),
            received: 0,
            expects: headers.contains_key(header::EXPECT),
        }
    }

    /// The next bytes; `None` at the end.
    pub(crate) async fn frame(&mut self) -> Result<Option<Bytes>, Refusal> {
        while let Some(body) = self.body.as_mut() {
            let frame = match timeout_at(self.pace.deadline(), body.frame()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => {
                    self.body = None;
                    return Err(
                        Code::BadLength.with(format!("the body broke off after {} bytes: {error}", self.received))
                    );
                }
                Ok(None) => {
                    self.body = None;
                    return Ok(None);
                }
                Err(_) => {
                    self.body = None;
                    let got = self.received;
                    return Err(Code::TooSlow.with(format!("{got} bytes came, slower than the gateway waits for")));
                }
            };
            // Trailers say nothing here.
            let Ok(bytes) = frame.into_data() else { continue };
            self.received += bytes.len();
            self.pace.progress(Instant::now(), bytes.len());
            self.digest.push(&bytes);
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// The client waited for us.
    pub(crate) fn pardon(&mut self, since: Instant) {
        self.pace.pardon(since.elapsed());
    }

    pub(crate) const fn received(&self) -> usize {
        self.received
    }

    /// Digest of what came.
    pub(crate) fn digest(&mut self) -> [u8; 32] {
        std::mem::replace(&mut self.digest, Digester::new(false)).finish()
    }
}

impl Drop for Upload {
    /// What is refused is read on for a while beside the answer, within the same pace: a client that writes all before it
    /// reads would otherwise find its connection reset instead of the answer. Who waits for our word sends nothing.
    fn drop(&mut self) {
        let untouched = self.expects && self.received == 0;
        let Some(mut body) = self.body.take().filter(|_| !untouched) else { return };
        if hyper::body::Body::is_end_stream(&body) {
            return;
        }
        let mut pace = std::mem::replace(&mut self.pace, Pace::new(Instant::now(), Duration::ZERO, 1));
        tokio::spawn(
            async move {
                let mut read = 0;
                while let Ok(Some(Ok(frame))) = timeout_at(pace.deadline(), body.frame()).await {
                    let bytes = frame.data_ref().map_or(0, Bytes::len);
                    pace.progress(Instant::now(), bytes);
                    read += bytes as u64;
                    if read > LINGER {
                        return;
                    }
                }
            }
            .boxed(),
        );
    }
}
