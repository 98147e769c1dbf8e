//! Planning one node allocates nothing: agents and coordinator do it for every node of every job, while updates come in.

use std::{alloc::System, time::Duration};

use lifl_autoscaler::{Action, Estimator, Kinds, Load, Member, Role, Shape, Wanted, Warm, decide};
use mockalloc::{Mockalloc, record_allocs};

#[global_allocator]
static ALLOCATOR: Mockalloc<System> = Mockalloc(System);

/// All that a node's plan needs: `MC`, `Q`, leaves and middle, and what becomes of its aggregators.
#[test]
fn estimate_and_plan_of_a_node_allocate_nothing() {
    let warm = Warm { limit: Duration::from_secs(60), start: Duration::from_millis(10), gap: None };
    let roles = [Role::Leaf, Role::Middle, Role::Top].into_iter().cycle();
    let idle = |id: u64| id.is_multiple_of(2).then_some(Duration::from_secs(id));
    let mut members: Vec<Member> = (0..20).zip(roles).map(|(id, role)| Member { id, role, idle: idle(id) }).collect();
    let mut actions: Vec<Action> = Vec::with_capacity(64);
    let (mut kinds, mut estimator) = (Kinds::new(20.0), Estimator::default());
    kinds.observe("64 cores", Load { arrivals: 1.0, execution: 0.5 });
    let mut acted = 0;
    let counted = record_allocs(|| {
        for step in 0..1000_u32 {
            let load =
                Load { arrivals: f64::from(step % 80), execution: if step.is_multiple_of(7) { 2.0 } else { 0.5 } };
            kinds.observe("64 cores", load);
            let queue = estimator.observe(load).min(kinds.capacity("64 cores"));
            let wanted = Wanted { shape: Shape::new(queue, 2, 64), top: step.is_multiple_of(3) };
            decide(&mut members, wanted, warm, Duration::from_secs(step.into()), &mut actions);
            acted += actions.len();
        }
    });
    assert!(acted > 1000, "there was nothing to do: {acted}");
    assert_eq!(counted.num_allocs(), 0);
    let one = record_allocs(|| drop(std::hint::black_box(vec![1])));
    assert_eq!(one.num_allocs(), 1, "they are counted");
    one.result().unwrap();
}
