//! May this member send this descriptor, and where to: what `ebpf/prog/src/route.rs` decides, in the same order.

use std::collections::HashMap;

use lifl_ebpf_common::{
    descriptor::{Descriptor, Kind, LAYOUT_VERSION},
    maps::{ANY_CHAIN, Counters, DropReason, Member, RouteKey, STRANGERS},
};

/// Returns the index of the receiver and the descriptor with its true `src`, or whose counter counts which refusal.
pub(super) fn decide(
    member: Option<&Member>,
    routes: &HashMap<RouteKey, u32>,
    descriptor: &Descriptor,
) -> Result<(u32, Descriptor), (u32, DropReason)> {
    let Some(member) = member else {
        return Err((STRANGERS, DropReason::Stranger));
    };
    if descriptor.version != LAYOUT_VERSION {
        return Err((member.counter, DropReason::Version));
    }
    if member.chain != descriptor.chain && member.chain != ANY_CHAIN {
        return Err((member.counter, DropReason::Chain));
    }
    let key = RouteKey { chain: descriptor.chain, dst: descriptor.dst };
    let target = routes.get(&key).ok_or((member.counter, DropReason::Route))?;
    Ok((*target, Descriptor { src: member.role, ..*descriptor }))
}

/// Counts a descriptor that went through.
pub(super) fn count(counters: &mut Counters, descriptor: &Descriptor, now_ns: u64) {
    counters.messages += 1;
    if descriptor.kind != Kind::Release as u8 {
        counters.bytes = counters.bytes.wrapping_add(descriptor.length);
    }
    counters.last_ns = now_ns;
    if counters.first_ns == 0 {
        counters.first_ns = now_ns;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMBER: Member = Member { chain: 1, role: 16, counter: 3, reserved: 0 };

    fn routes() -> HashMap<RouteKey, u32> {
        HashMap::from([(RouteKey { chain: 1, dst: 2 }, 7)])
    }

    #[test]
    fn stamps_the_true_sender() {
        let lie = Descriptor { src: 99, ..Descriptor::new(Kind::Update, 1, 2) };
        let (to, stamped) = decide(Some(&MEMBER), &routes(), &lie).unwrap();
        assert_eq!((to, stamped), (7, Descriptor { src: 16, ..lie }));
    }

    #[test]
    fn refuses_in_the_order_of_the_program() {
        let good = Descriptor::new(Kind::Update, 1, 2);
        let all_wrong = Descriptor { version: 9, chain: 5, dst: 8, ..good };
        let refused = |member, d| decide(member, &routes(), &d).unwrap_err();
        assert_eq!(refused(None, all_wrong), (STRANGERS, DropReason::Stranger));
        assert_eq!(refused(Some(&MEMBER), all_wrong), (3, DropReason::Version));
        assert_eq!(refused(Some(&MEMBER), Descriptor { chain: 5, dst: 8, ..good }), (3, DropReason::Chain));
        assert_eq!(refused(Some(&MEMBER), Descriptor { dst: 8, ..good }), (3, DropReason::Route));
    }

    #[test]
    fn a_member_of_every_chain_sends_to_each_but_only_where_a_route_is() {
        let gateway = Member { chain: ANY_CHAIN, role: 0, ..MEMBER };
        let d = Descriptor::new(Kind::Update, 1, 2);
        assert_eq!(decide(Some(&gateway), &routes(), &d).unwrap().0, 7);
        assert_eq!(decide(Some(&gateway), &routes(), &Descriptor { chain: 2, ..d }), Err((3, DropReason::Route)));
    }

    #[test]
    fn a_release_names_no_payload() {
        let mut counters = Counters::default();
        count(&mut counters, &Descriptor { length: 10, ..Descriptor::new(Kind::Update, 1, 2) }, 5);
        count(&mut counters, &Descriptor { length: 1 << 40, ..Descriptor::new(Kind::Release, 1, 0) }, 6);
        assert_eq!((counters.messages, counters.bytes, counters.first_ns, counters.last_ns), (2, 10, 5, 6));
    }
}
