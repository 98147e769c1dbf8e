//! The aggregator function: receive, fold, send; leaf, middle and top are one and the same.
