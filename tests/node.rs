//! The parts of a Kubernetes node as processes of their own, with a pod in a network namespace: `lifl node agent` and `lifl node
//! gateway` are killed, replaced and drained while requests come in, and none is refused, reset or left without its answer.
//!
//! The API server is played: it knows one pod. Everything else is real.

#[path = "node/api.rs"]
mod api;
#[path = "node/app.rs"]
mod app;
#[path = "../agent/tests/node/mod.rs"]
#[expect(dead_code, reason = "the agent's tests use the rest")]
mod namespaces;
#[path = "node/parts.rs"]
mod parts;

#[expect(dead_code, reason = "of the harness only a part is needed here")]
mod harness;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use harness::{Outcome, ensure};
use libtest_mimic::{Arguments, Trial};

use crate::{
    app::{App, Load, Slow},
    parts::{Part, World},
};

type Run = fn() -> Outcome;

/// So many looks in a row find nothing new where nothing moves.
const LOOKS: usize = 20;

/// Tests by the names of their functions.
macro_rules! trials {
    ($($name:ident),* $(,)?) => { [$((stringify!($name), $name as Run)),*] };
}

fn main() {
    let why_not = namespaces::why_not();
    let trials = trials![
        an_agent_that_is_replaced_goes_on_with_the_pods_listeners,
        a_gateway_that_surges_takes_the_pods_over,
        an_agent_that_dies_knows_the_newer_gateway_only,
        a_gateway_that_goes_without_a_successor_leaves_nobody_refused,
        a_webhook_has_its_own_certificate_trusted,
        processes_that_die_are_started_again_by_their_parents,
    ];
    let trials = trials.into_iter().map(|(name, run)| {
        // libtest-mimic shows no reasons, so the name tells it.
        let why = why_not.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        Trial::test(format!("{name}{why}"), run).with_ignored_flag(why_not.is_some())
    });
    // One after another, as the agent's: children that one starts have copies of another's sockets for a moment.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

/// Asks until the answer is yes.
fn until(what: &str, mut asked: impl FnMut() -> Outcome<bool>) -> Outcome {
    harness::until(what, || asked().map(|yes| yes.then_some(())).transpose())?
}

/// A node whose pod is served: what each trial begins with.
fn serving() -> Outcome<(World, Part, Part, App, Load)> {
    serving_with("1s")
}

fn serving_with(lame_duck: &str) -> Outcome<(World, Part, Part, App, Load)> {
    let world = World::new()?;
    let app = App::start(&world)?;
    let agent = world.agent()?;
    let gateway = world.gateway_with(lame_duck)?;
    gateway.ready()?;
    until("the pod's first answer", || {
        agent.lives()?;
        gateway.lives()?;
        Ok(app::ask(&world, "/first")?.is_ok())
    })?;
    let load = Load::start(&world)?;
    load.goes_on("at the beginning")?;
    Ok((world, agent, gateway, app, load))
}

fn an_agent_that_is_replaced_goes_on_with_the_pods_listeners() -> Outcome {
    let (world, agent, gateway, app, load) = serving()?;
    agent.kill_all()?;
    // Its sockets for the pod's loopback are used up; whoever comes then waits for the next agent.
    let mut looks = [None; LOOKS];
    until("the last socket's use", || {
        looks.rotate_left(1);
        looks[LOOKS - 1] = Some(app.answered());
        Ok(looks[0].is_some() && looks.iter().all(|look| *look == looks[0]))
    })?;
    let next = world.agent()?;
    next.says("pod taken over from the gateway")?;
    load.goes_on("after the agent's replacement")?;
    ensure(!next.has_said("pod cannot be served")?, || "it opened what the gateway holds".to_owned())?;
    // The next one keeps what it took over: its own child may die like any other.
    next.kill_child()?;
    load.goes_on("after the death of the next agent's child")?;
    // ... and so may the gateway's, which gets its listeners from it.
    load.ended()?;
    gateway.kill_child()?;
    until("the gateway's next life", || Ok(app::ask(&world, "/again")?.is_ok()))?;
    ensure(app.answered() > 0, || "nothing was answered".to_owned())
}

fn a_gateway_that_surges_takes_the_pods_over() -> Outcome {
    let (world, _agent, old, app, load) = serving()?;
    let slow = Slow::start(&world)?;
    app.has_slow()?;
    let new = world.gateway()?;
    new.ready()?;
    old.says("another gateway of this node serves the pods")?;
    until("the new gateway's pod", || Ok(new.status()?["components"]["gateway"]["status"]["pods"][0].is_object()))?;
    load.goes_on("by the new gateway")?;
    old.terminate()?;
    old.not_ready()?;
    ensure(!slow.is_done(), || "the slow request is done before its time".to_owned())?;
    app.let_slow_go();
    slow.answered()?;
    old.exits()?;
    load.goes_on("without the old gateway")?;
    load.ended()
}

fn an_agent_that_dies_knows_the_newer_gateway_only() -> Outcome {
    let (world, agent, old, _app, load) = serving()?;
    let new = world.gateway()?;
    new.ready()?;
    old.says("another gateway of this node serves the pods")?;
    load.goes_on("by the new gateway")?;
    let began = "another gateway: chains end";
    agent.says(began)?;
    agent.kill_child()?;
    load.goes_on("after the death of the agent's child")?;
    agent.kill_all()?;
    let next = world.agent()?;
    next.says("pod taken over from the gateway")?;
    load.goes_on("after the agent's replacement")?;
    ensure(!next.has_said(began)?, || "the old gateway was taken first".to_owned())?;
    old.terminate()?;
    old.exits()?;
    load.goes_on("without the old gateway")?;
    load.ended()
}

fn a_gateway_that_goes_without_a_successor_leaves_nobody_refused() -> Outcome {
    let (world, _agent, old, app, load) = serving_with("10s")?;
    let slow = Slow::start(&world)?;
    app.has_slow()?;
    old.terminate()?;
    old.not_ready()?;
    // Accepted on still, for those who do not know yet.
    load.answers(3, "in the lame-duck time")?;
    app.let_slow_go();
    slow.answered()?;
    old.exits()?;
    // Nobody accepts; the listeners are the agent's, and whoever connects waits.
    let new = world.gateway()?;
    new.ready()?;
    load.goes_on("by the next gateway")?;
    load.ended()
}

fn a_webhook_has_its_own_certificate_trusted() -> Outcome {
    let world = World::new()?;
    let webhook = world.webhook()?;
    webhook.ready()?;
    until("its certificate's root", || {
        webhook.lives()?;
        Ok(world.patch().is_some())
    })?;
    let patch = world.patch().unwrap_or_default();
    let webhooks = patch["webhooks"].as_array().ok_or_else(|| format!("{patch}"))?;
    let names: Vec<&str> = webhooks.iter().filter_map(|webhook| webhook["name"].as_str()).collect();
    ensure(names == ["pods", "namespaces"], || format!("{patch}"))?;
    let roots: Vec<&str> = webhooks.iter().filter_map(|w| w["clientConfig"]["caBundle"].as_str()).collect();
    let pem = BASE64_STANDARD.decode(roots.first().ok_or("no root")?)?;
    let is_pem = pem.starts_with(b"-----BEGIN CERTIFICATE-----");
    ensure(is_pem && roots.len() == 2 && roots[0] == roots[1], || format!("{patch}"))?;
    webhook.terminate()?;
    webhook.exits()
}

fn processes_that_die_are_started_again_by_their_parents() -> Outcome {
    let (world, agent, gateway, _app, load) = serving()?;
    agent.kill_child()?;
    load.goes_on("after the death of the agent's child")?;
    load.ended()?;
    let limit = gateway.limit_of_child()?;
    ensure(limit.0 == limit.1, || format!("open files: {limit:?}"))?;
    // What waits in the listener's queue outlives the gateway that would have accepted it.
    gateway.kill_child()?;
    let waits = app::ask(&world, "/meanwhile")?;
    ensure(waits.is_ok(), || format!("{waits:?}"))?;
    gateway.ready()?;
    // A port that is taken is told at once, by the name of its flag.
    let said = world.refused(&["gateway", "--http", &gateway.admin().to_string()])?;
    ensure(said.contains("for --http") && said.contains("is another lifl running?"), || said.clone())?;
    let said = world.refused(&["agent", "--node-name=n", "--socket=/nowhere/node.sock"])?;
    ensure(said.contains("is the node's folder mounted there?"), || said.clone())
}
