//! What the tests of the whole platform share: `lifl up` as a child process, clients that are no part of it, and the oracle.
//!
//! | module | what it holds |
//! |---|---|
//! | [`up`] | the process: started, asked, killed, ended |
//! | [`http`] | one request, as a stranger's client would make it: only `std` |
//! | [`job`] | a small job: its manifest, its first model |
//! | [`client`] | clients that send known values and note what was acknowledged |
//! | [`oracle`] | receipts and models against what was sent |

pub(crate) mod client;
pub(crate) mod http;
pub(crate) mod job;
pub(crate) mod oracle;
pub(crate) mod up;

use std::time::{Duration, Instant};

/// A failure with a sentence.
pub(crate) type Outcome<T = ()> = Result<T, libtest_mimic::Failed>;

/// What a test waits for at most; reaching it is a failure, no measure of speed.
///
/// Shorter than the 60 s after which the coordinator restarts the aggregators of a closed round that brings no model: that would
/// hide a stall.
pub(crate) const PATIENCE: Duration = Duration::from_secs(50);
/// Pause between two looks at something that tells nobody when it changes.
const LOOK: Duration = Duration::from_millis(10);

/// Waits until `look` finds something; fails with `what` after [`PATIENCE`].
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Outcome<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(format!("waited {PATIENCE:?} for {what}").into());
        }
        std::thread::sleep(LOOK);
    }
}

/// Fails with a sentence unless `holds`.
pub(crate) fn ensure(holds: bool, why: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(why().into()) }
}

/// Why eBPF cannot be tried here, if so.
pub(crate) fn no_ebpf() -> Option<&'static str> {
    (!rustix::process::geteuid().is_root()).then_some("not root: eBPF cannot be loaded")
}
