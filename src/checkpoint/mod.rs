//! A Hugging Face checkpoint directory: `config.json` and memory-mapped safetensors, read one tensor at a time,
//! under the names that the published llava-hf repositories use whatever naming the files have.
mod error;
mod fingerprint;
mod names;
mod widen;

pub use error::CheckpointError;
pub use names::canonical;
pub use safetensors::Dtype;

use memmap2::Mmap;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One tensor's place in its file.
#[derive(Debug, Clone)]
struct Entry {
    shard: usize,
    /// Name in the file, for messages.
    stored: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

struct Shard {
    path: PathBuf,
    map: Mmap,
}

/// A tensor as it lies in the file: little-endian, row-major.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// An opened checkpoint. Tensor data stays on disk until it is asked for.
pub struct Checkpoint {
    dir: PathBuf,
    config: serde_json::Value,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// Opens the directory `dir`: `config.json`, and `model.safetensors` or the shards that
    /// `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// A file is missing, truncated or not valid safetensors, the index names an absent shard or tensor,
    /// or two tensors have one canonical name.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        if !dir.is_dir() {
            return Err(CheckpointError::NotADirectory { path: dir.into() });
        }
        let config = read_json(&dir.join("config.json"))?;
        let index_path = dir.join("model.safetensors.index.json");
        let single = dir.join("model.safetensors");
        let index = if index_path.exists() { Some(read_index(&index_path)?) } else { None };
        let files: Vec<PathBuf> = match &index {
            Some(index) => {
                let mut files: Vec<_> = index.values().map(|f| dir.join(f)).collect();
                files.sort();
                files.dedup();
                files
            }
            None if single.exists() => vec![single],
            None => return Err(CheckpointError::NoWeights { dir: dir.into() }),
        };
        let mut this = Checkpoint { dir: dir.into(), config, shards: Vec::new(), tensors: BTreeMap::new() };
        for path in files {
            if index.is_some() && !path.exists() {
                return Err(CheckpointError::MissingShard { index: index_path, shard: path });
            }
            this.add_shard(path)?;
        }
        for (name, file) in index.iter().flatten() {
            if !this.tensors.contains_key(&canonical(name)) {
                return Err(CheckpointError::MissingTensor { file: dir.join(file), tensor: name.clone() });
            }
        }
        Ok(this)
    }

    fn add_shard(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.clone(), source };
        let file = File::open(&path).map_err(io)?;
        // SAFETY: the map is only read; a checkpoint that another process truncates while we read it raises SIGBUS,
        // the usual contract of memory-mapped model files.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let invalid = |source| CheckpointError::Safetensors { path: path.clone(), size: map.len(), source };
        let (header, _) = SafeTensors::read_metadata(&map).map_err(invalid)?;
        let data = header + 8;
        let parsed = SafeTensors::deserialize(&map).map_err(invalid)?;
        for (stored, view) in parsed.iter() {
            let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
            debug_assert!(start >= data);
            let entry = Entry {
                shard: self.shards.len(),
                stored: stored.to_string(),
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: start..start + view.data().len(),
            };
            if let Some(old) = self.tensors.insert(canonical(stored), entry) {
                return Err(CheckpointError::Duplicate {
                    first: old.stored,
                    second: stored.to_string(),
                    path: path.clone(),
                });
            }
        }
        self.shards.push(Shard { path, map });
        Ok(())
    }

    /// The directory this checkpoint was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`.
    pub fn config(&self) -> &serde_json::Value {
        &self.config
    }

    /// Reads another JSON file of the checkpoint, such as `preprocessor_config.json`.
    ///
    /// # Errors
    /// The file is missing or is not JSON.
    pub fn json(&self, file: &str) -> Result<serde_json::Value, CheckpointError> {
        read_json(&self.dir.join(file))
    }

    /// Canonical names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether the tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn entry(&self, name: &str) -> Result<(&Entry, &Shard), CheckpointError> {
        let entry = self
            .tensors
            .get(name)
            .ok_or_else(|| CheckpointError::MissingTensor { file: self.dir.clone(), tensor: name.into() })?;
        Ok((entry, &self.shards[entry.shard]))
    }

    /// The tensor as stored.
    ///
    /// # Errors
    /// No such tensor.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        let (entry, shard) = self.entry(name)?;
        Ok(TensorView { dtype: entry.dtype, shape: &entry.shape, bytes: &shard.map[entry.bytes.clone()] })
    }

    /// Checks that the tensor exists, has a floating-point type, and has this shape.
    ///
    /// # Errors
    /// One of those is not so; the message names the file.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<(), CheckpointError> {
        let (entry, shard) = self.entry(name)?;
        if entry.shape != shape {
            return Err(CheckpointError::Shape {
                path: shard.path.clone(),
                tensor: entry.stored.clone(),
                found: entry.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        if !matches!(entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(CheckpointError::Dtype {
                path: shard.path.clone(),
                tensor: entry.stored.clone(),
                dtype: entry.dtype,
            });
        }
        Ok(())
    }

    /// Tells the system that the tensor will not be read again soon, so that its pages stop counting as this
    /// process's memory. Reading it again is allowed.
    pub fn release(&self, name: &str) {
        #[cfg(unix)]
        if let Ok((entry, shard)) = self.entry(name) {
            let bytes = entry.bytes.clone();
            // SAFETY: a shared, read-only map of a file: pages dropped here come back from the file when touched.
            // A failure only leaves them resident.
            let _ = unsafe {
                shard.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len())
            };
        }
        #[cfg(not(unix))]
        let _ = name;
    }

    /// The whole tensor widened to f32, row-major.
    ///
    /// # Errors
    /// No such tensor, another shape, a type other than F32, F16 and BF16, or a value that is NaN or infinite.
    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        self.f32_range(name, shape, 0..shape.iter().product())
    }

    /// Elements `range` of the tensor (row-major), widened to f32: for tensors too large to hold in f32.
    ///
    /// # Errors
    /// As [`Checkpoint::f32`]; only the range is searched for NaN and infinity. `range` must lie inside `shape`.
    pub fn f32_range(&self, name: &str, shape: &[usize], range: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
        self.check(name, shape)?;
        let (entry, shard) = self.entry(name)?;
        let size = if entry.dtype == Dtype::F32 { 4 } else { 2 };
        let at = entry.bytes.start;
        let values = widen::to_f32(entry.dtype, &shard.map[at + range.start * size..at + range.end * size]);
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(i) => Err(CheckpointError::NotFinite {
                path: shard.path.clone(),
                tensor: entry.stored.clone(),
                index: range.start + i,
                value: values[i],
            }),
        }
    }
}

/// Reads and parses a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value, CheckpointError> {
    let text = std::fs::read(path).map_err(|source| CheckpointError::Io { path: path.into(), source })?;
    serde_json::from_slice(&text).map_err(|source| CheckpointError::Json { path: path.into(), source })
}

/// Tensor name -> file name, from `model.safetensors.index.json`.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let json = read_json(path)?;
    let field = |field: &str| CheckpointError::Field { path: path.into(), field: field.into(), want: "a file name" };
    let map = json.get("weight_map").and_then(|m| m.as_object()).ok_or_else(|| field("weight_map"))?;
    map.iter()
        .map(|(tensor, file)| {
            let file = file.as_str().ok_or_else(|| field(tensor))?;
            // A shard lies in the checkpoint's own directory, never elsewhere.
            if Path::new(file).components().count() != 1 || file.starts_with('.') {
                return Err(field(tensor));
            }
            Ok((tensor.clone(), file.to_string()))
        })
        .collect()
}
