//! `initial: {fromFirstClient: true}`: the first upload of round 1 becomes the job's first model.
//!
//! The client is asked to send the same again: by then the coordinator has stored the model and planned for it, and the
//! second time it is an ordinary update. So nothing is promised before there is a place for it. Others who send theirs
//! meanwhile are asked to come again, too; what they sent is not kept.

use std::{fs::File, io::Write as _, os::fd::AsFd as _, sync::Arc};

use futures_util::FutureExt as _;
use lifl_api::manifest::float;
use lifl_fold::first_non_finite;
use rustix::fs::{MemfdFlags, memfd_create};

use super::{update, upload::Upload};
use crate::{
    chain::{Chain, Claim, first_key},
    intake::ScatterError,
    layout::element,
    problem::{Code, Refusal},
    state::{Gateway, Word},
};

/// Takes the body as the job's model, if it is the first; always a refusal.
pub(crate) async fn adopt(gateway: &Arc<Gateway>, chain: &Arc<Chain>, claim: &Claim, upload: &mut Upload) -> Refusal {
    match take(gateway, chain, claim, upload).await {
        Ok(true) => Code::ModelAdopted.with("these tensors are the job's first model now: send the update again"),
        Ok(false) => Code::ModelAdopted.with("another client's tensors become the job's first model: send again"),
        Err(refusal) => refusal,
    }
}

/// Whether it is; unreadable tensors are not.
async fn take(gateway: &Arc<Gateway>, chain: &Arc<Chain>, claim: &Claim, upload: &mut Upload) -> Result<bool, Refusal> {
    let (adopting, wanted, limit, dtypes) = {
        let inner = chain.lock();
        let spec = &inner.meta.job.spec;
        (inner.first.is_some(), inner.wants_first(), inner.max_size(), spec.update.dtypes.clone())
    };
    if adopting {
        return Ok(false);
    }
    if !wanted || claim.round != 1 {
        return Err(Code::Starting.with("the job's model is not here yet"));
    }
    let (manifest, mut file, rest) = update::header(upload).await?;
    manifest.check(&manifest, &dtypes).map_err(|error| Code::BadTensors.with(error.to_string()))?;
    let bytes = manifest.file_bytes();
    if bytes > limit {
        return Err(Code::TooLarge.with(format!("{bytes} bytes, the job accepts {limit}")));
    }
    file.extend_from_slice(&rest);
    while let Some(frame) = upload.frame().await? {
        if !chain.lock().wants_first() {
            return Ok(false);
        }
        file.extend_from_slice(&frame);
        if file.len() as u64 > bytes {
            return Err(update::explain(&ScatterError::TooLong, &manifest));
        }
    }
    if file.len() as u64 != bytes {
        return Err(Code::BadLength.with(format!("{} bytes, the header makes {bytes}", file.len())));
    }
    for (index, tensor) in manifest.tensors().iter().enumerate() {
        let Some(dtype) = float(tensor.dtype) else { continue };
        let at = |offset: u64| usize::try_from(manifest.header_bytes() + offset).unwrap_or(usize::MAX);
        let elements = file.get(at(tensor.begin)..at(tensor.end)).unwrap_or_default();
        if let Some(element) = first_non_finite(elements, element(dtype).1) {
            return Err(update::explain(&ScatterError::NotFinite { tensor: index, element }, &manifest));
        }
    }
    let stored = memfd_create("lifl-first-model", MemfdFlags::CLOEXEC).map_err(std::io::Error::from);
    let stored = stored.and_then(|fd| {
        let mut memory = File::from(fd);
        memory.write_all(&file).map(|()| memory)
    });
    let memory = stored.map_err(|error| Code::OutOfMemory.with(format!("the model cannot be stored: {error}")))?;
    if !chain.lock().take_first(memory.into(), bytes) {
        return Ok(false);
    }
    tracing::info!(chain = chain.id, job = chain.job, client = claim.client, bytes, "first model from a client");
    // On its own: the client may be gone before it is kept, and nobody else's tensors are taken any more.
    let told = tokio::spawn(tell(Arc::clone(gateway), Arc::clone(chain)).boxed());
    let _the_process_ends = told.await;
    Ok(true)
}

/// Has the tensors kept, then tells the coordinator of them.
async fn tell(gateway: Arc<Gateway>, chain: Arc<Chain>) {
    let file = chain.lock().first.as_ref().map(|first| (first.file.try_clone(), first.length));
    let Some((Ok(file), length)) = file else { return };
    if let Err(error) = gateway.child.deposit(&first_key(chain.id), &length, &[file.as_fd()]).await {
        tracing::error!(chain = chain.id, %error, "the first model is not kept");
    }
    if let Some(first) = chain.lock().first.as_mut() {
        first.kept = true;
    }
    let _the_process_ends = gateway.coordinator.send(Word::First(chain.id));
}
