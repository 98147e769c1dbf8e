//! An upload on its way into its slot: header, then tensors, frame by frame. Pure: knows neither sockets nor stores.

use std::collections::HashSet;

use bytes::{Buf as _, Bytes};
use lifl_api::manifest::{Manifest, ManifestError};
use lifl_fold::{copy_finite, first_non_finite};
use serde::{
    Deserializer as _,
    de::{IgnoredAny, MapAccess, Visitor},
};
use sha2::{Digest as _, Sha256};

use crate::layout::{Layout, Piece};

/// Collects a safetensors header.
#[derive(Debug, Default)]
pub(crate) struct HeaderReader {
    bytes: Vec<u8>,
}

/// Copies what follows the header to its places.
#[derive(Debug)]
pub(crate) struct Scatter {
    pieces: Vec<Piece>,
    /// The piece under way, and how much of it is there.
    piece: usize,
    done: usize,
}

/// Digest of a body: CRC32C, which costs nothing, unless the client asks for more.
#[derive(Debug)]
pub(crate) enum Digester {
    Crc(u32),
    Sha(Box<Sha256>),
}

/// An upload that is no update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ScatterError {
    /// More bytes than the header says.
    TooLong,
    /// Infinite or not a number: index of the tensor in the update's manifest, and of the element in it.
    NotFinite { tensor: usize, element: usize },
    /// The layout is not this slot's.
    Misfit,
}

/// Marks a digest in the ledger as a CRC32C: the rest of its 32 bytes.
const CRC_MARK: &[u8; 28] = b"crc32c: no sha256 was asked.";

// === impl HeaderReader ===

impl HeaderReader {
    /// Takes of `frame` what belongs to the header; the manifest once it is whole.
    pub(crate) fn push(&mut self, frame: &mut Bytes) -> Result<Option<Manifest>, ManifestError> {
        loop {
            let want = match self.bytes.first_chunk::<8>() {
                None => 8,
                Some(prefix) => usize::try_from(Manifest::header_length(*prefix)?).unwrap_or(usize::MAX),
            };
            let take = want.saturating_sub(self.bytes.len()).min(frame.len());
            self.bytes.extend_from_slice(&frame[..take]);
            frame.advance(take);
            if self.bytes.len() < want {
                return Ok(None);
            }
            if want > 8 || self.bytes == [0; 8] {
                let manifest = Manifest::parse(&self.bytes)?;
                names_once(&self.bytes[8..]).map_err(|error| ManifestError::Unreadable(error.to_string()))?;
                return Ok(Some(manifest));
            }
        }
    }

    /// What came of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// What a header names twice is two tensors to one reader and one to another.
fn names_once(json: &[u8]) -> serde_json::Result<()> {
    struct Names;

    impl<'de> Visitor<'de> for Names {
        type Value = ();

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("tensors by name")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            let mut seen = HashSet::new();
            while let Some((name, IgnoredAny)) = map.next_entry::<String, _>()? {
                if let Some(twice) = seen.replace(name) {
                    return Err(serde::de::Error::custom(format!("'{twice}' is named twice")));
                }
            }
            Ok(())
        }
    }

    serde_json::Deserializer::from_slice(json).deserialize_map(Names)
}

// === impl Scatter ===

impl Scatter {
    pub(crate) fn new(layout: &Layout) -> Self {
        let mut scatter = Self { pieces: layout.pieces.clone(), piece: 0, done: 0 };
        scatter.skip_empty();
        scatter
    }

    /// Copies `bytes`, the next of the file's data, into the slot.
    pub(crate) fn push(&mut self, slot: &mut [u8], mut bytes: &[u8]) -> Result<(), ScatterError> {
        while !bytes.is_empty() {
            let piece = self.pieces.get(self.piece).ok_or(ScatterError::TooLong)?;
            let (now, rest) = bytes.split_at(bytes.len().min(piece.length - self.done));
            if let Some((offset, dtype)) = piece.to {
                let target = slot.get_mut(offset..offset + piece.length).ok_or(ScatterError::Misfit)?;
                copy(target, self.done, now, dtype)
                    .map_err(|element| ScatterError::NotFinite { tensor: piece.tensor, element })?;
            }
            self.done += now.len();
            if self.done == piece.length {
                (self.piece, self.done) = (self.piece + 1, 0);
                self.skip_empty();
            }
            bytes = rest;
        }
        Ok(())
    }

    /// Whether all is there.
    pub(crate) fn is_whole(&self) -> bool {
        self.piece == self.pieces.len()
    }

    fn skip_empty(&mut self) {
        while self.pieces.get(self.piece).is_some_and(|piece| piece.length == 0) {
            self.piece += 1;
        }
    }
}

/// Copies `bytes` to `target[at..]`, and checks each element that becomes whole by it. Frames end anywhere, elements too.
fn copy(target: &mut [u8], at: usize, bytes: &[u8], dtype: lifl_fold::Dtype) -> Result<(), usize> {
    let size = dtype.size();
    let begun = at % size;
    let head = if begun == 0 { 0 } else { (size - begun).min(bytes.len()) };
    target[at..at + head].copy_from_slice(&bytes[..head]);
    if begun != 0 && begun + head == size && first_non_finite(&target[at - begun..at + head], dtype).is_some() {
        return Err(at / size);
    }
    let (from, whole) = (at + head, (bytes.len() - head) / size * size);
    let (middle, tail) = bytes[head..].split_at(whole);
    copy_finite(&mut target[from..from + whole], middle, dtype).map_err(|element| from / size + element)?;
    target[from + whole..from + whole + tail.len()].copy_from_slice(tail);
    Ok(())
}

// === impl Digester ===

impl Digester {
    pub(crate) fn new(sha256: bool) -> Self {
        if sha256 { Self::Sha(Box::default()) } else { Self::Crc(0) }
    }

    /// One of the kind that made `digest`.
    pub(crate) fn like(digest: &[u8; 32]) -> Self {
        Self::new(!digest.starts_with(CRC_MARK))
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        match self {
            Self::Crc(crc) => *crc = crc32c::crc32c_append(*crc, bytes),
            Self::Sha(sha) => sha.update(bytes),
        }
    }

    /// As the ledger keeps it.
    pub(crate) fn finish(self) -> [u8; 32] {
        match self {
            Self::Crc(crc) => {
                let mut out = [0; 32];
                out[..28].copy_from_slice(CRC_MARK);
                out[28..].copy_from_slice(&crc.to_be_bytes());
                out
            }
            Self::Sha(sha) => sha.finalize().into(),
        }
    }
}

/// A digest of the ledger as receipts show it.
pub(crate) fn digest_text(digest: &[u8; 32]) -> String {
    match digest.strip_prefix(CRC_MARK) {
        Some(crc) => format!("crc32c-{}", hex(crc)),
        None => format!("sha256-{}", hex(digest)),
    }
}

/// Whether a digest of the ledger is the SHA-256 that a client names; `None` where only a CRC was taken.
pub(crate) fn is_sha256(digest: &[u8; 32], claimed: &[u8; 32]) -> Option<bool> {
    (!digest.starts_with(CRC_MARK)).then(|| digest == claimed)
}

/// Reads `sha256-<hex>`.
pub(crate) fn parse_sha256(text: &str) -> Option<[u8; 32]> {
    let hex = text.strip_prefix("sha256-").filter(|hex| hex.len() == 64 && hex.is_ascii())?;
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lifl_api::job::UpdateSpec;
    use lifl_shm::{Element, Run};
    use proptest::prelude::*;

    use super::*;
    use crate::layout::Measure;

    fn file(tensors: &[(&str, &str, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
        for (name, dtype, shape, bytes) in tensors {
            let begin = data.len();
            data.extend(bytes);
            let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]});
            header.insert((*name).to_owned(), entry);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header);
        out.extend(data);
        out
    }

    /// Feeds a file in frames, as an upload comes; the slot, and the layout that says where.
    fn take(model: &Manifest, upload: &[u8], cuts: &[usize]) -> Result<(Vec<u8>, Layout), ScatterError> {
        let mut frames = Vec::new();
        let mut begin = 0;
        for cut in cuts.iter().copied().filter(|cut| *cut <= upload.len()).chain([upload.len()]) {
            frames.push(Bytes::copy_from_slice(&upload[begin..cut.max(begin)]));
            begin = cut.max(begin);
        }
        let (mut reader, mut scatter) = (HeaderReader::default(), None::<(Layout, Scatter)>);
        let mut slot = vec![0xAA; 1 << 12];
        for mut frame in frames {
            if scatter.is_none()
                && let Some(manifest) = reader.push(&mut frame).unwrap()
            {
                model.check(&manifest, &UpdateSpec::default().dtypes).unwrap();
                let layout = Layout::new(model, &manifest).unwrap();
                scatter = Some((layout.clone(), Scatter::new(&layout)));
            }
            if let Some((_, scatter)) = &mut scatter {
                scatter.push(&mut slot, &frame)?;
            }
        }
        let (layout, scatter) = scatter.unwrap();
        assert!(scatter.is_whole());
        Ok((slot, layout))
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn halves(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect()
    }

    fn model() -> Manifest {
        Manifest::parse(&file(&[
            ("a", "F32", vec![3], bytes(&[0.0; 3])),
            ("n", "I64", vec![], vec![0; 8]),
            ("b", "F32", vec![2, 2], bytes(&[0.0; 4])),
            ("e", "F32", vec![0], Vec::new()),
            ("c", "F32", vec![2], bytes(&[0.0; 2])),
        ]))
        .unwrap()
    }

    const A: [f32; 3] = [1.0, -2.0, 3.5];
    const B: [f32; 4] = [4.0, 5.0, 6.0, 7.0];
    const C: [f32; 2] = [8.0, 9.0];

    /// The client's order and dtypes are its own.
    fn permuted() -> Vec<u8> {
        file(&[
            ("c", "F32", vec![2], bytes(&C)),
            ("n", "I64", vec![], vec![7; 8]),
            ("b", "F16", vec![2, 2], halves(&B)),
            ("e", "BF16", vec![0], Vec::new()),
            ("a", "F32", vec![3], bytes(&A)),
        ])
    }

    fn check_permuted(slot: &[u8], layout: &Layout) {
        let run = |first, elements, offset, dtype| Run { first, elements, offset, dtype };
        let expected = [run(0, 3, 0, Element::F32), run(3, 4, 64, Element::F16), run(7, 2, 128, Element::F32)];
        assert_eq!(layout.runs, expected);
        assert_eq!(layout.length, 136);
        assert_eq!(&slot[..12], bytes(&A));
        assert_eq!(&slot[64..72], halves(&B));
        assert_eq!(&slot[128..136], bytes(&C));
    }

    #[test]
    fn a_uniform_update_is_one_run_of_all_elements() {
        let upload = file(&[
            ("b", "F32", vec![2, 2], bytes(&B)),
            ("c", "F32", vec![2], bytes(&C)),
            ("e", "F32", vec![0], Vec::new()),
            ("n", "I64", vec![], vec![1; 8]),
            ("a", "F32", vec![3], bytes(&A)),
        ]);
        let (slot, layout) = take(&model(), &upload, &[]).unwrap();
        assert_eq!(layout.runs, [Run { first: 0, elements: 9, offset: 0, dtype: Element::F32 }]);
        assert_eq!(&slot[..36], bytes(&[&A[..], &B, &C].concat()));
        let measure = Measure::new(model(), &UpdateSpec::default());
        assert!(measure.payload_bytes >= layout.length && measure.max_runs == 4);
    }

    #[test]
    fn a_cut_at_any_byte_changes_nothing() {
        let upload = permuted();
        for cut in 0..=upload.len() {
            let (slot, layout) = take(&model(), &upload, &[cut]).unwrap();
            check_permuted(&slot, &layout);
        }
        let every: Vec<usize> = (0..upload.len()).collect();
        let (slot, layout) = take(&model(), &upload, &every).unwrap();
        check_permuted(&slot, &layout);
    }

    #[test]
    fn what_is_not_finite_is_found_however_it_is_cut() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let upload = file(&[
                ("a", "F32", vec![3], bytes(&A)),
                ("n", "I64", vec![], vec![0xff; 8]),
                ("b", "F16", vec![2, 2], halves(&[1.0, 2.0, bad, 4.0])),
                ("e", "F32", vec![0], Vec::new()),
                ("c", "F32", vec![2], bytes(&C)),
            ]);
            for cut in 0..=upload.len() {
                let error = take(&model(), &upload, &[cut]).unwrap_err();
                assert_eq!(error, ScatterError::NotFinite { tensor: 2, element: 2 }, "cut at {cut}");
            }
        }
    }

    #[test]
    fn more_than_the_header_says_is_too_long() {
        let mut upload = permuted();
        upload.push(0);
        assert_eq!(take(&model(), &upload, &[]).unwrap_err(), ScatterError::TooLong);
    }

    #[test]
    fn hostile_headers_end_in_errors() {
        let read = |bytes: &[u8]| HeaderReader::default().push(&mut Bytes::copy_from_slice(bytes));
        assert!(read(&[0; 8]).is_err());
        assert!(read(&u64::MAX.to_le_bytes()).is_err());
        assert!(read(&((1_u64 << 20) + 1).to_le_bytes()).is_err());
        assert_eq!(read(&[5, 0, 0]).unwrap(), None);
        assert!(read(b"\x02\0\0\0\0\0\0\0{}").is_err());
        let tensor = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        for (second, twice) in [("b", false), ("a", true), ("\\u0061", true)] {
            let json = format!(r#"{{"a":{tensor},"{second}":{}}}"#, tensor.replace("[0,4]", "[4,8]"));
            let last = format!(r#"{{"a":{{"dtype":"F32","shape":[9],"data_offsets":[9,9]}},"{second}":{tensor}}}"#);
            let header = |json: &str| [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat();
            assert_eq!(read(&header(&json)).is_err(), twice, "{json}");
            // As long as the last one alone would do, nothing else refuses it.
            assert!(read(&header(&last)).is_err(), "{last}");
        }
    }

    #[test]
    fn digests_read_and_write() {
        let mut crc = Digester::new(false);
        crc.push(b"1234");
        crc.push(b"56789");
        let digest = crc.finish();
        assert_eq!(digest_text(&digest), "crc32c-e3069283");
        assert_eq!(is_sha256(&digest, &[0; 32]), None);
        let mut sha = Digester::new(true);
        sha.push(b"abc");
        let digest = sha.finish();
        let text = "sha256-ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest_text(&digest), text);
        assert_eq!(parse_sha256(text), Some(digest));
        assert_eq!(parse_sha256(&text.to_uppercase().replace("SHA256", "sha256")), Some(digest));
        assert_eq!(is_sha256(&digest, &digest), Some(true));
        for bad in ["", "sha256-", "md5-00", &text[1..], &text[..text.len() - 1], &format!("sha256-{}", "é".repeat(32))]
        {
            assert_eq!(parse_sha256(bad), None, "{bad}");
        }
    }

    proptest! {
        /// Any tensors, any of the three types each, any order, any frames: each element is where the runs say.
        #[test]
        fn every_element_is_where_its_run_says(
            sizes in prop::collection::vec((1_usize..9, 0_usize..3), 1..6),
            order in any::<prop::sample::Index>(),
            cuts in prop::collection::vec(0_usize..600, 0..6),
        ) {
            let names: Vec<String> = (0..sizes.len()).map(|i| format!("t{i}")).collect();
            let zeros: Vec<_> = names.iter().zip(&sizes).map(|(name, (n, _))| (name.as_str(), "F32", vec![*n], vec![0; 4 * n])).collect();
            let model = Manifest::parse(&file(&zeros)).unwrap();
            let mut values = BTreeMap::new();
            let mut upload: Vec<_> = names.iter().zip(&sizes).enumerate().map(|(i, (name, (n, dtype)))| {
                let floats: Vec<f32> = (0..*n).map(|e| (i * 16 + e) as f32).collect();
                let first = model.tensor(name).unwrap().first.unwrap();
                values.extend(floats.iter().enumerate().map(|(e, value)| (first + e as u64, *value)));
                match dtype {
                    0 => (name.as_str(), "F32", vec![*n], bytes(&floats)),
                    1 => (name.as_str(), "F16", vec![*n], halves(&floats)),
                    _ => (name.as_str(), "BF16", vec![*n], floats.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()),
                }
            }).collect();
            let turn = order.index(upload.len());
            upload.rotate_left(turn);
            let mut cuts = cuts;
            cuts.sort_unstable();
            let (slot, layout) = take(&model, &file(&upload), &cuts).unwrap();
            let mut found = BTreeMap::new();
            for run in &layout.runs {
                prop_assert_eq!(run.offset % 64, 0);
                for e in 0..run.elements {
                    let at = |size: u64| usize::try_from(run.offset + e * size).unwrap();
                    let value = match run.dtype {
                        Element::F32 => f32::from_le_bytes(*slot[at(4)..].first_chunk().unwrap()),
                        Element::F16 => half::f16::from_le_bytes(*slot[at(2)..].first_chunk().unwrap()).to_f32(),
                        Element::Bf16 => half::bf16::from_le_bytes(*slot[at(2)..].first_chunk().unwrap()).to_f32(),
                        Element::I64 => unreachable!(),
                    };
                    found.insert(run.first + e, value);
                }
            }
            prop_assert_eq!(found, values);
            prop_assert!(Measure::new(model, &UpdateSpec::default()).payload_bytes >= layout.length);
        }
    }
}
