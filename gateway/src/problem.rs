//! The one table of refusals: code, status, and whether to come again.
//!
//! Senders of CloudEvents retry 404, 408, 409, 429 and 5xx: what is hopeless must not get one of these.

use http::StatusCode;
use lifl_api::http::{Problem, schema};

/// Why a request is refused; its name in snake case is the stable `code`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Code {
    BadRequest,
    BadAttribute,
    BadLength,
    NoToken,
    ForeignToken,
    ForeignSource,
    NotSelected,
    UnknownJob,
    UnknownModel,
    NotFound,
    MethodNotAllowed,
    TooSlow,
    InProgress,
    OtherContent,
    RoundClosed,
    RoundNotBegun,
    TooLarge,
    MediaType,
    Encoding,
    BadTensors,
    WrongKind,
    NotFinite,
    BadWeight,
    BadDigest,
    BadMetrics,
    OnePerRound,
    ClientBusy,
    OutOfMemory,
    TooManyClients,
    Draining,
    NoAggregator,
    JournalFailed,
    Starting,
    ModelAdopted,
    Busy,
}

/// A refusal: code and one line for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: Code,
    pub(crate) detail: String,
}

// === impl Code ===

impl Code {
    /// Word, status, and seconds after which to come again.
    pub(crate) const fn row(self) -> (&'static str, StatusCode, Option<u32>) {
        match self {
            Self::BadRequest => ("bad_request", StatusCode::BAD_REQUEST, None),
            Self::BadAttribute => ("bad_attribute", StatusCode::BAD_REQUEST, None),
            Self::BadLength => ("bad_length", StatusCode::BAD_REQUEST, None),
            Self::NoToken => ("no_token", StatusCode::UNAUTHORIZED, None),
            Self::ForeignToken => ("foreign_token", StatusCode::FORBIDDEN, None),
            Self::ForeignSource => ("foreign_source", StatusCode::FORBIDDEN, None),
            Self::NotSelected => ("not_selected", StatusCode::FORBIDDEN, None),
            Self::UnknownJob => ("unknown_job", StatusCode::NOT_FOUND, None),
            Self::UnknownModel => ("unknown_model", StatusCode::NOT_FOUND, None),
            Self::NotFound => ("not_found", StatusCode::NOT_FOUND, None),
            Self::MethodNotAllowed => ("method_not_allowed", StatusCode::METHOD_NOT_ALLOWED, None),
            Self::TooSlow => ("too_slow", StatusCode::REQUEST_TIMEOUT, None),
            Self::InProgress => ("in_progress", StatusCode::CONFLICT, None),
            Self::OtherContent => ("other_content", StatusCode::CONFLICT, None),
            Self::RoundClosed => ("round_closed", StatusCode::GONE, None),
            Self::RoundNotBegun => ("round_not_begun", StatusCode::GONE, None),
            Self::TooLarge => ("too_large", StatusCode::PAYLOAD_TOO_LARGE, None),
            Self::MediaType => ("media_type", StatusCode::UNSUPPORTED_MEDIA_TYPE, None),
            Self::Encoding => ("encoding", StatusCode::UNSUPPORTED_MEDIA_TYPE, None),
            Self::BadTensors => ("bad_tensors", StatusCode::UNPROCESSABLE_ENTITY, None),
            Self::WrongKind => ("wrong_kind", StatusCode::UNPROCESSABLE_ENTITY, None),
            Self::NotFinite => ("not_finite", StatusCode::UNPROCESSABLE_ENTITY, None),
            Self::BadWeight => ("bad_weight", StatusCode::UNPROCESSABLE_ENTITY, None),
            Self::BadDigest => ("bad_digest", StatusCode::UNPROCESSABLE_ENTITY, None),
            Self::BadMetrics => ("bad_metrics", StatusCode::UNPROCESSABLE_ENTITY, None),
            Self::OnePerRound => ("one_per_round", StatusCode::UNPROCESSABLE_ENTITY, None),
            Self::ClientBusy => ("client_busy", StatusCode::TOO_MANY_REQUESTS, Some(1)),
            Self::OutOfMemory => ("out_of_memory", StatusCode::TOO_MANY_REQUESTS, Some(1)),
            Self::TooManyClients => ("too_many_clients", StatusCode::TOO_MANY_REQUESTS, Some(60)),
            Self::Draining => ("draining", StatusCode::SERVICE_UNAVAILABLE, Some(5)),
            Self::NoAggregator => ("no_aggregator", StatusCode::SERVICE_UNAVAILABLE, Some(1)),
            Self::JournalFailed => ("journal_failed", StatusCode::SERVICE_UNAVAILABLE, Some(10)),
            Self::Starting => ("starting", StatusCode::SERVICE_UNAVAILABLE, Some(1)),
            Self::ModelAdopted => ("model_adopted", StatusCode::SERVICE_UNAVAILABLE, Some(1)),
            Self::Busy => ("busy", StatusCode::SERVICE_UNAVAILABLE, Some(1)),
        }
    }

    /// The stable word.
    pub(crate) const fn word(self) -> &'static str {
        self.row().0
    }

    /// A refusal of this code.
    pub(crate) fn with(self, detail: impl Into<String>) -> Refusal {
        Refusal { code: self, detail: detail.into() }
    }
}

// === impl Refusal ===

impl Refusal {
    /// The document that tells it.
    pub(crate) fn problem(&self) -> Problem {
        let (code, status, _) = self.code.row();
        Problem {
            schema: schema("problem"),
            kind: "about:blank".to_owned(),
            title: status.canonical_reason().unwrap_or_default().to_owned(),
            status: status.as_u16(),
            detail: self.detail.clone(),
            code: code.to_owned(),
        }
    }
}
