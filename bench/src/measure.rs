//! Measuring: time and processor time of this process and its children, and opponents that take turns.
//!
//! Contestants run one after the other, and all of them again in the next round, so that whatever else the machine does meets each
//! alike; [`Rounds`] keeps what they cost, and ratios are taken within a round.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::time::{ClockId, clock_gettime};

/// What something cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// On the wall.
    pub(crate) wall: Duration,
    /// Processor time of this process, kernel included, all threads.
    pub(crate) cpu: Duration,
    /// Processor time of children that ended and were waited for, in ticks of 10 ms.
    pub(crate) children: Duration,
    /// Pages that were touched for the first time by this process.
    pub(crate) faults: u64,
}

/// Runs `work` and tells what it cost.
pub(crate) fn cost<T>(work: impl FnOnce() -> T) -> anyhow::Result<(T, Cost)> {
    let before = Usage::now()?;
    let start = Instant::now();
    let result = work();
    let wall = start.elapsed();
    let after = Usage::now()?;
    let cost = Cost {
        wall,
        cpu: after.cpu.saturating_sub(before.cpu),
        children: after.children.saturating_sub(before.children),
        faults: after.faults - before.faults,
    };
    Ok((result, cost))
}

#[derive(Clone, Copy, Debug)]
struct Usage {
    cpu: Duration,
    children: Duration,
    faults: u64,
}

/// Series of values by name, one value per round.
#[derive(Debug, Default)]
pub(crate) struct Rounds(BTreeMap<String, Vec<f64>>);

// === impl Cost ===

impl Cost {
    /// Milliseconds on the wall.
    pub(crate) fn wall_ms(&self) -> f64 {
        self.wall.as_secs_f64() * 1e3
    }

    /// Milliseconds of processor time, children included.
    pub(crate) fn cpu_ms(&self) -> f64 {
        (self.cpu + self.children).as_secs_f64() * 1e3
    }
}

// === impl Usage ===

impl Usage {
    fn now() -> anyhow::Result<Self> {
        let stat = fs::read_to_string("/proc/self/stat").context("cannot read /proc/self/stat")?;
        // The name in parentheses may hold anything; after it stands the state, field 3 of proc(5).
        let (_, fields) = stat.rsplit_once(')').context("unknown form of /proc/self/stat")?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let field = |number: usize| -> anyhow::Result<u64> {
            Ok(fields.get(number - 3).context("short /proc/self/stat")?.parse()?)
        };
        let ticks = field(16)? + field(17)?;
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        Ok(Self {
            cpu: Duration::try_from(cpu).context("the process clock ran backwards")?,
            children: Duration::from_millis(1000 * ticks / rustix::param::clock_ticks_per_second()),
            faults: field(10)?,
        })
    }
}

// === impl Rounds ===

impl Rounds {
    /// Keeps this round's value.
    pub(crate) fn push(&mut self, name: impl Into<String>, value: f64) {
        self.0.entry(name.into()).or_default().push(value);
    }

    /// All rounds of one series.
    pub(crate) fn series(&self, name: &str) -> anyhow::Result<&[f64]> {
        self.0.get(name).map(Vec::as_slice).with_context(|| format!("nothing was measured as {name}"))
    }

    /// Round by round, one series divided by another.
    pub(crate) fn ratio(&self, over: &str, under: &str) -> anyhow::Result<Vec<f64>> {
        Ok(self.series(over)?.iter().zip(self.series(under)?).map(|(over, under)| over / under).collect())
    }

    /// All series, by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &[f64])> {
        self.0.iter().map(|(name, series)| (name.as_str(), series.as_slice()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_costs_processor_time_and_children_are_counted() {
        let (sum, cost) = cost(|| (0..50_000_000_u64).fold(0, |sum, x| std::hint::black_box(sum ^ x))).unwrap();
        std::hint::black_box(sum);
        assert!(cost.cpu > Duration::ZERO);
        let (status, cost) = super::cost(|| {
            std::process::Command::new("sh").args(["-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done"]).status()
        })
        .unwrap();
        assert!(status.unwrap().success());
        assert!(cost.children > Duration::ZERO);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let mut rounds = Rounds::default();
        for (a, b) in [(2.0, 1.0), (9.0, 3.0)] {
            rounds.push("a", a);
            rounds.push("b", b);
        }
        assert_eq!(rounds.ratio("a", "b").unwrap(), [2.0, 3.0]);
        assert!(rounds.series("c").is_err());
    }
}
