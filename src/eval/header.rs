//! What a GGUF file says of itself, read without the runtime, so that a bad file is refused at once.
//!
//! Only the header is read: metadata (arrays as their length and digest) and tensor infos. Every
//! length is checked against the file before it is believed.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use sha2::{Digest, Sha256};

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Meta {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    /// Number of elements and SHA-256 of the element type and the raw bytes.
    Array {
        len: u64,
        digest: [u8; 32],
    },
}

/// One tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: String,
    /// Elements along each dimension, the contiguous one first.
    pub dims: Vec<u64>,
    /// ggml type id.
    pub type_id: u32,
    pub elements: u64,
    /// Bytes of data; `None` for a type this reader does not know.
    pub bytes: Option<u64>,
}

/// The header of a GGUF file (of all its shards, where it is split).
#[derive(Debug, Clone)]
pub struct Header {
    pub path: PathBuf,
    pub meta: BTreeMap<String, Meta>,
    pub tensors: Vec<Tensor>,
    /// Bytes of all shards.
    pub file_size: u64,
    /// The files it consists of.
    pub shards: Vec<PathBuf>,
}

/// Why a GGUF file is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not a GGUF file (it begins with {found:02x?}); give a .gguf model")]
    Magic { path: PathBuf, found: Vec<u8> },
    #[error("{path} has GGUF version {version}; versions 2 and 3 are read")]
    Version { path: PathBuf, version: u32 },
    #[error("{path} is damaged at byte {at}: {what}; fetch or convert it again")]
    Damaged { path: PathBuf, at: u64, what: String },
    #[error("{path}: {what}")]
    Unfit { path: PathBuf, what: String },
}

/// (elements, bytes) of a block of a ggml type.
pub fn type_block(id: u32) -> Option<(u64, u64)> {
    Some(match id {
        0 | 26 => (1, 4),
        1 | 25 | 30 => (1, 2),
        24 => (1, 1),
        27 | 28 => (1, 8),
        2 | 20 => (32, 18),
        3 => (32, 20),
        6 => (32, 22),
        7 => (32, 24),
        8 => (32, 34),
        9 => (32, 36),
        10 => (256, 84),
        11 | 21 => (256, 110),
        12 => (256, 144),
        13 => (256, 176),
        14 => (256, 210),
        15 => (256, 292),
        16 => (256, 66),
        17 => (256, 74),
        18 => (256, 98),
        19 => (256, 50),
        22 => (256, 82),
        23 => (256, 136),
        29 => (256, 56),
        34 => (256, 54),
        35 => (256, 66),
        39 => (32, 17),
        192 => (128, 52),
        _ => return None,
    })
}

impl Header {
    /// Reads the header at `path`, and those of the other shards of a split model.
    ///
    /// # Errors
    /// A file that cannot be read, is no GGUF file, is cut off or contradicts itself, or lacks a shard.
    pub fn read(path: &Path) -> Result<Self, HeaderError> {
        let mut header = read_one(path)?;
        let count = header.unsigned("split.count").unwrap_or(1);
        if count > 1 {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some(stem) = name.strip_suffix(&format!("-00001-of-{count:05}.gguf")) else {
                let what = format!("is one of {count} shards; give the first, named …-00001-of-{count:05}.gguf");
                return Err(HeaderError::Unfit { path: path.into(), what });
            };
            for number in 2..=count {
                let shard = path.with_file_name(format!("{stem}-{number:05}-of-{count:05}.gguf"));
                let mut more = read_one(&shard)?;
                header.tensors.append(&mut more.tensors);
                header.file_size += more.file_size;
                header.shards.push(shard);
            }
        }
        Ok(header)
    }

    pub fn string(&self, key: &str) -> Option<&str> {
        match self.meta.get(key)? {
            Meta::String(s) => Some(s),
            _ => None,
        }
    }

    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match *self.meta.get(key)? {
            Meta::Unsigned(v) => Some(v),
            Meta::Signed(v) => u64::try_from(v).ok(),
            _ => None,
        }
    }

    pub fn architecture(&self) -> &str {
        self.string("general.architecture").unwrap_or("")
    }

    /// `<architecture>.<key>` as a number.
    pub fn arch_unsigned(&self, key: &str) -> Option<u64> {
        self.unsigned(&format!("{}.{key}", self.architecture()))
    }

    /// Weights in all tensors.
    pub fn weights(&self) -> u64 {
        self.tensors.iter().map(|t| t.elements).sum()
    }

    /// Bits per weight over all tensors, or `None` where a type is unknown.
    pub fn bits_per_weight(&self) -> Option<f64> {
        bits(self.tensors.iter())
    }

    /// Bits per weight over the matrices of the blocks: what a quantisation of the decoder changes.
    pub fn block_bits_per_weight(&self) -> Option<f64> {
        bits(
            self.tensors.iter().filter(|t| t.name.starts_with("blk.") && t.dims.iter().filter(|d| **d > 1).count() > 1),
        )
    }

    /// SHA-256 of the whole of every shard: the identity of a model in a cache.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn digest(&self) -> Result<[u8; 32], HeaderError> {
        let mut hash = Sha256::new();
        for shard in &self.shards {
            let map = map(shard)?;
            hash.update(&map[..]);
        }
        Ok(hash.finalize().into())
    }

    /// Says how two vocabularies differ: tokens, their types, merges, and the special tokens that shape a prompt.
    pub fn vocabulary_difference(&self, other: &Self) -> Option<String> {
        let tokens = |h: &Self| match h.meta.get("tokenizer.ggml.tokens") {
            Some(Meta::Array { len, .. }) => Some(*len),
            _ => None,
        };
        let (ours, theirs) = (tokens(self), tokens(other));
        if ours != theirs {
            let text = |n: Option<u64>| n.map_or("no".into(), |n| n.to_string());
            return Some(format!("{} tokens against {}", text(ours), text(theirs)));
        }
        for key in ["model", "tokens", "token_type", "merges", "eos_token_id"] {
            let key = format!("tokenizer.ggml.{key}");
            if self.meta.get(&key) != other.meta.get(&key) {
                return Some(format!("{key} differs"));
            }
        }
        None
    }
}

fn bits<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Option<f64> {
    let (mut bytes, mut elements) = (0u64, 0u64);
    for tensor in tensors {
        bytes += tensor.bytes?;
        elements += tensor.elements;
    }
    (elements > 0).then(|| bytes as f64 * 8.0 / elements as f64)
}

fn map(path: &Path) -> Result<Mmap, HeaderError> {
    let open = || {
        let file = std::fs::File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::other("not a file"));
        }
        // SAFETY: mapped for reading; a file changed by another process meanwhile yields other bytes, all of
        // which are checked, or a bus error when cut, as with any mapped model file.
        unsafe { Mmap::map(&file) }
    };
    open().map_err(|source| HeaderError::Read { path: path.into(), source })
}

struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn damaged<T>(&self, what: impl Into<String>) -> Result<T, HeaderError> {
        Err(HeaderError::Damaged { path: self.path.into(), at: self.at as u64, what: what.into() })
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], HeaderError> {
        let end = usize::try_from(len).ok().and_then(|n| self.at.checked_add(n)).filter(|e| *e <= self.bytes.len());
        let Some(end) = end else {
            return self.damaged(format!("{len} bytes are promised beyond the end of the file"));
        };
        let slice = &self.bytes[self.at..end];
        self.at = end;
        Ok(slice)
    }

    fn u32(&mut self) -> Result<u32, HeaderError> {
        let b = self.take(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self) -> Result<u64, HeaderError> {
        let b = self.take(8)?;
        Ok(u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
    }

    fn string(&mut self) -> Result<String, HeaderError> {
        let len = self.u64()?;
        match std::str::from_utf8(self.take(len)?) {
            Ok(s) => Ok(s.to_owned()),
            Err(_) => self.damaged("a name or string is not UTF-8"),
        }
    }

    fn value(&mut self, kind: u32) -> Result<Meta, HeaderError> {
        Ok(match kind {
            0 => Meta::Unsigned(self.take(1)?[0].into()),
            1 => Meta::Signed((self.take(1)?[0] as i8).into()),
            2 => Meta::Unsigned(self.take(2).map(|b| u16::from_le_bytes([b[0], b[1]]))?.into()),
            3 => Meta::Signed(self.take(2).map(|b| i16::from_le_bytes([b[0], b[1]]))?.into()),
            4 => Meta::Unsigned(self.u32()?.into()),
            5 => Meta::Signed((self.u32()? as i32).into()),
            6 => Meta::Float(f32::from_bits(self.u32()?).into()),
            7 => Meta::Bool(self.take(1)?[0] != 0),
            8 => {
                // A token may be any bytes, so strings are text only where a text is needed.
                let len = self.u64()?;
                Meta::String(String::from_utf8_lossy(self.take(len)?).into_owned())
            }
            9 => self.array()?,
            10 => Meta::Unsigned(self.u64()?),
            11 => Meta::Signed(self.u64()? as i64),
            12 => Meta::Float(f64::from_bits(self.u64()?)),
            _ => return self.damaged(format!("metadata type {kind} does not exist")),
        })
    }

    fn array(&mut self) -> Result<Meta, HeaderError> {
        let kind = self.u32()?;
        let len = self.u64()?;
        let start = self.at;
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => 0,
            _ => return self.damaged(format!("arrays of metadata type {kind} do not exist")),
        };
        if kind == 8 {
            for _ in 0..len {
                let bytes = self.u64()?;
                self.take(bytes)?;
            }
        } else {
            let Some(bytes) = len.checked_mul(width) else { return self.damaged("an array is too long") };
            self.take(bytes)?;
        }
        let digest =
            Sha256::new().chain_update(kind.to_le_bytes()).chain_update(&self.bytes[start..self.at]).finalize();
        Ok(Meta::Array { len, digest: digest.into() })
    }
}

fn read_one(path: &Path) -> Result<Header, HeaderError> {
    let empty = std::fs::metadata(path).map_err(|source| HeaderError::Read { path: path.into(), source })?.len() == 0;
    if empty {
        return Err(HeaderError::Magic { path: path.into(), found: Vec::new() });
    }
    let map = map(path)?;
    let mut c = Cursor { path, bytes: &map, at: 0 };
    if map.get(..4) != Some(b"GGUF") {
        return Err(HeaderError::Magic { path: path.into(), found: map[..map.len().min(4)].to_vec() });
    }
    c.at = 4;
    let version = c.u32()?;
    if !(2..=3).contains(&version) {
        return Err(HeaderError::Version { path: path.into(), version });
    }
    let (tensor_count, meta_count) = (c.u64()?, c.u64()?);
    let mut meta = BTreeMap::new();
    for _ in 0..meta_count {
        let key = c.string()?;
        let kind = c.u32()?;
        let value = c.value(kind)?;
        if meta.insert(key.clone(), value).is_some() {
            return c.damaged(format!("key {key} is given twice"));
        }
    }
    let mut tensors = Vec::new();
    let mut offsets = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..tensor_count {
        let name = c.string()?;
        let rank = c.u32()?;
        if rank > 4 {
            return c.damaged(format!("tensor {name} has {rank} dimensions"));
        }
        let dims = (0..rank).map(|_| c.u64()).collect::<Result<Vec<_>, _>>()?;
        let type_id = c.u32()?;
        offsets.push(c.u64()?);
        let Some(elements) = dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d)) else {
            return c.damaged(format!("tensor {name} is larger than any file"));
        };
        let bytes = match type_block(type_id) {
            Some((block, size)) => match elements / block {
                blocks if blocks * block == elements => blocks.checked_mul(size),
                _ => return c.damaged(format!("tensor {name} does not divide into blocks of {block}")),
            },
            None => None,
        };
        if !names.insert(name.clone()) {
            return c.damaged(format!("tensor {name} is given twice"));
        }
        tensors.push(Tensor { name, dims, type_id, elements, bytes });
    }
    let alignment = match meta.get("general.alignment") {
        Some(Meta::Unsigned(a)) if a.is_power_of_two() => *a,
        Some(_) => return c.damaged("general.alignment is not a power of two"),
        None => 32,
    };
    let data = (c.at as u64).next_multiple_of(alignment);
    for (tensor, offset) in tensors.iter().zip(offsets) {
        let end = data.checked_add(offset).and_then(|o| o.checked_add(tensor.bytes.unwrap_or(0)));
        if tensor.elements > 0 && end.is_none_or(|e| e > map.len() as u64) {
            let what =
                format!("tensor {} ends beyond the end of the file ({} bytes): it is cut off", tensor.name, map.len());
            return Err(HeaderError::Damaged { path: path.into(), at: map.len() as u64, what });
        }
    }
    Ok(Header { path: path.into(), meta, tensors, file_size: map.len() as u64, shards: vec![path.into()] })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small GGUF file, byte by byte: one tensor of 32 Q8_0 weights.
    pub fn sample(tokens: &[&str], cut: usize) -> Vec<u8> {
        let mut b = b"GGUF".to_vec();
        let text = |b: &mut Vec<u8>, s: &str| {
            b.extend((s.len() as u64).to_le_bytes());
            b.extend(s.as_bytes());
        };
        b.extend(3u32.to_le_bytes());
        b.extend(1u64.to_le_bytes());
        b.extend(3u64.to_le_bytes());
        text(&mut b, "general.architecture");
        b.extend(8u32.to_le_bytes());
        text(&mut b, "qwen2");
        text(&mut b, "qwen2.embedding_length");
        b.extend(4u32.to_le_bytes());
        b.extend(896u32.to_le_bytes());
        text(&mut b, "tokenizer.ggml.tokens");
        b.extend(9u32.to_le_bytes());
        b.extend(8u32.to_le_bytes());
        b.extend((tokens.len() as u64).to_le_bytes());
        for t in tokens {
            text(&mut b, t);
        }
        text(&mut b, "blk.0.attn_q.weight");
        b.extend(2u32.to_le_bytes());
        b.extend(32u64.to_le_bytes());
        b.extend(2u64.to_le_bytes());
        b.extend(8u32.to_le_bytes());
        b.extend(0u64.to_le_bytes());
        b.resize(b.len().next_multiple_of(32), 0);
        b.extend([0; 68]);
        b.truncate(b.len() - cut);
        b
    }

    fn read(bytes: &[u8]) -> Result<Header, HeaderError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        Header::read(file.path())
    }

    #[test]
    fn reads_and_measures() {
        let h = read(&sample(&["a", "b"], 0)).unwrap();
        assert_eq!(h.architecture(), "qwen2");
        assert_eq!(h.arch_unsigned("embedding_length"), Some(896));
        assert_eq!(h.weights(), 64);
        assert_eq!(h.bits_per_weight(), Some(8.5));
        assert_eq!(h.block_bits_per_weight(), Some(8.5));
    }

    #[test]
    fn every_cut_and_every_flipped_length_is_an_error_or_a_header_but_never_a_panic() {
        let good = sample(&["a", "b"], 0);
        for len in 0..good.len() {
            assert!(read(&good[..len]).is_err(), "cut to {len}");
        }
        for at in 0..good.len() - 68 {
            let mut bad = good.clone();
            bad[at] ^= 0x80;
            let _ = read(&bad);
        }
        assert!(read(&sample(&["a"], 1)).unwrap_err().to_string().contains("cut off"));
        assert!(matches!(read(b"PK\x03\x04 a zip"), Err(HeaderError::Magic { .. })));
    }

    #[test]
    fn vocabularies_are_compared() {
        let [a, b, c] = [&["a", "b"][..], &["a", "c"], &["a"]].map(|t| read(&sample(t, 0)).unwrap());
        assert_eq!(a.vocabulary_difference(&a), None);
        assert!(a.vocabulary_difference(&b).unwrap().contains("tokens differs"));
        assert!(a.vocabulary_difference(&c).unwrap().contains("2 tokens against 1"));
    }
}
