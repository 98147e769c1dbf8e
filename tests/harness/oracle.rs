//! The promise, checked: acknowledged <= receipt <= sent, each once, and each model the mean of exactly its receipt.

use std::{collections::BTreeSet, fs, sync::PoisonError};

use serde_json::Value;

use super::{
    Outcome,
    client::{Book, values},
    ensure,
    job::{ELEMENTS, Job, floats},
};

/// Largest deviation of an element from the mean in double precision, relative to the larger of it and 1.
const TOLERANCE: f64 = 1e-5;

/// Checks a job that has ended. `lost`: acknowledged updates may be missing, because all memory of the platform was lost.
pub(crate) fn check(job: &Job, book: &Book, lost: bool) -> Outcome {
    let sent = book.lock().unwrap_or_else(PoisonError::into_inner);
    let mut seen = BTreeSet::new();
    for round in 1..=job.rounds {
        let folder = job.checkpoint.join(format!("rounds/{round:06}"));
        let read = |name: &str| fs::read(folder.join(name)).map_err(|error| format!("round {round}: {name}: {error}"));
        let commit: Value = serde_json::from_slice(&read("commit.json")?)?;
        let receipt: Value = serde_json::from_slice(&read("receipt.json")?)?;
        let updates = receipt["updates"].as_array().ok_or("a receipt without updates")?;
        let (mut sum, mut total) = (vec![0.0f64; ELEMENTS], 0.0);
        for update in updates {
            let text = |name: &str| update[name].as_str().unwrap_or_default().to_owned();
            let key = (text("source"), text("id"));
            let one =
                sent.get(&key).ok_or_else(|| format!("round {round}: {key:?} is in the receipt, nobody sent it"))?;
            ensure(one.round == round, || format!("{key:?} is in round {round}, it was sent for {}", one.round))?;
            let weight = f64::from(one.weight);
            ensure(update["weight"].as_f64() == Some(weight), || format!("{update}: its weight was {weight}"))?;
            ensure(seen.insert(key.clone()), || format!("{key:?} is in two receipts, or twice in one"))?;
            sum.iter_mut().zip(values(one.client, round)).for_each(|(sum, value)| *sum += weight * f64::from(value));
            total += weight;
        }
        ensure(commit["count"] == updates.len() && commit["weight"].as_f64() == Some(total), || {
            format!("round {round}: {commit} for {} updates of weight {total}", updates.len())
        })?;
        let model = floats(&read("model.safetensors")?)?;
        let mean = sum.iter().map(|sum| sum / total);
        for (at, (mean, got)) in mean.zip(&model).enumerate() {
            let off = (mean - f64::from(*got)).abs() / mean.abs().max(1.0);
            ensure(off <= TOLERANCE, || format!("round {round}, element {at}: {got}, the mean is {mean}"))?;
        }
    }
    let next = job.checkpoint.join(format!("rounds/{:06}", job.rounds + 1));
    ensure(!next.exists(), || "a round too many".to_owned())?;
    let missing: Vec<_> = sent.iter().filter(|(key, one)| one.acknowledged && !seen.contains(*key)).collect();
    ensure(lost || missing.is_empty(), || format!("acknowledged and in no receipt: {missing:?}"))
}
