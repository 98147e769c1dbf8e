//! From the sealed model to the next round.

use lifl_api::node::ToGateway;

use super::{ATTEMPTS, Action, StoreFailure, fail, finish_rounds, gather, peers, restart_members, succeed, under_way};
use crate::{
    backoff::backoff,
    plan::Shape,
    state::{Done, Ending, JobState, Model, Phase, RoundSummary},
    status::kind,
};

/// The gateway says (again) that a round's model is sealed.
pub(super) fn round_done(job: &mut JobState, done: Done, out: &mut Vec<Action>) {
    if done.round <= job.committed {
        // It did not hear of the commit: told again, for the last one only; earlier ones are contained in it.
        if let (Some(chain), Some(model)) = (job.chain, job.model.as_ref().filter(|m| m.round == done.round)) {
            out.push(Action::Gateway(ToGateway::Commit { chain, round: done.round, sha256: model.sha256.clone() }));
        }
        return;
    }
    if job.phase == Phase::Committing {
        return;
    }
    if let Some(round) = peers::of(job, done.round) {
        (round.admitted, round.closed) = (done.count, Some(done.count));
        round.done = Some(done);
    }
}

/// Has the round stored.
pub(super) fn begin(job: &mut JobState, out: &mut Vec<Action>) -> bool {
    job.phase = Phase::Committing;
    store(job, out);
    true
}

fn store(job: &mut JobState, out: &mut Vec<Action>) {
    if let Some(round) = &mut job.round
        && let Some(done) = round.done.clone()
    {
        round.retry_at = None;
        out.push(Action::Store { done, opened_at: round.opened_at });
    }
}

/// Has the end by the stop condition stored: it is told when a later life of the coordinator will know it too.
pub(super) fn end(job: &mut JobState, message: String, out: &mut Vec<Action>) {
    job.phase = Phase::Committing;
    out.push(Action::StoreEnd { reason: message.clone() });
    job.ending = Some(Ending { message, failures: 0, retry_at: None });
}

/// ## Committing => Succeeded
pub(super) fn end_stored(job: &mut JobState, result: Result<(), StoreFailure>, now: i64, out: &mut Vec<Action>) {
    let (Phase::Committing, Some(mut ending)) = (job.phase, job.ending.take()) else {
        return;
    };
    match result {
        Ok(()) => {
            succeed(job, "StopConditionMet", ending.message, now, out);
        }
        Err(StoreFailure::Storage(error) | StoreFailure::Rejected(error)) => {
            let wait = backoff(ending.failures);
            ending.failures += 1;
            ending.retry_at = Some(now + wait);
            let message = format!(
                "{}; that the job has ended cannot be stored, next attempt in {wait} ms: {error}",
                ending.message
            );
            job.condition(kind::PROGRESSING, false, "CheckpointFailed", message, now);
            job.ending = Some(ending);
        }
    }
}

/// ## Committing => Committing, again after a failure
pub(super) fn committing(job: &mut JobState, now: i64, out: &mut Vec<Action>) -> bool {
    if let Some(ending) = &mut job.ending
        && ending.retry_at.take_if(|at| now >= *at).is_some()
    {
        out.push(Action::StoreEnd { reason: ending.message.clone() });
    }
    if job.round.as_ref().and_then(|round| round.retry_at).is_some_and(|at| now >= at) {
        store(job, out);
    }
    false
}

/// ## Committing => Gathering | Closing | Committing (the end) | Succeeded | Failed
pub(super) fn stored(
    job: &mut JobState,
    number: u32,
    result: Result<Model, StoreFailure>,
    now: i64,
    out: &mut Vec<Action>,
) {
    let (Phase::Committing, Some(round)) = (job.phase, &mut job.round) else {
        return;
    };
    if round.number != number {
        return;
    }
    match result {
        Ok(model) => committed(job, model, now, out),
        Err(StoreFailure::Storage(error)) => {
            let wait = backoff(round.failures);
            round.failures += 1;
            round.retry_at = Some(now + wait);
            let message = format!("round {number} cannot be stored, next attempt in {wait} ms: {error}");
            job.condition(kind::PROGRESSING, false, "CheckpointFailed", message, now);
        }
        Err(StoreFailure::Rejected(why)) => {
            round.rejections += 1;
            round.done = None;
            let message =
                format!("round {number}: the model is refused (attempt {} of {ATTEMPTS}): {why}", round.rejections);
            if round.rejections >= ATTEMPTS {
                fail(job, "ModelRejected", message, now, out);
                return;
            }
            // No Close: it would be answered by the same model. The gateway replays to the new top by itself.
            under_way::closing_now(job, now, out);
            job.condition(kind::PROGRESSING, false, "ModelRejected", message, now);
            restart_members(job, now, out);
        }
    }
}

fn committed(job: &mut JobState, model: Model, now: i64, out: &mut Vec<Action>) {
    let Some((done, opened_at)) = job.round.take().and_then(|r| Some((r.done?, r.opened_at))) else {
        return;
    };
    #[expect(clippy::cast_precision_loss, reason = "milliseconds of a round")]
    let seconds = (now - opened_at).max(0) as f64 / 1000.0;
    job.committed = done.round;
    job.document.status.get_or_insert_default().round = done.round;
    job.remember(RoundSummary {
        round: done.round,
        count: done.count,
        weight: done.weight,
        seconds,
        sha256: model.sha256.clone(),
    });
    if let Some(chain) = job.chain {
        let sha256 = model.sha256.clone();
        out.push(Action::Gateway(ToGateway::Commit { chain, round: done.round, sha256 }));
    }
    job.model = Some(model);
    job.show_model();
    if job.document.status.iter().flat_map(|s| &s.conditions).any(|c| c.kind == kind::CHECKPOINT) {
        job.condition(kind::CHECKPOINT, true, "RoundStored", format!("round {} is stored", done.round), now);
    }
    out.push(Action::Committed { round: done.round, updates: done.count, seconds });
    if job.committed >= job.document.spec.rounds {
        finish_rounds(job, now, out);
    } else if let Some(message) = job.finishing.clone() {
        end(job, message, out);
    } else {
        gather(job, now);
    }
}

/// The first client's tensors are the model of round 0, and the plan follows.
pub(super) fn first_stored(
    job: &mut JobState,
    result: Result<(Model, Shape), StoreFailure>,
    now: i64,
    out: &mut Vec<Action>,
) {
    job.adopting = false;
    if job.model.is_some() || matches!(job.phase, Phase::Succeeded | Phase::Failed) {
        return;
    }
    match result {
        Ok((model, shape)) => {
            (job.model, job.shape) = (Some(model), Some(shape));
            job.show_model();
            if job.phase != Phase::Pending {
                peers::plan_for_first(job, now, out);
            }
        }
        Err(StoreFailure::Storage(why)) => {
            fail(job, "CheckpointFailed", format!("the first client's model cannot be stored: {why}"), now, out);
        }
        Err(StoreFailure::Rejected(why)) => {
            fail(job, "ModelRejected", format!("the first client's model is refused: {why}"), now, out);
        }
    }
}
