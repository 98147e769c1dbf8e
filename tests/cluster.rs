//! On a real Kubernetes: two nodes on this machine (`tests/cluster/cluster`), one for all tests here, down at the end.
//!
//! | module | what it holds |
//! |---|---|
//! | [`machine`] | the cluster: started when the first test wants it, commands, its network |
//! | [`pods`] | the cluster itself: nodes, names, services |
//! | [`objects`] | `lifl-cluster`: client, store, writes; the manifests |
//! | [`traces`] | that nothing is left |

#[path = "cluster/machine.rs"]
mod machine;
#[path = "cluster/objects.rs"]
mod objects;
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
    if std::env::args().nth(1).as_deref() == Some(objects::IN_POD) {
        return objects::in_pod();
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
    let cases = pods::CASES.iter().chain(objects::CASES);
    let trials = cases.map(|(name, case)| trial(name, Box::new(*case))).collect();
    let on_it = libtest_mimic::run(&arguments, trials);
    let last = trial("cluster_down_leaves_nothing", Box::new(move || traces::down_leaves_nothing(&before)));
    let after_it = libtest_mimic::run(&arguments, vec![last]);
    if missing.is_none() && !arguments.list {
        machine::down();
    }
    if on_it.has_failed() { on_it.exit_code() } else { after_it.exit_code() }
}
