//! The coordinator of federated jobs: rounds, selection, commits, checkpoints.
