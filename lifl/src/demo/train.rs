//! The model that the clients train: 64 pixels, one hidden layer of ReLU, 10 digits, softmax cross-entropy.
//!
//! Plain SGD with momentum on `f32`, no framework: a client's whole round takes about a millisecond of CPU. Parameters are
//! one flat vector in the order of [`Mlp::tensors`]; as a file they are safetensors with the names and the `(out, in)`
//! layout of PyTorch's `nn.Linear`, so `torch.load_state_dict` takes them as they are.

use fastrand::Rng;
use safetensors::{Dtype, SafeTensorError, SafeTensors, tensor::TensorView};

use super::digits::{CLASSES, Image, PIXELS};

/// A perceptron with one hidden layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlp {
    hidden: usize,
    parameters: Vec<f32>,
}

/// How a client trains in one round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Training {
    /// Passes over the client's images.
    pub epochs: usize,
    /// Images per step.
    pub batch: usize,
    /// Step size.
    pub rate: f32,
    /// Share of the last step that the next one keeps.
    pub momentum: f32,
}

/// A file that is not this model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Not safetensors, or a tensor is missing.
    #[error("the model is not readable as safetensors: {0}")]
    Format(#[from] SafeTensorError),
    /// Right name, wrong tensor.
    #[error("tensor {name} is {dtype} {shape:?}, where an F32 matrix of this network was expected")]
    Tensor {
        /// Its name.
        name: &'static str,
        /// Its type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
    },
}

/// Views of the four tensors inside a flat vector of parameters.
struct Layers<T> {
    weight1: T,
    bias1: T,
    weight2: T,
    bias2: T,
}

/// What a forward pass leaves for the backward pass; made once per training, not per image.
struct Activations {
    hidden: Vec<f32>,
    delta: Vec<f32>,
}

// === impl Training ===

impl Training {
    /// What the demo trains with. Simulated over 40 seeds (20 of 100 clients a round, `alpha` 0.5): 0.95 on the held-out images
    /// after 4 to 16 rounds, 8 in the median.
    pub const DEMO: Self = Self { epochs: 6, batch: 4, rate: 0.06, momentum: 0.9 };

    /// Trains `model` on `images`; returns the mean loss of the last pass.
    pub fn run(&self, model: &mut Mlp, images: &[Image], seed: u64) -> f32 {
        let mut rng = Rng::with_seed(seed);
        let mut order: Vec<usize> = (0..images.len()).collect();
        let mut gradient = vec![0.0; model.parameters.len()];
        let mut velocity = vec![0.0; model.parameters.len()];
        let mut activations = Activations::new(model.hidden);
        let mut loss = 0.0;
        for _epoch in 0..self.epochs {
            rng.shuffle(&mut order);
            loss = 0.0;
            for batch in order.chunks(self.batch.max(1)) {
                gradient.fill(0.0);
                for &index in batch {
                    loss += model.accumulate(&images[index], &mut gradient, &mut activations);
                }
                let scale = 1.0 / small(batch.len());
                let steps = model.parameters.iter_mut().zip(&mut velocity).zip(&gradient);
                for ((parameter, velocity), gradient) in steps {
                    *velocity = self.momentum * *velocity + scale * gradient;
                    *parameter -= self.rate * *velocity;
                }
            }
        }
        loss / small(images.len().max(1))
    }
}

// === impl Mlp ===

impl Mlp {
    /// Hidden units of the demo's model: 9,610 parameters, 38 KB as a file.
    pub const HIDDEN: usize = 128;

    /// A model of random weights (uniform, He's bound for the layer before a ReLU, Glorot's for the last) and zero biases.
    #[must_use]
    pub fn new(hidden: usize, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut model = Self::zero(hidden);
        let layers = Layers::of_mut(&mut model.parameters, hidden);
        let bound1 = (6.0 / small(PIXELS)).sqrt();
        let bound2 = (6.0 / small(hidden + CLASSES)).sqrt();
        for (weights, bound) in [(layers.weight1, bound1), (layers.weight2, bound2)] {
            for weight in weights {
                *weight = bound * (2.0 * rng.f32() - 1.0);
            }
        }
        model
    }

    fn zero(hidden: usize) -> Self {
        let parameters = hidden * PIXELS + hidden + CLASSES * hidden + CLASSES;
        Self { hidden, parameters: vec![0.0; parameters] }
    }

    /// All parameters, in the order of [`Self::tensors`].
    #[must_use]
    pub fn parameters(&self) -> &[f32] {
        &self.parameters
    }

    /// Names and shapes of the tensors.
    #[must_use]
    pub fn tensors(hidden: usize) -> [(&'static str, Vec<usize>); 4] {
        [
            ("fc1.weight", vec![hidden, PIXELS]),
            ("fc1.bias", vec![hidden]),
            ("fc2.weight", vec![CLASSES, hidden]),
            ("fc2.bias", vec![CLASSES]),
        ]
    }

    /// Reads a safetensors file; the size of the hidden layer is the file's.
    pub fn from_safetensors(file: &[u8]) -> Result<Self, ModelError> {
        let file = SafeTensors::deserialize(file)?;
        let hidden = file.tensor("fc1.bias")?.data().len() / size_of::<f32>();
        let mut parameters = Vec::with_capacity(Self::zero(hidden).parameters.len());
        for (name, expected) in Self::tensors(hidden) {
            let tensor = file.tensor(name)?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != expected {
                return Err(ModelError::Tensor { name, dtype: tensor.dtype(), shape: tensor.shape().to_vec() });
            }
            let (words, _none_left) = tensor.data().as_chunks();
            parameters.extend(words.iter().copied().map(f32::from_le_bytes));
        }
        Ok(Self { hidden, parameters })
    }

    /// The model as a safetensors file.
    pub fn to_safetensors(&self) -> Result<Vec<u8>, ModelError> {
        let bytes: Vec<u8> = self.parameters.iter().flat_map(|p| p.to_le_bytes()).collect();
        let mut rest = bytes.as_slice();
        let mut views = Vec::with_capacity(4);
        for (name, shape) in Self::tensors(self.hidden) {
            let size = shape.iter().product::<usize>() * size_of::<f32>();
            let (data, after) = rest.split_at(size);
            rest = after;
            views.push((name, TensorView::new(Dtype::F32, shape, data)?));
        }
        Ok(safetensors::serialize(views, None)?)
    }

    /// Which digit the model takes the image for.
    #[must_use]
    pub fn classify(&self, image: &Image) -> usize {
        let mut activations = Activations::new(self.hidden);
        let logits = self.forward(image, &mut activations);
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        best.map_or(0, |(class, _)| class)
    }

    /// Share of `images` that the model knows.
    #[must_use]
    pub fn accuracy(&self, images: &[Image]) -> f64 {
        let right = images.iter().filter(|image| self.classify(image) == image.label).count();
        f64::from(small(right)) / f64::from(small(images.len().max(1)))
    }

    fn forward(&self, image: &Image, activations: &mut Activations) -> [f32; CLASSES] {
        let layers = Layers::of(&self.parameters, self.hidden);
        let rows = layers.weight1.chunks_exact(PIXELS).zip(layers.bias1);
        for (unit, (row, bias)) in activations.hidden.iter_mut().zip(rows) {
            *unit = (bias + dot(row, &image.pixels)).max(0.0);
        }
        let mut logits = [0.0; CLASSES];
        let rows = layers.weight2.chunks_exact(self.hidden).zip(layers.bias2);
        for (logit, (row, bias)) in logits.iter_mut().zip(rows) {
            *logit = bias + dot(row, &activations.hidden);
        }
        logits
    }

    /// Adds the gradient of one image's loss to `gradient`; returns the loss.
    fn accumulate(&self, image: &Image, gradient: &mut [f32], activations: &mut Activations) -> f32 {
        let logits = self.forward(image, activations);
        // log-sum-exp with the maximum taken out: exp never overflows.
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exponentials = logits.map(|logit| (logit - highest).exp());
        let sum: f32 = exponentials.iter().sum();
        let loss = sum.ln() + highest - logits[image.label];

        let layers = Layers::of(&self.parameters, self.hidden);
        let gradients = Layers::of_mut(gradient, self.hidden);
        activations.delta.fill(0.0);
        let rows = layers.weight2.chunks_exact(self.hidden);
        let gradient_rows = gradients.weight2.chunks_exact_mut(self.hidden);
        for (class, (row, gradient_row)) in rows.zip(gradient_rows).enumerate() {
            let error = exponentials[class] / sum - if class == image.label { 1.0 } else { 0.0 };
            gradients.bias2[class] += error;
            add_scaled(gradient_row, error, &activations.hidden);
            add_scaled(&mut activations.delta, error, row);
        }
        let gradient_rows = gradients.weight1.chunks_exact_mut(PIXELS);
        for (unit, gradient_row) in gradient_rows.enumerate() {
            if activations.hidden[unit] > 0.0 {
                gradients.bias1[unit] += activations.delta[unit];
                add_scaled(gradient_row, activations.delta[unit], &image.pixels);
            }
        }
        loss
    }
}

// === impl Layers ===

impl<'a> Layers<&'a [f32]> {
    fn of(flat: &'a [f32], hidden: usize) -> Self {
        let (weight1, rest) = flat.split_at(hidden * PIXELS);
        let (bias1, rest) = rest.split_at(hidden);
        let (weight2, bias2) = rest.split_at(CLASSES * hidden);
        Self { weight1, bias1, weight2, bias2 }
    }
}

impl<'a> Layers<&'a mut [f32]> {
    fn of_mut(flat: &'a mut [f32], hidden: usize) -> Self {
        let (weight1, rest) = flat.split_at_mut(hidden * PIXELS);
        let (bias1, rest) = rest.split_at_mut(hidden);
        let (weight2, bias2) = rest.split_at_mut(CLASSES * hidden);
        Self { weight1, bias1, weight2, bias2 }
    }
}

// === impl Activations ===

impl Activations {
    fn new(hidden: usize) -> Self {
        Self { hidden: vec![0.0; hidden], delta: vec![0.0; hidden] }
    }
}

/// Eight sums side by side: one alone would forbid the compiler to use vector registers.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 8];
    let (a_chunks, a_rest) = a.as_chunks::<8>();
    let (b_chunks, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

fn add_scaled(to: &mut [f32], scale: f32, from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += scale * from;
    }
}

/// A count of images or units as a float.
fn small(count: usize) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "counts here are far below 2^24")]
    let float = count as f32;
    float
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::digits::images;

    /// Loss of one image.
    fn loss(model: &Mlp, image: &Image) -> f32 {
        let mut ignored = vec![0.0; model.parameters.len()];
        model.accumulate(image, &mut ignored, &mut Activations::new(model.hidden))
    }

    #[test]
    fn gradient_agrees_with_finite_differences() {
        let model = Mlp::new(12, 5);
        let sample: Vec<Image> = images().into_iter().step_by(331).collect();
        let mut checked = 0;
        for image in &sample {
            let mut gradient = vec![0.0; model.parameters.len()];
            model.accumulate(image, &mut gradient, &mut Activations::new(12));
            for index in (0..gradient.len()).step_by(7) {
                let step = 1e-2;
                let mut ahead = model.clone();
                let mut behind = model.clone();
                ahead.parameters[index] += step;
                behind.parameters[index] -= step;
                let numeric = (loss(&ahead, image) - loss(&behind, image)) / (2.0 * step);
                // A step across a ReLU's corner bends the difference: at most a few parameters, none by much.
                let error = (numeric - gradient[index]).abs();
                assert!(error < 2e-2 + 0.05 * numeric.abs(), "{index}: {numeric} {}", gradient[index]);
                checked += usize::from(gradient[index].abs() > 1e-2);
            }
        }
        assert!(checked > 100, "only {checked} gradients were not zero");
    }

    #[test]
    fn gradient_of_the_last_bias_is_probability_less_truth() {
        let mut model = Mlp::zero(3);
        let size = model.parameters.len();
        model.parameters[size - CLASSES] = 9.0_f32.ln();
        let mut gradient = vec![0.0; size];
        let image = &images()[1];
        assert_eq!(image.label, 1);
        let loss = model.accumulate(image, &mut gradient, &mut Activations::new(3));
        // exp(logits) = 9, 1 x 9: probabilities 9/18 and 1/18.
        let by_hand = [0.5, 1.0 / 18.0 - 1.0, 1.0 / 18.0];
        for (found, expected) in gradient[size - CLASSES..].iter().zip(by_hand) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
        assert!((loss - 18.0_f32.ln()).abs() < 1e-6, "{loss}");
    }

    #[test]
    fn one_step_is_momentum_by_hand() {
        let data = &images()[..1];
        let start = Mlp::new(4, 1);
        let mut gradient = vec![0.0; start.parameters.len()];
        let mut trained = start.clone();
        let once = Training { epochs: 1, batch: 4, rate: 0.5, momentum: 0.9 };
        once.run(&mut trained, data, 0);
        start.accumulate(&data[0], &mut gradient, &mut Activations::new(4));
        let by_hand: Vec<f32> = start.parameters.iter().zip(&gradient).map(|(p, g)| p - 0.5 * g).collect();
        assert_eq!(trained.parameters, by_hand);

        let mut twice = start.clone();
        Training { epochs: 2, ..once }.run(&mut twice, data, 0);
        let mut second = vec![0.0; gradient.len()];
        trained.accumulate(&data[0], &mut second, &mut Activations::new(4));
        for (index, value) in twice.parameters.iter().enumerate() {
            let expected = by_hand[index] - 0.5 * (0.9 * gradient[index] + second[index]);
            assert!((value - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn training_learns_and_is_decided_by_its_seed() {
        let data: Vec<Image> = images().into_iter().take(120).collect();
        let training = Training { epochs: 15, batch: 4, rate: 0.05, momentum: 0.9 };
        let run = |seed| {
            let mut model = Mlp::new(16, 2);
            let loss = training.run(&mut model, &data, seed);
            (model, loss)
        };
        let (model, loss) = run(1);
        assert!(loss < 0.1 && model.accuracy(&data) > 0.98, "{loss}");
        assert_eq!(run(1).0, model);
        assert_ne!(run(2).0, model);
    }

    #[test]
    fn safetensors_keep_every_bit() {
        let model = Mlp::new(Mlp::HIDDEN, 3);
        let file = model.to_safetensors().expect("written");
        assert_eq!(Mlp::from_safetensors(&file).expect("read"), model);
        let tensors = SafeTensors::deserialize(&file).expect("safetensors");
        let mut names = tensors.names();
        names.sort_unstable();
        assert_eq!(names, ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"]);
        let weight = tensors.tensor("fc1.weight").expect("there");
        assert_eq!((weight.dtype(), weight.shape()), (Dtype::F32, [128, 64].as_slice()));
    }

    #[test]
    fn other_files_are_refused_by_name() {
        assert!(Mlp::from_safetensors(b"no model").is_err());
        let data = [0; 8];
        let names = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"];
        let views = names.map(|n| (n, TensorView::new(Dtype::F32, vec![2], &data).expect("view")));
        let file = safetensors::serialize(views, None).expect("written");
        let error = Mlp::from_safetensors(&file).expect_err("wrong shape");
        assert_eq!(error.to_string(), "tensor fc1.weight is F32 [2], where an F32 matrix of this network was expected");
    }
}
