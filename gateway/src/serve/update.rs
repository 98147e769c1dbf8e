//! An update: head judged, slot reserved, tensors copied to their places, sealed, promised, handed on.

use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::Incoming;
use lifl_api::{
    event::{SAFETENSORS, attributes},
    http::Receipt,
    manifest::Manifest,
};
use lifl_daemon::failpoint;
use lifl_events::Head;
use lifl_shm::{ObjectKind, ObjectMeta};
use tokio::time::Instant;

use super::{auth, control::length_of, first, upload::Upload};
use crate::{
    chain::{Chain, Claim, Slot, Verdict, reserve},
    intake::{Digester, HeaderReader, Scatter, ScatterError, digest_text},
    layout::{Layout, Measure},
    problem::{Code, Refusal},
    state::Gateway,
    watch::worker,
};

/// Notes that the upload of a client is over, however it ends.
struct Uploading<'a> {
    chain: &'a Chain,
    client: &'a str,
}

impl Drop for Uploading<'_> {
    fn drop(&mut self) {
        self.chain.lock().uploaded(self.client);
    }
}

/// Takes an update; the receipt once it is safe.
pub(crate) async fn take(
    gateway: &Arc<Gateway>,
    chain: &Arc<Chain>,
    headers: &HeaderMap,
    head: Head<'_>,
    body: Incoming,
) -> Result<Receipt, Refusal> {
    let mut upload = Upload::new(headers, body, headers.contains_key("ce-fldigest"), &gateway.config);
    let claim = claim(gateway, chain, headers, &head)?;
    let verdict = chain.lock().judge(&claim)?;
    if let Verdict::Duplicate(receipt, digest) = verdict {
        if let Some(digest) = digest {
            compare(chain, &claim, &mut upload, &digest).await?;
        }
        chain.lock().totals.duplicates += 1;
        return Ok(receipt);
    }
    let _busy = Uploading { chain, client: &claim.client };
    let measure = chain.lock().measure.clone();
    let Some(measure) = measure else {
        return Err(first::adopt(gateway, chain, &claim, &mut upload).await);
    };
    let (slot, meta) = receive(gateway, chain, &measure, &claim, &mut upload).await?;
    gateway.metrics.received(upload.received());
    let digest = upload.digest();
    if claim.sha256.is_some_and(|claimed| claimed != digest) {
        return Err(
            Code::BadDigest.with(format!("the body's digest is {}, not what fldigest says", digest_text(&digest)))
        );
    }
    let slot = gateway.journals.record(chain, &claim, &meta, digest, slot).await?;
    let sealed = slot.seal(&meta).map_err(|error| {
        tracing::error!(chain = chain.id, %error, "update is not sealed");
        Code::Starting.with("the update cannot be stored now")
    })?;
    failpoint("gateway.sealed");
    let admission = gateway.with(chain, |inner, out| inner.admit(&claim, &sealed, digest, out))?;
    failpoint("gateway.sent");
    if !admission.receipt.duplicate {
        gateway.tell_progress(chain);
    }
    if let Some(admitted) = admission.closed {
        worker::closed(gateway, chain, claim.round, admitted);
    }
    Ok(admission.receipt)
}

/// Reads the body of a repeated event and forgets it: it must be the one that the receipt is for.
async fn compare(chain: &Chain, claim: &Claim, upload: &mut Upload, known: &[u8; 32]) -> Result<(), Refusal> {
    chain.lock().fits(claim.length.unwrap_or(0))?;
    let mut digester = Digester::like(known);
    while let Some(frame) = upload.frame().await? {
        chain.lock().fits(upload.received() as u64)?;
        digester.push(&frame);
    }
    let same = digester.finish() == *known;
    if !same || claim.sha256.is_some_and(|claimed| claimed != upload.digest()) {
        let was = digest_text(known);
        return Err(Code::OtherContent.with(format!("event '{}' was accepted with another body: {was}", claim.id)));
    }
    Ok(())
}

/// Judges what the head alone tells; in the order of what matters most to the sender.
fn claim(gateway: &Gateway, chain: &Chain, headers: &HeaderMap, head: &Head<'_>) -> Result<Claim, Refusal> {
    if gateway.is_draining() {
        return Err(Code::Draining.with("the gateway ends: send to its successor"));
    }
    let client = head.required(attributes::CLIENT)?;
    auth::client(gateway, chain, headers, &client)?;
    let media = head.content_type().unwrap_or_default();
    let essence = media.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case(SAFETENSORS) {
        return Err(Code::MediaType.with(format!("Content-Type is '{media}', updates are {SAFETENSORS}")));
    }
    if headers.contains_key(http::header::CONTENT_ENCODING) {
        return Err(Code::Encoding.with("Content-Encoding is not understood: send the tensors as they are"));
    }
    let length = length_of(headers)?;
    let inner = chain.lock();
    let spec = &inner.meta.job.spec;
    let claim = Claim::read(head, (&chain.namespace, &chain.job), spec)?;
    gateway.journals.check(spec.ack_level)?;
    Ok(Claim { length, ..claim })
}

/// Reads the body into a slot.
async fn receive(
    gateway: &Arc<Gateway>,
    chain: &Arc<Chain>,
    measure: &Measure,
    claim: &Claim,
    upload: &mut Upload,
) -> Result<(Slot, ObjectMeta), Refusal> {
    let (manifest, _, mut rest) = header(upload).await?;
    check(measure, &manifest, claim.length)?;
    let layout = Layout::new(&measure.manifest, &manifest);
    let layout = layout.ok_or_else(|| Code::TooLarge.with("tensors beyond what this machine can address"))?;
    let waiting = Instant::now();
    let mut slot = reserve(gateway, chain).await?;
    upload.pardon(waiting);
    let mut scatter = Scatter::new(&layout);
    loop {
        scatter.push(slot.payload(), &rest).map_err(|error| explain(&error, &manifest))?;
        match upload.frame().await? {
            Some(frame) => rest = frame,
            None => break,
        }
    }
    if !scatter.is_whole() {
        let (got, want) = (upload.received(), manifest.file_bytes());
        return Err(Code::BadLength.with(format!("the body ended after {got} bytes, its header makes {want}")));
    }
    let meta = ObjectMeta {
        kind: ObjectKind::Update,
        round: claim.round,
        count: 1,
        weight: claim.weight,
        length: layout.length,
        runs: layout.runs,
    };
    Ok((slot, meta))
}

/// The safetensors header, its bytes, and what came with them.
pub(crate) async fn header(upload: &mut Upload) -> Result<(Manifest, Vec<u8>, Bytes), Refusal> {
    let mut reader = HeaderReader::default();
    loop {
        let Some(mut frame) = upload.frame().await? else {
            return Err(
                Code::BadLength.with(format!("the body ended within its header, after {} bytes", upload.received()))
            );
        };
        let read = reader.push(&mut frame).map_err(|error| Code::BadTensors.with(error.to_string()))?;
        if let Some(manifest) = read {
            return Ok((manifest, reader.bytes().to_vec(), frame));
        }
    }
}

fn check(measure: &Measure, manifest: &Manifest, length: Option<u64>) -> Result<(), Refusal> {
    measure.manifest.check(manifest, &measure.dtypes).map_err(|error| Code::BadTensors.with(error.to_string()))?;
    let bytes = manifest.file_bytes();
    if bytes > measure.max_size {
        return Err(Code::TooLarge.with(format!("{bytes} bytes, the job accepts {}", measure.max_size)));
    }
    match length.filter(|length| *length != bytes) {
        Some(length) => Err(Code::BadLength.with(format!("Content-Length is {length}, the header makes {bytes}"))),
        None => Ok(()),
    }
}

pub(crate) fn explain(error: &ScatterError, manifest: &Manifest) -> Refusal {
    match error {
        ScatterError::TooLong => {
            Code::BadLength.with(format!("more than the {} bytes of the header", manifest.file_bytes()))
        }
        ScatterError::NotFinite { tensor, element } => {
            let name = manifest.tensors().get(*tensor).map_or("?", |tensor| tensor.name.as_str());
            Code::NotFinite.with(format!("tensor '{name}' is not finite at element {element}"))
        }
        ScatterError::Misfit => {
            tracing::error!("layout does not fit the slot");
            Code::Starting.with("the update cannot be stored now")
        }
    }
}
