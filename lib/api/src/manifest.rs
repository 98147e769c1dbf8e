//! A model's tensors: what a safetensors header says, and where the floats lie in one flat vector.
//!
//! The global model's header is the measure: its floating-point tensors, in the order of their bytes, make one flat
//! vector of `elements` floats. Updates may hold the same tensors in another order and another float type; aggregation
//! sees only the flat vector.

use std::collections::BTreeMap;

use safetensors::tensor::{Dtype, Metadata};
use sha2::{Digest, Sha256};

use crate::job::FloatDtype;

/// Longest safetensors header accepted, bytes; a million tensors do not need more.
pub const MAX_HEADER: u64 = 1 << 20;

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where its bytes begin, counted from the first byte of data.
    pub begin: u64,
    /// Where they end.
    pub end: u64,
    /// First element in the flat vector of floats; `None` for other types.
    pub first: Option<u64>,
}

/// What a safetensors header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    tensors: Vec<Tensor>,
    by_name: BTreeMap<String, usize>,
    elements: u64,
    data_bytes: u64,
    header_bytes: u64,
}

/// A header that is unreadable, or is not the job's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not a safetensors header.
    #[error("unreadable safetensors header: {0}")]
    Unreadable(String),
    /// Longer than [`MAX_HEADER`].
    #[error("safetensors header of {0} bytes: more than {MAX_HEADER}")]
    TooLong(u64),
    /// No floating-point tensor.
    #[error("no floating-point tensor of F32, F16 or BF16: there is nothing to average")]
    NoFloats,
    /// A tensor of the job is absent.
    #[error("tensor '{0}' of the model is missing")]
    Missing(String),
    /// A tensor that the job does not know.
    #[error("tensor '{0}' is not one of the model's")]
    Unknown(String),
    /// Another shape.
    #[error("tensor '{name}' has shape {got:?}, the model's is {want:?}")]
    Shape {
        /// Tensor.
        name: String,
        /// Shape in the update.
        got: Vec<usize>,
        /// Shape in the model.
        want: Vec<usize>,
    },
    /// Another element type.
    #[error("tensor '{name}' has dtype {got}, accepted are {want}")]
    Dtype {
        /// Tensor.
        name: String,
        /// Type in the update.
        got: String,
        /// Types accepted.
        want: String,
    },
}

/// The float type of a tensor, where it is one that can be averaged.
#[must_use]
pub fn float(dtype: Dtype) -> Option<FloatDtype> {
    match dtype {
        Dtype::F32 => Some(FloatDtype::F32),
        Dtype::F16 => Some(FloatDtype::F16),
        Dtype::BF16 => Some(FloatDtype::BF16),
        _ => None,
    }
}

// === impl FloatDtype ===

impl FloatDtype {
    /// Bytes of an element.
    #[must_use]
    pub const fn size(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

// === impl Manifest ===

impl Manifest {
    /// Length of the header (prefix of 8 bytes included) that begins with `prefix`.
    ///
    /// # Errors
    /// [`ManifestError::TooLong`] before anything is allocated for it.
    pub fn header_length(prefix: [u8; 8]) -> Result<u64, ManifestError> {
        let length = u64::from_le_bytes(prefix);
        if length > MAX_HEADER {
            return Err(ManifestError::TooLong(length));
        }
        Ok(8 + length)
    }

    /// Reads a header: `bytes` begins with the file and holds at least the whole header.
    ///
    /// # Errors
    /// [`ManifestError`] when it is no safetensors header, or holds no float.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let unreadable = |e: &dyn std::fmt::Display| ManifestError::Unreadable(e.to_string());
        let prefix = bytes.first_chunk::<8>().ok_or_else(|| unreadable(&"shorter than 8 bytes"))?;
        let header_bytes = Self::header_length(*prefix)?;
        let end = usize::try_from(header_bytes).map_err(|e| unreadable(&e))?;
        let json = bytes.get(8..end).ok_or_else(|| unreadable(&"shorter than it says"))?;
        let metadata: Metadata = serde_json::from_slice(json).map_err(|e| unreadable(&e))?;
        let mut tensors: Vec<Tensor> = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| Tensor {
                name,
                dtype: info.dtype,
                shape: info.shape.clone(),
                begin: info.data_offsets.0 as u64,
                end: info.data_offsets.1 as u64,
                first: None,
            })
            .collect();
        tensors.sort_by(|a, b| (a.begin, a.end, &a.name).cmp(&(b.begin, b.end, &b.name)));
        let (mut elements, mut data_bytes) = (0, 0);
        for tensor in &mut tensors {
            if tensor.begin != data_bytes || tensor.end < tensor.begin {
                return Err(unreadable(&format!(
                    "tensor '{}' does not begin where the one before it ends",
                    tensor.name
                )));
            }
            data_bytes = tensor.end;
            if let Some(dtype) = float(tensor.dtype) {
                tensor.first = Some(elements);
                elements += (tensor.end - tensor.begin) / dtype.size();
            }
        }
        if elements == 0 {
            return Err(ManifestError::NoFloats);
        }
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Self { tensors, by_name, elements, data_bytes, header_bytes })
    }

    /// Tensors in the order of their bytes.
    #[must_use]
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of this name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// Length of the flat vector of floats.
    #[must_use]
    pub const fn elements(&self) -> u64 {
        self.elements
    }

    /// Length of the header with its prefix, bytes.
    #[must_use]
    pub const fn header_bytes(&self) -> u64 {
        self.header_bytes
    }

    /// Length of the whole file, bytes.
    #[must_use]
    pub const fn file_bytes(&self) -> u64 {
        self.header_bytes + self.data_bytes
    }

    /// Checks that `update` holds the same tensors: names, shapes, and types (floats any of `accepted`, others the same).
    ///
    /// # Errors
    /// The first difference.
    pub fn check(&self, update: &Self, accepted: &[FloatDtype]) -> Result<(), ManifestError> {
        if let Some(unknown) = update.tensors.iter().find(|t| !self.by_name.contains_key(&t.name)) {
            return Err(ManifestError::Unknown(unknown.name.clone()));
        }
        for want in &self.tensors {
            let got = update.tensor(&want.name).ok_or_else(|| ManifestError::Missing(want.name.clone()))?;
            if got.shape != want.shape {
                return Err(ManifestError::Shape {
                    name: want.name.clone(),
                    got: got.shape.clone(),
                    want: want.shape.clone(),
                });
            }
            let fits = match (want.first, float(got.dtype)) {
                (Some(_), Some(dtype)) => accepted.contains(&dtype),
                (None, _) => got.dtype == want.dtype,
                (Some(_), None) => false,
            };
            if !fits {
                let floats: Vec<String> = accepted.iter().map(|d| format!("{d:?}").to_uppercase()).collect();
                let want_text = if want.first.is_some() { floats.join(", ") } else { want.dtype.to_string() };
                return Err(ManifestError::Dtype {
                    name: want.name.clone(),
                    got: got.dtype.to_string(),
                    want: want_text,
                });
            }
        }
        Ok(())
    }

    /// The `dataschema` of updates to this model: equal ones can be aggregated.
    #[must_use]
    pub fn schema(&self, model: &str) -> String {
        let mut hash = Sha256::new();
        for (name, index) in &self.by_name {
            let tensor = &self.tensors[*index];
            let class = if tensor.first.is_some() { "float".to_owned() } else { tensor.dtype.to_string() };
            hash.update(format!("{name}\0{class}\0{:?}\n", tensor.shape));
        }
        let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        format!("urn:fl:model:{model}:{hex}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(json: &str) -> Vec<u8> {
        let mut out = (json.len() as u64).to_le_bytes().to_vec();
        out.extend(json.as_bytes());
        out
    }

    const MODEL: &str = r#"{"b":{"dtype":"I64","shape":[],"data_offsets":[8,16]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"v":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]}}"#;

    #[test]
    fn floats_are_numbered_in_the_order_of_their_bytes() {
        let m = Manifest::parse(&header(MODEL)).unwrap();
        let firsts: Vec<_> = m.tensors().iter().map(|t| (t.name.as_str(), t.first)).collect();
        assert_eq!(firsts, [("w", Some(0)), ("b", None), ("v", Some(2))]);
        assert_eq!((m.elements(), m.file_bytes()), (5, 22 + m.header_bytes()));
    }

    #[test]
    fn an_update_may_change_order_and_float_type_only() {
        let m = Manifest::parse(&header(MODEL)).unwrap();
        let all = [FloatDtype::F32, FloatDtype::F16, FloatDtype::BF16];
        let parse = |json: &str| Manifest::parse(&header(json)).unwrap();
        let other = r#"{"v":{"dtype":"F16","shape":[3],"data_offsets":[0,6]},"w":{"dtype":"F16","shape":[2],"data_offsets":[6,10]},"b":{"dtype":"I64","shape":[],"data_offsets":[10,18]}}"#;
        m.check(&parse(other), &all).unwrap();
        assert_eq!(m.schema("m"), parse(other).schema("m"));
        assert!(matches!(m.check(&parse(other), &[FloatDtype::F32]), Err(ManifestError::Dtype { .. })));
        let without = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"I64","shape":[],"data_offsets":[8,16]}}"#;
        assert_eq!(m.check(&parse(without), &all), Err(ManifestError::Missing("v".into())));
        let shaped = MODEL.replace("\"shape\":[3]", "\"shape\":[1,3]");
        assert!(matches!(m.check(&parse(&shaped), &all), Err(ManifestError::Shape { .. })));
    }

    #[test]
    fn hostile_headers_are_errors() {
        for bytes in [vec![], vec![1; 7], u64::MAX.to_le_bytes().to_vec(), header("{"), header("{}"), header("[1]")] {
            assert!(Manifest::parse(&bytes).is_err());
        }
        let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        assert!(Manifest::parse(&header(overlap)).is_err());
        let lies = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}"#;
        assert!(Manifest::parse(&header(lies)).is_err());
    }
}
