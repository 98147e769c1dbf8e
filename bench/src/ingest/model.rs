//! The model and the updates to it, as safetensors files.

use anyhow::ensure;
use serde_json::{Map, Value, json};

/// Different contents that updates have.
const BODIES: usize = 4;

/// A model, some updates to it, and what they must come to.
pub(super) struct Updates {
    tensors: usize,
    /// Where the floats begin in a file; they are all that follows.
    floats: usize,
    elements: usize,
    initial: Vec<u8>,
    bodies: Vec<Vec<u8>>,
}

// === impl Updates ===

impl Updates {
    /// What torchvision's ResNet-18 has in its state: weights, and the statistics of its normalisations.
    pub(super) fn resnet18() -> Self {
        let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
        let norm = |tensors: &mut Vec<(String, Vec<usize>)>, name: &str, channels: usize| {
            for part in ["weight", "bias", "running_mean", "running_var"] {
                tensors.push((format!("{name}.{part}"), vec![channels]));
            }
        };
        tensors.push(("conv1.weight".into(), vec![64, 3, 7, 7]));
        norm(&mut tensors, "bn1", 64);
        let mut before = 64;
        for (layer, channels) in [64, 128, 256, 512].into_iter().enumerate() {
            for block in 0..2 {
                let name = format!("layer{}.{block}", layer + 1);
                tensors.push((format!("{name}.conv1.weight"), vec![channels, before, 3, 3]));
                norm(&mut tensors, &format!("{name}.bn1"), channels);
                tensors.push((format!("{name}.conv2.weight"), vec![channels, channels, 3, 3]));
                norm(&mut tensors, &format!("{name}.bn2"), channels);
                if before != channels {
                    tensors.push((format!("{name}.downsample.0.weight"), vec![channels, before, 1, 1]));
                    norm(&mut tensors, &format!("{name}.downsample.1"), channels);
                }
                before = channels;
            }
        }
        tensors.push(("fc.weight".into(), vec![1000, 512]));
        tensors.push(("fc.bias".into(), vec![1000]));
        Self::of(&tensors, 20)
    }

    /// 8 MB in twenty tensors.
    pub(super) fn small() -> Self {
        let tensors: Vec<_> = (0..20).map(|i| (format!("layer{i:02}.weight"), vec![1000, 100])).collect();
        Self::of(&tensors, 0)
    }

    /// Floats of these shapes after `counters` scalars of integers, which every PyTorch state has, too.
    fn of(floats: &[(String, Vec<usize>)], counters: usize) -> Self {
        let mut header = Map::new();
        let mut at = 0;
        for i in 0..counters {
            let offsets = [at, at + 8];
            header.insert(
                format!("bn{i:02}.num_batches_tracked"),
                json!({"dtype": "I64", "shape": Vec::<u64>::new(), "data_offsets": offsets}),
            );
            at += 8;
        }
        let before = at;
        for (name, shape) in floats {
            let bytes = shape.iter().product::<usize>() * size_of::<f32>();
            header.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [at, at + bytes]}));
            at += bytes;
        }
        let mut text = Value::from(header).to_string();
        while !text.len().is_multiple_of(8) {
            text.push(' ');
        }
        let elements = (at - before) / size_of::<f32>();
        let file = |seed: usize| {
            let mut file = Vec::with_capacity(8 + text.len() + at);
            file.extend_from_slice(&(text.len() as u64).to_le_bytes());
            file.extend_from_slice(text.as_bytes());
            file.resize(8 + text.len() + before, 0);
            file.extend((0..elements).flat_map(|i| value(i, seed).to_le_bytes()));
            file
        };
        Self {
            tensors: counters + floats.len(),
            floats: 8 + text.len() + before,
            elements,
            initial: file(BODIES),
            bodies: (0..BODIES).map(file).collect(),
        }
    }

    pub(super) fn tensors(&self) -> usize {
        self.tensors
    }

    /// The model of round 0.
    pub(super) fn initial(&self) -> &[u8] {
        &self.initial
    }

    /// Bytes of a model.
    pub(super) fn model_bytes(&self) -> usize {
        self.initial.len()
    }

    /// Where the floats begin in a file, and how many there are.
    pub(super) fn floats(&self) -> (usize, usize) {
        (self.floats, self.elements)
    }

    /// What the `i`-th client sends.
    pub(super) fn body(&self, i: usize) -> &[u8] {
        &self.bodies[i % BODIES]
    }

    /// What it counts.
    pub(super) fn weight(i: usize) -> u32 {
        u32::try_from(i % 7 + 1).unwrap_or(1)
    }

    /// Checks the weighted mean of the first `clients` updates; `scale` is 1 for a mean, and 1 / sum of weights for a sum.
    pub(super) fn check(&self, floats: &[u8], clients: usize, scale: f64) -> anyhow::Result<()> {
        let (floats, _) = floats.as_chunks();
        ensure!(floats.len() == self.elements, "{} elements instead of {}", floats.len(), self.elements);
        let mut of_body = [0.0; BODIES];
        (0..clients).for_each(|i| of_body[i % BODIES] += f64::from(Self::weight(i)));
        let total: f64 = of_body.iter().sum();
        // Values are below 1/2: each addition errs by no more than half a step of the sum of weights.
        let error = (clients + 1) as f64 * f64::from(f32::EPSILON) / 4.0;
        let parts: Vec<&[[u8; 4]]> = self.bodies.iter().map(|body| body[self.floats..].as_chunks().0).collect();
        for (i, x) in floats.iter().enumerate() {
            let mean: f64 =
                parts.iter().zip(of_body).map(|(p, w)| f64::from(f32::from_le_bytes(p[i])) * w / total).sum();
            let x = f64::from(f32::from_le_bytes(*x)) * scale;
            ensure!((x - mean).abs() <= error, "element {i} is {x} instead of {mean}");
        }
        Ok(())
    }

    /// Sum of the weights of the first `clients` updates.
    pub(super) fn total_weight(clients: usize) -> f64 {
        (0..clients).map(|i| f64::from(Self::weight(i))).sum()
    }
}

/// Scattered over (-1/2, 1/2), different for every file.
fn value(i: usize, seed: usize) -> f32 {
    let mixed =
        (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed.wrapping_mul(0xd1b5_4a32_d192_ed03)) >> 44;
    mixed as f32 / 1_048_576.0 - 0.5
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_models_that_the_platform_reads() {
        let updates = Updates::resnet18();
        let length = usize::try_from(u64::from_le_bytes(*updates.initial().first_chunk().unwrap())).unwrap();
        let manifest = lifl_api::manifest::Manifest::parse(&updates.initial()[..8 + length]).unwrap();
        assert_eq!(manifest.elements(), 11_699_112);
        assert_eq!(manifest.tensors().len(), 122);
        assert_eq!(manifest.file_bytes(), updates.model_bytes() as u64);
    }

    #[test]
    fn a_wrong_mean_is_found() {
        let updates = Updates::small();
        assert!(updates.check(&updates.body(0)[updates.floats().0..], 1, 1.0).is_ok());
        assert!(updates.check(&updates.body(1)[updates.floats().0..], 1, 1.0).is_err());
    }
}
