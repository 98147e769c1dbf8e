//! The node gateway: the only network endpoint of a node.
