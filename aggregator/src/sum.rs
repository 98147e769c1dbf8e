//! One pass over inputs: `next = current + sum w x`.

use lifl_fold::{Dtype, FixedInput, Input, Overflow, as_f32, as_i64};
use lifl_shm::{Element, Object, ObjectKind, Run};

/// A sum under way: the slot's memory seen as numbers.
#[derive(Debug)]
pub enum Accumulator<'a> {
    /// Single precision.
    Float(&'a mut [f32]),
    /// Fixed point of this scale: identical bits for any order and any tree.
    Fixed(&'a mut [i64], f64),
}

/// Why inputs cannot be added.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SumError {
    /// The runs of an object do not cover the model.
    #[error("object of {got} elements, the model has {want}")]
    Elements {
        /// Elements covered.
        got: u64,
        /// Elements of the model.
        want: u64,
    },
    /// A partial in fixed point for a sum in floats, or the other way round.
    #[error("{0:?} elements do not fit this job's sums")]
    Element(Element),
    /// A fixed-point product or sum left its bound.
    #[error("overflow in fixed point: a value above the bound that the job's scale was made for")]
    Overflow,
}

/// Part of an input that lies within one range of elements.
#[derive(Clone, Copy)]
struct Piece<'a> {
    bytes: &'a [u8],
    dtype: Element,
    /// `None`: a partial, added as it is.
    weight: Option<f64>,
}

/// Writes `base + sum of inputs` over the whole accumulator, each input read once.
///
/// Updates count with their weight, partials as they are. Objects may hold their floats in several runs of different
/// types; the pass is cut where any of them changes.
///
/// # Errors
/// [`SumError`]; the accumulator's content is then undefined.
pub fn fold(mut out: Accumulator<'_>, base: Option<&Object>, inputs: &[Object]) -> Result<(), SumError> {
    let want = out.elements();
    for object in base.iter().copied().chain(inputs) {
        let got = object.meta().covered();
        if got != want {
            return Err(SumError::Elements { got, want });
        }
    }
    let mut cuts: Vec<u64> =
        base.iter().copied().chain(inputs).flat_map(|o| o.runs().iter().map(|r| r.first)).collect();
    cuts.push(want);
    cuts.sort_unstable();
    cuts.dedup();
    for range in cuts.windows(2) {
        let (first, end) = (range[0], range[1]);
        let base = base.map(|object| piece(object, first, end)).transpose()?;
        let pieces = inputs.iter().map(|object| piece(object, first, end)).collect::<Result<Vec<_>, _>>()?;
        out.range(first, end, base, &pieces)?;
    }
    Ok(())
}

/// The bytes of elements `first..end`, which lie in one run of the object.
fn piece(object: &Object, first: u64, end: u64) -> Result<Piece<'_>, SumError> {
    let holds = |run: &&Run| run.first <= first && end <= run.first + run.elements;
    let missing = SumError::Elements { got: first, want: end };
    let run = object.runs().iter().find(holds).ok_or_else(|| missing.clone())?;
    let at = |element: u64| usize::try_from((element - run.first) * run.dtype.bytes()).unwrap_or(usize::MAX);
    let bytes = object.run_bytes(run).get(at(first)..at(end)).ok_or(missing)?;
    let weight = (object.meta().kind == ObjectKind::Update).then_some(object.meta().weight);
    Ok(Piece { bytes, dtype: run.dtype, weight })
}

// === impl Accumulator ===

impl Accumulator<'_> {
    fn elements(&self) -> u64 {
        match self {
            Self::Float(out) => out.len() as u64,
            Self::Fixed(out, _) => out.len() as u64,
        }
    }

    fn range(&mut self, first: u64, end: u64, base: Option<Piece<'_>>, pieces: &[Piece<'_>]) -> Result<(), SumError> {
        let range = usize::try_from(first).unwrap_or(usize::MAX)..usize::try_from(end).unwrap_or(usize::MAX);
        match self {
            Self::Float(out) => {
                let base = base.map(|b| b.floats()).transpose()?;
                let inputs = pieces.iter().map(Piece::float).collect::<Result<Vec<_>, _>>()?;
                lifl_fold::fold_f32(&mut out[range], base, &inputs);
                Ok(())
            }
            Self::Fixed(out, scale) => {
                let base = base.map(|b| b.integers()).transpose()?;
                let inputs = pieces.iter().map(Piece::fixed).collect::<Result<Vec<_>, _>>()?;
                lifl_fold::fold_i64(&mut out[range], base, &inputs, *scale).map_err(|Overflow| SumError::Overflow)
            }
        }
    }
}

// === impl Piece ===

impl<'a> Piece<'a> {
    fn floats(&self) -> Result<&'a [f32], SumError> {
        (self.dtype == Element::F32).then(|| as_f32(self.bytes)).flatten().ok_or(SumError::Element(self.dtype))
    }

    fn integers(&self) -> Result<&'a [i64], SumError> {
        (self.dtype == Element::I64).then(|| as_i64(self.bytes)).flatten().ok_or(SumError::Element(self.dtype))
    }

    #[expect(clippy::cast_possible_truncation, reason = "the sum is in f32; a weight is rounded to it once")]
    fn float(&self) -> Result<Input<'a>, SumError> {
        let dtype = self.dtype()?;
        Ok(Input { bytes: self.bytes, dtype, factor: self.weight.unwrap_or(1.0) as f32 })
    }

    fn fixed(&self) -> Result<FixedInput<'a>, SumError> {
        match self.weight {
            Some(weight) => Ok(FixedInput::Float { bytes: self.bytes, dtype: self.dtype()?, weight }),
            None => self.integers().map(FixedInput::Partial),
        }
    }

    fn dtype(&self) -> Result<Dtype, SumError> {
        match self.dtype {
            Element::F32 => Ok(Dtype::F32),
            Element::F16 => Ok(Dtype::F16),
            Element::Bf16 => Ok(Dtype::Bf16),
            Element::I64 => Err(SumError::Element(self.dtype)),
        }
    }
}
