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
    #[error("{path}: holds no JSON object; save the file again, or download it again")]
    NotAnObject { path: PathBuf },
    #[error("{path}: field `{field}` is missing or not {want}")]
    Field { path: PathBuf, field: String, want: &'static str },
    #[error(
        "{dir}: no weights: neither model.safetensors, pytorch_model.bin nor the index of either (….index.json) is there"
    )]
    NoWeights { dir: PathBuf },
    #[error("{index}: names shard {shard}, which is not there; download it again")]
    MissingShard { index: PathBuf, shard: PathBuf },
    #[error("{path} ({size} bytes): not a valid safetensors file: {source}; it may be truncated, download it again")]
    Safetensors { path: PathBuf, size: usize, source: SafeTensorError },
    #[error("{path}: {problem}")]
    Torch { path: PathBuf, problem: String },
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
    #[error(
        "{path}: an adapter ({kind}) of {base}, not a model: merge it first (peft's merge_and_unload), save the merged \
             model with its processor, and give that folder"
    )]
    Adapter { path: PathBuf, kind: String, base: String },
    #[error(
        "{path}: an adapter ({kind}) of {base} lies beside the weights, and transformers would apply it: merge it first \
             (peft's merge_and_unload); if the weights are merged already, remove adapter_config.json"
    )]
    AdapterBeside { path: PathBuf, kind: String, base: String },
    #[error(
        "{path}: tensor `{tensor}` and {more} more belong to an adapter that is not merged into the weights: merge \
             the adapter first (peft's merge_and_unload) and save the model again"
    )]
    Unmerged { path: PathBuf, tensor: String, more: usize },
    #[error("{path}: tensor `{tensor}`: the prefix `{prefix}` is left by {wrapper}: {advice}, or rename the tensors")]
    Wrapped { path: PathBuf, tensor: String, prefix: &'static str, wrapper: &'static str, advice: &'static str },
    #[error("{path}: the weights are already quantised ({how}; tensor `{tensor}`): give the original checkpoint")]
    Quantised { path: PathBuf, tensor: String, how: String },
    #[error(
        "{path}: `quantization_config` says that the weights are already quantised ({how}): give the original \
             checkpoint; if the weights beside it are plain ones, remove that key"
    )]
    SaidQuantised { path: PathBuf, how: String },
    #[error(
        "{path}: {key} is {claimed}, but the checkpoint holds the blocks {prefix}0 to {prefix}{last}; one of the two is of \
             another model"
    )]
    Blocks { path: PathBuf, key: &'static str, claimed: usize, prefix: &'static str, last: String },
    #[error(
        "{path}: tensor `{tensor}`{more} is no part of the model that config.json describes, and would be lost: if the \
             model needs it, it is not supported; else remove it"
    )]
    Unclaimed { path: PathBuf, tensor: String, more: String },
}
