//! A gateway in a runtime of its own, with all its neighbours played over the real channels and sockets.
#![expect(dead_code, reason = "each test file uses its part")]
#![expect(clippy::unwrap_used, reason = "a test ends where its surroundings fail")]

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use lifl_api::{
    job::FederatedJob,
    node::{FromAgent, FromGateway, ToAgent, ToGateway, Tree},
    pod::{PodAsk, PodWord},
};
use lifl_daemon::{Channel, Child, Deposit, Startup, TestSupervisor};
use lifl_ebpf::{Descriptor, Kind, ObjectKey, role, wire::DescriptorSocket};
use lifl_shm::{ObjectKind, ObjectMeta, Segment, SegmentReader, SegmentSpec};
use serde_json::{Value, json};
use tokio::{runtime::Runtime, sync::watch, time::timeout};

pub(crate) mod http;
pub(crate) mod tensors;

/// Nothing in these tests takes as long; a hang becomes a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const CHAIN: u32 = 7;

/// Waits for something that must come.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} does not come"))
}

type Store = Arc<Mutex<BTreeMap<String, (Value, Vec<OwnedFd>)>>>;

/// The agent's part: grants, and what it was handed.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) channel: Channel,
    /// Segments granted so far, and how many may be.
    pub(crate) granted: AtomicU32,
    pub(crate) limit: AtomicU32,
    pub(crate) segments: watch::Sender<BTreeMap<u32, Arc<OwnedFd>>>,
    pub(crate) dropped: Mutex<Vec<u32>>,
    /// Sockets of pods given so far.
    pub(crate) sockets: AtomicU32,
}

/// The runtime of one life; a test that fails must not wait for it.
struct Life(Option<Runtime>);

impl Drop for Life {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

pub(crate) struct Node {
    pub(crate) address: SocketAddr,
    pub(crate) agent: Arc<Agent>,
    pub(crate) coordinator: Channel,
    /// The agent's end of the gateway's data socket: the test is path, router and aggregators.
    pub(crate) data: Arc<DescriptorSocket>,
    pub(crate) store: Store,
    pub(crate) supervisor: Arc<TestSupervisor>,
    config: Value,
    runtime: Life,
    ended: tokio::task::JoinHandle<Result<(), lifl_gateway::GatewayError>>,
    keeper: tokio::task::JoinHandle<()>,
}

impl Node {
    /// A first life.
    pub(crate) async fn start(config: Value) -> Self {
        Self::start_with(config, Vec::new()).await
    }

    /// A first life, with more listeners than that for clients.
    pub(crate) async fn start_with(config: Value, more: Vec<(&str, OwnedFd)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let store = Store::default();
        store.lock().unwrap().extend(more.into_iter().map(|(key, fd)| (key.to_owned(), (Value::Null, vec![fd]))));
        store.lock().unwrap().insert("listener".into(), (Value::Null, vec![listener.into()]));
        let (a, b) = lifl_ebpf::pair().unwrap();
        let node = Self::live(config, store, Arc::new(DescriptorSocket::new(b)), 0, BTreeMap::new()).await;
        node.agent.channel.send(&FromAgent::DataSocket, &[a.as_fd()]).await.unwrap();
        node.agent.channel.send(&FromAgent::Synced { path: "test".into() }, &[]).await.unwrap();
        node
    }

    async fn live(
        config: Value,
        store: Store,
        data: Arc<DescriptorSocket>,
        granted: u32,
        segments: BTreeMap<u32, Arc<OwnedFd>>,
    ) -> Self {
        // Shown with the test that fails.
        let _another_test_was_first =
            tracing_subscriber::fmt().with_env_filter("lifl_gateway=debug").with_test_writer().try_init();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (supervisor, fd) = TestSupervisor::new().unwrap();
        let supervisor = Arc::new(supervisor);
        let (restored, address) = {
            let store = store.lock().unwrap();
            let listener = TcpListener::from(store["listener"].1[0].try_clone().unwrap());
            let deposit = |(key, (meta, fds)): (&String, &(Value, Vec<OwnedFd>))| Deposit {
                key: key.clone(),
                meta: meta.clone(),
                fds: fds.iter().map(|fd| fd.try_clone().unwrap()).collect(),
            };
            (store.iter().map(deposit).collect::<Vec<_>>(), listener.local_addr().unwrap())
        };
        let startup = Startup { config: config.clone(), first: granted == 0, restored };
        let theirs = Arc::clone(&supervisor);
        let (begun, begins) = tokio::sync::oneshot::channel();
        let ended = runtime.spawn(async move {
            let (child, startup) = Child::for_test(&theirs, fd, startup).await.unwrap();
            begun.send(()).unwrap();
            lifl_gateway::run(child, startup).await.inspect_err(|error| eprintln!("the gateway ended: {error}"))
        });
        soon("the child", begins).await.unwrap();
        let keeper = tokio::spawn(keep(Arc::clone(&supervisor), Arc::clone(&store)));
        let agent = Arc::new(Agent {
            channel: supervisor.peer("agent").await.unwrap(),
            granted: AtomicU32::new(granted),
            limit: AtomicU32::new(u32::MAX),
            segments: watch::Sender::new(segments),
            dropped: Mutex::default(),
            sockets: AtomicU32::new(0),
        });
        let coordinator = supervisor.peer("coordinator").await.unwrap();
        tokio::spawn(grant(Arc::clone(&agent)));
        Self {
            address,
            agent,
            coordinator,
            data,
            store,
            supervisor,
            config,
            runtime: Life(Some(runtime)),
            ended,
            keeper,
        }
    }

    /// Dies as by SIGKILL: no task of it runs on, no destructor has a say in what is kept.
    pub(crate) async fn kill(mut self) -> Dead {
        let runtime = self.runtime.0.take().unwrap();
        self.ended.abort();
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(PATIENCE)).await.unwrap();
        soon("the end of the channel", self.keeper).await.unwrap();
        let segments = self.agent.segments.borrow().clone();
        let granted = self.agent.granted.load(Ordering::Relaxed);
        Dead { config: self.config, store: self.store, data: self.data, granted, segments }
    }

    /// Another agent, with nothing of what the one before had.
    pub(crate) async fn another_agent(&mut self, epoch: u64) {
        self.agent = Arc::new(Agent {
            channel: self.supervisor.peer_of("agent", epoch).await.unwrap(),
            granted: AtomicU32::new(100),
            limit: AtomicU32::new(u32::MAX),
            segments: watch::Sender::default(),
            dropped: Mutex::default(),
            sockets: AtomicU32::new(0),
        });
        tokio::spawn(grant(Arc::clone(&self.agent)));
    }

    pub(crate) async fn drained(mut self) {
        self.supervisor.drain().await.unwrap();
        soon("the end of the gateway", &mut self.ended).await.unwrap().unwrap();
    }

    /// The next word to the coordinator that `wanted` likes.
    pub(crate) async fn hear<T>(&self, what: &str, wanted: impl Fn(&FromGateway) -> Option<T>) -> (T, Vec<OwnedFd>) {
        soon(what, async {
            loop {
                let (word, fds) = self.coordinator.recv::<FromGateway>().await.unwrap().unwrap();
                if let Some(found) = wanted(&word) {
                    return (found, fds);
                }
            }
        })
        .await
    }

    pub(crate) async fn say(&self, word: &ToGateway) {
        self.coordinator.send(word, &[]).await.unwrap();
    }

    /// Waits until all that was said to the coordinator's worker is done.
    pub(crate) async fn settled(&self) -> Vec<String> {
        self.say(&ToGateway::Alive { chain: CHAIN }).await;
        let alive = |word: &FromGateway| match word {
            FromGateway::AliveClients { clients, .. } => Some(clients.clone()),
            _ => None,
        };
        self.hear("answer to Alive", alive).await.0
    }

    /// Gives it a job and its model.
    pub(crate) async fn job(&self, spec: impl FnOnce(&mut Value), model: &[u8], secret: Option<&str>) {
        let slot_bytes = 64 << 20;
        self.say(&job_word(spec, secret, slot_bytes)).await;
        self.model(0, model).await;
        self.settled().await;
    }

    pub(crate) async fn model(&self, round: u32, model: &[u8]) {
        use std::io::Write as _;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(model).unwrap();
        let sha256 = tensors::sha256(model);
        let word = ToGateway::Model { chain: CHAIN, round, length: model.len() as u64, sha256 };
        self.coordinator.send(&word, &[file.as_fd()]).await.unwrap();
    }

    pub(crate) async fn open(&self, round: u32, selected: &[&str], goal: u32, tree: Tree) {
        self.say(&open_word(round, selected, goal, tree)).await;
        self.settled().await;
    }

    /// The next descriptor that the gateway sends.
    pub(crate) async fn descriptor(&self) -> Descriptor {
        let data = Arc::clone(&self.data);
        let received = tokio::task::spawn_blocking(move || {
            let mut one = Vec::new();
            let got = data.peek(&mut one).unwrap();
            assert_ne!(got, 0, "the data socket is closed");
            data.consume(1).unwrap();
            one[0]
        });
        soon("a descriptor", received).await.unwrap()
    }

    pub(crate) async fn descriptor_of(&self, kind: Kind) -> Descriptor {
        loop {
            let descriptor = self.descriptor().await;
            if descriptor.kind == kind as u8 {
                return descriptor;
            }
        }
    }

    /// A segment that the gateway handed out, as a member maps it.
    pub(crate) async fn segment(&self, id: u32) -> SegmentReader {
        let mut segments = self.agent.segments.subscribe();
        let found = soon("a segment", segments.wait_for(|all| all.contains_key(&id))).await.unwrap();
        SegmentReader::map(found[&id].as_fd(), CHAIN, id).unwrap()
    }

    pub(crate) async fn join(&self, client: &str) -> String {
        self.join_as(client, "trainer").await
    }

    pub(crate) async fn join_as(&self, client: &str, role: &str) -> String {
        let body = json!({"specversion": "1.0", "id": format!("join-{client}"), "type": lifl_api::event::types::AVAILABLE,
            "source": source(client), "data": {"role": role}});
        let headers = [("content-type", "application/cloudevents+json".to_owned())];
        let answer = http::call(self.address, "POST", &path("/events"), &headers, body.to_string().as_bytes()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["token"].as_str().unwrap().to_owned()
    }

    /// Sends an update, whatever comes of it.
    pub(crate) async fn update(&self, head: Update<'_>, body: &[u8]) -> http::Answer {
        http::call(self.address, "POST", &path("/events"), &head.headers(), body).await
    }
}

/// What a dead gateway left.
pub(crate) struct Dead {
    config: Value,
    pub(crate) store: Store,
    data: Arc<DescriptorSocket>,
    granted: u32,
    segments: BTreeMap<u32, Arc<OwnedFd>>,
}

impl Dead {
    /// Lives again. `members`: segments that the agent tells of again.
    pub(crate) async fn revive(self, members: &[(&Segment, &OwnedFd)]) -> Node {
        let node = Node::live(self.config, self.store, self.data, self.granted.max(1), self.segments).await;
        for (segment, fd) in members {
            member(&node, segment, fd).await;
        }
        node
    }
}

/// Tells the gateway of a segment of a member.
pub(crate) async fn member(node: &Node, segment: &Segment, fd: &OwnedFd) {
    let word = FromAgent::Segment { chain: CHAIN, segment: segment.id().unwrap(), writer: segment.spec().writer };
    node.agent.channel.send(&word, &[fd.as_fd()]).await.unwrap();
}

async fn keep(supervisor: Arc<TestSupervisor>, store: Store) {
    while let Ok((key, deposit)) = supervisor.next_deposit().await {
        let mut store = store.lock().unwrap();
        match deposit {
            Some(deposit) => drop(store.insert(key, (deposit.meta, deposit.fds))),
            None => drop(store.remove(&key)),
        }
    }
}

async fn grant(agent: Arc<Agent>) {
    while let Ok(Some((word, mut fds))) = agent.channel.recv::<ToAgent>().await {
        match word {
            ToAgent::Grant { request, chain, .. } => {
                let segment = agent.granted.fetch_add(1, Ordering::Relaxed);
                let answer = if segment < agent.limit.load(Ordering::Relaxed) {
                    FromAgent::Granted { request, chain, segment }
                } else {
                    FromAgent::Refused { request, chain, reason: "the node's memory is used up".into() }
                };
                agent.channel.send(&answer, &[]).await.unwrap();
            }
            ToAgent::Segment { chain, segment, .. } => {
                let fd = Arc::new(fds.remove(0));
                agent.segments.send_modify(|all| drop(all.insert(segment, fd)));
                agent.channel.send(&FromAgent::Kept { chain, segment }, &[]).await.unwrap();
            }
            ToAgent::DropSegment { segment, .. } => agent.dropped.lock().unwrap().push(segment),
            // A pod whose network namespace is this process's own.
            ToAgent::Pod(PodAsk::Sockets { place, count }) => {
                agent.sockets.fetch_add(count, Ordering::Relaxed);
                let fds: Vec<OwnedFd> = (0..count).map(|_| unconnected()).collect();
                let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
                agent.channel.send(&FromAgent::Pod(PodWord::Sockets { place }), &fds).await.unwrap();
            }
            // This agent is always the one that gave it its pods.
            ToAgent::Holds { .. } | ToAgent::HoldsAll => {}
            other => panic!("{other:?}"),
        }
    }
}

fn unconnected() -> OwnedFd {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).unwrap()
}

pub(crate) fn path(rest: &str) -> String {
    format!("/v1/namespaces/default/jobs/digits{rest}")
}

pub(crate) fn source(client: &str) -> String {
    lifl_api::event::client_source("default", "digits", client)
}

pub(crate) fn job_word(spec: impl FnOnce(&mut Value), secret: Option<&str>, slot_bytes: u64) -> ToGateway {
    let mut document = json!({
        "apiVersion": "fl.lifl.dev/v1alpha1", "kind": "FederatedJob", "metadata": {"name": "digits", "namespace": "default"},
        "spec": {"model": {"name": "mlp", "initial": {"uri": "file:///m"}}, "rounds": 3, "clientsPerRound": 4,
            "checkpoint": {"uri": "file:///c"}, "maxWeight": 1000},
    });
    spec(&mut document["spec"]);
    let job: FederatedJob = serde_json::from_value(document).unwrap();
    ToGateway::Job {
        chain: CHAIN,
        job: Box::new(job),
        token_key: "00112233".into(),
        join_secret: secret.map(str::to_owned),
        slot_bytes,
    }
}

pub(crate) fn open_word(round: u32, selected: &[&str], goal: u32, tree: Tree) -> ToGateway {
    let selected = selected.iter().map(|client| (*client).to_owned()).collect();
    ToGateway::Open { chain: CHAIN, round, selected, goal, deadline_ms: 1_790_000_000_000, tree }
}

/// The head of an update; each field may be spoilt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update<'a> {
    pub(crate) client: &'a str,
    pub(crate) token: Option<&'a str>,
    pub(crate) id: &'a str,
    pub(crate) round: &'a str,
    pub(crate) samples: &'a str,
    pub(crate) kind: &'a str,
    pub(crate) media: &'a str,
    pub(crate) more: &'a [(&'a str, &'a str)],
}

impl<'a> Update<'a> {
    pub(crate) fn new(client: &'a str, token: &'a str, id: &'a str) -> Self {
        Self {
            client,
            token: Some(token),
            id,
            round: "1",
            samples: "10",
            kind: "full",
            media: "application/vnd.safetensors",
            more: &[],
        }
    }

    /// A header of `more` takes the place of the usual one; an empty value takes it away.
    pub(crate) fn headers(&self) -> Vec<(&'a str, String)> {
        let mut all = vec![
            ("ce-specversion", "1.0".to_owned()),
            ("ce-id", self.id.to_owned()),
            ("ce-source", source(self.client)),
            ("ce-type", lifl_api::event::types::UPDATE.to_owned()),
            ("ce-fljob", "digits".to_owned()),
            ("ce-flround", self.round.to_owned()),
            ("ce-flclient", self.client.to_owned()),
            ("ce-flsamples", self.samples.to_owned()),
            ("ce-flkind", self.kind.to_owned()),
            ("content-type", self.media.to_owned()),
        ];
        if let Some(token) = self.token {
            all.push(("authorization", format!("Bearer {token}")));
        }
        for (name, value) in self.more {
            all.retain(|(other, _)| other != name);
            if !value.is_empty() {
                all.push((name, (*value).to_owned()));
            }
        }
        all
    }
}

/// The top aggregator: folds nothing, but says what one would say.
pub(crate) struct Top {
    pub(crate) segment: Segment,
    pub(crate) fd: OwnedFd,
}

impl Top {
    pub(crate) async fn new(node: &Node, payload_bytes: u64) -> Self {
        let spec = SegmentSpec { chain: CHAIN, writer: role::TOP, slots: 4, payload_bytes, max_runs: 8 };
        let (segment, fd) = Segment::create(spec).unwrap();
        assert!(segment.set_id(1000));
        member(node, &segment, &fd).await;
        Self { segment, fd }
    }

    /// Seals the model of a round.
    pub(crate) fn seal(&self, round: u32, count: u32, weight: f64, file: &[u8]) -> Descriptor {
        let mut slot = self.segment.reserve().unwrap();
        slot.payload_mut()[..file.len()].copy_from_slice(file);
        let length = file.len() as u64;
        let meta = ObjectMeta { kind: ObjectKind::Model, round, count, weight, length, runs: Vec::new() };
        let sealed = slot.seal(&meta).unwrap();
        Descriptor { src: role::TOP, ..sealed.descriptor(Kind::Model, role::GATEWAY) }
    }
}

/// What the path would deliver of `inputs` being contained in `model`.
pub(crate) fn group(inputs: &[ObjectKey], model: Descriptor) -> Vec<Descriptor> {
    let release = |key: &ObjectKey| {
        let release = Descriptor::new(Kind::Release, CHAIN, role::GATEWAY).with_key(*key);
        Descriptor { src: model.src, round: model.round, ..release.with_contained_in(model.key()) }
    };
    inputs.iter().map(release).chain([model]).collect()
}
