//! The rounds of a job: pure, `decide(job, event, now)` notes a fact and returns what is to be done.
//!
//! ```text
//! Pending --> Planning --> Gathering --> Open --> Closing --> Committing --> Succeeded
//!                 |            ^  `-------------------------------|   |
//!                 |            `----------------------------------|---'  next round
//!                 `--> Failed  <----------------------------------'
//! ```
//!
//! Decisions are level-driven: an event changes what is known, then transitions are taken until none applies. Every
//! word to agent and gateway is a wish for a state, told again in full to whichever of them is new; so the death of
//! any party at any point only repeats words. With `fromFirstClient` there is no Planning before the first round: it
//! opens without a model, and the plan follows the first client's tensors.
//!
//! What is never done: a round is never given up once an update was acknowledged, and never committed twice.

mod commit;
mod peers;
mod under_way;

use lifl_api::{
    event::MetricsData,
    job::{AckLevel, FederatedJob, Phase as Shown},
    node::{ChainState, Order, ToGateway},
};

pub(crate) use self::peers::job_words;
use crate::{
    plan::{self, Shape},
    select::select,
    state::{Done, JobState, Model, Node, Phase, PlanState, Round, SavedRound},
    status::kind,
};

/// After so long without news it is asked again who is alive (one and a half heartbeats of 20 s).
const FRESH: i64 = 30_000;
/// A round waits so long for the evaluators' word on the model before it, at most its deadline.
const EVALUATION: i64 = 10_000;
/// Clients that a message names, at most.
const NAMED: usize = 5;
/// Attempts to start the aggregators, and models refused, before the job has failed.
const ATTEMPTS: u32 = 8;
/// Aggregators that made no model for so long after the close are started afresh; at least the round's deadline.
const PATIENCE: i64 = 60_000;

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// An agent (re)connected.
    AgentUp(Node),
    /// It is gone.
    AgentDown,
    /// A gateway (re)connected; where the chain stands there, if it is known.
    GatewayUp(Option<ChainState>),
    /// It is gone.
    GatewayDown,
    /// All members of this revision run.
    Planned(u64),
    /// The plan of this revision cannot be carried out.
    PlanFailed(u64, String),
    /// A member died and was replaced.
    MemberDied,
    /// A client is here.
    Joined {
        /// Its name.
        client: String,
        /// Never selected.
        evaluator: bool,
    },
    /// These trainers are alive.
    Alive(Vec<String>),
    /// A client measured a model.
    Metrics {
        /// Its name.
        client: String,
        /// It only measures.
        evaluator: bool,
        /// What it measured.
        data: MetricsData,
    },
    /// So many updates are accepted.
    Progress {
        /// Round.
        round: u32,
        /// Updates.
        admitted: u32,
    },
    /// The gateway closed the round with so many updates.
    Closed {
        /// Round.
        round: u32,
        /// Updates.
        admitted: u32,
    },
    /// The round's model is sealed.
    RoundDone(Done),
    /// The first client's tensors are here.
    FirstModel,
    /// They are stored: round 0.
    FirstStored(Result<(Model, Shape), StoreFailure>),
    /// The end of the job is stored, or not.
    EndStored(Result<(), StoreFailure>),
    /// A round is stored, or not.
    Stored(u32, Result<Model, StoreFailure>),
    /// Its spec is another one, or the Secret is that it names; or the spec cannot be read, and why.
    Changed {
        /// Of the spec.
        generation: i64,
        /// The spec.
        change: Result<Change, String>,
    },
    /// A time that [`wake`] named has come.
    Tick,
}

/// Another spec.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The job with it.
    pub document: Box<FederatedJob>,
    /// Value of the Secret that it names.
    pub join_secret: Option<String>,
}

/// Why a round was not stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreFailure {
    /// The disk said so: may pass.
    Storage(String),
    /// The model or its receipt is wrong.
    Rejected(String),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Tell the agent.
    Agent(Order),
    /// Tell the gateway; the model's descriptor goes beside `Model`.
    Gateway(ToGateway),
    /// Write the round's model and receipt, then tell [`Event::Stored`].
    Store {
        /// What the gateway said of it.
        done: Done,
        /// When the round opened.
        opened_at: i64,
    },
    /// Write the first client's tensors as round 0, then tell [`Event::FirstStored`].
    StoreFirst,
    /// Write that the stop condition is met by the last committed model, then tell [`Event::EndStored`].
    StoreEnd {
        /// Why, for people.
        reason: String,
    },
    /// Have the supervisor keep this before anything later in the list is done.
    Save(SavedRound),
    /// Have the supervisor forget it.
    Forget,
    /// For logs and metrics: a round is committed.
    Committed {
        /// Round.
        round: u32,
        /// Updates in it.
        updates: u32,
        /// From opening to commit.
        seconds: f64,
    },
    /// For logs and metrics: a round ended without a model.
    Unused {
        /// Round.
        round: u32,
    },
    /// For the log, once per job: figures that a client sent are left out.
    FiguresDropped {
        /// Who sent them.
        client: String,
        /// How many.
        dropped: usize,
    },
    /// For logs and metrics: the job failed in this round.
    Failed {
        /// Round under way.
        round: u32,
        /// Why.
        reason: String,
    },
}

/// Notes `event` and takes every transition that now applies.
pub fn decide(job: &mut JobState, event: Event, now: i64) -> Vec<Action> {
    let mut out = Vec::new();
    peers::note(job, event, now, &mut out);
    while advance(job, now, &mut out) {}
    job.show_clients();
    out
}

/// When [`Event::Tick`] is to be told, if nothing else happens before. `None`: the job needs no clock.
#[must_use]
pub fn wake(job: &JobState) -> Option<i64> {
    let mut times = Vec::new();
    if let (PlanState::Failed(at), true) = (job.plan.state, job.agent) {
        times.push(at);
    }
    match (job.phase, &job.round) {
        (Phase::Gathering, _) if job.gateway => {
            times.push(job.clients.asked_at.map_or(0, |at| at + FRESH));
            if let Some((until, _)) = unmeasured(job) {
                times.push(until);
            } else if job.clients.alive.len() < minimum(job) {
                times.extend((!is_overdue(job)).then(|| deadline_of_gathering(job)));
            } else if is_fresh(job) {
                times.push(job.clients.last_join + job.gathering);
            }
        }
        (Phase::Open, Some(round)) if job.gateway => times.push(round.deadline),
        (Phase::Closing, Some(round)) if job.gateway && job.agent && round.done.is_none() => times.push(round.watchdog),
        (Phase::Committing, Some(round)) => times.extend(round.retry_at),
        (Phase::Committing, None) => times.extend(job.ending.as_ref().and_then(|ending| ending.retry_at)),
        _ => {}
    }
    match job.phase {
        Phase::Succeeded | Phase::Failed => None,
        _ => times.into_iter().min(),
    }
}

/// Takes one transition, if one applies.
fn advance(job: &mut JobState, now: i64, out: &mut Vec<Action>) -> bool {
    if let (PlanState::Failed(at), true) = (job.plan.state, job.agent)
        && now >= at
    {
        send_plan(job, now, out);
    }
    peers::serve_model(job, out);
    match job.phase {
        Phase::Pending => pending(job, now, out),
        Phase::Planning => planning(job, now, out),
        Phase::Gathering => gathering(job, now, out),
        Phase::Open => under_way::open(job, now, out),
        Phase::Closing => under_way::closing(job, now, out),
        Phase::Committing => commit::committing(job, now, out),
        Phase::Succeeded | Phase::Failed => false,
    }
}

/// ## Pending => Planning | Gathering | Succeeded | Failed
fn pending(job: &mut JobState, now: i64, out: &mut Vec<Action>) -> bool {
    if job.chain.is_none() || !job.agent || !job.gateway {
        let missing = match (job.agent, job.gateway) {
            (false, true) => "agent",
            (true, false) => "gateway",
            _ => "agent and gateway",
        };
        job.say_waiting("Starting", format!("waits for the {missing} of its node"), now);
        return false;
    }
    if job.document.spec.auth.is_some() && job.join_secret.is_none() {
        let message = "auth.tokenSecretRef names a Secret that was not given".to_owned();
        return fail(job, "SecretMissing", message, now, out);
    }
    if job.committed >= job.document.spec.rounds {
        job.phase = Phase::Planning;
        peers::introduce(job, out);
        return finish_rounds(job, now, out);
    }
    // Updates acknowledged after that end (the manifest asked for more rounds meanwhile) are not left behind.
    let acknowledged = job.ledger.as_ref().is_some_and(|l| l.round == job.committed + 1 && l.admitted > 0);
    if let Some(message) = job.ended.take().filter(|_| !acknowledged) {
        job.phase = Phase::Planning;
        peers::introduce(job, out);
        return succeed(job, "StopConditionMet", message, now, out);
    }
    if job.document.spec.ack_level == AckLevel::Disk && !job.journal {
        let message = "spec.ackLevel: Disk asks for a journal, and the gateway has no folder for journals: set ackLevel \
                       to Memory, or give the gateway such a folder";
        return fail(job, "NoJournal", message.to_owned(), now, out);
    }
    if job.shape.is_some() {
        if plan_it(job, now, out) {
            job.phase = Phase::Planning;
            peers::introduce(job, out);
        }
    } else {
        let message = "its first client has not brought the model yet (model.initial.fromFirstClient)".to_owned();
        job.say_waiting("WaitingForModel", message, now);
        peers::introduce(job, out);
        send_chain(job, out);
        begin_rounds(job, now, out);
    }
    true
}

/// ## Planning => Gathering | Open | Closing
fn planning(job: &mut JobState, now: i64, out: &mut Vec<Action>) -> bool {
    if job.plan.state != PlanState::Done {
        return false;
    }
    begin_rounds(job, now, out);
    true
}

/// Goes on with the round that the gateway's ledger holds (the coordinator was restarted), or waits for clients.
fn begin_rounds(job: &mut JobState, now: i64, out: &mut Vec<Action>) {
    let (saved, committed) = (job.saved.take(), job.committed);
    // Of the round just committed only this counts: its writer died before it had the end stored.
    let finishing = saved.as_ref().filter(|s| (committed..=committed + 1).contains(&s.number));
    job.finishing = job.finishing.take().or_else(|| finishing.and_then(|s| s.finishing.clone()));
    let saved = saved.filter(|saved| saved.number == committed + 1);
    let ledger = job.ledger.take().filter(|l| l.round == committed + 1);
    let Some(ledger) = ledger else {
        return gather(job, now);
    };
    let span = under_way::span(job);
    let known = saved.is_some();
    // Without the deposit it is unknown who trains: everyone alive is let in, and enough updates close the round.
    let saved = saved.unwrap_or(SavedRound {
        number: ledger.round,
        opened_at: now,
        deadline: now + span,
        overdue: true,
        ..SavedRound::default()
    });
    let mut round = Round {
        number: ledger.round,
        opened_at: saved.opened_at,
        deadline: saved.deadline,
        selected: saved.selected,
        admitted: ledger.admitted,
        overdue: saved.overdue,
        everyone: !known,
        ..Round::default()
    };
    // The gateway repeats its word at each connection: it may have come before the plan was done.
    if let Some(early) = job.round.take().filter(|early| early.number == round.number) {
        (round.closed, round.done) = (early.closed, early.done);
        round.admitted = round.admitted.max(early.admitted);
    }
    job.round = Some(round);
    job.document.status.get_or_insert_default().phase = Shown::Running;
    if ledger.open {
        job.phase = Phase::Open;
        if known {
            out.extend(under_way::open_words(job));
        }
        under_way::ask(job, now, out);
    } else {
        under_way::close(job, now, out);
    }
}

/// Begins to wait for the clients of the next round.
fn gather(job: &mut JobState, now: i64) {
    job.phase = Phase::Gathering;
    job.clients.since = now;
    job.round = None;
}

fn minimum(job: &JobState) -> usize {
    usize::try_from(job.document.spec.min_clients()).unwrap_or(usize::MAX)
}

fn wanted(job: &JobState) -> usize {
    usize::try_from(job.document.spec.clients_to_select()).unwrap_or(usize::MAX)
}

fn deadline_of_gathering(job: &JobState) -> i64 {
    job.clients.since + under_way::span(job)
}

/// The wait for clients was called too long already.
fn is_overdue(job: &JobState) -> bool {
    let conditions = job.document.status.as_ref().map_or(&[][..], |s| &s.conditions);
    conditions.iter().any(|c| c.kind == kind::PROGRESSING && c.reason == "TooFewClients")
}

/// The last question who is alive is answered.
fn is_fresh(job: &JobState) -> bool {
    matches!((job.clients.asked_at, job.clients.alive_at), (Some(asked), Some(told)) if told >= asked)
}

/// Evaluators who have not yet measured the last model, and until when the next round waits for them: a job with a stop
/// condition ends with the model that met it, not with one more.
fn unmeasured(job: &JobState) -> Option<(i64, Vec<String>)> {
    let metric = &job.document.spec.stop.as_ref().filter(|_| job.committed > 0)?.metric;
    let missing: Vec<String> = job.figures.missing(job.committed, &job.clients.evaluators, metric).cloned().collect();
    let until = job.clients.since + under_way::span(job).min(EVALUATION);
    (!missing.is_empty()).then_some((until, missing))
}

/// ## Gathering => Open | Committing (the end)
fn gathering(job: &mut JobState, now: i64, out: &mut Vec<Action>) -> bool {
    if let Some(message) = job.finishing.clone() {
        commit::end(job, message, out);
        return true;
    }
    if !job.gateway {
        return false;
    }
    // Fewer rounds are wanted than before.
    if job.committed >= job.document.spec.rounds {
        return finish_rounds(job, now, out);
    }
    if job.clients.asked_at.is_none_or(|at| now - at >= FRESH) {
        under_way::ask(job, now, out);
    }
    if let Some((until, missing)) = unmeasured(job) {
        if now < until {
            let (number, names) = (job.committed + 1, missing[..missing.len().min(NAMED)].join(", "));
            let more = missing.len().saturating_sub(NAMED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let message = format!("round {number} waits for the figures of the model before it: of {names}{more}");
            job.condition(kind::PROGRESSING, true, "WaitingForEvaluators", message, now);
            return false;
        }
        // Gone, or too slow: not waited for again before they report.
        job.clients.evaluators.retain(|name| !missing.contains(name));
    }
    let here = job.clients.alive.len();
    let quiet = now - job.clients.last_join >= job.gathering;
    if is_fresh(job) && (here >= wanted(job) || (here >= minimum(job) && quiet)) {
        under_way::begin(job, now, out);
        return true;
    }
    let (registered, min) = (job.clients.registered.len(), minimum(job));
    if here < min && (now >= deadline_of_gathering(job) || is_overdue(job)) {
        let message = format!(
            "round {} waits for clients: {here} of at least {min} (minClients) are alive, {registered} registered",
            job.committed + 1
        );
        job.condition(kind::PROGRESSING, false, "TooFewClients", message, now);
    } else {
        let message =
            format!("round {} waits for clients: {here} are alive, {min} are needed (minClients)", job.committed + 1);
        // Who is alive is asked anew before every round: only an answer shows that it waits.
        let waits = here < min && is_fresh(job);
        job.condition(kind::PROGRESSING, !waits, "WaitingForClients", message, now);
    }
    false
}

/// Plans the job's tree and tells the agent; `false` when the job failed by it.
fn plan_it(job: &mut JobState, now: i64, out: &mut Vec<Action>) -> bool {
    let (Some(node), Some(shape)) = (job.node, job.shape) else {
        return true;
    };
    match plan::plan(&job.document.spec, &shape, node.cores, node.quota) {
        Ok(plan) => {
            job.plan.plan = Some(plan);
            send_chain(job, out);
            send_plan(job, now, out);
            true
        }
        Err(refusal) => {
            fail(job, refusal.reason, refusal.message, now, out);
            false
        }
    }
}

fn send_chain(job: &JobState, out: &mut Vec<Action>) {
    if let (Some(chain), Some(node)) = (job.chain, job.node) {
        let (namespace, name) = (job.document.namespace().to_owned(), job.document.name().to_owned());
        out.push(Action::Agent(Order::Chain { chain, namespace, job: name, quota: node.quota }));
    }
}

/// Sends the plan under a new revision; revisions grow over all lives of the coordinator, so that they begin with the time.
fn send_plan(job: &mut JobState, now: i64, out: &mut Vec<Action>) {
    let (Some(chain), Some(plan)) = (job.chain, &job.plan.plan) else {
        return;
    };
    let members = plan.members.clone();
    job.plan.revision = next_revision(job, now);
    job.plan.state = PlanState::Sent;
    job.say_waiting("StartingAggregators", format!("{} aggregators are being started", members.len()), now);
    out.push(Action::Agent(Order::Plan { chain, revision: job.plan.revision, members }));
}

fn next_revision(job: &JobState, now: i64) -> u64 {
    (job.plan.revision + 1).max(u64::try_from(now).unwrap_or(0))
}

/// Ends the aggregators: an idle job costs no process.
fn end_members(job: &mut JobState, now: i64, out: &mut Vec<Action>) {
    if let (Some(chain), true) = (job.chain, job.plan.revision > 0) {
        job.plan.revision = next_revision(job, now);
        job.plan.state = PlanState::Wanted;
        out.push(Action::Agent(Order::Plan { chain, revision: job.plan.revision, members: Vec::new() }));
    }
}

/// Has the aggregators started afresh: none, then all. The gateway replays to the new ones what is not contained.
fn restart_members(job: &mut JobState, now: i64, out: &mut Vec<Action>) {
    end_members(job, now, out);
    send_plan(job, now, out);
}

fn finish_rounds(job: &mut JobState, now: i64, out: &mut Vec<Action>) -> bool {
    let message = format!("all {} rounds are committed", job.document.spec.rounds);
    succeed(job, "RoundsCommitted", message, now, out)
}

/// ## any => Succeeded
fn succeed(job: &mut JobState, reason: &str, message: String, now: i64, out: &mut Vec<Action>) -> bool {
    job.phase = Phase::Succeeded;
    job.round = None;
    job.document.status.get_or_insert_default().phase = Shown::Succeeded;
    job.condition(kind::SUCCEEDED, true, reason, message.clone(), now);
    job.condition(kind::PROGRESSING, false, reason, message.clone(), now);
    job.say_waiting(reason, message, now);
    out.extend(peers::finish_words(job));
    end_members(job, now, out);
    out.push(Action::Forget);
    true
}

/// ## any => Failed
fn fail(job: &mut JobState, reason: &'static str, message: String, now: i64, out: &mut Vec<Action>) -> bool {
    job.phase = Phase::Failed;
    job.round = None;
    job.say_failed(reason, &message, now);
    if job.gateway {
        peers::introduce(job, out);
    }
    out.extend(peers::finish_words(job));
    end_members(job, now, out);
    out.push(Action::Failed { round: job.committed + 1, reason: message });
    out.push(Action::Forget);
    true
}

/// Chooses `count` of the living who are not yet selected, and counts them.
fn choose(job: &mut JobState, count: usize) -> Vec<String> {
    let mut candidates = job.clients.alive.clone();
    if let Some(round) = &job.round {
        candidates.retain(|client| !round.selected.contains(client));
    }
    let number = job.committed + 1;
    let seed = job.token_key.bytes().fold(u64::from(number), |seed, byte| seed.rotate_left(7) ^ u64::from(byte));
    let chosen = select(&candidates, &job.clients.picked, count, seed);
    for client in &chosen {
        *job.clients.picked.entry(client.clone()).or_insert(0) += 1;
    }
    chosen
}
