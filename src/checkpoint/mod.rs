//! A Hugging Face checkpoint directory: `config.json` and memory-mapped weights, safetensors or PyTorch's `.bin`, read one
//! tensor at a time, under the names that the published llava-hf repositories use whatever naming the files have.
mod error;
mod fingerprint;
mod guards;
mod names;
mod pickle;
mod tokenizer;
mod torch;
mod vocab_json;
mod widen;

pub use error::CheckpointError;
pub use names::canonical;
pub use safetensors::Dtype;
pub(crate) use tokenizer::{ROLES, check_names, declared_tokens, optional_json, tokenizer};

use crate::files::read_plain;
use crate::mapped::MappedFile;
use safetensors::SafeTensors;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One tensor's place in its file.
#[derive(Debug, Clone)]
struct StoredTensor {
    shard: usize,
    /// Name in the file, for messages.
    stored: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

struct WeightFile {
    path: PathBuf,
    map: MappedFile,
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
    shards: Vec<WeightFile>,
    tensors: BTreeMap<String, StoredTensor>,
    notes: Vec<String>,
    /// The folder of the tower, where it has one of its own.
    tower: Option<PathBuf>,
}

/// Where weights are: in one file, else in the shards that an index names. The first that is there counts, as for
/// transformers.
const WEIGHTS: [[&str; 2]; 2] =
    [["model.safetensors", "model.safetensors.index.json"], ["pytorch_model.bin", "pytorch_model.bin.index.json"]];

/// Tensor name -> the shard that has it.
type WeightIndex = BTreeMap<String, String>;

impl Checkpoint {
    /// Opens the directory `dir`: `config.json`, and `model.safetensors` or else the shards that
    /// `model.safetensors.index.json` names, or the same of `pytorch_model.bin`, which is transformers' order.
    ///
    /// # Errors
    /// A file is missing, truncated, not valid safetensors, or a `.bin` that holds more than tensors, the index names an absent
    /// shard or tensor, two tensors have one canonical name, or the folder holds an adapter, a wrapper's names or quantised weights.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        if !dir.is_dir() {
            return Err(CheckpointError::NotADirectory { path: dir.into() });
        }
        guards::adapter(dir)?;
        let config = read_json(&dir.join("config.json"))?;
        let ([single, index_file], index) = weights(dir, &config)?;
        let files: BTreeSet<&str> = match &index {
            Some(index) => index.values().map(String::as_str).collect(),
            None => [single].into(),
        };
        let mut this = Checkpoint {
            dir: dir.into(),
            config,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            notes: Vec::new(),
            tower: None,
        };
        let mut strays = Vec::new();
        for file in &files {
            let path = dir.join(file);
            if index.is_some() && !path.exists() {
                return Err(CheckpointError::MissingShard { index: dir.join(index_file), shard: path });
            }
            this.add_shard(path, |stored| index.as_ref()?.get(stored).filter(|f| f != file), &mut strays)?;
        }
        for (name, file) in index.iter().flatten() {
            if !this.tensors.contains_key(&canonical(name)) {
                return Err(CheckpointError::MissingTensor { file: dir.join(file), tensor: name.clone() });
            }
        }
        this.note_strays(&strays, index_file);
        if index.is_none() && dir.join(index_file).exists() {
            let named: BTreeSet<String> =
                read_index(&dir.join(index_file)).map_or_else(|_| BTreeSet::new(), |i| i.into_values().collect());
            if named.iter().any(|file| file != single && dir.join(file).exists()) {
                this.notes.push(format!(
                    "{single} is read, not the shards that {index_file} names: transformers does so, too"
                ));
            }
        }
        let stored = this.tensors.values().map(|e| (e.stored.as_str(), e.dtype));
        guards::tensors(dir, &this.config, stored)?;
        Ok(this)
    }

    /// Adds a file's tensors, but for those that `elsewhere` says are another file's: those go to `strays`.
    fn add_shard<'a>(
        &mut self,
        path: PathBuf,
        elsewhere: impl Fn(&str) -> Option<&'a String>,
        strays: &mut Vec<StoredTensor>,
    ) -> Result<(), CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.clone(), source };
        let map = MappedFile::open(&path).map_err(io)?;
        let found = match path.extension().is_some_and(|end| end == "bin") {
            true => torch::tensors(&map).map_err(|problem| CheckpointError::Torch { path: path.clone(), problem })?,
            false => in_safetensors(&path, &map)?,
        };
        for (stored, dtype, shape, bytes) in found {
            let entry = StoredTensor { shard: self.shards.len(), stored: stored.clone(), dtype, shape, bytes };
            if elsewhere(&stored).is_some() {
                strays.push(entry);
            } else if let Some(old) = self.tensors.insert(canonical(&stored), entry) {
                return Err(CheckpointError::Duplicate { first: old.stored, second: stored, path: path.clone() });
            }
        }
        self.shards.push(WeightFile { path, map });
        Ok(())
    }

    /// The index decides which of two copies of a tensor counts; where they differ, the user is told.
    fn note_strays(&mut self, strays: &[StoredTensor], index_file: &str) {
        for stray in strays {
            let Ok(kept) = self.tensor(&canonical(&stray.stored)) else { continue };
            let (path, other) = (&self.shards[stray.shard].path, &self.shards[stray.shard].map[stray.bytes.clone()]);
            if kept.bytes != other {
                let note = format!(
                    "{}: tensor `{}` has other values here than in the file that {index_file} assigns it to, which is used",
                    path.display(),
                    stray.stored
                );
                self.notes.push(note);
            }
        }
    }

    /// Says that the files of the tower lie in `dir`, and takes its tensors from there where the checkpoint has none:
    /// those of the vision half of a CLIP or SigLIP.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub(crate) fn add_tower(&mut self, dir: &Path) -> Result<(), CheckpointError> {
        self.tower = Some(dir.into());
        if self.has_tower() {
            return Ok(());
        }
        let tower = Checkpoint::open(dir)?;
        let before = self.shards.len();
        for mut entry in tower.tensors.into_values().filter(|entry| !is_of_text(&entry.stored)) {
            entry.shard += before;
            self.tensors.insert(canonical(&format!("vision_tower.{}", entry.stored)), entry);
        }
        self.shards.extend(tower.shards);
        self.notes.extend(tower.notes);
        Ok(())
    }

    /// Whether there are tensors of a tower.
    pub(crate) fn has_tower(&self) -> bool {
        self.names().any(|name| name.starts_with("vision_tower."))
    }

    /// The folder of the tower, where it has one of its own.
    pub(crate) fn tower(&self) -> Option<&Path> {
        self.tower.as_deref()
    }

    /// What the user should know about how the files were read.
    pub fn notes(&self) -> &[String] {
        &self.notes
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

    /// The name under which the file holds it, for messages.
    pub(crate) fn stored_name(&self, name: &str) -> String {
        self.tensors.get(name).map_or(name, |entry| &entry.stored).into()
    }

    /// Whether two tensors are there and equal in type, shape and bytes.
    pub(crate) fn same(&self, a: &str, b: &str) -> bool {
        matches!((self.tensor(a), self.tensor(b)), (Ok(a), Ok(b)) if a.dtype == b.dtype && a.shape == b.shape && a.bytes == b.bytes)
    }

    fn entry(&self, name: &str) -> Result<(&StoredTensor, &WeightFile), CheckpointError> {
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
        if let Ok((entry, shard)) = self.entry(name) {
            shard.map.release(entry.bytes.clone());
        }
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

/// The tensors of a safetensors file.
fn in_safetensors(path: &Path, map: &[u8]) -> Result<Vec<torch::Found>, CheckpointError> {
    let invalid = |source| CheckpointError::Safetensors { path: path.into(), size: map.len(), source };
    let parsed = SafeTensors::deserialize(map).map_err(invalid)?;
    let place = |view: &safetensors::tensor::TensorView| {
        let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
        start..start + view.data().len()
    };
    Ok(parsed.iter().map(|(name, view)| (name.into(), view.dtype(), view.shape().to_vec(), place(&view))).collect())
}

/// The names of the one file and of the index, and the index where the shards are to be read. `transformers_weights`, a
/// key of transformers 5, names the file to take in place of the first that is there.
fn weights(
    dir: &Path,
    config: &serde_json::Value,
) -> Result<([&'static str; 2], Option<WeightIndex>), CheckpointError> {
    let chosen = match config.get("transformers_weights").filter(|v| !v.is_null()) {
        None => None,
        Some(v) => match v.as_str() {
            Some(file) if WEIGHTS.as_flattened().contains(&file) => Some(file),
            _ => {
                let field = "transformers_weights".into();
                let want = "model.safetensors, pytorch_model.bin or the index of either";
                return Err(CheckpointError::Field { path: dir.join("config.json"), field, want });
            }
        },
    };
    let is_there = |file: &str| chosen.is_none_or(|c| c == file) && dir.join(file).exists();
    for names @ [single, index] in WEIGHTS {
        if is_there(single) {
            return Ok((names, None));
        } else if is_there(index) {
            return Ok((names, Some(read_index(&dir.join(index))?)));
        }
    }
    Err(CheckpointError::NoWeights { dir: dir.into() })
}

/// `config.json` of a folder whose weights need not be there yet.
///
/// # Errors
/// The file is missing or no JSON, the folder holds an adapter, or the file says that the weights are quantised.
pub(crate) fn read_configuration(dir: &Path) -> Result<serde_json::Value, CheckpointError> {
    guards::adapter(dir)?;
    let config = read_json(&dir.join("config.json"))?;
    guards::not_quantised(dir, &config)?;
    Ok(config)
}

/// Whether a tensor of CLIP or SigLIP is of the half that reads text, or brings both halves together.
fn is_of_text(stored: &str) -> bool {
    let parts = ["text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias"];
    parts.iter().any(|part| stored.starts_with(part))
}

/// Reads and parses a JSON file: an object, as every file of a checkpoint is.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value, CheckpointError> {
    let text = read_plain(path).map_err(|source| CheckpointError::Io { path: path.into(), source })?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|source| CheckpointError::Json { path: path.into(), source })?;
    if json.is_object() { Ok(json) } else { Err(CheckpointError::NotAnObject { path: path.into() }) }
}

fn read_index(path: &Path) -> Result<WeightIndex, CheckpointError> {
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
