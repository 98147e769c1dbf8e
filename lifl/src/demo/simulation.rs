//! The whole training without platform or network: FedAvg as a loop. What the platform must reach, it must reach here first.

use fastrand::Rng;

use super::{
    digits::Dataset,
    split::Split,
    train::{Mlp, Training},
};

const GOAL: f64 = 0.95;
const ROUNDS: usize = 30;

/// Accuracy on the held-out images after each round: 20 of 100 clients drawn anew, each weighing what it has images.
#[expect(clippy::cast_possible_truncation, reason = "a mean of f32 is one again")]
fn accuracies(seed: u64, luck: u64) -> Vec<f64> {
    let dataset = Dataset::new(seed);
    let shares = Split { seed, ..Split::DEMO }.share(dataset.training).expect("enough");
    let mut rng = Rng::with_seed(luck);
    let mut global = Mlp::new(Mlp::HIDDEN, seed);
    let mut clients: Vec<usize> = (0..shares.len()).collect();
    let mut history = Vec::new();
    for round in 1..=ROUNDS {
        rng.shuffle(&mut clients);
        let mut sum = vec![0.0; global.parameters().len()];
        let mut weights = 0.0;
        for &client in &clients[..20] {
            let mut local = global.clone();
            Training::DEMO.run(&mut local, &shares[client], rng.u64(..));
            let weight = shares[client].len() as f64;
            weights += weight;
            for (sum, parameter) in sum.iter_mut().zip(local.parameters()) {
                *sum += weight * f64::from(*parameter);
            }
        }
        let mean: Vec<u8> = sum.iter().flat_map(|s| ((s / weights) as f32).to_le_bytes()).collect();
        global = with_parameters(&global, &mean);
        let accuracy = global.accuracy(&dataset.held_out);
        println!("seed {seed} round {:2} accuracy {accuracy:.4}", round);
        history.push(accuracy);
        if accuracy >= GOAL {
            break;
        }
    }
    history
}

/// As the aggregator does: same header, other numbers.
fn with_parameters(model: &Mlp, parameters: &[u8]) -> Mlp {
    use safetensors::{Dtype, SafeTensors, serialize, tensor::TensorView};
    let file = model.to_safetensors().expect("written");
    let tensors = SafeTensors::deserialize(&file).expect("read");
    let mut rest = parameters;
    let views = Mlp::tensors(Mlp::HIDDEN).map(|(name, shape)| {
        let size = tensors.tensor(name).expect("there").data().len();
        let (data, after) = rest.split_at(size);
        rest = after;
        (name, TensorView::new(Dtype::F32, shape, data).expect("fits"))
    });
    Mlp::from_safetensors(&serialize(views, None).expect("written")).expect("read")
}

#[test]
fn averaging_reaches_the_goal_from_clients_unlike_each_other() {
    // Unoptimised arithmetic is 30 times slower: there the demo's own deal must do.
    let deals = if cfg!(debug_assertions) { Split::DEMO.seed..=Split::DEMO.seed } else { 0..=39 };
    let mut reached = Vec::new();
    for seed in deals {
        let accuracies = accuracies(seed, !seed);
        assert!(accuracies[0] < 0.9, "one round must not do it: {accuracies:?}");
        assert!(accuracies.last() >= Some(&GOAL), "seed {seed}: {accuracies:?}");
        reached.push(accuracies.len());
    }
    reached.sort_unstable();
    println!("rounds to {GOAL}: {reached:?}");
    let median = reached[reached.len() / 2];
    assert!(median <= 12, "{median}");
}
