//! What clients and evaluators measured of the global model, within bounds whatever they send.

use std::collections::{BTreeMap, BTreeSet};

use lifl_api::event::{MAX_METRIC_NAME, MAX_METRICS, MetricsData};

/// What clients and evaluators measured of one model.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    round: u32,
    names: BTreeSet<String>,
    clients: BTreeMap<String, MetricsData>,
    evaluators: BTreeMap<String, MetricsData>,
}

/// What became of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    /// It speaks of another model than the current one.
    Late,
    /// It counts, without so many of its figures.
    Counts {
        /// Figures left out: not finite, or with a name too long or too many.
        dropped: usize,
    },
}

// === impl Figures ===

impl Figures {
    /// Takes in what was measured of the model of `current`; figures of other models are too late. The name that decides
    /// has its place whatever else is sent.
    pub(crate) fn note(
        &mut self,
        current: u32,
        client: String,
        evaluator: bool,
        mut data: MetricsData,
        decisive: Option<&str>,
    ) -> Noted {
        if data.round != current {
            return Noted::Late;
        }
        if self.round != current {
            *self = Self { round: current, ..Self::default() };
        }
        let sent = data.metrics.len();
        data.metrics.retain(|name, value| value.is_finite() && self.admits(name, decisive));
        let dropped = sent - data.metrics.len();
        // One report per client: its role may have changed.
        let (of, other) = if evaluator {
            (&mut self.evaluators, &mut self.clients)
        } else {
            (&mut self.clients, &mut self.evaluators)
        };
        other.remove(&client);
        of.insert(client, data);
        Noted::Counts { dropped }
    }

    fn admits(&mut self, name: &str, decisive: Option<&str>) -> bool {
        if self.names.contains(name) {
            return true;
        }
        let kept = decisive.is_some_and(|d| d != name && !self.names.contains(d));
        if name.is_empty() || name.len() > MAX_METRIC_NAME || self.names.len() + usize::from(kept) >= MAX_METRICS {
            return false;
        }
        self.names.insert(name.to_owned())
    }

    /// Which of these evaluators have not told this figure of the model of `round`.
    pub(crate) fn missing<'a>(
        &'a self,
        round: u32,
        evaluators: &'a BTreeSet<String>,
        metric: &'a str,
    ) -> impl Iterator<Item = &'a String> {
        let told = move |name: &String| self.evaluators.get(name).is_some_and(|data| data.metrics.contains_key(metric));
        evaluators.iter().filter(move |name| self.round != round || !told(name))
    }

    /// Each figure as the mean weighted by samples: of the evaluators where there are any, else of the clients.
    pub(crate) fn means(&self) -> BTreeMap<String, f64> {
        let mut means = means_of(&self.clients);
        means.extend(means_of(&self.evaluators));
        means
    }

    /// The figure that decides: an evaluator's, or that of at least `min` clients (one lucky client is not the job).
    pub(crate) fn decisive(&self, metric: &str, min: u32) -> Option<f64> {
        let reports =
            |of: &BTreeMap<String, MetricsData>| of.values().filter(|d| d.metrics.contains_key(metric)).count();
        if reports(&self.evaluators) == 0 && reports(&self.clients) < usize::try_from(min).unwrap_or(usize::MAX) {
            return None;
        }
        self.means().get(metric).copied()
    }
}

#[expect(clippy::cast_precision_loss, reason = "samples are weights of a mean")]
fn means_of(reports: &BTreeMap<String, MetricsData>) -> BTreeMap<String, f64> {
    let mut means: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for data in reports.values() {
        // An evaluator need not count its samples.
        let weight = data.samples.max(1) as f64;
        for (name, value) in &data.metrics {
            let (mean, weights) = means.entry(name).or_default();
            *weights += weight;
            *mean = towards(*mean, *value, weight / *weights);
        }
    }
    means.into_iter().map(|(name, (mean, _))| (name.to_owned(), mean)).collect()
}

/// The point between two finite numbers at `share` of the way: finite, because a sum of `value * weight` need not be.
fn towards(mean: f64, value: f64, share: f64) -> f64 {
    let way = value - mean;
    let next = if way.is_finite() { way.mul_add(share, mean) } else { mean * (1.0 - share) + value * share };
    next.clamp(f64::MIN, f64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report<const N: usize>(samples: u64, metrics: [(&str, f64); N]) -> MetricsData {
        let metrics = metrics.map(|(name, value)| (name.to_owned(), value)).into();
        MetricsData { round: 0, samples, metrics }
    }

    #[test]
    fn means_are_finite_whatever_the_weights() {
        let largest = f64::MAX;
        for (values, mean) in [
            ([1e308, 1e308, 1e308], 1e308),
            ([largest, largest, largest], largest),
            ([-largest, -largest, -largest], -largest),
            ([0.95, 0.95, 0.95], 0.95),
            ([largest, -largest, 0.0], 0.0),
        ] {
            for samples in [0, 1, 1_000_000, u64::MAX] {
                let mut figures = Figures::default();
                for (i, value) in values.into_iter().enumerate() {
                    figures.note(0, format!("c{i}"), false, report(samples, [("accuracy", value)]), None);
                }
                let found = figures.means()["accuracy"];
                assert!(found.is_finite(), "{values:?} {samples}");
                assert!((found / 1e16 - mean / 1e16).abs() <= largest / 1e31, "{values:?} {samples}: {found}");
            }
        }
        let mut figures = Figures::default();
        figures.note(0, "a".into(), false, report(10, [("loss", 0.99)]), None);
        figures.note(0, "b".into(), false, report(30, [("loss", 0.5)]), None);
        assert!((figures.means()["loss"] - 0.6225).abs() < 1e-12);
    }

    #[test]
    fn what_is_not_finite_neither_counts_nor_decides() {
        let mut figures = Figures::default();
        for (client, value) in [("a", f64::INFINITY), ("b", f64::NAN), ("c", f64::NEG_INFINITY)] {
            let noted = figures.note(0, client.into(), false, report(1, [("accuracy", value)]), Some("accuracy"));
            assert_eq!(noted, Noted::Counts { dropped: 1 });
        }
        assert_eq!((figures.decisive("accuracy", 1), figures.means().len()), (None, 0));
    }

    #[test]
    fn names_and_reports_are_bounded_and_the_decisive_name_has_its_place() {
        let mut figures = Figures::default();
        let long = "x".repeat(MAX_METRIC_NAME + 1);
        for client in 0..100 {
            let mut data = report(1, [(long.as_str(), 0.5), ("", 0.5)]);
            data.metrics.extend((0..1000).map(|i| (format!("{client}-{i}"), 0.5)));
            figures.note(0, format!("c{client}"), client % 2 == 0, data, Some("zeta"));
        }
        assert_eq!(figures.means().len(), MAX_METRICS - 1);
        for evaluator in [false, true, false] {
            let noted =
                figures.note(0, "last".into(), evaluator, report(1, [("zeta", 0.5), ("eta", 0.5)]), Some("zeta"));
            assert_eq!(noted, Noted::Counts { dropped: 1 });
        }
        let means = figures.means();
        assert!(means.len() == MAX_METRICS && means.contains_key("zeta"));
        assert_eq!(figures.clients.len() + figures.evaluators.len(), 101, "a client reports once");
        assert!(figures.decisive("zeta", 1).is_some());
        // The next model's figures begin anew.
        let data = MetricsData { round: 1, ..report(1, [("eta", 0.5)]) };
        assert_eq!(figures.note(1, "last".into(), false, data, Some("zeta")), Noted::Counts { dropped: 0 });
        assert_eq!(figures.note(1, "last".into(), false, report(1, []), None), Noted::Late);
    }
}
