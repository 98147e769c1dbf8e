//! The `sk_msg` programs: who sends, may he, where to.
//!
//! `lifl` is attached to the map of the members' sockets and only jumps to slot 0 of [`PROGRAMS`]. A socket keeps the
//! program that was attached when it entered the map, so replacing means exchanging the slot: one store, between two
//! messages, for all sockets at once. An empty slot (the owner of the maps is dead) refuses.
//!
//! `lifl_route` handles one descriptor per run:
//! ```text
//! socket --storage--> Identity --SEATS--> chain, role        who: never by bytes of the message
//! descriptor: version, chain                                 may he
//! (chain, dst) --ROUTES--> index --SOCKETS--> socket         where to: its receive queue
//! ```
//!
//! A write may hold many descriptors: `apply_bytes` makes the verdict count for the first one, and the kernel runs the
//! program again for the rest.
//!
//! **Refusing.** `SK_DROP` is no answer: the kernel keeps that verdict for the socket for ever after and runs the program
//! no more. So a refused message is redirected into a socket that cannot be written to, at index [`REFUSAL`]: `send`
//! fails with `EPIPE`, or returns how much went through before the refused descriptor. Such a cut-off rest is not
//! counted: its sender comes again with it, and gets its `EPIPE` then.
//!
//! A write may be less than a descriptor: `cork_bytes` keeps it until the rest comes. The kernel cannot go on with the
//! tail of a write whose head is redirected: there it is cut off like a refusal, and `send` returns the whole ones.
//! Once corked, the kernel frees whatever a redirect does not take and hides its error. So what would be refused then,
//! and a write that completes one descriptor and begins another, does get `SK_DROP`: `EACCES`, now and ever after.
//! Members write whole descriptors ([`lifl_ebpf::wire`] does) and meet none of this.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, sk_action::SK_DROP, sk_action::SK_PASS, sk_msg_md},
    btf_maps::{Array, HashMap, PerCpuArray, ProgramArray, SkStorage, SockMap},
    helpers::{
        bpf_ktime_get_coarse_ns,
        generated::{bpf_msg_apply_bytes, bpf_msg_cork_bytes, bpf_msg_pull_data, bpf_sk_storage_get},
    },
    macros::{btf_map, sk_msg},
    programs::SkMsgContext,
};
use lifl_ebpf_common::{
    DESCRIPTOR_BYTES, Descriptor, Kind, LAYOUT_VERSION,
    maps::{ANY_CHAIN, Counters, DropReason, Identity, MAX_MEMBERS, REFUSAL, RouteKey, STRANGERS, Seat, write_state},
};

const MEMBERS: usize = MAX_MEMBERS as usize;
const ROUTE_ENTRIES: usize = 4 * MEMBERS;
const BYTES: u32 = DESCRIPTOR_BYTES as u32;

/// Slot 0: what handles a descriptor.
#[btf_map]
static PROGRAMS: ProgramArray<1> = ProgramArray::new();

/// Data sockets of the members, by index, and the one that refuses; `lifl` is attached here.
#[btf_map]
static SOCKETS: SockMap<{ MEMBERS + 1 }> = SockMap::new();

/// Which seat a socket has; in the socket's own storage, so that it cannot outlive it.
#[btf_map]
static IDENTITY: SkStorage<Identity> = SkStorage::new();

/// Who sits at an index.
#[btf_map]
static SEATS: Array<Seat, MEMBERS> = Array::new();

/// Index of the socket behind (chain, dst).
#[btf_map]
static ROUTES: HashMap<RouteKey, u32, ROUTE_ENTRIES> = HashMap::new();

/// What each member did; the last one is the strangers'.
#[btf_map]
static COUNTERS: PerCpuArray<Counters, { MEMBERS + 1 }> = PerCpuArray::new();

/// What is attached: jumps to the current program.
#[sk_msg]
pub fn lifl(ctx: SkMsgContext) -> u32 {
    // SAFETY: nothing here has a destructor that a jump would skip.
    unsafe { PROGRAMS.tail_call(&ctx, 0) };
    SK_DROP
}

/// Handles one descriptor.
#[sk_msg]
pub fn lifl_route(ctx: SkMsgContext) -> u32 {
    let Some(identity) = identity(&ctx) else {
        count_drop(STRANGERS, DropReason::Stranger);
        return refuse(&ctx);
    };
    let state = identity.state;
    let (next, verdict) = match decide(&ctx, identity) {
        Ok(next) => (next, SK_PASS),
        Err(Refusal { counter, reason }) => {
            if state != write_state::CONTINUES {
                count_drop(counter, reason);
            }
            if state == write_state::CORKED { (state, SK_DROP) } else { (write_state::FRESH, refuse(&ctx)) }
        }
    };
    if next != state {
        identity.state = next;
    }
    verdict
}

/// Nothing: what any `sk_msg` program costs, for the bench to subtract.
#[sk_msg]
pub fn lifl_empty(_: SkMsgContext) -> u32 {
    SK_PASS
}

struct Refusal {
    counter: u32,
    reason: DropReason,
}

/// Redirects the descriptor at the head of the message; returns the state of the write after it.
#[inline(always)]
fn decide(ctx: &SkMsgContext, identity: &Identity) -> Result<u32, Refusal> {
    let stranger = Refusal { counter: STRANGERS, reason: DropReason::Stranger };
    let Some(seat) = SEATS.get(identity.index) else { return Err(stranger) };
    if seat.live == 0 || seat.generation != identity.generation {
        return Err(stranger);
    }
    let refused = |reason| Refusal { counter: identity.index, reason };

    let size = ctx.size();
    if size < BYTES {
        if identity.state == write_state::CONTINUES {
            return Err(refused(DropReason::Framing));
        }
        // SAFETY: the context is the running program's.
        unsafe { bpf_msg_cork_bytes(ctx.msg, BYTES) };
        return Ok(write_state::CORKED);
    }
    if identity.state == write_state::CORKED && size > BYTES {
        return Err(refused(DropReason::Framing));
    }
    let Some(descriptor) = head(ctx) else { return Err(refused(DropReason::Framing)) };
    if descriptor.version != LAYOUT_VERSION {
        return Err(refused(DropReason::Version));
    }
    let chain = descriptor.chain;
    if seat.chain != chain && seat.chain != ANY_CHAIN {
        return Err(refused(DropReason::Chain));
    }
    descriptor.src = seat.role;
    let bytes = if descriptor.kind == Kind::Release as u8 { 0 } else { descriptor.length };

    let key = RouteKey { chain, dst: descriptor.dst };
    // SAFETY: the value is a word, read once; a route changed meanwhile gives the old or the new one.
    let Some(&target) = (unsafe { ROUTES.get(&key) }) else { return Err(refused(DropReason::Route)) };
    if SOCKETS.redirect_msg(ctx, target, u64::from(BPF_F_INGRESS)) != i64::from(SK_PASS) {
        return Err(refused(DropReason::Route));
    }
    count(identity.index, bytes);
    if size == BYTES {
        return Ok(write_state::FRESH);
    }
    // SAFETY: the context is the running program's.
    unsafe { bpf_msg_apply_bytes(ctx.msg, BYTES) };
    Ok(write_state::CONTINUES)
}

/// The sender, by its socket.
#[inline(always)]
fn identity<'a>(ctx: &SkMsgContext) -> Option<&'a mut Identity> {
    let msg: *mut sk_msg_md = ctx.msg;
    // SAFETY: the verifier knows the context and lets it be read.
    let sk = unsafe { (*msg).__bindgen_anon_3.sk };
    if sk.is_null() {
        return None;
    }
    let map: *mut c_void = ptr::from_ref(&IDENTITY).cast_mut().cast();
    // SAFETY: `map` is a socket storage map, `sk` the socket of the context; without CREATE the value may be null.
    let value = unsafe { bpf_sk_storage_get(map, sk.cast(), ptr::null_mut(), 0) };
    // SAFETY: the map's value is an `Identity`, kept for the run of the program. Only this program writes it, under
    // the socket's lock; the loader writes a new one when it registers the socket.
    unsafe { value.cast::<Identity>().as_mut() }
}

/// The first 64 bytes of the message, writable and in one piece.
#[inline(always)]
fn head<'a>(ctx: &SkMsgContext) -> Option<&'a mut Descriptor> {
    if ctx.data() + DESCRIPTOR_BYTES > ctx.data_end() {
        // They cross two pages, or the pages are a file's (splice): the helper copies them to a page of the message.
        // In one piece they are also delivered in one piece when the receiver has room for less.
        // SAFETY: the context is the running program's.
        if unsafe { bpf_msg_pull_data(ctx.msg, 0, BYTES, 0) } != 0 {
            return None;
        }
        if ctx.data() + DESCRIPTOR_BYTES > ctx.data_end() {
            return None;
        }
    }
    // SAFETY: the bounds are checked above, as the verifier checks again; any bytes are a Descriptor. An odd address is
    // no matter to the instructions this becomes.
    unsafe { (ctx.data() as *mut Descriptor).as_mut() }
}

#[inline(always)]
fn count(index: u32, bytes: u64) {
    let Some(counters) = COUNTERS.get_ptr_mut(index) else { return };
    // SAFETY: this CPU's value of the map; a member's is written under the lock of its socket only.
    let counters = unsafe { &mut *counters };
    // SAFETY: takes nothing.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    counters.messages += 1;
    counters.bytes += bytes;
    counters.last_ns = now;
    if counters.first_ns == 0 {
        counters.first_ns = now;
    }
}

#[inline(always)]
fn count_drop(counter: u32, reason: DropReason) {
    let Some(counters) = COUNTERS.get_ptr_mut(counter) else { return };
    // SAFETY: this CPU's value. Strangers share one: two that interrupt each other on one CPU may count as one.
    let counters = unsafe { &mut *counters };
    counters.drops[reason as usize] += 1;
}

/// Sends all that is left of the message where it cannot go.
#[inline(always)]
fn refuse(ctx: &SkMsgContext) -> u32 {
    // SAFETY: the context is the running program's.
    unsafe { bpf_msg_apply_bytes(ctx.msg, ctx.size()) };
    if SOCKETS.redirect_msg(ctx, REFUSAL, 0) == i64::from(SK_PASS) { SK_PASS } else { SK_DROP }
}
