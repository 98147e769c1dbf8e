//! Ten thousand clients that are in no hurry: heads, bodies, answers, each a byte now and then or none at all.

use std::net::SocketAddr;

use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use crate::{
    Outcome, block_on,
    honest::Honest,
    process::{FOR_EVER, Proxy, all_descriptors, endpoint},
};

/// Of each kind.
const HEADS: usize = 4000;
const BODIES: usize = 3000;
const READERS: usize = 3000;
/// KiB that one of each kind may cost. A head has one buffer, an upload two and a connection to the endpoint, a reader what both
/// sides' buffers hold of the answer.
const COSTS: [u64; 3] = [32, 56, 640];
/// Descriptors of the busiest process: a connection of each client, and one to the endpoint for those whose head is whole.
const DESCRIPTORS: u64 = (HEADS + 2 * (BODIES + READERS) + 1000) as u64;

pub(crate) fn why_not() -> Option<String> {
    let most = all_descriptors().unwrap_or_default();
    (most < DESCRIPTORS).then(|| format!("{DESCRIPTORS} descriptors are needed, {most} are allowed: ulimit -n"))
}

pub(crate) fn run() -> Outcome {
    block_on(async {
        let proxy = Proxy::start(endpoint().await?, 100_000, FOR_EVER)?;
        let mut honest = Honest::start(proxy.addr);
        honest.answered(20).await?;
        let mut at = proxy.memory()?;
        let mut costs = vec![];
        let mut clients = vec![];
        let kinds = [
            ("heads", HEADS, "GET / HTTP/1.1\r\nHost: h\r\nX-Slow: "),
            ("bodies", BODIES, "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\nx"),
            ("readers", READERS, "GET /big HTTP/1.1\r\nHost: h\r\n\r\n"),
        ];
        for ((kind, count, text), most) in kinds.into_iter().zip(COSTS) {
            for _ in 0..count {
                clients.push(slow(proxy.addr, text).await?);
            }
            honest.answered(100).await?;
            let now = proxy.settled(clients.len()).await?;
            let each = now.saturating_sub(at) / count as u64;
            costs.push((kind, each));
            at = now;
            if each > most {
                return Err(format!("{kind}: {each} KiB each, {most} allowed").into());
            }
        }
        let answers = honest.end().await?;
        eprintln!("{} slow clients: {costs:?} KiB each, {answers} answers to others", clients.len());
        Ok(())
    })
}

async fn slow(proxy: SocketAddr, text: &str) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(proxy).await?;
    stream.write_all(text.as_bytes()).await?;
    Ok(stream)
}
