//! The round's transitions one by one, and what the status says of them.

use lifl_api::{
    event::MetricsData,
    job::{FederatedJob, Phase as Shown},
    node::{ChainState, Order, ToGateway},
};

use super::{chain_state, job, receipt};
use crate::{
    plan::{Refusal, Shape},
    round::{Action, Change, Event, StoreFailure, decide, wake},
    state::{Done, JobState, Jobs, Loaded, Model, Node, Phase, SavedRound},
};

const SHAPE: Shape = Shape { elements: 1000, file_bytes: 4200, float_tensors: 2, other_bytes: 0 };

/// A job, its clock, and what was last done.
struct Table {
    jobs: Jobs,
    now: i64,
    last: Vec<Action>,
}

fn stored(round: u32) -> Model {
    Model { round, sha256: format!("sha{round}"), length: 4200, uri: format!("file:///c/{round}") }
}

impl Table {
    fn new(document: FederatedJob, loaded: Loaded, hello: &[ChainState]) -> Self {
        let mut jobs = Jobs::new(vec![JobState::new("j".into(), document, None, 2000, loaded, 0)]);
        jobs.assign(hello);
        Self { jobs, now: 0, last: Vec::new() }
    }

    /// Goal 4, at least 2, 10 s; the model is loaded.
    fn usual(more: &str) -> Self {
        let loaded = Loaded { model: Some((stored(0), SHAPE)), token_key: "k".into(), ..Loaded::default() };
        Self::new(job(3, 4, 2, "file:///c", "file:///m", more), loaded, &[])
    }

    fn job(&mut self) -> &mut JobState {
        self.jobs.get_mut(0).unwrap()
    }

    fn at(&mut self, now: i64, event: Event) -> &mut Self {
        self.now = now;
        self.last = decide(self.jobs.get_mut(0).unwrap(), event, now);
        self
    }

    fn up(&mut self) -> &mut Self {
        self.at(0, Event::AgentUp(Node { quota: 1 << 30, cores: 2 }));
        self.at(0, Event::GatewayUp(None));
        let revision = self.job().plan.revision;
        self.at(0, Event::Planned(revision))
    }

    fn alive(&mut self, now: i64, count: u32) -> &mut Self {
        self.at(now, Event::Alive((0..count).map(|i| format!("c{i}")).collect()))
    }

    fn open(&mut self) -> &mut Self {
        self.up().alive(0, 6);
        assert_eq!(self.job().phase(), Phase::Open);
        self
    }

    fn done(&mut self, now: i64, round: u32, count: u32) -> &mut Self {
        let weight = f64::from(count) * 2.0;
        self.at(now, Event::RoundDone(Done { round, count, weight, length: 4200, receipt: receipt(count) }))
    }

    fn told(&self, pick: impl Fn(&ToGateway) -> bool) -> bool {
        self.last.iter().any(|action| matches!(action, Action::Gateway(words) if pick(words)))
    }

    fn progressing(&mut self) -> (String, String, String) {
        let status = self.job().document().status.clone().unwrap();
        let c = status.conditions.into_iter().find(|c| c.kind == "Progressing").unwrap();
        (c.status, c.reason, c.message)
    }
}

#[test]
fn a_round_opens_when_enough_are_here_and_the_rest_had_their_time() {
    for (alive, opens_at) in [(6, Some(0)), (5, Some(2000)), (2, Some(2000)), (1, None)] {
        let mut t = Table::usual("");
        t.up().alive(0, alive);
        assert_eq!(t.job().phase() == Phase::Open, opens_at == Some(0), "{alive}");
        t.at(2000, Event::Tick);
        assert_eq!(t.job().phase() == Phase::Open, opens_at.is_some(), "{alive}");
    }
}

#[test]
fn too_few_clients_are_told_with_both_numbers_and_waited_for() {
    let mut t = Table::usual("");
    t.up().alive(0, 1);
    assert_eq!(t.progressing().1, "WaitingForClients");
    assert_eq!(wake(t.job()), Some(10_000), "nothing is due before the deadline");
    t.at(10_000, Event::Tick);
    let (status, reason, message) = t.progressing();
    assert_eq!((status.as_str(), reason.as_str()), ("False", "TooFewClients"));
    assert!(message.contains("1 of at least 2") && message.contains("1 registered"), "{message}");
    t.at(11_000, Event::Joined { client: "late".into(), evaluator: false }).at(13_000, Event::Tick);
    assert_eq!(t.job().phase(), Phase::Open);
}

#[test]
fn evaluators_are_never_selected() {
    let mut t = Table::usual("");
    t.up();
    for i in 0..9 {
        t.at(1, Event::Joined { client: format!("judge{i}"), evaluator: true });
    }
    t.alive(1, 1).at(60_000, Event::Tick);
    assert_eq!(t.job().phase(), Phase::Gathering);
}

#[test]
fn the_deadline_closes_extends_and_replaces() {
    // (admitted at the deadline, closes)
    for (admitted, closes) in [(0, false), (1, false), (2, true), (3, true)] {
        let mut t = Table::usual("");
        t.open().at(500, Event::Progress { round: 1, admitted });
        assert_eq!(wake(t.job()), Some(10_000));
        t.at(10_000, Event::Tick);
        assert_eq!(t.told(|w| matches!(w, ToGateway::Close { round: 1, .. })), closes, "{admitted}");
        let extended =
            t.told(|w| matches!(w, ToGateway::Extend { deadline_ms: 20_000, selected, .. } if selected.len() == 6));
        assert_eq!(extended, !closes, "{admitted}");
        if closes {
            continue;
        }
        assert!(t.last.iter().any(|a| matches!(a, Action::Save(saved) if saved.overdue)));
        let (status, reason, message) = t.progressing();
        assert_eq!((status.as_str(), reason.as_str()), ("False", "TooFewUpdates"));
        assert!(message.contains(&format!("{admitted} of at least 2")), "{message}");
        t.at(10_100, Event::Alive((4..10).map(|i| format!("c{i}")).collect()));
        let replaced = t.told(|w| matches!(w, ToGateway::Extend { selected, .. } if selected.len() > 6));
        assert!(replaced, "nobody takes the place of the dead: {:?}", t.last);
        t.at(10_200, Event::Progress { round: 1, admitted: 2 });
        assert!(t.told(|w| matches!(w, ToGateway::Close { .. })), "enough after the deadline closes at once");
    }
}

#[test]
fn a_commit_is_told_after_it_is_stored_and_the_next_round_opens_with_it() {
    let mut t = Table::usual("");
    t.open().done(1000, 1, 4);
    assert!(matches!(&t.last[..], [Action::Store { done, opened_at: 0 }] if done.round == 1), "{:?}", t.last);
    t.at(1500, Event::Stored(1, Ok(stored(1))));
    assert!(t.told(|w| matches!(w, ToGateway::Commit { round: 1, sha256, .. } if sha256 == "sha1")));
    assert!(t.told(|w| matches!(w, ToGateway::Open { round: 2, .. })));
    assert!(
        t.last
            .iter()
            .any(|a| matches!(a, Action::Committed { round: 1, updates: 4, seconds } if (seconds - 1.5).abs() < 1e-9))
    );
    // Told again, it is committed again, by word only.
    t.done(1600, 1, 4);
    assert!(matches!(&t.last[..], [Action::Gateway(ToGateway::Commit { round: 1, .. })]), "{:?}", t.last);
}

#[test]
fn a_full_disk_is_told_and_tried_again() {
    let mut t = Table::usual("");
    t.open().done(1000, 1, 4);
    t.at(1000, Event::Stored(1, Err(StoreFailure::Storage("No space left on device (os error 28)".into()))));
    let (status, reason, message) = t.progressing();
    assert_eq!((status.as_str(), reason.as_str()), ("False", "CheckpointFailed"));
    assert!(message.contains("os error 28"), "{message}");
    assert_eq!(wake(t.job()), Some(2000));
    t.at(2000, Event::Tick);
    assert!(matches!(&t.last[..], [Action::Store { .. }]), "{:?}", t.last);
    t.at(2100, Event::Stored(1, Ok(stored(1))));
    assert_eq!(t.job().committed(), 1);
}

#[test]
fn a_refused_model_starts_the_aggregators_afresh_eight_times() {
    let mut t = Table::usual("");
    t.open();
    for attempt in 1..=8 {
        t.done(1000 * attempt, 1, 4);
        t.at(1000 * attempt, Event::Stored(1, Err(StoreFailure::Rejected("not finite".into()))));
        if attempt < 8 {
            let plans: Vec<usize> = t
                .last
                .iter()
                .filter_map(
                    |a| if let Action::Agent(Order::Plan { members, .. }) = a { Some(members.len()) } else { None },
                )
                .collect();
            assert_eq!((plans.len(), plans[0]), (2, 0), "none, then all");
            assert_eq!(t.job().phase(), Phase::Closing);
        }
    }
    assert_eq!(t.job().phase(), Phase::Failed);
    assert!(
        t.told(|w| matches!(w, ToGateway::Finish { succeeded: false, reason, .. } if reason.contains("not finite")))
    );
}

#[test]
fn silent_aggregators_are_started_afresh() {
    let mut t = Table::usual("");
    t.open().at(100, Event::Closed { round: 1, admitted: 4 });
    assert_eq!(t.job().phase(), Phase::Closing);
    assert_eq!(wake(t.job()), Some(60_100));
    t.at(60_100, Event::Tick);
    assert!(t.last.iter().any(|a| matches!(a, Action::Agent(Order::Plan { members, .. }) if members.is_empty())));
    assert_eq!(t.progressing().1, "AggregatorsStuck");
    assert_eq!(wake(t.job()), Some(180_100), "patience doubles");
}

#[test]
fn failed_plans_are_tried_again_later_and_then_no_more() {
    let mut t = Table::usual("");
    t.at(0, Event::AgentUp(Node { quota: 1 << 30, cores: 2 })).at(0, Event::GatewayUp(None));
    for attempt in 1..=8 {
        let revision = t.job().plan.revision;
        let now = t.now;
        t.at(now, Event::PlanFailed(revision - 1, "old".into()))
            .at(now, Event::PlanFailed(revision, "no memory".into()));
        assert_eq!(t.progressing().1, "PlanFailed");
        if attempt < 8 {
            let at = wake(t.job()).unwrap();
            assert_eq!(at - now, (1000 << (attempt - 1)).min(60_000));
            t.at(at, Event::Tick);
            assert!(matches!(&t.last[..], [Action::Agent(Order::Plan { .. })]), "{:?}", t.last);
        }
    }
    assert_eq!(t.job().phase(), Phase::Failed);
    assert_eq!(wake(t.job()), None);
}

#[test]
fn the_stop_condition_ends_after_what_was_acknowledged() {
    let stop = "  stop: {metric: accuracy, atLeast: 0.9}\n";
    let figures = |client: &str, evaluator, value, samples| Event::Metrics {
        client: client.into(),
        evaluator,
        data: MetricsData { round: 0, samples, metrics: [("accuracy".to_owned(), value)].into() },
    };
    // Clients: the weighted mean of at least minClients decides; an evaluator's word is above theirs.
    let mut t = Table::usual(stop);
    t.open().at(1, figures("c0", false, 0.99, 10));
    assert!(!t.told(|w| matches!(w, ToGateway::Close { .. })), "one client is not the job");
    t.at(2, figures("c1", false, 0.5, 30));
    let shown = t.job().document().status.clone().unwrap().metrics["accuracy"];
    assert!((shown - 0.6225).abs() < 1e-9, "{shown}");
    t.at(3, figures("judge", true, 0.95, 0));
    assert!(t.told(|w| matches!(w, ToGateway::Close { round: 1, .. })), "an unused round is closed");
    t.at(4, Event::Closed { round: 1, admitted: 0 });
    assert!(t.last.iter().any(|a| matches!(a, Action::StoreEnd { reason } if reason.contains("0.95"))));
    assert!(!t.told(|w| matches!(w, ToGateway::Finish { .. })), "the end is told before it is stored");
    // A full disk is told and tried again.
    t.at(5, Event::EndStored(Err(StoreFailure::Storage("os error 28".into()))));
    assert!(t.progressing().1 == "CheckpointFailed" && t.progressing().2.contains("os error 28"));
    assert_eq!((t.job().phase(), wake(t.job())), (Phase::Committing, Some(1005)));
    t.at(1005, Event::Tick);
    assert!(matches!(&t.last[..], [Action::StoreEnd { .. }]), "{:?}", t.last);
    t.at(1006, Event::Tick);
    assert!(t.last.is_empty(), "{:?}", t.last);
    t.at(1007, Event::EndStored(Ok(())));
    assert_eq!(t.job().phase(), Phase::Succeeded);
    // A round with updates is completed first.
    let mut t = Table::usual(stop);
    t.open().at(1, Event::Progress { round: 1, admitted: 1 }).at(2, figures("judge", true, 0.95, 0));
    assert_eq!(t.job().phase(), Phase::Open);
    assert!(matches!(&t.last[..], [Action::Save(saved)] if saved.finishing.is_some()), "{:?}", t.last);
    t.done(3, 1, 4).at(4, Event::Stored(1, Ok(stored(1)))).at(4, Event::EndStored(Ok(())));
    assert_eq!((t.job().phase(), t.job().committed()), (Phase::Succeeded, 1));
    assert!(t.told(|w| matches!(w, ToGateway::Finish { succeeded: true, reason, .. } if reason.contains("0.95"))));
    // Figures of an older model are too late.
    t.at(5, figures("judge", true, 0.1, 1));
    assert!((t.job().document().status.clone().unwrap().metrics["accuracy"] - 0.95).abs() < 1e-9);
}

#[test]
fn the_next_round_waits_for_the_evaluators_a_while() {
    let figures = |round, value| Event::Metrics {
        client: "judge".into(),
        evaluator: true,
        data: MetricsData { round, samples: 1, metrics: [("accuracy".to_owned(), value)].into() },
    };
    let begin = |more: &str| {
        let mut t = Table::usual(more);
        t.at(0, Event::Joined { client: "judge".into(), evaluator: true });
        t.open().done(10, 1, 4).at(20, Event::Stored(1, Ok(stored(1)))).alive(30, 6);
        t
    };
    let stop = "  stop: {metric: accuracy, atLeast: 0.9}\n";
    // Nothing is decided by the figures, or nothing is there to measure yet: nobody is waited for.
    assert_eq!(begin("").job().phase(), Phase::Open);
    // The model that meets the condition is the last one.
    let mut t = begin(stop);
    assert_eq!((t.job().phase(), t.progressing().1.as_str()), (Phase::Gathering, "WaitingForEvaluators"));
    t.at(40, figures(0, 0.99));
    assert_eq!(t.job().phase(), Phase::Gathering, "figures of an older model are too late");
    t.at(50, figures(1, 0.95)).at(60, Event::EndStored(Ok(())));
    assert_eq!((t.job().phase(), t.job().committed()), (Phase::Succeeded, 1));
    let mut t = begin(stop);
    t.at(50, figures(1, 0.5));
    assert_eq!(t.job().phase(), Phase::Open);
    // One that is gone costs one wait, and counts again when it is back.
    let mut t = begin(stop);
    assert_eq!(wake(t.job()), Some(20 + 10_000));
    t.at(20 + 10_000, Event::Tick);
    assert_eq!(t.job().phase(), Phase::Open);
    t.done(10_100, 2, 4).at(10_200, Event::Stored(2, Ok(stored(2)))).alive(10_300, 6);
    assert_eq!(t.job().phase(), Phase::Open);
    t.at(10_400, figures(2, 0.5));
    t.done(10_500, 3, 4).at(10_600, Event::Stored(3, Ok(stored(3))));
    assert_eq!(t.job().phase(), Phase::Succeeded, "three rounds were asked for");
}

#[test]
fn the_first_client_brings_the_model_after_its_round_opened() {
    let mut document = job(3, 4, 2, "file:///c", "file:///m", "");
    (document.spec.model.initial.uri, document.spec.model.initial.from_first_client) = (None, true);
    let mut t = Table::new(document, Loaded { token_key: "k".into(), ..Loaded::default() }, &[]);
    t.up().alive(0, 6);
    assert_eq!(t.job().phase(), Phase::Open);
    t.at(100, Event::FirstModel);
    assert_eq!(t.last, [Action::StoreFirst]);
    // Several clients may bring theirs together: one is stored, once.
    for now in 101..104 {
        t.at(now, Event::FirstModel);
        assert_eq!(t.last, []);
    }
    t.at(200, Event::FirstStored(Ok((stored(0), SHAPE))));
    assert!(t.last.iter().any(|a| matches!(a, Action::Agent(Order::Plan { members, .. }) if !members.is_empty())));
    assert!(!t.told(|w| matches!(w, ToGateway::Model { .. })), "updates would come before the aggregators");
    let revision = t.job().plan.revision;
    t.at(250, Event::FirstModel);
    assert_eq!(t.last, []);
    t.at(300, Event::Planned(revision));
    assert!(t.told(|w| matches!(w, ToGateway::Model { round: 0, .. })));
    t.at(400, Event::FirstModel).at(401, Event::FirstStored(Err(StoreFailure::Storage("late".into()))));
    assert_eq!((t.last.len(), t.job().phase()), (0, Phase::Open));
}

#[test]
fn a_first_model_that_cannot_be_stored_fails_the_job_with_the_disks_words() {
    let mut document = job(3, 4, 2, "file:///c", "file:///m", "");
    (document.spec.model.initial.uri, document.spec.model.initial.from_first_client) = (None, true);
    let mut t = Table::new(document, Loaded::default(), &[]);
    t.up().alive(0, 6).at(100, Event::FirstModel);
    t.at(200, Event::FirstStored(Err(StoreFailure::Storage("os error 28".into()))));
    assert_eq!(t.job().phase(), Phase::Failed);
    assert!(t.told(|w| matches!(w, ToGateway::Finish { succeeded: false, reason, .. } if reason.contains("error 28"))));
    t.at(300, Event::FirstModel);
    assert_eq!(t.last, []);
}

#[test]
fn a_later_life_knows_that_the_stop_condition_was_met() {
    let stop = "  stop: {metric: accuracy, atLeast: 0.9}\n";
    let ended = || Loaded {
        model: Some((stored(1), SHAPE)),
        token_key: "k".into(),
        ended: Some("accuracy 0.95 reached 0.9".into()),
        ..Loaded::default()
    };
    let document = || job(3, 4, 2, "file:///c", "file:///m", stop);
    let mut t = Table::new(document(), ended(), &[]);
    t.at(0, Event::AgentUp(Node { quota: 1 << 30, cores: 2 })).at(0, Event::GatewayUp(None));
    assert_eq!((t.job().phase(), t.job().committed()), (Phase::Succeeded, 1));
    assert!(t.told(|w| matches!(w, ToGateway::Model { round: 1, .. })), "the model is not served");
    assert!(t.told(|w| matches!(w, ToGateway::Finish { succeeded: true, reason, .. } if reason.contains("0.95"))));
    assert!(!t.last.iter().any(|a| matches!(a, Action::StoreEnd { .. } | Action::Agent(_))), "{:?}", t.last);
    // Updates were acknowledged after it: they are not left behind.
    let ledger = |admitted| ChainState { admitted, model_round: Some(1), ..chain_state(1, "digits", 2) };
    let mut t = Table::new(document(), ended(), &[ledger(1)]);
    t.at(0, Event::AgentUp(Node { quota: 1 << 30, cores: 2 })).at(0, Event::GatewayUp(Some(ledger(1))));
    assert_eq!(t.job().phase(), Phase::Planning);
    // The last writer died between the round's commit and the end: its deposit tells.
    let saved = SavedRound { number: 1, finishing: Some("accuracy 0.95".into()), ..SavedRound::default() };
    let mut t = Table::new(document(), Loaded { ended: None, saved: Some(saved), ..ended() }, &[]);
    t.up();
    assert!(t.last.iter().any(|a| matches!(a, Action::StoreEnd { reason } if reason == "accuracy 0.95")));
    t.at(1, Event::EndStored(Ok(())));
    assert_eq!((t.job().phase(), t.job().committed()), (Phase::Succeeded, 1));
}

#[test]
fn a_status_is_small_and_finite_whatever_clients_measure() {
    let mut t = Table::usual("  stop: {metric: accuracy, atLeast: 0.9}\n");
    t.open();
    let mut complaints = 0;
    for client in 0..50 {
        let mut metrics: std::collections::BTreeMap<_, _> =
            (0..5_000).map(|i| (format!("{client}-{}-{i}", "x".repeat(i % 200)), 1e308)).collect();
        metrics.extend([("inf".to_owned(), f64::INFINITY), ("nan".to_owned(), f64::NAN)]);
        let data = MetricsData { round: 0, samples: u64::MAX, metrics };
        t.at(1, Event::Metrics { client: format!("m{client}"), evaluator: client >= 25, data });
        complaints += t.last.iter().filter(|a| matches!(a, Action::FiguresDropped { .. })).count();
    }
    assert_eq!(complaints, 1, "one line per job");
    for client in ["c0", "c1"] {
        let metrics = [("accuracy".to_owned(), 1e308)].into();
        let data = MetricsData { round: 0, samples: 1_000_000, metrics };
        t.at(2, Event::Metrics { client: client.into(), evaluator: false, data });
    }
    let status = t.job().document().status.clone().unwrap();
    assert!(status.metrics.len() == 64 && status.metrics.values().all(|v| v.is_finite()), "{:?}", status.metrics);
    assert!((status.metrics["accuracy"] / 1e308 - 1.0).abs() < 1e-9);
    let text = serde_json::to_string(&status).unwrap();
    assert!(text.len() < 32 << 10 && !text.contains("null"), "{} bytes", text.len());
    // Nor do many evaluators make it large.
    t.done(3, 1, 4).at(4, Event::Stored(1, Ok(stored(1))));
    let mut t = Table::usual("  stop: {metric: accuracy, atLeast: 0.9}\n");
    for judge in 0..1000 {
        t.at(0, Event::Joined { client: format!("judge{judge:03}"), evaluator: true });
    }
    t.open().done(3, 1, 4).at(4, Event::Stored(1, Ok(stored(1)))).alive(5, 6);
    let (_, reason, message) = t.progressing();
    assert_eq!(reason, "WaitingForEvaluators");
    assert!(message.contains("judge000") && message.ends_with("and 995 more"), "{message}");
}

#[test]
fn a_job_that_waits_says_for_what_from_the_beginning() {
    let mut t = Table::usual("");
    let ready = |t: &mut Table| {
        let status = t.job().document().status.clone().unwrap();
        let c = status.conditions.into_iter().find(|c| c.kind == "Ready").unwrap();
        (c.status == "True", c.message)
    };
    assert_eq!(ready(&mut t), (false, "waits for the agent and the gateway of its node".to_owned()));
    t.at(0, Event::AgentUp(Node { quota: 1 << 30, cores: 2 }));
    assert_eq!(ready(&mut t), (false, "waits for the gateway of its node".to_owned()));
    t.at(0, Event::GatewayUp(None));
    assert!(ready(&mut t).1.ends_with("aggregators are being started"), "{:?}", ready(&mut t));
    let revision = t.job().plan.revision;
    t.at(0, Event::Planned(revision));
    assert!(ready(&mut t).0);
    assert_eq!((t.progressing().0.as_str(), t.progressing().1.as_str()), ("True", "WaitingForClients"));
    // The gateway's answer shows that it has to wait.
    t.alive(1, 1);
    let (status, reason, message) = t.progressing();
    assert_eq!((status.as_str(), reason.as_str()), ("False", "WaitingForClients"));
    assert!(message.contains("1 are alive, 2 are needed"), "{message}");
    t.alive(2, 6);
    assert_eq!((t.progressing().0.as_str(), t.job().phase()), ("True", Phase::Open));
}

#[test]
fn impossible_jobs_fail_with_the_figures_and_the_gateway_hears_it() {
    let loaded = Loaded { model: Some((stored(0), SHAPE)), ..Loaded::default() };
    let mut t = Table::new(job(3, 4, 2, "file:///c", "file:///m", ""), loaded, &[]);
    t.at(0, Event::AgentUp(Node { quota: 10_000, cores: 2 })).at(0, Event::GatewayUp(None));
    assert_eq!(t.job().phase(), Phase::Failed);
    assert!(t.told(|w| matches!(w, ToGateway::Finish { succeeded: false, reason, .. } if reason.contains("10000"))));
    assert!(!t.last.iter().any(|a| matches!(a, Action::Agent(_))));
    assert!(
        !t.told(|w| matches!(w, ToGateway::Model { .. })),
        "there is no memory for it, and Finish would wait behind"
    );
    let status = t.job().document().status.clone().unwrap();
    assert_eq!((status.phase, status.conditions.len()), (Shown::Failed, 3));
    assert!(status.conditions.iter().all(|c| c.status == "False" && c.reason == "QuotaTooSmall"));
}

#[test]
fn chains_are_the_gateways_then_the_checkpoints_then_free_ones() {
    let named = |name: &str, chain, committed: u32| {
        let mut document = job(9, 4, 2, "file:///c", "file:///m", "");
        document.metadata.name = Some(name.into());
        let loaded = Loaded { chain, model: Some((stored(committed), SHAPE)), ..Loaded::default() };
        JobState::new("j".into(), document, None, 0, loaded, 0)
    };
    let known = |name: &str, chain, round| chain_state(chain, name, round);
    let refusal = Refusal { reason: "Conflict", message: "twice".into() };
    let twin = JobState::refused("k".into(), job(1, 1, 1, "file:///c", "file:///m", ""), &refusal, true, 0);
    let mut jobs = Jobs::new(vec![
        named("a", Some(5), 0),
        named("b", Some(5), 0),
        named("c", None, 2),
        named("ahead", Some(9), 1),
        twin,
    ]);
    let retired = jobs.assign(&[known("c", 1, 3), known("ahead", 9, 7)]);
    let chains: Vec<_> = jobs.iter().map(JobState::chain).collect();
    // 'ahead' has 7 rounds at the gateway and 1 on disk: its aggregators cannot go back.
    assert_eq!((chains, retired), (vec![Some(5), Some(2), Some(1), Some(3), None], vec![9]));
    assert!(jobs.assign(&[]).is_empty());
    assert_eq!((jobs.of_chain(5), jobs.of_chain(9)), (Some(0), None));
}

#[test]
fn a_spec_is_followed_as_a_whole_or_not_at_all() {
    let mut t = Table::usual("");
    t.open();
    let change = |generation, more: &str, edit: fn(&mut FederatedJob)| {
        let mut document = job(3, 4, 2, "file:///c", "file:///m", more);
        document.metadata.generation = Some(generation);
        edit(&mut document);
        Event::Changed { generation, change: Ok(Change { document: Box::new(document), join_secret: None }) }
    };
    let accepted = |t: &mut Table| {
        let status = t.job().document().status.clone().unwrap();
        let c = status.conditions.into_iter().find(|c| c.kind == "SpecAccepted");
        c.map(|c| (c.status, c.reason, c.message, c.observed_generation))
    };
    t.at(10, change(2, "", |j| j.spec.round_deadline.0 *= 2));
    assert_eq!(accepted(&mut t), None, "what is followed needs no word");
    assert_eq!(t.job().document().spec.round_deadline.0.as_secs(), 20);
    t.at(20, change(3, "  maxWeight: 5\n", |j| (j.spec.model.name, j.spec.rounds) = ("other".into(), 1)));
    let (status, reason, message, generation) = accepted(&mut t).unwrap();
    assert_eq!((status.as_str(), reason.as_str(), generation), ("False", "FieldFixed", Some(3)));
    assert!(message.starts_with("spec.model.name cannot change") && message.contains("generation 2"), "{message}");
    assert_eq!((t.job().document().spec.rounds, t.job().document().spec.max_weight), (3, 1_000_000));
    t.at(30, Event::Changed { generation: 4, change: Err("spec.rounds: 0 rounds".into()) });
    assert!(
        accepted(&mut t).unwrap().2.starts_with("spec.rounds: 0 rounds; the job goes on"),
        "{:?}",
        accepted(&mut t)
    );
    // Fewer updates are enough: the round closes with those that it has when its time is over.
    t.at(40, Event::Progress { round: 1, admitted: 1 });
    t.at(50, change(5, "", |j| j.spec.min_clients = Some(1)));
    assert_eq!((accepted(&mut t).unwrap().0.as_str(), t.job().phase()), ("True", Phase::Open));
    t.at(10_000, Event::Tick);
    assert_eq!(t.job().phase(), Phase::Closing);
    t.done(10_001, 1, 1).at(10_002, Event::Stored(1, Ok(stored(1))));
    assert_eq!(t.job().phase(), Phase::Gathering);
    t.at(10_003, change(6, "", |j| j.spec.rounds = 1));
    assert_eq!(t.job().phase(), Phase::Succeeded, "all rounds that are wanted are committed");
}

#[test]
fn a_job_that_asks_for_a_journal_where_there_is_none_is_refused() {
    for journal in [true, false] {
        let loaded = Loaded { model: Some((stored(0), SHAPE)), ..Loaded::default() };
        let mut t = Table::new(job(3, 4, 2, "file:///c", "file:///m", "  ackLevel: Disk\n"), loaded, &[]);
        t.job().journal = journal;
        t.at(0, Event::AgentUp(Node { quota: 1 << 30, cores: 2 })).at(0, Event::GatewayUp(None));
        assert_eq!(t.job().phase(), if journal { Phase::Planning } else { Phase::Failed });
    }
}

#[test]
fn numbers_of_chains_that_are_going_are_not_given_again() {
    let named = |name: &str, uid: &str| {
        let mut document = job(9, 4, 2, "file:///c", "file:///m", "");
        (document.metadata.name, document.metadata.uid) = (Some(name.into()), Some(uid.into()));
        JobState::new("j".into(), document, None, 0, Loaded { chain: Some(1), ..Loaded::default() }, 0)
    };
    let at_gateway = |name: &str, chain| chain_state(chain, name, 1);
    let mut jobs = Jobs::new(vec![named("a", "1")]);
    assert!(jobs.assign(&[]).is_empty());
    assert_eq!(jobs.remove(0).unwrap().chain(), Some(1));
    let again = jobs.insert(named("a", "2"));
    // The gateway was away and has the old one still.
    assert_eq!(jobs.assign(&[at_gateway("a", 1)]), [1]);
    assert_eq!((again, jobs.get(again).unwrap().chain(), jobs.of_chain(1)), (1, Some(2), None));
    let hello = [at_gateway("a", 1), at_gateway("a", 2), at_gateway("waits", 5), at_gateway("gone", 6)];
    let mut strays = jobs.strays(&hello, &[2, 5, 6, 9], |key| key.name != "gone");
    strays.sort_unstable();
    assert_eq!(strays, [1, 6, 9]);
}
