//! Who holds which images: a split that no client's share is typical of.
//!
//! For each class the clients' shares are drawn from a Dirichlet distribution (Hsu et al. 2019, arXiv 1909.06335): with
//! `alpha` near 0 a digit is with one client alone, with a large one everybody has the same mixture. At 0.5 a client knows
//! mostly three or four digits, and averaging has something to do.

use fastrand::Rng;

use super::digits::{CLASSES, Image};

/// How to share the images among the clients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Split {
    /// How many clients.
    pub clients: usize,
    /// Concentration of the Dirichlet distribution.
    pub alpha: f64,
    /// No client holds fewer images.
    pub at_least: usize,
    /// The same seed shares alike.
    pub seed: u64,
}

/// There are not enough images to share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{images} images cannot give {clients} clients at least {at_least} each")]
pub struct TooFewImages {
    images: usize,
    clients: usize,
    at_least: usize,
}

// === impl Split ===

impl Split {
    /// What the demo does.
    pub const DEMO: Self = Self { clients: 100, alpha: 0.5, at_least: 5, seed: 2 };

    /// Shares all `images`: each goes to exactly one client.
    pub fn share(&self, images: Vec<Image>) -> Result<Vec<Vec<Image>>, TooFewImages> {
        let total = images.len();
        if self.clients == 0 || total < self.clients * self.at_least {
            return Err(TooFewImages { images: total, clients: self.clients, at_least: self.at_least });
        }
        let mut rng = Rng::with_seed(self.seed);
        let mut classes: [Vec<Image>; CLASSES] = Default::default();
        for image in images {
            classes[image.label].push(image);
        }
        let mut shares = vec![Vec::new(); self.clients];
        for mut class in classes {
            rng.shuffle(&mut class);
            let weights = dirichlet(&mut rng, self.alpha, self.clients);
            deal(class, &weights, &mut shares);
        }
        level(&mut shares, self.at_least, &mut rng);
        Ok(shares)
    }
}

/// Gives each client the part of `class` that its weight names; cut at cumulative shares, so that nothing is lost to rounding.
fn deal(class: Vec<Image>, weights: &[f64], shares: &mut [Vec<Image>]) {
    let count = class.len();
    let mut cumulative = 0.0;
    let mut owner = 0;
    for (index, image) in class.into_iter().enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "a few hundred images")]
        let position = (index as f64 + 0.5) / count as f64;
        while owner + 1 < shares.len() && cumulative + weights[owner] < position {
            cumulative += weights[owner];
            owner += 1;
        }
        shares[owner].push(image);
    }
}

/// Takes from the richest until nobody is below `at_least`: the cost is a little of the skew.
fn level(shares: &mut [Vec<Image>], at_least: usize, rng: &mut Rng) {
    for poor in 0..shares.len() {
        while shares[poor].len() < at_least {
            let Some(rich) = (0..shares.len()).max_by_key(|&client| shares[client].len()) else {
                return;
            };
            let given = rng.usize(..shares[rich].len());
            let image = shares[rich].swap_remove(given);
            shares[poor].push(image);
        }
    }
}

/// Weights that sum to 1: Gamma(alpha, 1) variates over their sum.
fn dirichlet(rng: &mut Rng, alpha: f64, count: usize) -> Vec<f64> {
    let mut weights: Vec<f64> = (0..count).map(|_| gamma(rng, alpha)).collect();
    let sum: f64 = weights.iter().sum();
    for weight in &mut weights {
        *weight /= sum;
    }
    weights
}

/// Gamma(shape, 1) by Marsaglia and Tsang (2000); a shape below 1 is drawn at shape + 1 and scaled by `U^(1/shape)`.
fn gamma(rng: &mut Rng, shape: f64) -> f64 {
    if shape < 1.0 {
        let scale = open_unit(rng).powf(1.0 / shape);
        return gamma(rng, shape + 1.0) * scale;
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = normal(rng);
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && open_unit(rng).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d * v;
        }
    }
}

/// Standard normal by Box and Muller.
fn normal(rng: &mut Rng) -> f64 {
    let radius = (-2.0 * open_unit(rng).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.f64()).cos()
}

/// Uniform in (0, 1]: its logarithm is finite.
fn open_unit(rng: &mut Rng) -> f64 {
    1.0 - rng.f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::digits::images;

    #[test]
    fn every_image_goes_to_exactly_one_client() {
        for seed in 0..5 {
            let shares = Split { seed, ..Split::DEMO }.share(images()).expect("enough");
            assert_eq!(shares.len(), 100);
            assert!(shares.iter().all(|share| share.len() >= 5));
            let mut shared: Vec<_> = shares.concat();
            let mut all = images();
            let key = |i: &Image| (i.label, i.pixels.map(f32::to_bits));
            shared.sort_by_key(key);
            all.sort_by_key(key);
            assert_eq!(shared, all);
        }
    }

    /// Mean over clients of the share that their most frequent digit has.
    fn skew(alpha: f64) -> f64 {
        let shares = Split { alpha, ..Split::DEMO }.share(images()).expect("enough");
        let top = |share: &Vec<Image>| {
            let most = (0..CLASSES).map(|c| share.iter().filter(|i| i.label == c).count());
            most.max().unwrap_or(0) as f64 / share.len() as f64
        };
        shares.iter().map(top).sum::<f64>() / shares.len() as f64
    }

    #[test]
    fn alpha_decides_how_unlike_the_clients_are() {
        let (low, middle, high) = (skew(0.1), skew(0.5), skew(100.0));
        assert!(low > 0.6 && (0.3..0.6).contains(&middle) && high < 0.3, "{low} {middle} {high}");
    }

    #[test]
    fn a_seed_decides_the_split() {
        let share = |seed| Split { seed, ..Split::DEMO }.share(images()).expect("enough");
        assert_eq!(share(1), share(1));
        assert_ne!(share(1), share(2));
    }

    #[test]
    fn too_few_images_are_refused() {
        let few = images().into_iter().take(499).collect();
        let error = Split::DEMO.share(few).expect_err("499 < 100 * 5");
        assert_eq!(error.to_string(), "499 images cannot give 100 clients at least 5 each");
    }

    #[test]
    fn gamma_has_its_mean_and_variance() {
        let mut rng = Rng::with_seed(11);
        for shape in [0.5, 3.0] {
            let draws: Vec<f64> = (0..40_000).map(|_| gamma(&mut rng, shape)).collect();
            let mean = draws.iter().sum::<f64>() / 40_000.0;
            let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 40_000.0;
            assert!((mean / shape - 1.0).abs() < 0.03, "shape {shape}: mean {mean}");
            assert!((variance / shape - 1.0).abs() < 0.08, "shape {shape}: variance {variance}");
        }
    }
}
