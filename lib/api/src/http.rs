//! The JSON documents of the gateway (`surface.md` 1).

use serde::{Deserialize, Serialize};

/// Answer to joining.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// `lifl.dev/joined/v1`.
    pub schema: String,
    /// Bearer token of this client for this job.
    pub token: String,
    /// How often to be heard of, at least: `20s`.
    pub heartbeat: String,
}

/// What a client is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// Nothing: poll again.
    Wait,
    /// Train on `model` and submit for `round`.
    Train,
    /// The job succeeded.
    Done,
    /// The job failed: see `reason`.
    Failed,
}

/// Answer to a poll for work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// `lifl.dev/task/v1`.
    pub schema: String,
    /// What to do.
    pub state: TaskState,
    /// The round to train for, or the last committed one.
    pub round: u32,
    /// When the round closes, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub deadline: Option<String>,
    /// The global model as of now.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub model: Option<ModelLink>,
    /// Why waiting or failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
}

/// Where a model is had, and how to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelLink {
    /// Round that made it; 0 is the initial model.
    pub round: u32,
    /// Path on the gateway.
    pub url: String,
    /// Lower-case hex.
    pub sha256: String,
}

/// Answer to an accepted update.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// `lifl.dev/receipt/v1`.
    pub schema: String,
    /// The event's `source`.
    pub source: String,
    /// The event's `id`.
    pub id: String,
    /// Round that will contain it.
    pub round: u32,
    /// Of the body: `sha256-<hex>` where the client sent `fldigest`, else `crc32c-<hex>` (a SHA-256 costs six times the addition).
    pub digest: String,
    /// This (source, id) was accepted before.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub duplicate: bool,
}

/// RFC 9457 problem document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// `lifl.dev/problem/v1`; proxies in between write problems without it.
    #[serde(default)]
    pub schema: String,
    /// `about:blank` always: [`Problem::code`] is what programs read.
    #[serde(rename = "type")]
    pub kind: String,
    /// Title of the status.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// One line for people: names the value and the likely cause.
    pub detail: String,
    /// Stable word for programs.
    pub code: String,
}

/// Name of a JSON document: `lifl.dev/NAME/v1`.
#[must_use]
pub fn schema(name: &str) -> String {
    format!("lifl.dev/{name}/v1")
}
