use proptest::prelude::*;

use super::*;

fn node(name: &str, capacity: f64) -> Node {
    Node { name: name.to_owned(), capacity, memory: u64::MAX, bandwidth: u64::MAX, cores: None, load: Load::default() }
}

fn five() -> Vec<Node> {
    (1..=5).map(|number| node(&format!("n{number}"), 20.0)).collect()
}

fn job(goal: u32, clients: u32) -> Job {
    Job {
        namespace: "default".to_owned(),
        name: "digits".to_owned(),
        goal,
        clients,
        fan_in: 2,
        deadline: Duration::from_secs(90),
        update: None,
        reproducible: false,
        lazy: false,
    }
}

fn shares(plan: &Plan) -> Vec<(&str, u32, u32, bool, bool)> {
    plan.taking_part().map(|(name, share)| (name, share.clients, share.leaves, share.middle, share.top)).collect()
}

/// Figure 8: five nodes with a capacity of 20, two updates to a leaf. Without reuse a middle on each node and the top come to the
/// leaves; with it none does.
#[test]
fn the_papers_testbed() {
    for (updates, nodes, leaves) in [(20, 1, 10), (60, 3, 30), (100, 5, 50)] {
        let plan = decide(&job(updates, updates), &five(), Policy::BestFit).unwrap();
        assert_eq!(plan.taking_part().count(), nodes, "{updates}");
        assert_eq!((plan.leaves(), plan.middles() as usize, plan.top()), (leaves, nodes, Some("n1")), "{updates}");
        for policy in [Policy::WorstFit, Policy::RoundRobin] {
            let plan = decide(&job(updates, updates), &five(), policy).unwrap();
            assert_eq!((plan.taking_part().count(), plan.leaves()), (5, leaves), "{updates} {policy}");
        }
    }
}

#[test]
fn clients_against_dropouts_have_room_but_no_leaves() {
    let plan = decide(&job(20, 26), &five(), Policy::BestFit).unwrap();
    assert_eq!(shares(&plan), [("n1", 20, 8, true, true), ("n2", 6, 3, true, false)]);
    let queues: f64 = plan.nodes.values().map(|share| share.why.queue).sum();
    assert!((queues - 20.0).abs() < 1e-9, "the goal is all that is aggregated");
    assert!((plan.nodes["n1"].why.queue - 20.0 * 20.0 / 26.0).abs() < 1e-12);
}

#[test]
fn a_busy_node_has_less_room_and_says_why() {
    let mut nodes = five();
    nodes[1].load = Load { arrivals: 10.0, execution: 1.5 };
    let plan = decide(&job(6, 6), &nodes, Policy::BestFit).unwrap();
    assert_eq!(
        shares(&plan),
        [("n1", 1, 1, false, false), ("n2", 5, 3, true, true)],
        "the fullest that has room, first"
    );
    let why = &plan.nodes["n2"].why;
    assert_eq!(
        (why.capacity, why.arrivals, why.execution_seconds, why.residual, why.queue),
        (20.0, 10.0, 1.5, 5.0, 5.0)
    );
}

#[test]
fn processors_and_memory_bound_the_leaves() {
    let mut nodes = vec![node("n1", 100.0)];
    nodes[0].cores = Some(2);
    let plan = decide(&job(40, 40), &nodes, Policy::BestFit).unwrap();
    assert_eq!((plan.leaves(), plan.nodes["n1"].why.most_leaves), (8, Some(8)));
    let small = Job { update: Some(10), ..job(4, 4) };
    // Three models, four updates, and two accumulators for each of two aggregators.
    nodes[0].memory = 10 * (3 + 4 + 2 * 2);
    let plan = decide(&Job { fan_in: 1, ..small.clone() }, &nodes, Policy::BestFit).unwrap();
    assert_eq!((plan.leaves(), plan.nodes["n1"].why.most_leaves), (2, Some(2)));
}

/// Three models, an aggregator with sums of twice a model, and three of the four updates.
#[test]
fn eager_updates_may_wait_for_memory_and_lazy_ones_may_not() {
    let nodes = [Node { memory: 10 * (3 + 2 * 2 + 3), ..node("n1", 100.0) }];
    let eager = Job { update: Some(10), fan_in: 1, reproducible: true, ..job(4, 4) };
    let plan = decide(&eager, &nodes, Policy::BestFit).unwrap();
    assert_eq!(shares(&plan), [("n1", 4, 1, false, true)]);
    assert_eq!((plan.nodes["n1"].why.slots, plan.nodes["n1"].why.most_leaves), (Some(3), Some(1)));
    assert_eq!(resize(&plan, |_| Some(20.0)).leaves(), 1, "no further leaf takes the memory that clients wait for");
    let refused = decide(&Job { lazy: true, ..eager.clone() }, &nodes, Policy::BestFit).unwrap_err();
    assert!(matches!(refused, Refusal::NoRoom { fits: 3, lacks: Dimension::Memory, .. }), "{refused}");
    let nodes = [Node { memory: nodes[0].memory - 20, ..nodes[0].clone() }];
    let refused = decide(&eager, &nodes, Policy::BestFit).unwrap_err();
    assert!(
        matches!(refused, Refusal::NoRoom { fits: 1, lacks: Dimension::Memory, .. }),
        "one is folded while the next comes: {refused}"
    );
}

#[test]
fn a_link_takes_what_it_carries_until_the_deadline() {
    let mut nodes = five();
    nodes.iter_mut().for_each(|node| node.bandwidth = 1000);
    let fast = Job { update: Some(30_000), ..job(5, 5) };
    let plan = decide(&fast, &nodes, Policy::BestFit).unwrap();
    assert_eq!(
        plan.nodes["n1"].clients, 2,
        "a thousand bytes a second are 90,000 in 90 s, and those are not three: {plan}"
    );
}

#[test]
fn what_is_impossible_is_refused_by_name_and_value() {
    let with = |change: fn(&mut Vec<Node>)| {
        let mut nodes = five();
        change(&mut nodes);
        nodes
    };
    let large = Job { update: Some(1 << 30), ..job(2, 2) };
    let memory = |nodes: &mut Vec<Node>| nodes.iter_mut().zip(1..).for_each(|(node, gib)| node.memory = gib << 30);
    let table: [(Job, Vec<Node>, &[&str]); 10] = [
        (job(1, 1), Vec::new(), &["no nodes"]),
        (job(1, 1), with(|nodes| nodes[4].name = "n2".into()), &["n2", "twice"]),
        (job(1, 1), with(|nodes| nodes[2].capacity = 0.0), &["n3", "capacity of 0", "at least 1"]),
        (job(1, 1), with(|nodes| nodes[2].capacity = f64::NAN), &["n3", "NaN"]),
        (job(1, 1), with(|nodes| nodes[2].capacity = f64::INFINITY), &["n3", "inf", "finite"]),
        (job(0, 5), five(), &["goal of 0"]),
        (job(6, 5), five(), &["goal of 6", "5 clients"]),
        (
            job(100, 130),
            five(),
            &["130 clients", "100", "room for 100", "5 nodes", "lacking is capacity", "overProvision"],
        ),
        (large.clone(), with(memory), &["1073741824 bytes", "node n5", "5368709120", "6442450944", "maxSize"]),
        (Job { update: Some(u64::MAX), ..large }, with(memory), &["too large"]),
    ];
    for (job, nodes, words) in table {
        let refused = decide(&job, &nodes, Policy::BestFit).unwrap_err().to_string();
        assert!(words.iter().all(|word| refused.contains(word)), "{words:?}: {refused}");
    }
}

#[test]
fn one_node_that_is_too_small_is_passed_by() {
    let mut nodes = five();
    nodes[0].memory = 5;
    let plan = decide(&Job { update: Some(1), ..job(4, 4) }, &nodes, Policy::BestFit).unwrap();
    assert_eq!(plan.taking_part().map(|(name, _)| name).collect::<Vec<_>>(), ["n2"]);
}

#[test]
fn counters_that_say_nonsense_say_nothing() {
    for (arrivals, execution) in [(f64::NAN, 1.0), (1.0, f64::INFINITY), (-5.0, -5.0), (f64::MAX, f64::MAX)] {
        let mut nodes = five();
        nodes[0].load = Load { arrivals, execution };
        let plan = decide(&job(20, 20), &nodes, Policy::BestFit).unwrap();
        assert_eq!(plan, decide(&job(20, 20), &five(), Policy::BestFit).unwrap());
        let text = serde_json::to_string(&plan).unwrap();
        assert!(!text.contains("null"), "{text}");
    }
}

#[test]
fn leaves_follow_the_load_while_a_round_runs() {
    let plan = decide(&job(20, 26), &five(), Policy::BestFit).unwrap();
    let later = resize(&plan, |name| (name == "n1").then_some(4.2));
    assert_eq!(shares(&later), [("n1", 20, 3, true, true), ("n2", 6, 3, true, false)]);
    let quiet = resize(&plan, |_| Some(0.0));
    assert_eq!(shares(&quiet), [("n1", 20, 1, false, true), ("n2", 6, 1, false, false)], "clients find somebody");
    assert_eq!(resize(&plan, |_| Some(f64::NAN)), plan);
}

fn any_nodes() -> impl Strategy<Value = Vec<Node>> {
    let node = (1.0..30.0, 0..200_u64, 0..200_u64, prop::option::of(0..4_u32), 0.0..4.0, 0.0..4.0);
    prop::collection::vec(node, 1..12).prop_map(|nodes| {
        nodes
            .into_iter()
            .enumerate()
            .map(|(number, (capacity, memory, bandwidth, cores, arrivals, execution))| Node {
                name: format!("n{number}"),
                capacity,
                memory,
                bandwidth,
                cores,
                load: Load { arrivals, execution },
            })
            .collect()
    })
}

fn any_job() -> impl Strategy<Value = Job> {
    (1..30_u32, 0..10_u32, 1..5_u32, prop::option::of(0..6_u64), any::<bool>(), any::<bool>()).prop_map(
        |(goal, more, fan_in, update, reproducible, lazy)| Job {
            clients: goal + more,
            fan_in,
            update,
            reproducible,
            lazy,
            deadline: Duration::from_millis(500),
            ..job(goal, goal)
        },
    )
}

proptest! {
    #[test]
    fn a_plan_keeps_what_it_was_made_for(job in any_job(), nodes in any_nodes(), policy in prop::sample::select(Policy::ALL.to_vec())) {
        let Ok(plan) = decide(&job, &nodes, policy) else { return Ok(()) };
        prop_assert_eq!(plan.nodes.values().map(|share| share.clients).sum::<u32>(), job.clients);
        prop_assert_eq!(plan.nodes.len(), nodes.len());
        let most = plan.nodes.values().map(|share| share.clients).max().unwrap_or(0);
        let tops: Vec<_> = plan.nodes.values().filter(|share| share.top).collect();
        prop_assert!(tops.len() == 1 && tops[0].clients == most, "the top is where most is");
        for node in &nodes {
            let share = &plan.nodes[&node.name];
            let (clients, leaves) = (u64::from(share.clients), u64::from(share.leaves));
            prop_assert!(f64::from(share.clients) <= node.capacity - node.load.queue() + 1e-5 || clients == 0);
            prop_assert_eq!(share.middle, leaves > 1);
            prop_assert_eq!(leaves == 0, clients == 0, "who has clients has a leaf, and nobody else");
            let wanted = (clients * u64::from(job.goal)).div_ceil(u64::from(job.clients) * u64::from(job.fan_in));
            let most = share.why.most_leaves.map_or(u64::MAX, u64::from);
            prop_assert_eq!(leaves, wanted.min(most));
            let update = job.update.unwrap_or(0);
            let accumulator = if job.reproducible { 2 * update } else { update };
            let held = share.why.slots.map_or(clients, u64::from).min(clients);
            prop_assert!(held == clients || (!job.lazy && held >= 2), "{} of {} updates", held, clients);
            let bytes = update * (3 + held) + 2 * accumulator * leaves;
            prop_assert!(clients == 0 || bytes <= node.memory, "{} of {}", bytes, node.memory);
            prop_assert!(clients * 2 * update <= node.bandwidth, "two each second, as the deadline is half of one");
        }
    }

    #[test]
    fn the_order_of_nodes_means_nothing(
        job in any_job(),
        (nodes, shuffled) in any_nodes().prop_flat_map(|nodes| (Just(nodes.clone()), Just(nodes).prop_shuffle())),
        policy in prop::sample::select(Policy::ALL.to_vec()),
    ) {
        prop_assert_eq!(decide(&job, &nodes, policy), decide(&job, &shuffled, policy));
    }
}
