//! A thousand functions that have been asked once, and that nobody asks any more.
//!
//! Two nodes of ours, with one function and with a thousand more: what a function costs is what the two differ in. Their
//! listeners share this machine's loopback network, each function with an address of its own; what a network namespace costs is
//! the kernel's, and the same for all.

use std::{
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::ensure;

use super::{
    contestant::Contestant,
    load,
    node::{Served, start_all},
    opponents::{HELLO, Opponents},
};

/// Seconds that a node has to come to rest after the last answer.
const SETTLES: u32 = 30;
/// How many more.
pub(super) const FUNCTIONS: u16 = 1000;
/// Ports of a function: requests here, drain and figures at the next two.
const PORT: u16 = 20_012;

/// What was found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Idle {
    /// Ticks of the node with all functions.
    pub(super) ticks: u64,
    /// Kilobytes per function.
    pub(super) each: f64,
    /// Kilobytes of the node with one.
    pub(super) base: f64,
    /// The same of one queue-proxy.
    pub(super) queue_proxy: Option<(u64, f64)>,
}

/// Watches them for so long.
pub(super) fn idle(opponents: &Opponents, time: Duration) -> anyhow::Result<Idle> {
    let upstream = opponents.upstream()?;
    let functions = |network: u8, count: u16| -> Vec<Served> {
        let one = |number: u16| {
            let [high, low] = number.to_be_bytes();
            let at = SocketAddr::from((Ipv4Addr::new(127, network, high, low.max(1)), PORT + u16::from(low == 0) * 3));
            Served { at, user: upstream.server.at, concurrency: 100, whole: true }
        };
        (1..=count).map(one).collect()
    };
    let (few, many) = (functions(2, 1), functions(3, FUNCTIONS + 1));
    let (base, all) = (start_all("ours", &few)?, start_all("ours", &many)?);
    let queue_proxy = opponents.queue_proxy(upstream.server.at)?;
    for at in few.iter().chain(&many).map(|pod| pod.at).chain(queue_proxy.iter().map(|proxy| proxy.at)) {
        ensure!(load::get(at)? == HELLO, "{at}: another body");
    }
    let ticks = settled(&all)?;
    let theirs = queue_proxy.as_ref().map(|proxy| proxy.ticks()).transpose()?;
    thread::sleep(time);
    let ticks = all.ticks()? - ticks;
    let queue_proxy = match (&queue_proxy, theirs) {
        (Some(proxy), Some(before)) => Some((proxy.ticks()? - before, proxy.rss()?)),
        _ => None,
    };
    let (one, thousand) = (base.rss()?, all.rss()?);
    Ok(Idle { ticks, each: (thousand - one) / f64::from(FUNCTIONS), base: one, queue_proxy })
}

/// Its ticks, when what follows the last answer is over.
fn settled(node: &Contestant) -> anyhow::Result<u64> {
    let mut before = node.ticks()?;
    for _ in 0..SETTLES {
        thread::sleep(Duration::from_secs(1));
        let now = node.ticks()?;
        if now == before {
            return Ok(now);
        }
        before = now;
    }
    anyhow::bail!("it is never idle")
}
