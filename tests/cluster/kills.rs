//! What dies and what is replaced under load: requests are counted, clients repeat nothing.
//!
//! What may be lost is what the gateway that dies has in its hands: each request that is lost was in flight then. How many those
//! are is the machine's speed, so their share is judged in the long run only, with an optimised build:
//! `LIFL_KILL_SECONDS=600 LIFL_KILL_EVERY=30 LIFL_KILL_RPS=500 LIFL_IMAGE=.../image/lifl`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    Case,
    functions::Golden,
    harness::{Outcome, ensure, http::Call, until, up::kill},
    load::{self, Plan, Record, Road, Sent},
    machine::Cluster,
    platform::{platform, pod_on, pods_of, processes, rolled_out},
};

pub(crate) const CASES: &[Case] = &[
    ("cluster_kills_cost_what_was_in_flight", kills_cost_what_was_in_flight),
    ("cluster_rollouts_cost_nothing", rollouts_cost_nothing),
];

/// Whose node it is.
const NODE: &str = "node1";
/// Share that is answered in a long run, and the time between two of its kills.
const ANSWERED: f64 = 0.999;
const LONG_RUN: Duration = Duration::from_secs(30);
/// A request that began so long before a kill may have been on its way.
const ON_ITS_WAY: Duration = Duration::from_millis(5);
/// A rollout is loaded on for so long.
const AFTERWARDS: Duration = Duration::from_secs(10);
/// How long the app takes.
const WORK: Duration = Duration::from_millis(20);

/// One kill.
#[derive(Clone, Copy, Debug)]
struct Kill {
    victim: &'static str,
    at: Instant,
}

fn setting(name: &str, default: u32) -> u32 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn plan(namespace: &str, cluster: &Cluster, lasts: Duration) -> Outcome<Plan> {
    cluster.namespace(namespace)?;
    let listens = &["127.0.0.1:8080"];
    // Its concurrency is bounded at 25, ten times as many wait: 500 a second of 20 ms are 10 at once.
    let address = Golden { of: "one-revision.yaml", namespace, name: "blue", node: NODE, listens }.ready(cluster)?;
    let per_second = setting("LIFL_KILL_RPS", 100);
    Ok(Plan { to: format!("{address}:8012").parse()?, host: "shop.example.com".to_owned(), per_second, lasts })
}

/// Sends requests while `meanwhile` does what it does, beside it and on the same network.
fn under_load<T: Send>(plan: &Plan, meanwhile: impl FnOnce() -> Outcome<T> + Send) -> Outcome<(Record, T)> {
    let (started, begun) = tokio::sync::oneshot::channel();
    let ended = Arc::new(AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    thread::scope(|scope| {
        let until = ended.clone();
        let loading = scope.spawn(|| runtime.block_on(load::run(plan.clone(), started, until)));
        begun.blocking_recv().map_err(|_ended| "the load did not begin")?;
        let done = meanwhile();
        ended.store(true, Ordering::Relaxed);
        let record = loading.join().map_err(|_panic| "the load panics")??;
        Ok((record, done?))
    })
}

fn counts(plan: &Plan) -> Outcome<Value> {
    Ok(Call::get("/counts").to(plan.to, Duration::from_secs(10))?.json())
}

fn kills_cost_what_was_in_flight() -> Outcome {
    let cluster = platform()?;
    let (lasts, every) = (setting("LIFL_KILL_SECONDS", 60), setting("LIFL_KILL_EVERY", 6));
    let plan = plan("kills", &cluster, Duration::from_secs(lasts.into()))?;
    let every = Duration::from_secs(every.into());
    let (record, kills) = under_load(&plan, || {
        let begin = Instant::now();
        let mut kills: Vec<Kill> = Vec::new();
        // The last one has its time too.
        while begin.elapsed() + every < plan.lasts {
            thread::sleep(every);
            let victim = ["gateway", "agent"][kills.len() % 2];
            kills.push(kill_child(&cluster, victim)?);
        }
        Ok(kills)
    })?;
    let counted = counts(&plan)?;
    tell(&record, &kills);
    ensure(counted["twice"] == serde_json::json!([]), || format!("sent on more than once: {counted}"))?;
    let deaths = kills.iter().filter(|kill| kill.victim == "gateway");
    // A connection from before a death may be used before its client has heard of its end.
    let in_flight =
        |sent: &Sent| deaths.clone().any(|kill| sent.connected <= kill.at + ON_ITS_WAY && kill.at <= sent.ended);
    let without_cause: Vec<&Sent> = record.unanswered().filter(|sent| !in_flight(sent)).collect();
    ensure(without_cause.is_empty(), || {
        let of = without_cause.len();
        let steps = kills.iter().map(|kill| (kill.victim, kill.at)).collect::<Vec<_>>();
        format!("{of} were not in flight when a gateway died:\n{}", when_lost(&without_cause, &steps))
    })?;
    let unheard: Vec<_> = kills
        .iter()
        .enumerate()
        .filter(|(at, kill)| {
            let next = kills.get(at + 1).map(|next| next.at);
            let between = |sent: &&Sent| sent.began >= kill.at && next.is_none_or(|next| sent.ended <= next);
            !record.sent.iter().filter(between).any(|sent| sent.fault.is_none() && sent.road != Road::Kept)
        })
        .map(|(_, kill)| kill.victim)
        .collect();
    ensure(unheard.is_empty(), || {
        format!("no new connection was answered between a kill and the next one: {unheard:?}")
    })?;
    ensure(every < LONG_RUN || record.answered() >= ANSWERED, || format!("{:.5} answered", record.answered()))
}

/// SIGKILL to the component itself; its parent starts it again.
fn kill_child(cluster: &Cluster, component: &'static str) -> Outcome<Kill> {
    let pod = pod_on(cluster, component, NODE)?;
    let pid = until("the component", || processes(&pod, &[component]).first().copied())?;
    let at = Instant::now();
    kill(pid);
    Ok(Kill { victim: component, at })
}

/// Figures for people.
fn tell(record: &Record, kills: &[Kill]) {
    let begin = record.sent.iter().map(|sent| sent.began).min();
    let last = record.sent.iter().map(|sent| sent.ended).max().zip(begin).map(|(end, begin)| end - begin);
    let of = |road: Road| record.sent.iter().filter(|sent| sent.road == road).count();
    eprintln!(
        "kills: {} requests ({} fresh, {} kept, {} POST) in {:?}, {} kills, {} not answered: {:.5} answered; {} streams cut",
        record.sent.len(),
        of(Road::Fresh),
        of(Road::Kept),
        of(Road::Post),
        last.unwrap_or_default(),
        kills.len(),
        record.unanswered().count(),
        record.answered(),
        record.cut.len(),
    );
    for victim in ["gateway", "agent"].into_iter().filter(|victim| kills.iter().any(|kill| kill.victim == *victim)) {
        let gaps = kills.iter().filter(|kill| kill.victim == victim).filter_map(|kill| {
            let later = record
                .sent
                .iter()
                .filter(|sent| sent.began >= kill.at && sent.fault.is_none() && sent.road != Road::Kept);
            Some(later.map(|sent| sent.ended).min()?.duration_since(kill.at).saturating_sub(WORK))
        });
        let gaps: Vec<String> = gaps.map(|gap| format!("{} ms", gap.as_millis())).collect();
        eprintln!("kills: {victim}: first new connection answered after {}", gaps.join(", "));
    }
}

/// `kubectl rollout restart` of both, with everything answered.
fn rollouts_cost_nothing() -> Outcome {
    let cluster = platform()?;
    let plan = plan("rollouts", &cluster, Duration::ZERO)?;
    let old = pods_of(&cluster, "gateway")?;
    let (record, steps) = under_load(&plan, || {
        let mut steps = vec![("before", Instant::now())];
        for component in ["gateway", "agent"] {
            steps.push((component, Instant::now()));
            cluster.kubectl(&format!("-n lifl-system rollout restart daemonset/{component}"))?;
            rolled_out(&cluster, "daemonset", component)?;
        }
        steps.push(("after", Instant::now()));
        // The old gateways go on for their lame-duck time, the new agents take over what there is.
        until("the old gateways' end", || old.iter().all(|pod| processes(pod, &["gateway"]).is_empty()).then_some(()))?;
        thread::sleep(AFTERWARDS);
        Ok(steps)
    })?;
    let counted = counts(&plan)?;
    tell(&record, &[]);
    ensure(counted["twice"] == serde_json::json!([]), || format!("sent on more than once: {counted}"))?;
    let lost: Vec<_> = record.unanswered().collect();
    ensure(lost.is_empty(), || format!("{} lost:\n{}", lost.len(), when_lost(&lost, &steps)))
}

/// Losses by tenths of a second after the step before them; how late the load was then, and how long they took.
fn when_lost(lost: &[&Sent], steps: &[(&'static str, Instant)]) -> String {
    let mut lines: BTreeMap<_, Lost> = BTreeMap::new();
    for sent in lost {
        let Some(step) = steps.iter().rev().find(|(_, at)| *at <= sent.began).or(steps.first()) else { continue };
        let tenth = sent.began.saturating_duration_since(step.1).as_millis() / 100;
        let fault = sent.fault.as_deref().unwrap_or_default().trim_end();
        let line = lines.entry((step.1, tenth, format!("{:?}", sent.road), fault)).or_default();
        let (late, took) = (sent.late.max(line.late), (sent.ended - sent.began).max(line.took));
        *line = Lost { step: step.0, count: line.count + 1, late, took };
    }
    let told = lines.iter().map(|((_, tenth, road, fault), Lost { step, count, late, took })| {
        format!("{step} +{tenth}00 ms: {count} {road}, late by {late:?}, within {took:?}: {fault}")
    });
    told.collect::<Vec<_>>().join("\n")
}

/// Requests of one kind that were lost at once.
#[derive(Debug, Default)]
struct Lost {
    step: &'static str,
    count: u32,
    late: Duration,
    took: Duration,
}
