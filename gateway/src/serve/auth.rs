//! Who calls.

use http::{HeaderMap, header};
use lifl_api::event::ClientRole;
use tokio::time::Instant;

use crate::{
    chain::Chain,
    clients::Heard,
    problem::{Code, Refusal},
    state::Gateway,
    token::Bearer,
    watch::coordinator::joined,
};

/// The bearer token of a request.
pub(crate) fn token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Who the token of a request was made for, by this job.
pub(crate) fn bearer(chain: &Chain, headers: &HeaderMap) -> Result<Bearer, Refusal> {
    let token = token(headers).ok_or_else(|| {
        Code::NoToken.with("no bearer token: join with client.available.v1, its answer carries the token")
    })?;
    let key = chain.lock().key.clone();
    key.bearer(token).ok_or_else(|| Code::ForeignToken.with("the bearer token is not one of this job"))
}

/// As [`bearer`], and it is `client`. Being heard of is noted, and a client that is new here is told to the coordinator.
pub(crate) fn client(gateway: &Gateway, chain: &Chain, headers: &HeaderMap, client: &str) -> Result<Bearer, Refusal> {
    let bearer = bearer(chain, headers)?;
    if bearer.client != client {
        return Err(Code::ForeignToken.with(format!("the bearer token is that of another client than '{client}'")));
    }
    heard(gateway, chain, &bearer.client, bearer.role)?;
    Ok(bearer)
}

/// Notes that a client is here.
pub(crate) fn heard(gateway: &Gateway, chain: &Chain, client: &str, role: ClientRole) -> Result<(), Refusal> {
    let config = &gateway.config;
    let heard = chain.lock().clients.heard(client, role, Instant::now(), config.max_clients, config.silence());
    match heard {
        Heard::Known => Ok(()),
        Heard::New => {
            gateway.tell(joined(chain.id, client, role));
            Ok(())
        }
        Heard::TooMany => Err(Code::TooManyClients.with(format!("{} clients are here already", config.max_clients))),
    }
}

/// Reading a job with a secret takes a token; others are open to all who reach the gateway.
pub(crate) fn may_read(gateway: &Gateway, chain: &Chain, headers: &HeaderMap) -> Result<(), Refusal> {
    let closed = chain.lock().meta.join_secret.is_some();
    if token(headers).is_none() && !closed {
        return Ok(());
    }
    match bearer(chain, headers) {
        Ok(bearer) => heard(gateway, chain, &bearer.client, bearer.role),
        Err(_) if !closed => Ok(()),
        Err(refusal) => Err(refusal),
    }
}
