//! Where a request goes, and how a connection to there is made.

use std::{future::Future, io, net::SocketAddr};

use tokio::net::TcpStream;

/// What is spoken on a connection to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// HTTP/1.1.
    H1,
    /// HTTP/2 without TLS, by prior knowledge.
    H2c,
}

/// A place that answers requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// Its address, as seen from its place.
    pub addr: SocketAddr,
    /// What it speaks.
    pub protocol: Protocol,
    /// 0: this process's own network; otherwise the key of a network namespace that the [`Dial`] knows.
    pub place: u64,
}

/// Makes connections. The agent hands out unconnected sockets of a pod's network namespace; a test may refuse.
pub trait Dial: Send + Sync + 'static {
    /// Connects to `to`.
    ///
    /// # Errors
    /// Whatever keeps the connection from being made.
    fn dial(&self, to: &Endpoint) -> impl Future<Output = io::Result<TcpStream>> + Send;
}

/// Dials from this process's own network, whatever the place.
#[derive(Clone, Copy, Debug, Default)]
pub struct Direct;

// === impl Endpoint ===

impl Endpoint {
    /// An endpoint in this process's own network.
    #[must_use]
    pub const fn plain(addr: SocketAddr, protocol: Protocol) -> Self {
        Self { addr, protocol, place: 0 }
    }
}

// === impl Direct ===

impl Dial for Direct {
    async fn dial(&self, to: &Endpoint) -> io::Result<TcpStream> {
        TcpStream::connect(to.addr).await
    }
}
