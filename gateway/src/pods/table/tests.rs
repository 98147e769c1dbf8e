//! Listeners as an agent gives and takes them.

use std::{io::ErrorKind, net::TcpStream};

use lifl_api::pod::PodSettings;
use lifl_proxy::queue::QUIET;
use rustix::fs::{MemfdFlags, OFlags, fcntl_setfl, memfd_create};

use super::*;

const PORTS: [PodPort; 2] = [PodPort::Serving, PodPort::Admin];

fn pod() -> NodePod {
    let settings: PodSettings = serde_json::from_value(json!({
        "schema": PodSettings::schema(), "namespace": "golden", "configuration": "shop", "revision": "shop-blue",
        "servingPort": 8012, "protocol": "http1", "userPort": 8080, "containerConcurrency": 0,
        "timeouts": {"request": 300},
    }))
    .unwrap();
    NodePod {
        uid: "u1".into(),
        namespace: "golden".into(),
        name: "shop-blue-1".into(),
        address: Ipv4Addr::LOCALHOST.into(),
        draining: true,
        settings,
    }
}

/// A pod that is told to end; its listeners as the agent has them.
fn ending() -> (Pods, [StdListener; 2]) {
    let listeners = PORTS.map(|_| StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let fds = listeners.iter().map(|listener| {
        listener.set_nonblocking(true).unwrap();
        OwnedFd::from(listener.try_clone().unwrap())
    });
    let pods = Pods::new(mpsc::unbounded_channel().0, Limits::default());
    pods.heed(PodWord::Serve { place: 7, pod: Box::new(pod()), ports: PORTS.into() }, fds.collect());
    (pods, listeners)
}

fn connect(listener: &StdListener) -> Result<TcpStream, ErrorKind> {
    TcpStream::connect(listener.local_addr().unwrap()).map_err(|error| error.kind())
}

#[tokio::test(start_paused = true)]
async fn a_drained_pod_refuses_connections_and_its_hook_is_answered_still() {
    let (_pods, [serving, admin]) = ending();
    sleep(QUIET / 2).await;
    connect(&serving).unwrap();
    sleep(QUIET).await;
    assert_eq!(connect(&serving).unwrap_err(), ErrorKind::ConnectionRefused);
    connect(&admin).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_superseded_gateway_does_not_end_what_another_one_serves() {
    let (pods, [serving, _]) = ending();
    pods.superseded(Duration::ZERO);
    sleep(QUIET * 2).await;
    connect(&serving).unwrap();
    // What it takes over again it is responsible for.
    let fds = vec![serving.try_clone().unwrap().into()];
    pods.heed(PodWord::Serve { place: 7, pod: Box::new(pod()), ports: vec![PodPort::Serving] }, fds);
    sleep(QUIET * 2).await;
    assert_eq!(connect(&serving).unwrap_err(), ErrorKind::ConnectionRefused);
}

fn connections(pods: &Pods) -> u64 {
    pods.document()[0]["connections"].as_u64().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_listener_is_no_connection() {
    let (pods, [serving, admin]) = ending();
    sleep(QUIET / 4).await;
    assert_eq!(connections(&pods), 0);
    let _open = [connect(&serving).unwrap(), connect(&admin).unwrap()];
    sleep(QUIET / 4).await;
    assert_eq!(connections(&pods), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_cannot_be_served_whole_is_not_served_in_part() {
    let serving = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    serving.set_nonblocking(true).unwrap();
    // Nothing that could be waited for.
    let file = memfd_create("no-listener", MemfdFlags::CLOEXEC).unwrap();
    fcntl_setfl(&file, OFlags::NONBLOCK).unwrap();
    let pods = Pods::new(mpsc::unbounded_channel().0, Limits::default());
    let fds = vec![OwnedFd::from(serving.try_clone().unwrap()), file];
    pods.heed(PodWord::Serve { place: 7, pod: Box::new(pod()), ports: PORTS.into() }, fds);
    assert_eq!(pods.document(), json!([]));
    let _waits = connect(&serving).unwrap();
    sleep(QUIET / 4).await;
    serving.accept().expect("somebody else accepts");
}
