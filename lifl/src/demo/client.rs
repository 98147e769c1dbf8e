//! The clients of the demo: each a real HTTP client of the gateway, with its own images, token and connection.
//!
//! ```text
//! trainer    join -> poll -> (train) fetch model -> SGD -> POST update -> poll ...   until done or failed
//! evaluator  join -> poll -> (new model) fetch -> measure -> POST metrics -> poll ...
//! ```
//!
//! A hundred of them cost nothing while they wait: an idle client is one open long poll. Training runs on the blocking pool,
//! at most one client per core, so that uploads and polls stay prompt.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::Uri;
use lifl_api::{
    event::{ClientRole, MetricsData},
    http::{ModelLink, Task, TaskState},
};
use tokio::{
    sync::{Semaphore, mpsc},
    task::{JoinSet, spawn_blocking},
    time::sleep,
};

mod retry;
mod session;
#[cfg(test)]
mod tests;

pub use self::session::ClientError;
use self::session::{Gateway, Session, Submission, Update};
use super::{
    digits::{Dataset, Image},
    split::Split,
    train::{Mlp, Training},
};

/// How long a client lets the gateway think.
const POLL_WAIT: Duration = Duration::from_secs(30);
/// An answer that comes sooner and says nothing new is followed by a pause.
const SOON: Duration = Duration::from_millis(100);

/// Who takes part, and how they train.
#[derive(Clone, Copy, Debug)]
pub struct ClientsConfig {
    /// How the images are shared; also says how many clients there are.
    pub split: Split,
    /// How each client trains.
    pub training: Training,
    /// How long requests are repeated before the gateway counts as gone.
    pub patience: Duration,
}

/// What happens at the clients, as it happens.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// A client has its token.
    Joined {
        /// Which.
        client: Arc<str>,
    },
    /// A client was selected and begins.
    Training {
        /// Which.
        client: Arc<str>,
        /// For which round.
        round: u32,
    },
    /// The gateway has acknowledged an update.
    Accepted {
        /// Whose.
        client: Arc<str>,
        /// For which round.
        round: u32,
        /// On how many images it was trained.
        samples: usize,
        /// Size of the tensors.
        bytes: usize,
        /// Loss of the last local pass.
        loss: f32,
        /// It had been acknowledged before: the first answer was lost.
        duplicate: bool,
    },
    /// The round closed before the update came: what over-provisioning is for.
    Late {
        /// Whose update.
        client: Arc<str>,
        /// For which round.
        round: u32,
    },
    /// The gateway will not have the update.
    Refused {
        /// Whose update.
        client: Arc<str>,
        /// For which round.
        round: u32,
        /// HTTP status.
        status: u16,
        /// The gateway's reason.
        detail: String,
    },
    /// A request is repeated.
    Retried {
        /// Whose.
        client: Arc<str>,
        /// Which request.
        what: &'static str,
        /// What came of it.
        reason: String,
    },
    /// The evaluator has measured a model.
    Measured {
        /// Round that made the model; 0 is the initial one.
        round: u32,
        /// On the held-out images.
        accuracy: f64,
    },
    /// A client was told that the job has ended.
    Ended {
        /// Which.
        client: Arc<str>,
        /// Why the job failed, if it did.
        failure: Option<String>,
    },
}

/// What came of a run, as the clients saw it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Why the job failed, if it did.
    pub failure: Option<String>,
    /// Updates acknowledged with 202, each counted once.
    pub accepted: u64,
    /// Updates that came after their round had closed.
    pub late: u64,
    /// Updates refused for what they are.
    pub refused: u64,
    /// Requests repeated.
    pub retries: u64,
    /// Bytes of tensors in acknowledged updates.
    pub bytes: u64,
    /// (round, accuracy) by the evaluator, in the order of measuring.
    pub measured: Vec<(u32, f64)>,
}

/// What a task of one client needs.
struct Member {
    gateway: Arc<Gateway>,
    client: Arc<str>,
    config: ClientsConfig,
    cores: Arc<Semaphore>,
    images: Arc<[Image]>,
    /// Drives this client's shuffling; the round is mixed in.
    seed: u64,
    events: mpsc::Sender<Progress>,
}

/// Keeps a client from spinning when long polls return at once.
#[derive(Default)]
struct Pace {
    last: Option<Task>,
    idle: u32,
}

/// Runs all clients and the evaluator of a job against the gateway at `base`, until each has seen `done` or `failed`.
/// `events` must be read (or dropped): clients wait for room in it.
pub async fn run_clients(
    base: Uri,
    namespace: &str,
    job: &str,
    config: ClientsConfig,
    events: mpsc::Sender<Progress>,
) -> Result<Outcome, ClientError> {
    let gateway = Arc::new(Gateway::new(&base, namespace, job, config.patience)?);
    let dataset = Dataset::new(config.split.seed);
    let shares = config.split.share(dataset.training)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = Arc::new(Semaphore::new(cores));
    let member = |client: String, images: Vec<Image>, seed: u64| Member {
        gateway: Arc::clone(&gateway),
        client: client.into(),
        config,
        cores: Arc::clone(&cores),
        images: images.into(),
        seed,
        events: events.clone(),
    };
    let mut running = JoinSet::new();
    running.spawn(Box::pin(member("evaluator".to_owned(), dataset.held_out, 0).evaluate()));
    for (index, share) in (0..).zip(shares) {
        // Stands apart from the seeds of rounds, which are added to it.
        let seed = config.split.seed ^ (index << 32);
        running.spawn(Box::pin(member(format!("client-{index:03}"), share, seed).train()));
    }
    let mut outcome = Outcome::default();
    while let Some(ended) = running.join_next().await {
        outcome.add(ended??);
    }
    Ok(outcome)
}

async fn tell(events: &mpsc::Sender<Progress>, progress: Progress) {
    // Nobody listening is fine: the outcome says the same in sum.
    drop(events.send(progress).await);
}

// === impl ClientsConfig ===

impl Default for ClientsConfig {
    fn default() -> Self {
        Self { split: Split::DEMO, training: Training::DEMO, patience: Duration::from_secs(60) }
    }
}

// === impl Outcome ===

impl Outcome {
    /// Accuracy of the last model measured.
    #[must_use]
    pub fn accuracy(&self) -> Option<f64> {
        let last = self.measured.iter().max_by_key(|(round, _)| *round);
        last.map(|&(_, accuracy)| accuracy)
    }

    fn add(&mut self, other: Self) {
        self.failure = self.failure.take().or(other.failure);
        self.accepted += other.accepted;
        self.late += other.late;
        self.refused += other.refused;
        self.retries += other.retries;
        self.bytes += other.bytes;
        self.measured.extend(other.measured);
    }
}

// === impl Member ===

impl Member {
    async fn train(self) -> Result<Outcome, ClientError> {
        let mut session = self.join(ClientRole::Trainer).await?;
        let mut outcome = Outcome::default();
        let mut pace = Pace::default();
        let mut finished = None;
        loop {
            let asked = Instant::now();
            let task = session.task(POLL_WAIT, None).await?;
            if matches!(task.state, TaskState::Done | TaskState::Failed) {
                return Ok(self.end(&task, session, outcome).await);
            }
            if let (TaskState::Train, Some(link)) = (task.state, &task.model)
                && finished != Some(task.round)
                && self.take_part(&mut session, task.round, link, &mut outcome).await?
            {
                finished = Some(task.round);
            }
            pace.next(task, asked).await;
        }
    }

    /// One round. False if the model was not to be had: nothing is lost, the next task says more.
    async fn take_part(
        &self,
        session: &mut Session,
        round: u32,
        link: &ModelLink,
        outcome: &mut Outcome,
    ) -> Result<bool, ClientError> {
        let client = || Arc::clone(&self.client);
        let Some(model) = session.model(link).await? else {
            return Ok(false);
        };
        tell(&self.events, Progress::Training { client: client(), round }).await;
        let (tensors, loss) = self.learn(model, round).await?;
        let samples = self.images.len();
        let bytes = tensors.len();
        let update = Update { round, samples, tensors };
        let progress = match session.submit(&update).await? {
            Submission::Accepted { duplicate } => {
                outcome.accepted += 1;
                outcome.bytes += bytes as u64;
                Progress::Accepted { client: client(), round, samples, bytes, loss, duplicate }
            }
            Submission::RoundOver => {
                outcome.late += 1;
                Progress::Late { client: client(), round }
            }
            Submission::Refused { status, detail } => {
                outcome.refused += 1;
                Progress::Refused { client: client(), round, status, detail }
            }
        };
        tell(&self.events, progress).await;
        Ok(true)
    }

    /// Trains on the blocking pool. The same client, round and model give the same bytes.
    async fn learn(&self, model: Bytes, round: u32) -> Result<(Bytes, f32), ClientError> {
        let images = Arc::clone(&self.images);
        let training = self.config.training;
        let seed = self.seed.wrapping_add(u64::from(round));
        // Never closed, so the permit is always had.
        let _core = self.cores.acquire().await;
        let trained = spawn_blocking(move || {
            let mut model = Mlp::from_safetensors(&model)?;
            let loss = training.run(&mut model, &images, seed);
            Ok::<_, ClientError>((Bytes::from(model.to_safetensors()?), loss))
        });
        trained.await?
    }

    async fn evaluate(self) -> Result<Outcome, ClientError> {
        let mut session = self.join(ClientRole::Evaluator).await?;
        let mut outcome = Outcome::default();
        let mut known: Option<ModelLink> = None;
        loop {
            let task = session.task(POLL_WAIT, known.as_ref().map(|link| link.round)).await?;
            let ended = matches!(task.state, TaskState::Done | TaskState::Failed);
            if let Some(link) = task.model.as_ref().filter(|link| known.as_ref() != Some(*link))
                && let Some(model) = session.model(link).await?
            {
                let (round, accuracy) = (link.round, Mlp::from_safetensors(&model)?.accuracy(&self.images));
                let data = MetricsData {
                    round,
                    samples: self.images.len() as u64,
                    metrics: BTreeMap::from([("accuracy".to_owned(), accuracy)]),
                };
                let posted = session.measured(&data, ended).await;
                if !ended {
                    posted?;
                }
                outcome.measured.push((round, accuracy));
                tell(&self.events, Progress::Measured { round, accuracy }).await;
                known = Some(link.clone());
            }
            if ended {
                return Ok(self.end(&task, session, outcome).await);
            }
        }
    }

    async fn join(&self, role: ClientRole) -> Result<Session, ClientError> {
        let (gateway, client) = (Arc::clone(&self.gateway), Arc::clone(&self.client));
        let session = Session::join(gateway, client, role, self.events.clone()).await?;
        let client = Arc::clone(&self.client);
        tell(&self.events, Progress::Joined { client }).await;
        Ok(session)
    }

    async fn end(&self, task: &Task, session: Session, mut outcome: Outcome) -> Outcome {
        outcome.retries = session.retries;
        if task.state == TaskState::Failed {
            let unsaid = || "the gateway gave no reason".to_owned();
            outcome.failure = Some(task.reason.clone().unwrap_or_else(unsaid));
        }
        let ended = Progress::Ended { client: Arc::clone(&self.client), failure: outcome.failure.clone() };
        tell(&self.events, ended).await;
        outcome
    }
}

// === impl Pace ===

impl Pace {
    /// Waits before the next poll if this answer came at once and says what the last one said.
    async fn next(&mut self, task: Task, asked: Instant) {
        if self.last.as_ref() != Some(&task) || asked.elapsed() >= SOON {
            self.idle = 0;
        } else {
            sleep(retry::pause(self.idle).max(SOON)).await;
            self.idle += 1;
        }
        self.last = Some(task);
    }
}
