//! Words: Kubernetes kinds, HTTP documents and node messages that more than one component speaks.
