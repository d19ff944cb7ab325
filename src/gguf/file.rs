//! GGUF files, read: every length is checked against the file before it is believed.
use super::header::{ALIGNMENT, DIMENSIONS, Metadata};
use super::shard::{ShardKeys, ShardName};
use super::value::{ARRAY, Array, BOOL, STRING, Value, number, width};
use crate::digest::file_name;
use crate::ggml::GgmlType;
use crate::mapped::MappedFile;
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    pub name: String,
    /// ggml's type id; [`TensorInfo::ty`] names it.
    pub type_id: u32,
    /// In ggml's order: the row length comes first.
    pub shape: Vec<usize>,
    /// Which of the file's shards holds it.
    shard: usize,
    /// Where in the shard its data begins, bytes.
    pub offset: u64,
    /// Bytes of data; none for a type that this program does not know.
    pub size: Option<u64>,
}

impl TensorInfo {
    /// The type, if this crate names it.
    pub fn ty(&self) -> Option<GgmlType> {
        GgmlType::from_id(self.type_id)
    }

    /// Number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// One file of a model.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: MappedFile,
}

/// A GGUF file, or all files of a split model, mapped.
#[derive(Debug)]
pub struct GgufFile {
    pub path: PathBuf,
    pub version: u32,
    /// Of the first shard.
    pub metadata: Metadata,
    /// In file order.
    pub tensors: Vec<TensorInfo>,
    shards: Vec<Shard>,
}

/// Why a GGUF file is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
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

impl GgufFile {
    /// Opens the file at `path`, and the other shards of a split model.
    ///
    /// # Errors
    /// A file that cannot be read, is no GGUF file, is cut off or contradicts itself, or lacks a shard.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let mut file = open_one(path)?;
        let keys = ShardKeys::read(&file.metadata);
        if keys.count <= 1 {
            return Ok(file);
        }
        let unfit = |what: String| ReadError::Unfit { path: path.into(), what };
        let count = keys.count as usize;
        let name = ShardName::parse(&file_name(path)).filter(|name| (name.number, name.count as usize) == (1, count));
        if name.is_none() || keys.number.unwrap_or(0) != 0 {
            return Err(unfit(format!("is one of {count} shards; give the first, named …-00001-of-{count:05}.gguf")));
        }
        // By tensor, the shard that holds it.
        let mut names: HashMap<String, usize> = file.tensors.iter().map(|t| (t.name.clone(), 0)).collect();
        for number in 2..=count {
            let shard = ShardName::path(path, number, count);
            if !shard.exists() {
                let what =
                    format!("is split into {count} files, of which {} is missing; put it there", shard.display());
                return Err(unfit(what));
            }
            let more = open_one(&shard)?;
            keys.check(path, &shard, number as u64 - 1, &ShardKeys::read(&more.metadata))?;
            for mut tensor in more.tensors {
                if let Some(&other) = names.get(&tensor.name) {
                    let other = ShardName::path(path, other + 1, count);
                    let what =
                        format!("tensor {} stands in {} too: they are of two sets", tensor.name, other.display());
                    return Err(ReadError::Unfit { path: shard, what });
                }
                names.insert(tensor.name.clone(), file.shards.len());
                tensor.shard = file.shards.len();
                file.tensors.push(tensor);
            }
            file.shards.extend(more.shards);
        }
        match keys.tensors {
            Some(want) if want != file.tensors.len() as u64 => {
                Err(unfit(format!("promises {want} tensors, its shards hold {}", file.tensors.len())))
            }
            _ => Ok(file),
        }
    }

    /// The tensor named `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// The file that holds a tensor of this model.
    pub fn tensor_path(&self, tensor: &TensorInfo) -> &Path {
        self.shards.get(tensor.shard).map_or(&self.path, |s| &s.path)
    }

    /// A tensor's data, or nothing where its type is not known.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        let range = || {
            let start = usize::try_from(tensor.offset).ok()?;
            Some(start..start.checked_add(usize::try_from(tensor.size?).ok()?)?)
        };
        let shard = self.shards.get(tensor.shard);
        shard.zip(range()).and_then(|(s, r): (_, Range<usize>)| s.map.get(r)).unwrap_or_default()
    }

    /// Tells the system that a tensor's data will not be read again soon. Reading it again is allowed.
    pub fn release(&self, tensor: &TensorInfo) {
        if let (Some(shard), Some(size)) = (self.shards.get(tensor.shard), tensor.size) {
            let start = tensor.offset as usize;
            shard.map.release(start..start + size as usize);
        }
    }

    pub fn architecture(&self) -> &str {
        self.metadata.architecture()
    }

    /// Whether it is a vision file (mmproj), not a language model.
    pub fn is_projector(&self) -> bool {
        self.metadata.is_projector()
    }

    /// `<architecture>.<key>` as a number.
    pub fn arch_u64(&self, key: &str) -> Option<u64> {
        self.metadata.u64(&format!("{}.{key}", self.architecture()))
    }

    /// Bytes of all shards.
    pub fn file_size(&self) -> u64 {
        self.shards.iter().map(|s| s.map.len() as u64).sum()
    }

    /// Path and bytes of each shard.
    pub(crate) fn contents(&self) -> Vec<(&Path, &[u8])> {
        self.shards.iter().map(|s| (s.path.as_path(), &s.map[..])).collect()
    }

    /// Weights in all tensors.
    pub fn weights(&self) -> u64 {
        self.tensors.iter().map(|t| t.elements() as u64).sum()
    }

    /// Bits per weight over all tensors, or `None` where a type is unknown.
    pub fn bits_per_weight(&self) -> Option<f64> {
        bits(self.tensors.iter())
    }

    /// Bits per weight over the matrices of the blocks: what a quantisation of the decoder changes.
    pub fn block_bits_per_weight(&self) -> Option<f64> {
        let matrix = |t: &&TensorInfo| t.name.starts_with("blk.") && t.shape.iter().filter(|d| **d > 1).count() > 1;
        bits(self.tensors.iter().filter(matrix))
    }

    /// SHA-256 of the whole of every shard: the identity of a model in a cache.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        self.shards.iter().for_each(|s| hash.update(&s.map[..]));
        hash.finalize().into()
    }

    /// Says how two vocabularies differ: tokens, their types, merges, and the special tokens that shape a prompt.
    pub fn vocabulary_difference(&self, other: &Self) -> Option<String> {
        let tokens = |f: &Self| Some(f.metadata.get("tokenizer.ggml.tokens")?.as_array()?.len());
        let (ours, theirs) = (tokens(self), tokens(other));
        if ours != theirs {
            let text = |n: Option<usize>| n.map_or("no".into(), |n| n.to_string());
            return Some(format!("{} tokens against {}", text(ours), text(theirs)));
        }
        let keys = ["model", "tokens", "token_type", "merges", "eos_token_id"].map(|k| format!("tokenizer.ggml.{k}"));
        let differs = keys.into_iter().find(|key| self.metadata.get(key) != other.metadata.get(key));
        differs.map(|key| format!("{key} differs"))
    }
}

fn bits<'a>(tensors: impl Iterator<Item = &'a TensorInfo>) -> Option<f64> {
    let (mut bytes, mut elements) = (0u64, 0u64);
    for tensor in tensors {
        bytes += tensor.size?;
        elements += tensor.elements() as u64;
    }
    (elements > 0).then(|| bytes as f64 * 8.0 / elements as f64)
}

fn map(path: &Path) -> Result<MappedFile, ReadError> {
    MappedFile::open(path).map_err(|source| ReadError::Read { path: path.into(), source })
}

struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn damaged<T>(&self, what: impl Into<String>) -> Result<T, ReadError> {
        Err(ReadError::Damaged { path: self.path.into(), at: self.at as u64, what: what.into() })
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], ReadError> {
        let end = usize::try_from(len).ok().and_then(|n| self.at.checked_add(n));
        let Some(slice) = end.and_then(|end| self.bytes.get(self.at..end)) else {
            return self.damaged(format!("{len} bytes are promised beyond the end of the file"));
        };
        self.at += slice.len();
        Ok(slice)
    }

    fn u32(&mut self) -> Result<u32, ReadError> {
        let b = self.take(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self) -> Result<u64, ReadError> {
        let b = self.take(8)?;
        Ok(u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
    }

    fn name(&mut self) -> Result<String, ReadError> {
        let len = self.u64()?;
        match std::str::from_utf8(self.take(len)?) {
            Ok(s) => Ok(s.to_owned()),
            Err(_) => self.damaged("a name is not UTF-8"),
        }
    }

    fn value(&mut self) -> Result<Value, ReadError> {
        let kind = self.u32()?;
        match (kind, width(kind)) {
            (STRING, _) => {
                let len = self.u64()?;
                Ok(Value::String(self.take(len)?.to_vec()))
            }
            (ARRAY, _) => self.array().map(Value::Array),
            (BOOL, Some(_)) => match self.take(1)?[0] {
                n @ 0..=1 => Ok(Value::Bool(n == 1)),
                n => self.damaged(format!("a Bool is {n}")),
            },
            (_, Some(n)) => match number(kind, self.take(n as u64)?) {
                Some(value) => Ok(value),
                None => self.damaged(format!("metadata type {kind} does not exist")),
            },
            (_, None) => self.damaged(format!("metadata type {kind} does not exist")),
        }
    }

    fn array(&mut self) -> Result<Array, ReadError> {
        let (kind, len) = (self.u32()?, self.u64()?);
        let start = self.at;
        match (kind, width(kind)) {
            (STRING, _) => {
                for _ in 0..len {
                    let bytes = self.u64()?;
                    self.take(bytes)?;
                }
            }
            (_, Some(n)) => {
                let Some(bytes) = len.checked_mul(n as u64) else { return self.damaged("an array is too long") };
                self.take(bytes)?;
            }
            _ => return self.damaged(format!("arrays of metadata type {kind} are not read")),
        }
        Ok(Array::raw(kind, len, self.bytes[start..self.at].to_vec()))
    }

    fn tensor(&mut self) -> Result<TensorInfo, ReadError> {
        let name = self.name()?;
        let rank = self.u32()?;
        if rank as usize > DIMENSIONS {
            return self.damaged(format!("tensor {name} has {rank} dimensions"));
        }
        let dims = (0..rank).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
        let (type_id, offset) = (self.u32()?, self.u64()?);
        let elements = dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).filter(|n| *n < 1 << 60);
        let shape: Option<Vec<usize>> = dims.iter().map(|d| usize::try_from(*d).ok()).collect();
        let (Some(elements), Some(shape)) = (elements, shape) else {
            return self.damaged(format!("tensor {name} is larger than any file"));
        };
        let size = match GgmlType::from_id(type_id) {
            Some(ty) => {
                let (block, row) = (ty.block_size() as u64, dims.first().copied().unwrap_or(1));
                if row % block != 0 {
                    return self.damaged(format!("tensor {name}: rows of {row} do not divide into blocks of {block}"));
                }
                Some(elements / block * ty.type_size() as u64)
            }
            None => None,
        };
        Ok(TensorInfo { name, type_id, shape, shard: 0, offset, size })
    }
}

fn open_one(path: &Path) -> Result<GgufFile, ReadError> {
    let empty = std::fs::metadata(path).map_err(|source| ReadError::Read { path: path.into(), source })?.len() == 0;
    if empty {
        return Err(ReadError::Magic { path: path.into(), found: Vec::new() });
    }
    let map = map(path)?;
    if map.get(..4) != Some(b"GGUF") {
        return Err(ReadError::Magic { path: path.into(), found: map[..map.len().min(4)].to_vec() });
    }
    let mut c = Cursor { path, bytes: &map, at: 4 };
    let version = c.u32()?;
    if !(2..=3).contains(&version) {
        return Err(ReadError::Version { path: path.into(), version });
    }
    let (tensor_count, pairs) = (c.u64()?, c.u64()?);
    let mut metadata = Metadata::default();
    let mut keys = HashSet::new();
    for _ in 0..pairs {
        let key = c.name()?;
        let value = c.value()?;
        if !keys.insert(key.clone()) {
            return c.damaged(format!("key {key} is given twice"));
        }
        metadata.push(key, value);
    }
    let (mut tensors, mut names) = (Vec::new(), HashSet::new());
    for _ in 0..tensor_count {
        let tensor = c.tensor()?;
        if !names.insert(tensor.name.clone()) {
            return c.damaged(format!("tensor {} is given twice", tensor.name));
        }
        tensors.push(tensor);
    }
    let alignment = match metadata.get("general.alignment") {
        Some(value) => match value.as_u64() {
            Some(a) if a.is_power_of_two() => a,
            _ => return c.damaged("general.alignment is not a power of two"),
        },
        None => ALIGNMENT,
    };
    let data = (c.at as u64).next_multiple_of(alignment);
    for tensor in &mut tensors {
        let at = data.checked_add(tensor.offset);
        let end = at.and_then(|at| at.checked_add(tensor.size.unwrap_or(0)));
        let (Some(at), Some(true)) = (at, end.map(|end| end <= map.len() as u64 || tensor.elements() == 0)) else {
            let what = format!("tensor {} ends beyond the end of the file ({} bytes)", tensor.name, map.len());
            let what = format!("{what}: it is cut off");
            return Err(ReadError::Damaged { path: path.into(), at: map.len() as u64, what });
        };
        tensor.offset = at;
    }
    let shards = vec![Shard { path: path.into(), map }];
    Ok(GgufFile { path: path.into(), version, metadata, tensors, shards })
}
