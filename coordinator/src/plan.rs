//! The tree of a job and its memory: who aggregates, and whether it fits.
//!
//! ```text
//! updates -> leaf 0 \
//! updates -> leaf 1 --> middle --> top -> model          one leaf would be a hop for nothing: then the top alone
//! updates -> leaf 2 /
//! ```
//!
//! The tree has as many leaves as the fan-in asks for, the processors bear and the memory holds. A job is refused when
//! not even the top alone fits: the refusal names every figure.

use lifl_api::{
    job::{FederatedJobSpec, Timing},
    manifest::{Manifest, float},
    node::{RoleConfig, Tree},
    plan::{ACCUMULATORS, GATEWAY_MODELS, LEAST_SLOTS, LEAVES_PER_CORE, TOP_MODELS},
};
use lifl_ebpf_common::role;

/// Inputs folded before an eager member seals its partial: bounds what a successor repeats.
const EAGER_BATCH: u32 = 8;
/// Header of an object.
const OBJECT_HEADER: u64 = 4096;
/// One run of an object's payload.
const RUN: u64 = 32;
const PAGE: u64 = 4096;

/// What counts of a model for planning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Length of the flat vector of floats.
    pub elements: u64,
    /// Bytes of the model file.
    pub file_bytes: u64,
    /// Floating-point tensors.
    pub float_tensors: u32,
    /// Bytes of the tensors that are not floats.
    pub other_bytes: u64,
}

/// A job's aggregators and their memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Who aggregates.
    pub tree: Tree,
    /// All of them.
    pub members: Vec<RoleConfig>,
    /// Bytes left for the gateway's slots.
    pub slot_bytes: u64,
}

/// A job that cannot run here: a word for programs, a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For programs.
    pub reason: &'static str,
    /// For people, with the figures.
    pub message: String,
}

// === impl Shape ===

impl Shape {
    /// Of a model.
    #[must_use]
    pub fn of(manifest: &Manifest) -> Self {
        let (floats, others): (Vec<_>, Vec<_>) = manifest.tensors().iter().partition(|t| float(t.dtype).is_some());
        Self {
            elements: manifest.elements(),
            file_bytes: manifest.file_bytes(),
            float_tensors: u32::try_from(floats.len()).unwrap_or(u32::MAX),
            other_bytes: others.iter().map(|t| t.end - t.begin).sum(),
        }
    }

    /// Bytes of a slot that holds any accepted update.
    fn slot(&self, spec: &FederatedJobSpec) -> u64 {
        let widest = spec.update.dtypes.iter().map(|d| d.size()).max().unwrap_or(4);
        object(self.elements * widest + RUN * u64::from(self.float_tensors))
    }

    /// Bytes of the tensors of the smallest accepted update.
    fn smallest_update(&self, spec: &FederatedJobSpec) -> u64 {
        let narrowest = spec.update.dtypes.iter().map(|d| d.size()).min().unwrap_or(4);
        self.other_bytes + self.elements * narrowest
    }
}

fn object(payload: u64) -> u64 {
    (OBJECT_HEADER + payload).next_multiple_of(PAGE)
}

/// The tree of `leaves` leaves.
fn tree(leaves: u32) -> Tree {
    if leaves < 2 {
        return Tree::default();
    }
    Tree { leaves: (0..leaves).map(|i| role::LEAF + i).collect(), middle: Some(role::MIDDLE) }
}

/// Leaves that the job asks for on a node of so many processors.
fn leaves_wanted(spec: &FederatedJobSpec, cores: u32) -> u32 {
    let most = cores.max(1).saturating_mul(LEAVES_PER_CORE);
    spec.clients_per_round.div_ceil(spec.aggregation.leaf_fan_in.max(1)).clamp(1, most)
}

/// The tree before the model is known (`fromFirstClient`): as if memory were no bound.
#[must_use]
pub fn tree_without_model(spec: &FederatedJobSpec, cores: u32) -> Tree {
    tree(leaves_wanted(spec, cores))
}

/// Plans a job on a node of `cores` processors within `quota` bytes.
///
/// # Errors
/// [`Refusal`] when it cannot run there.
pub fn plan(spec: &FederatedJobSpec, shape: &Shape, cores: u32, quota: u64) -> Result<Plan, Refusal> {
    let scale = match spec.fixed_point() {
        Ok(fixed) => fixed.map(|f| f.scale),
        Err(error) => return Err(Refusal { reason: "FixedPointTooCoarse", message: error.to_string() }),
    };
    let least = shape.smallest_update(spec);
    if let Some(most) = spec.update.max_size.filter(|most| most.0 < least) {
        return Err(Refusal {
            reason: "MaxSizeTooSmall",
            message: format!(
                "update.maxSize is {} bytes, but the tensors of an update of this model are at least {least} bytes",
                most.0
            ),
        });
    }
    let slot = shape.slot(spec);
    let slots = match spec.aggregation.timing {
        Timing::Eager => LEAST_SLOTS,
        Timing::Lazy => u64::from(spec.clients_per_round).max(LEAST_SLOTS),
    };
    let accumulator = object(shape.elements * if scale.is_some() { 8 } else { 4 });
    let model = object(shape.file_bytes);
    let mut leaves = leaves_wanted(spec, cores);
    loop {
        let members = if leaves < 2 { 1 } else { u64::from(leaves) + 2 };
        let folding = members * ACCUMULATORS * accumulator + TOP_MODELS * model;
        let need = folding + GATEWAY_MODELS * model + slots * slot;
        if need <= quota {
            let tree = tree(leaves);
            let members = members_of(&tree, spec, shape, scale);
            return Ok(Plan { tree, members, slot_bytes: quota - folding });
        }
        if leaves > 1 {
            leaves -= 1;
            continue;
        }
        let lazy = if spec.aggregation.timing == Timing::Lazy {
            " (Lazy keeps all clientsPerRound updates until the round is closed; Eager needs 2)"
        } else {
            ""
        };
        return Err(Refusal {
            reason: "QuotaTooSmall",
            message: format!(
                "the job needs {need} bytes of shared memory: {slots} update slots of {slot}{lazy}, {ACCUMULATORS} \
                 accumulators of {accumulator}, {} models of {model}; its quota is {quota} bytes: raise --shm-limit",
                TOP_MODELS + GATEWAY_MODELS
            ),
        });
    }
}

fn members_of(tree: &Tree, spec: &FederatedJobSpec, shape: &Shape, fixed_scale: Option<f64>) -> Vec<RoleConfig> {
    let eager = spec.aggregation.timing == Timing::Eager;
    let batch = if eager { EAGER_BATCH } else { spec.clients_per_round.max(EAGER_BATCH) };
    let member = |role, parent| RoleConfig {
        role,
        parent,
        elements: shape.elements,
        model_bytes: shape.file_bytes,
        max_runs: shape.float_tensors.max(1),
        fixed_scale,
        eager,
        batch,
        diff: spec.update.kind == lifl_api::job::UpdateKind::Diff,
    };
    let mut members = vec![member(role::TOP, None)];
    members.extend(tree.middle.map(|middle| member(middle, Some(role::TOP))));
    members.extend(tree.leaves.iter().map(|leaf| member(*leaf, Some(tree.middle.unwrap_or(role::TOP)))));
    members
}

#[cfg(test)]
mod tests {
    use lifl_api::{
        job::{FederatedJob, FloatDtype},
        quantity::Bytes,
    };

    use super::*;

    const MODEL: Shape = Shape { elements: 1_000_000, file_bytes: 4_000_512, float_tensors: 10, other_bytes: 0 };

    fn spec(goal: u32) -> FederatedJobSpec {
        let text = format!(
            "apiVersion: fl.lifl.dev/v1alpha1\nkind: FederatedJob\nmetadata: {{name: j}}\nspec:\n  \
             model: {{name: m, initial: {{uri: file:///m}}}}\n  rounds: 2\n  clientsPerRound: {goal}\n  \
             maxWeight: 1000\n  checkpoint: {{uri: file:///c}}\n"
        );
        FederatedJob::from_yaml(&text).unwrap().spec
    }

    #[test]
    fn one_leaf_is_the_top_alone_and_more_have_a_middle() {
        for (goal, fan_in, cores, leaves) in
            [(1, 2, 4, 0), (2, 2, 4, 0), (3, 2, 4, 2), (20, 2, 4, 10), (20, 2, 1, 4), (1000, 2, 2, 8)]
        {
            let mut spec = spec(goal);
            spec.aggregation.leaf_fan_in = fan_in;
            let plan = plan(&spec, &MODEL, cores, 1 << 40).unwrap();
            assert_eq!(plan.tree.leaves.len(), leaves, "{goal} {fan_in} {cores}");
            assert_eq!(plan.tree.middle.is_some(), leaves > 0);
            assert_eq!(plan.members.len(), if leaves == 0 { 1 } else { leaves + 2 });
            assert_eq!(plan.members[0].parent, None);
            for member in &plan.members[1..] {
                assert_eq!(member.parent, Some(if member.role == role::MIDDLE { role::TOP } else { role::MIDDLE }));
            }
            assert_eq!(plan.tree, tree_without_model(&spec, cores));
        }
    }

    #[test]
    fn little_memory_makes_a_smaller_tree_before_it_refuses() {
        let spec = spec(20);
        let full = plan(&spec, &MODEL, 8, 1 << 40).unwrap();
        assert_eq!(full.tree.leaves.len(), 10);
        let some = plan(&spec, &MODEL, 8, 80 << 20).unwrap();
        assert!((2..10).contains(&some.tree.leaves.len()), "{:?}", some.tree);
        let alone = plan(&spec, &MODEL, 8, 30 << 20).unwrap();
        assert!(alone.tree.leaves.is_empty());
        for p in [full, some, alone] {
            assert!(p.slot_bytes >= LEAST_SLOTS * MODEL.slot(&spec) + object(MODEL.file_bytes));
        }
    }

    #[test]
    fn impossible_jobs_are_refused_with_their_figures() {
        type Change = fn(&mut FederatedJobSpec);
        let table: [(Change, u64, &str, &[&str]); 5] = [
            (|_| (), 20 << 20, "QuotaTooSmall", &["20971520", "4005888", "2 update slots", "--shm-limit"]),
            (
                |s| s.aggregation.timing = Timing::Lazy,
                90 << 20,
                "QuotaTooSmall",
                &["20 update slots", "Lazy", "94371840"],
            ),
            (|s| s.aggregation.reproducible = true, 33 << 20, "QuotaTooSmall", &["accumulators of 8007680"]),
            (|s| s.update.max_size = Some(Bytes(1_999_999)), 1 << 40, "MaxSizeTooSmall", &["1999999", "2000000"]),
            (
                |s| (s.aggregation.reproducible, s.max_weight) = (true, 1 << 40),
                1 << 40,
                "FixedPointTooCoarse",
                &["1099511627776"],
            ),
        ];
        for (change, quota, reason, figures) in table {
            let mut spec = spec(20);
            change(&mut spec);
            let refusal = plan(&spec, &MODEL, 8, quota).unwrap_err();
            assert_eq!(refusal.reason, reason, "{refusal}");
            for figure in figures {
                assert!(refusal.message.contains(figure), "{figure} not in: {refusal}");
            }
        }
    }

    #[test]
    fn a_max_size_for_half_precision_is_enough_when_half_is_accepted() {
        let mut spec = spec(4);
        spec.update.max_size = Some(Bytes(2_100_000));
        assert!(plan(&spec, &MODEL, 2, 1 << 40).is_ok());
        spec.update.dtypes = vec![FloatDtype::F32];
        assert_eq!(plan(&spec, &MODEL, 2, 1 << 40).unwrap_err().reason, "MaxSizeTooSmall");
    }

    #[test]
    fn roles_say_how_to_fold() {
        let mut spec = spec(20);
        let eager = plan(&spec, &MODEL, 2, 1 << 40).unwrap().members.remove(0);
        assert!(eager.eager && eager.batch == 8 && eager.fixed_scale.is_none() && eager.max_runs == 10);
        spec.aggregation.timing = Timing::Lazy;
        spec.aggregation.reproducible = true;
        let lazy = plan(&spec, &MODEL, 2, 1 << 40).unwrap().members.remove(0);
        assert!(!lazy.eager && lazy.batch == 20 && lazy.fixed_scale.is_some());
    }
}
