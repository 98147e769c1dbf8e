//! The model that is served: an object in shared memory, held as long as someone downloads it.

use std::os::fd::OwnedFd;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use lifl_api::manifest::Manifest;
use lifl_ebpf::{Descriptor, Kind, ObjectKey, role};
use lifl_shm::{Object, ObjectKind, Released, SegmentReader};
use tokio::sync::mpsc;

use super::{Inner, Member, ModelMeta};
use crate::layout::Measure;

/// A model in shared memory. When the last one who holds it is gone, its slot is to be released.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) meta: ModelMeta,
    chain: u32,
    object: Object,
    revoked: AtomicBool,
    gone: mpsc::UnboundedSender<Gone>,
}

/// A model that nobody holds any more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gone {
    pub(crate) chain: u32,
    pub(crate) key: ObjectKey,
    pub(crate) writer: u32,
}

/// A part of a model on its way to a client.
struct Part {
    served: Arc<Served>,
    begin: usize,
    end: usize,
}

// === impl Served ===

impl Served {
    pub(crate) fn new(meta: ModelMeta, chain: u32, object: Object, gone: mpsc::UnboundedSender<Gone>) -> Self {
        Self { meta, chain, object, revoked: AtomicBool::new(false), gone }
    }

    /// The file.
    pub(crate) fn file(&self) -> &[u8] {
        self.object.payload()
    }

    /// A part of the file, uncopied.
    pub(crate) fn part(self: &Arc<Self>, begin: usize, end: usize) -> Bytes {
        Bytes::from_owner(Part { served: Arc::clone(self), begin, end })
    }

    /// Has running downloads end: the slot is wanted.
    pub(crate) fn revoke(&self) {
        self.revoked.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Relaxed)
    }

    /// Hands it to the top as the base of a round.
    fn descriptor(&self) -> Descriptor {
        let meta = self.object.meta();
        Descriptor {
            round: meta.round,
            count: meta.count,
            offset: self.object.offset(),
            length: meta.length,
            weight_bits: meta.weight.to_bits(),
            ..Descriptor::new(Kind::Model, self.chain, role::TOP).with_key(self.object.key())
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let gone = Gone { chain: self.chain, key: self.object.key(), writer: self.meta.writer };
        let _the_process_ends = self.gone.send(gone);
    }
}

// === impl Part ===

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        self.served.file().get(self.begin..self.end).unwrap_or_default()
    }
}

// === impl Inner: the model ===

impl Inner {
    /// Whose segment it is, if it is here.
    pub(crate) fn reader(&self, segment: u32) -> Option<SegmentReader> {
        if let Some(member) = self.members.get(&segment) {
            return Some(member.reader.clone());
        }
        match self.own.get(&segment)?.old.clone() {
            Some(old) => Some(old),
            None => self.arena.as_ref()?.segment(segment)?.reader(),
        }
    }

    /// Serves what `meta.model` names, once its segment is here. False while it is not.
    pub(crate) fn serve_model(&mut self, gone: &mpsc::UnboundedSender<Gone>) -> bool {
        let Some(meta) = self.meta.model.clone() else { return false };
        if self.served.as_ref().is_some_and(|served| served.meta == meta) {
            return false;
        }
        let Some(reader) = self.reader(meta.segment) else { return false };
        let object = match reader.object(meta.key(), u64::MAX) {
            Ok(object) => object,
            Err(error) => {
                tracing::error!(chain = self.chain, round = meta.round, %error, "model is not readable");
                return false;
            }
        };
        if self.measure.is_none() {
            match Manifest::parse(object.payload()) {
                Ok(manifest) => {
                    let measure = Arc::new(Measure::new(manifest, &self.meta.job.spec.update));
                    if let Err(error) = self.make_arena(&measure) {
                        tracing::error!(chain = self.chain, %error, "no slots");
                    }
                    self.measure = Some(measure);
                }
                Err(error) => tracing::error!(chain = self.chain, %error, "model is not readable"),
            }
        }
        self.served = Some(Arc::new(Served::new(meta, self.chain, object, gone.clone())));
        true
    }

    /// What the top begins the round with.
    pub(crate) fn base(&self) -> Option<Descriptor> {
        self.served.as_ref().map(|served| served.descriptor())
    }
}

// === impl Inner: segments of others ===

impl Inner {
    /// Maps a segment of another member; whether something waited for it.
    pub(crate) fn add_member(
        &mut self,
        segment: u32,
        writer: u32,
        fd: OwnedFd,
        gone: &mpsc::UnboundedSender<Gone>,
        out: &mut Vec<Descriptor>,
    ) -> bool {
        if writer == role::GATEWAY || self.own.contains_key(&segment) {
            return false;
        }
        let reader = match SegmentReader::map(&fd, self.chain, segment) {
            Ok(reader) if reader.spec().writer == writer => reader,
            Ok(reader) => {
                tracing::error!(
                    chain = self.chain,
                    segment,
                    writer,
                    said = reader.spec().writer,
                    "segment of another writer"
                );
                return false;
            }
            Err(error) => {
                tracing::error!(chain = self.chain, segment, writer, %error, "segment of a member");
                return false;
            }
        };
        self.members.insert(segment, Member { reader, fd, writer });
        let served = self.serve_model(gone);
        if served && !self.is_between_rounds() {
            out.extend(self.base());
        }
        served || self.pending_model().is_some_and(|model| model.key.segment == segment)
    }

    /// A model that nobody downloads any more: its slot goes back.
    pub(crate) fn forget_model(&mut self, model: Gone, out: &mut Vec<Descriptor>) {
        // It may have been mapped anew since.
        if self.meta.model.as_ref().is_some_and(|now| now.key() == model.key) {
            return;
        }
        if self.meta.previous.as_ref().is_some_and(|previous| previous.key() == model.key) {
            self.meta.previous = None;
        }
        self.release(Released { key: model.key, kind: ObjectKind::Model, writer: model.writer }, out);
        self.drop_old();
    }
}
