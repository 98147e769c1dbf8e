//! Clients that mean harm, against a proxy in a process of its own: its memory is looked at from outside, and others go on being
//! served meanwhile.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

mod floods;
mod frames;
mod honest;
mod process;
mod slow;

type Outcome = Result<(), Failed>;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [first, endpoint, connections, stall] = &words[..]
        && first == process::PROXY
    {
        return process::proxy(endpoint, connections, stall);
    }
    let mut arguments = Arguments::from_args();
    // One proxy's floods are another one's noise.
    arguments.test_threads.get_or_insert(1);
    let floods = floods::ROWS.iter().map(|row| Trial::test(format!("flood_{}", row.name), || floods::run(row)));
    let windows = Trial::test("stalled_streams_starve_nobody", floods::stalled_streams_starve_nobody);
    let why_not = slow::why_not();
    let why = why_not.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
    let slow = Trial::test(format!("ten_thousand_slow_clients{why}"), slow::run).with_ignored_flag(why_not.is_some());
    libtest_mimic::run(&arguments, floods.chain([windows, slow]).collect()).exit_code()
}

/// Runs a test on a runtime of its own.
fn block_on(test: impl Future<Output = Outcome>) -> Outcome {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(test)
}
