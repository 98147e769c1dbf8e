//! Slots for uploads: from the arena, which grows by segments that the agent grants.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::FutureExt as _;
use lifl_api::job::Timing;
use lifl_ebpf::role;
use lifl_shm::{Arena, ArenaError, ObjectMeta, SealError, Sealed, Segment, SegmentSpec, SlotWriter};
use tokio::time::{Instant, timeout_at};

use super::{Chain, Inner, Own};
use crate::{
    layout::Measure,
    problem::{Code, Refusal},
    state::Gateway,
};

/// Segments of small slots are about as large as this: each costs every member a mapping and a descriptor.
const SMALL_SEGMENT: u64 = 1 << 20;
/// An upload that finds no slot waits so long before memory is taken for it: what is sealed is being folded, and its slot
/// comes back. Slow clients, who hold slots for longer, get more of them one after the other.
const GROWTH_PAUSE: Duration = Duration::from_millis(500);
/// After a refusal the agent is left alone for so long.
const REFUSED: Duration = Duration::from_secs(1);

/// A slot being filled. Dropped unsealed, it goes back, and whoever waits for one is told.
#[derive(Debug)]
pub(crate) struct Slot {
    writer: Option<SlotWriter>,
    chain: Arc<Chain>,
}

// === impl Slot ===

impl Slot {
    pub(crate) fn payload(&mut self) -> &mut [u8] {
        self.writer.as_mut().map(SlotWriter::payload_mut).unwrap_or_default()
    }

    pub(crate) fn seal(mut self, meta: &ObjectMeta) -> Result<Sealed, SealError> {
        self.writer.take().ok_or(SealError::NoId)?.seal(meta)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.writer.take().is_some() {
            self.chain.slot_freed.notify_one();
        }
    }
}

// === impl Inner: the arena ===

impl Inner {
    /// The arena of slots for this model, made when the model is known.
    pub(crate) fn make_arena(&mut self, measure: &Measure) -> Result<(), ArenaError> {
        let mut spec = SegmentSpec {
            chain: self.chain,
            writer: role::GATEWAY,
            slots: 1,
            payload_bytes: measure.payload_bytes,
            max_runs: measure.max_runs,
        };
        let limit = self.meta.slot_bytes;
        let one = Segment::bytes_of(spec)?;
        let fits = limit / one.max(1);
        // A coarse grain wastes what it cannot fill: one slot where they are large, many where they are small.
        let grain = (SMALL_SEGMENT / one.max(1)).min(fits / 4).max(1);
        spec.slots = u32::try_from(grain).unwrap_or(1);
        match &self.arena {
            Some(arena) if arena.spec().payload_bytes >= spec.payload_bytes => arena.set_limit(limit),
            _ => self.arena = Some(Arena::new(spec, limit)),
        }
        Ok(())
    }

    /// Whether one more segment may be asked for now.
    fn may_grow(&self, now: Instant) -> Option<(Arena, u64)> {
        let arena = self.arena.clone()?;
        if self.refused_until.as_ref().is_some_and(|(until, _)| now < *until) {
            return None;
        }
        let bytes = Segment::bytes_of(arena.spec()).ok()?;
        (arena.bytes() + bytes <= arena.limit()).then_some((arena, bytes))
    }

    /// When an upload that has waited since `began` may have memory taken for it.
    ///
    /// At once up to one slot for each processor that can receive, one that is folded, and the model's; then only what
    /// waiting shows to be needed. Lazy rounds hold every update until they are closed: there waiting is vain.
    fn grows_from(&self, began: Instant) -> Instant {
        let lazy = self.meta.job.spec.aggregation.timing == Timing::Lazy;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let slots = self.arena.as_ref().map_or(0, |arena| {
            let segment = Segment::bytes_of(arena.spec()).unwrap_or(u64::MAX);
            arena.bytes() / segment * u64::from(arena.spec().slots)
        });
        if lazy || slots < cores as u64 + 2 { began } else { began + GROWTH_PAUSE }
    }

    fn no_slot(&self) -> Refusal {
        let Some(arena) = &self.arena else { return Code::Starting.with("the job's model is not here yet") };
        let reason = self.refused_until.as_ref().map_or("all slots are in use", |(_, reason)| reason);
        Code::OutOfMemory.with(format!(
            "{reason}; {} of {} bytes of the job's slots exist",
            arena.bytes(),
            arena.limit()
        ))
    }
}

/// A slot, if one is free or becomes free within the configured wait. Nobody holds a lock meanwhile.
pub(crate) async fn reserve(gateway: &Arc<Gateway>, chain: &Arc<Chain>) -> Result<Slot, Refusal> {
    let began = Instant::now();
    let deadline = began + Duration::from_millis(gateway.config.slot_wait_ms);
    loop {
        let freed = chain.slot_freed.notified();
        tokio::pin!(freed);
        freed.as_mut().enable();
        if chain.is_removed() {
            return Err(Code::RoundClosed.with("the job is deleted"));
        }
        let arena = chain.lock().arena.clone();
        if let Some(writer) = arena.and_then(|arena| arena.reserve()) {
            return Ok(Slot { writer: Some(writer), chain: Arc::clone(chain) });
        }
        let grows = chain.lock().grows_from(began);
        let patient = Instant::now() < grows;
        if !patient {
            grow(gateway, chain);
        }
        let wake = if patient { deadline.min(grows) } else { deadline };
        if timeout_at(wake, freed).await.is_err() && Instant::now() >= deadline {
            if !gateway.agent.is_connected() {
                return Err(Code::NoAggregator.with("the node's agent is not there to grant memory"));
            }
            return Err(chain.lock().no_slot());
        }
    }
}

/// Has the arena grow by a segment, if it may and does not already.
pub(crate) fn grow(gateway: &Arc<Gateway>, chain: &Arc<Chain>) {
    let Some((arena, bytes)) = chain.lock().may_grow(Instant::now()) else { return };
    if chain.is_removed() || chain.growing.swap(true, Ordering::AcqRel) {
        return;
    }
    let (gateway, chain) = (Arc::clone(gateway), Arc::clone(chain));
    tokio::spawn(
        async move {
            if let Err(reason) = one_segment(&gateway, &chain, arena, bytes).await {
                tracing::warn!(chain = chain.id, reason, "no further segment");
                chain.lock().refused_until = Some((Instant::now() + REFUSED, reason));
            }
            chain.growing.store(false, Ordering::Release);
            chain.slot_freed.notify_waiters();
        }
        .boxed(),
    );
}

async fn one_segment(gateway: &Arc<Gateway>, chain: &Arc<Chain>, arena: Arena, bytes: u64) -> Result<(), String> {
    let segment = gateway.agent.grant(chain.id, bytes).await?;
    // Made on another thread: the kernel clears the pages, half a millisecond for each megabyte.
    let made = tokio::task::spawn_blocking(move || arena.grow()).await.map_err(|e| e.to_string())?;
    let growth = match made {
        Ok(growth) => growth,
        Err(error) => {
            gateway.agent.drop_segment(chain.id, segment);
            return Err(error.to_string());
        }
    };
    // Kept and handed to the members before anyone can write an object into it.
    let key = segment_key(chain.id, segment);
    gateway.child.deposit(&key, &bytes, &[growth.fd()]).await.map_err(|e| e.to_string())?;
    let fd = growth.fd().try_clone_to_owned().map_err(|e| e.to_string())?;
    // A new agent is told of all own segments: this one too, if it comes before the old one kept it.
    let own = Own { fd: fd.try_clone().map_err(|e| e.to_string())?, bytes, old: None };
    {
        let mut inner = chain.lock();
        inner.own.insert(segment, own);
        let total = inner.own.values().map(|own| own.bytes).sum();
        inner.totals.shm_peak_bytes = inner.totals.shm_peak_bytes.max(total);
    }
    if chain.is_removed() {
        return Err("the job is deleted".to_owned());
    }
    gateway.agent.share(chain.id, segment, bytes, fd).await;
    growth.admit(segment).map(drop).map_err(|e| e.to_string())
}

/// Key of a segment's deposit.
pub(crate) fn segment_key(chain: u32, segment: u32) -> String {
    format!("segment/{chain}/{segment}")
}
