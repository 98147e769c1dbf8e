//! The handwritten digits, in the binary: 1,797 images of 8 x 8 pixels (`data/README.md` says whose they are).

use fastrand::Rng;

/// Pixels of an image.
pub const PIXELS: usize = 64;
/// Digits 0 to 9.
pub const CLASSES: usize = 10;
/// Images that no client trains on: accuracy is measured on them.
pub const HELD_OUT: usize = 360;

/// Mean ink of all pixels, rounded. Without centring the same training needs twice the rounds.
const MEAN: f32 = 0.3;
/// Brings the spread of a pixel near 1.
const SCALE: f32 = 2.0;
/// Pixels, then the label.
const RECORD: usize = PIXELS + 1;
static DIGITS: &[u8] = include_bytes!("../../data/digits.bin");

/// One digit.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// Ink, row by row, centred and spread: `(byte / 16 - 0.3) * 2`.
    pub pixels: [f32; PIXELS],
    /// Which digit it is.
    pub label: usize,
}

/// All images, parted into those to learn from and those to be judged by.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// What the clients share among them.
    pub training: Vec<Image>,
    /// What the evaluator measures on: every class in its share, [`HELD_OUT`] in all.
    pub held_out: Vec<Image>,
}

/// Every image, in the order of the file.
#[must_use]
pub fn images() -> Vec<Image> {
    let (records, _none_left) = DIGITS.as_chunks::<RECORD>();
    records.iter().map(Image::from_record).collect()
}

// === impl Image ===

impl Image {
    fn from_record(record: &[u8; RECORD]) -> Self {
        Self {
            pixels: std::array::from_fn(|i| (f32::from(record[i]) / 16.0 - MEAN) * SCALE),
            label: usize::from(record[PIXELS]),
        }
    }
}

// === impl Dataset ===

impl Dataset {
    /// Parts the images; the same seed parts them alike.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut classes: [Vec<Image>; CLASSES] = Default::default();
        let all = images();
        let total = all.len();
        for image in all {
            classes[image.label].push(image);
        }
        let mut dataset = Self { training: Vec::new(), held_out: Vec::new() };
        // Cumulative quotas: each class gives its share rounded, and the sum is exactly HELD_OUT.
        let mut seen = 0;
        for mut class in classes {
            rng.shuffle(&mut class);
            let before = seen * HELD_OUT / total;
            seen += class.len();
            let share = seen * HELD_OUT / total - before;
            dataset.training.extend(class.split_off(share));
            dataset.held_out.append(&mut class);
        }
        dataset
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn the_file_is_the_one_described() {
        let digest: String = Sha256::digest(DIGITS).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(digest, "68aea062d35a127749050fa0e52dca09d6569ac08092c925610e0954e172dde2");
        assert_eq!(DIGITS.len(), 1797 * RECORD);
        let mut counts = [0; CLASSES];
        for image in images() {
            counts[image.label] += 1;
        }
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
    }

    #[test]
    fn pixels_are_centred_ink() {
        let all = images();
        let ink = |image: &Image| image.pixels.map(|p| (p / SCALE + MEAN) * 16.0);
        let first: Vec<f32> = ink(&all[0])[..8].iter().map(|p| p.round()).collect();
        assert_eq!(first, [0.0, 0.0, 5.0, 13.0, 9.0, 1.0, 0.0, 0.0]);
        assert_eq!(all[0].label, 0);
        let pixels = all.iter().flat_map(|image| image.pixels);
        assert!(pixels.clone().all(|p| (-0.61..=1.41).contains(&p)));
        let mean = pixels.sum::<f32>() / (1797.0 * 64.0);
        assert!(mean.abs() < 0.05, "{mean}");
    }

    #[test]
    fn held_out_is_stratified_and_disjoint() {
        for seed in [0, 7] {
            let dataset = Dataset::new(seed);
            assert_eq!(dataset.held_out.len(), HELD_OUT);
            assert_eq!(dataset.training.len(), 1797 - HELD_OUT);
            for class in 0..CLASSES {
                let held = dataset.held_out.iter().filter(|i| i.label == class).count();
                assert!((34..=38).contains(&held), "class {class} has {held}");
            }
            // No two images of the file are equal, so equality finds an image used twice.
            let twice = dataset.held_out.iter().filter(|i| dataset.training.contains(i));
            assert_eq!(twice.count(), 0);
        }
    }

    #[test]
    fn a_seed_decides_the_parting() {
        assert_eq!(Dataset::new(3).held_out, Dataset::new(3).held_out);
        assert_ne!(Dataset::new(3).held_out, Dataset::new(4).held_out);
    }
}
