//! How long to wait after failures.

/// Waits between attempts grow from this, milliseconds...
const FIRST: i64 = 1_000;
/// ...to this.
const MOST: i64 = 60_000;

/// The wait after so many failures, milliseconds.
pub(crate) fn backoff(failures: u32) -> i64 {
    (FIRST << failures.min(16)).min(MOST)
}
