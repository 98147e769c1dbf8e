//! Sockets in real network namespaces: found by address, opened inside, kept over a restart, closed when the pod is gone.
//!
//! Each trial builds its own node: a folder of mounted namespaces, as `/run/netns` is, with a pod and a client on a cable between
//! them. Nothing of it is visible to the machine's own network.

mod node;

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Failed, Trial};
use lifl_agent::pods::{Counted, Pods, Report, SAID_AFTER, Shown, Telling};
use lifl_api::pod::{MAX_SOCKETS, NodePod, PodAsk, PodPort, PodSettings, PodWord};
use lifl_daemon::{Channel, Child, Deposit, Startup, SyncChannel, TestSupervisor};
use lifl_ebpf::{Connections, Traffic};
use node::{Node, POD, POD_V6};
use prometheus::core::Collector as _;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::fstat,
    net::sockopt,
};

type Outcome = Result<(), Failed>;
type Run = fn() -> Outcome;

const COUNTED: &str = "connections_are_counted_to_the_byte_whichever_agent_asks";
const V6: &str = "a_pod_of_ipv6_is_found_and_answers";
/// For what happens at once, or never.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

fn main() {
    let why_not = node::why_not();
    let no_v6 = || (!node::has_v6()).then(|| "no IPv6".to_owned());
    let uncounted = Traffic::load().err().map(|error| error.to_string());
    let trials: [(&str, Run); 12] = [
        ("an_app_on_the_pods_loopback_only_is_reached", an_app_on_the_pods_loopback_only_is_reached),
        (
            "listeners_answer_from_outside_and_belong_to_the_gateway",
            listeners_answer_from_outside_and_belong_to_the_gateway,
        ),
        (V6, a_pod_of_ipv6_is_found_and_answers),
        (
            "a_restart_adopts_the_same_listeners_and_what_waits_in_them",
            a_restart_adopts_the_same_listeners_and_what_waits_in_them,
        ),
        (
            "an_agent_of_another_pod_goes_on_with_what_the_gateway_holds",
            an_agent_of_another_pod_goes_on_with_what_the_gateway_holds,
        ),
        ("a_taken_port_is_reported_once_and_tried_again", a_taken_port_is_reported_once_and_tried_again),
        (
            "a_pod_that_vanished_is_closed_whoever_holds_its_sockets",
            a_pod_that_vanished_is_closed_whoever_holds_its_sockets,
        ),
        ("an_address_in_two_namespaces_is_nobodys", an_address_in_two_namespaces_is_nobodys),
        ("a_namespace_that_was_made_anew_is_found_again", a_namespace_that_was_made_anew_is_found_again),
        ("settings_change_without_a_socket_being_touched", settings_change_without_a_socket_being_touched),
        ("a_pod_that_ends_is_not_missed", a_pod_that_ends_is_not_missed),
        (COUNTED, connections_are_counted_to_the_byte),
    ];
    let trials = trials.into_iter().map(|(name, run)| {
        // libtest-mimic shows no reasons, so the name tells it.
        let ignored = why_not.clone().or_else(|| match name {
            V6 => no_v6(),
            COUNTED => uncounted.clone(),
            _ => None,
        });
        let why = ignored.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        Trial::test(format!("{name}{why}"), run).with_ignored_flag(ignored.is_some())
    });
    // One after another: a child that one trial starts (`ip`) has copies of all sockets until it has become another program, and
    // what another trial has closed meanwhile is open still.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

/// An agent's pods, and the supervisor that keeps what they deposit.
struct Agent {
    runtime: tokio::runtime::Runtime,
    supervisor: TestSupervisor,
    pods: Pods,
    /// What the pods' objects have.
    version: u32,
}

// === impl Agent ===

impl Agent {
    fn start(node: &Node, kept: Vec<Deposit>) -> Result<Self, Failed> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (supervisor, pods) = runtime.block_on(async {
            let (supervisor, end) = TestSupervisor::new()?;
            let startup = Startup { config: serde_json::Value::Null, first: kept.is_empty(), restored: kept };
            let (child, startup) = Child::for_test(&supervisor, end, startup).await?;
            let pods = Pods::adopt(Arc::new(child), node.folder().to_owned(), startup.restored).await?;
            Ok::<_, Failed>((supervisor, pods))
        })?;
        Ok(Self { runtime, supervisor, pods, version: 1 })
    }

    fn wish(&mut self, pods: &[NodePod], now: Instant) -> Result<Vec<Report>, Failed> {
        let pods = pods.iter().map(|pod| (pod.clone(), self.version.to_string())).collect();
        Ok(self.runtime.block_on(self.pods.wish(pods, now))?)
    }

    /// Has the agent try until it says that it cannot; returns of which pod, why, and when that was.
    fn insist(&mut self, pods: &[NodePod], mut now: Instant) -> Result<(NodePod, String, Instant), Failed> {
        for _ in 0..=SAID_AFTER {
            let reports = self.wish(pods, now)?;
            match reports.into_iter().next() {
                None => now = self.pods.next_try().ok_or("a time for the next attempt")?,
                Some(Report::Cannot { pod, reason }) => return Ok((*pod, reason, now)),
                Some(other) => return Err(format!("{other:?}").into()),
            }
        }
        Err("nothing is said".into())
    }

    /// The deposit or removal that came of the last wish.
    fn deposited(&self) -> Result<(String, Option<Deposit>), Failed> {
        Ok(self.runtime.block_on(self.supervisor.next_deposit())?)
    }

    fn ask(&self, place: u64, count: u32) -> Telling {
        self.runtime.block_on(self.pods.answer(PodAsk::Sockets { place, count }))
    }
}

fn pod(uid: &str) -> NodePod {
    let settings = format!(
        r#"{{"schema":"{}","namespace":"n","configuration":"c","revision":"r","servingPort":8012,"protocol":"http1",
            "userPort":8080,"containerConcurrency":0,"timeouts":{{"request":300}}}}"#,
        PodSettings::schema()
    );
    NodePod {
        uid: uid.into(),
        namespace: "n".into(),
        name: format!("pod-{uid}"),
        address: IpAddr::V4(POD),
        draining: false,
        settings: PodSettings::from_annotation(&settings).expect("settings"),
    }
}

/// What a gateway gets: the word and its own copies of the sockets, over a real channel.
fn hand_over(telling: &Telling) -> Result<(PodWord, Vec<OwnedFd>), Failed> {
    let (ours, theirs) = Channel::pair()?;
    SyncChannel::new(ours).send(&telling.word, &telling.fds())?;
    SyncChannel::new(theirs).recv()?.ok_or_else(|| "no word".into())
}

fn told(reports: Vec<Report>) -> Result<Vec<Telling>, Failed> {
    let of = |report| match report {
        Report::Tell(telling) => Ok(telling),
        Report::Cannot { reason, .. } => Err(Failed::from(format!("cannot: {reason}"))),
    };
    reports.into_iter().map(of).collect()
}

/// Opens the one pod; returns its place and the gateway's copies of its listeners.
fn open(agent: &mut Agent, pod: &NodePod) -> Result<(u64, Vec<PodPort>, Vec<OwnedFd>), Failed> {
    let tellings = told(agent.wish(std::slice::from_ref(pod), Instant::now())?)?;
    let [telling] = &tellings[..] else { return Err(format!("{tellings:?}").into()) };
    let (word, fds) = hand_over(telling)?;
    let PodWord::Serve { place, pod: served, ports } = word else { return Err(format!("{word:?}").into()) };
    assert_eq!((*served, ports.len()), (pod.clone(), fds.len()));
    Ok((place, ports, fds))
}

fn inode(fd: &OwnedFd) -> Result<u64, Failed> {
    Ok(fstat(fd)?.st_ino)
}

fn listener(fd: &OwnedFd) -> Result<TcpListener, Failed> {
    let listener = TcpListener::from(fd.try_clone()?);
    poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&PATIENCE))?;
    Ok(listener)
}

fn connect_from_outside(node: &Node, port: u16) -> std::io::Result<TcpStream> {
    connect_to(node, IpAddr::V4(POD), port)
}

fn connect_to(node: &Node, address: IpAddr, port: u16) -> std::io::Result<TcpStream> {
    node.in_client(move || TcpStream::connect_timeout(&SocketAddr::new(address, port), Duration::from_secs(10)))
}

/// Connects a socket to the pod's app.
fn dial(socket: OwnedFd) -> Result<TcpStream, Failed> {
    let target = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
    match rustix::net::connect(&socket, &target) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(error) => return Err(error.to_string().into()),
    }
    poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&PATIENCE))?;
    sockopt::socket_error(&socket)??;
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn an_app_on_the_pods_loopback_only_is_reached() -> Outcome {
    let node = Node::new()?;
    let app = node.in_pod(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 8080)))?;
    let served = std::thread::spawn(move || {
        let (mut stream, from) = app.accept()?;
        let mut word = [0; 4];
        stream.read_exact(&mut word)?;
        stream.write_all(&word)?;
        Ok::<_, std::io::Error>(from)
    });
    assert!(connect_from_outside(&node, 8080).is_err(), "the app listens on its loopback only");

    let mut agent = Agent::start(&node, Vec::new())?;
    let (place, ..) = open(&mut agent, &pod("a"))?;
    let (word, sockets) = hand_over(&agent.ask(place, 3))?;
    assert_eq!((word, sockets.len()), (PodWord::Sockets { place }, 3));
    // This thread is not in the pod's namespace; the socket is.
    let mut stream = dial(sockets.into_iter().next().ok_or("a socket")?)?;
    stream.write_all(b"ping")?;
    let mut word = [0; 4];
    stream.read_exact(&mut word)?;
    assert_eq!(&word, b"ping");
    let from = served.join().map_err(|_panic| "the app panicked")??;
    assert_eq!(from.ip(), IpAddr::V4(Ipv4Addr::LOCALHOST));

    let many = agent.ask(place, 10_000);
    assert_eq!(many.fds().len(), MAX_SOCKETS as usize);
    let (word, sockets) = hand_over(&agent.ask(place + 1, 1))?;
    assert!(matches!(word, PodWord::NoSockets { .. }) && sockets.is_empty(), "{word:?}");
    Ok(())
}

fn listeners_answer_from_outside_and_belong_to_the_gateway() -> Outcome {
    let node = Node::new()?;
    let mut agent = Agent::start(&node, Vec::new())?;
    let mut metrics = pod("a");
    metrics.settings.request_metrics.protocol = "prometheus".into();
    let (_, ports, fds) = open(&mut agent, &metrics)?;
    assert_eq!(ports, [PodPort::Serving, PodPort::Admin, PodPort::Stats, PodPort::UserMetrics]);
    for (fd, port) in fds.iter().zip([8012, 8022, 9090, 9091]) {
        let mut client = connect_from_outside(&node, port)?;
        let (mut accepted, from) = listener(fd)?.accept()?;
        assert_eq!(from.ip().to_canonical(), client.local_addr()?.ip(), "the client's own address");
        accepted.write_all(b"hello")?;
        drop(accepted);
        let mut text = String::new();
        client.read_to_string(&mut text)?;
        assert_eq!(text, "hello");
    }
    assert!(connect_from_outside(&node, 8013).is_err(), "not the other protocol's port");
    Ok(())
}

fn a_pod_of_ipv6_is_found_and_answers() -> Outcome {
    let node = Node::new()?;
    let mut agent = Agent::start(&node, Vec::new())?;
    let mut one = pod("a");
    one.address = IpAddr::V6(POD_V6);
    let (_, _, fds) = open(&mut agent, &one)?;
    for address in [IpAddr::V6(POD_V6), IpAddr::V4(POD)] {
        let client = connect_to(&node, address, 8012)?;
        let (_, from) = listener(&fds[0])?.accept()?;
        assert_eq!(from.ip().to_canonical(), client.local_addr()?.ip());
    }
    Ok(())
}

fn a_restart_adopts_the_same_listeners_and_what_waits_in_them() -> Outcome {
    let node = Node::new()?;
    let mut agent = Agent::start(&node, Vec::new())?;
    let one = pod("a");
    let (place, _, fds) = open(&mut agent, &one)?;
    let (key, deposit) = agent.deposited()?;
    let deposit = deposit.ok_or("a deposit")?;
    assert_eq!((key.as_str(), deposit.fds.len()), ("pod/a", fds.len() + 1));
    let inodes = fds.iter().map(inode).collect::<Result<Vec<_>, _>>()?;
    // Agent and gateway die; the supervisor's copies are all that is left.
    drop((agent, fds));
    let mut waiting = connect_from_outside(&node, 8012)?;

    let mut agent = Agent::start(&node, vec![deposit])?;
    let all = agent.pods.all();
    let [telling, synced] = &all[..] else { return Err(format!("{all:?}").into()) };
    assert_eq!(synced.word, PodWord::Synced);
    let (word, fds) = hand_over(telling)?;
    assert!(matches!(word, PodWord::Serve { place: same, .. } if same == place), "{word:?}");
    assert_eq!(fds.iter().map(inode).collect::<Result<Vec<_>, _>>()?, inodes);
    let (mut accepted, _) = listener(&fds[0])?.accept()?;
    accepted.write_all(b"late")?;
    drop(accepted);
    let mut text = String::new();
    waiting.read_to_string(&mut text)?;
    assert_eq!(text, "late");
    // The list that follows changes nothing, and sockets can be had.
    assert!(agent.wish(&[one], Instant::now())?.is_empty());
    assert_eq!(agent.ask(place, 2).fds().len(), 2);

    // What cannot be understood is opened anew.
    let broken = Deposit { key: "pod/b".into(), meta: serde_json::json!({"v": 2}), fds: Vec::new() };
    let agent = Agent::start(&node, vec![broken])?;
    assert_eq!(agent.pods.all().len(), 1);
    assert!(matches!(agent.deposited()?, (key, None) if key == "pod/b"));
    Ok(())
}

fn an_agent_of_another_pod_goes_on_with_what_the_gateway_holds() -> Outcome {
    let node = Node::new()?;
    let mut agent = Agent::start(&node, Vec::new())?;
    let one = pod("a");
    let (place, ports, fds) = open(&mut agent, &one)?;
    let inodes = fds.iter().map(inode).collect::<Result<Vec<_>, _>>()?;
    // The agent and its supervisor are gone; the gateway's copies are all that is left.
    drop(agent);
    let mut waiting = connect_from_outside(&node, 8012)?;
    let copies = || fds.iter().map(OwnedFd::try_clone).collect::<Result<Vec<_>, _>>();

    let mut agent = Agent::start(&node, Vec::new())?;
    let now = Instant::now();
    let patience = now + Duration::from_secs(1);
    agent.pods.expect_held(patience);
    assert!(agent.wish(std::slice::from_ref(&one), now)?.is_empty(), "nothing is opened beside what a gateway holds");
    assert_eq!(agent.pods.next_try(), Some(patience), "nor is a gateway waited for that does not come");
    agent.pods.hold(one.clone(), ports.clone(), copies()?);
    agent.runtime.block_on(agent.pods.take_held())?;
    let (key, deposit) = agent.deposited()?;
    assert_eq!((key.as_str(), deposit.map(|deposit| deposit.fds.len())), ("pod/a", Some(fds.len() + 1)));
    let all = agent.pods.all();
    let [telling, synced] = &all[..] else { return Err(format!("{all:?}").into()) };
    assert_eq!(synced.word, PodWord::Synced);
    let (word, held) = hand_over(telling)?;
    assert!(matches!(word, PodWord::Serve { place: same, .. } if same == place), "{word:?}");
    assert_eq!(held.iter().map(inode).collect::<Result<Vec<_>, _>>()?, inodes);
    assert!(agent.wish(std::slice::from_ref(&one), now)?.is_empty());
    assert_eq!(agent.ask(place, 2).fds().len(), 2);
    let (mut accepted, _) = listener(&held[0])?.accept()?;
    accepted.write_all(b"late")?;
    drop(accepted);
    let mut text = String::new();
    waiting.read_to_string(&mut text)?;
    assert_eq!(text, "late");

    // What nobody listens on any more is not taken over: the pod is opened anew, and so is one that a gateway told in vain.
    drop(agent.wish(&[], now)?);
    let mut agent = Agent::start(&node, Vec::new())?;
    agent.pods.expect_held(patience);
    agent.pods.hold(one.clone(), ports, copies()?);
    agent.runtime.block_on(agent.pods.take_held())?;
    assert_eq!(agent.pods.all().len(), 1);
    let (other, ..) = open(&mut agent, &one)?;
    assert_ne!(other, place);
    Ok(())
}

fn a_taken_port_is_reported_once_and_tried_again() -> Outcome {
    let node = Node::new()?;
    let squatter = node.in_pod(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8022)))?;
    let mut agent = Agent::start(&node, Vec::new())?;
    let (one, now) = (pod("a"), Instant::now());
    let (refused, reason, now) = agent.insist(std::slice::from_ref(&one), now)?;
    assert_eq!(refused, one);
    assert!(reason.starts_with("port 8022 is taken"), "{reason}");
    assert!(connect_from_outside(&node, 8012).is_err(), "all or nothing");
    assert_eq!(agent.pods.all().len(), 1, "nothing to serve");
    // Not before its time, and then without saying it again.
    let again = agent.pods.next_try().ok_or("a time for the next attempt")?;
    assert!(again > now);
    assert!(agent.wish(std::slice::from_ref(&one), now)?.is_empty());
    assert!(agent.wish(std::slice::from_ref(&one), again)?.is_empty());
    let later = agent.pods.next_try().ok_or("and for the one after")?;
    assert!(later - again > again - now, "each pause is longer");
    drop(squatter);
    let tellings = told(agent.runtime.block_on(agent.pods.step(later))?)?;
    assert!(matches!(&tellings[..], [Telling { word: PodWord::Serve { .. }, .. }]), "{tellings:?}");
    assert_eq!(agent.pods.next_try(), None);
    Ok(())
}

fn a_pod_that_vanished_is_closed_whoever_holds_its_sockets() -> Outcome {
    let node = Node::new()?;
    let mut agent = Agent::start(&node, Vec::new())?;
    let (place, _, fds) = open(&mut agent, &pod("a"))?;
    drop(connect_from_outside(&node, 8012)?);
    drop(agent.deposited()?);
    let tellings = told(agent.wish(&[], Instant::now())?)?;
    assert!(
        matches!(&tellings[..], [Telling { word: PodWord::Gone { place: same }, .. }] if *same == place),
        "{tellings:?}"
    );
    assert!(matches!(agent.deposited()?, (key, None) if key == "pod/a"), "nothing is kept");
    // The gateway has not closed them yet.
    assert_eq!(fds.len(), 3);
    assert!(connect_from_outside(&node, 8012).is_err());
    // ... and another one may have the ports at once.
    open(&mut agent, &pod("b"))?;
    Ok(())
}

fn an_address_in_two_namespaces_is_nobodys() -> Outcome {
    let mut node = Node::new()?;
    node.add("thief", |thief| thief.ip(&["addr", "add", &format!("{POD}/32"), "dev", "lo"]))?;
    let mut agent = Agent::start(&node, Vec::new())?;
    let (_, reason, _) = agent.insist(&[pod("a")], Instant::now())?;
    assert_eq!(reason, format!("address {POD} is in 2 network namespaces: whose is it?"));

    // One that takes every address takes none.
    node.remove("thief")?;
    node.add("liar", |liar| liar.write("/proc/sys/net/ipv4/ip_nonlocal_bind", "1"))?;
    let again = agent.pods.next_try().ok_or("a time for the next attempt")?;
    let tellings = told(agent.runtime.block_on(agent.pods.step(again))?)?;
    assert!(matches!(&tellings[..], [Telling { word: PodWord::Serve { .. }, .. }]), "{tellings:?}");

    // An address that is nowhere, in a folder where not everything is a namespace.
    std::fs::write(node.folder().join("not-yet-mounted"), "")?;
    let mut lost = pod("b");
    lost.address = [10, 99, 0, 77].into();
    let (_, reason, _) = agent.insist(&[pod("a"), lost], Instant::now())?;
    assert!(reason.starts_with("no network namespace with address 10.99.0.77 under"), "{reason}");
    Ok(())
}

fn a_namespace_that_was_made_anew_is_found_again() -> Outcome {
    let mut node = Node::new()?;
    let mut agent = Agent::start(&node, Vec::new())?;
    let one = pod("a");
    let (old, ..) = open(&mut agent, &one)?;
    node.replace_pod()?;
    let tellings = told(agent.runtime.block_on(agent.pods.step(Instant::now()))?)?;
    let [Telling { word: PodWord::Gone { place: gone }, .. }] = &tellings[..] else {
        return Err(format!("{tellings:?}").into());
    };
    assert_eq!(*gone, old);
    // Whose it is that has the address now is not known before something newer is said of the pod.
    assert!(agent.wish(std::slice::from_ref(&one), Instant::now())?.is_empty());
    assert_eq!(agent.pods.next_try(), None);
    agent.version += 1;
    let (new, ..) = open(&mut agent, &one)?;
    assert_ne!(new, old);
    drop(connect_from_outside(&node, 8012)?);
    Ok(())
}

fn settings_change_without_a_socket_being_touched() -> Outcome {
    let node = Node::new()?;
    let mut agent = Agent::start(&node, Vec::new())?;
    let mut one = pod("a");
    let (place, ..) = open(&mut agent, &one)?;
    let (_, first) = agent.deposited()?;
    assert!(!first.ok_or("a deposit")?.fds.is_empty());
    one.draining = true;
    let tellings = told(agent.wish(std::slice::from_ref(&one), Instant::now())?)?;
    let [Telling { word, .. }] = &tellings[..] else { return Err(format!("{tellings:?}").into()) };
    assert_eq!(*word, PodWord::Changed { place, pod: Box::new(one) });
    let (_, second) = agent.deposited()?;
    assert!(second.ok_or("a deposit")?.fds.is_empty(), "the supervisor has the sockets already");
    drop(connect_from_outside(&node, 8012)?);
    Ok(())
}

/// Whose network is gone and who is about to end is closed, and nobody complains.
fn a_pod_that_ends_is_not_missed() -> Outcome {
    let mut node = Node::new()?;
    let mut agent = Agent::start(&node, Vec::new())?;
    let mut one = pod("a");
    let (place, ..) = open(&mut agent, &one)?;
    node.remove("pod")?;
    let tellings = told(agent.runtime.block_on(agent.pods.step(Instant::now()))?)?;
    assert!(matches!(&tellings[..], [Telling { word: PodWord::Gone { place: same }, .. }] if *same == place));
    one.draining = true;
    agent.version += 1;
    let now = Instant::now();
    assert!(agent.wish(std::slice::from_ref(&one), now)?.is_empty());
    // Another pod gives itself the address: it inherits nothing.
    node.add("heir", |heir| heir.ip(&["addr", "add", &format!("{POD}/32"), "dev", "lo"]))?;
    agent.version += 1;
    assert!(agent.wish(std::slice::from_ref(&one), now)?.is_empty());
    assert_eq!(agent.pods.next_try(), None);
    assert!(agent.wish(&[], now)?.is_empty());
    assert_eq!(agent.pods.next_try(), None);
    Ok(())
}

/// What the kernel has counted for the one pod, when it has come to this.
fn counted(counted: &Counted, wanted: impl Fn(&Connections) -> bool) -> Result<Connections, Failed> {
    let begun = Instant::now();
    loop {
        let all = counted.read();
        let now = all.into_values().next().ok_or("no place is counted")?;
        if wanted(&now) {
            return Ok(now);
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{now:?}");
        std::thread::yield_now();
    }
}

fn connections_are_counted_to_the_byte() -> Outcome {
    const UP: usize = 3_000_001;
    const DOWN: usize = 70_003;
    let node = Node::new()?;
    let app = node.in_pod(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 8080)))?;
    let mut agent = Agent::start(&node, Vec::new())?;
    let counters = Arc::new(Counted::new(Some(Traffic::load()?)));
    agent.pods.count_by(counters.clone());
    let (place, ports, fds) = open(&mut agent, &pod("a"))?;
    let (_, deposit) = agent.deposited()?;
    assert_eq!(counters.read().keys().copied().collect::<Vec<_>>(), [place]);

    // From another namespace, over the cable: accepted by whoever has the listener.
    let exchange = |fd: &OwnedFd, port: u16| -> Outcome {
        let mut client = connect_from_outside(&node, port)?;
        let (mut accepted, _) = listener(fd)?.accept()?;
        accepted.set_nonblocking(false)?;
        let sending = std::thread::spawn(move || {
            client.write_all(&vec![1; UP])?;
            client.read_exact(&mut vec![0; DOWN])
        });
        accepted.read_exact(&mut vec![0; UP])?;
        accepted.write_all(&vec![1; DOWN])?;
        Ok(sending.join().map_err(|_panic| "the client panicked")??)
    };
    for (port, fd) in ports.iter().zip(&fds) {
        match port {
            PodPort::Serving => exchange(fd, 8012)?,
            PodPort::Stats => exchange(fd, 9090)?,
            _ => {}
        }
    }
    let now = counted(&counters, |now| now.closed[0] == 1)?;
    assert_eq!(
        (now.opened, now.received[0], now.sent[0]),
        ([1, 0], UP as u64, DOWN as u64),
        "and not the figures' port"
    );

    // And what is dialled in the pod.
    let (_, sockets) = hand_over(&agent.ask(place, 2))?;
    let mut sockets = sockets.into_iter();
    let mut stream = dial(sockets.next().ok_or("a socket")?)?;
    let (mut inside, _) = app.accept()?;
    stream.write_all(&[1; 1000])?;
    inside.read_exact(&mut [0; 1000])?;
    inside.write_all(&[1; 10])?;
    stream.read_exact(&mut [0; 10])?;
    let now = counted(&counters, |now| now.received[1] == 9)?;
    assert_eq!((now.opened, now.closed), ([1, 1], [1, 0]));
    drop((stream, inside));
    let now = counted(&counters, |now| now.closed[1] == 1)?;
    assert_eq!((now.sent[1], now.received[1], now.failed), (1000, 10, 0));
    drop(app);
    assert!(dial(sockets.next().ok_or("another socket")?).is_err());
    assert_eq!(counted(&counters, |now| now.failed == 1)?.opened, [1, 1]);

    // The names that they have.
    let shown: Vec<String> = Shown(counters.clone()).collect().iter().map(|one| one.name().to_owned()).collect();
    assert!(shown.iter().any(|name| name == "lifl_pod_bytes_total"), "{shown:?}");

    // Another agent, with counters of its own, finds the sockets and counts on.
    drop((agent, counters));
    let mut agent = Agent::start(&node, vec![deposit.ok_or("a deposit")?])?;
    let counters = Arc::new(Counted::new(Some(Traffic::load()?)));
    agent.pods.count_by(counters.clone());
    exchange(&fds[0], 8012)?;
    let now = counted(&counters, |now| now.closed[0] == 1)?;
    assert_eq!((now.received[0], now.sent[0]), (UP as u64, DOWN as u64));
    agent.wish(&[], Instant::now())?;
    assert!(counters.read().is_empty(), "a pod that is gone has no counters");
    Ok(())
}
