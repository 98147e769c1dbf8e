//! Probes: whether gateways serve a version of an Ingress, asked as Knative's own probers ask.

use std::{collections::BTreeSet, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use lifl_api::ingress::{HASH_OVERRIDE, PROBE_PATH, PROBE_VALUE, PROBER_USER_AGENT};
use lifl_proxy::queue::{K_NETWORK_HASH, K_NETWORK_PROBE};
use tokio::{
    net::TcpStream,
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::status::{Probed, judge};

/// An answer comes within this.
const PATIENCE: Duration = Duration::from_secs(1);
/// The first pause between two questions, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// A question: to whom, and what for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    /// Of a gateway.
    pub(super) address: SocketAddr,
    /// Host of a rule.
    pub(super) host: String,
    /// Path of a rule.
    pub(super) path: String,
    /// Headers that the rule wants.
    pub(super) headers: Vec<(String, String)>,
}

/// Asks until all have told the hash.
pub(super) async fn all_ready(targets: &BTreeSet<Target>, hash: &str, places: &Arc<Semaphore>) {
    let mut asking = JoinSet::new();
    for target in targets {
        asking.spawn(ready(target.clone(), hash.to_owned(), Arc::clone(places)));
    }
    while asking.join_next().await.is_some() {}
}

async fn ready(target: Target, hash: String, places: Arc<Semaphore>) {
    let mut pause = PAUSES.0;
    loop {
        let answer = {
            let Ok(_place) = places.acquire().await else { return };
            timeout(PATIENCE, ask(&target)).await
        };
        match answer {
            Ok(Ok((status, headers))) if judge(status, &headers, &hash) == Probed::Ready => return,
            Ok(Ok((status, _))) => tracing::debug!(?target, %status, "not this version yet"),
            Ok(Err(error)) => tracing::debug!(?target, %error, "probe"),
            Err(_) => tracing::debug!(?target, "probe takes too long"),
        }
        sleep(pause.mul_f64(0.8 + 0.4 * fastrand::f64())).await;
        pause = pause.saturating_mul(2).min(PAUSES.1);
    }
}

/// One question on a connection of its own: the answer must not be that of an older acquaintance.
async fn ask(target: &Target) -> io::Result<(StatusCode, HeaderMap)> {
    let path = format!("{}{PROBE_PATH}", target.path.trim_end_matches('/'));
    let mut request = Request::get(path)
        .header(header::HOST, &target.host)
        .header(header::USER_AGENT, PROBER_USER_AGENT)
        .header(header::CONNECTION, "close")
        .header(K_NETWORK_PROBE, PROBE_VALUE)
        .header(K_NETWORK_HASH, HASH_OVERRIDE);
    for (name, value) in &target.headers {
        request = request.header(name, value);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(io::Error::other)?;
    let stream = TcpStream::connect(target.address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    // Ends with the answer, for nobody keeps the sender.
    tokio::spawn(connection.boxed());
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    Ok((response.status(), response.headers().clone()))
}
