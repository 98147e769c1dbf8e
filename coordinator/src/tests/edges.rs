//! The whole coordinator in process: real channels, a real folder; the test plays supervisor, agent and gateway.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::Path,
    time::Duration,
};

use lifl_api::{
    event::MetricsData,
    job::{FederatedJob, Phase},
    node::{ChainState, FromGateway, NodeEvent, Order, ToGateway},
};
use lifl_daemon::{Channel, Child, Deposit, Startup, TestSupervisor};
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::{chain_state, job, model, receipt, segment};
use crate::CoordinatorError;

/// Only bounds a hanging test; nothing is measured by it.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

struct Bench {
    supervisor: TestSupervisor,
    agent: Channel,
    gateway: Channel,
    run: JoinHandle<Result<(), CoordinatorError>>,
}

impl Bench {
    async fn new(document: &FederatedJob, restored: Vec<Deposit>, chains: Vec<ChainState>) -> Self {
        let (supervisor, fd) = TestSupervisor::new().unwrap();
        let config = json!({"jobs": [{"path": "digits.yaml", "document": document}], "gathering_ms": 0});
        let startup = Startup { config, first: restored.is_empty(), restored };
        let (child, startup) = Child::for_test(&supervisor, fd, startup).await.unwrap();
        let run = tokio::spawn(crate::run(child, startup));
        let agent = supervisor.peer("agent").await.unwrap();
        let gateway = supervisor.peer("gateway").await.unwrap();
        let hello = NodeEvent::Hello { shm_limit: 1 << 30, cores: 2, path: "userspace".into(), chains: vec![] };
        agent.send(&hello, &[]).await.unwrap();
        gateway.send(&FromGateway::Hello { chains, journal: false }, &[]).await.unwrap();
        Self { supervisor, agent, gateway, run }
    }

    async fn hear(&self) -> (ToGateway, Vec<OwnedFd>) {
        let word = tokio::time::timeout(PATIENCE, self.gateway.recv()).await.expect("the coordinator is silent");
        word.unwrap().expect("the coordinator hung up")
    }

    /// The next word for which `pick` gives something; others are passed over.
    async fn until<T>(&self, pick: impl Fn(ToGateway, Vec<OwnedFd>) -> Option<T>) -> T {
        loop {
            let (words, fds) = self.hear().await;
            if let Some(found) = pick(words, fds) {
                return found;
            }
        }
    }

    async fn next_deposit(&self) -> (String, Option<Deposit>) {
        let deposit = tokio::time::timeout(PATIENCE, self.supervisor.next_deposit()).await;
        deposit.expect("nothing is deposited").unwrap()
    }

    async fn say(&self, words: FromGateway) {
        self.gateway.send(&words, &[]).await.unwrap();
    }

    /// Answers plans until there are members; returns how many.
    async fn plan(&self) -> usize {
        loop {
            match self.agent.recv::<Order>().await.unwrap().expect("the coordinator hung up").0 {
                Order::Plan { chain, revision, members } => {
                    self.agent.send(&NodeEvent::Planned { chain, revision }, &[]).await.unwrap();
                    if !members.is_empty() {
                        return members.len();
                    }
                }
                Order::Chain { chain, quota, .. } => assert_eq!((chain, quota), (1, 1 << 30)),
                other @ Order::Remove { .. } => panic!("{other:?}"),
            }
        }
    }

    async fn answer_alive(&self) {
        self.until(|words, _| matches!(words, ToGateway::Alive { .. }).then_some(())).await;
        self.say(FromGateway::AliveClients { chain: 1, clients: vec!["a".into(), "b".into()] }).await;
    }

    async fn opened(&self) -> (u32, Vec<String>) {
        self.until(|words, _| match words {
            ToGateway::Open { round, selected, goal: 2, .. } => Some((round, selected)),
            _ => None,
        })
        .await
    }

    async fn done(&self, round: u32, bytes: &[u8]) {
        let fd = segment(4096, bytes);
        let length = bytes.len() as u64;
        let words = FromGateway::RoundDone {
            chain: 1,
            round,
            count: 2,
            weight: 4.0,
            offset: 4096,
            length,
            receipt: receipt(2),
        };
        self.gateway.send(&words, &[fd.as_fd()]).await.unwrap();
    }

    async fn committed(&self) -> (u32, String) {
        self.until(|words, _| match words {
            ToGateway::Commit { round, sha256, .. } => Some((round, sha256)),
            _ => None,
        })
        .await
    }

    async fn status(&self, pick: impl Fn(&FederatedJob) -> bool) -> FederatedJob {
        self.until(|words, _| match words {
            ToGateway::Job { job, .. } if pick(&job) => Some(*job),
            _ => None,
        })
        .await
    }
}

fn document(folder: &TempDir, rounds: u32, more: &str) -> FederatedJob {
    let initial = folder.path().join("m.safetensors");
    fs::write(&initial, model(&[0.5; 64])).unwrap();
    let uri = |path: &Path| format!("file://{}", path.display());
    job(rounds, 2, 2, &uri(&folder.path().join("checkpoint")), &uri(&initial), more)
}

fn read(fd: OwnedFd, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    File::from(fd).read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[tokio::test]
async fn a_job_runs_to_its_end() {
    let folder = TempDir::new().unwrap();
    let bench = Bench::new(&document(&folder, 2, ""), vec![], vec![]).await;
    assert_eq!(bench.plan().await, 1);
    let (first, _) = bench.hear().await;
    assert!(matches!(first, ToGateway::Job { chain: 1, slot_bytes, .. } if slot_bytes > 0), "{first:?}");
    let bytes = bench
        .until(|words, fds| match words {
            ToGateway::Model { round: 0, length, .. } => Some(read(fds.into_iter().next()?, length)),
            _ => None,
        })
        .await;
    assert_eq!(bytes, model(&[0.5; 64]));
    bench.answer_alive().await;
    let (round, selected) = bench.opened().await;
    assert_eq!((round, selected), (1, vec!["a".to_owned(), "b".to_owned()]));
    let (key, deposit) = bench.next_deposit().await;
    assert_eq!((key.as_str(), &deposit.unwrap().meta["number"]), ("round/default/digits", &json!(1)));
    for round in 1..=2 {
        bench.say(FromGateway::Closed { chain: 1, round, admitted: 2 }).await;
        bench.answer_alive().await;
        bench.done(round, &model(&[round as f32; 64])).await;
        let (committed, sha256) = bench.committed().await;
        assert_eq!(committed, round);
        let commit =
            fs::read_to_string(folder.path().join(format!("checkpoint/rounds/{round:06}/commit.json"))).unwrap();
        assert!(commit.contains(&sha256), "the commit was told before it was written");
        if round == 1 {
            assert_eq!(bench.opened().await.0, 2);
        }
    }
    bench.until(|words, _| matches!(words, ToGateway::Finish { succeeded: true, .. }).then_some(())).await;
    let last = bench.status(|job| job.status.as_ref().is_some_and(|s| s.phase == Phase::Succeeded)).await;
    let status = last.status.unwrap();
    assert_eq!((status.round, status.model.unwrap().round), (2, 2));
    bench.supervisor.drain().await.unwrap();
    bench.run.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_killed_coordinator_goes_on_with_the_open_round() {
    let folder = TempDir::new().unwrap();
    let document = document(&folder, 3, "");
    let bench = Bench::new(&document, vec![], vec![]).await;
    bench.plan().await;
    bench.answer_alive().await;
    assert_eq!(bench.opened().await.0, 1);
    let (_, deposit) = bench.next_deposit().await;
    bench.done(1, &model(&[1.0; 64])).await;
    assert_eq!(bench.committed().await.0, 1);
    // The second round's deposit is the one that its successor gets.
    let (_, second) = bench.next_deposit().await;
    assert_eq!(
        (deposit.unwrap().meta["number"].clone(), second.as_ref().unwrap().meta["number"].clone()),
        (json!(1), json!(2))
    );
    bench.run.abort();
    let state = ChainState { admitted: 1, model_round: Some(1), ..chain_state(1, "digits", 2) };
    let bench = Bench::new(&document, vec![second.unwrap()], vec![state]).await;
    bench.plan().await;
    let (round, length) = bench
        .until(|words, _| match words {
            ToGateway::Model { round, length, .. } => Some((round, length)),
            _ => None,
        })
        .await;
    assert_eq!((round, length), (1, model(&[1.0; 64]).len() as u64));
    assert_eq!(bench.committed().await.0, 1);
    assert_eq!(bench.opened().await, (2, vec!["a".to_owned(), "b".to_owned()]));
    bench.done(2, &model(&[2.0; 64])).await;
    assert_eq!(bench.committed().await.0, 2);
    bench.run.abort();
}

#[tokio::test]
async fn a_restarted_gateway_gets_the_committed_model_from_the_checkpoint() {
    let folder = TempDir::new().unwrap();
    let bench = Bench::new(&document(&folder, 3, ""), vec![], vec![]).await;
    bench.plan().await;
    bench.answer_alive().await;
    bench.opened().await;
    bench.done(1, &model(&[1.0; 64])).await;
    bench.committed().await;
    bench.opened().await;
    let gateway = bench.supervisor.peer("gateway").await.unwrap();
    let bench = Bench { gateway, ..bench };
    bench.say(FromGateway::Hello { chains: vec![], journal: false }).await;
    let bytes = bench
        .until(|words, fds| match words {
            ToGateway::Model { round: 1, length, .. } => Some(read(fds.into_iter().next()?, length)),
            _ => None,
        })
        .await;
    assert_eq!(bytes, model(&[1.0; 64]));
    assert_eq!(bench.committed().await.0, 1);
    assert_eq!(bench.opened().await.0, 2);
    bench.run.abort();
}

#[tokio::test]
async fn an_evaluator_ends_the_job() {
    let folder = TempDir::new().unwrap();
    let bench = Bench::new(&document(&folder, 9, "  stop: {metric: accuracy, atLeast: 0.9}\n"), vec![], vec![]).await;
    bench.plan().await;
    bench.answer_alive().await;
    bench.opened().await;
    let data = MetricsData { round: 0, samples: 0, metrics: [("accuracy".to_owned(), 0.93)].into() };
    bench.say(FromGateway::Metrics { chain: 1, client: "judge".into(), evaluator: true, data }).await;
    bench.until(|words, _| matches!(words, ToGateway::Close { round: 1, .. }).then_some(())).await;
    bench.say(FromGateway::Closed { chain: 1, round: 1, admitted: 0 }).await;
    let reason = bench
        .until(|words, _| match words {
            ToGateway::Finish { succeeded: true, reason, .. } => Some(reason),
            _ => None,
        })
        .await;
    assert!(reason.contains("accuracy 0.93"), "{reason}");
    bench.run.abort();
}

#[tokio::test]
async fn an_unreadable_model_fails_the_job_and_the_gateway_hears_why() {
    let folder = TempDir::new().unwrap();
    let mut document = document(&folder, 2, "");
    document.spec.model.initial.uri = Some("file:///nowhere/m.safetensors".into());
    let bench = Bench::new(&document, vec![], vec![]).await;
    let reason = bench
        .until(|words, _| match words {
            ToGateway::Finish { succeeded: false, reason, .. } => Some(reason),
            _ => None,
        })
        .await;
    assert!(reason.contains("/nowhere/m.safetensors") && reason.contains("os error 2"), "{reason}");
    bench.run.abort();
}

/// What the gateway hears of a job that is over.
async fn finish(bench: &Bench) -> (bool, String) {
    bench
        .until(|words, _| match words {
            ToGateway::Finish { succeeded, reason, .. } => Some((succeeded, reason)),
            _ => None,
        })
        .await
}

#[tokio::test]
async fn an_end_by_the_stop_condition_outlives_everything() {
    let folder = TempDir::new().unwrap();
    let stop = "  stop: {metric: accuracy, atLeast: 0.9}\n";
    let job = document(&folder, 9, stop);
    let bench = Bench::new(&job, vec![], vec![]).await;
    bench.plan().await;
    bench.answer_alive().await;
    bench.opened().await;
    bench.done(1, &model(&[1.0; 64])).await;
    bench.committed().await;
    assert_eq!(bench.opened().await.0, 2);
    let data = MetricsData { round: 1, samples: 0, metrics: [("accuracy".to_owned(), 0.93)].into() };
    bench.say(FromGateway::Metrics { chain: 1, client: "judge".into(), evaluator: true, data }).await;
    bench.until(|words, _| matches!(words, ToGateway::Close { round: 2, .. }).then_some(())).await;
    bench.say(FromGateway::Closed { chain: 1, round: 2, admitted: 0 }).await;
    let first = finish(&bench).await;
    assert!(first.0 && first.1.contains("accuracy 0.93"), "{first:?}");
    bench.run.abort();
    // Nothing but the disk is left.
    let bench = Bench::new(&job, vec![], vec![]).await;
    assert_eq!(finish(&bench).await, first);
    bench.run.abort();
    // More rounds are wanted: it goes on.
    let bench = Bench::new(&document(&folder, 10, stop), vec![], vec![]).await;
    bench.plan().await;
    bench.answer_alive().await;
    assert_eq!(bench.opened().await.0, 2);
    bench.run.abort();
}

#[tokio::test]
async fn a_second_coordinator_of_a_folder_is_refused_and_touches_nothing() {
    let folder = TempDir::new().unwrap();
    let job = document(&folder, 2, "");
    let first = Bench::new(&job, vec![], vec![]).await;
    first.plan().await;
    let second = Bench::new(&job, vec![], vec![]).await;
    let (succeeded, reason) = finish(&second).await;
    let place = folder.path().join("checkpoint").display().to_string();
    assert!(!succeeded && reason.contains(&place) && reason.contains("is in use"), "{reason}");
    first.answer_alive().await;
    first.opened().await;
    first.done(1, &model(&[1.0; 64])).await;
    assert_eq!(first.committed().await.0, 1);
    first.run.abort();
    second.run.abort();
}

#[tokio::test]
async fn of_several_first_models_one_is_stored() {
    let folder = TempDir::new().unwrap();
    let mut job = document(&folder, 2, "");
    (job.spec.model.initial.uri, job.spec.model.initial.from_first_client) = (None, true);
    let bench = Bench::new(&job, vec![], vec![]).await;
    bench.answer_alive().await;
    bench.opened().await;
    let candidates: Vec<Vec<u8>> = (1..=8).map(|n| model(&vec![n as f32; 64 * n])).collect();
    for bytes in &candidates {
        let fd = segment(0, bytes);
        let word = FromGateway::FirstModel { chain: 1, offset: 0, length: bytes.len() as u64 };
        bench.gateway.send(&word, &[fd.as_fd()]).await.unwrap();
    }
    bench.plan().await;
    let bytes = bench
        .until(|words, fds| match words {
            ToGateway::Model { round: 0, length, .. } => Some(read(fds.into_iter().next()?, length)),
            ToGateway::Finish { reason, .. } => panic!("{reason}"),
            _ => None,
        })
        .await;
    assert_eq!(bytes, candidates[0]);
    assert_eq!(fs::read(folder.path().join("checkpoint/rounds/000000/model.safetensors")).unwrap(), candidates[0]);
    bench.run.abort();
}

#[tokio::test]
async fn every_gateway_is_given_the_listener_of_the_coordinators_pod() {
    let folder = TempDir::new().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let deposit = Deposit { key: "clients".into(), meta: json!(null), fds: vec![listener.into()] };
    let mut bench = Bench::new(&document(&folder, 1, ""), vec![deposit], vec![]).await;
    let clients = |words: ToGateway, fds: Vec<OwnedFd>| match words {
        ToGateway::Clients => fds.into_iter().next().map(std::net::TcpListener::from),
        _ => None,
    };
    assert_eq!(bench.until(clients).await.local_addr().unwrap(), address);
    bench.gateway = bench.supervisor.peer("gateway").await.unwrap();
    assert_eq!(bench.until(clients).await.local_addr().unwrap(), address, "the next life of the gateway");
}
