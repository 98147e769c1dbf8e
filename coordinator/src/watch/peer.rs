//! One connection to a sibling: a task that reads, a task that writes, so that neither side can block the other.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use lifl_daemon::{Channel, ChannelError};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    sync::mpsc::{self, UnboundedSender},
    task::JoinSet,
};

/// A connected sibling; its tasks end with it.
#[derive(Debug)]
pub(super) struct Peer<Out> {
    /// Number of the connection: words of an older one are ignored.
    pub(super) connection: u64,
    out: UnboundedSender<Outgoing<Out>>,
    _tasks: JoinSet<()>,
}

/// A message, the descriptor beside it, and where a test kills the process after it.
type Outgoing<Out> = (Out, Option<Arc<OwnedFd>>, Option<&'static str>);

/// What a reader hears: words with descriptors, or the end.
pub(super) type Heard<In> = Option<(In, Vec<OwnedFd>)>;

// === impl Peer ===

impl<Out: Serialize + Send + Sync + 'static> Peer<Out> {
    /// Reads from `channel` into `hear`, and writes to it.
    pub(super) fn new<In: DeserializeOwned + Send + 'static>(
        connection: u64,
        channel: Channel,
        hear: impl Fn(Heard<In>) -> bool + Send + 'static,
    ) -> Self {
        let channel = Arc::new(channel);
        let (out, mut queue) = mpsc::unbounded_channel::<Outgoing<Out>>();
        let mut tasks = JoinSet::new();
        let reader = channel.clone();
        tasks.spawn(async move {
            loop {
                let heard = match reader.recv::<In>().await {
                    Ok(heard) => heard,
                    Err(error @ ChannelError::Words { .. }) => {
                        tracing::error!(%error, "word of a sibling");
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "channel to a sibling");
                        None
                    }
                };
                let ends = heard.is_none();
                if !hear(heard) || ends {
                    return;
                }
            }
        });
        tasks.spawn(async move {
            while let Some((message, fd, point)) = queue.recv().await {
                let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
                if let Err(error) = channel.send(&message, &fds).await {
                    // The reader finds the end; all is told again to the next one.
                    tracing::debug!(%error, "word to a sibling");
                    return;
                }
                if let Some(point) = point {
                    lifl_daemon::failpoint(point);
                }
            }
        });
        Self { connection, out, _tasks: tasks }
    }

    /// Queues a message; dropped when the sibling is gone, because the next one is told everything.
    pub(super) fn tell(&self, message: Out, fd: Option<Arc<OwnedFd>>, point: Option<&'static str>) {
        drop(self.out.send((message, fd, point)));
    }
}
