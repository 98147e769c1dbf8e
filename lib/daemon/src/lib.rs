//! The skeleton of a process: logs, metrics, the channel to its parent, readiness, drain.
