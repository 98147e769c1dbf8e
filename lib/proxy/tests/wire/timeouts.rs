//! The three timeouts, with the clock paused: responses, streams, and the six rows of Knative's WebSocket test.
//!
//! A paused clock jumps to the next timer whenever all tasks wait, sockets or not. [`fine`] keeps the jumps small, so that
//! bytes on a socket arrive long before the next deadline.

use std::time::Duration;

use lifl_proxy::{Timeouts, queue::Settings};
use tokio::time::{Instant, sleep};

use crate::rig::{Aborts, Served, Wire, endpoint, eventually, fine, settings};

const GET: &str = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";

fn limits(start: u64, idle: u64, total: u64) -> Settings {
    let [start, idle, total] = [start, idle, total].map(Duration::from_secs);
    Settings { timeouts: Timeouts { start, idle, total }, ..settings() }
}

/// Nothing for `delay`, then a head and `parts`, one each `gap`.
async fn slow(delay: u64, gap: u64, parts: usize) -> (std::net::SocketAddr, Aborts) {
    endpoint(move |_, mut wire: Wire| async move {
        wire.head().await;
        sleep(Duration::from_secs(delay)).await;
        wire.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
        for _ in 0..parts {
            sleep(Duration::from_secs(gap)).await;
            wire.write("4\r\npart\r\n").await;
        }
        wire.write("0\r\n\r\n").await;
        wire.rest().await;
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn knative_what_begins_too_late_is_a_gateway_timeout() {
    let _fine = fine();
    for (settings, at) in [(limits(5, 0, 0), 5), (limits(0, 7, 0), 7), (limits(0, 0, 9), 9), (limits(20, 6, 9), 6)] {
        let (addr, _task) = slow(60, 0, 0).await;
        let served = Served::new(addr, settings).await;
        let begun = Instant::now();
        let answer = served.ask(GET).await;
        assert_eq!(begun.elapsed().as_secs(), at);
        assert_eq!((answer.status(), &*answer.body), ("504", "request timeout"));
        assert_eq!(answer.header("content-type"), "text/plain; charset=utf-8");
        eventually("the endpoint's connection is closed", || served.pool.connections() == 0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn knative_a_response_in_time_is_left_alone() {
    let _fine = fine();
    for settings in [limits(5, 0, 0), limits(0, 5, 0), limits(0, 0, 30), limits(4, 5, 30), limits(0, 0, 0)] {
        let (addr, _task) = slow(3, 3, 4).await;
        let served = Served::new(addr, settings).await;
        let answer = served.ask(GET).await;
        assert_eq!((answer.status(), &*answer.body), ("200", "partpartpartpart"));
    }
}

/// Once a response has begun there is no status left to tell it with: it is cut off.
#[tokio::test(start_paused = true)]
async fn a_response_that_stops_is_cut_off() {
    let _fine = fine();
    for (settings, parts) in [(limits(0, 5, 0), 0), (limits(1, 5, 0), 0), (limits(0, 0, 30), 2)] {
        let (addr, _task) = slow(0, if parts == 0 { 60 } else { 12 }, 9).await;
        let served = Served::new(addr, settings).await;
        let mut client = served.client().await;
        client.write(GET).await;
        assert_eq!(client.head().await.status(), "200");
        let rest = client.rest().await;
        assert_eq!(rest, "4\r\npart\r\n".repeat(parts), "no text is appended, and no end is made up");
        eventually("nothing is left", || served.queue.depth() == 0 && served.pool.connections() == 0).await;
    }
}

/// Time in the queue is the request's time.
#[tokio::test(start_paused = true)]
async fn knative_waiting_for_a_place_counts() {
    let _fine = fine();
    let (addr, _task) = slow(60, 0, 0).await;
    let served = Served::new(addr, Settings { concurrency: 1, ..limits(0, 0, 10) }).await;
    let begun = Instant::now();
    let mut first = served.client().await;
    first.write(GET).await;
    eventually("the first is working", || served.queue.depth() == 1).await;
    sleep(Duration::from_secs(5)).await;
    let second = served.ask(GET).await;
    assert_eq!((second.status(), begun.elapsed().as_secs()), ("504", 15), "10 s after it came");
}

/// Upgrades at once; the first frame after `delay`, then one each `delay` until there are three.
async fn socket(delay: u64) -> (std::net::SocketAddr, Aborts) {
    endpoint(move |_, mut wire: Wire| async move {
        wire.head().await;
        wire.write("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
        for _ in 0..3 {
            wire.exactly(4).await;
            sleep(Duration::from_secs(delay)).await;
            wire.write("pong").await;
        }
        wire.rest().await;
    })
    .await
}

/// Seconds until the first answer; `None` if the tunnel was cut off.
async fn first_frame(served: &Served) -> Option<u64> {
    let mut client = served.client().await;
    client.write(UPGRADE).await;
    assert_eq!(client.head().await.status(), "101", "the upgrade itself is at once");
    let begun = Instant::now();
    client.write("ping").await;
    if !client.more().await {
        return None;
    }
    assert_eq!(client.exactly(4).await, "pong");
    Some(begun.elapsed().as_secs())
}

#[tokio::test(start_paused = true)]
async fn knative_websocket_with_timeout_six_rows() {
    let _fine = fine();
    for settings in [limits(10, 0, 0), limits(0, 10, 0), limits(0, 0, 10)] {
        for (delay, expected) in [(2, Some(2)), (20, None)] {
            let (addr, _task) = socket(delay).await;
            let served = Served::new(addr, settings.clone()).await;
            assert_eq!(first_frame(&served).await, expected, "{:?}, {delay} s", settings.timeouts);
        }
    }
}

/// What upstream fails (serving#16169): a socket that talks is not cut off by the start or the idle timeout.
#[tokio::test(start_paused = true)]
async fn a_websocket_that_talks_lives() {
    let _fine = fine();
    for (settings, lives) in [(limits(10, 0, 0), true), (limits(0, 10, 0), true), (limits(0, 0, 10), false)] {
        let (addr, _task) = socket(6).await;
        let served = Served::new(addr, settings.clone()).await;
        let mut client = served.client().await;
        client.write(UPGRADE).await;
        client.head().await;
        client.write("pingpingping").await;
        let mut frames = 0;
        while frames < 3 && client.more().await {
            client.exactly(4).await;
            frames += 1;
        }
        assert_eq!(frames == 3, lives, "{:?}: {frames} frames", settings.timeouts);
    }
}

#[tokio::test(start_paused = true)]
async fn tunnels_are_given_time_and_then_cut() {
    let _fine = fine();
    let (addr, _task) = socket(1).await;
    let served = Served::new(addr, settings()).await;
    let mut client = served.client().await;
    client.write(UPGRADE).await;
    client.head().await;
    eventually("the tunnel is open", || served.queue.tunnels().count() == 1).await;
    let begun = Instant::now();
    served.queue.tunnels().end(Duration::from_secs(60)).await;
    assert_eq!(begun.elapsed().as_secs(), 60);
    assert_eq!(client.rest().await, "");
}
