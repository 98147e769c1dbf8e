//! An API server as far as the coordinator needs one: FederatedJobs in namespace `default`, their statuses, Secrets by name.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::watch,
};

const JOBS: &str = "/apis/fl.lifl.dev/v1alpha1/";

#[derive(Default)]
struct Objects {
    version: u64,
    jobs: BTreeMap<String, Value>,
    secrets: BTreeMap<String, Value>,
    /// All events, with their versions.
    events: Vec<(u64, Value)>,
    /// Method and path of all calls that were answered.
    calls: Vec<String>,
    /// So many writes of a status are refused as stale.
    conflicts: u32,
    away: bool,
}

/// The server.
#[derive(Clone)]
pub(super) struct Api {
    objects: Arc<Mutex<Objects>>,
    changed: watch::Sender<u64>,
    /// Writes are done, and not answered meanwhile.
    held: watch::Sender<bool>,
    address: std::net::SocketAddr,
}

impl Api {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (changed, held) = (watch::Sender::new(0), watch::Sender::new(false));
        let api = Self { objects: Arc::default(), changed, held, address };
        let serving = api.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let serving = serving.clone();
                // A connection that is cut is no failure here.
                tokio::spawn(async move { drop(serving.serve(stream).await) });
            }
        });
        api
    }

    pub(super) fn kubeconfig(&self, folder: &Path) -> PathBuf {
        let path = folder.join("kubeconfig");
        let server = format!("http://{}", self.address);
        let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server}}], "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]});
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, objects: &mut Objects, kind: &str, mut job: Value) -> Value {
        objects.version += 1;
        job["metadata"]["resourceVersion"] = objects.version.to_string().into();
        objects.events.push((objects.version, json!({"type": kind, "object": job})));
        self.changed.send_replace(objects.version);
        job
    }

    /// Creates the job, or changes its spec.
    pub(super) fn apply(&self, name: &str, spec: &Value) {
        let mut objects = self.objects();
        let (kind, mut job) = match objects.jobs.get(name) {
            Some(job) => ("MODIFIED", job.clone()),
            None => {
                let uid = format!("{name}-{}", objects.version);
                let metadata = json!({"name": name, "namespace": "default", "uid": uid, "generation": 0,
                    "creationTimestamp": "2026-01-01T00:00:00Z"});
                ("ADDED", json!({"apiVersion": "fl.lifl.dev/v1alpha1", "kind": "FederatedJob", "metadata": metadata}))
            }
        };
        job["spec"] = spec.clone();
        job["metadata"]["generation"] = (job["metadata"]["generation"].as_i64().unwrap() + 1).into();
        let job = self.note(&mut objects, kind, job);
        objects.jobs.insert(name.to_owned(), job);
    }

    pub(super) fn delete(&self, name: &str) {
        let mut objects = self.objects();
        let job = objects.jobs.remove(name).unwrap();
        self.note(&mut objects, "DELETED", job);
    }

    pub(super) fn secret(&self, name: &str, data: &Value) {
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data});
        self.objects().secrets.insert(name.to_owned(), secret);
    }

    /// From now on nobody is answered, and watches end; or everybody again.
    pub(super) fn set_away(&self, away: bool) {
        self.objects().away = away;
        self.changed.send_modify(|_| ());
    }

    /// From now on whoever writes waits for the answer; or nobody does any more.
    pub(super) fn hold_answers(&self, hold: bool) {
        self.held.send_replace(hold);
    }

    pub(super) fn refuse_writes(&self, count: u32) {
        self.objects().conflicts = count;
    }

    /// Calls of which path and method contain this.
    pub(super) fn calls(&self, part: &str) -> usize {
        self.objects().calls.iter().filter(|call| call.contains(part)).count()
    }

    pub(super) fn status(&self, name: &str) -> Value {
        self.objects().jobs.get(name).map_or(Value::Null, |job| job["status"].clone())
    }

    /// Waits for a status.
    pub(super) async fn until(&self, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut changed = self.changed.subscribe();
        let found = async {
            loop {
                let status = self.status(name);
                if wanted(&status) {
                    return status;
                }
                changed.changed().await.unwrap();
            }
        };
        let found = tokio::time::timeout(super::edges::PATIENCE, found).await;
        found.unwrap_or_else(|_late| panic!("status of {name}: {:#}", self.status(name)))
    }

    async fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let (mut head, mut length) = (String::new(), 0);
            if stream.read_line(&mut head).await? == 0 {
                return Ok(());
            }
            loop {
                let mut line = String::new();
                stream.read_line(&mut line).await?;
                if line.trim().is_empty() {
                    break;
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await?;
            let mut words = head.split_whitespace();
            let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            if self.objects().away {
                return Ok(());
            }
            self.objects().calls.push(format!("{method} {target}"));
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            if query.contains("watch=true") {
                return self.watch(stream, query).await;
            }
            let (code, answer) = self.answer(method, path, serde_json::from_slice(&body).unwrap_or_default());
            if method == "PUT" {
                drop(self.held.subscribe().wait_for(|held| !held).await);
            }
            let answer = answer.to_string();
            let head = format!(
                "HTTP/1.1 {code} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                answer.len()
            );
            stream.write_all(format!("{head}{answer}").as_bytes()).await?;
        }
    }

    fn answer(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let status = |code: u16| {
            let reason = if code == 404 { "NotFound" } else { "Conflict" };
            let said = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
                "reason": reason, "message": "no"});
            (code, said)
        };
        let mut objects = self.objects();
        let parts: Vec<&str> = path.trim_start_matches(JOBS).trim_start_matches("/api/v1/").split('/').collect();
        match (method, parts.as_slice()) {
            ("GET", ["federatedjobs"]) => {
                let items: Vec<&Value> = objects.jobs.values().collect();
                let version = objects.version.to_string();
                (
                    200,
                    json!({"kind": "FederatedJobList", "apiVersion": "fl.lifl.dev/v1alpha1", "metadata": {"resourceVersion": version}, "items": items}),
                )
            }
            ("PUT", ["namespaces", "default", "federatedjobs", name, "status"]) => {
                let Some(mut job) = objects.jobs.get(*name).cloned() else { return status(404) };
                if objects.conflicts > 0 || job["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"] {
                    objects.conflicts = objects.conflicts.saturating_sub(1);
                    return status(409);
                }
                assert_eq!(body["kind"], "FederatedJob");
                job["status"] = body["status"].clone();
                let job = self.note(&mut objects, "MODIFIED", job);
                objects.jobs.insert((*name).to_owned(), job.clone());
                (200, job)
            }
            ("GET", ["namespaces", "default", "secrets", name]) => {
                objects.secrets.get(*name).map_or_else(|| status(404), |secret| (200, secret.clone()))
            }
            _ => status(405),
        }
    }

    async fn watch(&self, mut stream: BufReader<TcpStream>, query: &str) -> std::io::Result<()> {
        let from = query.split('&').find_map(|part| part.strip_prefix("resourceVersion="));
        let mut reached: u64 = from.unwrap().parse().unwrap();
        let mut changed = self.changed.subscribe();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n").await?;
        loop {
            let lines: String = {
                let objects = self.objects();
                if objects.away {
                    return Ok(());
                }
                let new = objects.events.iter().filter(|(version, _)| *version > reached);
                let lines = new.map(|(_, event)| format!("{event}\n")).collect();
                reached = objects.version;
                lines
            };
            stream.write_all(lines.as_bytes()).await?;
            let mut end = [0];
            tokio::select! {
                _ = changed.changed() => {}
                _ = stream.read(&mut end) => return Ok(()),
            }
        }
    }
}
