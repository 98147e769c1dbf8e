//! Both descriptor paths under the same traffic: in the kernel where it is allowed, in user space everywhere.

mod framing;
mod full;
mod idle;
mod life;
mod membership;
mod same;
mod traffic;
mod world;

use libtest_mimic::{Arguments, Trial};
use lifl_ebpf::{Path, PathKind};

use crate::world::{Case, Outcome};

/// Cases by the names of their functions.
macro_rules! cases {
    ($($room:ident::$name:ident),* $(,)?) => { [$((stringify!($name), $room::$name as Case)),*] };
}

const CASES: [(&str, Case); 17] = cases![
    framing::coalesced_writes_are_taken_apart,
    framing::a_byte_at_a_time_is_put_together,
    membership::the_sender_is_stamped_over_a_lie,
    membership::what_may_not_pass_is_counted_and_the_rest_passes,
    membership::a_member_of_every_chain_is_reached_from_each,
    membership::an_unregistered_member_is_a_stranger,
    membership::a_seat_taken_again_is_not_the_old_members,
    membership::seats_and_routes_are_checked,
    framing::peeked_descriptors_stay_until_consumed,
    membership::a_closed_receiver_is_no_route,
    traffic::two_senders_keep_their_order_and_causes_come_first,
    traffic::a_route_moves_while_traffic_flows,
    traffic::a_program_is_replaced_while_traffic_flows,
    full::a_full_receiver_loses_nothing_silently,
    membership::a_dead_member_is_drained_first,
    life::the_path_survives_its_owner,
    idle::nothing_runs_while_nothing_is_sent,
];

fn main() {
    let words: Vec<String> = std::env::args().collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, life::CHILD] => return life::child().expect("child"),
        [_, full::FILL, group] => return full::fill_within(group).expect("fill"),
        [_, idle::IDLE, "ebpf"] => return idle::idle(PathKind::Ebpf).expect("idle"),
        [_, idle::IDLE, _] => return idle::idle(PathKind::Userspace).expect("idle"),
        _ => {}
    }
    let args = Arguments::from_args();
    let refusal = Path::load().err().map(|e| e.to_string());
    if let Some(reason) = &refusal {
        eprintln!("the path in the kernel is not tested here: {reason}");
    }
    let mut trials = Vec::new();
    for (name, case) in CASES {
        let ebpf = Trial::test(format!("ebpf::{name}"), move || case(PathKind::Ebpf));
        trials.push(ebpf.with_ignored_flag(refusal.is_some()));
        trials.push(Trial::test(format!("userspace::{name}"), move || case(PathKind::Userspace)));
    }
    for (name, case) in [
        ("both::same_traffic_same_results", same::same_traffic_same_results as fn() -> Outcome),
        ("ebpf::a_split_write_that_goes_beyond_its_end_is_refused_for_good", framing::overshoot_is_refused_for_good),
        ("ebpf::nothing_is_left_behind", life::nothing_is_left_behind),
    ] {
        trials.push(Trial::test(name, case).with_ignored_flag(refusal.is_some()));
    }
    let no_limits = !std::path::Path::new(full::TCP_LIMITS).join("memory.kmem.tcp.limit_in_bytes").exists();
    if no_limits {
        eprintln!("no limit for a receiver's memory is tested here: cgroup v1 has none at {}", full::TCP_LIMITS);
    }
    let limited = Trial::test(
        "ebpf::a_receiver_without_memory_fails_the_sender",
        full::a_receiver_without_memory_fails_the_sender,
    );
    trials.push(limited.with_ignored_flag(refusal.is_some() || no_limits));
    libtest_mimic::run(&args, trials).exit();
}
