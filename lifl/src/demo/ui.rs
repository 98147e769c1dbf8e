//! What a person sees of the demo: a bar while a round runs, one line for each committed round, a closing table.
//!
//! Lines go to standard output, so that they can be kept; the bar goes to standard error and only to a terminal.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    io::{self, IsTerminal as _, Write},
    path::Path as File,
    sync::Arc,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::client::Progress;

mod plot;
mod table;

/// Columns from which on a line has room for a bar of accuracy.
const WIDE: u16 = 104;

/// Which way descriptors went between the functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Path {
    /// Redirected in the kernel, from socket to socket.
    Ebpf,
    /// Read and written again by the agent.
    Userspace,
}

/// One committed round.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoundLine {
    /// Its number, from 1.
    pub round: u32,
    /// Of its model on the held-out images; none if it was not measured.
    pub accuracy: Option<f64>,
    /// Updates in its model.
    pub updates: u64,
    /// From opening to committing.
    pub seconds: f64,
    /// Aggregators that fold updates.
    pub leaves: u32,
    /// Aggregators that fold partial sums.
    pub middles: u32,
    /// Aggregators that divide.
    pub tops: u32,
    /// Shared memory of the job at its fullest in this round.
    pub shm_bytes: u64,
    /// Descriptors sent in this round.
    pub descriptors: u64,
    /// Which way they went.
    pub path: Path,
}

/// What came of the whole run.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Accuracy at which the job is done.
    pub goal: f64,
    /// (round, accuracy) as measured; round 0 is the initial model.
    pub measured: Vec<(u32, f64)>,
    /// The committed rounds, in order.
    pub rounds: Vec<RoundLine>,
    /// From opening the first round to the end of the job.
    pub seconds: f64,
    /// User and system time of the platform and of the clients.
    pub cpu_seconds: f64,
    /// Which way descriptors went.
    pub path: Path,
    /// Descriptors sent, all in all.
    pub descriptors: u64,
    /// Updates that the clients were told are safe.
    pub updates_accepted: u64,
    /// Updates in a committed model, from the receipts.
    pub updates_committed: u64,
    /// Shared memory at its fullest.
    pub shm_peak_bytes: u64,
    /// Why the job failed, if it did.
    pub failure: Option<String>,
}

/// What is known before the first round.
#[derive(Clone, Debug)]
pub struct Intro {
    /// Clients in all.
    pub clients: u64,
    /// Updates that make a round.
    pub per_round: u64,
    /// Images the clients share.
    pub training_images: u64,
    /// Images that none of them has.
    pub held_out_images: u64,
    /// Accuracy at which the job is done.
    pub goal: f64,
}

/// The screen.
pub struct Ui {
    out: Box<dyn Write + Send>,
    bar: ProgressBar,
    wide: bool,
    clients: u64,
    per_round: u64,
    joined: u64,
    round: Option<u32>,
    training: BTreeSet<Arc<str>>,
    measured: BTreeMap<u32, f64>,
    /// Committed rounds whose accuracy is still to come: a line is written once.
    waiting: VecDeque<RoundLine>,
    written: Vec<RoundLine>,
}

/// `--json`: what other programs read.
#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    succeeded: bool,
    accuracy: Option<f64>,
    goal: f64,
    rounds: usize,
    seconds: f64,
    cpu_seconds: f64,
    path: Path,
    descriptors: u64,
    updates_accepted: u64,
    updates_committed: u64,
    shm_peak_bytes: u64,
    failure: Option<&'a str>,
    measured: &'a [(u32, f64)],
    history: &'a [RoundLine],
}

// === impl Ui ===

impl Ui {
    /// The screen of this process.
    #[must_use]
    pub fn new(intro: &Intro) -> Self {
        let stdout = io::stdout();
        let wide = stdout.is_terminal() && columns() >= WIDE;
        Self::over(intro, Box::new(stdout), ProgressDrawTarget::stderr(), wide)
    }

    fn over(intro: &Intro, out: Box<dyn Write + Send>, target: ProgressDrawTarget, wide: bool) -> Self {
        let bar = ProgressBar::with_draw_target(Some(intro.clients), target);
        // Both templates are constants that a test renders; a broken one would only cost the bar its looks.
        if let Ok(style) = ProgressStyle::with_template("{prefix:>9}  {bar:30}  {pos:>3}/{len:3}  {wide_msg}") {
            bar.set_style(style.progress_chars("━╸ "));
        }
        bar.set_prefix("joining");
        Self {
            out,
            bar,
            wide,
            clients: intro.clients,
            per_round: intro.per_round,
            joined: 0,
            round: None,
            training: BTreeSet::new(),
            measured: BTreeMap::new(),
            waiting: VecDeque::new(),
            written: Vec::new(),
        }
    }

    /// Says what is about to be seen.
    pub fn intro(&mut self, intro: &Intro) -> io::Result<()> {
        self.write(&table::intro(intro))
    }

    /// Moves the bar, and completes lines with what the evaluator measured.
    pub fn progress(&mut self, progress: &Progress) -> io::Result<()> {
        match progress {
            Progress::Joined { .. } => self.joined += 1,
            Progress::Training { client, round } => {
                self.enter(*round);
                self.training.insert(Arc::clone(client));
            }
            Progress::Accepted { client, round, .. } => {
                self.enter(*round);
                self.training.remove(client);
                self.bar.inc(u64::from(self.round == Some(*round)));
            }
            Progress::Late { client, .. } => {
                self.training.remove(client);
            }
            Progress::Refused { client, round, status, detail } => {
                self.training.remove(client);
                self.note(&format!("round {round}: {client}'s update was refused with {status}: {detail}"));
            }
            Progress::Measured { round, accuracy } => {
                self.measured.insert(*round, *accuracy);
                return self.write_lines(false);
            }
            Progress::Retried { .. } | Progress::Ended { .. } => return Ok(()),
        }
        if self.round.is_some() {
            self.bar.set_message(format!("{} training", self.training.len()));
        } else {
            self.bar.set_position(self.joined.min(self.clients));
        }
        Ok(())
    }

    /// A round was committed. Its line is written as soon as its accuracy is known, here or by a [`Progress::Measured`]
    /// before or after, or when a later model was measured: then it has none.
    pub fn committed(&mut self, line: RoundLine) -> io::Result<()> {
        self.waiting.push_back(line);
        self.write_lines(false)
    }

    /// The lines of all rounds, with their accuracies; writes those that still wait for one.
    pub fn rounds(&mut self) -> io::Result<&[RoundLine]> {
        self.write_lines(true)?;
        Ok(&self.written)
    }

    fn write_lines(&mut self, all: bool) -> io::Result<()> {
        while let Some(mut line) = self.waiting.pop_front() {
            line.accuracy = line.accuracy.or_else(|| self.measured.get(&line.round).copied());
            let passed = self.measured.last_key_value().is_some_and(|(round, _)| *round > line.round);
            if line.accuracy.is_none() && !passed && !all {
                self.waiting.push_front(line);
                return Ok(());
            }
            let mut text = if self.written.is_empty() { table::header() } else { String::new() };
            text += &table::line(&line, self.wide);
            self.written.push(line);
            self.write(&text)?;
        }
        Ok(())
    }

    /// Something that a person should know, on standard error.
    pub fn note(&self, text: &str) {
        self.bar.suspend(|| {
            // If standard error is closed there is nobody to tell.
            drop(writeln!(io::stderr(), "{text}"));
        });
    }

    /// The closing table. `program` is how this binary was called.
    pub fn finish(&mut self, summary: &Summary, program: &str) -> io::Result<()> {
        self.write_lines(true)?;
        self.bar.finish_and_clear();
        self.write(&table::closing(summary, program))
    }

    /// From the first sign of a round on the bar counts its updates.
    fn enter(&mut self, round: u32) {
        if self.round < Some(round) {
            self.round = Some(round);
            self.training.clear();
            self.bar.set_prefix(format!("round {round}"));
            self.bar.set_length(self.per_round);
            self.bar.set_position(0);
        }
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        let out = &mut self.out;
        self.bar.suspend(|| {
            out.write_all(text.as_bytes())?;
            out.flush()
        })
    }
}

impl std::fmt::Debug for Ui {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { clients, joined, round, written, .. } = self;
        f.debug_struct("Ui")
            .field("clients", clients)
            .field("joined", joined)
            .field("round", round)
            .field("written", &written.len())
            .finish_non_exhaustive()
    }
}

// === impl Summary ===

impl Summary {
    /// Accuracy of the last model measured.
    #[must_use]
    pub fn accuracy(&self) -> Option<f64> {
        let last = self.measured.iter().max_by_key(|(round, _)| *round);
        last.map(|&(_, accuracy)| accuracy)
    }

    /// The goal was reached, nothing failed, and every acknowledged update is in a model.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        let reached = self.accuracy().is_some_and(|accuracy| accuracy >= self.goal);
        reached && self.failure.is_none() && self.updates_accepted == self.updates_committed
    }

    /// The document of `--json`.
    pub fn to_json(&self) -> serde_json::Result<String> {
        let document = Document {
            schema: "lifl.dev/demo/v1",
            succeeded: self.succeeded(),
            accuracy: self.accuracy(),
            goal: self.goal,
            rounds: self.rounds.len(),
            seconds: self.seconds,
            cpu_seconds: self.cpu_seconds,
            path: self.path,
            descriptors: self.descriptors,
            updates_accepted: self.updates_accepted,
            updates_committed: self.updates_committed,
            shm_peak_bytes: self.shm_peak_bytes,
            failure: self.failure.as_deref(),
            measured: &self.measured,
            history: &self.rounds,
        };
        Ok(serde_json::to_string_pretty(&document)? + "\n")
    }

    /// The picture of `--plot`: accuracy by round.
    #[must_use]
    pub fn to_svg(&self) -> String {
        plot::svg(&self.measured, self.goal)
    }

    /// Writes the document of `--json`.
    pub fn write_json(&self, file: &File) -> io::Result<()> {
        fs::write(file, self.to_json()?)
    }

    /// Writes the picture of `--plot`.
    pub fn write_plot(&self, file: &File) -> io::Result<()> {
        fs::write(file, self.to_svg())
    }
}

// === impl Path ===

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ebpf => "eBPF",
            Self::Userspace => "userspace",
        })
    }
}

/// Of the terminal; 80 if there is none.
fn columns() -> u16 {
    rustix::termios::tcgetwinsize(io::stdout()).map_or(80, |size| size.ws_col)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A file that the test can still read when the screen owns it.
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("lock").write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Shared {
        fn rounds(&self) -> Vec<String> {
            let text = String::from_utf8(self.0.lock().expect("lock").clone()).expect("text");
            let words = |line: &str| line.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
            text.lines().filter(|line| line.contains(" by ")).map(words).collect()
        }
    }

    fn ui() -> (Ui, Shared) {
        let out = Shared::default();
        let intro = Intro { clients: 3, per_round: 2, training_images: 9, held_out_images: 3, goal: 0.9 };
        (Ui::over(&intro, Box::new(out.clone()), ProgressDrawTarget::hidden(), false), out)
    }

    fn line(round: u32) -> RoundLine {
        RoundLine { round, accuracy: None, ..table::tests::example(Path::Ebpf).rounds[0] }
    }

    fn measured(round: u32, accuracy: f64) -> Progress {
        Progress::Measured { round, accuracy }
    }

    #[test]
    fn a_line_waits_for_its_accuracy_whichever_comes_first() {
        let (mut ui, out) = ui();
        ui.committed(line(1)).expect("written");
        assert_eq!(out.rounds(), [""; 0]);
        ui.progress(&measured(1, 0.5)).expect("written");
        ui.progress(&measured(2, 0.625)).expect("written");
        ui.committed(line(2)).expect("written");
        assert_eq!(out.rounds(), ["1 50.0%", "2 62.5%"]);
        ui.committed(line(3)).expect("written");
        ui.committed(line(4)).expect("written");
        ui.progress(&measured(4, 0.75)).expect("written");
        ui.committed(line(5)).expect("written");
        assert_eq!(out.rounds(), ["1 50.0%", "2 62.5%", "3 -", "4 75.0%"]);
        let accuracies = ui.rounds().expect("written").iter().map(|line| line.accuracy);
        assert_eq!(accuracies.collect::<Vec<_>>(), [Some(0.5), Some(0.625), None, Some(0.75), None]);
        assert_eq!(out.rounds().len(), 5);
    }

    #[test]
    fn the_bar_counts_joins_then_updates_of_the_round() {
        let (mut ui, _) = ui();
        let client = |name: &str| Arc::<str>::from(name);
        let accepted = |name: &str, round| Progress::Accepted {
            client: client(name),
            round,
            samples: 1,
            bytes: 1,
            loss: 0.0,
            duplicate: false,
        };
        for name in ["a", "b", "c", "evaluator"] {
            ui.progress(&Progress::Joined { client: client(name) }).expect("written");
        }
        assert_eq!((ui.bar.position(), ui.bar.length()), (3, Some(3)));
        ui.progress(&Progress::Training { client: client("a"), round: 1 }).expect("written");
        ui.progress(&Progress::Training { client: client("b"), round: 1 }).expect("written");
        ui.progress(&accepted("a", 1)).expect("written");
        assert_eq!((ui.bar.position(), ui.bar.length(), ui.bar.message().as_str()), (1, Some(2), "1 training"));
        ui.progress(&Progress::Training { client: client("c"), round: 2 }).expect("written");
        ui.progress(&accepted("b", 1)).expect("written");
        assert_eq!((ui.bar.position(), ui.bar.prefix().as_str()), (0, "round 2"));
    }

    #[test]
    fn json_has_what_others_read() {
        let summary = table::tests::example(Path::Userspace);
        let json: serde_json::Value = serde_json::from_str(&summary.to_json().expect("written")).expect("JSON");
        let expected = serde_json::json!({
            "schema": "lifl.dev/demo/v1", "succeeded": true, "accuracy": 0.9528, "goal": 0.95, "rounds": 8, "seconds": 4.25,
            "cpu_seconds": 1.5, "path": "userspace", "descriptors": 1097, "updates_accepted": 160, "updates_committed": 160,
            "shm_peak_bytes": 2_345_678, "failure": null,
        });
        for (name, value) in expected.as_object().expect("object") {
            assert_eq!(&json[name], value, "{name}");
        }
        assert_eq!(json["history"][7]["accuracy"], 0.9528);
        assert_eq!(json["measured"][0], serde_json::json!([0, 0.1]));
    }
}
