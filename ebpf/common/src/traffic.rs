//! What the kernel counts of the connections of a pod: a mark on each socket, counters for each place.

/// Places (pods) that a node counts at most.
pub const MAX_PLACES: u32 = 4096;

/// Who began a connection. Values of [`Mark::side`], and places in [`Connections::opened`].
pub mod side {
    /// Others: it came over a marked listener.
    pub const ACCEPTED: u32 = 0;
    /// This node: its socket was marked before it was connected.
    pub const DIALLED: u32 = 1;
}

/// What the kernel program finds in the storage of a socket that it counts. That of a listener is copied into each connection
/// that comes over it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Mark {
    /// Key of its [`Connections`].
    pub place: u64,
    /// One of [`side`].
    pub side: u32,
    /// 1 from when the connection stands (no `bool`: every bit pattern must be a value).
    pub open: u32,
    /// Bytes received that are counted already.
    pub received: u64,
    /// Bytes sent that are counted already.
    pub sent: u64,
}

/// The counters of a place. They only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Connections {
    /// Connections that came to stand, by [`side`].
    pub opened: [u64; 2],
    /// Of those, how many have ended.
    pub closed: [u64; 2],
    /// Bytes received, in order and once each.
    pub received: [u64; 2],
    /// Bytes sent, each once however often it went out.
    pub sent: [u64; 2],
    /// Segments sent again, of connections that have ended.
    pub retransmitted: [u64; 2],
    /// Dialled in vain.
    pub failed: u64,
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya's Pod is an unsafe trait: a promise about layout")]
    use super::{Connections, Mark};

    // SAFETY: repr(C), integers only, no padding (sizes asserted below).
    unsafe impl aya::Pod for Mark {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Connections {}
}

const _: () = assert!(size_of::<Mark>() == 32 && size_of::<Connections>() == 88);
