//! Clients with nothing of the platform in them: they join, poll, send known values, repeat what was not answered, and note all.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    Outcome, PATIENCE,
    http::{Answer, Call},
    job::{ELEMENTS, Job, file},
};

/// One update, however often it was sent.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) client: u32,
    pub(crate) round: u32,
    pub(crate) weight: u32,
    /// A 202 came.
    pub(crate) acknowledged: bool,
}

/// What all clients of a job sent, by (source, id).
pub(crate) type Book = Arc<Mutex<BTreeMap<(String, String), Sent>>>;

/// The clients of a job, each a thread.
#[derive(Debug)]
pub(crate) struct Clients {
    pub(crate) book: Book,
    threads: Vec<JoinHandle<Result<(), String>>>,
}

struct Client {
    address: SocketAddr,
    job: String,
    index: u32,
    secret: Option<String>,
    token: String,
    book: Book,
    /// When it gives up.
    deadline: Instant,
}

/// The elements of a client's update, exact in single precision.
pub(crate) fn values(client: u32, round: u32) -> Vec<f32> {
    let base = f32::from(u16::try_from(client * 7 + round * 13).unwrap_or(0)) * 0.25;
    (0..ELEMENTS).map(|at| base + f32::from(u16::try_from(at % 97).unwrap_or(0)) * 0.125).collect()
}

pub(crate) fn weight(client: u32, round: u32) -> u32 {
    10 * (client + 1) + round % 7
}

/// `source` of a client.
pub(crate) fn source(job: &str, client: u32) -> String {
    format!("/namespaces/default/jobs/{job}/clients/c{client}")
}

/// The head of an update.
pub(crate) fn update_headers(job: &str, client: u32, round: u32, token: &str) -> Vec<(&'static str, String)> {
    vec![
        ("ce-specversion", "1.0".into()),
        ("ce-type", "dev.lifl.fl.update.submitted.v1".into()),
        ("ce-source", source(job, client)),
        ("ce-id", format!("{job}.{round}.c{client}")),
        ("ce-fljob", job.into()),
        ("ce-flround", round.to_string()),
        ("ce-flclient", format!("c{client}")),
        ("ce-flsamples", weight(client, round).to_string()),
        ("ce-flkind", "full".into()),
        ("content-type", "application/vnd.safetensors".into()),
        ("authorization", format!("Bearer {token}")),
    ]
}

/// Joins; the token, or the answer that was none.
pub(crate) fn join(address: SocketAddr, job: &str, client: u32, secret: Option<&str>) -> Result<String, String> {
    let mut headers = vec![
        ("ce-specversion", "1.0".into()),
        ("ce-type", "dev.lifl.fl.client.available.v1".into()),
        ("ce-source", source(job, client)),
        ("ce-id", format!("{job}.join.c{client}")),
        ("content-type", "application/json".into()),
    ];
    headers.extend(secret.map(|secret| ("authorization", format!("Bearer {secret}"))));
    let path = format!("/v1/namespaces/default/jobs/{job}/events");
    let call = Call { method: "POST", path: &path, headers, body: b"{}" };
    let answer = call.to(address, Duration::from_secs(20)).map_err(|error| error.to_string())?;
    answer.json()["token"].as_str().map(str::to_owned).ok_or_else(|| answer.text())
}

// === impl Clients ===

impl Clients {
    /// Starts all clients of a job.
    pub(crate) fn start(address: SocketAddr, job: &Job) -> Self {
        let book = Book::default();
        let threads = (0..job.clients).map(|index| {
            let (token, book, deadline) = (String::new(), book.clone(), Instant::now() + PATIENCE);
            let (job, secret) = (job.name.clone(), job.secret.clone());
            let mut client = Client { address, job, index, secret, token, book, deadline };
            std::thread::spawn(move || client.run())
        });
        Self { threads: threads.collect(), book }
    }

    /// Waits until each was told that the job is done.
    pub(crate) fn done(self) -> Outcome<Book> {
        let mut faults = Vec::new();
        for thread in self.threads {
            faults.extend(thread.join().map_err(|_panic| "a client panicked")?.err());
        }
        super::ensure(faults.is_empty(), || faults.join("\n"))?;
        Ok(self.book)
    }
}

// === impl Client ===

impl Client {
    fn run(&mut self) -> Result<(), String> {
        loop {
            if self.token.is_empty() {
                self.token = self.patiently("joining", |client| {
                    join(client.address, &client.job, client.index, client.secret.as_deref())
                })?;
            }
            let task = self.patiently("a poll", Self::poll)?;
            let task = task.json();
            match (task["state"].as_str(), task["round"].as_u64().and_then(|round| u32::try_from(round).ok())) {
                (Some("done"), _) => return Ok(()),
                (Some("failed"), _) => return Err(format!("c{}: the job failed: {task}", self.index)),
                (Some("train"), Some(round)) => self.submit(round)?,
                _ if Instant::now() > self.deadline => return Err(format!("c{}: still told {task}", self.index)),
                _ => {}
            }
        }
    }

    fn book(&self) -> MutexGuard<'_, BTreeMap<(String, String), Sent>> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Repeats until it is answered; what is not understood counts as not answered.
    fn patiently<T>(&self, what: &str, once: impl Fn(&Self) -> Result<T, String>) -> Result<T, String> {
        loop {
            match once(self) {
                Ok(done) => return Ok(done),
                Err(last) if Instant::now() > self.deadline => {
                    return Err(format!("c{}: {what} was not answered, last: {last}", self.index));
                }
                Err(_again) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn poll(&self) -> Result<Answer, String> {
        let path = format!("/v1/namespaces/default/jobs/{}/task?client=c{}&wait=5s", self.job, self.index);
        let mut call = Call::get(&path);
        call.headers.push(("authorization", format!("Bearer {}", self.token)));
        let answer = call.to(self.address, Duration::from_secs(20)).map_err(|error| error.to_string())?;
        if answer.status == 200 { Ok(answer) } else { Err(answer.text()) }
    }

    /// Sends the update of a round until it is accepted or the round is over, always under the same id.
    fn submit(&self, round: u32) -> Result<(), String> {
        let headers = update_headers(&self.job, self.index, round, &self.token);
        let key = (source(&self.job, self.index), format!("{}.{round}.c{}", self.job, self.index));
        let sent = Sent { client: self.index, round, weight: weight(self.index, round), acknowledged: false };
        self.book().entry(key.clone()).or_insert(sent);
        let path = format!("/v1/namespaces/default/jobs/{}/events", self.job);
        let body = file(&values(self.index, round), self.index % 2 == 1);
        let call = Call { method: "POST", path: &path, headers, body: &body };
        let status = self.patiently("an update", |client| {
            let answer = call.to(client.address, Duration::from_secs(20)).map_err(|error| error.to_string())?;
            match answer.status {
                404 | 408 | 409 | 429 | 500..=599 => Err(answer.text()),
                status => Ok((status, answer.text())),
            }
        })?;
        match status {
            (202, _) => {
                if let Some(sent) = self.book().get_mut(&key) {
                    sent.acknowledged = true;
                }
                Ok(())
            }
            (410, _) => Ok(()),
            (_, text) => Err(format!("c{}: update of round {round}: {text}", self.index)),
        }
    }
}
