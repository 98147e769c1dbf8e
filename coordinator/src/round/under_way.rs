//! A round from its opening to its close.

use lifl_api::{
    job::Phase as Shown,
    node::{ChainState, ToGateway, Tree},
};

use super::{Action, PATIENCE, choose, commit, is_fresh, restart_members, wanted};
use crate::{
    plan,
    state::{JobState, Phase, Round, SavedRound},
    status::kind,
};

/// The job's deadline, milliseconds.
pub(super) fn span(job: &JobState) -> i64 {
    i64::try_from(job.document.spec.round_deadline.0.as_millis()).unwrap_or(i64::MAX / 4).max(1)
}

/// Asks who is alive.
pub(super) fn ask(job: &mut JobState, now: i64, out: &mut Vec<Action>) {
    job.clients.asked_at = Some(now);
    if let (Some(chain), true) = (job.chain, job.gateway) {
        out.push(Action::Gateway(ToGateway::Alive { chain }));
    }
}

/// Has the supervisor keep the round under way.
pub(super) fn save(job: &JobState) -> Option<Action> {
    let round = job.round.as_ref()?;
    Some(Action::Save(SavedRound {
        number: round.number,
        opened_at: round.opened_at,
        deadline: round.deadline,
        overdue: round.overdue,
        selected: round.selected.clone(),
        picked: job.clients.picked.clone(),
        finishing: job.finishing.clone(),
    }))
}

fn tree(job: &JobState) -> Tree {
    match (&job.plan.plan, job.node) {
        (Some(plan), _) => plan.tree.clone(),
        (None, node) => plan::tree_without_model(&job.document.spec, node.map_or(1, |n| n.cores)),
    }
}

/// The wish that the round is open, as it stands.
pub(super) fn open_words(job: &JobState) -> Option<Action> {
    let round = job.round.as_ref()?;
    Some(Action::Gateway(ToGateway::Open {
        chain: job.chain?,
        round: round.number,
        selected: round.selected.iter().cloned().collect(),
        goal: job.document.spec.clients_per_round,
        deadline_ms: round.deadline,
        tree: tree(job),
    }))
}

fn extend_words(job: &JobState) -> Option<Action> {
    let round = job.round.as_ref()?;
    Some(Action::Gateway(ToGateway::Extend {
        chain: job.chain?,
        round: round.number,
        selected: round.selected.iter().cloned().collect(),
        deadline_ms: round.deadline,
    }))
}

pub(super) fn close_words(job: &JobState) -> Option<Action> {
    let round = job.round.as_ref()?;
    Some(Action::Gateway(ToGateway::Close { chain: job.chain?, round: round.number }))
}

/// Opens the next round.
pub(super) fn begin(job: &mut JobState, now: i64, out: &mut Vec<Action>) {
    job.round = None;
    let selected = choose(job, wanted(job)).into_iter().collect();
    let number = job.committed + 1;
    job.round = Some(Round { number, opened_at: now, deadline: now + span(job), selected, ..Round::default() });
    job.phase = Phase::Open;
    job.document.status.get_or_insert_default().phase = Shown::Running;
    out.extend(save(job));
    out.extend(open_words(job));
}

/// ## Open => Closing | Committing
pub(super) fn open(job: &mut JobState, now: i64, out: &mut Vec<Action>) -> bool {
    let min = job.document.spec.min_clients();
    let finishing = job.finishing.is_some();
    let Some(round) = &job.round else {
        return false;
    };
    if round.done.is_some() {
        return commit::begin(job, out);
    }
    if round.closed.is_some() {
        closing_now(job, now, out);
        return true;
    }
    if !job.gateway {
        return false;
    }
    let enough = round.admitted >= min;
    let late = now >= round.deadline;
    // Only the gateway's ledger knows whether the round is unused: it is closed, and its answer tells.
    let unused = finishing && round.admitted == 0;
    if unused || (enough && (late || round.overdue)) {
        close(job, now, out);
        return true;
    }
    if late {
        extend(job, now, out);
    }
    show_open(job, now);
    false
}

fn show_open(job: &mut JobState, now: i64) {
    let (goal, min) = (job.document.spec.clients_per_round, job.document.spec.min_clients());
    let Some(round) = &job.round else {
        return;
    };
    let (number, admitted, selected) = (round.number, round.admitted, round.selected.len());
    if round.overdue {
        let message = format!(
            "round {number} has {admitted} of at least {min} updates (minClients) after its deadline: it waits on, \
             {selected} clients are selected by now"
        );
        job.condition(kind::PROGRESSING, false, "TooFewUpdates", message, now);
    } else {
        let message = format!("round {number} is open: {admitted} of {goal} updates, {selected} clients selected");
        job.condition(kind::PROGRESSING, true, "RoundOpen", message, now);
    }
}

/// A later deadline: what was acknowledged stays, replacements come as soon as it is known who is alive.
fn extend(job: &mut JobState, now: i64, out: &mut Vec<Action>) {
    let span = span(job);
    if let Some(round) = &mut job.round {
        round.overdue = true;
        round.deadline = now + span;
    }
    ask(job, now, out);
    out.extend(save(job));
    out.extend(extend_words(job));
}

/// Selects replacements in a round that is overdue.
pub(super) fn replace(job: &mut JobState, out: &mut Vec<Action>) {
    let (Phase::Open, Some(round), true, true) = (job.phase, &job.round, job.gateway, is_fresh(job)) else {
        return;
    };
    if !round.overdue {
        return;
    }
    let spec = &job.document.spec;
    let left = f64::from(spec.clients_per_round.saturating_sub(round.admitted));
    let hopeful = round.selected.intersection(&job.clients.alive).count();
    let hopeful = hopeful.saturating_sub(usize::try_from(round.admitted).unwrap_or(usize::MAX));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a factor in 1..=100 of a u32")]
    let needed = (left * spec.over_provision).ceil() as usize;
    // Those who live but do not deliver may never do: at least the missing ones are asked of others.
    let missing = usize::try_from(spec.min_clients().saturating_sub(round.admitted)).unwrap_or(usize::MAX);
    let count = if round.everyone { usize::MAX } else { needed.saturating_sub(hopeful).max(missing) };
    let chosen = choose(job, count);
    if chosen.is_empty() {
        return;
    }
    if let Some(round) = &mut job.round {
        round.selected.extend(chosen);
    }
    out.extend(save(job));
    out.extend(extend_words(job));
}

/// Has the gateway close the round.
pub(super) fn close(job: &mut JobState, now: i64, out: &mut Vec<Action>) {
    if job.finishing.is_some() {
        out.extend(save(job));
    }
    out.extend(close_words(job));
    closing_now(job, now, out);
}

pub(super) fn closing_now(job: &mut JobState, now: i64, out: &mut Vec<Action>) {
    let patience = span(job).max(PATIENCE);
    if let Some(round) = &mut job.round {
        round.patience = patience;
        round.watchdog = now + patience;
        let message =
            format!("round {} is closed with {} updates: the model is being made", round.number, round.admitted);
        job.condition(kind::PROGRESSING, true, "Aggregating", message, now);
    }
    job.phase = Phase::Closing;
    // Asked now, so that the next round opens at once.
    ask(job, now, out);
}

/// Compares the round with what a new gateway's ledger says of it.
pub(super) fn compare(job: &mut JobState, ledger: Option<&ChainState>, now: i64, out: &mut Vec<Action>) {
    let span = span(job);
    let Some(round) = &mut job.round else {
        return;
    };
    match ledger {
        Some(ledger) => {
            round.admitted = round.admitted.max(ledger.admitted);
            if job.phase == Phase::Closing {
                out.extend(close_words(job));
            } else if !ledger.open {
                close(job, now, out);
            }
        }
        // The Open did not reach it, or the ledger is lost: the round begins (again).
        None => {
            (round.closed, round.admitted, round.deadline) = (None, 0, now + span);
            job.phase = Phase::Open;
        }
    }
}

/// ## Closing => Committing
pub(super) fn closing(job: &mut JobState, now: i64, out: &mut Vec<Action>) -> bool {
    let Some(round) = &mut job.round else {
        return false;
    };
    if round.done.is_some() {
        return commit::begin(job, out);
    }
    if round.closed == Some(0) {
        out.push(Action::Unused { round: round.number });
        // Only a met stop condition closes an empty round; an earlier life of the coordinator may have known which.
        let message = job.finishing.clone().unwrap_or_else(|| "the stop condition was met before a restart".to_owned());
        job.round = None;
        commit::end(job, message, out);
        return true;
    }
    if job.gateway && job.agent && now >= round.watchdog {
        let waited = round.patience / 1000;
        round.patience = round.patience.saturating_mul(2);
        round.watchdog = now.saturating_add(round.patience);
        let message = format!(
            "round {}: no model for {waited} s after its close; the aggregators are started afresh",
            round.number
        );
        job.condition(kind::PROGRESSING, false, "AggregatorsStuck", message, now);
        restart_members(job, now, out);
        out.extend(close_words(job));
    }
    false
}
