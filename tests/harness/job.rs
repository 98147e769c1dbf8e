//! A small federated job.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::Outcome;

/// Floats of the first tensor and of the second.
const SHAPES: [usize; 2] = [700, 300];
/// Floats of the model.
pub(crate) const ELEMENTS: usize = SHAPES[0] + SHAPES[1];

/// A job and where it lives.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) name: String,
    pub(crate) rounds: u32,
    pub(crate) clients: u32,
    /// More fields of the spec, YAML flow style.
    pub(crate) more: String,
    /// What its clients present when they join.
    pub(crate) secret: Option<String>,
    pub(crate) checkpoint: PathBuf,
}

/// A safetensors file of the job's model: both float tensors in the order asked for, and a counter that is not averaged.
pub(crate) fn file(values: &[f32], second_first: bool) -> Vec<u8> {
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let (a, b) = (bytes(&values[..SHAPES[0]]), bytes(&values[SHAPES[0]..]));
    let (first, second) = if second_first { (("b", b), ("a", a)) } else { (("a", a), ("b", b)) };
    let (split, end) = (first.1.len(), first.1.len() + second.1.len());
    let mut header = format!(
        "{{\"{}\":{{\"dtype\":\"F32\",\"shape\":[{}],\"data_offsets\":[0,{split}]}},\"{}\":{{\"dtype\":\"F32\",\"shape\":[{}],\
         \"data_offsets\":[{split},{end}]}},\"steps\":{{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[{end},{}]}}}}",
        first.0,
        split / 4,
        second.0,
        (end - split) / 4,
        end + 8
    );
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.extend(first.1);
    file.extend(second.1);
    file.extend(7i64.to_le_bytes());
    file
}

/// The floats of a model file, in the order of the first model's header; and the counter must be the first model's.
pub(crate) fn floats(file: &[u8]) -> Outcome<Vec<f32>> {
    let tensors = safetensors::SafeTensors::deserialize(file)?;
    let mut out = Vec::with_capacity(ELEMENTS);
    for name in ["a", "b"] {
        let data = tensors.tensor(name)?;
        out.extend(data.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    }
    super::ensure(tensors.tensor("steps")?.data() == 7i64.to_le_bytes(), || "the counter was changed".into())?;
    Ok(out)
}

// === impl Job ===

impl Job {
    /// A job of so many rounds and clients; one leaf for two updates.
    pub(crate) fn new(dir: &Path, name: &str, rounds: u32, clients: u32) -> Self {
        let more = "roundDeadline: 60s, aggregation: {leafFanIn: 2}, overProvision: 1.0".to_owned();
        let (name, checkpoint) = (name.to_owned(), dir.join(format!("{name}.checkpoint")));
        Self { name, rounds, clients, more, secret: None, checkpoint }
    }

    /// Writes manifest and first model into the folder.
    pub(crate) fn write(&self, dir: &Path) -> Outcome {
        let model = dir.join(format!("{}.safetensors", self.name));
        fs::write(&model, file(&[0.0; ELEMENTS], false))?;
        let Self { name, rounds, clients, more, checkpoint, .. } = self;
        let text = format!(
            "apiVersion: fl.lifl.dev/v1alpha1\nkind: FederatedJob\nmetadata: {{name: {name}, namespace: default}}\nspec: {{model: \
             {{name: m, initial: {{uri: 'file://{}'}}}}, rounds: {rounds}, clientsPerRound: {clients}, minClients: {clients}, \
             checkpoint: {{uri: 'file://{}', keep: 1000}}, {more}}}\n",
            model.display(),
            checkpoint.display(),
        );
        Ok(fs::write(dir.join(format!("{name}.yaml")), text)?)
    }
}
