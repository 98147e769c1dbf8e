//! Reviews over real TLS, with certificates from files and self-made ones, exchanged while it serves.

use std::{fs, net::SocketAddr, path::Path, sync::Arc, time::Duration, time::SystemTime};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use lifl_webhook::{CertificateSource, Certificates, Config, NAMESPACE_PATH, POD_PATH, build};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::oneshot,
    task::JoinHandle,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

const NAME: &str = "webhook.lifl-system.svc";
const DAY: Duration = Duration::from_secs(24 * 3600);

struct Running {
    address: SocketAddr,
    certificates: Arc<Certificates>,
    drain: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

async fn start(certificate: CertificateSource) -> Running {
    start_with(Config::new(certificate)).await
}

async fn start_with(config: Config) -> Running {
    let bound = build(Config { listen: ([127, 0, 0, 1], 0).into(), ..config }).await.expect("a port");
    let (address, certificates) = (bound.address, bound.certificates.clone());
    let (drain, drained) = oneshot::channel::<()>();
    let served = tokio::spawn(bound.run(async move { drop(drained.await) }));
    Running { address, certificates, drain, served }
}

/// Connects as an API server does: by name, against one root.
async fn connect(address: SocketAddr, root: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(root.as_bytes()).expect("PEM")).expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("TLS");
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from(NAME).expect("a name");
    TlsConnector::from(Arc::new(config)).connect(name, TcpStream::connect(address).await?).await
}

async fn post(stream: TlsStream<TcpStream>, path: &str, body: String) -> (StatusCode, String) {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
    let connection = tokio::spawn(connection);
    let request = Request::post(path).header("host", NAME).body(Full::new(Bytes::from(body))).expect("a request");
    let response = sender.send_request(request).await.expect("an answer");
    let status = response.status();
    let body = response.into_body().collect().await.expect("its body").to_bytes();
    drop(sender);
    connection.await.expect("no panic").expect("an orderly end");
    (status, String::from_utf8(body.to_vec()).expect("text"))
}

fn review(pod: &Value) -> String {
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "operation": "CREATE",
            "namespace": "golden",
            "object": pod,
            "dryRun": false,
        },
    })
    .to_string()
}

/// The golden pod as an API server sends it: it has no name and no namespace of its own yet.
fn pod(asks: bool) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/one-revision.yaml");
    let mut pod: Value = serde_yaml_ng::from_str(&fs::read_to_string(file).expect("golden pod")).expect("YAML");
    let metadata = pod["metadata"].as_object_mut().expect("metadata");
    for late in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        metadata.remove(late);
    }
    if asks {
        pod["metadata"]["annotations"]["lifl.dev/data-plane"] = json!("node");
    }
    pod.as_object_mut().expect("a pod").remove("status");
    pod
}

fn patch_of(answer: &str) -> Value {
    let answer: Value = serde_json::from_str(answer).expect("JSON");
    assert_eq!((&answer["apiVersion"], &answer["kind"]), (&json!("admission.k8s.io/v1"), &json!("AdmissionReview")));
    let response = &answer["response"];
    assert_eq!(response["uid"], "705ab4f5-6393-11e8-b7cc-42010a800002");
    assert_eq!(response["allowed"], true);
    match response["patch"].as_str() {
        Some(patch) => {
            assert_eq!(response["patchType"], "JSONPatch");
            serde_json::from_slice(&STANDARD.decode(patch).expect("base64")).expect("a patch")
        }
        None => Value::Null,
    }
}

#[tokio::test]
async fn reviews_are_answered_over_tls() {
    let running = start(CertificateSource::SelfMade { names: vec![NAME.into()] }).await;
    let root = running.certificates.root().unwrap();
    let ask = async |path: &'static str, pod: Value| {
        let stream = connect(running.address, &root).await.unwrap();
        let (status, answer) = post(stream, path, review(&pod)).await;
        assert_eq!(status, StatusCode::OK);
        answer
    };
    let patch = patch_of(&ask(POD_PATH, pod(true)).await);
    assert!(patch.as_array().unwrap().contains(&json!({"op": "remove", "path": "/spec/containers/1"})), "{patch}");
    assert_eq!(patch_of(&ask(POD_PATH, pod(false)).await), Value::Null);
    assert!(patch_of(&ask(NAMESPACE_PATH, pod(false)).await).is_array());

    let mut host = pod(true);
    host["spec"]["hostNetwork"] = json!(true);
    let answer = ask(POD_PATH, host).await;
    assert_eq!(patch_of(&answer)[0]["path"], "/metadata/annotations/lifl.dev~1sidecar-kept");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert!(
        answer["response"]["warnings"][0]
            .as_str()
            .unwrap()
            .starts_with("queue-proxy stays: it uses the node's network")
    );

    running.drain.send(()).unwrap();
    running.served.await.unwrap();
    assert!(TcpStream::connect(running.address).await.is_err(), "it has ended");
}

#[tokio::test]
async fn what_is_no_review_of_a_new_pod_changes_nothing() {
    let running = start(CertificateSource::SelfMade { names: vec![NAME.into()] }).await;
    let root = running.certificates.root().unwrap();
    let send =
        async |path: &'static str, body: String| post(connect(running.address, &root).await.unwrap(), path, body).await;
    let edit = |pointer: &str, value: Value| {
        let mut document: Value = serde_json::from_str(&review(&pod(true))).unwrap();
        *document.pointer_mut(pointer).unwrap() = value;
        document.to_string()
    };
    for (pointer, value) in [
        ("/request/operation", json!("UPDATE")),
        ("/request/kind/kind", json!("Deployment")),
        ("/request/object", Value::Null),
    ] {
        let (status, answer) = send(POD_PATH, edit(pointer, value)).await;
        assert_eq!((status, patch_of(&answer)), (StatusCode::OK, Value::Null), "{pointer}");
    }
    let rows = [
        (POD_PATH, "{".to_owned(), StatusCode::BAD_REQUEST),
        (POD_PATH, edit("/apiVersion", json!("admission.k8s.io/v1beta1")), StatusCode::BAD_REQUEST),
        ("/other", review(&pod(true)), StatusCode::NOT_FOUND),
    ];
    for (path, body, expected) in rows {
        assert_eq!(send(path, body).await.0, expected);
    }
    let mut long = connect(running.address, &root).await.unwrap();
    let head = format!("POST {POD_PATH} HTTP/1.1\r\nhost: {NAME}\r\ncontent-length: {}\r\n\r\n", 9 << 20);
    long.write_all(head.as_bytes()).await.unwrap();
    let mut status = [0; 12];
    long.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 413");
}

#[tokio::test]
async fn who_is_silent_keeps_no_review_out() {
    let source = CertificateSource::SelfMade { names: vec![NAME.into()] };
    let running = start_with(Config { patience_ms: 500, ..Config::new(source) }).await;
    let root = running.certificates.root().unwrap();
    let head = format!("POST {POD_PATH} HTTP/1.1\r\nhost: {NAME}\r\ncontent-length: 100\r\n\r\n{{");
    // Nothing, half a review, one that was answered, and HTTP/2 without a request.
    let words: [&[u8]; 4] = [
        b"",
        head.as_bytes(),
        b"GET /healthz HTTP/1.1\r\nhost: w\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    ];
    let mut silent = Vec::new();
    for words in words.into_iter().cycle().take(256) {
        let mut stream = connect(running.address, &root).await.unwrap();
        stream.write_all(words).await.unwrap();
        silent.push(stream);
    }
    let asked = async {
        loop {
            match connect(running.address, &root).await {
                Ok(stream) => break post(stream, POD_PATH, review(&pod(true))).await,
                Err(_no_place) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    let (status, answer) = tokio::time::timeout(Duration::from_secs(60), asked).await.expect("a place");
    assert!(status == StatusCode::OK && patch_of(&answer).is_array(), "{answer}");
    // Who was silent has been let go.
    for mut stream in silent {
        let read = async {
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await
        };
        drop(tokio::time::timeout(Duration::from_secs(60), read).await.expect("its end"));
    }
}

/// A root and a pair signed by it, as a cluster's issuer would write them into a Secret.
fn issue() -> (String, String, String) {
    let mut params = rcgen::CertificateParams::new(Vec::new()).expect("a certificate");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().expect("a certificate"))
        .expect("a certificate");
    let key = rcgen::KeyPair::generate().expect("a certificate");
    let leaf = rcgen::CertificateParams::new(vec![NAME.to_owned()])
        .expect("a certificate")
        .signed_by(&key, &root)
        .expect("a certificate");
    (root.pem(), leaf.pem(), key.serialize_pem())
}

#[tokio::test]
async fn files_are_exchanged_while_it_serves_and_half_a_pair_is_not_taken() {
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = (folder.path().join("tls.crt"), folder.path().join("tls.key"));
    let ((old_root, old_leaf, old_key), (new_root, new_leaf, new_key)) = (issue(), issue());
    fs::write(&certificate, old_leaf).unwrap();
    fs::write(&key, &old_key).unwrap();
    let running = start(CertificateSource::Files { certificate: certificate.clone(), key: key.clone() }).await;
    let now = SystemTime::now();
    assert_eq!(running.certificates.root(), None);
    let kept = connect(running.address, &old_root).await.unwrap();
    assert!(connect(running.address, &new_root).await.is_err());
    assert!(!running.certificates.refresh(now).unwrap());

    fs::write(&certificate, new_leaf).unwrap();
    assert!(running.certificates.refresh(now).unwrap_err().to_string().contains("certificate"), "key of another");
    connect(running.address, &old_root).await.unwrap();

    fs::write(&key, new_key).unwrap();
    // Its own look at the files may come first.
    let _taken = running.certificates.refresh(now).unwrap();
    connect(running.address, &new_root).await.unwrap();
    assert!(connect(running.address, &old_root).await.is_err());
    // Connections of before go on.
    assert_eq!(post(kept, POD_PATH, review(&pod(false))).await.0, StatusCode::OK);

    fs::remove_file(&key).unwrap();
    assert!(running.certificates.refresh(now).unwrap_err().to_string().contains("tls.key"));
    connect(running.address, &new_root).await.unwrap();
}

#[tokio::test]
async fn a_self_made_certificate_is_renewed_before_it_ends_by_the_same_root() {
    let running = start(CertificateSource::SelfMade { names: vec![NAME.into()] }).await;
    let (root, now) = (running.certificates.root().unwrap(), SystemTime::now());
    let leaf = async || {
        let stream = connect(running.address, &root).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    };
    let first = leaf().await;
    assert!(!running.certificates.refresh(now + 19 * DAY).unwrap());
    assert_eq!(leaf().await, first);
    assert!(running.certificates.refresh(now + 20 * DAY).unwrap());
    assert_eq!(running.certificates.root().unwrap(), root);
}
