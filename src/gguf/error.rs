use crate::error::advice;
use std::path::PathBuf;

/// What can stop the making of a GGUF file, apart from the checkpoint's own faults.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    #[error("{path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a tokenizer that this version reads: {problem}")]
    Tokenizer { path: PathBuf, problem: String },
    #[error("{path}: field `{field}`: {problem}")]
    TokenizerField { path: PathBuf, field: String, problem: String },
    #[error("{file}: tensor `{tensor}`: {source}")]
    Quantise { file: PathBuf, tensor: String, source: crate::ggml::GgmlError },
    #[error("{file}: tensor `{tensor}` holds {value}, which f16 cannot; use bf16 or f32")]
    BeyondF16 { file: PathBuf, tensor: String, value: f32 },
    #[error("{file}: tensor `{tensor}`: the encoder returned {given} bytes, {want} are needed")]
    EncoderSize { file: PathBuf, tensor: String, given: usize, want: usize },
    #[error("scales are to be folded into tensor `{tensor}`, which no output file holds")]
    UnknownFold { tensor: String },
    #[error("{path}: cannot write: {source}{}", advice(source))]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{name}: a file of it changed while it was converted; nothing was written, convert it again")]
    Changed { name: String },
    #[error("{path}: {problem}")]
    Output { path: PathBuf, problem: &'static str },
    #[error("{path} cannot be written: there is no folder {folder}; make it, or name another output")]
    NoFolder { path: PathBuf, folder: PathBuf },
    #[error("{flag} changes nothing: {why}; leave it out")]
    NoEffect { flag: &'static str, why: &'static str },
    #[error(
        "--split-max-size: there would be {count} files, of which at most {most} can be numbered; take a larger size"
    )]
    Shards { count: usize, most: usize },
    #[error("GGUF tensor {tensor:?}: {problem}")]
    Entry { tensor: String, problem: String },
    #[error(
        "{mmproj} does not belong to {model}: they were made from different vision towers, projectors or rotations; give \
         the mmproj that was written beside the model, or convert its checkpoint again"
    )]
    Pair { model: PathBuf, mmproj: PathBuf },
    #[error(transparent)]
    Prompt(#[from] crate::prompt::PromptError),
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::CheckpointError),
    #[error(transparent)]
    Unreadable(#[from] super::ReadError),
    #[error(transparent)]
    Ggml(#[from] crate::ggml::GgmlError),
}
