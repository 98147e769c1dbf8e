//! The data socket: what aggregators say. Peeked, dealt with, then consumed: a death in between only repeats it.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use lifl_daemon::failpoint;
use lifl_ebpf::{
    Descriptor, Kind, LAYOUT_VERSION, ObjectKey, role,
    wire::{BATCH, DescriptorSocket},
};
use tokio::{
    io::unix::{AsyncFd, AsyncFdReadyGuard},
    sync::mpsc,
};

use super::{coordinator, outbox::Socket};
use crate::{
    chain::{Ignored, Inner},
    state::Gateway,
};

/// Key of the socket's deposit.
pub(crate) const SOCKET: &str = "data-socket";
/// Key of releases that were consumed before their group was whole.
pub(crate) const STAGED: &str = "staged";

/// What others want of the reader: always done after what is in the socket.
#[derive(Debug)]
pub(crate) enum Command {
    /// Read and write this socket from now on.
    Socket(OwnedFd),
    /// The process behind a role is another one.
    Resend { chain: u32, role: u32 },
    /// This process is another one.
    Recover,
}

/// Releases whose container is not told yet, by (chain, sender).
type Staging = HashMap<(u32, u32), Vec<(ObjectKey, ObjectKey)>>;

#[derive(Debug)]
struct Reader {
    gateway: Arc<Gateway>,
    socket: Option<Socket>,
    staging: Staging,
    /// `staging` holds what the socket no longer does.
    deposited: bool,
}

/// Reads until the process ends. `staged` is what an earlier life deposited.
pub(crate) async fn run(gateway: Arc<Gateway>, mut commands: mpsc::UnboundedReceiver<Command>, staged: Vec<Vec<u8>>) {
    let mut reader = Reader { gateway, socket: None, staging: Staging::new(), deposited: !staged.is_empty() };
    for bytes in staged {
        if let Ok(bytes) = bytes.as_slice().try_into() {
            reader.stage(&Descriptor::from_bytes(bytes));
        }
    }
    loop {
        let socket = reader.socket.clone();
        let event = tokio::select! {
            biased;
            ready = readable(socket.as_ref()), if socket.is_some() => Event::Ready(ready),
            command = commands.recv() => Event::Command(command),
        };
        match (event, socket.as_ref()) {
            (Event::Ready(Ok(mut guard)), Some(socket)) => {
                // The guard is older than the look into the socket: what comes in between is not forgotten with it.
                reader.drain(socket).await;
                guard.clear_ready();
            }
            (Event::Ready(Err(error)), _) => reader.close(&error),
            (Event::Command(Some(command)), _) => reader.heed(command).await,
            (Event::Command(None), _) => return,
            (Event::Ready(Ok(_)), None) => {}
        }
    }
}

enum Event<'a> {
    Ready(io::Result<AsyncFdReadyGuard<'a, DescriptorSocket>>),
    Command(Option<Command>),
}

#[expect(
    deprecated,
    reason = "its successor is unsafe, for types whose descriptor may change; a DescriptorSocket owns one for its life"
)]
fn poll(fd: OwnedFd) -> io::Result<AsyncFd<DescriptorSocket>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    AsyncFd::new(DescriptorSocket::new(fd))
}

async fn readable(socket: Option<&Socket>) -> io::Result<AsyncFdReadyGuard<'_, DescriptorSocket>> {
    match socket {
        Some(socket) => socket.readable().await,
        None => std::future::pending().await,
    }
}

// === impl Reader ===

impl Reader {
    async fn heed(&mut self, command: Command) {
        if let Some(socket) = self.socket.clone() {
            self.drain(&socket).await;
        }
        match command {
            Command::Socket(fd) => self.connect(fd).await,
            Command::Resend { chain, role } => {
                let Some(chain) = self.gateway.chain(chain) else { return };
                tracing::info!(chain = chain.id, role, "sending again what is not contained");
                self.gateway.with(&chain, |inner, out| inner.resend(role, out));
            }
            Command::Recover => self.recover(),
        }
    }

    async fn connect(&mut self, fd: OwnedFd) {
        let again = self.socket.is_some();
        let socket = match poll(fd) {
            Ok(socket) => Arc::new(socket),
            Err(error) => return tracing::error!(%error, "data socket"),
        };
        if let Err(error) = self.gateway.child.deposit(SOCKET, &(), &[socket.get_ref().as_fd()]).await {
            tracing::error!(%error, "data socket is not kept");
        }
        self.gateway.outbox.connect(Some(Arc::clone(&socket)));
        self.socket = Some(Arc::clone(&socket));
        self.drain(&socket).await;
        if again {
            self.recover();
        }
    }

    fn recover(&self) {
        for chain in self.gateway.chains() {
            self.gateway.with(&chain, Inner::recover);
            coordinator::tell_round_done(&self.gateway, &chain);
        }
    }

    fn close(&mut self, error: &io::Error) {
        tracing::warn!(%error, "data socket is closed");
        self.socket = None;
        self.gateway.outbox.connect(None);
    }

    /// Deals with all that is in the socket.
    async fn drain(&mut self, socket: &Socket) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            batch.clear();
            match socket.get_ref().peek(&mut batch) {
                Ok(0) => return self.close(&io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.close(&error),
            }
            let before = self.staging.clone();
            let whole = self.process(&batch);
            let take = if whole > 0 {
                whole
            } else if batch.len() < BATCH {
                // A group that is not whole stays in the socket, where a successor finds it.
                self.staging = before;
                return;
            } else {
                self.keep_staging().await;
                batch.len()
            };
            failpoint("gateway.peeked");
            if let Err(error) = socket.get_ref().consume(take) {
                return self.close(&error);
            }
            self.gateway.outbox.received(take);
            if whole > 0 {
                self.forget_staging().await;
            }
        }
    }

    /// Deals with descriptors; how many may be consumed: up to where no group is begun.
    fn process(&mut self, batch: &[Descriptor]) -> usize {
        let mut whole = 0;
        for (index, descriptor) in batch.iter().enumerate() {
            if let Err(reason) = self.one(descriptor) {
                self.gateway.metrics.dropped(reason);
                tracing::warn!(reason = reason.label(), ?descriptor, "descriptor ignored");
            }
            if self.staging.is_empty() {
                whole = index + 1;
            }
        }
        if whole > 0 {
            self.staging.clear();
        }
        whole
    }

    fn one(&mut self, said: &Descriptor) -> Result<(), Ignored> {
        let kind = Kind::from_u8(said.kind).filter(|_| said.version == LAYOUT_VERSION).ok_or(Ignored::UnknownKind)?;
        let chain = self.gateway.chain(said.chain).ok_or(Ignored::UnknownChain)?;
        if said.src == role::GATEWAY {
            return Err(Ignored::NotWriter);
        }
        match kind {
            Kind::Release => self.stage(said),
            Kind::Sealed | Kind::Model => {
                let staged = self.staging.remove(&(said.chain, said.src)).unwrap_or_default();
                let all = staged.len();
                let inputs: Vec<_> =
                    staged.into_iter().filter(|(_, to)| *to == said.key()).map(|(key, _)| key).collect();
                if inputs.len() < all {
                    self.gateway.metrics.dropped(Ignored::LoneRelease);
                }
                self.gateway.with(&chain, |inner, out| inner.sealed(said, &inputs, out))?;
                if kind == Kind::Model {
                    tracing::info!(chain = chain.id, round = said.round, updates = said.count, "model is sealed");
                    coordinator::tell_round_done(&self.gateway, &chain);
                }
            }
            Kind::Update | Kind::Partial | Kind::Close => return Err(Ignored::UnknownKind),
        }
        Ok(())
    }

    fn stage(&mut self, said: &Descriptor) {
        self.staging.entry((said.chain, said.src)).or_default().push((said.key(), said.contained_in()));
    }

    /// A window full of groups that are all not whole: what is consumed must be kept elsewhere first.
    async fn keep_staging(&mut self) {
        let staged: Vec<Vec<u8>> = self
            .staging
            .iter()
            .flat_map(|((chain, src), pairs)| pairs.iter().map(move |pair| (*chain, *src, *pair)))
            .map(|(chain, src, (key, container))| {
                let release = Descriptor::new(Kind::Release, chain, role::GATEWAY).with_key(key);
                Descriptor { src, ..release.with_contained_in(container) }.to_bytes().to_vec()
            })
            .collect();
        match self.gateway.child.deposit(STAGED, &staged, &[]).await {
            Ok(()) => self.deposited = true,
            Err(error) => tracing::error!(%error, "releases are not kept"),
        }
    }

    async fn forget_staging(&mut self) {
        if std::mem::take(&mut self.deposited)
            && let Err(error) = self.gateway.child.remove(STAGED).await
        {
            tracing::warn!(%error, "deposit of releases");
        }
    }
}
