//! What the coordinator orders of one chain, one word after another: each is kept before its effect is visible.

use std::{
    fs::File,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::FutureExt as _;
use lifl_api::{
    manifest::{Manifest, ManifestError},
    node::{FromGateway, ToGateway},
};
use lifl_daemon::failpoint;
use lifl_ebpf::role;
use lifl_shm::{ObjectKind, ObjectMeta};
use sha2::{Digest as _, Sha256};
use tokio::{sync::mpsc, time::Instant};

use super::coordinator;
use crate::{
    chain::{Chain, Inner, ModelMeta, OpenMeta, Served, Slot, first_key, grow, reserve, segment_key},
    intake::hex,
    layout::Measure,
    state::Gateway,
    token::Key,
};

/// Bytes of a model copied and digested at a time: what stays in the cache between the two.
const CHUNK: usize = 256 << 10;
/// The agent may be asked for a segment just after a job that goes had its questions forgotten: they are forgotten again after this.
const REMOVAL: Duration = Duration::from_millis(100);

/// A model that the coordinator sends but that is not one.
#[derive(Debug, thiserror::Error)]
enum ModelError {
    #[error("cannot read the model: {0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("the model has {found} bytes, its header makes {expected}")]
    Length { found: u64, expected: u64 },
    #[error("the model's sha256 is {found}, announced was {expected}")]
    Digest { found: String, expected: String },
    #[error("no slot for the model: {0}")]
    Slot(String),
}

/// Puts a chain into the stores and begins to work for it.
pub(crate) fn start(gateway: &Arc<Gateway>, inner: Inner, ledger_fd: OwnedFd) -> Arc<Chain> {
    let (words, queue) = mpsc::unbounded_channel();
    let chain = Arc::new(Chain::new(inner, ledger_fd, words));
    gateway.insert(&chain);
    coordinator::adopt_orphans(gateway, &chain);
    tokio::spawn(run(Arc::clone(gateway), Arc::clone(&chain), queue).boxed());
    chain
}

async fn run(gateway: Arc<Gateway>, chain: Arc<Chain>, mut words: mpsc::UnboundedReceiver<(ToGateway, Vec<OwnedFd>)>) {
    end_first(&gateway, &chain).await;
    while let Some((word, fds)) = words.recv().await {
        if matches!(word, ToGateway::Remove { .. }) {
            return remove(&gateway, &chain).await;
        }
        heed(&gateway, &chain, word, fds).await;
    }
}

/// Has the supervisor forget a chain whose job is no more.
async fn remove(gateway: &Arc<Gateway>, chain: &Arc<Chain>) {
    match chain.lost.load(Ordering::Acquire) {
        true => gateway.journals.close(chain.id).await,
        false => crate::journal::remove(gateway, chain).await,
    }
    loop {
        let mut grown = std::pin::pin!(chain.slot_freed.notified());
        grown.as_mut().enable();
        if !chain.growing.load(Ordering::Acquire) {
            break;
        }
        // A segment on its way is waited for, and nobody answers for it any more.
        gateway.agent.forget(chain.id);
        let _asked_meanwhile = tokio::time::timeout(REMOVAL, grown).await;
    }
    let mut keys: Vec<String> = chain.lock().own.keys().map(|segment| segment_key(chain.id, *segment)).collect();
    keys.extend([format!("ledger/{}", chain.id), first_key(chain.id)]);
    for key in keys {
        if let Err(error) = gateway.child.remove(&key).await {
            tracing::warn!(key, %error, "deposit of a job that is no more");
        }
    }
    // Requests under way may hold the chain for a while, not its model.
    chain.lock().served = None;
}

async fn heed(gateway: &Arc<Gateway>, chain: &Arc<Chain>, word: ToGateway, fds: Vec<OwnedFd>) {
    match word {
        ToGateway::Job { job, token_key, join_secret, slot_bytes, .. } => {
            let join_secret = coordinator::secret(gateway, join_secret);
            chain.lock().take_job(*job, token_key, join_secret, slot_bytes);
            keep(gateway, chain).await;
            crate::journal::recall(gateway, chain).await;
        }
        ToGateway::Model { round, length, sha256, .. } => {
            let Some(fd) = fds.into_iter().next() else {
                return tracing::error!(chain = chain.id, "model without its file");
            };
            if let Err(error) = model(gateway, chain, round, length, sha256, fd).await {
                tracing::error!(chain = chain.id, round, %error, "model is not taken");
            }
        }
        ToGateway::Open { round, selected, goal, deadline_ms, tree, .. } => {
            let open = OpenMeta { round, selected: selected.into_iter().collect(), goal, deadline_ms, tree };
            self::open(gateway, chain, open).await;
        }
        ToGateway::Extend { round, selected, deadline_ms, .. } => {
            let known = {
                let mut inner = chain.lock();
                let open = inner.meta.open.as_mut().filter(|open| open.round == round);
                open.map(|open| (open.selected, open.deadline_ms) = (selected.into_iter().collect(), deadline_ms))
            };
            if known.is_some() {
                keep(gateway, chain).await;
                chain.bump();
            }
        }
        ToGateway::Close { round, .. } => close(gateway, chain, round),
        ToGateway::Commit { round, sha256, .. } => commit(gateway, chain, round, sha256).await,
        ToGateway::Finish { succeeded, reason, .. } => {
            chain.lock().meta.finish = Some((succeeded, reason.clone()));
            keep(gateway, chain).await;
            tracing::info!(chain = chain.id, job = chain.job, succeeded, reason, "job is over");
            gateway.with(chain, |inner, _| inner.trim());
            end_first(gateway, chain).await;
            chain.bump();
        }
        ToGateway::Alive { .. } => {
            let clients = chain.lock().clients.alive(Instant::now(), gateway.config.silence());
            gateway.tell(FromGateway::AliveClients { chain: chain.id, clients });
        }
        // Of the edge and of `run`.
        ToGateway::Remove { .. } | ToGateway::Greet | ToGateway::Clients => {}
    }
}

/// Has the supervisor keep what a successor must know.
async fn keep(gateway: &Gateway, chain: &Chain) {
    if chain.is_removed() {
        return;
    }
    let meta = chain.lock().meta.clone();
    let key = format!("ledger/{}", chain.id);
    if let Err(error) = gateway.child.deposit(&key, &meta, &[chain.ledger_fd.as_fd()]).await {
        tracing::error!(chain = chain.id, %error, "the chain's state is not kept");
    }
}

/// Gives the first client's tensors back, once nobody asks for them any more.
async fn end_first(gateway: &Gateway, chain: &Chain) {
    let ended = chain.lock().end_first();
    if ended.is_some()
        && let Err(error) = gateway.child.remove(&first_key(chain.id)).await
    {
        tracing::warn!(chain = chain.id, %error, "deposit of the first model");
    }
}

async fn open(gateway: &Arc<Gateway>, chain: &Arc<Chain>, open: OpenMeta) {
    let (round, goal, selected) = (open.round, open.goal, open.selected.len());
    let begun = {
        let mut inner = chain.lock();
        let now = inner.ledger.round();
        if inner.ledger.committed().is_some_and(|committed| round <= committed) && now.goal != 0 {
            return tracing::info!(chain = chain.id, round, "round is committed already");
        }
        let begun = now.round == round && now.goal != 0;
        if let (true, Some(old)) = (begun, &inner.meta.open) {
            // The tree is that of the objects under way, whatever a new coordinator would plan.
            let tree = old.tree.clone();
            inner.meta.open = Some(OpenMeta { tree, ..open });
        } else {
            inner.meta.open = Some(open);
        }
        begun
    };
    keep(gateway, chain).await;
    if begun {
        // An earlier life may have died while it did so.
        crate::journal::readmit(gateway, chain, round).await;
        return chain.bump();
    }
    let result = gateway.with(chain, |inner, out| {
        let result = inner.begin(round, goal);
        if result.is_ok() {
            out.extend(inner.base());
        }
        result
    });
    if let Err(error) = result {
        return tracing::error!(chain = chain.id, round, %error, "round cannot be opened");
    }
    failpoint("gateway.opened");
    tracing::info!(chain = chain.id, job = chain.job, round, goal, selected, "round is open");
    crate::journal::readmit(gateway, chain, round).await;
    if chain.lock().arena.as_ref().is_some_and(|arena| arena.free_slots() == 0) {
        grow(gateway, chain);
    }
    chain.bump();
}

fn close(gateway: &Gateway, chain: &Chain, round: u32) {
    let admitted = gateway.with(chain, |inner, out| (inner.ledger.round().round == round).then(|| inner.close(out)));
    match admitted {
        Some(admitted) => closed(gateway, chain, round, admitted),
        None => tracing::warn!(chain = chain.id, round, "a round that is not under way cannot be closed"),
    }
}

/// Tells everyone that the round takes no more.
pub(crate) fn closed(gateway: &Gateway, chain: &Chain, round: u32, admitted: u32) {
    tracing::info!(chain = chain.id, job = chain.job, round, admitted, "round is closed");
    gateway.tell(FromGateway::Closed { chain: chain.id, round, admitted });
    chain.bump();
}

async fn commit(gateway: &Arc<Gateway>, chain: &Arc<Chain>, round: u32, sha256: String) {
    {
        let mut inner = chain.lock();
        let pending = inner.pending_model().filter(|model| model.round == round);
        let Some(model) = pending else {
            let done = inner.ledger.committed().is_some_and(|committed| committed >= round);
            return tracing::info!(chain = chain.id, round, done, "nothing to commit");
        };
        inner.name_model(ModelMeta::new(round, sha256, model.key, model.writer));
    }
    keep(gateway, chain).await;
    failpoint("gateway.committing");
    let (result, old) = gateway.with(chain, |inner, out| {
        let result = inner.retire(round, out);
        let old = inner.served.take();
        inner.serve_model(&gateway.gone);
        inner.totals.committed += 1;
        (result, old)
    });
    match result {
        Ok(()) => tracing::info!(chain = chain.id, job = chain.job, round, "round is committed"),
        Err(error) => tracing::error!(chain = chain.id, round, %error, "round cannot be retired"),
    }
    failpoint("gateway.committed");
    crate::journal::retire(gateway, chain, round).await;
    revoke_later(gateway, old);
    chain.bump();
}

/// Downloads of a replaced model may go on for a while, not for ever: its slot is wanted.
fn revoke_later(gateway: &Gateway, old: Option<Arc<Served>>) {
    let Some(old) = old.filter(|old| Arc::strong_count(old) > 1) else { return };
    let grace = Duration::from_millis(gateway.config.model_grace_ms);
    // Weak: the timer must not hold what it waits to be let go.
    let old = Arc::downgrade(&old);
    tokio::spawn(
        async move {
            tokio::time::sleep(grace).await;
            if let Some(old) = old.upgrade() {
                old.revoke();
            }
        }
        .boxed(),
    );
}

async fn model(
    gateway: &Arc<Gateway>,
    chain: &Arc<Chain>,
    round: u32,
    length: u64,
    sha256: String,
    fd: OwnedFd,
) -> Result<(), ModelError> {
    {
        let inner = chain.lock();
        let known = inner.meta.model.as_ref();
        // What a committed round made is newer than anything a new coordinator may still send.
        if known.is_some_and(|known| known.round > round || (known.round == round && known.sha256 == sha256)) {
            return Ok(());
        }
    }
    let file = File::from(fd);
    let manifest = read_manifest(&file)?;
    if manifest.file_bytes() != length {
        return Err(ModelError::Length { found: length, expected: manifest.file_bytes() });
    }
    {
        let mut inner = chain.lock();
        let measure = Arc::new(Measure::new(manifest, &inner.meta.job.spec.update));
        inner.make_arena(&measure).map_err(|error| ModelError::Slot(error.to_string()))?;
        inner.measure = Some(measure);
    }
    let slot = patient_slot(gateway, chain).await?;
    let length = usize::try_from(length).map_err(|e| ModelError::Slot(e.to_string()))?;
    let copied = tokio::task::spawn_blocking(move || copy_model(&file, slot, length)).await;
    let (slot, found) = copied.map_err(|e| ModelError::Slot(e.to_string()))??;
    if found != sha256 {
        return Err(ModelError::Digest { found, expected: sha256 });
    }
    let meta =
        ObjectMeta { kind: ObjectKind::Model, round, count: 0, weight: 0.0, length: length as u64, runs: Vec::new() };
    let sealed = slot.seal(&meta).map_err(|error| ModelError::Slot(error.to_string()))?;
    let named = ModelMeta::new(round, sha256, sealed.key, role::GATEWAY);
    chain.lock().name_model(named);
    keep(gateway, chain).await;
    let old = gateway.with(chain, |inner, out| {
        let old = inner.served.take();
        inner.serve_model(&gateway.gone);
        // A round may be under way already: then the top waits for its base.
        if !inner.is_between_rounds() {
            out.extend(inner.base());
        }
        old
    });
    tracing::info!(chain = chain.id, job = chain.job, round, bytes = length, "model is served");
    end_first(gateway, chain).await;
    revoke_later(gateway, old);
    chain.bump();
    Ok(())
}

fn read_manifest(file: &File) -> Result<Manifest, ModelError> {
    let mut prefix = [0; 8];
    file.read_exact_at(&mut prefix, 0)?;
    let length = usize::try_from(Manifest::header_length(prefix)?).unwrap_or(usize::MAX);
    let mut header = vec![0; length];
    file.read_exact_at(&mut header, 0)?;
    Ok(Manifest::parse(&header)?)
}

/// The model must have a slot, however long the agent takes.
async fn patient_slot(gateway: &Arc<Gateway>, chain: &Arc<Chain>) -> Result<Slot, ModelError> {
    loop {
        match reserve(gateway, chain).await {
            Ok(slot) => return Ok(slot),
            Err(refusal) if chain.is_removed() => return Err(ModelError::Slot(refusal.detail)),
            Err(refusal) => tracing::info!(chain = chain.id, reason = refusal.detail, "model waits for a slot"),
        }
    }
}

fn copy_model(file: &File, mut slot: Slot, length: usize) -> Result<(Slot, String), ModelError> {
    let mut hash = Sha256::new();
    let short = || ModelError::Slot("the slot is shorter than the model".to_owned());
    let payload = slot.payload().get_mut(..length).ok_or_else(short)?;
    let mut at = 0;
    for chunk in payload.chunks_mut(CHUNK) {
        file.read_exact_at(chunk, at)?;
        hash.update(&*chunk);
        at += chunk.len() as u64;
    }
    Ok((slot, hex(&hash.finalize())))
}

// === impl Inner: orders ===

impl Inner {
    fn take_job(
        &mut self,
        job: lifl_api::job::FederatedJob,
        token_key: String,
        secret: Option<String>,
        slot_bytes: u64,
    ) {
        if let Some(key) = Key::new(&token_key) {
            self.key = key;
        }
        if let Some(arena) = &self.arena {
            arena.set_limit(slot_bytes);
        }
        self.meta.job = job;
        self.meta.token_key = token_key;
        self.meta.join_secret = secret;
        self.meta.slot_bytes = slot_bytes;
    }

    fn begin(&mut self, round: u32, goal: u32) -> Result<(), lifl_shm::LedgerError> {
        self.ledger.begin(round, goal)?;
        let journalled = self.journalled.iter().filter(|(_, known)| known.round == round);
        self.reported = journalled.map(|((client, _), _)| client.clone()).collect();
        self.readmitting = !self.reported.is_empty();
        self.waiting.clear();
        self.outstanding.clear();
        self.close_sent = false;
        Ok(())
    }

    fn name_model(&mut self, model: ModelMeta) {
        self.meta.previous = self.meta.model.replace(model);
    }

    /// The end of a round: what nothing contains, and is not its model, is given back.
    pub(crate) fn retire(
        &mut self,
        round: u32,
        out: &mut Vec<lifl_ebpf::Descriptor>,
    ) -> Result<(), lifl_shm::LedgerError> {
        let left = self.ledger.retire(round)?;
        let model = self.meta.model.as_ref().map(ModelMeta::key);
        for object in left.into_iter().filter(|object| Some(object.key) != model) {
            self.release(object, out);
        }
        self.drop_old();
        Ok(())
    }

    /// The round under way, if it is closed and not committed.
    pub(crate) fn closed(&self) -> Option<FromGateway> {
        let round = self.ledger.round();
        let closed = !round.open && !self.is_between_rounds();
        let admitted = self.ledger.admitted();
        closed.then_some(FromGateway::Closed { chain: self.chain, round: round.round, admitted })
    }

    /// Gives back the segments that hold nothing.
    fn trim(&mut self) {
        let Some(arena) = &self.arena else { return };
        for segment in arena.trim(0) {
            self.own.remove(&segment);
            self.dropped.push(segment);
        }
    }
}
