use safetensors::{Dtype, SafeTensorError};
use std::path::PathBuf;

/// What can be wrong with a checkpoint on disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    #[error("{path}: not a directory; give the directory of a Hugging Face checkpoint, or a hub id org/name")]
    NotADirectory { path: PathBuf },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: not valid JSON: {source}")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{path}: field `{field}` is missing or not {want}")]
    Field { path: PathBuf, field: String, want: &'static str },
    #[error("{dir}: no weights: neither model.safetensors nor model.safetensors.index.json is there")]
    NoWeights { dir: PathBuf },
    #[error("{index}: names shard {shard}, which is not there; download it again")]
    MissingShard { index: PathBuf, shard: PathBuf },
    #[error("{path} ({size} bytes): not a valid safetensors file: {source}; it may be truncated, download it again")]
    Safetensors { path: PathBuf, size: usize, source: SafeTensorError },
    #[error("{file}: tensor `{tensor}` is missing")]
    MissingTensor { file: PathBuf, tensor: String },
    #[error("{path}: tensors `{first}` and `{second}` are the same tensor under two names")]
    Duplicate { path: PathBuf, first: String, second: String },
    #[error("{path}: tensor `{tensor}` has shape {found:?}, but config.json asks for {expected:?}")]
    Shape { path: PathBuf, tensor: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("{path}: tensor `{tensor}` has type {dtype:?}; F32, F16 and BF16 weights are supported")]
    Dtype { path: PathBuf, tensor: String, dtype: Dtype },
    #[error("{path}: tensor `{tensor}` holds {value} at element {index}; the checkpoint is damaged")]
    NotFinite { path: PathBuf, tensor: String, index: usize, value: f32 },
}
