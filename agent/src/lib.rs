//! The node agent: eBPF, segments, sockets and function processes of a node.
