//! The end of a round: the sum divided once, written as a model file.

use std::ops::Range;

use lifl_api::{
    job::FloatDtype,
    manifest::{Manifest, ManifestError, float},
};
use lifl_fold::{Dtype, as_f32, as_i64, first_non_finite, scale_f32, scale_i64};
use lifl_shm::{Element, Object};

/// Why there is no model.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DivideError {
    /// The base is no model.
    #[error("the round's base: {0}")]
    Base(#[from] ManifestError),
    /// Sum and base are of different models.
    #[error("sum of {sum} elements for a model of {model}")]
    Elements {
        /// Elements of the sum.
        sum: u64,
        /// Elements of the base.
        model: u64,
    },
    /// A mean is infinite or not a number: the sum left the range of its type.
    #[error(
        "tensor '{tensor}': element {index} of the mean is not finite; are the updates' values near the limit of their type?"
    )]
    NotFinite {
        /// Tensor.
        tensor: String,
        /// Element within it.
        index: usize,
    },
    /// The slot is too small.
    #[error("a model of {0} bytes does not fit its slot")]
    Size(u64),
}

/// Writes `base` with its floats replaced by `sum / weight` (`base + sum / weight` where updates are differences).
///
/// Header and tensors of other types are those of the base. Returns the length of the file.
///
/// # Errors
/// [`DivideError`]; the content of `out` is then undefined.
pub fn divide(out: &mut [u8], base: &Object, sum: &Object, scale: Option<f64>, diff: bool) -> Result<u64, DivideError> {
    let file = base.payload();
    let manifest = Manifest::parse(file)?;
    let length = manifest.file_bytes();
    let too_small = DivideError::Size(length);
    let whole = usize::try_from(length).ok().filter(|n| *n <= out.len() && *n <= file.len()).ok_or(too_small)?;
    let covered = sum.meta().covered();
    if covered != manifest.elements() {
        return Err(DivideError::Elements { sum: covered, model: manifest.elements() });
    }
    let data = usize::try_from(manifest.header_bytes()).unwrap_or(whole).min(whole);
    out[..data].copy_from_slice(&file[..data]);
    let at = |offset: u64| data + usize::try_from(offset).unwrap_or(usize::MAX);
    for tensor in manifest.tensors() {
        let range = at(tensor.begin)..at(tensor.end);
        let (Some(first), Some(dtype)) = (tensor.first, float(tensor.dtype).map(kernel_dtype)) else {
            out[range.clone()].copy_from_slice(&file[range]);
            continue;
        };
        let count = (tensor.end - tensor.begin) / dtype.size() as u64;
        let mean = &mut out[range.clone()];
        let old = diff.then_some((&file[range], dtype));
        mean_of(mean, dtype, sum, first..first + count, scale, old);
        if let Some(index) = first_non_finite(mean, dtype) {
            return Err(DivideError::NotFinite { tensor: tensor.name.clone(), index });
        }
    }
    Ok(length)
}

/// Writes the mean of some elements. The one run of a partial covers the model: its caller has checked that.
fn mean_of(
    out: &mut [u8],
    dtype: Dtype,
    sum: &Object,
    elements: Range<u64>,
    scale: Option<f64>,
    base: Option<(&[u8], Dtype)>,
) {
    let Some(run) = sum.runs().first() else { return };
    let to = |element: u64| usize::try_from(element).unwrap_or(usize::MAX);
    let elements = to(elements.start)..to(elements.end);
    let (bytes, weight) = (sum.run_bytes(run), sum.meta().weight);
    match (run.dtype, scale) {
        (Element::I64, Some(scale)) => {
            let sum = as_i64(bytes).unwrap_or_default();
            scale_i64(out, dtype, &sum[elements], scale, weight, base);
        }
        _ => {
            let sum = as_f32(bytes).unwrap_or_default();
            scale_f32(out, dtype, &sum[elements], 1.0 / weight, base);
        }
    }
}

fn kernel_dtype(dtype: FloatDtype) -> Dtype {
    match dtype {
        FloatDtype::F32 => Dtype::F32,
        FloatDtype::F16 => Dtype::F16,
        FloatDtype::BF16 => Dtype::Bf16,
    }
}
