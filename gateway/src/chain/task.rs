//! What a client is to do: pure.

use lifl_api::http::{ModelLink, Task, TaskState, schema};

use super::{Inner, ModelMeta};

/// All that the answer to a poll depends on.
#[derive(Debug)]
pub(crate) struct Standing<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) job: &'a str,
    pub(crate) finish: Option<&'a (bool, String)>,
    /// The open round and its deadline, if the client shall train for it.
    pub(crate) train: Option<(u32, i64)>,
    /// Why it shall not.
    pub(crate) reason: &'static str,
    pub(crate) model: Option<&'a ModelMeta>,
    pub(crate) committed: u32,
}

// === impl Standing ===

impl Standing<'_> {
    /// The answer.
    pub(crate) fn task(&self) -> Task {
        let model = self.model.map(|model| ModelLink {
            round: model.round,
            url: format!("/v1/namespaces/{}/jobs/{}/model?round={}", self.namespace, self.job, model.round),
            sha256: model.sha256.clone(),
        });
        let (state, round, reason) = match (self.finish, self.train) {
            (Some((true, why)), _) => (TaskState::Done, self.committed, Some(why.clone())),
            (Some((false, why)), _) => (TaskState::Failed, self.committed, Some(why.clone())),
            (None, Some((round, _))) => (TaskState::Train, round, None),
            (None, None) => (TaskState::Wait, self.committed, Some(self.reason.to_owned())),
        };
        let deadline = self.train.filter(|_| state == TaskState::Train).and_then(|(_, ms)| rfc3339(ms));
        Task { schema: schema("task"), state, round, deadline, model, reason }
    }
}

fn rfc3339(ms: i64) -> Option<String> {
    jiff::Timestamp::from_millisecond(ms).ok().map(|time| time.to_string())
}

// === impl Inner ===

impl Inner {
    /// Where `client` stands.
    pub(crate) fn standing(&self, client: &str) -> Standing<'_> {
        let round = self.ledger.round();
        // A model that is known but not mapped yet comes back in a moment: nobody shall train without it.
        let waits = self.meta.model.is_some() && self.served.is_none();
        let open = self.meta.open.as_ref().filter(|open| round.open && open.round == round.round && !waits);
        let selected = open.filter(|open| open.selected.contains(client));
        let reason = match (open, selected) {
            (None, _) => "no round is open",
            (Some(_), None) => "not selected for the round under way",
            (Some(_), Some(_)) => "the update of this round is accepted",
        };
        let train = selected.filter(|_| !self.reported.contains(client)).map(|open| (open.round, open.deadline_ms));
        Standing {
            namespace: self.meta.job.namespace(),
            job: self.meta.job.name(),
            finish: self.meta.finish.as_ref(),
            train,
            reason,
            model: self.served.as_ref().map(|served| &served.meta),
            committed: self.meta.model.as_ref().map_or(0, |model| model.round),
        }
    }
}
