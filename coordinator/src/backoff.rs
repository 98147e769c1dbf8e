//! How long to wait after failures.

/// Waits between attempts grow from this, milliseconds...
const FIRST: i64 = 1_000;
/// ...to this.
const MOST: i64 = 60_000;

/// What somebody waits for is tried at least so often, milliseconds: an API server that is away, a Secret or a checkpoint that is
/// missing.
pub(crate) const RETRY_MOST: i64 = 30_000;

/// The wait after so many failures, milliseconds.
pub(crate) fn backoff(failures: u32) -> i64 {
    backoff_up_to(MOST, failures)
}

/// As [`backoff`], never longer than `most`.
pub(crate) fn backoff_up_to(most: i64, failures: u32) -> i64 {
    (FIRST << failures.min(16)).min(most)
}
