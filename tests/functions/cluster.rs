//! As much of an API server as an agent asks for: the pods of its node, listed, and a watch in which nothing happens.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};

/// A pod as Knative rendered it and the webhook changed it.
const POD: &str = include_str!("../../webhook/tests/data/one-revision.patched.yaml");
const SETTINGS: &str = "lifl.dev/pod-settings";

/// A watch is told this often that nothing has happened, as by a real API server.
const BOOKMARKS: Duration = Duration::from_secs(60);

/// Serves until the process ends.
pub(crate) fn serve(pods: Vec<Value>) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let list = json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}, "items": pods});
    let list: Arc<str> = list.to_string().into();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let list = Arc::clone(&list);
            std::thread::spawn(move || answer(&stream, &list));
        }
    });
    Ok(address)
}

/// Answers what comes on one connection.
fn answer(stream: &TcpStream, list: &str) -> io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    while let Some(first) = lines.next() {
        let first = first?;
        while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
        let mut to = stream;
        let target = first.split(' ').nth(1).unwrap_or_default();
        if target.contains("watch=") {
            to.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            loop {
                std::thread::sleep(BOOKMARKS);
                let object = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}});
                let event = format!("{}\n", json!({"type": "BOOKMARK", "object": object}));
                to.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes())?;
            }
        }
        let nothing = json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}, "items": []});
        let body = if target.starts_with("/api/v1/pods") { list.to_owned() } else { nothing.to_string() };
        let length = body.len();
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}");
        to.write_all(head.as_bytes())?;
    }
    Ok(())
}

/// What leads an agent there.
pub(crate) fn kubeconfig(server: SocketAddr, file: &Path) -> io::Result<()> {
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://{server}")}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
    });
    std::fs::write(file, text.to_string())
}

/// The pod of this number.
pub(crate) fn pod(number: usize, address: &str, user_port: u16) -> io::Result<Value> {
    let mut pod: Value = serde_yaml_ng::from_str(POD).map_err(io::Error::other)?;
    let text = pod["metadata"]["annotations"][SETTINGS].as_str().unwrap_or_default();
    let mut settings: Value = serde_json::from_str(text)?;
    // What Knative makes of a function without a probe of its own.
    settings["readiness"] = json!([{"tcpSocket": {"port": user_port, "host": "127.0.0.1"}, "successThreshold": 1}]);
    settings["userPort"] = user_port.into();
    pod["metadata"]["annotations"][SETTINGS] = settings.to_string().into();
    pod["metadata"]["name"] = format!("shop-blue-deployment-b6df94869-{number:05}").into();
    pod["metadata"]["uid"] = format!("e113e8f9-8984-44f4-bc45-{number:012}").into();
    pod["status"]["phase"] = "Running".into();
    pod["status"]["podIP"] = address.into();
    pod["status"]["podIPs"] = json!([{"ip": address}]);
    Ok(pod)
}
