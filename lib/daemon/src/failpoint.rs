//! Places where a test has a process die.

use std::sync::{
    OnceLock,
    atomic::{AtomicU32, Ordering},
};

use rustix::process::{Signal, getpid, kill_process};

struct Armed {
    name: String,
    left: AtomicU32,
}

static ARMED: OnceLock<Armed> = OnceLock::new();

/// Kills this process as `kill -9` would, if it was armed for `name`: how the tests reach each transition of a round.
/// Otherwise one atomic load.
pub fn failpoint(name: &str) {
    if let Some(armed) = ARMED.get()
        && armed.name == name
        && armed.left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        let _nothing_is_left_to_tell = kill_process(getpid(), Signal::KILL);
    }
}

/// Arms `name:n`: the n-th time that `name` is passed is the last.
pub fn arm_failpoint(text: &str) {
    let (name, count) = text.split_once(':').unwrap_or((text, "1"));
    let left = AtomicU32::new(count.parse().unwrap_or(1));
    let _first_arming_counts = ARMED.set(Armed { name: name.to_owned(), left });
}
