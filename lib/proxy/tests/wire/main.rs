//! The proxy as its clients and endpoints see it: bytes on sockets.

mod ending;
mod forwarding;
mod golden;
mod http2;
mod knative;
mod limits;
mod pool;
mod readiness;
mod rig;
mod stalls;
mod timeouts;
mod tunnels;
mod websocket;
