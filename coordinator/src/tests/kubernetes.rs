//! Jobs that come and go at run time: the coordinator in process, an API server, agent and gateway played by the test.

use std::{fs, sync::Arc, time::Duration};

use lifl_api::node::{ChainState, FromGateway, NodeEvent, Order, ToGateway};
use lifl_daemon::{Channel, Child, Deposit, Startup, TestSupervisor};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{sync::mpsc, task::JoinHandle};

use super::{api::Api, chain_state, edges::PATIENCE, model, receipt, segment};
use crate::CoordinatorError;

struct Bench {
    folder: TempDir,
    api: Api,
    life: Option<Life>,
}

/// The coordinator and its siblings.
struct Life {
    supervisor: TestSupervisor,
    agent: Channel,
    gateway: Arc<Channel>,
    /// What the gateway is told.
    words: tokio::sync::Mutex<mpsc::UnboundedReceiver<ToGateway>>,
    run: JoinHandle<Result<(), CoordinatorError>>,
}

impl Bench {
    async fn new() -> Self {
        let (folder, api) = (TempDir::new().unwrap(), Api::start().await);
        fs::write(folder.path().join("m.safetensors"), model(&[0.5; 64])).unwrap();
        let mut bench = Self { folder, api, life: None };
        bench.live(vec![], vec![], false).await;
        bench
    }

    /// A life of the coordinator with what its supervisor kept, at a gateway that has these chains.
    async fn live(&mut self, restored: Vec<Deposit>, chains: Vec<ChainState>, journal: bool) {
        let (supervisor, fd) = TestSupervisor::new().unwrap();
        let kubernetes = json!({"kubeconfig": self.api.kubeconfig(self.folder.path()), "jobs_at_once": 2});
        let config = json!({"kubernetes": kubernetes, "gathering_ms": 0});
        let startup = Startup { config, first: restored.is_empty(), restored };
        let (child, startup) = Child::for_test(&supervisor, fd, startup).await.unwrap();
        let run = tokio::spawn(crate::run(child, startup));
        let agent = supervisor.peer("agent").await.unwrap();
        let gateway = supervisor.peer("gateway").await.unwrap();
        let known = chains.iter().map(|state| state.chain).collect();
        let hello = NodeEvent::Hello { shm_limit: 1 << 30, cores: 2, path: "userspace".into(), chains: known };
        agent.send(&hello, &[]).await.unwrap();
        gateway.send(&FromGateway::Hello { chains, journal }, &[]).await.unwrap();
        let gateway = Arc::new(gateway);
        let (sender, words) = mpsc::unbounded_channel();
        tokio::spawn(hear(Arc::clone(&gateway), sender, journal));
        self.life = Some(Life { supervisor, agent, gateway, words: tokio::sync::Mutex::new(words), run });
    }

    fn life(&self) -> &Life {
        self.life.as_ref().unwrap()
    }

    fn spec(&self, name: &str, rounds: u32) -> Value {
        let uri = |file: &str| format!("file://{}", self.folder.path().join(file).display());
        json!({"model": {"name": "m", "initial": {"uri": uri("m.safetensors")}}, "rounds": rounds, "clientsPerRound": 2,
            "checkpoint": {"uri": uri(name)}})
    }
}

/// The gateway; asked where it stands, it has nothing.
async fn hear(gateway: Arc<Channel>, words: mpsc::UnboundedSender<ToGateway>, journal: bool) {
    while let Ok(Some((word, _))) = gateway.recv::<ToGateway>().await {
        if matches!(word, ToGateway::Greet) {
            gateway.send(&FromGateway::Hello { chains: vec![], journal }, &[]).await.unwrap();
        } else if words.send(word).is_err() {
            return;
        }
    }
}

async fn soon<T>(what: &str, found: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, found).await.unwrap_or_else(|_late| panic!("waited for {what}"))
}

impl Life {
    /// The next word to the gateway for which `pick` gives something.
    async fn until<T>(&self, what: &str, pick: impl Fn(&ToGateway) -> Option<T>) -> T {
        soon(what, async {
            loop {
                let word = self.words.lock().await.recv().await.expect("the coordinator hung up");
                if let Some(found) = pick(&word) {
                    return found;
                }
            }
        })
        .await
    }

    async fn say(&self, word: FromGateway) {
        self.gateway.send(&word, &[]).await.unwrap();
    }

    /// The next order that `pick` likes; plans are carried out on the way.
    async fn order<T>(&self, what: &str, pick: impl Fn(&Order) -> Option<T>) -> T {
        soon(what, async {
            loop {
                let (order, _) = self.agent.recv::<Order>().await.unwrap().expect("the coordinator hung up");
                if let Order::Plan { chain, revision, .. } = &order {
                    self.agent.send(&NodeEvent::Planned { chain: *chain, revision: *revision }, &[]).await.unwrap();
                }
                if let Some(found) = pick(&order) {
                    return found;
                }
            }
        })
        .await
    }

    async fn planned(&self) -> u32 {
        let some = |order: &Order| match order {
            Order::Plan { chain, members, .. } if !members.is_empty() => Some(*chain),
            _ => None,
        };
        self.order("a plan", some).await
    }

    /// Answers who is alive, until a round opens; its chain and number.
    async fn opened(&self) -> (u32, u32) {
        let word = |word: &ToGateway| match word {
            ToGateway::Alive { chain } => Some((*chain, None)),
            ToGateway::Open { chain, round, .. } => Some((*chain, Some(*round))),
            _ => None,
        };
        loop {
            match self.until("a round", word).await {
                (chain, Some(round)) => return (chain, round),
                (chain, None) => {
                    let clients = vec!["a".into(), "b".into()];
                    self.say(FromGateway::AliveClients { chain, clients }).await;
                }
            }
        }
    }

    async fn done(&self, chain: u32, round: u32) {
        use std::os::fd::AsFd as _;
        let bytes = model(&[round as f32; 64]);
        let fd = segment(0, &bytes);
        let length = bytes.len() as u64;
        let word =
            FromGateway::RoundDone { chain, round, count: 2, weight: 4.0, offset: 0, length, receipt: receipt(2) };
        self.gateway.send(&word, &[fd.as_fd()]).await.unwrap();
    }

    /// What the supervisor has of this kind by now.
    async fn deposit(&self, prefix: &str) -> Deposit {
        loop {
            let (key, deposit) = soon("a deposit", self.supervisor.next_deposit()).await.unwrap();
            if let Some(deposit) = deposit.filter(|_| key.starts_with(prefix)) {
                return deposit;
            }
        }
    }
}

fn condition<'a>(status: &'a Value, kind: &str) -> &'a Value {
    let all = status["conditions"].as_array().map_or(&[][..], Vec::as_slice);
    all.iter().find(|condition| condition["type"] == kind).unwrap_or(&Value::Null)
}

fn is(phase: &str) -> impl Fn(&Value) -> bool {
    move |status| status["phase"] == phase
}

#[tokio::test]
async fn a_job_comes_succeeds_is_changed_and_goes() {
    let bench = Bench::new().await;
    bench.api.apply("digits", &bench.spec("digits", 2));
    let life = bench.life();
    let chain = life.planned().await;
    for round in 1..=2 {
        assert_eq!(life.opened().await, (chain, round));
        life.done(chain, round).await;
    }
    let status = bench.api.until("digits", is("Succeeded")).await;
    assert_eq!((&status["round"], &status["observedGeneration"]), (&json!(2), &json!(1)));
    let succeeded = condition(&status, "Succeeded");
    assert_eq!((&succeeded["status"], &succeeded["reason"]), (&json!("True"), &json!("RoundsCommitted")));
    assert_eq!(succeeded["observedGeneration"], 1);
    // More rounds: another chain goes on from the checkpoint.
    bench.api.apply("digits", &bench.spec("digits", 3));
    let removed = |word: &ToGateway| matches!(word, ToGateway::Remove { .. }).then_some(());
    life.until("the end of the old chain", removed).await;
    let next = life.planned().await;
    assert_ne!(next, chain);
    assert_eq!(life.opened().await, (next, 3));
    bench.api.until("digits", |status| status["phase"] == "Running" && status["observedGeneration"] == 2).await;
    // It goes, its checkpoint stays.
    bench.api.delete("digits");
    life.until("the end", |word| matches!(word, ToGateway::Remove { chain } if *chain == next).then_some(())).await;
    life.order("the end", |order| matches!(order, Order::Remove { chain } if *chain == next).then_some(())).await;
    assert!(bench.folder.path().join("digits/rounds/000002/commit.json").exists());
    life.run.abort();
}

#[tokio::test]
async fn a_running_job_follows_what_it_can_and_says_what_it_cannot() {
    let bench = Bench::new().await;
    bench.api.apply("digits", &bench.spec("digits", 2));
    let life = bench.life();
    let chain = life.planned().await;
    assert_eq!(life.opened().await, (chain, 1));
    let mut other = bench.spec("digits", 1);
    other["clientsPerRound"] = json!(3);
    bench.api.apply("digits", &other);
    let refused = |status: &Value| condition(status, "SpecAccepted")["status"] == "False";
    let status = bench.api.until("digits", refused).await;
    let accepted = condition(&status, "SpecAccepted");
    let message = accepted["message"].as_str().unwrap();
    assert!(message.starts_with("spec.clientsPerRound cannot change") && message.contains("generation 1"), "{message}");
    assert_eq!(
        (&accepted["reason"], &status["observedGeneration"], &status["phase"]),
        (&json!("FieldFixed"), &json!(2), &json!("Running"))
    );
    // One that the schema lets through and that is no job; then one that can be followed: this round is the last.
    other["minClients"] = json!(9);
    bench.api.apply("digits", &other);
    let status = bench.api.until("digits", |status| status["observedGeneration"] == 3).await;
    assert!(
        condition(&status, "SpecAccepted")["message"].as_str().unwrap().starts_with("spec.minClients: 9"),
        "{status}"
    );
    bench.api.apply("digits", &bench.spec("digits", 1));
    bench.api.until("digits", |status| condition(status, "SpecAccepted")["status"] == "True").await;
    life.done(chain, 1).await;
    let status = bench.api.until("digits", is("Succeeded")).await;
    assert_eq!((&status["round"], &status["observedGeneration"]), (&json!(1), &json!(4)));
    life.run.abort();
}

#[tokio::test]
async fn what_cannot_run_says_why_and_others_run() {
    let bench = Bench::new().await;
    let mut invalid = bench.spec("invalid", 1);
    invalid["minClients"] = json!(5);
    bench.api.apply("invalid", &invalid);
    let mut unreadable = bench.spec("unreadable", 1);
    unreadable["model"]["initial"]["uri"] = json!("file:///nowhere/m.safetensors");
    bench.api.apply("unreadable", &unreadable);
    let mut disk = bench.spec("disk", 1);
    disk["ackLevel"] = json!("Disk");
    bench.api.apply("disk", &disk);
    let mut secret = bench.spec("secret", 1);
    secret["auth"] = json!({"tokenSecretRef": {"name": "s", "key": "token"}});
    bench.api.apply("secret", &secret);
    for (name, phase, reason, words) in [
        ("invalid", "Failed", "Invalid", "spec.minClients: 5 is not within 1..=2"),
        ("unreadable", "Pending", "InitialModelUnreadable", "spec.model.initial.uri file:///nowhere/m.safetensors: "),
        ("secret", "Pending", "SecretMissing", "Secret default/s is not there"),
        ("disk", "Failed", "NoJournal", "spec.ackLevel: Disk"),
    ] {
        let status = bench.api.until(name, |status| condition(status, "Ready")["reason"] == reason).await;
        let message = condition(&status, "Ready")["message"].as_str().unwrap();
        assert!(status["phase"] == phase && message.contains(words), "{name}: {status:#}");
    }
    // The Secret comes: its job does too. Nothing but that Secret is read, by name.
    bench.api.secret("s", &json!({"token": "aHVudGVyMg=="}));
    let life = bench.life();
    let secret = |word: &ToGateway| match word {
        ToGateway::Job { job, join_secret, .. } if job.name() == "secret" => join_secret.clone(),
        _ => None,
    };
    assert_eq!(life.until("the job", secret).await, "hunter2");
    assert_eq!(bench.api.calls("GET /api/v1/"), bench.api.calls("GET /api/v1/namespaces/default/secrets/s"));
    // Room for two: of two more one waits.
    bench.api.apply("more", &bench.spec("more", 1));
    bench.api.apply("most", &bench.spec("most", 1));
    let full = |status: &Value| condition(status, "Ready")["reason"] == "NodeFull";
    bench.api.until("most", full).await;
    bench.api.delete("secret");
    let most = |word: &ToGateway| matches!(word, ToGateway::Job { job, .. } if job.name() == "most").then_some(());
    life.until("its turn", most).await;
    life.run.abort();
}

#[tokio::test]
async fn an_api_server_that_is_away_holds_up_nothing() {
    let mut bench = Bench::new().await;
    bench.api.apply("digits", &bench.spec("digits", 3));
    let life = bench.life.take().unwrap();
    let kept = life.deposit("job/default/digits").await;
    let chain = life.planned().await;
    assert_eq!(life.opened().await, (chain, 1));
    bench.api.until("digits", is("Running")).await;
    bench.api.set_away(true);
    life.done(chain, 1).await;
    assert_eq!(life.opened().await, (chain, 2));
    // Even another life of the coordinator goes on.
    life.run.abort();
    let round = loop {
        let deposit = life.deposit("round/").await;
        if deposit.meta["number"] == 2 {
            break deposit;
        }
    };
    assert!(life.run.await.unwrap_err().is_cancelled());
    let state = ChainState { admitted: 1, model_round: Some(1), ..chain_state(chain, "digits", 2) };
    bench.live(vec![kept, round], vec![state], false).await;
    let life = bench.life();
    assert_eq!(life.planned().await, chain);
    assert_eq!(life.opened().await, (chain, 2));
    life.done(chain, 2).await;
    assert_eq!(life.opened().await, (chain, 3));
    assert_eq!(bench.api.status("digits")["round"], 0);
    // It is back, and takes the first write for stale.
    bench.api.refuse_writes(1);
    bench.api.set_away(false);
    let status = bench.api.until("digits", |status| status["round"] == 2).await;
    assert_eq!(status["phase"], "Running");
    life.done(chain, 3).await;
    bench.api.until("digits", is("Succeeded")).await;
    life.run.abort();
}

#[tokio::test]
async fn an_answer_that_comes_after_what_is_newer_holds_up_no_status() {
    let bench = Bench::new().await;
    bench.api.hold_answers(true);
    bench.api.apply("digits", &bench.spec("digits", 1));
    let life = bench.life();
    life.planned().await;
    bench.api.until("digits", |status| status["observedGeneration"] == 1).await;
    // Its own write is not answered yet when the watch tells of it, and of a newer spec.
    bench.api.apply("digits", &bench.spec("digits", 2));
    bench.api.apply("more", &bench.spec("more", 1));
    let more = |word: &ToGateway| matches!(word, ToGateway::Job { job, .. } if job.name() == "more").then_some(());
    life.until("what is told after it", more).await;
    bench.api.hold_answers(false);
    bench.api.until("digits", |status| status["observedGeneration"] == 2).await;
    life.run.abort();
}

#[tokio::test]
async fn what_ended_while_nobody_looked_is_removed_and_what_failed_is_not_tried_again() {
    let mut bench = Bench::new().await;
    let life = bench.life.take().unwrap();
    bench.api.apply("failed", &bench.spec("failed", 1));
    life.planned().await;
    life.run.abort();
    drop(life);
    let mut objects = bench.spec("failed", 1);
    objects["ackLevel"] = json!("Disk");
    bench.api.delete("failed");
    bench.api.apply("failed", &objects);
    bench.live(vec![], vec![], false).await;
    bench.api.until("failed", is("Failed")).await;
    bench.life().run.abort();
    // The next life finds a chain of a job that is no more; and would have a journal for the other.
    let gone = ChainState { admitted: 1, model_round: Some(1), ..chain_state(7, "gone", 2) };
    let kept = ChainState { chain: 8, job: "failed".into(), ..gone.clone() };
    bench.live(vec![], vec![gone, kept], true).await;
    let life = bench.life();
    life.until("the stray", |word| matches!(word, ToGateway::Remove { chain: 7 }).then_some(())).await;
    life.order("the stray", |order| matches!(order, Order::Remove { chain: 7 }).then_some(())).await;
    bench.api.apply("other", &bench.spec("other", 1));
    let word = |word: &ToGateway| match word {
        ToGateway::Job { chain, job, .. } => Some((*chain, job.name().to_owned())),
        ToGateway::Remove { chain } => Some((*chain, "removed".into())),
        _ => None,
    };
    assert_eq!(life.until("a job", word).await, (1, "other".into()), "the chain of the failed job stays");
    assert_eq!(bench.api.status("failed")["phase"], "Failed");
    life.run.abort();
}

#[tokio::test]
async fn a_sibling_whose_pod_was_replaced_ends_this_life() {
    let bench = Bench::new().await;
    let mut life = bench.life.unwrap();
    let _other = life.supervisor.peer_of("gateway", 7).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(30), &mut life.run).await.unwrap().unwrap();
    assert!(matches!(&ended, Err(CoordinatorError::Replaced(name)) if name == "gateway"), "{ended:?}");
}
