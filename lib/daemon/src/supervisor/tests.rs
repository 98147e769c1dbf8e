//! Supervisors without their loop: tests share this process, and each reaps its own children only.

use std::{fs, os::unix::process::ExitStatusExt as _, path::Path};

use http_body_util::BodyExt as _;
use hyper::{Request, StatusCode};
use rustix::process::waitpid;

use super::*;

/// Nothing here takes as long; the clock stands still while anything can be done.
const PATIENCE: Duration = Duration::from_secs(120);

fn supervisor() -> Supervisor {
    let ready = Arc::new(watch::Sender::new(false));
    let supervisor = Supervisor {
        table: Arc::default(),
        ready,
        changed: mpsc::unbounded_channel().0,
        epoch: 1,
        pairing: Arc::default(),
    };
    supervisor.table().entries.insert("gateway", Entry::default());
    supervisor
}

fn spec(program: &str, args: &[&str], deposits: Vec<Deposit>) -> ChildSpec {
    ChildSpec {
        name: "gateway",
        program: program.into(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        environment: Vec::new(),
        config: Value::Null,
        peers: Vec::new(),
        uid: None,
        deposits,
        failpoint: None,
    }
}

/// A process that does nothing; it holds nobody's pipe where a test fails.
fn asleep() -> std::process::Child {
    Command::new("sleep").arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// More than a channel holds that nobody reads.
fn too_many() -> Vec<Deposit> {
    let deposit = |number| Deposit { key: format!("{number:04}"), meta: "x".repeat(4096).into(), fds: Vec::new() };
    (0..1000).map(deposit).collect()
}

async fn until(holds: impl Fn() -> bool) {
    let held = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, held).await.expect("it never holds");
}

/// Reaps the supervisor's children, until dropped.
async fn reap(supervisor: Supervisor) {
    loop {
        let pids: Vec<i32> = supervisor.table().exits.keys().copied().collect();
        for pid in pids {
            if let Ok(Some((_, status))) = waitpid(Pid::from_raw(pid), WaitOptions::NOHANG)
                && let Some(waiter) = supervisor.table().exits.remove(&pid)
            {
                let _keeper_left = waiter.send(format!("{:?}", status.terminating_signal()));
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn healthz(supervisor: &Supervisor) -> (StatusCode, String) {
    let request = Request::get("/healthz").body(()).unwrap();
    let answer = crate::admin::answer(request, supervisor.clone()).await.unwrap();
    let status = answer.status();
    (status, String::from_utf8(answer.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap())
}

/// A supervisor of a child, which is this process, over this channel.
fn supervising(process: &std::process::Child, channel: &Arc<Channel>) -> Supervisor {
    let supervisor = supervisor();
    let pid = Pid::from_child(process);
    let life = Life { channel: channel.clone(), pid, begun: true, ready: true, unanswered: 0 };
    let mut table = supervisor.table();
    table.exits.insert(pid.as_raw_nonzero().get(), oneshot::channel().0);
    table.entries.insert("gateway", Entry { life: Some(life), ..Entry::default() });
    drop(table);
    supervisor
}

#[tokio::test(start_paused = true)]
async fn who_does_not_answer_is_killed_and_who_does_lives_on() {
    for answers in [true, false] {
        let mut process = asleep();
        let (ours, theirs) = Channel::pair().unwrap();
        let (channel, theirs) = (Arc::new(Channel::new(ours).unwrap()), Channel::new(theirs).unwrap());
        let supervisor = supervising(&process, &channel);
        let over = supervisor.clone();
        let watching = tokio::spawn(async move { over.watch_over("gateway", &channel).await });
        let child = supervisor.clone();
        let answering = tokio::spawn(async move {
            while let Ok(Some((word, _))) = theirs.recv::<ToChild>().await {
                assert!(matches!(word, ToChild::Ping), "{word:?}");
                if answers {
                    child.hear("gateway", FromChild::Pong, Vec::new());
                }
            }
        });
        assert_eq!(healthz(&supervisor).await, (StatusCode::OK, "ok\n".to_owned()));
        let long = PING * UNANSWERED + PING / 2;
        tokio::time::sleep(long).await;
        let (status, said) = healthz(&supervisor).await;
        match answers {
            true => assert_eq!(status, StatusCode::OK, "{said}"),
            false => {
                assert_eq!((status, said.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "no answer from: gateway\n"))
            }
        }
        assert_eq!(process.try_wait().unwrap(), None, "a machine may have stood still");
        tokio::time::sleep(PING).await;
        if answers {
            tokio::time::sleep(long * 9).await;
            assert_eq!((process.try_wait().unwrap(), supervisor.stuck()), (None, vec![]));
            process.kill().unwrap();
        }
        assert_eq!(process.wait().unwrap().signal(), Some(9));
        watching.abort();
        answering.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn who_does_not_take_its_first_words_is_killed_and_started_again() {
    let supervisor = supervisor();
    let keeping = tokio::spawn(supervisor.clone().keep(spec("/bin/sh", &["-c", "exec sleep 1000 2>&-"], too_many())));
    let reaping = tokio::spawn(reap(supervisor.clone()));
    until(|| supervisor.stuck() == ["gateway"]).await;
    let first = supervisor.pids();
    assert_eq!(healthz(&supervisor).await.0, StatusCode::SERVICE_UNAVAILABLE);
    until(|| !supervisor.pids().is_empty() && supervisor.pids() != first).await;
    assert!(supervisor.table().entries["gateway"].begun().is_none());
    // One that has not begun cannot drain.
    supervisor.drain(PING).await;
    keeping.await.unwrap().unwrap();
    assert!(supervisor.pids().is_empty());
    reaping.abort();
}

#[tokio::test(start_paused = true)]
async fn who_begins_while_everything_drains_is_told_so() {
    let mut process = asleep();
    let (ours, theirs) = Channel::pair().unwrap();
    let (channel, theirs) = (Arc::new(Channel::new(ours).unwrap()), Channel::new(theirs).unwrap());
    let supervisor = supervising(&process, &channel);
    if let Some(entry) = supervisor.table().entries.get_mut("gateway") {
        entry.deposits.extend(too_many().into_iter().map(|deposit| (deposit.key.clone(), deposit)));
        entry.life.as_mut().unwrap().begun = false;
    }
    let over = supervisor.clone();
    let beginning = tokio::spawn(async move { over.begin(&spec("", &[], Vec::new()), true, &channel).await });
    let over = supervisor.clone();
    let draining = tokio::spawn(async move { over.drain(PATIENCE).await });
    until(|| supervisor.is_draining()).await;
    let mut words = Vec::new();
    while words.last() != Some(&"drain") {
        let (word, _) = tokio::time::timeout(PING, theirs.recv::<ToChild>()).await.unwrap().unwrap().unwrap();
        words.push(match word {
            ToChild::Restored { .. } => "restored",
            ToChild::Start { .. } => "start",
            ToChild::Drain => "drain",
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(words.len(), 1002);
    assert_eq!(words[1000..], ["start", "drain"]);
    beginning.await.unwrap();
    draining.abort();
    process.kill().unwrap();
    process.wait().unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_died_is_not_started_again_while_everything_drains() {
    let folder = tempfile::tempdir().unwrap();
    let starts = |path: &Path| fs::read_to_string(path).unwrap_or_default().len();
    let path = folder.path().join("starts");
    let program = ["-c", "printf x >> $0", path.to_str().unwrap()];
    let supervisor = supervisor();
    let keeping = tokio::spawn(supervisor.clone().keep(spec("/bin/sh", &program, Vec::new())));
    let reaping = tokio::spawn(reap(supervisor.clone()));
    // From the second end on it pauses before the next start.
    until(|| supervisor.table().entries["gateway"].restarts == 2).await;
    assert_eq!(starts(&path), 2);
    supervisor.drain(PING).await;
    keeping.await.unwrap().unwrap();
    assert_eq!(starts(&path), 2);
    reaping.abort();
}
