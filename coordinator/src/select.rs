//! Who trains: the least often selected first, ties by lot.
//!
//! Pure and seeded, so that a round's selection can be told again from its seed.

use std::collections::{BTreeMap, BTreeSet};

/// Chooses up to `count` of `candidates`; `picked` says how often each was selected before.
#[must_use]
pub fn select(candidates: &BTreeSet<String>, picked: &BTreeMap<String, u32>, count: usize, seed: u64) -> Vec<String> {
    let mut lot = Lot(seed);
    let mut order: Vec<(u32, u64, &String)> =
        candidates.iter().map(|name| (picked.get(name).copied().unwrap_or(0), lot.next(), name)).collect();
    order.sort_unstable();
    order.into_iter().take(count).map(|(_, _, name)| name.clone()).collect()
}

/// `SplitMix64`: well mixed from any seed, and no dependency's version can change it.
struct Lot(u64);

// === impl Lot ===

impl Lot {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(n: usize) -> BTreeSet<String> {
        (0..n).map(|i| format!("c{i:03}")).collect()
    }

    #[test]
    fn the_same_seed_selects_the_same_clients_and_another_one_others() {
        let (all, never) = (names(100), BTreeMap::new());
        assert_eq!(select(&all, &never, 26, 7), select(&all, &never, 26, 7));
        assert_ne!(select(&all, &never, 26, 7), select(&all, &never, 26, 8));
        assert_eq!(select(&all, &never, 200, 1).len(), 100);
        assert!(select(&BTreeSet::new(), &never, 3, 1).is_empty());
    }

    #[test]
    fn nobody_is_selected_twice_more_than_anybody_else() {
        let all = names(37);
        for seed in 0..20 {
            let mut picked = BTreeMap::new();
            for round in 0..50 {
                for name in select(&all, &picked, 11, seed * 1000 + round) {
                    *picked.entry(name).or_insert(0) += 1;
                }
                let counts: Vec<u32> = all.iter().map(|n| picked.get(n).copied().unwrap_or(0)).collect();
                let (min, max) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
                assert!(max - min <= 1, "{counts:?}");
            }
        }
    }

    #[test]
    fn ties_are_broken_by_lot_not_by_name() {
        let all = names(10);
        let mut first = BTreeSet::new();
        for seed in 0..200 {
            first.extend(select(&all, &BTreeMap::new(), 1, seed));
        }
        assert_eq!(first.len(), 10, "some client is never first");
    }
}
