//! The kernel programs of a node. The descriptor path: loads the `sk_msg` program, keeps its maps, or routes in user space. And
//! [`Traffic`]: connections of pods, counted.
//!
//! ```text
//!            end A of a pair              end B, kept by the agent
//!  member ----- socket ------ loopback TCP ------ socket
//!                 |                                 |
//!       sk_msg: who, may he, where to       router: the same, when
//!       -> straight into the receive        the kernel will not:
//!          queue of another end A           -> end B of another pair
//! ```
//!
//! [`Path`] is what the agent holds; [`pair()`] makes the sockets; [`wire`] is how members read and write descriptors.

mod kernel;
mod pair;
mod path;
mod router;
mod traffic;
pub mod wire;

pub use kernel::{Baseline, LoadError};
pub use lifl_ebpf_common::{
    descriptor::{DESCRIPTOR_BYTES, Descriptor, Kind, LAYOUT_VERSION, ObjectKey, flags, role},
    maps::{ANY_CHAIN, Counters, DropReason, MAX_MEMBERS, Member, RouteKey, STRANGERS},
    traffic::{Connections, MAX_PLACES, side},
};
pub use pair::pair;
pub use path::{Path, PathError, PathKind, ProgramRuns};
pub use traffic::Traffic;
