//! An API server that knows one pod and one registration of a webhook: lists, watches in which nothing happens, and patches.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::{Value, json};

/// Bodies of patches.
pub(crate) type Patches = Arc<Mutex<Vec<Value>>>;

/// Begins to serve; the thread ends with the test.
pub(crate) fn start(pod: Value, patches: Patches) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let pod = Arc::new(pod);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (pod, patches) = (Arc::clone(&pod), Arc::clone(&patches));
            std::thread::spawn(move || drop(serve(stream, &pod, &patches)));
        }
    });
    Ok(address)
}

fn serve(stream: TcpStream, pod: &Value, patches: &Patches) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        let length = head
            .to_lowercase()
            .split("content-length: ")
            .nth(1)
            .and_then(|rest| rest.split("\r\n").next()?.parse::<usize>().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        reader.read_exact(&mut body)?;
        let mut words = head.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        if query.contains("watch=") {
            // Nothing happens, for as long as the watcher likes.
            write!(stream, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")?;
            let mut nothing = [0];
            return reader.read(&mut nothing).map(drop);
        }
        if method == "PATCH" {
            let patch = serde_json::from_slice(&body).unwrap_or(Value::Null);
            patches.lock().unwrap_or_else(PoisonError::into_inner).push(patch);
        }
        let (code, answer) = answer(method, path, &body, pod);
        let answer = answer.to_string();
        write!(
            stream,
            "HTTP/1.1 {code} OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{answer}",
            answer.len()
        )?;
    }
}

fn answer(method: &str, path: &str, body: &[u8], pod: &Value) -> (u16, Value) {
    let list = |items: Vec<&Value>| json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items});
    let last = path.rsplit('/').next().unwrap_or_default();
    match (method, last) {
        ("GET", "pods") => (200, list(vec![pod])),
        ("GET", "ingresses" | "services" | "endpointslices" | "namespaces" | "secrets" | "nodes" | "events") => {
            (200, list(Vec::new()))
        }
        ("GET" | "PATCH", "data-plane.lifl.dev") => (200, registration()),
        ("GET", _) => {
            let reason =
                json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404});
            (404, reason)
        }
        // Whatever is written is written.
        _ => (201, serde_json::from_slice(body).unwrap_or(Value::Null)),
    }
}

fn registration() -> Value {
    let webhook = |name: &str| {
        json!({
            "name": name, "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "clientConfig": {"service": {"namespace": "lifl-system", "name": "webhook"}},
        })
    };
    json!({
        "kind": "MutatingWebhookConfiguration", "apiVersion": "admissionregistration.k8s.io/v1",
        "metadata": {"name": "data-plane.lifl.dev"}, "webhooks": [webhook("pods"), webhook("namespaces")],
    })
}
