//! The proxy as its clients and endpoints see it: bytes on sockets.

mod forwarding;
mod http2;
mod knative;
mod limits;
mod rig;
mod timeouts;
