//! One request, passed on to an endpoint.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use http::{HeaderValue, Method, Request, Response, StatusCode, header, response};
use hyper::upgrade::OnUpgrade;
use tokio::{sync::Notify, time::timeout};

use crate::{
    endpoint::{Dial, Protocol},
    head::{self, Malformed, Peer},
    timeouts::{Clock, Expired},
    upstream::{Body, Continue, Keep, SendError, Sent, Switch, Upstream},
};

mod tunnel;

pub use tunnel::Tunnels;

use tunnel::Carried;

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
    /// Told of the answer, and dropped when the response has ended, a tunnel included.
    pub kept: K,
    /// Where tunnels are counted, and cut off.
    pub tunnels: &'a Tunnels,
}

enum Answered {
    Response(Response<Body>),
    Switch(response::Parts, OnUpgrade, Switch),
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
pub async fn forward<D: Dial, K: Keep>(
    upstream: &Upstream<D>,
    request: Request<Body>,
    ride: Ride<'_, K>,
) -> Result<Response<Body>, ForwardError> {
    let Ride { peer, mut clock, mut kept, tunnels } = ride;
    let answered = match ask(upstream, request, peer, clock.as_mut()).await {
        Ok(answered) => answered,
        Err(error) => {
            kept.refused(error.status());
            return Err(error);
        }
    };
    match answered {
        Answered::Response(response) => {
            kept.head(response.status());
            Ok(response.map(|body| body.with(clock, kept)))
        }
        Answered::Switch(parts, client, switch) => {
            kept.head(StatusCode::SWITCHING_PROTOCOLS);
            let carried = tunnels.open(peer, (client, switch), clock, kept);
            let mut response = Response::from_parts(parts, Body::empty());
            response.extensions_mut().insert(carried);
            Ok(response)
        }
    }
}

/// The response, with what is to be dropped when it has ended, a tunnel included.
pub fn carry<K: Keep>(response: Response<Body>, kept: K) -> Response<Body> {
    match response.extensions().get::<Carried>() {
        Some(carried) => {
            carried.add(kept);
            response
        }
        None => response.map(|body| body.with(None, kept)),
    }
}

/// Sends the request; the head of the answer is as the client is to see it.
async fn ask<D: Dial>(
    upstream: &Upstream<D>,
    mut request: Request<Body>,
    peer: &Peer,
    mut clock: Option<&mut Clock>,
) -> Result<Answered, ForwardError> {
    if request.method() == Method::CONNECT {
        return Err(ForwardError::Method);
    }
    let protocol = upstream.endpoint().protocol;
    let client = hyper::upgrade::on(&mut request);
    let (mut parts, body) = request.into_parts();
    let continues = protocol == Protocol::H1 && head::has_token(&parts.headers, &header::EXPECT, "100-continue");
    let asked =
        head::to_endpoint(&mut parts, peer, &upstream.endpoint())?.then(|| parts.headers.get(header::UPGRADE).cloned());
    let mut request = Request::from_parts(parts, body);
    if continues {
        request = wait_for_continue(request);
    }
    match within(clock.as_deref_mut(), pin!(upstream.send(request))).await?? {
        Sent::Response(response) => {
            if let Some(clock) = clock {
                clock.wrote()?;
            }
            let (mut parts, body) = response.into_parts();
            head::from_endpoint(&mut parts);
            Ok(Answered::Response(Response::from_parts(parts, body)))
        }
        Sent::Switch(mut parts, switch) => {
            let asked: Option<HeaderValue> = asked.flatten();
            head::switched(&mut parts, asked.as_ref()).map_err(ForwardError::Response)?;
            Ok(Answered::Switch(parts, client, switch))
        }
    }
}

/// What `future` comes to, unless time is up first.
///
/// # Errors
/// [`Expired`].
pub fn within<F: Future>(
    mut clock: Option<&mut Clock>,
    mut future: Pin<&mut F>,
) -> impl Future<Output = Result<F::Output, Expired>> {
    // Pinned by the caller: an argument of an async function is stored twice, and this one is large.
    poll_fn(move |cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Ok(output)),
        Poll::Pending => match &mut clock {
            Some(clock) => clock.poll_expired(cx).map(Err),
            None => Poll::Pending,
        },
    })
}

/// Holds the body back until the endpoint has said `100 Continue`; reading it is what tells the client to go on.
fn wait_for_continue(mut request: Request<Body>) -> Request<Body> {
    let told = Arc::new(Notify::new());
    request.extensions_mut().insert(Continue(Arc::clone(&told)));
    request.map(|body| {
        body.held(async move {
            // An endpoint that says nothing has the body anyway, as with every other client.
            let _said_nothing = timeout(CONTINUE, told.notified()).await;
        })
    })
}
