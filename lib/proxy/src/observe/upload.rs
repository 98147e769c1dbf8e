//! How long a request was, whether or not it said so.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use http::Request;
use hyper::body::Body as _;

use crate::upstream::{Body, Keep};

/// The client was gone before there was an answer. No server says so; logs have called it that for long.
pub const GONE: u16 = 499;

/// What came of a request's body.
#[derive(Debug)]
pub struct Upload(Bytes);

#[derive(Debug)]
enum Bytes {
    Known(u64),
    Counted(Passed),
}

/// Counts the bytes of a body.
#[derive(Clone, Debug, Default)]
struct Passed(Arc<AtomicU64>);

// === impl Upload ===

impl Upload {
    /// The body of this request; one of unknown length is counted on its way.
    pub fn of(request: &mut Request<Body>) -> Self {
        if let Some(bytes) = request.body().size_hint().exact() {
            return Self(Bytes::Known(bytes));
        }
        let passed = Passed::default();
        let body = std::mem::take(request.body_mut());
        *request.body_mut() = body.with(None, passed.clone());
        Self(Bytes::Counted(passed))
    }

    /// Its bytes so far; what the head said if it did.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match &self.0 {
            Bytes::Known(bytes) => *bytes,
            Bytes::Counted(passed) => passed.0.load(Ordering::Relaxed),
        }
    }
}

// === impl Passed ===

impl Keep for Passed {
    fn passed(&mut self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}
