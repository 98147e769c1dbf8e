//! What a bench found: figures that promises are held against, and the raw series behind them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    path::Path,
};

use anyhow::Context as _;
use serde::Serialize;

use crate::plot::{Bar, draw};

/// The schema that the JSON form names.
const SCHEMA: &str = "lifl.dev/bench/v1";

/// What a bench found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    schema: &'static str,
    bench: &'static str,
    /// Medians by name; mostly ratios of what was measured in the same round.
    figures: BTreeMap<String, f64>,
    raw: Raw,
}

#[derive(Debug, Default, Serialize)]
struct Raw {
    /// What was measured, on what, with which versions.
    notes: BTreeMap<String, String>,
    series: BTreeMap<String, Series>,
}

/// One value per round.
#[derive(Debug, Serialize)]
struct Series {
    unit: &'static str,
    median: f64,
    /// (largest - smallest) / median.
    spread: f64,
    rounds: Vec<f64>,
}

// === impl Report ===

impl Report {
    pub(crate) fn new(bench: &'static str) -> Self {
        Self { schema: SCHEMA, bench, figures: BTreeMap::new(), raw: Raw::default() }
    }

    pub(crate) fn note(&mut self, name: &str, text: impl Into<String>) {
        self.raw.notes.insert(name.to_owned(), text.into());
    }

    /// Keeps a series, one value per round.
    pub(crate) fn series(&mut self, name: &str, unit: &'static str, rounds: Vec<f64>) {
        let series = Series { unit, median: median(&rounds), spread: spread(&rounds), rounds };
        self.raw.series.insert(name.to_owned(), series);
    }

    /// Keeps a series and promises its median as a figure.
    pub(crate) fn figure(&mut self, name: &str, unit: &'static str, rounds: Vec<f64>) {
        self.figures.insert(name.to_owned(), median(&rounds));
        self.series(name, unit, rounds);
    }

    pub(crate) fn print(&self, out: &mut impl Write) -> anyhow::Result<()> {
        for (name, text) in &self.raw.notes {
            writeln!(out, "{name}: {text}")?;
        }
        writeln!(out, "{:<44} {:>10} {:>8}  unit", "", "median", "spread")?;
        let (figures, rest): (Vec<_>, Vec<_>) =
            self.raw.series.iter().partition(|(name, _)| self.figures.contains_key(*name));
        for (mark, series) in [("*", figures), (" ", rest)] {
            for (name, series) in series {
                let Series { unit, median, spread, .. } = series;
                writeln!(out, "{mark} {name:<42} {median:>10.3} {:>7.0}%  {unit}", spread * 100.0)?;
            }
        }
        Ok(())
    }

    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        serde_json::to_writer_pretty(file, self)?;
        Ok(())
    }

    /// Writes all series as bars, figures first.
    pub(crate) fn draw(&self, path: &Path) -> anyhow::Result<()> {
        let mut bars = Vec::new();
        for (name, series) in &self.raw.series {
            let (range, figure) = (range(&series.rounds), self.figures.contains_key(name));
            bars.push(Bar { name, unit: series.unit, value: series.median, range, figure });
        }
        bars.sort_by_key(|bar| !bar.figure);
        fs::write(path, draw(self.bench, &bars)).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The middle value; of an even number the mean of the two.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

fn spread(values: &[f64]) -> f64 {
    let (low, high) = range(values);
    if high > low { (high - low) / median(values) } else { 0.0 }
}

fn range(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(*x), high.max(*x)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-12);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-12);
        assert!(median(&[]).is_nan());
        assert!((spread(&[1.0, 2.0, 3.0]) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_json_form_is_what_readers_expect() {
        let mut report = Report::new("x");
        report.figure("a", "x", vec![1.0, 3.0, 2.0]);
        report.series("b", "ms", vec![1.0]);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["schema"], "lifl.dev/bench/v1");
        assert_eq!(json["figures"], serde_json::json!({"a": 2.0}));
        assert_eq!(json["raw"]["series"]["a"]["rounds"], serde_json::json!([1.0, 3.0, 2.0]));
        assert_eq!(json["raw"]["series"]["b"]["unit"], "ms");
    }
}
