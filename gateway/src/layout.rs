//! Where an update's tensors go in its slot.
//!
//! The slot holds the floats in the order of the global model, whatever the order of the client's file: one run as long as
//! the dtype stays the same, so that an update of one dtype is a single run of all elements. Other tensors are dropped.

use lifl_api::{
    job::{FloatDtype, UpdateSpec},
    manifest::{MAX_HEADER, Manifest, Tensor, float},
};
use lifl_fold::Dtype;
use lifl_shm::{Element, Run};

/// Runs begin on a line of the cache, as the store demands.
const ALIGN: u64 = 64;

/// What a job's model asks of uploads and slots.
#[derive(Clone, Debug)]
pub(crate) struct Measure {
    /// The global model's tensors.
    pub(crate) manifest: Manifest,
    /// Bytes of a slot's payload that hold any accepted update, or the model.
    pub(crate) payload_bytes: u64,
    /// Runs of an update, at most.
    pub(crate) max_runs: u32,
    /// Largest body accepted.
    pub(crate) max_size: u64,
    /// Float types accepted.
    pub(crate) dtypes: Vec<FloatDtype>,
}

/// One tensor of an upload: its bytes in the file's data, and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Index in the update's manifest, for error messages.
    pub(crate) tensor: usize,
    /// Bytes.
    pub(crate) length: usize,
    /// Offset in the slot and type of its elements; none for what is dropped.
    pub(crate) to: Option<(usize, Dtype)>,
}

/// Where all of an upload goes.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// In the order of the file.
    pub(crate) pieces: Vec<Piece>,
    /// In the order of the model.
    pub(crate) runs: Vec<Run>,
    /// Bytes of the slot in use.
    pub(crate) length: u64,
}

// === impl Measure ===

impl Measure {
    pub(crate) fn new(manifest: Manifest, update: &UpdateSpec) -> Self {
        let widest = update.dtypes.iter().map(|dtype| dtype.size()).max().unwrap_or(4);
        let floats = manifest.tensors().iter().filter(|tensor| tensor.first.is_some()).count() as u64;
        let others: u64 = manifest.tensors().iter().filter(|t| t.first.is_none()).map(|t| t.end - t.begin).sum();
        let data = manifest.elements().saturating_mul(widest);
        // Padding costs less than a line for each run but the first; one dtype makes one run.
        let padding = if update.dtypes.len() > 1 { floats * ALIGN } else { 0 };
        let own = data.saturating_add(others).saturating_add(8 + MAX_HEADER);
        Self {
            payload_bytes: data.saturating_add(padding).max(manifest.file_bytes()),
            max_runs: u32::try_from(floats).unwrap_or(u32::MAX),
            max_size: update.max_size.map_or(own, |size| size.0),
            dtypes: update.dtypes.clone(),
            manifest,
        }
    }
}

// === impl Layout ===

impl Layout {
    /// Lays out an update that [`Manifest::check`] let pass. `None` only for sizes beyond this machine.
    pub(crate) fn new(model: &Manifest, update: &Manifest) -> Option<Self> {
        let mut runs: Vec<Run> = Vec::new();
        let mut to = vec![None; update.tensors().len()];
        let mut end: u64 = 0;
        for want in model.tensors() {
            let (Some(first), Some(got)) = (want.first, index_of(update, &want.name)) else { continue };
            let tensor = update.tensors().get(got)?;
            let (element, dtype) = element(float(tensor.dtype)?);
            let elements = bytes_of(tensor) / dtype.size() as u64;
            if elements == 0 {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.dtype == element => run.elements += elements,
                _ => {
                    end = end.next_multiple_of(ALIGN);
                    runs.push(Run { first, elements, offset: end, dtype: element });
                }
            }
            to[got] = Some((usize::try_from(end).ok()?, dtype));
            end += bytes_of(tensor);
        }
        let piece = |(tensor, is): (usize, &Tensor)| {
            Some(Piece { tensor, length: usize::try_from(bytes_of(is)).ok()?, to: to[tensor] })
        };
        let pieces = update.tensors().iter().enumerate().map(piece).collect::<Option<_>>()?;
        Some(Self { pieces, runs, length: end })
    }
}

fn bytes_of(tensor: &Tensor) -> u64 {
    tensor.end - tensor.begin
}

/// The manifest keeps its tensors in the order of their bytes; this is where `name` is.
fn index_of(update: &Manifest, name: &str) -> Option<usize> {
    let wanted = update.tensor(name)?;
    let found =
        update.tensors().partition_point(|t| (t.begin, t.end, &t.name) < (wanted.begin, wanted.end, &wanted.name));
    Some(found)
}

/// How a float type is called in slots, and in kernels.
pub(crate) const fn element(dtype: FloatDtype) -> (Element, Dtype) {
    match dtype {
        FloatDtype::F32 => (Element::F32, Dtype::F32),
        FloatDtype::F16 => (Element::F16, Dtype::F16),
        FloatDtype::BF16 => (Element::Bf16, Dtype::Bf16),
    }
}
