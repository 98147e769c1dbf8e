//! `POST events`: which event it is; joining and metrics.

use std::sync::Arc;

use bytes::BytesMut;
use http::{Request, Response, StatusCode, header, request::Parts};
use hyper::body::Incoming;
use lifl_api::{
    event::{AvailableData, MAX_METRIC_NAME, MAX_METRICS, MetricsData, attributes, client_source, types},
    http::{Joined, schema},
    node::FromGateway,
};
use lifl_events::{Control, Head, MAX_STRUCTURED, Mode, mode};

use super::{Body, auth, json, refuse, respond, update, upload::Upload};
use crate::{
    budget::Share,
    chain::{Chain, check_name},
    problem::{Code, Refusal},
    state::Gateway,
    token::Bearer,
};

/// Longest control event of a sender who has not shown that it belongs here: enough to join.
const MAX_STRANGE: usize = 64 << 10;

/// Who sends a control event, as far as its head tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Who holds a token of the job or its join secret.
    Member,
    /// Anybody: a job without a secret is joined by whoever reaches it.
    Stranger,
}

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
    let standing = match &head {
        Some(head) => of_binary(gateway, chain, parts, head)?,
        None => of_structured(chain, parts)?,
    };
    let (limit, budget) = match standing {
        Standing::Member => (MAX_STRUCTURED, &gateway.members),
        Standing::Stranger => (MAX_STRANGE, &gateway.strangers),
    };
    let mut share = budget.share();
    let bytes = whole(parts, &mut upload, limit, &mut share).await?;
    let event = match head {
        Some(head) => Control::from_binary(&head, &bytes)?,
        None => Control::from_structured(&parts.headers, &bytes)?,
    };
    drop(bytes);
    match event.kind() {
        types::AVAILABLE => available(gateway, chain, parts, &event),
        types::METRICS => metrics(gateway, chain, parts, &event),
        other => Err(not_taken(other)),
    }
}

/// In binary mode the head says all but the data: who may not send the event is told before its body is read.
fn of_binary(gateway: &Gateway, chain: &Chain, parts: &Parts, head: &Head<'_>) -> Result<Standing, Refusal> {
    let event = Control::from_binary(head, &[])?;
    match event.kind() {
        types::AVAILABLE => {
            sender(chain, &event)?;
            Ok(if may_join(chain, parts)? { Standing::Member } else { Standing::Stranger })
        }
        types::METRICS => {
            auth::client(gateway, chain, &parts.headers, &sender(chain, &event)?)?;
            Ok(Standing::Member)
        }
        other => Err(not_taken(other)),
    }
}

/// In structured mode the head has the credentials only. A job with a secret knows all whom it may concern by them.
fn of_structured(chain: &Chain, parts: &Parts) -> Result<Standing, Refusal> {
    if auth::bearer(chain, &parts.headers).is_ok() {
        return Ok(Standing::Member);
    }
    Ok(if may_join(chain, parts)? { Standing::Member } else { Standing::Stranger })
}

/// Whether the join secret is presented; false for a job that asks for none.
fn may_join(chain: &Chain, parts: &Parts) -> Result<bool, Refusal> {
    let (key, secret) = {
        let inner = chain.lock();
        (inner.key.clone(), inner.meta.join_secret.clone())
    };
    let Some(secret) = secret else { return Ok(false) };
    match auth::token(&parts.headers) {
        None => Err(Code::NoToken.with("this job asks for its join secret as bearer token")),
        Some(presented) if !key.same_secret(presented, &secret) => {
            Err(Code::ForeignToken.with("this is not the job's join secret"))
        }
        Some(_) => Ok(true),
    }
}

fn not_taken(kind: &str) -> Refusal {
    if kind == types::UPDATE {
        return Code::MediaType.with("updates come in binary mode: attributes as headers, tensors as body");
    }
    Code::BadAttribute.with(format!("attribute 'type' is '{kind}', which this gateway does not take"))
}

/// A body that is held in memory: no more than `limit` of it, and no more than all of them may have together.
async fn whole(parts: &Parts, upload: &mut Upload, limit: usize, share: &mut Share<'_>) -> Result<BytesMut, Refusal> {
    let too_large = || Code::TooLarge.with(format!("a control event of more than {limit} bytes"));
    if length_of(&parts.headers)?.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let mut bytes = BytesMut::new();
    while let Some(frame) = upload.frame().await? {
        if bytes.len() + frame.len() > limit {
            return Err(too_large());
        }
        if !share.take(frame.len()) {
            return Err(Code::Busy.with("too many control events are being received"));
        }
        bytes.extend_from_slice(&frame);
    }
    Ok(bytes)
}

/// The length that a request claims.
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
    may_join(chain, parts)?;
    auth::heard(gateway, chain, &client, role)?;
    let key = chain.lock().key.clone();
    let token = key.token(&Bearer { client, role });
    let joined = Joined { schema: schema("joined"), token, heartbeat: gateway.config.heartbeat() };
    Ok(json(StatusCode::OK, &joined))
}

fn metrics(gateway: &Gateway, chain: &Chain, parts: &Parts, event: &Control) -> Result<Response<Body>, Refusal> {
    let client = sender(chain, event)?;
    let bearer = auth::client(gateway, chain, &parts.headers, &client)?;
    let data = data::<MetricsData>(event)?.ok_or_else(|| Code::BadRequest.with("an event of metrics without data"))?;
    check_metrics(&data)?;
    let evaluator = bearer.role == lifl_api::event::ClientRole::Evaluator;
    gateway.tell(FromGateway::Metrics { chain: chain.id, client, evaluator, data });
    let mut response = respond(StatusCode::ACCEPTED, "application/json", bytes::Bytes::new());
    response.headers_mut().remove(header::CONTENT_TYPE);
    Ok(response)
}

/// Names and number of figures are kept for as long as their round's model is the newest: neither is the client's to choose.
fn check_metrics(data: &MetricsData) -> Result<(), Refusal> {
    let figures = data.metrics.len();
    if figures > MAX_METRICS {
        return Err(Code::BadMetrics.with(format!("{figures} metrics in an event, at most {MAX_METRICS} are taken")));
    }
    for (name, value) in &data.metrics {
        if name.len() > MAX_METRIC_NAME {
            let shown: String = name.chars().take(MAX_METRIC_NAME).collect();
            let detail = format!("the name of metric '{shown}...' is longer than {MAX_METRIC_NAME} bytes");
            return Err(Code::BadMetrics.with(detail));
        }
        if !value.is_finite() {
            return Err(Code::BadMetrics.with(format!("metric '{name}' is {value}")));
        }
    }
    Ok(())
}
