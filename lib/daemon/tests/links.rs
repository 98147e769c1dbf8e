//! Supervisors in processes of their own, linked over a node's socket: real children, killed and started again.
//!
//! This program is all of them: `parent NAME SOCKET REPORTS READY` is a supervisor with one child, `child ..` its child, which
//! tells the test whom it meets: siblings say their process ids to each other over the channels that they were given.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::{fs::PermissionsExt as _, net::UnixDatagram, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Failed, Trial};
use lifl_daemon::{COORDINATOR_UID, Child, ChildSpec, GATEWAY_UID, Kin, NodeSocket, Sibling, Supervisor};
use rustix::{
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send, socket_with},
    process::{Pid, Signal, geteuid, kill_process},
};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

type Outcome = Result<(), Failed>;
type Surged = Result<([Parent; 3], [i32; 3]), Failed>;
type Run = fn() -> Outcome;

/// Nothing here takes as long; what does is a failure.
const PATIENCE: Duration = Duration::from_secs(30);

/// Tests by the names of their functions.
macro_rules! trials {
    ($($name:ident),* $(,)?) => { [$((stringify!($name), $name as Run)),*] };
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["parent", name, socket, reports, ready] => return parent(name, socket.into(), reports, ready),
        ["child", name, reports, ready] => return child(name, reports.into(), ready == "ready"),
        ["stranger", socket, name] => return stranger(socket.as_ref(), name),
        _ => {}
    }
    let trials = trials![
        who_dies_behind_a_link_is_paired_anew,
        a_hub_that_comes_back_is_another_one,
        of_two_of_one_name_the_newer_is_paired,
        a_newer_one_that_does_not_serve_yet_is_not_preferred,
        whose_place_is_taken_is_told_although_the_agent_dies,
        one_that_drains_gives_way,
        a_newer_one_that_dies_is_waited_for,
        whose_place_is_taken_is_not_paired_by_the_next_hub,
        a_second_hub_waits_for_the_first_ones_end,
    ];
    let of_root = trials![a_stranger_is_turned_away];
    let trials = trials.map(|trial| (trial, false)).into_iter().chain(of_root.map(|trial| (trial, true)));
    let trials = trials.map(|((name, run), needs_root)| {
        let ignored = needs_root && !geteuid().is_root();
        // libtest-mimic shows no reasons, so the name tells it.
        let why = if ignored { " (needs root)" } else { "" };
        Trial::test(format!("{name}{why}"), run).with_ignored_flag(ignored)
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

/// What a child tells the test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Report {
    /// These two have a channel, the `turn`th that this process was given: `other` said its process id over it.
    Met { pid: i32, name: String, other: String, other_pid: i32, epoch: u64, turn: u32 },
    /// Another one has taken the place of this process.
    Superseded { pid: i32 },
}

// ---- the processes

fn name_of(name: &str) -> &'static str {
    ["agent", "gateway", "coordinator"].into_iter().find(|known| *known == name).expect("a component's name")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn parent(name: &str, socket: PathBuf, reports: &str, ready: &str) {
    lifl_daemon::logs::start(lifl_daemon::logs::Format::Text, "debug");
    let name = name_of(name);
    let peers = if name == "agent" { vec!["gateway", "coordinator"] } else { Vec::new() };
    let spec = ChildSpec {
        name,
        program: "/proc/self/exe".into(),
        args: vec!["child".into(), name.into(), reports.into(), ready.into()],
        environment: Vec::new(),
        config: serde_json::Value::Null,
        peers,
        uid: None,
        deposits: Vec::new(),
        failpoint: None,
    };
    runtime().block_on(async {
        let (supervisor, run) = Supervisor::start(vec![spec]).expect("a supervisor");
        if name == "agent" {
            let socket = NodeSocket::bind(&socket).await.expect("the socket");
            tokio::spawn(supervisor.clone().take_links(socket));
        } else {
            tokio::spawn(supervisor.clone().keep_link(socket, name));
        }
        let mut term = signal(SignalKind::terminate()).expect("a signal");
        tokio::spawn(async move {
            term.recv().await;
            // Its child drains for as long as it lives.
            supervisor.drain(2 * PATIENCE).await;
        });
        run.await.expect("the child lives");
    });
}

fn child(name: &str, reports: PathBuf, ready: bool) {
    let name = name.to_owned();
    runtime().block_on(async move {
        let (child, _) = Child::from_stdin().await.expect("a supervisor");
        if ready {
            child.ready().await.expect("its ear");
        }
        let mut turn = 0;
        while let Some(kin) = child.next_kin().await {
            let Kin::Sibling(sibling) = kin else {
                tell(&reports, &Report::Superseded { pid: own_pid() });
                continue;
            };
            tokio::spawn(meet(name.clone(), turn, sibling, reports.clone()));
            turn += 1;
        }
    });
}

fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

fn tell(reports: &Path, report: &Report) {
    let text = serde_json::to_vec(report).expect("JSON");
    // A test that has ended hears nothing.
    let _sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(&text, reports));
}

/// Says who it is, hears who the other is, and waits for its end.
async fn meet(name: String, turn: u32, sibling: Sibling, reports: PathBuf) {
    let pid = own_pid();
    let Sibling { name: other, epoch, channel } = sibling;
    let _it_may_be_gone = channel.send(&pid, &[]).await;
    while let Ok(Some((other_pid, _))) = channel.recv::<i32>().await {
        let report = Report::Met { pid, name: name.clone(), other: other.clone(), other_pid, epoch, turn };
        tell(&reports, &report);
    }
}

/// Connects as somebody else and tells, by its exit code, whether it was turned away.
fn stranger(socket: &Path, name: &str) {
    let fd = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket");
    connect(&fd, &SocketAddrUnix::new(socket).expect("a path")).expect("it may connect");
    // A word of its own would be heard if it were let in.
    let mut hello = format!(r#".{{"Hello":{{"name":"{name}","epoch":18446744073709551615}}}}"#).into_bytes();
    hello[0] = 0;
    let _maybe_closed = send(&fd, &hello, rustix::net::SendFlags::NOSIGNAL);
    let mut up = br#".{"Life":{"pid":1,"ready":true}}"#.to_vec();
    up[0] = 0;
    let _maybe_closed = send(&fd, &up, rustix::net::SendFlags::NOSIGNAL);
    let mut word = [0; 64];
    let turned_away = loop {
        match recv(&fd, &mut word, rustix::net::RecvFlags::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) | Ok((0, _)) => break true,
            _ => break false,
        }
    };
    std::process::exit(if turned_away { 42 } else { 43 });
}

// ---- the node, as the test sees it

struct Node {
    folder: tempfile::TempDir,
    reports: UnixDatagram,
    /// Who is connected with whom: (process, other's name) to the other's process and epoch.
    met: BTreeMap<(i32, String), (i32, u64)>,
    /// Turn of the channel over which they are.
    turns: BTreeMap<(i32, String), u32>,
    /// Newest process by component, as it reported itself.
    names: BTreeMap<i32, String>,
    /// Whose place was taken.
    superseded: BTreeSet<i32>,
    /// With which gateways an agent was ever connected, by their processes.
    gateways: Vec<i32>,
}

/// A supervisor in a process of its own; killed when dropped.
struct Parent(std::process::Child);

impl Drop for Parent {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _reaped_already = self.0.wait();
    }
}

impl Node {
    fn new() -> Result<Self, Failed> {
        let folder = tempfile::tempdir()?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let reports = UnixDatagram::bind(folder.path().join("reports"))?;
        reports.set_read_timeout(Some(Duration::from_secs(1)))?;
        let (met, turns, names) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Ok(Self { folder, reports, met, turns, names, superseded: BTreeSet::new(), gateways: Vec::new() })
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("node.sock")
    }

    fn parent(&self, name: &str) -> io::Result<Parent> {
        self.parent_that_is(name, "ready", Stdio::inherit())
    }

    fn parent_that_is(&self, name: &str, ready: &str, log: Stdio) -> io::Result<Parent> {
        let command = move |uid: Option<u32>| {
            let mut command = Command::new("/proc/self/exe");
            command.arg("parent").arg(name).arg(self.socket()).arg(self.folder.path().join("reports"));
            command.arg(ready);
            command.stdin(Stdio::null()).stderr(log);
            if let Some(uid) = uid {
                command.uid(uid).gid(uid);
            }
            command.spawn().map(Parent)
        };
        fs::set_permissions(self.folder.path().join("reports"), fs::Permissions::from_mode(0o777))?;
        // As on a cluster: all but the agent have no rights.
        let uid = match name {
            "gateway" => Some(GATEWAY_UID),
            "coordinator" => Some(COORDINATOR_UID),
            _ => None,
        };
        command(uid.filter(|_| geteuid().is_root()))
    }

    fn hear(&mut self) -> Result<(), Failed> {
        let mut text = [0; 4096];
        let got = match self.reports.recv(&mut text) {
            Ok(got) => got,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match serde_json::from_slice(&text[..got])? {
            Report::Met { pid, name, other, other_pid, epoch, turn } => {
                if name == "agent" && other == "gateway" {
                    self.gateways.push(other_pid);
                }
                self.names.insert(pid, name);
                // Words over an older channel may come later: it is not used any more.
                let last = self.turns.entry((pid, other.clone())).or_default();
                if turn >= *last {
                    *last = turn;
                    self.met.insert((pid, other), (other_pid, epoch));
                }
            }
            Report::Superseded { pid } => drop(self.superseded.insert(pid)),
        }
        Ok(())
    }

    /// Listens until `found` finds something.
    fn until<T>(&mut self, what: &str, found: impl Fn(&Self) -> Option<T>) -> Result<T, Failed> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = found(self) {
                return Ok(found);
            }
            if Instant::now() > end {
                return Err(format!("{what} does not come; met: {:?}", self.met).into());
            }
            self.hear()?;
        }
    }

    /// Processes of `a` and `b` that are connected with each other, over the last channel that each got; and the epoch that `a`
    /// was told of `b`. Processes of `not` do not count.
    fn pair(&mut self, a: &str, b: &str, not: &[i32]) -> Result<(i32, i32, u64), Failed> {
        self.until(&format!("{a} with {b}"), |node| {
            node.met.iter().find_map(|((pid, other), (other_pid, epoch))| {
                let right = other == b && node.names.get(pid).is_some_and(|name| name == a);
                let back = node.met.get(&(*other_pid, a.to_owned())).is_some_and(|(back, _)| back == pid);
                let counts = !not.contains(pid) && !not.contains(other_pid);
                (right && back && counts).then_some((*pid, *other_pid, *epoch))
            })
        })
    }
}

fn kill(pid: i32) -> Outcome {
    Ok(kill_process(Pid::from_raw(pid).ok_or("a process")?, Signal::KILL)?)
}

// ---- the trials

fn who_dies_behind_a_link_is_paired_anew() -> Outcome {
    let mut node = Node::new()?;
    // The order of starts does not matter: whoever is first waits.
    let _gateway = node.parent("gateway")?;
    let _coordinator = node.parent("coordinator")?;
    let _agent = node.parent("agent")?;
    let (agent, gateway, epoch) = node.pair("agent", "gateway", &[])?;
    let (_, coordinator, _) = node.pair("agent", "coordinator", &[])?;
    let (_, also, _) = node.pair("gateway", "coordinator", &[])?;
    assert_eq!(also, coordinator);

    kill(gateway)?;
    let (same_agent, next, same_epoch) = node.pair("agent", "gateway", &[gateway])?;
    assert_eq!((same_agent, same_epoch), (agent, epoch), "its supervisor is the one that it was");
    let (_, same, _) = node.pair("gateway", "coordinator", &[gateway])?;
    assert_eq!(same, coordinator);

    kill(agent)?;
    let (successor, same, _) = node.pair("agent", "gateway", &[agent])?;
    assert_eq!(same, next);
    let (same, _, _) = node.pair("agent", "coordinator", &[agent])?;
    assert_eq!(same, successor);
    // Nobody else was touched.
    assert_eq!(node.pair("gateway", "coordinator", &[gateway])?.0, next);
    Ok(())
}

fn a_hub_that_comes_back_is_another_one() -> Outcome {
    let mut node = Node::new()?;
    let hub = node.parent("agent")?;
    let _gateway = node.parent("gateway")?;
    let _coordinator = node.parent("coordinator")?;
    let (gateway, agent, epoch) = node.pair("gateway", "agent", &[])?;
    let (same, coordinator, _) = node.pair("gateway", "coordinator", &[])?;
    assert_eq!(same, gateway);
    // Its child dies with it; the socket's file stays.
    drop(hub);
    assert!(node.socket().exists());
    let _hub = node.parent("agent")?;
    let (same, _, other_epoch) = node.pair("gateway", "agent", &[agent])?;
    assert_eq!(same, gateway, "who is linked lives on");
    assert!(other_epoch > epoch, "{other_epoch} after {epoch}");
    let (same, _, same_epoch) = node.pair("coordinator", "agent", &[agent])?;
    assert_eq!((same, same_epoch), (coordinator, other_epoch));
    Ok(())
}

fn of_two_of_one_name_the_newer_is_paired() -> Outcome {
    let mut node = Node::new()?;
    let _hub = node.parent("agent")?;
    let _old = node.parent("gateway")?;
    let (agent, old, epoch) = node.pair("agent", "gateway", &[])?;
    let new_parent = node.parent("gateway")?;
    let (same, new, later) = node.pair("agent", "gateway", &[old])?;
    assert_eq!(same, agent);
    assert!(later > epoch);

    // Both die. Whoever serves first is paired, and in the end the newer one.
    kill(old)?;
    kill(new)?;
    let next = node.until("the newer one's next life", |node| {
        let (next, same) = node.met.get(&(agent, "gateway".to_owned()))?;
        (*same == later && *next != new).then_some(*next)
    })?;

    // The newer one goes: the older one's successor is paired.
    drop(new_parent);
    let (_, back, same) = node.pair("agent", "gateway", &[old, new, next])?;
    assert_eq!(same, epoch);
    assert!(![old, new, next].contains(&back));
    Ok(())
}

fn a_newer_one_that_does_not_serve_yet_is_not_preferred() -> Outcome {
    let mut node = Node::new()?;
    let _hub = node.parent("agent")?;
    let old_parent = node.parent("gateway")?;
    let (agent, old, epoch) = node.pair("agent", "gateway", &[])?;
    let _new = node.parent_that_is("gateway", "unready", Stdio::inherit())?;
    kill(agent)?;
    let (next, same, same_epoch) = node.pair("agent", "gateway", &[agent])?;
    assert_eq!((same, same_epoch), (old, epoch));
    // When it is the only one it is paired all the same: what it needs to serve may be the others.
    drop(old_parent);
    let (same, _, later) = node.pair("agent", "gateway", &[old])?;
    assert!(same == next && later > epoch);
    Ok(())
}

fn one_that_drains_gives_way() -> Outcome {
    let mut node = Node::new()?;
    let _hub = node.parent("agent")?;
    let old_parent = node.parent("gateway")?;
    let (agent, old, epoch) = node.pair("agent", "gateway", &[])?;
    let _new = node.parent_that_is("gateway", "unready", Stdio::inherit())?;
    kill_process(Pid::from_child(&old_parent.0), Signal::TERM)?;
    let (same, _, later) = node.pair("agent", "gateway", &[old])?;
    assert!(same == agent && later > epoch);
    Ok(())
}

/// A node with a gateway whose place another one has taken: hub and gateways, with the processes of agent, old and new gateway.
fn surged(node: &mut Node) -> Surged {
    let hub = node.parent("agent")?;
    let old_parent = node.parent("gateway")?;
    let (_, old, _) = node.pair("agent", "gateway", &[])?;
    let new_parent = node.parent("gateway")?;
    let (agent, new, _) = node.pair("agent", "gateway", &[old])?;
    Ok(([hub, old_parent, new_parent], [agent, old, new]))
}

fn whose_place_is_taken_is_told_although_the_agent_dies() -> Outcome {
    let mut node = Node::new()?;
    let _hub = node.parent("agent")?;
    let _old_parent = node.parent("gateway")?;
    let (agent, old, _) = node.pair("agent", "gateway", &[])?;
    // Whatever the agent would have said, it does not live to say it.
    kill(agent)?;
    let _new_parent = node.parent("gateway")?;
    node.until("the word to the old gateway", |node| node.superseded.contains(&old).then_some(()))?;
    let (_, new, _) = node.pair("agent", "gateway", &[agent, old])?;
    assert!(!node.superseded.contains(&new));
    Ok(())
}

fn a_newer_one_that_dies_is_waited_for() -> Outcome {
    let mut node = Node::new()?;
    let (_parents, [agent, old, new]) = surged(&mut node)?;
    node.until("the word to the old gateway", |node| node.superseded.contains(&old).then_some(()))?;
    let before = node.gateways.len();
    kill(new)?;
    let (_, next, _) = node.pair("agent", "gateway", &[old, new])?;
    // The agent with it, so that whoever serves at that moment would be taken.
    kill(next)?;
    kill(agent)?;
    node.pair("agent", "gateway", &[agent, old, new, next])?;
    assert!(!node.gateways[before..].contains(&old), "{:?} with {old}", &node.gateways[before..]);
    Ok(())
}

fn whose_place_is_taken_is_not_paired_by_the_next_hub() -> Outcome {
    let mut node = Node::new()?;
    let ([hub, _old_parent, new_parent], [agent, old, new]) = surged(&mut node)?;
    node.until("the word to the old gateway", |node| node.superseded.contains(&old).then_some(()))?;
    let before = node.gateways.len();
    // The older one finds the next hub first.
    let stopped = Pid::from_child(&new_parent.0);
    kill_process(stopped, Signal::STOP)?;
    drop(hub);
    let log = node.folder.path().join("log");
    let _hub = node.parent_that_is("agent", "ready", fs::File::create(&log)?.into())?;
    node.until("the older one's link", |_| {
        fs::read_to_string(&log).ok()?.contains(r#"linked name="gateway""#).then_some(())
    })?;
    // That nothing comes of it can only be waited for.
    std::thread::sleep(Duration::from_secs(1));
    kill_process(stopped, Signal::CONT)?;
    let (_, same, _) = node.pair("agent", "gateway", &[agent, old])?;
    assert_eq!(same, new);
    assert!(!node.gateways[before..].contains(&old), "{:?} with {old}", &node.gateways[before..]);
    // The newer one goes, and its supervisor with it: better the older one than none.
    drop(new_parent);
    node.pair("agent", "gateway", &[agent, new])?;
    assert!(node.gateways[before..].contains(&old));
    Ok(())
}

fn a_second_hub_waits_for_the_first_ones_end() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("node.sock");
    runtime().block_on(async {
        let first = NodeSocket::bind(&path).await?;
        let mut second = tokio::spawn({
            let path = path.clone();
            async move { NodeSocket::bind(&path).await }
        });
        assert!(tokio::time::timeout(Duration::from_millis(300), &mut second).await.is_err(), "two hubs of one node");
        drop(first);
        drop(tokio::time::timeout(PATIENCE, second).await???);
        // No folder is made: in a container it would be nobody's.
        let nowhere = NodeSocket::bind(&folder.path().join("nowhere").join("node.sock")).await;
        let said = nowhere.err().ok_or("a socket in no folder")?.to_string();
        assert!(said.contains("is the node's folder mounted there?"), "{said}");
        Ok(())
    })
}

fn a_stranger_is_turned_away() -> Outcome {
    let mut node = Node::new()?;
    let _hub = node.parent("agent")?;
    let _gateway = node.parent("gateway")?;
    let (agent, gateway, epoch) = node.pair("agent", "gateway", &[])?;
    // Nor is a component another one: with a coordinator's word it would command the agent.
    let strangers = [
        (1000, "gateway"),
        (65_531, "gateway"),
        (GATEWAY_UID, "coordinator"),
        (COORDINATOR_UID, "gateway"),
        (GATEWAY_UID, "agent"),
    ];
    for (uid, name) in strangers {
        let mut command = Command::new("/proc/self/exe");
        let status = command.arg("stranger").arg(node.socket()).arg(name).uid(uid).gid(GATEWAY_UID).status()?;
        assert_eq!(status.code(), Some(42), "user {uid} as {name}");
    }
    // Its word was not heard, or the agent would have been given another gateway.
    kill(agent)?;
    let (_, same, same_epoch) = node.pair("agent", "gateway", &[agent])?;
    assert_eq!((same, same_epoch), (gateway, epoch));
    Ok(())
}
