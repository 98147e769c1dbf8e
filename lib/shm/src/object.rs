//! What an object says about itself, and the one check of it: for the writer before sealing, for the reader after copying.

use lifl_ebpf_common::Kind;

/// Alignment of every run within a payload, in bytes: a cache line, and the widest vector register.
pub const RUN_ALIGN: u64 = 64;

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ObjectKind {
    /// One client's update, raw: contributes weight x values.
    Update = 1,
    /// An unnormalised partial sum of `count` updates: contributes its values as they are.
    Partial = 2,
    /// A model: its payload is a whole safetensors file and has no runs.
    Model = 3,
}

/// How the elements of a run are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Element {
    /// IEEE 754 binary32.
    F32 = 1,
    /// IEEE 754 binary16.
    F16 = 2,
    /// The upper half of a binary32.
    Bf16 = 3,
    /// Fixed point: a signed integer whose scale is the job's.
    I64 = 4,
}

/// Consecutive elements of the model's flat vector, stored consecutively in the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index of the first element in the flat vector.
    pub first: u64,
    /// Number of elements, at least one.
    pub elements: u64,
    /// Where they start within the payload, bytes; a multiple of 64.
    pub offset: u64,
    /// How each is stored.
    pub dtype: Element,
}

/// The header of an object, as its writer seals it.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectMeta {
    /// What it is.
    pub kind: ObjectKind,
    /// Round of the job.
    pub round: u32,
    /// Client updates contained: 1 for an update, at least 1 for a partial; a model that starts a job has none.
    pub count: u32,
    /// Sum of their weights, finite and positive; a model that starts a job has none.
    pub weight: f64,
    /// Bytes of the payload in use.
    pub length: u64,
    /// Where the elements are, sorted by `first`. None in a model, at least one in everything else.
    pub runs: Vec<Run>,
}

/// Why a header is refused.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum MetaError {
    /// Not a kind of object.
    #[error("unknown kind of object {0}")]
    Kind(u64),
    /// Not a kind of element.
    #[error("run {run} has unknown dtype {code}")]
    Dtype {
        /// Index of the run.
        run: usize,
        /// What stands there.
        code: u64,
    },
    /// A number that does not fit its field.
    #[error("{field} {value} is out of range")]
    Range {
        /// Which field.
        field: &'static str,
        /// What stands there.
        value: u64,
    },
    /// Weight zero, negative or not a number.
    #[error("weight {0} is not finite and positive")]
    Weight(f64),
    /// An update counts one, a partial at least one.
    #[error("count {0} does not fit the kind of object")]
    Count(u32),
    /// More payload than a slot has.
    #[error("length {length} exceeds the slot's {payload} bytes")]
    Length {
        /// What the header says.
        length: u64,
        /// What the slot has.
        payload: u64,
    },
    /// No runs where there must be some, some where there must be none, or more than the segment has room for.
    #[error("{found} runs where {allowed} are allowed")]
    Runs {
        /// What the header says.
        found: u64,
        /// What is allowed, in words.
        allowed: &'static str,
    },
    /// A run that is empty, out of bounds, out of order or not aligned.
    #[error("run {run} {what}")]
    Run {
        /// Index of the run.
        run: usize,
        /// What is wrong with it.
        what: &'static str,
    },
}

// === impl ObjectKind ===

impl ObjectKind {
    /// Reads a kind from shared memory.
    #[must_use]
    pub const fn from_code(code: u64) -> Option<Self> {
        Some(match code {
            1 => Self::Update,
            2 => Self::Partial,
            3 => Self::Model,
            _ => return None,
        })
    }

    /// The object that a kind of descriptor names: a `Sealed` names a partial, `Release` and `Close` none that can be read.
    #[must_use]
    pub const fn of_descriptor(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Update => Some(Self::Update),
            Kind::Partial | Kind::Sealed => Some(Self::Partial),
            Kind::Model => Some(Self::Model),
            Kind::Release | Kind::Close => None,
        }
    }

    /// The kind of descriptor that hands such an object to its receiver.
    #[must_use]
    pub const fn descriptor(self) -> Kind {
        match self {
            Self::Update => Kind::Update,
            Self::Partial => Kind::Partial,
            Self::Model => Kind::Model,
        }
    }
}

// === impl Element ===

impl Element {
    /// Reads a dtype from shared memory.
    #[must_use]
    pub const fn from_code(code: u64) -> Option<Self> {
        Some(match code {
            1 => Self::F32,
            2 => Self::F16,
            3 => Self::Bf16,
            4 => Self::I64,
            _ => return None,
        })
    }

    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I64 => 8,
        }
    }
}

// === impl Run ===

impl Run {
    /// A run over a whole vector, at the start of the payload: what partials have.
    #[must_use]
    pub const fn whole(elements: u64, dtype: Element) -> Self {
        Self { first: 0, elements, offset: 0, dtype }
    }

    /// Bytes of the run, or none if that overflows.
    #[must_use]
    pub const fn bytes(&self) -> Option<u64> {
        self.elements.checked_mul(self.dtype.bytes())
    }
}

// === impl ObjectMeta ===

impl ObjectMeta {
    /// Elements that the runs hold together. Runs do not overlap, so this equals the model's N only if nothing is missing.
    #[must_use]
    pub fn covered(&self) -> u64 {
        self.runs.iter().fold(0, |sum, run| sum.saturating_add(run.elements))
    }

    /// Holds for every object that exists: what readers may rely on.
    pub(crate) fn check(&self, payload: u64, elements: u64) -> Result<(), MetaError> {
        let model = self.kind == ObjectKind::Model;
        if !self.weight.is_finite() || self.weight < 0.0 || (self.weight == 0.0 && !model) {
            return Err(MetaError::Weight(self.weight));
        }
        let counts = match self.kind {
            ObjectKind::Update => self.count == 1,
            ObjectKind::Partial => self.count >= 1,
            ObjectKind::Model => true,
        };
        if !counts {
            return Err(MetaError::Count(self.count));
        }
        if self.length > payload {
            return Err(MetaError::Length { length: self.length, payload });
        }
        if model != self.runs.is_empty() {
            let allowed = if model { "none" } else { "at least one" };
            return Err(MetaError::Runs { found: self.runs.len() as u64, allowed });
        }
        let mut next = 0;
        for (index, run) in self.runs.iter().enumerate() {
            next = check_run(run, next, self.length, elements).map_err(|what| MetaError::Run { run: index, what })?;
        }
        Ok(())
    }
}

/// Returns the first element that the next run may hold.
fn check_run(run: &Run, next: u64, length: u64, elements: u64) -> Result<u64, &'static str> {
    if run.elements == 0 {
        return Err("is empty");
    }
    if run.first < next {
        return Err("overlaps the one before it or is out of order");
    }
    let end = run.first.checked_add(run.elements).filter(|end| *end <= elements);
    let end = end.ok_or("exceeds the model's elements")?;
    if !run.offset.is_multiple_of(RUN_ALIGN) {
        return Err("is not aligned to 64 bytes");
    }
    let last = run.bytes().and_then(|bytes| run.offset.checked_add(bytes));
    if last.is_none_or(|last| last > length) {
        return Err("exceeds the payload");
    }
    Ok(end)
}
