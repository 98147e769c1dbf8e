//! The opponent: tonic, its service written by hand.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use anyhow::Context as _;
use bytes::{Buf, BufMut, Bytes};
use lifl_fold::{as_f32, as_f32_mut};
use tokio::sync::Mutex;
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::NamedService,
    transport::{Channel, Endpoint, Server, server::TcpIncoming},
};
use tonic_prost::ProstCodec;

use super::{clock, top::Memory};

/// Larger than any update: flow control never waits.
const WINDOW: u32 = 1 << 30;

/// The largest that HTTP/2 has.
const FRAME: u32 = (1 << 24) - 1;

/// A message and its header.
const MESSAGE: usize = 8 << 20;

/// How the opponent carries an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// Each message is bytes and nothing else; received whole.
    Raw,
    /// Protobuf with a field of bytes; received whole, then folded.
    Bytes,
    /// The same, each message folded when it comes and stored nowhere.
    EachChunk,
    /// Protobuf with packed floats; received whole, then folded.
    Floats,
}

/// Protobuf: part of an update.
#[derive(Clone, PartialEq, prost::Message)]
struct BytesChunk {
    #[prost(bytes = "bytes", tag = "1")]
    data: Bytes,
}

/// Protobuf: part of an update as numbers.
#[derive(Clone, PartialEq, prost::Message)]
struct FloatsChunk {
    #[prost(float, repeated, tag = "1")]
    values: Vec<f32>,
}

/// Protobuf: when the receiver had it all.
#[derive(Clone, PartialEq, prost::Message)]
struct Had {
    #[prost(uint64, tag = "1")]
    at: u64,
}

/// Bytes as they are, in both directions.
#[derive(Clone, Copy, Debug, Default)]
struct Plain;

/// A message that holds consecutive floats.
trait Part: Send + Sync + 'static {
    fn of(bytes: Bytes) -> Self;
    /// Copies them to the beginning of `to`; how many bytes they are.
    fn place(&self, to: &mut [u8]) -> Option<usize>;
    /// Them, where they need no conversion.
    fn bytes(&self) -> Option<&[u8]>;
}

/// The service.
#[derive(Clone)]
struct Service {
    memory: Arc<Mutex<Memory>>,
}

/// Serves on a port of its own.
pub(super) async fn serve(memory: Arc<Mutex<Memory>>) -> anyhow::Result<SocketAddr> {
    let incoming = TcpIncoming::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?.with_nodelay(Some(true));
    let address = incoming.local_addr()?;
    let server = Server::builder()
        .initial_connection_window_size(WINDOW)
        .initial_stream_window_size(WINDOW)
        .max_frame_size(FRAME)
        .add_service(Service { memory })
        .serve_with_incoming(incoming);
    tokio::spawn(server);
    Ok(address)
}

/// Connects to the top.
pub(super) async fn connect(port: u16) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}"))?
        .tcp_nodelay(true)
        .initial_connection_window_size(WINDOW)
        .initial_stream_window_size(WINDOW);
    endpoint.connect().await.context("cannot connect to the top's gRPC server")
}

/// Carries one update; when it was sent and when the top had it.
pub(super) async fn call(channel: &Channel, how: How, update: Bytes, chunk: usize) -> anyhow::Result<(u64, u64)> {
    let sent = clock::now();
    let had = match how {
        How::Raw => {
            let mut had: Bytes = stream::<Bytes, _, _>(channel, how, update, chunk, Plain).await?;
            had.get_u64()
        }
        How::Bytes | How::EachChunk => {
            stream::<BytesChunk, Had, _>(channel, how, update, chunk, ProstCodec::default()).await?.at
        }
        How::Floats => stream::<FloatsChunk, Had, _>(channel, how, update, chunk, ProstCodec::default()).await?.at,
    };
    Ok((sent, had))
}

async fn stream<M: Part, R, C>(channel: &Channel, how: How, update: Bytes, chunk: usize, codec: C) -> anyhow::Result<R>
where
    R: Send + Sync + 'static,
    C: Codec<Encode = M, Decode = R>,
{
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await?;
    let mut request = Request::new(futures_util::stream::iter(
        (0..update.len()).step_by(chunk).map(move |at| M::of(update.slice(at..update.len().min(at + chunk)))),
    ));
    request.metadata_mut().insert("how", how.word().parse()?);
    let path = http::uri::PathAndQuery::from_static("/lifl.bench.Handoff/Update");
    Ok(client.client_streaming(request, path, codec).await?.into_inner())
}

async fn receive<M: Part>(memory: Arc<Mutex<Memory>>, how: How, request: Request<Streaming<M>>) -> Result<u64, Status> {
    let mut stream = request.into_inner();
    let mut memory = memory.lock().await;
    let mut length = 0;
    while let Some(part) = stream.message().await? {
        let placed = match how {
            How::EachChunk => part.bytes().and_then(|bytes| memory.fold_part(length, bytes)),
            How::Raw | How::Bytes | How::Floats => memory.received.get_mut(length..).and_then(|to| part.place(to)),
        };
        length += placed.ok_or_else(|| Status::invalid_argument("a message that fits nowhere"))?;
    }
    memory.length = length;
    match how {
        How::Raw => {}
        How::EachChunk => memory.swap(),
        How::Bytes | How::Floats => memory.fold_received().map_err(|error| Status::internal(error.to_string()))?,
    }
    let had = clock::now();
    drop(memory);
    Ok(had)
}

// === impl How ===

impl How {
    /// Names of its series: latency and processor time.
    pub(super) const fn series(self) -> (&'static str, &'static str) {
        match self {
            Self::Raw => ("grpc raw, latency", "grpc raw, cpu"),
            Self::Bytes => ("grpc bytes and fold, latency", "grpc bytes and fold, cpu"),
            Self::EachChunk => ("grpc bytes and fold each chunk, latency", "grpc bytes and fold each chunk, cpu"),
            Self::Floats => ("grpc floats and fold, latency", "grpc floats and fold, cpu"),
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Bytes => "bytes",
            Self::EachChunk => "each-chunk",
            Self::Floats => "floats",
        }
    }

    fn of(headers: &http::HeaderMap) -> Option<Self> {
        let word = headers.get("how")?.to_str().ok()?;
        [Self::Raw, Self::Bytes, Self::EachChunk, Self::Floats].into_iter().find(|how| how.word() == word)
    }
}

// === impl Part ===

impl Part for Bytes {
    fn of(bytes: Bytes) -> Self {
        bytes
    }

    fn place(&self, to: &mut [u8]) -> Option<usize> {
        to.get_mut(..self.len())?.copy_from_slice(self);
        Some(self.len())
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(self)
    }
}

impl Part for BytesChunk {
    fn of(data: Bytes) -> Self {
        Self { data }
    }

    fn place(&self, to: &mut [u8]) -> Option<usize> {
        self.data.place(to)
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(&self.data)
    }
}

impl Part for FloatsChunk {
    fn of(bytes: Bytes) -> Self {
        Self { values: as_f32(&bytes).map(<[f32]>::to_vec).unwrap_or_default() }
    }

    fn place(&self, to: &mut [u8]) -> Option<usize> {
        let length = self.values.len() * size_of::<f32>();
        as_f32_mut(to.get_mut(..length)?)?.copy_from_slice(&self.values);
        Some(length)
    }

    fn bytes(&self) -> Option<&[u8]> {
        None
    }
}

// === impl Service ===

impl NamedService for Service {
    const NAME: &'static str = "lifl.bench.Handoff";
}

impl tower::Service<http::Request<Body>> for Service {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let memory = Arc::clone(&self.memory);
        let Some(how) = How::of(request.headers()) else {
            return Box::pin(async { Ok(Status::unimplemented("no such way").into_http()) });
        };
        let had = |at: u64| Response::new(Had { at });
        Box::pin(async move {
            Ok(match how {
                How::Raw => {
                    let receive = tower::service_fn(|request| {
                        let memory = Arc::clone(&memory);
                        async move {
                            let at = receive::<Bytes>(memory, how, request).await?;
                            Ok::<_, Status>(Response::new(Bytes::copy_from_slice(&at.to_be_bytes())))
                        }
                    });
                    grpc(Plain).client_streaming(receive, request).await
                }
                How::Bytes | How::EachChunk => {
                    let receive = tower::service_fn(|request| {
                        let memory = Arc::clone(&memory);
                        async move { receive::<BytesChunk>(memory, how, request).await.map(had) }
                    });
                    grpc(ProstCodec::default()).client_streaming(receive, request).await
                }
                How::Floats => {
                    let receive = tower::service_fn(|request| {
                        let memory = Arc::clone(&memory);
                        async move { receive::<FloatsChunk>(memory, how, request).await.map(had) }
                    });
                    grpc(ProstCodec::default()).client_streaming(receive, request).await
                }
            })
        })
    }
}

fn grpc<C: Codec>(codec: C) -> tonic::server::Grpc<C> {
    tonic::server::Grpc::new(codec).max_decoding_message_size(MESSAGE)
}

// === impl Plain ===

impl Codec for Plain {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Plain {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Plain {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}
