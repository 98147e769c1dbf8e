//! Histograms that requests add to without a lock, in the text format of Prometheus.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU64, Ordering},
};

/// Where buckets end.
#[derive(Debug)]
pub struct Scale {
    /// Upper bounds, in what is added.
    bounds: &'static [u64],
    /// The same as labels.
    labels: &'static [&'static str],
    /// What is added, per unit of the sum as it is shown.
    per_unit: u64,
}

/// Seconds, added as nanoseconds, with OpenTelemetry's bounds for the durations of HTTP.
pub static DURATIONS: Scale = Scale {
    bounds: &[
        5_000_000,
        10_000_000,
        25_000_000,
        50_000_000,
        75_000_000,
        100_000_000,
        250_000_000,
        500_000_000,
        750_000_000,
        1_000_000_000,
        2_500_000_000,
        5_000_000_000,
        7_500_000_000,
        10_000_000_000,
    ],
    labels: &["0.005", "0.01", "0.025", "0.05", "0.075", "0.1", "0.25", "0.5", "0.75", "1", "2.5", "5", "7.5", "10"],
    per_unit: 1_000_000_000,
};

/// Bytes, with the bounds that OpenTelemetry's SDKs use where nobody names any.
pub static SIZES: Scale = Scale {
    bounds: &[0, 5, 10, 25, 50, 75, 100, 250, 500, 750, 1_000, 2_500, 5_000, 7_500, 10_000],
    labels: &["0", "5", "10", "25", "50", "75", "100", "250", "500", "750", "1000", "2500", "5000", "7500", "10000"],
    per_unit: 1,
};

/// How often values fell between bounds; the last bucket has no bound.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    scale: &'static Scale,
    buckets: [AtomicU64; N],
    sum: AtomicU64,
}

/// Of [`DURATIONS`].
pub type Durations = Histogram<15>;
/// Of [`SIZES`].
pub type Sizes = Histogram<16>;

/// What a histogram held when it was read; several can be added up.
#[derive(Clone, Debug)]
pub struct Counts<const N: usize> {
    scale: &'static Scale,
    buckets: [u64; N],
    sum: u64,
}

/// A label's value, as it stands between quotes.
#[must_use]
pub fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

// === impl Scale ===

impl Scale {
    /// Upper bounds as they are shown.
    #[expect(clippy::cast_precision_loss, reason = "bounds have few digits")]
    pub fn shown(&self) -> impl Iterator<Item = f64> {
        self.bounds.iter().map(|bound| *bound as f64 / self.per_unit as f64)
    }
}

// === impl Histogram ===

impl<const N: usize> Histogram<N> {
    /// Nothing has been added. `scale` has one bound less than there are buckets.
    #[must_use]
    pub fn new(scale: &'static Scale) -> Self {
        Self { scale, buckets: std::array::from_fn(|_| AtomicU64::new(0)), sum: AtomicU64::new(0) }
    }

    /// Adds a value: two atomic additions.
    pub fn add(&self, value: u64) {
        let at = self.scale.bounds.iter().position(|bound| value <= *bound).unwrap_or(N - 1);
        if let Some(bucket) = self.buckets.get(at) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// What it holds.
    #[must_use]
    pub fn read(&self) -> Counts<N> {
        let buckets = std::array::from_fn(|at| self.buckets[at].load(Ordering::Relaxed));
        Counts { scale: self.scale, buckets, sum: self.sum.load(Ordering::Relaxed) }
    }
}

// === impl Counts ===

impl<const N: usize> Counts<N> {
    /// How many values were added.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Their sum, as it is shown.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "Prometheus knows floats only")]
    pub fn sum(&self) -> f64 {
        self.sum as f64 / self.scale.per_unit as f64
    }

    /// How many values were at most each bound, and the bound; the one without a bound is left out.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let sums = self.buckets.iter().scan(0_u64, |sum, bucket| {
            *sum += bucket;
            Some(*sum)
        });
        self.scale.shown().zip(sums)
    }

    /// Adds another one's counts.
    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.buckets.iter_mut().zip(other.buckets) {
            *sum += more;
        }
        self.sum += other.sum;
    }

    /// Writes its series. `labels` are written, with a comma behind each.
    pub fn write(&self, out: &mut String, name: &str, labels: &str) {
        let mut sum = 0;
        for (bucket, le) in self.buckets.iter().zip(self.scale.labels.iter().copied().chain(["+Inf"])) {
            sum += bucket;
            let _to_a_string = writeln!(out, "{name}_bucket{{{labels}le=\"{le}\"}} {sum}");
        }
        let labels = labels.trim_end_matches(',');
        let _to_a_string = writeln!(out, "{name}_sum{{{labels}}} {}", self.sum());
        let _to_a_string = writeln!(out, "{name}_count{{{labels}}} {sum}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_at_a_bound_is_below_it_and_buckets_grow() {
        assert_eq!(DURATIONS.bounds.len(), DURATIONS.labels.len());
        assert_eq!(SIZES.bounds.len(), SIZES.labels.len());
        let histogram = Durations::new(&DURATIONS);
        for value in [5_000_000, 5_000_001, 10_000_000_001] {
            histogram.add(value);
        }
        let counts = histogram.read();
        let below: Vec<u64> = counts.cumulative().map(|(_, count)| count).collect();
        assert_eq!((below[0], below[1], below[13], counts.count()), (1, 2, 2, 3));
        for (label, shown) in DURATIONS.labels.iter().zip(DURATIONS.shown()) {
            assert_eq!(label.parse::<f64>().map(f64::to_bits), Ok(shown.to_bits()));
        }
        let mut text = String::new();
        counts.write(&mut text, "d", "a=\"b\",");
        assert!(text.starts_with("d_bucket{a=\"b\",le=\"0.005\"} 1\n"), "{text}");
        assert!(text.ends_with("le=\"+Inf\"} 3\nd_sum{a=\"b\"} 10.010000002\nd_count{a=\"b\"} 3\n"), "{text}");
    }
}
