//! What a tunnel keeps while it is open, and for how long one side is waited for.

use std::{sync::Arc, time::Duration};

use http::{Request, Response};
use lifl_proxy::{
    Body, Handle, Keep, Limits, Peer, Server, carry,
    queue::{Queue, Settings},
};
use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};

use crate::rig::{Aborts, Counted, Served, Wire, endpoint, eventually, fine, settings};

const GET: &str = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";

/// Upgrades, then holds its side open and says nothing.
async fn silent() -> (std::net::SocketAddr, Aborts) {
    endpoint(|_, mut wire| async move {
        let asked = wire.head().await;
        if asked.header("upgrade").is_empty() {
            let answer = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
            return wire.write(answer).await;
        } else {
            wire.write(SWITCHED).await;
        }
        while wire.more().await {}
        std::future::pending::<()>().await;
    })
    .await
}

#[tokio::test]
async fn a_tunnel_is_still_one_of_the_connections() {
    let (addr, _task) = silent().await;
    let served = Served::with(addr, settings(), Limits { connections: 1, ..Limits::default() }).await;
    let mut tunnel = served.client().await;
    tunnel.write(UPGRADE).await;
    assert_eq!(tunnel.head().await.status(), "101");
    eventually("HTTP is left", || served.server.open() == 1).await;
    let mut second = served.client().await;
    second.write(GET).await;
    // Whoever gets through is served at once: the listener has nothing else to wait for.
    for _ in 0..100 {
        tokio::task::yield_now().await;
        assert_eq!(served.server.open(), 1, "no second connection");
        sleep(Duration::from_millis(1)).await;
    }
    served.queue.tunnels().end(Duration::ZERO).await;
    assert_eq!(second.message().await.status(), "200");
}

#[tokio::test(start_paused = true)]
async fn a_side_that_says_nothing_after_the_other_has_ended_is_not_waited_for() {
    let _fine = fine();
    let (addr, _task) = silent().await;
    let served = Served::new(addr, Settings { concurrency: 1, ..settings() }).await;
    let mut client = served.client().await;
    client.write(UPGRADE).await;
    assert_eq!(client.head().await.status(), "101");
    sleep(Duration::from_secs(300)).await;
    assert_eq!(served.queue.depth(), 1, "silence is no end");
    let begun = Instant::now();
    client.end_writing().await;
    assert_eq!(client.rest().await, "");
    eventually("the place is free", || served.queue.depth() == 0 && served.queue.tunnels().count() == 0).await;
    assert!((60..=125).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
}

/// A queue behind somebody who keeps something of each request.
struct Behind(Arc<Queue<Counted>>, Arc<()>);

struct Kept(#[expect(dead_code, reason = "it is counted")] Arc<()>);

impl Keep for Kept {}

impl Handle for Behind {
    async fn handle(&self, request: Request<Body>, peer: &Peer) -> Response<Body> {
        carry(self.0.handle(request, peer).await, Kept(Arc::clone(&self.1)))
    }
}

#[tokio::test]
async fn what_is_kept_of_an_answer_is_kept_of_its_tunnel() {
    let (addr, _task) = silent().await;
    let served = Served::new(addr, settings()).await;
    let kept = Arc::new(());
    let server = Server::new(Arc::new(Behind(Arc::clone(&served.queue), Arc::clone(&kept))), Limits::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let at = listener.local_addr().expect("an address");
    let listening = server.clone();
    let _task = Aborts::new(async move { listening.listen(&listener).await });
    let mut plain = Wire::to(at).await;
    plain.write(GET).await;
    assert_eq!(plain.message().await.status(), "200");
    drop(plain);
    eventually("an answer is over", || Arc::strong_count(&kept) == 2 && server.open() == 1).await;
    let mut client = Wire::to(at).await;
    client.write(UPGRADE).await;
    assert_eq!(client.head().await.status(), "101");
    eventually("HTTP is left", || server.open() == 1).await;
    assert_eq!((Arc::strong_count(&kept), served.queue.tunnels().count()), (3, 1), "the tunnel is not");
    served.queue.tunnels().end(Duration::ZERO).await;
    eventually("it is now", || Arc::strong_count(&kept) == 2).await;
}
