//! Who of the aggregators that run becomes what the plan wants (paper, 5.3).
//!
//! Leaf, middle and top are one program, so a role is given by a message. A leaf that has finished is the node's middle, the first
//! middle that has finished is the cluster's top: neither is started as long as somebody who runs will come free for it.

use std::{cmp::Reverse, time::Duration};

use crate::Shape;

/// What an aggregator does in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Takes updates.
    Leaf,
    /// Takes what leaves of its node have made.
    Middle,
    /// Takes what nodes have made.
    Top,
}

/// An aggregator that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Whose it is: nothing is read from it.
    pub id: u64,
    /// Its role at the time, or its last one.
    pub role: Role,
    /// Since when it has had nothing left to do, on the caller's clock; none: it is busy.
    pub idle: Option<Duration>,
}

/// What a node is to have for the work that is still to come: leaves for updates that have not come yet, and so on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Leaves and middle.
    pub shape: Shape,
    /// The top is here.
    pub top: bool,
}

/// How long aggregators without work are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Warm {
    /// No longer than this.
    pub limit: Duration,
    /// How long a start takes, as measured.
    pub start: Duration,
    /// Until there is work again, if anybody knows.
    pub gap: Option<Duration>,
}

/// What is to be done. Doing it again changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Give it this role.
    Convert {
        /// Whom.
        id: u64,
        /// Which.
        to: Role,
    },
    /// Start one for this role.
    Start(Role),
    /// It is not needed.
    Stop {
        /// Which one.
        id: u64,
    },
}

/// Places of a role that no busy aggregator has.
struct Seats {
    role: Role,
    /// Somebody has the role, or is to have it.
    filled: bool,
    /// So many of the idle ones have the role already.
    stay: usize,
    /// Nobody has these.
    vacant: usize,
}

/// A gap pays for a start when it is so many times as long: what waits takes memory only, what starts takes processor time.
const PAYS: u32 = 100;

/// What makes the aggregators of a node what is wanted there, at `now`; `actions` are replaced by it, `members` are sorted.
///
/// Roles that are filled stay with who has them. A role that is not goes to the aggregator that has been idle for the shortest time:
/// its memory is the warmest. Middle and top are not started while there is somebody below them: the first one to finish takes them.
///
/// Nothing is allocated while `actions` has room for an action of each member and each leaf wanted.
pub fn decide(members: &mut [Member], wanted: Wanted, warm: Warm, now: Duration, actions: &mut Vec<Action>) {
    actions.clear();
    members.sort_unstable_by_key(|member| Reverse((member.idle, member.id)));
    let idle = members.partition_point(|member| member.idle.is_some());
    let (idle, busy) = members.split_at(idle);
    let mut seats = [Role::Leaf, Role::Middle, Role::Top].map(|role| {
        let count = |members: &[Member]| members.iter().filter(|member| member.role == role).count();
        let wanted = match role {
            Role::Leaf => wanted.shape.leaves as usize,
            Role::Middle => usize::from(wanted.shape.middle),
            Role::Top => usize::from(wanted.top),
        };
        // Busy ones keep their roles, even if they are too many: nobody is taken from its work.
        let working = count(busy);
        let missing = wanted.saturating_sub(working);
        let stay = missing.min(count(idle));
        Seats { role, filled: working > 0 || wanted > 0, stay, vacant: missing - stay }
    });
    let pays = warm.gap.is_some_and(|gap| gap >= warm.start.saturating_mul(PAYS));
    for member in idle {
        if let Some(seat) = seats.iter_mut().find(|seat| seat.role == member.role && seat.stay > 0) {
            seat.stay -= 1;
        } else if let Some(seat) = seats.iter_mut().find(|seat| seat.vacant > 0) {
            seat.vacant -= 1;
            actions.push(Action::Convert { id: member.id, to: seat.role });
        } else if pays || member.idle.is_some_and(|since| now.saturating_sub(since) >= warm.limit) {
            actions.push(Action::Stop { id: member.id });
        }
    }
    // Who works below a role, or is about to, will be free for it. Who works above it waits for it, and never will be.
    let mut below = false;
    for seat in seats {
        if !below {
            actions.extend(std::iter::repeat_n(Action::Start(seat.role), seat.vacant));
        }
        below |= seat.filled;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WARM: Warm = Warm { limit: Duration::from_secs(60), start: Duration::from_millis(10), gap: None };

    fn member(id: u64, role: Role, idle: Option<u64>) -> Member {
        Member { id, role, idle: idle.map(Duration::from_secs) }
    }

    fn wanted(leaves: u32, middle: bool, top: bool) -> Wanted {
        Wanted { shape: Shape { leaves, middle }, top }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn decide(members: &[Member], wanted: Wanted, warm: Warm, now: Duration) -> Vec<Action> {
        let mut actions = vec![Action::Stop { id: 0 }];
        super::decide(&mut members.to_vec(), wanted, warm, now, &mut actions);
        actions
    }

    #[test]
    fn a_round_starts_leaves_only() {
        let actions = decide(&[], wanted(3, true, true), WARM, at(0));
        assert_eq!(actions, [Action::Start(Role::Leaf); 3]);
    }

    #[test]
    fn the_first_leaf_that_has_finished_is_the_middle_and_the_first_middle_the_top() {
        let mut members = vec![member(1, Role::Leaf, None), member(2, Role::Leaf, None)];
        assert_eq!(decide(&members, wanted(2, true, true), WARM, at(5)), [], "both are at work: somebody will be free");
        // Its round is over for it: nothing more is wanted of leaves than the one that works.
        members[0].idle = Some(at(5));
        let actions = decide(&members, wanted(1, true, true), WARM, at(6));
        assert_eq!(actions, [Action::Convert { id: 1, to: Role::Middle }]);
        members[0] = member(1, Role::Middle, None);
        members[1].idle = Some(at(7));
        let actions = decide(&members, wanted(0, true, true), WARM, at(7));
        assert_eq!(actions, [Action::Convert { id: 2, to: Role::Top }]);
    }

    #[test]
    fn nobody_is_started_where_somebody_is_idle() {
        let members = [member(1, Role::Top, Some(1)), member(2, Role::Middle, Some(2)), member(3, Role::Leaf, Some(3))];
        let actions = decide(&members, wanted(4, false, false), WARM, at(4));
        let converted = [2, 1].map(|id| Action::Convert { id, to: Role::Leaf });
        assert_eq!(
            actions,
            [&converted[..], &[Action::Start(Role::Leaf)]].concat(),
            "the warmest first; the leaf stays one"
        );
    }

    #[test]
    fn a_node_that_has_only_the_top_starts_it() {
        assert_eq!(decide(&[], wanted(0, false, true), WARM, at(0)), [Action::Start(Role::Top)]);
    }

    #[test]
    fn a_middle_that_died_is_started_when_nobody_below_it_is_left() {
        let top = member(1, Role::Top, None);
        let actions = decide(&[top], wanted(0, true, true), WARM, at(0));
        assert_eq!(actions, [Action::Start(Role::Middle)], "the top waits for it");
        let leaf = member(2, Role::Leaf, None);
        assert_eq!(decide(&[top, leaf], wanted(0, true, true), WARM, at(0)), [], "the leaf will be free for it");
        assert_eq!(
            decide(&[], wanted(0, true, true), WARM, at(0)),
            [Action::Start(Role::Middle)],
            "and it for the top"
        );
    }

    #[test]
    fn nobody_is_taken_from_its_work() {
        let members = [member(1, Role::Leaf, None), member(2, Role::Leaf, None)];
        assert_eq!(decide(&members, Wanted::default(), WARM, at(1000)), []);
    }

    #[test]
    fn who_has_been_idle_too_long_is_stopped() {
        let members = [member(1, Role::Leaf, Some(0)), member(2, Role::Leaf, Some(30))];
        assert_eq!(decide(&members, Wanted::default(), WARM, at(59)), []);
        assert_eq!(decide(&members, Wanted::default(), WARM, at(60)), [Action::Stop { id: 1 }]);
    }

    #[test]
    fn a_gap_that_pays_for_the_start_is_not_waited_through() {
        let members = [member(1, Role::Leaf, Some(10))];
        let gap = |millis| Warm { gap: Some(Duration::from_millis(millis)), ..WARM };
        assert_eq!(decide(&members, Wanted::default(), gap(999), at(10)), []);
        assert_eq!(decide(&members, Wanted::default(), gap(1000), at(10)), [Action::Stop { id: 1 }]);
    }

    /// Whatever is there: what was decided leads to what was wanted, and then there is nothing more to do.
    #[test]
    fn doing_it_leads_to_what_is_wanted() {
        use proptest::{prelude::*, test_runner::TestRunner};
        let role = prop_oneof![Just(Role::Leaf), Just(Role::Middle), Just(Role::Top)];
        let some = prop::collection::vec((role, prop::option::of(0..100_u64)), 0..12);
        let cases = (some, 0..8_u32, any::<bool>(), any::<bool>());
        let held = TestRunner::default().run(&cases, |(some, leaves, middle, top)| {
            let members: Vec<Member> =
                some.iter().zip(1..).map(|((role, idle), id)| member(id, *role, *idle)).collect();
            let wanted = wanted(leaves, middle, top);
            let actions = decide(&members, wanted, WARM, at(100));
            let (mut after, mut next) = (members.clone(), 100);
            for action in &actions {
                match *action {
                    Action::Convert { id, to } => {
                        let who = after.iter_mut().find(|member| member.id == id).expect("one that runs");
                        prop_assert!(who.idle.is_some(), "taken from its work");
                        who.role = to;
                    }
                    Action::Start(role) => {
                        after.push(member(next, role, Some(100)));
                        next += 1;
                    }
                    Action::Stop { id } => after.retain(|member| member.id != id),
                }
            }
            let started = actions.iter().any(|action| matches!(action, Action::Start(_)));
            let stopped = actions.iter().any(|action| matches!(action, Action::Stop { .. }));
            prop_assert!(!(started && stopped), "{actions:?}");
            let count = |role| after.iter().filter(|member| member.role == role).count();
            prop_assert!(count(Role::Leaf) >= leaves as usize);
            let at_work = |role| members.iter().any(|member| member.role == role && member.idle.is_none());
            let below = leaves > 0 || at_work(Role::Leaf);
            prop_assert!(!middle || below || count(Role::Middle) > 0, "nobody would ever be the middle: {actions:?}");
            let below = below || middle || at_work(Role::Middle);
            prop_assert!(!top || below || count(Role::Top) > 0, "nobody would ever be the top: {actions:?}");
            prop_assert_eq!(decide(&after, wanted, WARM, at(100)), vec![]);
            Ok(())
        });
        held.expect("holds");
    }
}
