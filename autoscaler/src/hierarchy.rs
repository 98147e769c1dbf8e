//! Load of a node, the tree of aggregators that it asks for, and when that is asked again (paper, 5.2).

use std::time::Duration;

use lifl_api::event::PlanCause;

/// Weight of what was estimated before.
pub const HISTORY: f64 = 0.7;
/// Time between two plans while no round begins (paper, 6.1).
pub const PERIOD: Duration = Duration::from_secs(120);
/// Part of an update that is rounding: sums and products of floats end a little above what they are.
const ROUNDING: f64 = 1e-6;

/// What a node's counters say of an interval.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// `k`: updates a second that arrived.
    pub arrivals: f64,
    /// `E`: seconds that it takes to aggregate one.
    pub execution: f64,
}

/// Smoothed length of a node's queue.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimator {
    queue: Option<f64>,
}

/// When to plan again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cycle {
    last: Option<Duration>,
}

/// Aggregators of one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// They take updates.
    pub leaves: u32,
    /// One takes what leaves have made; without it the only leaf's partial goes up as it is.
    pub middle: bool,
}

// === impl Load ===

impl Load {
    /// `Q = k·E`: updates that are there at once (Little's law). Counters that say nonsense say nothing.
    #[must_use]
    pub fn queue(self) -> f64 {
        let queue = self.arrivals * self.execution;
        if queue.is_finite() { queue.max(0.0) } else { 0.0 }
    }
}

// === impl Estimator ===

impl Estimator {
    /// Takes in an interval: `Q = a·Q(before) + (1 - a)·Q(now)`; the first one is taken as it is.
    pub fn observe(&mut self, load: Load) -> f64 {
        let now = load.queue();
        let queue = self.queue.map_or(now, |before| HISTORY * before + (1.0 - HISTORY) * now);
        self.queue = Some(queue);
        queue
    }

    /// As estimated last; nothing has been seen yet: 0.
    #[must_use]
    pub fn queue(&self) -> f64 {
        self.queue.unwrap_or_default()
    }
}

// === impl Cycle ===

impl Cycle {
    /// Why to plan at `now`, if there is a reason: `happened` since the last call, or [`PERIOD`] is over. A clock that has jumped
    /// back begins the period anew: it neither stops planning nor makes it wild.
    pub fn due(&mut self, happened: Option<PlanCause>, now: Duration) -> Option<PlanCause> {
        let last = self.last.filter(|last| *last <= now);
        let cause = match last {
            Some(last) if now - last < PERIOD => happened,
            Some(_) => happened.or(Some(PlanCause::Period)),
            None => happened,
        };
        if cause.is_some() || last.is_none() {
            self.last = Some(now);
        }
        cause
    }
}

// === impl Shape ===

impl Shape {
    /// For `queue` updates at once (the paper's `Q`), `fan_in` of them to a leaf (its `I`): `Q / I` leaves, rounded up, at most
    /// `most`, and a middle where there is something to put together.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is not negative")]
    pub fn new(queue: f64, fan_in: u32, most: u32) -> Self {
        let wanted = ((queue - ROUNDING) / f64::from(fan_in.max(1))).ceil() as u32;
        let leaves = wanted.min(most.max(1));
        Self { leaves, middle: leaves > 1 }
    }

    /// All of them.
    #[must_use]
    pub fn aggregators(self) -> u32 {
        self.leaves + u32::from(self.middle)
    }
}

/// The node of the top: where most of the updates are, so that least has to come to it. Of equals the first.
#[must_use]
pub fn top(updates: &[u32]) -> Option<usize> {
    let largest = updates.iter().copied().max().filter(|most| *most > 0)?;
    updates.iter().position(|count| *count == largest)
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "what comes without rounding is compared as it is")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn history_weighs_seven_tenths() {
        let mut estimator = Estimator::default();
        assert_eq!(estimator.observe(Load { arrivals: 10.0, execution: 2.0 }), 20.0, "the first one as it is");
        let second = estimator.observe(Load { arrivals: 5.0, execution: 2.0 });
        assert!((second - (0.7 * 20.0 + 0.3 * 10.0)).abs() < 1e-12, "{second}");
        assert_eq!(estimator.queue(), second);
    }

    #[test]
    fn nonsense_is_no_load() {
        for (arrivals, execution) in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (-3.0, 1.0), (f64::MAX, f64::MAX)] {
            assert_eq!(Load { arrivals, execution }.queue(), 0.0, "{arrivals} {execution}");
        }
    }

    /// The paper's testbed: 20 updates at once on a node, two to a leaf.
    #[test]
    fn a_full_node_has_ten_leaves_and_a_middle() {
        assert_eq!(Shape::new(20.0, 2, 64), Shape { leaves: 10, middle: true });
        assert_eq!(Shape::new(20.1, 2, 64).leaves, 11, "rounded up");
        assert_eq!(Shape::new(2.0, 2, 64), Shape { leaves: 1, middle: false });
        assert_eq!(Shape::new(0.0, 2, 64), Shape { leaves: 0, middle: false });
        assert_eq!(Shape::new(f64::MAX, 0, 4).leaves, 4);
    }

    #[test]
    fn rounding_is_no_update() {
        let queue = 0.1 * 3.0 * 20.0;
        assert!(queue > 6.0);
        assert_eq!(Shape::new(queue, 2, 64).leaves, 3);
        assert_eq!(Shape::new(f64::NAN, 2, 64).leaves, 0);
    }

    #[test]
    fn plans_are_made_when_a_round_begins_and_every_two_minutes() {
        let at = Duration::from_secs;
        let mut cycle = Cycle::default();
        let (round, period) = (Some(PlanCause::RoundStarted), Some(PlanCause::Period));
        assert_eq!(cycle.due(None, at(1000)), None, "nothing is known yet");
        assert_eq!(cycle.due(None, at(1119)), None);
        assert_eq!(cycle.due(None, at(1120)), period);
        assert_eq!(cycle.due(round, at(1130)), round);
        assert_eq!(cycle.due(None, at(1249)), None, "two minutes after the last plan, whatever made it");
        assert_eq!(cycle.due(round, at(1250)), round, "the round is what is told");
        assert_eq!(cycle.due(None, at(5)), None, "the clock jumped back");
        assert_eq!(cycle.due(round, at(6)), round);
        assert_eq!(cycle.due(None, at(126)), period);
        assert_eq!(cycle.due(None, Duration::MAX), period, "and ahead");
        assert_eq!(cycle.due(None, Duration::MAX), None);
    }

    #[test]
    fn the_top_is_where_most_is() {
        assert_eq!(top(&[3, 20, 20, 7]), Some(1));
        assert_eq!(top(&[0, 0]), None);
        assert_eq!(top(&[]), None);
    }

    proptest! {
        #[test]
        fn an_estimate_lies_between_what_was_seen(loads in prop::collection::vec((0.0..1e3, 0.0..1e2), 1..50)) {
            let mut estimator = Estimator::default();
            let seen: Vec<f64> = loads.iter().map(|&(k, e): &(f64, f64)| k * e).collect();
            let last = loads.iter().map(|(arrivals, execution)| {
                estimator.observe(Load { arrivals: *arrivals, execution: *execution })
            }).last().unwrap_or_default();
            let (least, most) = seen.iter().fold((f64::MAX, 0.0_f64), |(a, b), q| (a.min(*q), b.max(*q)));
            prop_assert!(last >= least - 1e-9 && last <= most + 1e-9);
        }
    }
}
