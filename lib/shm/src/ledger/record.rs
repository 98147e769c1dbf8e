//! What callers tell the ledger and what it tells them.

use lifl_ebpf_common::{
    Descriptor, Kind,
    descriptor::{ObjectKey, flags},
};

use super::table::{halves, join};
use crate::object::ObjectKind;

/// Index of a record, valid until its round is retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RecordIndex(pub(super) u32);

/// Which round it is: one word, so that closing is one store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundWord {
    /// The round. Of a fresh ledger 0, closed, with goal 0.
    pub round: u32,
    /// Whether updates are admitted.
    pub open: bool,
    /// Updates after which it closes by itself.
    pub goal: u32,
}

/// An update to be promised.
#[derive(Clone, Debug, PartialEq)]
pub struct UpdateRecord {
    /// Who sent it: the event's source; at most [`super::MAX_CLIENT`] bytes.
    pub client: String,
    /// The event's id; at most [`super::MAX_ID`] bytes.
    pub id: String,
    /// Digest of its content: tells a repetition from another update under the same id.
    pub digest: [u8; 32],
    /// Its weight.
    pub weight: f64,
    /// Its object.
    pub key: ObjectKey,
    /// Offset of the object's payload within its segment.
    pub offset: u64,
    /// Bytes of the object.
    pub length: u64,
    /// Role that is to fold it.
    pub sent_to: u32,
    /// Round it was made for.
    pub round: u32,
}

/// An object of the round that no other object contains: an update, a sum, or the round's model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LiveObject {
    /// Its name.
    pub key: ObjectKey,
    /// What it is.
    pub kind: ObjectKind,
    /// Role that wrote it: the sender that the path stamped, never what the message says.
    pub writer: u32,
    /// Round.
    pub round: u32,
    /// Updates contained.
    pub count: u32,
    /// Sum of their weights.
    pub weight: f64,
    /// Offset of its payload within its segment.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Whether it is its writer's last word in the round.
    pub is_final: bool,
    /// Who holds it: of a sum its writer, or the writer's parent if it is final; of the model the gateway.
    pub sent_to: u32,
}

/// An object that is no longer needed: its writer may recycle the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    /// Its name.
    pub key: ObjectKey,
    /// What it was.
    pub kind: ObjectKind,
    /// Role that wrote it.
    pub writer: u32,
}

// === impl RoundWord ===

impl RoundWord {
    const OPEN: u32 = 1 << 31;
    /// Greatest goal.
    pub const MAX_GOAL: u32 = Self::OPEN - 1;

    pub(crate) const fn to_word(self) -> u64 {
        join(self.round, self.goal | if self.open { Self::OPEN } else { 0 })
    }

    pub(crate) const fn from_word(word: u64) -> Self {
        let (round, rest) = halves(word);
        Self { round, open: rest & Self::OPEN != 0, goal: rest & Self::MAX_GOAL }
    }
}

// === impl LiveObject ===

impl LiveObject {
    /// The descriptor that hands it to `dst`, as it was handed over first.
    #[must_use]
    pub fn descriptor(&self, chain: u32, dst: u32) -> Descriptor {
        self.descriptor_as(self.kind.descriptor(), chain, dst)
    }

    /// A descriptor of it of another kind.
    #[must_use]
    pub fn descriptor_as(&self, kind: Kind, chain: u32, dst: u32) -> Descriptor {
        Descriptor {
            flags: if kind == Kind::Sealed && self.is_final { flags::FINAL } else { 0 },
            round: self.round,
            count: self.count,
            offset: self.offset,
            length: self.length,
            weight_bits: self.weight.to_bits(),
            ..Descriptor::new(kind, chain, dst).with_key(self.key)
        }
    }
}
