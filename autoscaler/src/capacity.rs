//! How many updates a node aggregates at once before each takes longer: `MC`, found while it works (paper, 5.1 and appendix E).
//!
//! The paper ramps the load of an idle node until an update takes significantly longer, at `(k', E')`, and has `MC = k'·E'`. Here the
//! rounds are the ramp: placement loads a node up to what its capacity is thought to be, and each interval says whether that was
//! too much. So capacity follows a machine that changes, and needs no measurement before the first job.
//!
//! ```text
//!  E │                 x (k, E): took longer ── capacity = k'·E' where the line crosses, at least half of what it was
//!    │              /
//!    │- - - - - - + - - - - E' = 1.5 x what it takes on an idle node
//!    │          /
//!    │ o  o   o ───────────── calm at (nearly) full load: capacity + 1
//!    └────────────+──────── k
//!                 k'
//! ```

use std::collections::BTreeMap;

use crate::{HISTORY, Load};

/// An update takes *significantly* longer when it takes so many times what it takes on an idle node. The paper gives no number;
/// this is above what a neighbour's noise makes of it, and far below what a queue does.
const SLOWER: f64 = 1.5;
/// So many updates at once do not wait for each other: what one takes then is what it takes on an idle node. Only they may make that
/// longer than it was; a load that rises slowly would otherwise take the measure along with it.
const ALONE: f64 = 1.0;
/// A node is fully loaded from this share of the whole updates on that fit: what is measured varies.
const FULL: f64 = 0.9;
/// What one interval takes away, at most: it may have been a neighbour's.
const KEEPS: f64 = 0.5;
/// A node that aggregates nothing at a time is none.
const LEAST: f64 = 1.0;

/// `MC` of one kind of node, from loads as they come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ramp {
    /// Seconds per update without a queue.
    unhurried: Option<f64>,
    /// The last load that was no trouble: where the line to one that was begins.
    calm: Load,
    capacity: f64,
}

/// `MC` by kind of node: what one node of a kind has shown holds for the others.
#[derive(Clone, Debug, PartialEq)]
pub struct Kinds {
    assumed: f64,
    ramps: BTreeMap<String, Ramp>,
}

// === impl Ramp ===

impl Ramp {
    /// Begins with what is assumed, updates at once; the paper's machines had 20. Less than one is taken for one.
    #[must_use]
    pub const fn new(assumed: f64) -> Self {
        let capacity = if assumed > LEAST { assumed } else { LEAST };
        Self { unhurried: None, calm: Load { arrivals: 0.0, execution: 0.0 }, capacity }
    }

    /// Takes in an interval; one without updates says nothing.
    pub fn observe(&mut self, load: Load) {
        let queue = load.queue();
        if queue <= 0.0 {
            return;
        }
        let unhurried = *self.unhurried.get_or_insert(load.execution);
        let slow = SLOWER * unhurried;
        if load.execution < unhurried {
            self.unhurried = Some(load.execution);
        } else if queue <= ALONE {
            self.unhurried = Some(HISTORY * unhurried + (1.0 - HISTORY) * load.execution);
        }
        if load.execution < slow || queue <= ALONE {
            self.calm = load;
            if queue >= FULL * self.capacity.floor() {
                self.capacity = queue.max(self.capacity + 1.0);
            }
        } else {
            let knee = slow * crossing(self.calm, load, slow);
            self.capacity = knee.max(KEEPS * self.capacity).max(LEAST);
        }
    }

    /// `MC`, updates at once.
    #[must_use]
    pub const fn capacity(&self) -> f64 {
        self.capacity
    }
}

/// `k'`: the rate at which an update takes `slow` seconds, on a straight line from a calm load to one that is not.
fn crossing(calm: Load, load: Load, slow: f64) -> f64 {
    // Slower at no more updates than were no trouble: it is the machine that has changed.
    if calm.arrivals >= load.arrivals {
        return load.arrivals;
    }
    let share = (slow - calm.execution) / (load.execution - calm.execution);
    calm.arrivals + share.clamp(0.0, 1.0) * (load.arrivals - calm.arrivals)
}

// === impl Kinds ===

impl Kinds {
    /// Kinds that have not been seen have `assumed`, updates at once.
    #[must_use]
    pub const fn new(assumed: f64) -> Self {
        Self { assumed, ramps: BTreeMap::new() }
    }

    /// Takes in an interval of a node of this kind: of a machine's size and make, as its label has it.
    pub fn observe(&mut self, kind: &str, load: Load) {
        match self.ramps.get_mut(kind) {
            Some(ramp) => ramp.observe(load),
            None => {
                let mut ramp = Ramp::new(self.assumed);
                ramp.observe(load);
                self.ramps.insert(kind.to_owned(), ramp);
            }
        }
    }

    /// `MC` of a node of this kind, updates at once.
    #[must_use]
    pub fn capacity(&self, kind: &str) -> f64 {
        self.ramps.get(kind).map_or(Ramp::new(self.assumed).capacity, Ramp::capacity)
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "what comes without rounding is compared as it is")]
mod tests {
    use super::*;

    const EXECUTION: f64 = 0.5;

    /// A node of so many places that is offered so many updates at once: beyond the places they share them.
    fn node(places: f64, at_once: f64) -> Load {
        let execution = EXECUTION * (at_once / places).max(1.0);
        Load { arrivals: at_once / execution, execution }
    }

    /// Placement offers what the capacity is thought to be, each time.
    fn after(ramp: &mut Ramp, places: f64, intervals: usize) -> f64 {
        (0..intervals).for_each(|_| ramp.observe(node(places, ramp.capacity().floor())));
        ramp.capacity()
    }

    /// The paper's procedure: an idle node's load is raised until an update takes significantly longer.
    #[test]
    fn a_ramp_ends_where_updates_take_longer() {
        let mut ramp = Ramp::new(1.0);
        for rate in 1..=12 {
            ramp.observe(Load { arrivals: f64::from(rate), execution: EXECUTION });
        }
        assert_eq!(ramp.capacity(), 12.0 * EXECUTION + 1.0, "calm: there may be room for one more");
        ramp.observe(Load { arrivals: 14.0, execution: 4.0 * EXECUTION });
        // From (12, 0.5) to (14, 2.0) the line crosses 0.75 at a sixth of the way.
        let (rate, execution) = (12.0 + 2.0 / 6.0, SLOWER * EXECUTION);
        assert!((ramp.capacity() - rate * execution).abs() < 1e-9, "k'·E' and not the {} of the queue", 14.0 * 2.0);
    }

    #[test]
    fn whatever_was_assumed_it_ends_at_what_the_node_bears() {
        for places in [3.0, 20.0, 150.0] {
            for assumed in [1.0, 20.0, 400.0] {
                let mut ramp = Ramp::new(assumed);
                ramp.observe(node(places, 1.0));
                let found = after(&mut ramp, places, 200);
                assert!((0.9 * places..=1.7 * places + 1.0).contains(&found), "{places} from {assumed}: {found}");
            }
        }
    }

    #[test]
    fn it_follows_a_machine_that_changes() {
        let mut ramp = Ramp::new(20.0);
        let before = after(&mut ramp, 20.0, 100);
        let fewer = after(&mut ramp, 5.0, 100);
        let again = after(&mut ramp, 20.0, 100);
        assert!(fewer < before / 2.0 && again > 2.0 * fewer, "{before} {fewer} {again}");
    }

    #[test]
    fn it_follows_a_machine_that_is_another_one() {
        let mut ramp = Ramp::new(20.0);
        after(&mut ramp, 20.0, 100);
        let slow = |load: Load| Load { arrivals: load.arrivals / 10.0, execution: load.execution * 10.0 };
        (0..100).for_each(|_| ramp.observe(slow(node(20.0, ramp.capacity().floor()))));
        assert!(ramp.capacity() > 15.0, "each update takes ten times as long, but as many at once as before: {ramp:?}");
    }

    #[test]
    fn one_slow_interval_takes_no_more_than_half() {
        let mut ramp = Ramp::new(20.0);
        ramp.observe(node(20.0, 1.0));
        ramp.observe(Load { arrivals: 0.1, execution: 100.0 });
        assert_eq!(ramp.capacity(), 10.0);
        for _ in 0..100 {
            ramp.observe(Load { arrivals: 0.1, execution: 100.0 });
        }
        assert_eq!(ramp.capacity(), 1.0, "a node that aggregates nothing is none");
    }

    #[test]
    fn a_quiet_time_and_nonsense_say_nothing() {
        let mut ramp = Ramp::new(20.0);
        ramp.observe(Load { arrivals: 100.0, execution: EXECUTION });
        assert_eq!(ramp.capacity(), 50.0, "what was no trouble is possible");
        for load in
            [Load::default(), Load { arrivals: 2.0, execution: EXECUTION }, Load { arrivals: f64::NAN, execution: 1.0 }]
        {
            ramp.observe(load);
            assert_eq!(ramp.capacity(), 50.0, "{load:?}");
        }
        assert_eq!(Ramp::new(f64::NAN).capacity(), 1.0);
    }

    #[test]
    fn what_one_node_shows_holds_for_its_kind() {
        let mut kinds = Kinds::new(20.0);
        kinds.observe("64 cores", Load { arrivals: 100.0, execution: EXECUTION });
        assert_eq!((kinds.capacity("64 cores"), kinds.capacity("2 cores")), (50.0, 20.0));
        kinds.observe("2 cores", Load { arrivals: 2.0, execution: EXECUTION });
        kinds.observe("2 cores", Load { arrivals: 4.0, execution: 40.0 });
        assert_eq!((kinds.capacity("64 cores"), kinds.capacity("2 cores")), (50.0, 10.0));
    }
}
