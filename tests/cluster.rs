//! On a real Kubernetes: two nodes on this machine (`tests/cluster/cluster`), one for all tests here, down at the end.
//!
//! | module | what it holds |
//! |---|---|
//! | [`machine`] | the cluster: started when the first test wants it, commands, its network |
//! | [`pods`] | the cluster itself: nodes, names, services |
//! | [`objects`] | `lifl-cluster`: client, store, writes; the manifests |
//! | [`platform`] | the platform, rolled out from `manifests/`; what its containers may |
//! | [`functions`] | Knative's pods, served without queue-proxy |
//! | [`events`] | what the agent tells of pods; the API server away |
//! | [`ingress`] | Knative's Ingresses, at each gateway |
//! | [`jobs`] | a FederatedJob on a node |
//! | [`kills`] | deaths and rollouts under [`load`] |
//! | [`app`] | what runs in the pods of these tests |
//! | [`traces`] | that nothing is left |

#[path = "cluster/app.rs"]
mod app;
#[path = "cluster/events.rs"]
mod events;
#[path = "cluster/functions.rs"]
mod functions;
#[path = "cluster/ingress.rs"]
mod ingress;
#[path = "cluster/jobs.rs"]
mod jobs;
#[path = "cluster/kills.rs"]
mod kills;
#[path = "cluster/load.rs"]
mod load;
#[path = "cluster/machine.rs"]
mod machine;
#[path = "cluster/objects.rs"]
mod objects;
#[path = "cluster/platform.rs"]
mod platform;
#[path = "cluster/pods.rs"]
mod pods;
#[path = "cluster/traces.rs"]
mod traces;

#[expect(dead_code, reason = "of the harness only a part is needed here")]
mod harness;

use std::{process::ExitCode, thread};

use harness::Outcome;
use libtest_mimic::{Arguments, Trial};

/// A test on the cluster.
type Case = (&'static str, fn() -> Outcome);

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    match words.next().as_deref() {
        Some(objects::IN_POD) => return objects::in_pod(),
        Some(app::APP) => return app::run(words),
        _ => {}
    }
    let arguments = Arguments::from_args();
    let missing = machine::missing();
    let before = traces::Machine::now();
    let trial = |name: &str, case: Box<dyn FnOnce() -> Outcome + Send>| {
        let why = missing.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        // A thread that has stood beside the nodes ends with its test: it holds their network.
        let case = || thread::spawn(case).join().map_err(|_panic| "it panics")?;
        Trial::test(format!("{name}{why}"), case).with_ignored_flag(missing.is_some())
    };
    let trials = |cases: &[&[Case]]| -> Vec<Trial> {
        cases.iter().copied().flatten().map(|(name, case)| trial(name, Box::new(*case))).collect()
    };
    let on_it = trials(&[
        pods::CASES,
        objects::CASES,
        platform::CASES,
        functions::CASES,
        ingress::CASES,
        events::CASES,
        jobs::CASES,
    ]);
    // One at a time and with nothing beside them: they count what they lose.
    let alone = Arguments { test_threads: Some(1), ..arguments.clone() };
    let down = trial("cluster_down_leaves_nothing", Box::new(move || traces::down_leaves_nothing(&before)));
    let ended = [
        libtest_mimic::run(&arguments, on_it),
        libtest_mimic::run(&alone, trials(&[kills::CASES, events::ALONE])),
        libtest_mimic::run(&alone, vec![down]),
    ];
    if missing.is_none() && !arguments.list {
        machine::down();
    }
    ended.iter().find(|ended| ended.has_failed()).map_or(ExitCode::SUCCESS, libtest_mimic::Conclusion::exit_code)
}
