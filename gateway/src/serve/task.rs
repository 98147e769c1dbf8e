//! Long polls for work.

use std::{sync::Arc, time::Duration};

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use lifl_api::{event::ClientRole, http::TaskState, quantity::Span};
use tokio::time::{Instant, timeout_at};

use super::{Body, auth, json};
use crate::{
    chain::Chain,
    problem::{Code, Refusal},
    state::Gateway,
};

/// A poll under way: its client is alive.
struct Polling<'a> {
    chain: &'a Chain,
    client: &'a str,
}

// === impl Polling ===

impl<'a> Polling<'a> {
    fn new(chain: &'a Chain, client: &'a str) -> Self {
        chain.lock().clients.poll(client, true, Instant::now());
        Self { chain, client }
    }
}

impl Drop for Polling<'_> {
    fn drop(&mut self) {
        self.chain.lock().clients.poll(self.client, false, Instant::now());
    }
}

/// `GET task`: answers at once when there is something to do, else waits for it.
pub(crate) async fn get(
    gateway: &Arc<Gateway>,
    chain: &Arc<Chain>,
    request: &Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    let Query { client, wait, model } = query(request.uri().query().unwrap_or_default())?;
    let bearer = auth::client(gateway, chain, request.headers(), &client)?;
    let _alive = Polling::new(chain, &client);
    let deadline = Instant::now() + wait.min(Duration::from_millis(gateway.config.poll_max_ms));
    let (mut changed, mut draining) = (chain.changed.subscribe(), gateway.draining.subscribe());
    let known = model.or_else(|| model_round(chain));
    loop {
        changed.borrow_and_update();
        let task = chain.lock().standing(&client).task();
        // An evaluator waits for models, not for rounds; and so does whoever says which model it knows.
        let news = (bearer.role == ClientRole::Evaluator || model.is_some()) && model_round(chain) != known;
        if task.state != TaskState::Wait || news || *draining.borrow_and_update() {
            return Ok(json(StatusCode::OK, &task));
        }
        let change = async {
            tokio::select! {
                changed = changed.changed() => drop(changed),
                drained = draining.changed() => drop(drained),
            }
        };
        if timeout_at(deadline, change).await.is_err() {
            return Ok(json(StatusCode::OK, &task));
        }
    }
}

fn model_round(chain: &Chain) -> Option<u32> {
    chain.lock().served.as_ref().map(|served| served.meta.round)
}

/// What a poll asks.
struct Query {
    client: String,
    wait: Duration,
    /// Round of the model that the client has: another one is news.
    model: Option<u32>,
}

fn query(text: &str) -> Result<Query, Refusal> {
    let (mut client, mut wait, mut model) = (None, Duration::ZERO, None);
    for (name, value) in url::form_urlencoded::parse(text.as_bytes()) {
        match name.as_ref() {
            "client" => client = Some(value.into_owned()),
            "wait" => {
                let span: Result<Span, _> = value.parse();
                wait = span.map_err(|error| Code::BadRequest.with(format!("wait: {error}")))?.0;
            }
            "model" => {
                let round = value
                    .parse()
                    .map_err(|_not_a_number| Code::BadRequest.with(format!("model: '{value}' is not a round")));
                model = Some(round?);
            }
            _ => {}
        }
    }
    let client = client.filter(|client| !client.is_empty());
    let client = client.ok_or_else(|| Code::BadRequest.with("the query names no client: task?client=NAME&wait=30s"))?;
    Ok(Query { client, wait, model })
}
