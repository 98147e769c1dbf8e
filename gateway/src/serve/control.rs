//! `POST events`: which event it is; joining and metrics.

use std::sync::Arc;

use bytes::BytesMut;
use http::{Request, Response, StatusCode, header, request::Parts};
use hyper::body::Incoming;
use lifl_api::{
    event::{AvailableData, MetricsData, attributes, client_source, types},
    http::{Joined, schema},
    node::FromGateway,
};
use lifl_events::{Control, Head, MAX_STRUCTURED, Mode, mode};

use super::{Body, auth, json, refuse, respond, update, upload::Upload};
use crate::{
    chain::{Chain, check_name},
    problem::{Code, Refusal},
    state::Gateway,
    token::Bearer,
};

/// Takes an event of any mode and type.
pub(crate) async fn post(gateway: &Arc<Gateway>, chain: &Arc<Chain>, request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let result = match mode(&parts.headers) {
        Mode::Batch => {
            let _read_on = Upload::new(&parts.headers, body, false, &gateway.config);
            Err(Code::MediaType.with("batches are not taken: send one event per request"))
        }
        Mode::Structured => control(gateway, chain, &parts, None, body).await,
        Mode::Binary => binary(gateway, chain, &parts, body).await,
    };
    result.unwrap_or_else(|refusal| refuse(&refusal))
}

async fn binary(
    gateway: &Arc<Gateway>,
    chain: &Arc<Chain>,
    parts: &Parts,
    body: Incoming,
) -> Result<Response<Body>, Refusal> {
    let head = match Head::binary(&parts.headers).and_then(|head| Ok((head, head.kind()?))) {
        Ok((head, kind)) if kind == types::UPDATE => head,
        Ok((head, _)) => return control(gateway, chain, parts, Some(head), body).await,
        Err(error) => {
            let _read_on = Upload::new(&parts.headers, body, false, &gateway.config);
            return Err(error.into());
        }
    };
    let result = update::take(gateway, chain, &parts.headers, head, body).await;
    let outcome = match &result {
        Ok(taken) if taken.duplicate => "duplicate",
        Ok(_) => "accepted",
        Err(refusal) => refusal.code.word(),
    };
    gateway.metrics.update(&chain.namespace, &chain.job, outcome);
    match &result {
        Ok(receipt) => tracing::debug!(chain = chain.id, source = receipt.source, id = receipt.id, outcome, "update"),
        Err(refusal) => tracing::debug!(chain = chain.id, detail = refusal.detail, outcome, "update"),
    }
    result.map(|receipt| json(StatusCode::ACCEPTED, &receipt))
}

async fn control(
    gateway: &Arc<Gateway>,
    chain: &Arc<Chain>,
    parts: &Parts,
    head: Option<Head<'_>>,
    body: Incoming,
) -> Result<Response<Body>, Refusal> {
    let mut upload = Upload::new(&parts.headers, body, false, &gateway.config);
    let too_large = || Code::TooLarge.with(format!("a control event of more than {MAX_STRUCTURED} bytes"));
    if content_length(parts)?.is_some_and(|length| length > MAX_STRUCTURED as u64) {
        return Err(too_large());
    }
    let mut bytes = BytesMut::new();
    while let Some(frame) = upload.frame().await? {
        if bytes.len() + frame.len() > MAX_STRUCTURED {
            return Err(too_large());
        }
        bytes.extend_from_slice(&frame);
    }
    let event = match head {
        Some(head) => Control::from_binary(&head, &bytes)?,
        None => Control::from_structured(&parts.headers, &bytes)?,
    };
    match event.kind() {
        types::AVAILABLE => available(gateway, chain, parts, &event),
        types::METRICS => metrics(gateway, chain, parts, &event),
        types::UPDATE => {
            Err(Code::MediaType.with("updates come in binary mode: attributes as headers, tensors as body"))
        }
        other => {
            let detail = format!("attribute 'type' is '{other}', which this gateway does not take");
            Err(Code::BadAttribute.with(detail))
        }
    }
}

/// The length that a request claims.
pub(crate) fn content_length(parts: &Parts) -> Result<Option<u64>, Refusal> {
    length_of(&parts.headers)
}

pub(crate) fn length_of(headers: &http::HeaderMap) -> Result<Option<u64>, Refusal> {
    let Some(value) = headers.get(header::CONTENT_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    length.map(Some).ok_or_else(|| Code::BadRequest.with("Content-Length is not a number"))
}

/// The client that sends a control event: its source says it, and everything else must agree.
fn sender(chain: &Chain, event: &Control) -> Result<String, Refusal> {
    let prefix = client_source(&chain.namespace, &chain.job, "");
    let client = event.source().strip_prefix(&prefix).ok_or_else(|| {
        Code::BadAttribute
            .with(format!("attribute 'source' is '{}', a client of this job is '{prefix}NAME'", event.source()))
    })?;
    check_name(client)?;
    for (name, wanted) in [(attributes::CLIENT, client), (attributes::JOB, &chain.job)] {
        if let Some(said) = event.extension(name).filter(|said| said != wanted) {
            return Err(Code::BadAttribute.with(format!("attribute '{name}' is '{said}', the source says '{wanted}'")));
        }
    }
    Ok(client.to_owned())
}

fn data<T: serde::de::DeserializeOwned>(event: &Control) -> Result<Option<T>, Refusal> {
    let Some(value) = event.json()? else { return Ok(None) };
    let read = serde_json::from_value(value);
    read.map(Some).map_err(|error| Code::BadRequest.with(format!("data of {}: {error}", event.kind())))
}

fn available(gateway: &Gateway, chain: &Chain, parts: &Parts, event: &Control) -> Result<Response<Body>, Refusal> {
    let client = sender(chain, event)?;
    let role = data::<AvailableData>(event)?.unwrap_or_default().role;
    if gateway.is_draining() {
        return Err(Code::Draining.with("the gateway ends: join its successor"));
    }
    let (key, secret) = {
        let inner = chain.lock();
        (inner.key.clone(), inner.meta.join_secret.clone())
    };
    if let Some(secret) = secret {
        match auth::token(&parts.headers) {
            None => return Err(Code::NoToken.with("this job asks for its join secret as bearer token")),
            Some(presented) if !key.same_secret(presented, &secret) => {
                return Err(Code::ForeignToken.with("this is not the job's join secret"));
            }
            Some(_) => {}
        }
    }
    auth::heard(gateway, chain, &client, role)?;
    let token = key.token(&Bearer { client, role });
    let joined = Joined { schema: schema("joined"), token, heartbeat: gateway.config.heartbeat() };
    Ok(json(StatusCode::OK, &joined))
}

fn metrics(gateway: &Gateway, chain: &Chain, parts: &Parts, event: &Control) -> Result<Response<Body>, Refusal> {
    let client = sender(chain, event)?;
    let bearer = auth::client(gateway, chain, &parts.headers, &client)?;
    let data = data::<MetricsData>(event)?.ok_or_else(|| Code::BadRequest.with("an event of metrics without data"))?;
    let evaluator = bearer.role == lifl_api::event::ClientRole::Evaluator;
    gateway.tell(FromGateway::Metrics { chain: chain.id, client, evaluator, data });
    let mut response = respond(StatusCode::ACCEPTED, "application/json", bytes::Bytes::new());
    response.headers_mut().remove(header::CONTENT_TYPE);
    Ok(response)
}
