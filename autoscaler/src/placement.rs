//! Which node takes which client's update: bin packing, data-centric (paper, 5.1).
//!
//! The items are updates, the bins what nodes have left. BestFit takes the node that has least left and still has room, so that
//! few nodes are used and partials cross between few; the others are there to be compared with.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
};

use lifl_api::plan::Policy;

/// What a node has left.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Room {
    /// `RC = MC - k·E`: updates at once.
    pub updates: f64,
    /// Bytes.
    pub memory: u64,
    /// Bytes a second of its link.
    pub bandwidth: u64,
}

/// What an update takes, beside being one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Bytes that it lies in.
    pub memory: u64,
    /// Bytes a second that its client sends.
    pub bandwidth: u64,
}

/// What a node may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimension {
    /// Updates at once.
    Updates,
    /// Memory.
    Memory,
    /// Its link.
    Bandwidth,
}

/// An update that no node has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{nodes} nodes have room for {at} of {of} updates: {lacks} is what the roomiest of them lacks for the next one"
)]
pub struct NoRoom {
    /// Its place in the list; those before it have room.
    pub at: usize,
    /// Length of the list.
    pub of: usize,
    /// How many nodes there are.
    pub nodes: usize,
    /// Of the node that has room for most updates.
    pub lacks: Dimension,
}

/// A room in whole numbers: sums of them have no rounding, and they have an order.
#[derive(Clone, Copy, Debug)]
struct Left {
    /// Millionths of an update.
    updates: u64,
    memory: u64,
    bandwidth: u64,
}

/// One update.
const UPDATE: u64 = 1_000_000;

/// Nodes while they are filled.
struct Packing {
    left: Vec<Left>,
    /// What every update takes at least: who has not even that is not asked again.
    least: Demand,
    order: Order,
}

/// Nodes that may have room, as the policy asks them.
enum Order {
    /// By what is left; the node that was taken last is beside them: for an equal update it is the best one still.
    Best { others: BTreeSet<(u64, usize)>, last: Option<(usize, Demand)> },
    /// The roomiest on top; of equals the first.
    Worst(BinaryHeap<(u64, Reverse<usize>)>),
    /// In the order of their list.
    First(Open),
    /// The same, from the node that is next.
    Next(Open, usize),
}

/// A list of nodes from which those go that have no room for anything. The way past them is found once and kept: so many nodes
/// as have gone are passed in the time that it takes to pass one (union-find with path halving).
struct Open {
    /// Of a node that has gone: a later one. Of others: itself. One more than nodes: the end.
    ahead: Vec<usize>,
}

/// A node for each update, in their order: its place in `rooms`.
///
/// O(n log b) for n updates over b nodes as long as a node that has room for one update has room for another; where updates
/// differ in memory or bandwidth, nodes that lack those are passed by one after the other: O(n b) at worst.
///
/// # Errors
/// [`NoRoom`]: nothing is placed then.
pub fn place(rooms: &[Room], demands: &[Demand], policy: Policy) -> Result<Vec<usize>, NoRoom> {
    let mut packing = Packing::new(rooms, demands, policy);
    let mut placed = Vec::with_capacity(demands.len());
    for (at, demand) in demands.iter().enumerate() {
        let Some(node) = packing.choose(*demand) else {
            return Err(NoRoom { at, of: demands.len(), nodes: rooms.len(), lacks: packing.lacks(*demand) });
        };
        placed.push(node);
    }
    Ok(placed)
}

// === impl Packing ===

impl Packing {
    fn new(rooms: &[Room], demands: &[Demand], policy: Policy) -> Self {
        let least = demands
            .iter()
            .copied()
            .reduce(|a, b| Demand { memory: a.memory.min(b.memory), bandwidth: a.bandwidth.min(b.bandwidth) });
        let least = least.unwrap_or_default();
        let left: Vec<Left> = rooms.iter().map(Left::of).collect();
        let open =
            left.iter().enumerate().filter(|(_, left)| left.fits(least)).map(|(node, left)| (left.updates, node));
        let order = match policy {
            Policy::BestFit => Order::Best { others: open.collect(), last: None },
            Policy::WorstFit => Order::Worst(open.map(|(updates, node)| (updates, Reverse(node))).collect()),
            Policy::FirstFit => Order::First(Open::of(&left, least)),
            Policy::RoundRobin => Order::Next(Open::of(&left, least), 0),
        };
        Self { left, least, order }
    }

    /// Takes the room that it finds.
    fn choose(&mut self, demand: Demand) -> Option<usize> {
        let Self { left, least, order } = self;
        let node = match order {
            Order::Best { others, last } => match *last {
                Some((node, same)) if same == demand && left[node].fits(demand) => node,
                before => {
                    if let Some((node, _)) = before.filter(|(node, _)| left[*node].fits(*least)) {
                        others.insert((left[node].updates, node));
                    }
                    *last = None;
                    let found = others.iter().copied().find(|(_, node)| left[*node].fits(demand))?;
                    others.remove(&found);
                    *last = Some((found.1, demand));
                    found.1
                }
            },
            Order::Worst(heap) => {
                let mut passed = Vec::new();
                let found = loop {
                    match heap.pop() {
                        Some((_, Reverse(node))) if left[node].fits(demand) => break Some(node),
                        Some(other) => passed.push(other),
                        None => break None,
                    }
                };
                heap.extend(passed);
                found?
            }
            Order::First(open) => open.find(0, |node| left[node].fits(demand))?,
            Order::Next(open, next) => {
                let fits = |node: usize| left[node].fits(demand);
                // From the beginning again, if need be: what lies behind `next` is asked twice then, and does not fit twice.
                let node = open.find(*next, fits).or_else(|| open.find(0, fits))?;
                *next = (node + 1) % left.len();
                node
            }
        };
        left[node].take(demand);
        let stays = left[node].fits(*least);
        match order {
            Order::Worst(heap) if stays => heap.push((left[node].updates, Reverse(node))),
            Order::First(open) | Order::Next(open, _) if !stays => open.close(node),
            _ => {}
        }
        Some(node)
    }

    /// What the roomiest node lacks for it.
    fn lacks(&self, demand: Demand) -> Dimension {
        match self.left.iter().max_by_key(|left| left.updates) {
            Some(left) if left.updates >= UPDATE && left.memory < demand.memory => Dimension::Memory,
            Some(left) if left.updates >= UPDATE => Dimension::Bandwidth,
            _ => Dimension::Updates,
        }
    }
}

// === impl Open ===

impl Open {
    fn of(left: &[Left], least: Demand) -> Self {
        let mut open = Self { ahead: (0..=left.len()).collect() };
        (0..left.len()).filter(|node| !left[*node].fits(least)).for_each(|node| open.close(node));
        open
    }

    fn close(&mut self, node: usize) {
        self.ahead[node] = node + 1;
    }

    /// The first one from `node` on that has not gone; the end, if there is none.
    fn at(&mut self, mut node: usize) -> usize {
        while self.ahead[node] != node {
            self.ahead[node] = self.ahead[self.ahead[node]];
            node = self.ahead[node];
        }
        node
    }

    /// The first one from `from` on that fits.
    fn find(&mut self, from: usize, fits: impl Fn(usize) -> bool) -> Option<usize> {
        let end = self.ahead.len() - 1;
        let mut node = self.at(from);
        while node < end && !fits(node) {
            node = self.at(node + 1);
        }
        Some(node).filter(|node| *node < end)
    }
}

// === impl Left ===

impl Left {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates; less than nothing is nothing"
    )]
    fn of(room: &Room) -> Self {
        // Rounded: 20 - 0.56 * 25 is a little less than the 6 that it is.
        let updates = (room.updates * UPDATE as f64).round() as u64;
        Self { updates, memory: room.memory, bandwidth: room.bandwidth }
    }

    fn fits(&self, demand: Demand) -> bool {
        self.updates >= UPDATE && self.memory >= demand.memory && self.bandwidth >= demand.bandwidth
    }

    fn take(&mut self, demand: Demand) {
        self.updates -= UPDATE;
        self.memory -= demand.memory;
        self.bandwidth -= demand.bandwidth;
    }
}

impl std::fmt::Display for Dimension {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Updates => "capacity",
            Self::Memory => "memory",
            Self::Bandwidth => "bandwidth",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLENTY: u64 = u64::MAX;

    fn rooms(updates: &[f64]) -> Vec<Room> {
        updates.iter().map(|updates| Room { updates: *updates, memory: PLENTY, bandwidth: PLENTY }).collect()
    }

    fn used(placed: &[usize]) -> usize {
        placed.iter().collect::<BTreeSet<_>>().len()
    }

    /// Nodes of the paper's figure 8: five with a capacity of 20.
    #[test]
    fn the_fewest_nodes_are_used() {
        let five = rooms(&[20.0; 5]);
        for (updates, nodes) in [(20, 1), (60, 3), (100, 5)] {
            let demands = vec![Demand::default(); updates];
            let best = place(&five, &demands, Policy::BestFit).expect("room");
            assert_eq!(used(&best), nodes, "{updates} updates");
            assert_eq!(used(&place(&five, &demands, Policy::WorstFit).expect("room")), 5, "least connections");
            assert_eq!(used(&place(&five, &demands, Policy::RoundRobin).expect("room")), 5);
        }
    }

    #[test]
    fn the_best_one_is_that_with_least_room() {
        let placed = place(&rooms(&[5.0, 1.5, 3.0, 0.9]), &[Demand::default(); 6], Policy::BestFit).expect("room");
        assert_eq!(placed, [1, 2, 2, 2, 0, 0]);
    }

    #[test]
    fn what_rounding_took_from_a_room_is_given_back() {
        let nearly_six = 20.0 - 0.56 * 25.0;
        assert!(nearly_six < 6.0);
        assert_eq!(place(&rooms(&[nearly_six]), &[Demand::default(); 6], Policy::BestFit), Ok(vec![0; 6]));
    }

    #[test]
    fn a_room_that_is_no_number_or_negative_is_none() {
        for updates in [f64::NAN, -1.0, f64::NEG_INFINITY, 0.9] {
            assert!(place(&rooms(&[updates]), &[Demand::default()], Policy::BestFit).is_err(), "{updates}");
        }
        assert_eq!(place(&rooms(&[f64::INFINITY]), &[Demand::default(); 2], Policy::WorstFit), Ok(vec![0, 0]));
    }

    #[test]
    fn a_node_without_memory_or_link_is_passed_by() {
        let mut nodes = rooms(&[1.0, 2.0, 9.0]);
        nodes[0].memory = 10;
        nodes[1].bandwidth = 10;
        let demands = [Demand { memory: 11, bandwidth: 11 }, Demand { memory: 1, bandwidth: 1 }];
        for policy in Policy::ALL {
            assert_eq!(place(&nodes, &demands[..1], policy).expect("room"), [2], "{policy:?}");
        }
        assert_eq!(place(&nodes, &demands, Policy::BestFit).expect("room"), [2, 0]);
    }

    #[test]
    fn who_finds_no_room_hears_what_is_lacking() {
        let refused = |nodes: &[Room], demand: Demand| place(nodes, &[demand; 3], Policy::BestFit).expect_err("full");
        let full = refused(&rooms(&[1.9, 1.0]), Demand::default());
        assert_eq!((full.at, full.lacks), (2, Dimension::Updates));
        assert_eq!(
            full.to_string(),
            "2 nodes have room for 2 of 3 updates: capacity is what the roomiest of them lacks for the next one"
        );
        let mut nodes = rooms(&[9.0]);
        nodes[0].memory = 25;
        assert_eq!(refused(&nodes, Demand { memory: 10, bandwidth: 0 }).lacks, Dimension::Memory);
        nodes[0] = Room { bandwidth: 25, memory: PLENTY, ..nodes[0] };
        assert_eq!(refused(&nodes, Demand { memory: 10, bandwidth: 10 }).lacks, Dimension::Bandwidth);
        assert_eq!(refused(&[], Demand::default()).lacks, Dimension::Updates);
    }

    /// What each policy says, written down as slowly as it is said.
    fn slowly(rooms: &[Room], demands: &[Demand], policy: Policy) -> Option<Vec<usize>> {
        let mut left: Vec<Left> = rooms.iter().map(Left::of).collect();
        let mut next = 0;
        demands
            .iter()
            .map(|demand| {
                let fit = |node: &usize| left[*node].fits(*demand);
                let node = match policy {
                    Policy::BestFit => (0..left.len()).filter(fit).min_by_key(|node| (left[*node].updates, *node)),
                    Policy::WorstFit => {
                        (0..left.len()).filter(fit).max_by_key(|node| (left[*node].updates, Reverse(*node)))
                    }
                    Policy::FirstFit => (0..left.len()).find(fit),
                    Policy::RoundRobin => (0..left.len()).map(|at| (next + at) % left.len()).find(fit),
                }?;
                next = (node + 1) % left.len();
                left[node].take(*demand);
                Some(node)
            })
            .collect()
    }

    proptest! {
        #[test]
        fn each_policy_is_what_it_says(
            nodes in prop::collection::vec((0.0..8.0, 0..40_u64, 0..40_u64), 0..12),
            demands in prop::collection::vec((0..9_u64, 0..9_u64), 0..40),
            equal: bool,
        ) {
            let nodes: Vec<Room> =
                nodes.iter().map(|(updates, memory, bandwidth)| Room { updates: *updates, memory: *memory, bandwidth: *bandwidth }).collect();
            let of = |(memory, bandwidth): &(u64, u64)| Demand { memory: *memory, bandwidth: *bandwidth };
            let demands: Vec<Demand> = match demands.first() {
                Some(first) if equal => vec![of(first); demands.len()],
                _ => demands.iter().map(of).collect(),
            };
            for policy in Policy::ALL {
                prop_assert_eq!(place(&nodes, &demands, policy).ok(), slowly(&nodes, &demands, policy), "{:?}", policy);
            }
        }
    }
}
