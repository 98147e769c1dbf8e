//! Clients that ask and are answered, whatever others do.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use libtest_mimic::Failed;
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

/// An answer that has not come by then will not come.
const PATIENCE: Duration = Duration::from_secs(20);

/// One client of each version, asking again and again.
pub(crate) struct Honest {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU32>,
    tasks: Vec<JoinHandle<Result<(), Failed>>>,
}

// === impl Honest ===

impl Honest {
    pub(crate) fn start(proxy: SocketAddr) -> Self {
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let tasks = [false, true].map(|http2| {
            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    // A connection for each few requests: new ones are to be had too.
                    let asked = timeout(PATIENCE, ask(proxy, http2, 5)).await;
                    asked.map_err(|_late| format!("HTTP/2 {http2}: no answer in {PATIENCE:?}"))??;
                    answers.fetch_add(5, Ordering::Relaxed);
                }
                Ok(())
            })
        });
        Self { stop, answers, tasks: tasks.into() }
    }

    /// Waits for so many more answers; fails if there is one that does not come.
    pub(crate) async fn answered(&mut self, more: u32) -> Result<(), Failed> {
        let wanted = self.answers.load(Ordering::Relaxed) + more;
        while self.answers.load(Ordering::Relaxed) < wanted {
            if let Some(ended) = self.tasks.iter().position(JoinHandle::is_finished) {
                self.tasks
                    .swap_remove(ended)
                    .await?
                    .map_err(|why| format!("an honest client was not served: {why:?}"))?;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// How many were answered; fails if one was not.
    pub(crate) async fn end(self) -> Result<u32, Failed> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await??;
        }
        Ok(self.answers.load(Ordering::Relaxed))
    }
}

async fn ask(proxy: SocketAddr, http2: bool, count: u32) -> Result<(), Failed> {
    let io = TokioIo::new(TcpStream::connect(proxy).await?);
    let request = || Request::get("http://h/").header("host", "h").body(Empty::<Bytes>::new());
    let mut connections = tokio::task::JoinSet::new();
    if http2 {
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
        connections.spawn(async move { drop(connection.await) });
        for _ in 0..count {
            answered(sender.send_request(request()?).await?).await?;
        }
    } else {
        let (mut sender, connection) = http1::handshake(io).await?;
        connections.spawn(async move { drop(connection.await) });
        for _ in 0..count {
            sender.ready().await?;
            answered(sender.send_request(request()?).await?).await?;
        }
    }
    Ok(())
}

async fn answered(response: http::Response<hyper::body::Incoming>) -> Result<(), Failed> {
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    if status != 200 || body != "ok" { Err(format!("{status} {body:?}").into()) } else { Ok(()) }
}
