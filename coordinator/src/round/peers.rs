//! What others say, and what each of them is told when it is new.

use lifl_api::{event::MetricsData, node::ToGateway};

use super::{ATTEMPTS, Action, Change, Event, commit, end_members, fail, plan_it, send_chain, send_plan, under_way};
use crate::{
    backoff::backoff,
    figures::Noted,
    state::{JobState, Phase, PlanState, Round},
    status::kind,
    wish::fixed,
};

/// Notes a fact; transitions come after it.
pub(super) fn note(job: &mut JobState, event: Event, now: i64, out: &mut Vec<Action>) {
    match event {
        Event::AgentUp(node) => {
            (job.agent, job.node) = (true, Some(node));
            agent_is_new(job, now, out);
        }
        Event::AgentDown => {
            job.agent = false;
            job.plan.state = PlanState::Wanted;
        }
        Event::GatewayUp(ledger) => {
            (job.gateway, job.served) = (true, false);
            (job.clients.asked_at, job.clients.alive_at) = (None, None);
            gateway_is_new(job, ledger, now, out);
        }
        Event::GatewayDown => (job.gateway, job.served) = (false, false),
        Event::Planned(revision) => planned(job, revision, now),
        Event::PlanFailed(revision, reason) => plan_failed(job, revision, &reason, now, out),
        Event::MemberDied => job.members_died += 1,
        Event::Joined { client, evaluator } => joined(job, client, evaluator, now, out),
        Event::Alive(clients) => {
            job.clients.registered.extend(clients.iter().cloned());
            job.clients.alive = clients.into_iter().collect();
            job.clients.alive_at = Some(now);
            under_way::replace(job, out);
        }
        Event::Metrics { client, evaluator, data } => measured(job, client, evaluator, data, out),
        Event::Progress { round, admitted } => {
            if let Some(under_way) = of(job, round) {
                under_way.admitted = under_way.admitted.max(admitted);
            }
        }
        Event::Closed { round, admitted } => {
            if let Some(under_way) = of(job, round) {
                (under_way.admitted, under_way.closed) = (admitted, Some(admitted));
            }
        }
        Event::RoundDone(done) => commit::round_done(job, done, out),
        Event::FirstModel => {
            // Several clients may bring one: the first is the model, the others are told to send again anyway.
            let over = matches!(job.phase, Phase::Succeeded | Phase::Failed);
            let wanted = job.model.is_none() && job.document.spec.model.initial.from_first_client && !over;
            if wanted && !std::mem::replace(&mut job.adopting, true) {
                out.push(Action::StoreFirst);
            }
        }
        Event::FirstStored(result) => commit::first_stored(job, result, now, out),
        Event::EndStored(result) => commit::end_stored(job, result, now, out),
        Event::Stored(round, result) => commit::stored(job, round, result, now, out),
        Event::Changed { generation, change } => changed(job, generation, change, now),
        Event::Tick => {}
    }
}

/// The round under way, when it is this one. Before rounds begin a place is kept for early words about the next one.
pub(super) fn of(job: &mut JobState, number: u32) -> Option<&mut Round> {
    if matches!(job.phase, Phase::Pending | Phase::Planning) && number == job.committed + 1 {
        return Some(job.round.get_or_insert(Round { number, ..Round::default() }));
    }
    job.round.as_mut().filter(|round| round.number == number)
}

fn agent_is_new(job: &mut JobState, now: i64, out: &mut Vec<Action>) {
    match job.phase {
        Phase::Pending => {}
        // The members of a finished job are wished away once more: the agent may have died before it did so.
        Phase::Succeeded | Phase::Failed => end_members(job, now, out),
        _ => {
            send_chain(job, out);
            send_plan(job, now, out);
        }
    }
}

fn gateway_is_new(job: &mut JobState, ledger: Option<lifl_api::node::ChainState>, now: i64, out: &mut Vec<Action>) {
    if job.phase == Phase::Pending {
        job.ledger = ledger;
        return;
    }
    introduce(job, out);
    let under_way = ledger.filter(|l| l.round == job.committed + 1);
    match job.phase {
        Phase::Succeeded | Phase::Failed => out.extend(finish_words(job)),
        Phase::Open | Phase::Closing => {
            out.extend(under_way::open_words(job));
            under_way::compare(job, under_way.as_ref(), now, out);
        }
        Phase::Planning => job.ledger = under_way,
        Phase::Pending | Phase::Gathering | Phase::Committing => {}
    }
}

/// Tells the gateway of the job and of what is committed.
pub(super) fn introduce(job: &mut JobState, out: &mut Vec<Action>) {
    out.extend(job_words(job));
    job.dirty = false;
    serve_model(job, out);
}

/// The job as the gateway shows it.
pub(crate) fn job_words(job: &JobState) -> Option<Action> {
    let slot_bytes = match (&job.plan.plan, job.node) {
        (Some(plan), _) => plan.slot_bytes,
        // Before the first client's tensors nothing else needs memory; half of it is theirs.
        (None, Some(node)) => node.quota / 2,
        (None, None) => 0,
    };
    Some(Action::Gateway(ToGateway::Job {
        chain: job.chain?,
        job: Box::new(job.document.clone()),
        token_key: job.token_key.clone(),
        join_secret: job.join_secret.clone(),
        slot_bytes,
    }))
}

/// Gives the gateway the model. The first client's only when the aggregators run: with the model, updates are accepted.
pub(super) fn serve_model(job: &mut JobState, out: &mut Vec<Action>) {
    let (Some(chain), Some(model), true, false) = (job.chain, &job.model, job.gateway, job.served) else {
        return;
    };
    let first = job.document.spec.model.initial.from_first_client && job.committed == 0;
    // Without a plan there may be no memory for it: the gateway would wait for a slot and not hear that the job has failed.
    let unplanned = job.phase == Phase::Failed && job.plan.plan.is_none();
    if unplanned || job.phase == Phase::Pending || (first && job.plan.state != PlanState::Done) {
        return;
    }
    let (round, length, sha256) = (model.round, model.length, model.sha256.clone());
    out.push(Action::Gateway(ToGateway::Model { chain, round, length, sha256: sha256.clone() }));
    if round > 0 {
        out.push(Action::Gateway(ToGateway::Commit { chain, round, sha256 }));
    }
    job.served = true;
}

pub(super) fn finish_words(job: &JobState) -> Option<Action> {
    let succeeded = job.phase == Phase::Succeeded;
    let conditions = &job.document.status.as_ref()?.conditions;
    let reason = conditions.iter().find(|c| c.kind == kind::SUCCEEDED).map(|c| c.message.clone()).unwrap_or_default();
    Some(Action::Gateway(ToGateway::Finish { chain: job.chain?, succeeded, reason }))
}

fn planned(job: &mut JobState, revision: u64, now: i64) {
    if revision != job.plan.revision || job.plan.state != PlanState::Sent {
        return;
    }
    job.plan.state = PlanState::Done;
    job.plan.failures = 0;
    let members = job.plan.plan.as_ref().map_or(0, |p| p.members.len());
    job.condition(kind::READY, true, "AggregatorsRun", format!("{members} aggregators run"), now);
}

fn plan_failed(job: &mut JobState, revision: u64, reason: &str, now: i64, out: &mut Vec<Action>) {
    if revision != job.plan.revision || job.plan.state != PlanState::Sent {
        return;
    }
    job.plan.failures += 1;
    let message = format!("aggregators cannot be started (attempt {} of {ATTEMPTS}): {reason}", job.plan.failures);
    if job.plan.failures >= ATTEMPTS {
        fail(job, "PlanFailed", message, now, out);
        return;
    }
    job.plan.state = PlanState::Failed(now + backoff(job.plan.failures - 1));
    job.condition(kind::READY, false, "PlanFailed", message.clone(), now);
    job.condition(kind::PROGRESSING, false, "PlanFailed", message, now);
}

fn joined(job: &mut JobState, client: String, evaluator: bool, now: i64, out: &mut Vec<Action>) {
    job.clients.registered.insert(client.clone());
    if evaluator {
        job.clients.alive.remove(&client);
        job.clients.evaluators.insert(client);
        return;
    }
    job.clients.evaluators.remove(&client);
    if job.clients.alive.insert(client) {
        job.clients.last_join = now;
    }
    under_way::replace(job, out);
}

fn measured(job: &mut JobState, client: String, evaluator: bool, data: MetricsData, out: &mut Vec<Action>) {
    // Before the first model there is nothing to measure.
    if job.model.is_none() {
        return;
    }
    let round = job.committed;
    // The gateway knows its token: it has joined, perhaps in an earlier life of the coordinator.
    job.clients.registered.insert(client.clone());
    if evaluator {
        job.clients.evaluators.insert(client.clone());
    }
    let decisive = job.document.spec.stop.as_ref().map(|stop| stop.metric.as_str());
    let dropped = match job.figures.note(round, client.clone(), evaluator, data, decisive) {
        Noted::Late => return,
        Noted::Counts { dropped } => dropped,
    };
    if dropped > 0 && !std::mem::replace(&mut job.figures_dropped, true) {
        out.push(Action::FiguresDropped { client, dropped });
    }
    if let Some(stop) = &job.document.spec.stop
        && job.finishing.is_none()
        && let Some(value) = job.figures.decisive(&stop.metric, job.document.spec.min_clients())
        && value >= stop.at_least
    {
        let reached = format!("{} {value} of the model of round {round} reached {}", stop.metric, stop.at_least);
        job.finishing = Some(reached);
        // A successor that finds the round committed must not train another one.
        out.extend(under_way::save(job));
    }
    let means = job.figures.means();
    let status = job.document.status.get_or_insert_default();
    let changed = status.metrics != means;
    status.metrics = means;
    job.touch(changed);
}

/// Another spec, or another Secret: followed as a whole, or not at all.
fn changed(job: &mut JobState, generation: i64, change: Result<Change, String>, now: i64) {
    let followed = job.followed();
    job.touch(job.generation() != generation);
    job.document.status.get_or_insert_default().observed_generation = generation;
    let stays = format!("the job goes on as of generation {followed}");
    let fault = match &change {
        Err(error) => Some(("Invalid", format!("{error}; {stays}"))),
        Ok(change) => {
            let fields = fixed(&job.document.spec, &change.document.spec);
            let message = format!(
                "{} cannot change while the job runs; {stays}: delete it and create it anew to have the change",
                fields.join(", ")
            );
            (!fields.is_empty()).then_some(("FieldFixed", message))
        }
    };
    match (fault, change) {
        (Some((reason, message)), _) => job.condition(kind::SPEC, false, reason, message, now),
        (None, Ok(Change { document, join_secret })) => {
            job.document.spec = document.spec;
            job.document.metadata.generation = Some(generation);
            job.join_secret = join_secret;
            job.touch(true);
            if job.document.status.iter().flat_map(|s| &s.conditions).any(|c| c.kind == kind::SPEC) {
                let message = format!("the job follows generation {generation}");
                job.condition(kind::SPEC, true, "Followed", message, now);
            }
        }
        (None, Err(_)) => {}
    }
}

/// Plans for the first client's tensors.
pub(super) fn plan_for_first(job: &mut JobState, now: i64, out: &mut Vec<Action>) {
    if plan_it(job, now, out) {
        out.extend(job_words(job));
    }
}
