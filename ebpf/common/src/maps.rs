//! Keys and values of the maps.

/// Key of a route: (chain, dst) names the socket that receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct RouteKey {
    /// Chain.
    pub chain: u32,
    /// A [`crate::role`] of the chain.
    pub dst: u32,
}

/// Value of `chain` in a [`Member`] that belongs to every chain (the gateway).
pub const ANY_CHAIN: u32 = u32::MAX;

/// Who sits behind a sending socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Member {
    /// Its chain, or [`ANY_CHAIN`].
    pub chain: u32,
    /// Its role there: what is stamped into `src`.
    pub role: u32,
    /// Index of its [`Counters`]; unique among the members that live on the node.
    pub counter: u32,
    /// Explicit, so that no byte of the layout is padding.
    pub reserved: u32,
}

/// Members that a node holds at most: the range of [`Member::counter`].
pub const MAX_MEMBERS: u32 = 4096;

/// Index of the [`Counters`] of sockets that belong to no member.
pub const STRANGERS: u32 = MAX_MEMBERS;

/// Index, among the members' sockets, of the one that cannot be written to: what is refused goes there.
pub const REFUSAL: u32 = MAX_MEMBERS;

/// What the kernel program knows of the member at an index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Seat {
    /// [`Member::chain`].
    pub chain: u32,
    /// [`Member::role`].
    pub role: u32,
    /// Grows with each member that takes the seat, and when one is unregistered: an old [`Identity`] fits no more.
    pub generation: u32,
    /// 1 while a member sits here (no `bool`: every bit pattern must be a value).
    pub live: u32,
}

/// What the kernel program finds in a socket's own storage; it dies with the socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Identity {
    /// Index of the [`Seat`].
    pub index: u32,
    /// [`Seat::generation`] at registration.
    pub generation: u32,
    /// The program's own note on this socket's current write, one of [`write_state`].
    pub state: u32,
    /// Explicit, so that no byte of the layout is padding.
    pub reserved: u32,
}

/// Values of [`Identity::state`].
pub mod write_state {
    /// The next byte begins a write.
    pub const FRESH: u32 = 0;
    /// The next descriptor is a later one of a write that began with others.
    pub const CONTINUES: u32 = 1;
    /// The kernel holds a part of a descriptor back.
    pub const CORKED: u32 = 2;
}

/// What the path counts per member, per CPU in the kernel; times are CLOCK_MONOTONIC_COARSE nanoseconds: exact to a tick (1 to
/// 10 ms), at a tenth of the price.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counters {
    /// Descriptors redirected.
    pub messages: u64,
    /// Payload bytes that those descriptors name.
    pub bytes: u64,
    /// When the first one passed.
    pub first_ns: u64,
    /// When the last one passed.
    pub last_ns: u64,
    /// Descriptors refused, by [`DropReason`].
    pub drops: [u64; DropReason::COUNT],
}

/// Why a descriptor was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DropReason {
    /// The sending socket belongs to no member.
    Stranger = 0,
    /// Another layout version.
    Version = 1,
    /// The descriptor names a chain that is not the sender's.
    Chain = 2,
    /// No socket is behind (chain, dst).
    Route = 3,
    /// The receiver's socket took no more.
    Full = 4,
    /// A write began within a descriptor and went beyond its end: the kernel would lose the rest.
    Framing = 5,
}

impl DropReason {
    /// Number of reasons.
    pub const COUNT: usize = 6;
    /// All of them, with the label of the metric.
    pub const LABELS: [&'static str; Self::COUNT] = ["stranger", "version", "chain", "route", "full", "framing"];
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya's Pod is an unsafe trait: a promise about layout")]
    use super::{Counters, Identity, Member, RouteKey, Seat};

    // SAFETY: repr(C), integers only, no padding (sizes asserted below).
    unsafe impl aya::Pod for RouteKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Member {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Counters {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Seat {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Identity {}
}

const _: () = assert!(size_of::<RouteKey>() == 8 && size_of::<Member>() == 16);
const _: () = assert!(size_of::<Seat>() == 16 && size_of::<Identity>() == 16);
const _: () = assert!(size_of::<Counters>() == 32 + 8 * DropReason::COUNT);
