//! TLS below a server: connections that shake hands while they are served.

use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustls::{ServerConfig, SupportedProtocolVersion, crypto::CryptoProvider, server::ResolvesServerCert};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{Accept, TlsAcceptor, server::TlsStream};

/// A connection that shakes hands when it is read for the first time: so the handshake is a part of what the server serves, it has
/// no more time than a first head, and the server's end neither forgets it nor waits for it longer than for others.
pub struct Secured(Stage);

enum Stage {
    Shaking(Accept<TcpStream>),
    Open(TlsStream<TcpStream>),
    /// No hands were shaken.
    Failed,
}

/// A configuration for what is served here: HTTP/2 where the client can, and any certificate that is there when it asks.
///
/// # Errors
/// When nothing is left to speak.
pub fn configured(
    provider: CryptoProvider,
    versions: &[&'static SupportedProtocolVersion],
    certificates: Arc<dyn ResolvesServerCert>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let builder = ServerConfig::builder_with_provider(Arc::new(provider)).with_protocol_versions(versions)?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// For [`Server::listen_with`](crate::Server::listen_with).
pub fn secured(config: Arc<ServerConfig>) -> impl Fn(TcpStream) -> Secured + Send + 'static {
    let acceptor = TlsAcceptor::from(config);
    move |stream| Secured(Stage::Shaking(acceptor.accept(stream)))
}

// === impl Secured ===

impl Secured {
    fn open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Pin<&mut TlsStream<TcpStream>>>> {
        if let Stage::Shaking(accept) = &mut self.0 {
            match ready!(Pin::new(accept).poll(cx)) {
                Ok(stream) => self.0 = Stage::Open(stream),
                Err(error) => {
                    tracing::debug!(%error, "TLS handshake");
                    self.0 = Stage::Failed;
                    return Poll::Ready(Err(error));
                }
            }
        }
        Poll::Ready(match &mut self.0 {
            Stage::Open(stream) => Ok(Pin::new(stream)),
            Stage::Shaking(_) | Stage::Failed => Err(io::ErrorKind::NotConnected.into()),
        })
    }
}

impl AsyncRead for Secured {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.open(cx))?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.open(cx))?.poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.open(cx))?.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        matches!(&self.0, Stage::Open(stream) if stream.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.open(cx))?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Stage::Open(stream) => Pin::new(stream).poll_shutdown(cx),
            Stage::Shaking(_) | Stage::Failed => Poll::Ready(Ok(())),
        }
    }
}

impl fmt::Debug for Secured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secured").finish_non_exhaustive()
    }
}
