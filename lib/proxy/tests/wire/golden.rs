//! What a stock queue-proxy answered (`queue-answers.txt`, recorded with curl), byte for byte but for the time.

use std::{collections::BTreeMap, time::Duration};

use lifl_proxy::{
    Handle, Limits, Server,
    queue::{Admin, Figures, Settings},
};
use prost::Message as _;
use tokio::net::TcpListener;

use crate::{
    knative::stat,
    rig::{Aborts, Served, Wire, answers, settings},
};

const RECORDED: &[u8] = include_bytes!("queue-answers.txt");
/// Whom it was recorded from.
const POD: &str = "shop-blue-deployment-b6df94869-hkmcb";

/// So that every byte of the recording is a letter.
fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

/// A question and what came back.
struct Recorded {
    port: u16,
    request: String,
    first: String,
    fields: BTreeMap<String, String>,
    body: String,
}

fn recorded() -> Vec<Recorded> {
    let text = latin1(RECORDED);
    let blocks = text.split("### ").filter(|block| !block.is_empty());
    blocks.filter_map(|block| block.split_once('\n').and_then(|(asked, answer)| read(asked, answer))).collect()
}

/// `None` of a port that refused.
fn read(asked: &str, answer: &str) -> Option<Recorded> {
    let (head, body) = answer.split_once("\r\n\r\n").or_else(|| answer.split_once("\n\n"))?;
    let mut words = asked.splitn(2, ' ');
    let (port, path) = words.next()?.strip_prefix("http://POD:")?.split_once('/')?;
    let mut request = format!("GET /{path} HTTP/1.1\r\nHost: h\r\n");
    for option in words.next().unwrap_or_default().split(" -").filter(|option| !option.is_empty()) {
        match option.trim_start_matches('-').split_once(' ')? {
            ("A", agent) => request.push_str(&format!("User-Agent: {agent}\r\n")),
            ("H", field) => request.push_str(&format!("{field}\r\n")),
            (other, _) => panic!("option {other} of curl"),
        }
    }
    let mut lines = head.lines();
    let first = lines.next()?.trim_end().to_owned();
    let fields: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    // The recording puts a line feed behind each answer.
    let length: usize = fields.get("content-length")?.parse().ok()?;
    let body = body.chars().take(length).collect();
    Some(Recorded { port: port.parse().ok()?, request: format!("{request}\r\n"), first, fields, body })
}

async fn port<H: Handle>(handler: H) -> (std::net::SocketAddr, Aborts) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let server = Server::new(std::sync::Arc::new(handler), Limits::default());
    (addr, Aborts::new(async move { server.listen(&listener).await }))
}

#[tokio::test]
async fn knative_queue_answers_as_recorded() {
    let (addr, asked, _task) = answers("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nuser").await;
    let served = Served::new(addr, Settings { pod_name: POD.into(), ..settings() }).await;
    let (figures, _figures) = port(Figures(std::sync::Arc::clone(&served.queue))).await;
    let (admin, _admin) = port(Admin(std::sync::Arc::clone(&served.queue))).await;
    // So that the last second's figures are there.
    let there = async {
        while stat(figures).await.process_uptime <= 1.0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), there).await.expect("a second's figures");
    let rows = recorded();
    assert_eq!(rows.len(), 7, "all but port 9091, which refused: nobody had asked for metrics of requests");
    for row in rows {
        let at = match row.port {
            8012 => served.addr,
            8022 => admin,
            9090 => figures,
            other => panic!("port {other}"),
        };
        let mut client = Wire::to(at).await;
        client.write(&row.request).await;
        let head = client.head().await;
        assert_eq!(head.first, row.first, "{}", row.request);
        let fields: BTreeMap<&str, &str> =
            head.headers.iter().map(|(name, values)| (name.as_str(), values[0].as_str())).collect();
        let names: Vec<&str> = row.fields.keys().map(String::as_str).collect();
        assert_eq!(fields.keys().copied().collect::<Vec<_>>(), names, "{}", row.request);
        for (name, value) in row.fields.iter().filter(|(name, _)| *name != "date") {
            assert_eq!(fields[name.as_str()], value, "{name} of {}", row.request);
        }
        assert!(fields["date"].ends_with(" GMT"), "{}", fields["date"]);
        let body = client.bytes(row.body.chars().count()).await;
        if row.port == 9090 {
            let decoded = |bytes: &[u8]| lifl_proxy::stats::Stat::decode(bytes).expect("a stat");
            let theirs: Vec<u8> = row.body.chars().map(|c| u8::try_from(c).expect("a byte")).collect();
            let (mut theirs, ours) = (decoded(&theirs), decoded(&body));
            assert!(ours.process_uptime > 1.0);
            theirs.process_uptime = ours.process_uptime;
            assert_eq!(ours, theirs, "an idle pod's name and how long it has been there");
        } else {
            assert_eq!(latin1(&body), row.body, "{}", row.request);
        }
    }
    assert!(asked.lock().expect("no panic").is_empty(), "the container sees none of it");
}
