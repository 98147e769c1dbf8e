//! `initial: {fromFirstClient: true}`: the first upload of round 1 becomes the job's first model.
//!
//! The client is asked to send the same again: by then the coordinator has stored the model and planned for it, and the
//! second time it is an ordinary update. So nothing is promised before there is a place for it.

use std::{fs::File, io::Write as _, sync::Arc};

use lifl_api::{manifest::float, node::FromGateway};
use lifl_fold::first_non_finite;
use rustix::fs::{MemfdFlags, memfd_create};

use super::{update, upload::Upload};
use crate::{
    chain::{Chain, Claim},
    intake::ScatterError,
    layout::element,
    problem::{Code, Refusal},
    state::{Gateway, Word},
};

/// Takes the body as the job's model; always a refusal.
pub(crate) async fn adopt(gateway: &Arc<Gateway>, chain: &Arc<Chain>, claim: &Claim, upload: &mut Upload) -> Refusal {
    match take(gateway, chain, claim, upload).await {
        Ok(()) => Code::ModelAdopted.with("these tensors are the job's first model now: send the update again"),
        Err(refusal) => refusal,
    }
}

async fn take(gateway: &Gateway, chain: &Chain, claim: &Claim, upload: &mut Upload) -> Result<(), Refusal> {
    let (first, known, limit, dtypes) = {
        let inner = chain.lock();
        let spec = &inner.meta.job.spec;
        let limit = spec.update.max_size.map_or(inner.meta.slot_bytes, |size| size.0);
        (spec.model.initial.from_first_client, inner.meta.model.is_some(), limit, spec.update.dtypes.clone())
    };
    if !first || known || claim.round != 1 {
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
    tracing::info!(chain = chain.id, job = chain.job, client = claim.client, bytes, "first model from a client");
    let word = FromGateway::FirstModel { chain: chain.id, offset: 0, length: bytes };
    let _the_process_ends = gateway.coordinator.send(Word::Say(word, Some(memory.into())));
    Ok(())
}
