//! What aggregators say: this is contained in that. And what they are told again after a death.

use lifl_api::node::{FromGateway, ReceiptEntry};
use lifl_daemon::failpoint;
use lifl_ebpf::{Descriptor, Kind, ObjectKey, flags, role};
use lifl_shm::{LedgerError, LiveObject, ObjectKind, Released};

use super::Inner;
use crate::intake::digest_text;

/// Why a descriptor is ignored: the label of `lifl_descriptor_drops_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ignored {
    UnknownChain,
    UnknownKind,
    UnknownObject,
    NotHolder,
    NotWriter,
    WrongRound,
    Numbers,
    LoneRelease,
    Ledger,
    Refused,
}

// === impl Ignored ===

impl Ignored {
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::UnknownChain => "unknown_chain",
            Self::UnknownKind => "unknown_kind",
            Self::UnknownObject => "unknown_object",
            Self::NotHolder => "not_holder",
            Self::NotWriter => "not_writer",
            Self::WrongRound => "wrong_round",
            Self::Numbers => "numbers",
            Self::LoneRelease => "lone_release",
            Self::Ledger => "ledger",
            Self::Refused => "refused",
        }
    }
}

impl From<&LedgerError> for Ignored {
    fn from(error: &LedgerError) -> Self {
        match error {
            LedgerError::Unknown(_) => Self::UnknownObject,
            LedgerError::NotHolder { .. } | LedgerError::Contained { .. } | LedgerError::Conflict(_) => Self::NotHolder,
            LedgerError::WrongRound { .. } | LedgerError::RoundOpen(_) | LedgerError::RoundClosed(_) => {
                Self::WrongRound
            }
            LedgerError::Count { .. } | LedgerError::Weight { .. } | LedgerError::Field { .. } => Self::Numbers,
            _ => Self::Ledger,
        }
    }
}

// === impl Inner: containment ===

impl Inner {
    /// A sealed sum or model that stands for `inputs`. Idempotent: a successor reads the socket again.
    pub(crate) fn sealed(
        &mut self,
        said: &Descriptor,
        inputs: &[ObjectKey],
        out: &mut Vec<Descriptor>,
    ) -> Result<(), Ignored> {
        let is_model = said.kind == Kind::Model as u8;
        if self.members.get(&said.segment).is_some_and(|member| member.writer != said.src) {
            return Err(Ignored::NotWriter);
        }
        if is_model {
            self.check_model(said)?;
        }
        let is_final = is_model || said.flags & flags::FINAL != 0;
        let sent_to = match (is_model, is_final) {
            (true, _) => role::GATEWAY,
            (false, true) => self.parent(said.src),
            (false, false) => said.src,
        };
        let record = LiveObject {
            key: said.key(),
            kind: if is_model { ObjectKind::Model } else { ObjectKind::Partial },
            writer: said.src,
            round: said.round,
            count: said.count,
            weight: said.weight(),
            offset: said.offset,
            length: said.length,
            is_final,
            sent_to,
        };
        let first = self.ledger.get(record.key).is_none();
        let released = self.ledger.seal(&record, inputs).map_err(|error| {
            tracing::warn!(chain = self.chain, %error, src = said.src, "sum is not accepted");
            Ignored::from(&error)
        })?;
        failpoint("gateway.contained");
        let updates = released.iter().filter(|object| object.kind == ObjectKind::Update).count();
        if first && let Some(outstanding) = self.outstanding.get_mut(&said.src) {
            *outstanding = outstanding.saturating_sub(u32::try_from(updates).unwrap_or(u32::MAX));
        }
        for object in released {
            self.release(object, out);
        }
        self.drop_old();
        self.pump(out);
        Ok(())
    }

    fn check_model(&self, said: &Descriptor) -> Result<(), Ignored> {
        let round = self.ledger.round();
        if said.src != role::TOP {
            return Err(Ignored::NotWriter);
        }
        if said.round != round.round || round.open {
            return Err(Ignored::WrongRound);
        }
        let length = self.measure.as_ref().map(|measure| measure.manifest.file_bytes());
        if said.count != self.ledger.admitted() || length.is_some_and(|length| length != said.length) {
            return Err(Ignored::Numbers);
        }
        Ok(())
    }

    /// Has the writer recycle a slot.
    pub(crate) fn release(&mut self, object: Released, out: &mut Vec<Descriptor>) {
        if object.writer == role::GATEWAY {
            self.recycle(object.key);
        } else {
            out.push(Descriptor::new(Kind::Release, self.chain, object.writer).with_key(object.key));
        }
    }

    /// Own segments of an earlier life that nothing names any more.
    pub(crate) fn drop_old(&mut self) {
        if self.own.values().all(|own| own.old.is_none()) {
            return;
        }
        let mut named: Vec<u32> = self.ledger.live().map(|object| object.key.segment).collect();
        named.extend(self.meta.model.iter().chain(&self.meta.previous).map(|model| model.segment));
        let gone = |id: &u32, own: &super::Own| own.old.is_some() && !named.contains(id);
        let gone: Vec<u32> = self.own.iter().filter(|(id, own)| gone(id, own)).map(|(id, _)| *id).collect();
        for id in gone {
            self.own.remove(&id);
            self.dropped.push(id);
        }
    }

    /// The round's model, once it is sealed and can be read, as the coordinator is told; with it the segment's number.
    pub(crate) fn round_done(&self) -> Option<(FromGateway, u32)> {
        let model = self.pending_model()?;
        let member = self.members.get(&model.key.segment)?;
        let elements = self.measure.as_ref()?.manifest.elements();
        if let Err(error) = member.reader.object(model.key, elements) {
            tracing::error!(chain = self.chain, %error, "the model of the top is not readable");
            return None;
        }
        let mut receipt: Vec<ReceiptEntry> = self
            .ledger
            .updates_of(model.round)
            .map(|update| ReceiptEntry {
                source: self.source(&update.client),
                id: update.id,
                weight: update.weight,
                digest: digest_text(&update.digest),
            })
            .collect();
        receipt.sort_by(|a, b| (&a.source, &a.id).cmp(&(&b.source, &b.id)));
        let done = FromGateway::RoundDone {
            chain: self.chain,
            round: model.round,
            count: model.count,
            weight: model.weight,
            offset: model.offset,
            length: model.length,
            receipt,
        };
        Some((done, model.key.segment))
    }

    /// The model of the round under way, sealed and not committed.
    pub(crate) fn pending_model(&self) -> Option<LiveObject> {
        self.ledger.live().find(|object| object.kind == ObjectKind::Model)
    }

    /// Tells a new process behind `role` all that the one before had not contained. Repetitions do no harm.
    pub(crate) fn resend(&mut self, role: u32, out: &mut Vec<Descriptor>) {
        if self.is_between_rounds() {
            return;
        }
        if role == role::TOP {
            out.extend(self.base());
        }
        let mut live: Vec<LiveObject> = self.ledger.live().filter(|object| object.kind != ObjectKind::Model).collect();
        live.sort_by_key(|object| object.key);
        let held = live.iter().filter(|object| object.sent_to == role);
        out.extend(held.clone().map(|object| object.descriptor(self.chain, role)));
        // What it had completed, and perhaps not sent on.
        let finished = live.iter().filter(|o| o.is_final && o.writer == role && o.sent_to != role);
        out.extend(finished.map(|object| object.descriptor(self.chain, object.sent_to)));
        let updates = held.filter(|object| object.kind == ObjectKind::Update).count();
        self.outstanding.insert(role, u32::try_from(updates).unwrap_or(u32::MAX));
        if self.close_sent {
            out.extend(self.close_for(role));
        }
    }

    /// After a restart of this process: what the ledger says is what is.
    pub(crate) fn recover(&mut self, out: &mut Vec<Descriptor>) {
        let round = self.ledger.round();
        self.reported = self.ledger.updates_of(round.round).map(|update| update.client).collect();
        let unsent = |object: &LiveObject| object.kind == ObjectKind::Update && object.sent_to == role::GATEWAY;
        self.waiting = self.ledger.live().filter(unsent).map(|object| object.key).collect();
        self.close_sent = !round.open && !self.is_between_rounds() && self.waiting.is_empty();
        for role in self.aggregators() {
            self.resend(role, out);
        }
        if let Some(previous) = &self.meta.previous
            && previous.writer != role::GATEWAY
        {
            out.push(Descriptor::new(Kind::Release, self.chain, previous.writer).with_key(previous.key()));
        }
        self.meta.previous = None;
        self.pump(out);
        self.drop_old();
    }
}
