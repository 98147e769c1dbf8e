//! Models on their way: read from a segment or a file, inspected, sealed in memory.

use std::{
    fs::File,
    io::{self, Write as _},
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt as _, FileTypeExt as _},
    },
    path::Path,
};

use lifl_api::{
    job::FloatDtype,
    manifest::{Manifest, float},
};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create};
use sha2::{Digest as _, Sha256};

use super::CheckpointError;

/// Bytes read at a time; a multiple of every element's size.
pub(super) const CHUNK: u64 = 8 << 20;

/// A model file within a segment.
#[derive(Debug)]
pub struct Source {
    file: File,
    /// Where it begins, bytes.
    offset: u64,
    /// Its length, bytes.
    pub length: u64,
}

/// A model in a sealed memfd.
#[derive(Debug)]
pub struct Sealed {
    /// The memfd.
    pub fd: OwnedFd,
    /// Lower-case hex.
    pub sha256: String,
    /// What its header says.
    pub manifest: Manifest,
}

/// A memfd that becomes a [`Sealed`].
pub(super) struct Memfd {
    file: File,
    hash: Sha256,
    head: Vec<u8>,
    length: u64,
}

/// Looks at a model chunk by chunk: the tensors of the job, all floats finite.
pub(super) struct Inspector {
    manifest: Manifest,
    /// Bytes of an element that the end of a chunk cut.
    cut: Vec<u8>,
}

/// Lower-case hex.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The model of a file.
///
/// # Errors
/// [`CheckpointError`] naming the file and why it is no model.
pub fn initial(path: &Path) -> Result<Sealed, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let model = |why| CheckpointError::Model { path: path.to_owned(), why };
    // A FIFO without a writer would block an ordinary open for ever.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|e| io(e.into()))?);
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        let kind = match metadata.file_type() {
            kind if kind.is_dir() => "a directory",
            kind if kind.is_fifo() => "a FIFO",
            _ => "a device",
        };
        return Err(model(format!("is {kind}; a model is a safetensors file")));
    }
    let length = metadata.len();
    let source = Source { file, offset: 0, length };
    // Before anything is copied: a file that is no model may be larger than the memory.
    source.manifest().map_err(model)?;
    let mut memfd = Memfd::new("lifl-model").map_err(io)?;
    let mut at = 0;
    while at < length {
        let chunk = source.read(at, CHUNK).map_err(io)?;
        memfd.write(&chunk).map_err(io)?;
        at += chunk.len() as u64;
    }
    let sealed = memfd.seal().map_err(model)?;
    // The sealed copy is inspected, not the file: that one may change under our eyes.
    let source = Source { file: sealed.fd.try_clone().map_err(io)?.into(), offset: 0, length };
    let mut inspector = Inspector { manifest: sealed.manifest.clone(), cut: Vec::new() };
    let mut at = 0;
    while at < length {
        let chunk = source.read(at, CHUNK).map_err(io)?;
        inspector.inspect(at, &chunk).map_err(model)?;
        at += chunk.len() as u64;
    }
    Ok(sealed)
}

// === impl Source ===

impl Source {
    /// The file that lies in `fd` from `offset` on.
    #[must_use]
    pub fn new(fd: OwnedFd, offset: u64, length: u64) -> Self {
        Self { file: fd.into(), offset, length }
    }

    /// Up to `most` bytes from `at` on; an error at the end of the segment, never a shorter file.
    pub(super) fn read(&self, at: u64, most: u64) -> io::Result<Vec<u8>> {
        let length = usize::try_from(most.min(self.length - at)).map_err(io::Error::other)?;
        let mut chunk = vec![0; length];
        self.file.read_exact_at(&mut chunk, self.offset + at)?;
        Ok(chunk)
    }

    /// What its header says.
    ///
    /// # Errors
    /// Why it is none.
    pub fn manifest(&self) -> Result<Manifest, String> {
        if self.length < 8 {
            return Err(format!("{} bytes are no safetensors file", self.length));
        }
        let io = |e: io::Error| e.to_string();
        let prefix = self.read(0, 8).map_err(io)?;
        let prefix = prefix.first_chunk::<8>().copied().unwrap_or_default();
        let header = Manifest::header_length(prefix).map_err(|e| e.to_string())?;
        let head = self.read(0, header).map_err(io)?;
        let manifest = Manifest::parse(&head).map_err(|e| e.to_string())?;
        if manifest.file_bytes() != self.length {
            return Err(format!("{} bytes, its header says {}", self.length, manifest.file_bytes()));
        }
        Ok(manifest)
    }
}

// === impl Memfd ===

impl Memfd {
    pub(super) fn new(name: &str) -> io::Result<Self> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        Ok(Self { file: fd.into(), hash: Sha256::new(), head: Vec::new(), length: 0 })
    }

    pub(super) fn write(&mut self, chunk: &[u8]) -> io::Result<()> {
        // Headers are at most 1 MiB, chunks are longer: the first one holds it whole.
        if self.length == 0 {
            self.head = chunk[..chunk.len().min(2 << 20)].to_vec();
        }
        self.file.write_all(chunk)?;
        self.hash.update(chunk);
        self.length += chunk.len() as u64;
        Ok(())
    }

    pub(super) fn seal(self) -> Result<Sealed, String> {
        let manifest = Manifest::parse(&self.head).map_err(|e| e.to_string())?;
        if manifest.file_bytes() != self.length {
            return Err(format!("{} bytes, its header says {}", self.length, manifest.file_bytes()));
        }
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
        fcntl_add_seals(&self.file, seals).map_err(|e| format!("sealing: {e}"))?;
        Ok(Sealed { fd: self.file.into(), sha256: hex(&self.hash.finalize()), manifest })
    }
}

// === impl Inspector ===

impl Inspector {
    /// For a model of these tensors, or of its own.
    pub(super) fn new(source: &Source, expected: Option<&Manifest>) -> Result<Self, String> {
        let manifest = source.manifest()?;
        if let Some(expected) = expected {
            let all = [FloatDtype::F32, FloatDtype::F16, FloatDtype::BF16];
            expected.check(&manifest, &all).map_err(|e| e.to_string())?;
        }
        Ok(Self { manifest, cut: Vec::new() })
    }

    /// Looks at the bytes from `at` on; chunks come in order.
    pub(super) fn inspect(&mut self, at: u64, chunk: &[u8]) -> Result<(), String> {
        let data = self.manifest.header_bytes();
        let end = at + chunk.len() as u64;
        let first = self.manifest.tensors().partition_point(|t| data + t.end <= at);
        for tensor in &self.manifest.tensors()[first..] {
            if data + tensor.begin >= end {
                break;
            }
            let Some(dtype) = float(tensor.dtype) else {
                continue;
            };
            let from = usize::try_from((data + tensor.begin).saturating_sub(at)).map_err(|e| e.to_string())?;
            let to = usize::try_from((data + tensor.end).min(end) - at).map_err(|e| e.to_string())?;
            let mut bytes = &chunk[from..to];
            if !self.cut.is_empty() {
                let (rest, others) = bytes.split_at((size(dtype) - self.cut.len()).min(bytes.len()));
                self.cut.extend(rest);
                bytes = others;
                let whole = self.cut.len() == size(dtype);
                if whole && !finite(dtype, &std::mem::take(&mut self.cut)) {
                    return Err(format!("tensor '{}' holds a value that is not finite", tensor.name));
                }
            }
            let (whole, cut) = bytes.split_at(bytes.len() - bytes.len() % size(dtype));
            if !finite(dtype, whole) {
                return Err(format!("tensor '{}' holds a value that is not finite", tensor.name));
            }
            self.cut.extend(cut);
        }
        Ok(())
    }
}

const fn size(dtype: FloatDtype) -> usize {
    match dtype {
        FloatDtype::F32 => 4,
        FloatDtype::F16 | FloatDtype::BF16 => 2,
    }
}

/// A float is not finite when all bits of its exponent are set.
fn finite(dtype: FloatDtype, bytes: &[u8]) -> bool {
    let halves =
        |mask: u16| bytes.as_chunks::<2>().0.iter().fold(false, |bad, x| bad | (u16::from_le_bytes(*x) & mask == mask));
    let bad = match dtype {
        FloatDtype::F32 => {
            const MASK: u32 = 0x7f80_0000;
            bytes.as_chunks::<4>().0.iter().fold(false, |bad, x| bad | (u32::from_le_bytes(*x) & MASK == MASK))
        }
        FloatDtype::F16 => halves(0x7c00),
        FloatDtype::BF16 => halves(0x7f80),
    };
    !bad
}
