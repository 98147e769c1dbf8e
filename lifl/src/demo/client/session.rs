//! One client's conversation with the gateway: join, poll, fetch, submit, measure; each retried until it is answered.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use cloudevents::{Event, EventBuilder, EventBuilderV10};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri,
    header::{AUTHORIZATION, CONTENT_TYPE, InvalidHeaderValue},
};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use lifl_api::{
    event::{self, AvailableData, ClientRole, MetricsData},
    http::{Joined, ModelLink, Problem, Receipt, Task},
    quantity::Span,
};
use sha2::{Digest, Sha256};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

use super::{
    Progress,
    retry::{Verdict, judge, pause},
};

/// Answers other than models.
const DOCUMENT_LIMIT: usize = 1 << 20;
const MODEL_LIMIT: usize = 64 << 20;
/// What any request may take beyond the time that it asked the gateway to wait.
const SLACK: Duration = Duration::from_secs(15);

/// Where the job is: shared by all clients of a run, which also share its pool of connections.
#[derive(Debug)]
pub(crate) struct Gateway {
    http: Client<HttpConnector, Full<Bytes>>,
    /// Scheme and authority, no slash at the end.
    base: String,
    namespace: String,
    job: String,
    /// For how long a request is repeated before the gateway counts as gone.
    patience: Duration,
}

/// A client that has joined.
#[derive(Debug)]
pub(crate) struct Session {
    gateway: Arc<Gateway>,
    client: Arc<str>,
    role: ClientRole,
    token: HeaderValue,
    heartbeat: Duration,
    joins: u32,
    events: mpsc::Sender<Progress>,
    /// Requests that had to be repeated.
    pub(crate) retries: u64,
}

/// A round's update, as it is sent however often.
#[derive(Clone, Debug)]
pub(crate) struct Update {
    pub(crate) round: u32,
    pub(crate) samples: usize,
    pub(crate) tensors: Bytes,
}

/// How the gateway took an update.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Submission {
    Accepted { duplicate: bool },
    RoundOver,
    Refused { status: u16, detail: String },
}

/// What ends a client before its job ends.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Not an address of a gateway.
    #[error("'{0}' is no base of a gateway: write http://host:port")]
    Base(Uri),
    /// Nothing but failures for too long.
    #[error("{client}: the gateway has not done {what} for {patience:?}; last: {last}")]
    Unanswered {
        /// Which client.
        client: Arc<str>,
        /// Which request.
        what: &'static str,
        /// For how long it was repeated.
        patience: Duration,
        /// What came of it last.
        last: String,
    },
    /// An answer that repeating does not change.
    #[error("{client}: {what} was refused with {status}: {detail}")]
    Refused {
        /// Which client.
        client: Arc<str>,
        /// Which request.
        what: &'static str,
        /// HTTP status.
        status: StatusCode,
        /// The gateway's reason.
        detail: String,
    },
    /// An answer that is not the document it should be.
    #[error("{client}: the answer to {what} is not understood: {source}")]
    Document {
        /// Which client.
        client: Arc<str>,
        /// Which request.
        what: &'static str,
        /// Where it fails.
        source: serde_json::Error,
    },
    /// A name or token that HTTP cannot carry.
    #[error("a request cannot be written: {0}")]
    Request(#[from] http::Error),
    /// A control event that cannot be built.
    #[error("a control event cannot be built: {0}")]
    Event(#[from] cloudevents::event::EventBuilderError),
    /// A control event that is no JSON.
    #[error("a control event cannot be written: {0}")]
    Encoding(#[from] serde_json::Error),
    /// The model is not the one the demo knows.
    #[error("the model cannot be trained: {0}")]
    Model(#[from] crate::demo::train::ModelError),
    /// The images do not suffice.
    #[error(transparent)]
    Split(#[from] crate::demo::split::TooFewImages),
    /// A task of this process panicked.
    #[error("a client's task ended abnormally: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// One request, repeatable.
struct Call {
    what: &'static str,
    method: Method,
    uri: String,
    headers: HeaderMap,
    body: Bytes,
    limit: usize,
    patience: Duration,
    /// How long the gateway may think before the connection counts as broken.
    time: Duration,
    /// A model that is gone does not come back; a job may.
    missing_is_final: bool,
}

struct Answer {
    verdict: Verdict,
    status: StatusCode,
    body: Bytes,
}

// === impl Gateway ===

impl Gateway {
    pub(crate) fn new(base: &Uri, namespace: &str, job: &str, patience: Duration) -> Result<Self, ClientError> {
        let (Some("http"), Some(authority)) = (base.scheme_str(), base.authority()) else {
            return Err(ClientError::Base(base.clone()));
        };
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Ok(Self {
            http: Client::builder(TokioExecutor::new()).build(connector),
            base: format!("http://{authority}"),
            namespace: namespace.to_owned(),
            job: job.to_owned(),
            patience,
        })
    }

    pub(crate) fn job(&self) -> &str {
        &self.job
    }

    fn uri(&self, rest: &str) -> String {
        let Self { base, namespace, job, .. } = self;
        format!("{base}/v1/namespaces/{namespace}/jobs/{job}{rest}")
    }

    async fn once(&self, call: &Call, token: Option<&HeaderValue>, attempt: u32) -> Result<Answer, String> {
        let mut request = Request::new(Full::new(call.body.clone()));
        *request.method_mut() = call.method.clone();
        *request.uri_mut() = call.uri.parse().map_err(|error| format!("{}: {error}", call.uri))?;
        *request.headers_mut() = call.headers.clone();
        // A model may lie with another host: that one has no business with the token.
        if let Some(token) = token.filter(|_| call.uri.starts_with(&format!("{}/", self.base))) {
            request.headers_mut().insert(AUTHORIZATION, token.clone());
        }
        let exchange = async {
            let response = self.http.request(request).await.map_err(|error| causes(&error))?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, call.limit).collect().await;
            let body = body.map_err(|error| format!("{}, but its body broke off: {error}", head.status))?;
            let mut verdict = judge(head.status, &head.headers, attempt);
            if call.missing_is_final && head.status == StatusCode::NOT_FOUND {
                verdict = Verdict::Refused;
            }
            Ok(Answer { verdict, status: head.status, body: body.to_bytes() })
        };
        match timeout(call.time, exchange).await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(format!("no answer within {:?}", call.time)),
        }
    }
}

// === impl Session ===

impl Session {
    /// Joins the job: the answer, and only it, carries the token.
    pub(crate) async fn join(
        gateway: Arc<Gateway>,
        client: Arc<str>,
        role: ClientRole,
        events: mpsc::Sender<Progress>,
    ) -> Result<Self, ClientError> {
        let mut session = Self {
            gateway,
            client,
            role,
            token: HeaderValue::from_static(""),
            heartbeat: Duration::ZERO,
            joins: 0,
            events,
            retries: 0,
        };
        session.rejoin().await?;
        Ok(session)
    }

    async fn rejoin(&mut self) -> Result<(), ClientError> {
        const WHAT: &str = "joining";
        self.joins += 1;
        let id = format!("{}.available.{}.{}", self.gateway.job, self.client, self.joins);
        let data = serde_json::to_value(AvailableData { role: self.role })?;
        let event = self.event(&id, event::types::AVAILABLE, data)?;
        let call = self.control(WHAT, &event)?;
        let answer = self.repeat(&call, false).await?;
        if answer.verdict != Verdict::Done {
            return Err(self.refused(WHAT, &answer));
        }
        let joined: Joined = self.document(WHAT, &answer)?;
        let mut token = HeaderValue::from_str(&format!("Bearer {}", joined.token)).map_err(from_header)?;
        token.set_sensitive(true);
        self.token = token;
        let heartbeat = joined.heartbeat.parse::<Span>();
        self.heartbeat = heartbeat.map_or(Duration::from_secs(20), |span| span.0);
        Ok(())
    }

    /// Long poll: answered when there is something to say, or after `wait`.
    ///
    /// With `known` the answer also comes when another model is served than that round's.
    pub(crate) async fn task(&mut self, wait: Duration, known: Option<u32>) -> Result<Task, ClientError> {
        const WHAT: &str = "a poll for work";
        // An open poll is a sign of life, so it need only end as often as the heart beats.
        let wait = wait.min(self.heartbeat.max(Duration::from_secs(1)));
        let known = known.map(|round| format!("&model={round}")).unwrap_or_default();
        let rest = format!("/task?client={}&wait={}{known}", self.client, Span(wait));
        let mut call = self.call(WHAT, Method::GET, self.gateway.uri(&rest));
        call.time = wait + SLACK;
        let answer = self.authorised(&call).await?;
        if answer.verdict != Verdict::Done {
            return Err(self.refused(WHAT, &answer));
        }
        self.document(WHAT, &answer)
    }

    /// The model at `link`, or `None` if it is gone or another by now: the next task names the present one.
    pub(crate) async fn model(&mut self, link: &ModelLink) -> Result<Option<Bytes>, ClientError> {
        const WHAT: &str = "fetching the model";
        let uri =
            if link.url.starts_with('/') { format!("{}{}", self.gateway.base, link.url) } else { link.url.clone() };
        let mut call = self.call(WHAT, Method::GET, uri);
        call.limit = MODEL_LIMIT;
        call.missing_is_final = true;
        let answer = self.authorised(&call).await?;
        if matches!(answer.status, StatusCode::NOT_FOUND | StatusCode::GONE) {
            return Ok(None);
        }
        if answer.verdict != Verdict::Done {
            return Err(self.refused(WHAT, &answer));
        }
        let found = hex(&answer.body);
        if found == link.sha256 {
            return Ok(Some(answer.body));
        }
        self.tell_retry(WHAT, format!("its SHA-256 is {found}, announced was {}", link.sha256)).await;
        Ok(None)
    }

    /// Sends an update until it is accepted or hopeless; always under the same id, so that it counts once.
    pub(crate) async fn submit(&mut self, update: &Update) -> Result<Submission, ClientError> {
        const WHAT: &str = "an update";
        let mut call = self.call(WHAT, Method::POST, self.gateway.uri("/events"));
        call.headers = self.update_headers(update)?;
        call.body = update.tensors.clone();
        let answer = self.authorised(&call).await?;
        Ok(match answer.verdict {
            Verdict::Done => Submission::Accepted { duplicate: self.document::<Receipt>(WHAT, &answer)?.duplicate },
            Verdict::RoundOver => Submission::RoundOver,
            _ => Submission::Refused { status: answer.status.as_u16(), detail: answer.detail() },
        })
    }

    /// Tells what a model is worth; once only if the job has ended, as nobody need take it then.
    pub(crate) async fn measured(&mut self, data: &MetricsData, ended: bool) -> Result<(), ClientError> {
        const WHAT: &str = "a measurement";
        let id = format!("{}.{}.{}.metrics", self.gateway.job, data.round, self.client);
        let event = self.event(&id, event::types::METRICS, serde_json::to_value(data)?)?;
        let mut call = self.control(WHAT, &event)?;
        if ended {
            call.patience = Duration::ZERO;
        }
        let answer = self.authorised(&call).await?;
        match answer.verdict {
            Verdict::Done | Verdict::RoundOver => Ok(()),
            _ => Err(self.refused(WHAT, &answer)),
        }
    }

    /// Repeats `call` with this client's token; joins anew, once, if the gateway no longer knows it.
    async fn authorised(&mut self, call: &Call) -> Result<Answer, ClientError> {
        let answer = self.repeat(call, true).await?;
        if answer.verdict != Verdict::Rejoin {
            return Ok(answer);
        }
        self.rejoin().await?;
        let answer = self.repeat(call, true).await?;
        match answer.verdict {
            Verdict::Rejoin => Err(self.refused(call.what, &answer)),
            _ => Ok(answer),
        }
    }

    async fn repeat(&mut self, call: &Call, with_token: bool) -> Result<Answer, ClientError> {
        let mut failing = None;
        let mut attempt = 0;
        loop {
            let token = with_token.then_some(&self.token);
            let (wait, last) = match self.gateway.once(call, token, attempt).await {
                Ok(answer) => match answer.verdict {
                    Verdict::Again(wait) => (wait, format!("{}: {}", answer.status, answer.detail())),
                    _ => return Ok(answer),
                },
                Err(reason) => (pause(attempt), reason),
            };
            let failing = failing.get_or_insert_with(Instant::now);
            if failing.elapsed() + wait > call.patience {
                return Err(ClientError::Unanswered {
                    client: Arc::clone(&self.client),
                    what: call.what,
                    patience: call.patience,
                    last,
                });
            }
            attempt += 1;
            self.tell_retry(call.what, last).await;
            sleep(wait).await;
        }
    }

    async fn tell_retry(&mut self, what: &'static str, reason: String) {
        self.retries += 1;
        let client = Arc::clone(&self.client);
        super::tell(&self.events, Progress::Retried { client, what, reason }).await;
    }

    fn call(&self, what: &'static str, method: Method, uri: String) -> Call {
        Call {
            what,
            method,
            uri,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            limit: DOCUMENT_LIMIT,
            patience: self.gateway.patience,
            time: SLACK,
            missing_is_final: false,
        }
    }

    fn event(&self, id: &str, kind: &str, data: serde_json::Value) -> Result<Event, ClientError> {
        let event = EventBuilderV10::new()
            .id(id)
            .source(self.source())
            .ty(kind)
            .time(jiff::Timestamp::now().to_string())
            .data("application/json", data)
            .build()?;
        Ok(event)
    }

    /// A control event, in structured mode.
    fn control(&self, what: &'static str, event: &Event) -> Result<Call, ClientError> {
        let mut call = self.call(what, Method::POST, self.gateway.uri("/events"));
        let json = HeaderValue::from_static("application/cloudevents+json");
        call.headers.insert(CONTENT_TYPE, json);
        call.body = serde_json::to_vec(event)?.into();
        Ok(call)
    }

    /// The attributes of an update, in binary mode.
    fn update_headers(&self, update: &Update) -> Result<HeaderMap, ClientError> {
        let (job, client, round) = (self.gateway.job(), &self.client, update.round);
        let attributes = [
            ("specversion", "1.0".to_owned()),
            // The last part would count different updates for one round; there is never a second.
            ("id", format!("{job}.{round}.{client}.1")),
            ("source", self.source()),
            ("type", event::types::UPDATE.to_owned()),
            ("subject", format!("jobs/{job}/rounds/{round:06}")),
            ("time", jiff::Timestamp::now().to_string()),
            (event::attributes::JOB, job.to_owned()),
            (event::attributes::ROUND, round.to_string()),
            (event::attributes::CLIENT, client.to_string()),
            (event::attributes::SAMPLES, update.samples.to_string()),
            (event::attributes::KIND, "full".to_owned()),
            (event::attributes::DTYPE, "f32".to_owned()),
        ];
        let mut headers = HeaderMap::with_capacity(attributes.len() + 1);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(event::SAFETENSORS));
        for (name, value) in attributes {
            let name = HeaderName::try_from(format!("ce-{name}")).map_err(http::Error::from)?;
            let value = HeaderValue::try_from(value).map_err(from_header)?;
            headers.insert(name, value);
        }
        Ok(headers)
    }

    fn source(&self) -> String {
        event::client_source(&self.gateway.namespace, &self.gateway.job, &self.client)
    }

    fn document<T: serde::de::DeserializeOwned>(&self, what: &'static str, answer: &Answer) -> Result<T, ClientError> {
        serde_json::from_slice(&answer.body).map_err(|source| ClientError::Document {
            client: Arc::clone(&self.client),
            what,
            source,
        })
    }

    fn refused(&self, what: &'static str, answer: &Answer) -> ClientError {
        ClientError::Refused { client: Arc::clone(&self.client), what, status: answer.status, detail: answer.detail() }
    }
}

// === impl Answer ===

impl Answer {
    /// The reason in a problem document, or what there is of text.
    fn detail(&self) -> String {
        match serde_json::from_slice::<Problem>(&self.body) {
            Ok(problem) => format!("{} ({})", problem.detail, problem.code),
            Err(_no_problem) => String::from_utf8_lossy(&self.body).chars().take(200).collect(),
        }
    }
}

fn from_header(error: InvalidHeaderValue) -> ClientError {
    ClientError::Request(error.into())
}

/// An error with what is below it: hyper's own text is only "client error (Connect)".
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
