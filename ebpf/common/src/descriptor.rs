//! The descriptor: 64 bytes that name an object in shared memory, never its bytes.

/// Version of this layout; a handshake refuses another one.
pub const LAYOUT_VERSION: u8 = 1;

/// Size of a descriptor on every wire, in bytes.
pub const DESCRIPTOR_BYTES: usize = 64;

/// Numbers of roles (`dst` and `src` of a descriptor) within a chain.
pub mod role {
    /// The node's gateway: member of every chain.
    pub const GATEWAY: u32 = 0;
    /// The aggregator that divides and seals the model.
    pub const TOP: u32 = 1;
    /// The middle aggregator of this node.
    pub const MIDDLE: u32 = 2;
    /// The first leaf; leaf `i` is `LEAF + i`.
    pub const LEAF: u32 = 16;
}

/// What a descriptor says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A client's update, gateway to aggregator: fold it.
    Update = 1,
    /// A sealed partial sum, aggregator to its parent: fold it.
    Partial = 2,
    /// A model: gateway to top (the base of this round), top to gateway (the round's result).
    Model = 3,
    /// Aggregator to gateway: this object is sealed and stands for the inputs whose [`Kind::Release`] came just before it.
    Sealed = 4,
    /// Aggregator to gateway: this input is contained in the object that [`Descriptor::contained_in`] names.
    /// Gateway to writer: this object is released, recycle its slot.
    Release = 5,
    /// Gateway to aggregator: the round is closed, `count` client updates are expected below you.
    Close = 6,
}

impl Kind {
    /// Reads a kind from a peer's byte.
    #[must_use]
    pub const fn from_u8(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Update,
            2 => Self::Partial,
            3 => Self::Model,
            4 => Self::Sealed,
            5 => Self::Release,
            6 => Self::Close,
            _ => return None,
        })
    }
}

/// The message that crosses sockets, 64 bytes, little-endian.
///
/// `src` is written by the path (the `sk_msg` program or the router), never believed from the sender.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Descriptor {
    /// [`LAYOUT_VERSION`].
    pub version: u8,
    /// A [`Kind`] as a byte.
    pub kind: u8,
    /// [`flags`] of this descriptor.
    pub flags: u16,
    /// Chain (one per federated job) whose object this is.
    pub chain: u32,
    /// Receiver: a [`role`] of the chain.
    pub dst: u32,
    /// Sender: a [`role`] of the chain, stamped by the path from the sending socket.
    pub src: u32,
    /// Segment that holds the object; numbered by the agent, unique in the chain's life.
    pub segment: u32,
    /// Slot within the segment.
    pub slot: u32,
    /// Generation of the slot: a recycled slot has another one.
    pub generation: u64,
    /// Round of the job.
    pub round: u32,
    /// Client updates contained in the object.
    pub count: u32,
    /// Offset of the payload within the segment, bytes. In a [`Kind::Release`]: segment (upper 32 bits) and slot of the container.
    pub offset: u64,
    /// Length of the payload, bytes. In a [`Kind::Release`]: generation of the container.
    pub length: u64,
    /// Sum of the weights contained in the object, as the bits of an `f64` (kernel programs know no floats).
    pub weight_bits: u64,
}

/// Bits of [`Descriptor::flags`].
pub mod flags {
    /// With `Sealed`: the object is complete for its round and was sent to the parent.
    pub const FINAL: u16 = 1;
}

const _: () = assert!(size_of::<Descriptor>() == DESCRIPTOR_BYTES);

/// Identity of an object: which slot of which segment, in which generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct ObjectKey {
    /// Segment of the chain.
    pub segment: u32,
    /// Slot within the segment.
    pub slot: u32,
    /// Generation of the slot.
    pub generation: u64,
}

impl Descriptor {
    /// A descriptor of `kind` for `dst` in `chain`, all else zero.
    #[must_use]
    pub fn new(kind: Kind, chain: u32, dst: u32) -> Self {
        Self { version: LAYOUT_VERSION, kind: kind as u8, chain, dst, ..Self::default() }
    }

    /// The object this descriptor names.
    #[must_use]
    pub const fn key(&self) -> ObjectKey {
        ObjectKey { segment: self.segment, slot: self.slot, generation: self.generation }
    }

    /// The same descriptor naming `key`.
    #[must_use]
    pub const fn with_key(mut self, key: ObjectKey) -> Self {
        self.segment = key.segment;
        self.slot = key.slot;
        self.generation = key.generation;
        self
    }

    /// In a [`Kind::Release`]: the object that contains this one.
    #[must_use]
    pub const fn contained_in(&self) -> ObjectKey {
        let [a, b, c, d, e, f, g, h] = self.offset.to_le_bytes();
        ObjectKey {
            segment: u32::from_le_bytes([e, f, g, h]),
            slot: u32::from_le_bytes([a, b, c, d]),
            generation: self.length,
        }
    }

    /// A [`Kind::Release`] that says "`self` is contained in `container`".
    #[must_use]
    pub const fn with_contained_in(mut self, container: ObjectKey) -> Self {
        self.offset = (container.segment as u64) << 32 | container.slot as u64;
        self.length = container.generation;
        self
    }

    /// Sum of the weights contained in the object.
    #[must_use]
    pub const fn weight(&self) -> f64 {
        f64::from_bits(self.weight_bits)
    }

    /// The bytes that travel.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; DESCRIPTOR_BYTES] {
        let mut out = [0; DESCRIPTOR_BYTES];
        out[0] = self.version;
        out[1] = self.kind;
        out[2..4].copy_from_slice(&self.flags.to_le_bytes());
        for (at, word) in [(4, self.chain), (8, self.dst), (12, self.src), (16, self.segment), (20, self.slot)] {
            out[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        out[24..32].copy_from_slice(&self.generation.to_le_bytes());
        out[32..36].copy_from_slice(&self.round.to_le_bytes());
        out[36..40].copy_from_slice(&self.count.to_le_bytes());
        out[40..48].copy_from_slice(&self.offset.to_le_bytes());
        out[48..56].copy_from_slice(&self.length.to_le_bytes());
        out[56..64].copy_from_slice(&self.weight_bits.to_le_bytes());
        out
    }

    /// Reads what a peer sent. Every bit pattern is a descriptor; whether it means anything is the reader's to check.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; DESCRIPTOR_BYTES]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            version: bytes[0],
            kind: bytes[1],
            flags: u16::from_le_bytes([bytes[2], bytes[3]]),
            chain: word(4),
            dst: word(8),
            src: word(12),
            segment: word(16),
            slot: word(20),
            generation: long(24),
            round: word(32),
            count: word(36),
            offset: long(40),
            length: long(48),
            weight_bits: long(56),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_and_offsets_are_those_of_the_layout() {
        let d = Descriptor {
            version: LAYOUT_VERSION,
            kind: Kind::Partial as u8,
            flags: flags::FINAL,
            chain: 3,
            dst: role::MIDDLE,
            src: role::LEAF + 4,
            segment: 9,
            slot: 2,
            generation: u64::MAX - 1,
            round: 17,
            count: 5,
            offset: 1 << 40,
            length: 46_800_000,
            weight_bits: 12.5f64.to_bits(),
        };
        let bytes = d.to_bytes();
        assert_eq!(Descriptor::from_bytes(&bytes), d);
        assert_eq!(bytes[core::mem::offset_of!(Descriptor, dst)], 2);
        assert_eq!(bytes[core::mem::offset_of!(Descriptor, src)], 20);
        assert_eq!(bytes[core::mem::offset_of!(Descriptor, round)], 17);
        assert_eq!(d.weight().to_bits(), 12.5f64.to_bits());
    }

    #[test]
    fn a_release_carries_both_keys() {
        let input = ObjectKey { segment: 1, slot: 2, generation: 3 };
        let container = ObjectKey { segment: u32::MAX, slot: 7, generation: 1 << 50 };
        let d = Descriptor::new(Kind::Release, 0, role::GATEWAY).with_key(input).with_contained_in(container);
        let d = Descriptor::from_bytes(&d.to_bytes());
        assert_eq!((d.key(), d.contained_in()), (input, container));
    }
}
