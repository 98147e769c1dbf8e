//! The layouts shared by kernel programs, their loader and the functions: one definition each.
//!
//! Everything here is `no_std`, `repr(C)`, without padding, and little-endian by the machines it runs on: the descriptor
//! that travels between sockets, the keys and values of the maps, the numbers of well-known roles.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(not(feature = "user"), forbid(unsafe_code))]

pub mod descriptor;
pub mod maps;
pub mod traffic;

pub use descriptor::{DESCRIPTOR_BYTES, Descriptor, Kind, LAYOUT_VERSION, role};
