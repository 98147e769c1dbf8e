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

/// What the path counts per member, per CPU in the kernel; times are CLOCK_MONOTONIC nanoseconds.
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

/// Why a descriptor was refused; the sender's `send` fails with `EACCES`.
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
}

impl DropReason {
    /// Number of reasons.
    pub const COUNT: usize = 5;
    /// All of them, with the label of the metric.
    pub const LABELS: [&'static str; Self::COUNT] = ["stranger", "version", "chain", "route", "full"];
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya's Pod is an unsafe trait: a promise about layout")]
    use super::{Counters, Member, RouteKey};

    // SAFETY: repr(C), integers only, no padding (sizes asserted below).
    unsafe impl aya::Pod for RouteKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Member {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Counters {}
}

const _: () = assert!(size_of::<RouteKey>() == 8 && size_of::<Member>() == 16);
const _: () = assert!(size_of::<Counters>() == 32 + 8 * DropReason::COUNT);
