//! The child that runs Flower.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, bail};
use serde::Deserialize;
use tempfile::TempDir;

use super::{CLIENTS, ELEMENTS, F32_ERROR, check_model};
use crate::measure::Rounds;

/// Kernels of ResNet-18's convolutions and its last layer, which are 98 % of it; what is missing follows as one vector.
const SHAPES: [(usize, &[usize]); 11] = [
    (1, &[64, 3, 7, 7]),
    (4, &[64, 64, 3, 3]),
    (1, &[128, 64, 3, 3]),
    (3, &[128, 128, 3, 3]),
    (1, &[256, 128, 3, 3]),
    (3, &[256, 256, 3, 3]),
    (1, &[512, 256, 3, 3]),
    (3, &[512, 512, 3, 3]),
    (1, &[512, 256]),
    (1, &[1000, 512]),
    (1, &[1000]),
];

/// Flower in a process of its own, waiting for its next turn.
pub(super) struct Flower {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    folder: TempDir,
    hello: Hello,
}

#[derive(Deserialize)]
struct Hello {
    flwr: String,
    numpy: String,
}

/// What a turn cost, in seconds.
#[derive(Deserialize)]
struct Turn {
    cpu: f64,
    wall: f64,
    serialise: f64,
}

// === impl Flower ===

impl Flower {
    pub(super) fn start(python: &Path, updates: &[Vec<u8>]) -> anyhow::Result<Self> {
        let folder = TempDir::with_prefix("lifl-bench-")?;
        for (i, update) in updates.iter().enumerate() {
            fs::write(folder.path().join(format!("{i}.f32")), update)?;
        }
        let mut shapes: Vec<Vec<usize>> =
            SHAPES.iter().flat_map(|(times, shape)| std::iter::repeat_n(shape.to_vec(), *times)).collect();
        let known: usize = shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
        shapes.push(vec![ELEMENTS - known]);
        fs::write(folder.path().join("shapes.json"), serde_json::to_vec(&shapes)?)?;

        let mut child = Command::new(python)
            .args(["-c", include_str!("flower.py")])
            .arg(folder.path())
            .arg(updates.len().to_string())
            .envs(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"].map(|name| (name, "1")))
            .env("FLWR_TELEMETRY_ENABLED", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", python.display()))?;
        let input = child.stdin.take().context("no way to talk to the child")?;
        let mut output = BufReader::new(child.stdout.take().context("no way to hear the child")?);
        let hello = answer(&mut output).with_context(|| {
            format!(
                "{} cannot run Flower; LIFL_PYTHON must name an interpreter that has bench/requirements.txt installed",
                python.display()
            )
        });
        match hello {
            Ok(hello) => Ok(Self { child, input, output, folder, hello }),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error)
            }
        }
    }

    pub(super) fn version(&self) -> String {
        format!("flwr {}, numpy {}", self.hello.flwr, self.hello.numpy)
    }

    /// Lets it aggregate once, checks its model, and keeps what it cost per update.
    pub(super) fn turn(&mut self, how: &str, reference: &[f64], rounds: &mut Rounds) -> anyhow::Result<()> {
        let [cpu, wall, serialise] = match how {
            "inplace" => ["flower inplace, cpu", "flower inplace, wall", "flower inplace, serialising the model, cpu"],
            "aggregate" => {
                ["flower aggregate, cpu", "flower aggregate, wall", "flower aggregate, serialising the model, cpu"]
            }
            _ => bail!("Flower has no way called {how}"),
        };
        writeln!(self.input, "{how}")?;
        let turn: Turn = answer(&mut self.output)?;
        check_model(&fs::read(self.folder.path().join("model.f32"))?, reference, F32_ERROR)
            .context("Flower's model")?;
        for (name, seconds) in [(cpu, turn.cpu), (wall, turn.wall), (serialise, turn.serialise)] {
            rounds.push(name, seconds * 1e3 / CLIENTS as f64);
        }
        Ok(())
    }
}

impl Drop for Flower {
    fn drop(&mut self) {
        // It holds nothing that is worth a farewell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn answer<T: for<'a> Deserialize<'a>>(output: &mut impl BufRead) -> anyhow::Result<T> {
    let mut line = String::new();
    output.read_line(&mut line)?;
    if line.is_empty() {
        bail!("the child ended without an answer");
    }
    serde_json::from_str(&line).with_context(|| format!("unknown answer {line:?}"))
}
