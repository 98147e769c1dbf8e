//! Answers of our own, byte for byte as Go's `net/http` writes them: kubelet, autoscaler and activator compare.

use http::{HeaderValue, Response, StatusCode, header};

use crate::upstream::Body;

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// An error: the text and a line feed, not to be guessed at by browsers (Go's `http.Error`).
#[must_use]
pub fn error(status: StatusCode, text: &str) -> Response<Body> {
    let mut response = plain(status, format!("{text}\n"));
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// A text as it is.
#[must_use]
pub fn plain(status: StatusCode, text: impl Into<Body>) -> Response<Body> {
    let mut response = empty(status);
    *response.body_mut() = text.into();
    response.headers_mut().insert(header::CONTENT_TYPE, TEXT);
    response
}

/// A status and nothing else.
#[must_use]
pub fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}
