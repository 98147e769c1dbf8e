//! What an aggregator holds of a round, and what it does next.

use std::collections::{HashSet, VecDeque};

use lifl_ebpf_common::{Descriptor, descriptor::ObjectKey};

/// The aggregator's own sum so far, sealed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Held {
    /// Its object.
    pub key: ObjectKey,
    /// Client updates contained.
    pub count: u32,
    /// Sum of their weights.
    pub weight: f64,
}

/// What an aggregator holds of a round.
#[derive(Clone, Debug, Default)]
pub struct Round {
    /// The round; a descriptor of a later one begins anew.
    pub number: u32,
    /// Inputs not folded yet, in the order they came.
    pub queue: VecDeque<Descriptor>,
    /// The sum of what was folded.
    pub current: Option<Held>,
    /// Client updates that the complete sum contains; known when the round is closed.
    pub expected: Option<u32>,
    /// The model that the round began with, as it was sent last (top only).
    pub base: Option<Descriptor>,
    /// The result was sent.
    pub complete: bool,
    seen: HashSet<ObjectKey>,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Wait.
    Wait,
    /// Fold the first `inputs` of the queue into the next sum.
    Fold {
        /// How many.
        inputs: usize,
        /// With them the sum is complete.
        last: bool,
    },
    /// The sum is complete as it is.
    Finish,
}

/// What to do next: eager takes what is there, up to `batch`; lazy waits until all is there and takes it in one pass.
#[must_use]
pub fn decide(round: &Round, eager: bool, batch: usize) -> Step {
    if round.complete {
        return Step::Wait;
    }
    let contained = round.current.map_or(0, |c| c.count);
    let counts = |inputs: usize| round.queue.iter().take(inputs).map(|d| u64::from(d.count)).sum::<u64>();
    let all = round.queue.len();
    let reached =
        |count: u64| round.expected.is_some_and(|expected| u64::from(contained) + count >= u64::from(expected));
    match (all, eager) {
        (0, _) if reached(0) && contained > 0 => Step::Finish,
        (0, _) => Step::Wait,
        (_, false) if reached(counts(all)) => Step::Fold { inputs: all, last: true },
        (_, false) => Step::Wait,
        (_, true) => {
            let inputs = all.min(batch.max(1));
            Step::Fold { inputs, last: reached(counts(inputs)) }
        }
    }
}

// === impl Round ===

impl Round {
    /// Begins round `number` if it is later than the one held. Returns whether it did.
    pub fn advance(&mut self, number: u32) -> bool {
        let later = number > self.number;
        if later {
            // The model that a round begins with is sent before anything else of it.
            *self = Self { number, base: self.base, ..Self::default() };
        }
        later
    }

    /// Queues an input, unless it came before: after the death of its sender or of the gateway it is sent again.
    pub fn push(&mut self, input: Descriptor) -> bool {
        let fresh = input.round == self.number && self.seen.insert(input.key());
        if fresh {
            self.queue.push_back(input);
        }
        fresh
    }

    /// Notes a sum of this function's own: a restarted gateway sends it, as to a successor, and it must not be added to itself.
    pub fn know(&mut self, own: ObjectKey) {
        self.seen.insert(own);
    }

    /// Takes the inputs of a [`Step::Fold`].
    pub fn take(&mut self, inputs: usize) -> Vec<Descriptor> {
        self.queue.drain(..inputs.min(self.queue.len())).collect()
    }

    /// Puts inputs back that could not be folded now.
    pub fn put_back(&mut self, inputs: Vec<Descriptor>) {
        inputs.into_iter().rev().for_each(|input| self.queue.push_front(input));
    }
}

#[cfg(test)]
mod tests {
    use lifl_ebpf_common::Kind;

    use super::*;

    fn input(slot: u32, count: u32) -> Descriptor {
        Descriptor { round: 1, slot, count, ..Descriptor::new(Kind::Update, 1, 16) }
    }

    fn round(inputs: &[u32], current: u32, expected: Option<u32>) -> Round {
        let mut round = Round::default();
        round.advance(1);
        (0..).zip(inputs).for_each(|(slot, count)| assert!(round.push(input(slot, *count))));
        round.current = (current > 0).then_some(Held { key: ObjectKey::default(), count: current, weight: 1.0 });
        round.expected = expected;
        round
    }

    #[test]
    fn eager_takes_what_is_there_and_lazy_waits_for_all() {
        let table = [
            (&[][..], 0, None, true, Step::Wait),
            (&[1], 0, None, true, Step::Fold { inputs: 1, last: false }),
            (&[1, 1, 1], 0, None, true, Step::Fold { inputs: 2, last: false }),
            (&[1, 1, 1], 0, Some(3), true, Step::Fold { inputs: 2, last: false }),
            (&[1], 2, Some(3), true, Step::Fold { inputs: 1, last: true }),
            (&[], 3, Some(3), true, Step::Finish),
            (&[], 0, Some(0), true, Step::Wait),
            (&[], 2, Some(3), true, Step::Wait),
            (&[1, 1], 0, None, false, Step::Wait),
            (&[1, 1], 0, Some(3), false, Step::Wait),
            (&[1, 1, 1], 0, Some(3), false, Step::Fold { inputs: 3, last: true }),
            (&[4, 3], 0, Some(7), false, Step::Fold { inputs: 2, last: true }),
        ];
        for (inputs, current, expected, eager, want) in table {
            assert_eq!(
                decide(&round(inputs, current, expected), eager, 2),
                want,
                "{inputs:?} {current} {expected:?} {eager}"
            );
        }
    }

    #[test]
    fn what_came_before_and_what_is_of_another_round_is_dropped() {
        let mut round = round(&[1, 1], 0, None);
        assert!(!round.push(input(0, 1)));
        let taken = round.take(2);
        assert!(!round.push(input(1, 1)), "a folded input stays known");
        round.put_back(taken);
        assert_eq!(round.queue.iter().map(|d| d.slot).collect::<Vec<_>>(), [0, 1]);
        round.know(input(6, 1).key());
        assert!(!round.push(input(6, 2)), "an own sum is no input");
        assert!(!round.push(Descriptor { round: 2, ..input(5, 1) }));
        assert!(round.advance(2) && !round.advance(2) && !round.advance(1));
        assert!(round.queue.is_empty() && round.push(Descriptor { round: 2, ..input(0, 1) }));
    }
}
