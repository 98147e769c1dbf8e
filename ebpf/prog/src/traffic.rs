//! Counts the connections of pods: how many, how many bytes.
//!
//! ```text
//!   listener ── marked by the agent, copied into ──> connection ──┐
//!   socket for dialling ── marked by the agent ─────────────────> │ MARKS: place, side
//!                                                                 v
//!   TCP state ESTABLISHED: opened + 1            CONNECTIONS[place]
//!   TCP state CLOSE: closed + 1, bytes settled         ^
//!   when somebody asks: bytes settled ─────────────────┘
//! ```
//!
//! A socket is known by what lies in its own storage, not by its control group or its network: a listener that is handed from one
//! agent to the next is marked anew and counted on, whoever made it. Sockets that are not marked cost a look at a null pointer at
//! each change of state; bytes cost nothing as they pass, for TCP counts them anyway.
//!
//! **Exact at the end, not too much before.** The end is seen under the socket's lock. `bytes_received` has counted the peer's
//! FIN if `SOCK_DONE` says so; `bytes_sent - bytes_retrans` is data only. Who asks meanwhile holds no lock, so it takes what can
//! only be less: one byte less received (it may be a FIN), and of what was acknowledged two less (a SYN, a FIN). Both settle
//! by exchange: what one has added the other does not.
#![no_std]
#![no_main]
#![expect(
    internal_features,
    reason = "the target has no `AtomicU64` to add to: the kernel's two instructions are asked for by name"
)]
#![feature(core_intrinsics)]

mod object;

use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering::Relaxed, atomic_cxchg, atomic_xadd},
    ptr,
};

use aya_ebpf::{
    Global,
    bindings::{BPF_F_CLONE, BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE},
    btf_maps::HashMap,
    helpers::generated::{bpf_sk_storage_get, bpf_skc_to_tcp_sock},
    macros::{btf_map, btf_tracepoint},
    programs::BtfTracePointContext,
};
use lifl_ebpf_common::traffic::{Connections, MAX_PLACES, Mark};

/// Of `enum sock_flags`: the peer has sent its FIN.
const SOCK_DONE: u32 = 1;
/// Of the states of TCP.
const ESTABLISHED: i32 = 1;
const SYN_SENT: i32 = 2;
const CLOSE: i32 = 7;
/// Both who settle may meet on a connection once; more often one of them has stopped.
const ATTEMPTS: u32 = 3;

/// A map of sockets' storage that a listener's connections inherit; aya has none with this flag.
#[repr(C)]
struct Inherited<T> {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

/// Marks of sockets.
#[btf_map]
static MARKS: Inherited<Mark> = Inherited::new();

/// Counters of places. The agent makes and removes them: a place without any is not counted.
#[btf_map]
static CONNECTIONS: HashMap<u64, Connections, { MAX_PLACES as usize }, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// Where the kernel that this is loaded into keeps what is read, in its `struct tcp_sock`. One word each: the verifier knows what
/// a word of a frozen map is, and so that the place it leads to is that field.
macro_rules! offset {
    ($($(#[$about:meta])* $name:ident),* $(,)?) => {
        $($(#[$about])* #[unsafe(no_mangle)] static $name: Global<u32> = Global::new(0);)*
    };
}

offset! {
    /// `unsigned long`: flags of the socket.
    AT_FLAGS,
    /// `u64`: in order, the peer's FIN too.
    AT_BYTES_RECEIVED,
    /// `u64`: acknowledged, our SYN and FIN too.
    AT_BYTES_ACKED,
    /// `u64`: data put on the wire.
    AT_BYTES_SENT,
    /// `u64`: of it, put there again.
    AT_BYTES_RETRANS,
    /// `u32`: segments sent again.
    AT_TOTAL_RETRANS,
}

/// A socket of the machine changes its state.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn lifl_state(ctx: BtfTracePointContext) -> i32 {
    let (before, now): (i32, i32) = (ctx.arg(1), ctx.arg(2));
    if now != ESTABLISHED && now != CLOSE {
        return 0;
    }
    let sk: *mut c_void = ctx.arg::<*const c_void>(0).cast_mut();
    let Some(mark) = mark(sk) else { return 0 };
    let Some(place) = place(mark) else { return 0 };
    // SAFETY: a value of MARKS. Under the socket's lock nobody else writes these two.
    let (side, open) = unsafe { ((*mark).side as usize & 1, (*mark).open == 1) };
    match now {
        ESTABLISHED if !open => {
            // SAFETY: as above; the other is a word of CONNECTIONS.
            unsafe {
                (*mark).open = 1;
                add(&raw mut (*place).opened[side], 1);
            }
        }
        CLOSE if open => {
            // SAFETY: as above; the other is a word of CONNECTIONS.
            unsafe {
                (*mark).open = 0;
                add(&raw mut (*place).closed[side], 1);
            }
            if let Some(tcp) = tcp(sk) {
                let fin = read::<u64>(tcp, &AT_FLAGS) >> SOCK_DONE & 1;
                let received = read::<u64>(tcp, &AT_BYTES_RECEIVED).saturating_sub(fin);
                let sent = read::<u64>(tcp, &AT_BYTES_SENT).saturating_sub(read(tcp, &AT_BYTES_RETRANS));
                settle(mark, place, side, received, sent);
                let again = u64::from(read::<u32>(tcp, &AT_TOTAL_RETRANS));
                // SAFETY: a word of CONNECTIONS.
                unsafe { add(&raw mut (*place).retransmitted[side], again) };
            }
        }
        // SAFETY: a word of CONNECTIONS.
        CLOSE if before == SYN_SENT => unsafe { add(&raw mut (*place).failed, 1) },
        _ => {}
    }
    0
}

/// Somebody asks: called for each marked socket.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub fn lifl_ask(ctx: *mut c_void) -> i32 {
    // Of `struct bpf_iter__bpf_sk_storage_map` the third pointer is the socket.
    // SAFETY: the context of an iterator, as the verifier checks.
    let sk = unsafe { *ctx.cast::<*mut c_void>().add(2) };
    if sk.is_null() {
        return 0;
    }
    let Some(mark) = mark(sk) else { return 0 };
    // SAFETY: a value of MARKS; a word that may be written meanwhile is read as it was or as it is.
    let (side, open) = unsafe { ((*mark).side as usize & 1, ptr::read_volatile(&raw const (*mark).open) == 1) };
    if !open {
        return 0;
    }
    let (Some(place), Some(tcp)) = (place(mark), tcp(sk)) else { return 0 };
    let received = read::<u64>(tcp, &AT_BYTES_RECEIVED).saturating_sub(1);
    let sent = read::<u64>(tcp, &AT_BYTES_ACKED).saturating_sub(2);
    settle(mark, place, side, received, sent);
    0
}

#[inline(always)]
fn mark(sk: *mut c_void) -> Option<*mut Mark> {
    let map: *mut c_void = ptr::from_ref(&MARKS).cast_mut().cast();
    // SAFETY: `map` is a socket storage map, `sk` a socket of the kernel; without CREATE the value may be null.
    let value: *mut Mark = unsafe { bpf_sk_storage_get(map, sk, ptr::null_mut(), 0) }.cast();
    if value.is_null() { None } else { Some(value) }
}

#[inline(always)]
fn place(mark: *mut Mark) -> Option<*mut Connections> {
    // SAFETY: a value of MARKS; nobody writes this field of a socket that is in use.
    CONNECTIONS.get_ptr_mut(unsafe { (*mark).place })
}

#[inline(always)]
fn tcp(sk: *mut c_void) -> Option<*const u8> {
    // SAFETY: a socket of the kernel; what is no full TCP socket gives null.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk) };
    if tcp.is_null() { None } else { Some(tcp.cast_const().cast()) }
}

/// A field of the kernel's `struct tcp_sock`.
#[inline(always)]
fn read<T: Copy>(tcp: *const u8, at: &Global<u32>) -> T {
    // SAFETY: the verifier holds the offset against the kernel's own description of the struct.
    unsafe { ptr::read_volatile(tcp.add(at.load() as usize).cast()) }
}

/// Counts what is not counted yet.
#[inline(always)]
fn settle(mark: *mut Mark, place: *mut Connections, side: usize, received: u64, sent: u64) {
    // SAFETY: fields of values of both maps, which stay for the run of the program.
    unsafe {
        add(&raw mut (*place).received[side], advance(&raw mut (*mark).received, received));
        add(&raw mut (*place).sent[side], advance(&raw mut (*mark).sent, sent));
    }
}

/// Raises the word to `now`; returns by how much.
///
/// # Safety
/// A word of a map.
#[inline(always)]
unsafe fn advance(counted: *mut u64, now: u64) -> u64 {
    for _ in 0..ATTEMPTS {
        // SAFETY: the caller's; whoever else writes it does so here.
        let before = unsafe { ptr::read_volatile(counted) };
        if now <= before {
            return 0;
        }
        // SAFETY: as above.
        if unsafe { atomic_cxchg::<u64, { Relaxed }, { Relaxed }>(counted, before, now) }.1 {
            return now - before;
        }
    }
    0
}

/// # Safety
/// A word of a map.
#[inline(always)]
unsafe fn add(counter: *mut u64, more: u64) {
    // SAFETY: the caller's.
    unsafe { atomic_xadd::<u64, u64, { Relaxed }>(counter, more) };
}

// === impl Inherited ===

impl<T> Inherited<T> {
    const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }
}

// SAFETY: a description for the loader, never dereferenced.
unsafe impl<T> Sync for Inherited<T> {}
