//! One request, passed on to an endpoint.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Body as _;
use tokio::{sync::Notify, time::timeout};

use crate::{
    endpoint::{Dial, Protocol},
    head::{self, Malformed, Peer},
    timeouts::{Clock, Expired},
    upstream::{Body, SendError, Sent, Upstream},
};

mod tunnel;

pub use tunnel::Tunnels;

/// A client that wants to be told to go on is told after this, whatever the endpoint does.
const CONTINUE: Duration = Duration::from_secs(1);

/// No response to pass back.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The client's head is no request; 400.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// A method that a proxy of this kind does not have; 405.
    #[error("method not allowed")]
    Method,
    /// Time is up before the response began; 504.
    #[error(transparent)]
    Expired(#[from] Expired),
    /// The endpoint has not answered; 502.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The endpoint has answered nonsense; 502.
    #[error("bad response: {0}")]
    Response(Malformed),
}

/// What belongs to one request on its way.
#[derive(Debug)]
pub struct Ride<'a, K> {
    /// Who asks.
    pub peer: &'a Peer,
    /// The time that the response may take.
    pub clock: Option<Clock>,
    /// Dropped when the response has ended, a tunnel included.
    pub kept: K,
    /// Where tunnels are counted, and cut off.
    pub tunnels: &'a Tunnels,
}

// === impl ForwardError ===

impl ForwardError {
    /// The status that tells the client.
    #[must_use]
    pub const fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(_) => StatusCode::BAD_REQUEST,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Expired(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Send(_) | Self::Response(_) => StatusCode::BAD_GATEWAY,
        }
    }
}

/// Passes a request on and its response back.
///
/// Dropping the future, or the response's body, is the client's cancelling: the connection to the endpoint is closed
/// (HTTP/1.1) or the stream reset (HTTP/2).
///
/// # Errors
/// [`ForwardError`]; nothing has been written to the client then.
pub async fn forward<D: Dial, K: Send + 'static>(
    upstream: &Upstream<D>,
    mut request: Request<Body>,
    ride: Ride<'_, K>,
) -> Result<Response<Body>, ForwardError> {
    if request.method() == Method::CONNECT {
        return Err(ForwardError::Method);
    }
    let protocol = upstream.endpoint().protocol;
    let client = hyper::upgrade::on(&mut request);
    let (mut parts, body) = request.into_parts();
    let continues = protocol == Protocol::H1 && head::has_token(&parts.headers, &header::EXPECT, "100-continue");
    let asked =
        head::to_endpoint(&mut parts, ride.peer, protocol)?.then(|| parts.headers.get(header::UPGRADE).cloned());
    if protocol == Protocol::H1 && !body.is_end_stream() && body.size_hint().exact().is_none() {
        // Told expressly: of a GET hyper would take a body of unknown length for none.
        parts.headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    let mut request = Request::from_parts(parts, body);
    if continues {
        request = wait_for_continue(request);
    }
    let Ride { mut clock, kept, tunnels, .. } = ride;
    match within(clock.as_mut(), upstream.send(request)).await?? {
        Sent::Response(response) => {
            if let Some(clock) = &mut clock {
                clock.wrote()?;
            }
            let (mut parts, body) = response.into_parts();
            head::from_endpoint(&mut parts);
            Ok(Response::from_parts(parts, body.with(clock, kept)))
        }
        Sent::Switch(mut parts, switch) => {
            let asked: Option<HeaderValue> = asked.flatten();
            head::switched(&mut parts, asked.as_ref()).map_err(ForwardError::Response)?;
            tunnels.open(client, switch, clock, kept);
            Ok(Response::from_parts(parts, Body::empty()))
        }
    }
}

/// What `future` comes to, unless time is up first.
///
/// # Errors
/// [`Expired`].
pub async fn within<F: Future>(clock: Option<&mut Clock>, future: F) -> Result<F::Output, Expired> {
    let mut future = pin!(future);
    let Some(clock) = clock else { return Ok(future.await) };
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Ok(output)),
        Poll::Pending => clock.poll_expired(cx).map(Err),
    })
    .await
}

/// Holds the body back until the endpoint has said `100 Continue`; reading it is what tells the client to go on.
fn wait_for_continue(mut request: Request<Body>) -> Request<Body> {
    let told = Arc::new(Notify::new());
    let tell = Arc::clone(&told);
    hyper::ext::on_informational(&mut request, move |response| {
        if response.status() == StatusCode::CONTINUE {
            tell.notify_one();
        }
    });
    request.map(|body| {
        body.held(async move {
            // An endpoint that says nothing has the body anyway, as with every other client.
            let _said_nothing = timeout(CONTINUE, told.notified()).await;
        })
    })
}
