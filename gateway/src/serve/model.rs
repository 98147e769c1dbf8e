//! Models straight from shared memory, and the job's document.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Frame, Incoming, SizeHint};
use lifl_api::event::SAFETENSORS;

use super::{Body, auth, json};
use crate::{
    chain::{Chain, Served},
    problem::{Code, Refusal},
    state::Gateway,
};

/// What is handed to a connection at a time: so much of a replaced model a slow reader can hold.
const PART: usize = 256 << 10;

/// A download.
struct Download {
    served: Arc<Served>,
    at: usize,
}

// === impl Download ===

impl hyper::body::Body for Download {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let length = self.served.file().len();
        if self.at >= length {
            return Poll::Ready(None);
        }
        if self.served.is_revoked() {
            return Poll::Ready(Some(Err(io::Error::other("a newer model took this one's place"))));
        }
        let end = length.min(self.at + PART);
        let part = self.served.part(self.at, end);
        self.at = end;
        Poll::Ready(Some(Ok(Frame::data(part))))
    }

    fn is_end_stream(&self) -> bool {
        self.at >= self.served.file().len()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact((self.served.file().len() - self.at) as u64)
    }
}

/// `GET model`.
pub(crate) fn get(gateway: &Gateway, chain: &Chain, request: &Request<Incoming>) -> Result<Response<Body>, Refusal> {
    auth::may_read(gateway, chain, request.headers())?;
    let round = asked_round(request.uri().query().unwrap_or_default())?;
    let (served, known) = {
        let inner = chain.lock();
        (inner.served.clone(), inner.meta.model.is_some())
    };
    let served = match served {
        Some(served) => served,
        None if known => return Err(Code::Starting.with("the model is on its way back into this gateway")),
        None => return Err(Code::UnknownModel.with("the job has no model yet")),
    };
    let is = served.meta.round;
    if let Some(round) = round.filter(|round| *round != is) {
        return Err(Code::UnknownModel.with(format!("the model of round {round} is not here; it is round {is}")));
    }
    let tag = format!("\"{is}\"");
    let unchanged = request.headers().get_all(header::IF_NONE_MATCH).iter().any(|value| matches_tag(value, &tag));
    let length = served.file().len();
    let body = if unchanged || request.method() == Method::HEAD {
        Empty::new().map_err(|never| match never {}).boxed_unsync()
    } else {
        Download { served, at: 0 }.boxed_unsync()
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, value);
    }
    if unchanged {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(SAFETENSORS));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    Ok(response)
}

/// `If-None-Match`: a list of tags, weak ones included, or `*`.
fn matches_tag(value: &HeaderValue, tag: &str) -> bool {
    let Ok(value) = value.to_str() else { return false };
    value.split(',').map(str::trim).any(|one| one == "*" || one.strip_prefix("W/").unwrap_or(one) == tag)
}

fn asked_round(query: &str) -> Result<Option<u32>, Refusal> {
    let asked = url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "round");
    let Some((_, value)) = asked else { return Ok(None) };
    let round = value.parse().map_err(|error| Code::BadRequest.with(format!("round '{value}': {error}")))?;
    Ok(Some(round))
}

/// `GET job`.
pub(crate) fn document(
    gateway: &Gateway,
    chain: &Chain,
    request: &Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    auth::may_read(gateway, chain, request.headers())?;
    let document = chain.lock().document();
    Ok(json(StatusCode::OK, &document))
}
