//! The door: a model on disk, of whatever make, becomes a [`Pair`] of [`Source`]s, metadata and tensors as GGUF names
//! them. Behind it nothing knows where a model came from. A family of checkpoints is one folder here.
mod assemble;
mod card;
mod claims;
pub(crate) mod config;
mod config_keys;
mod decoder;
mod find;
pub mod gemma3;
mod general;
pub mod gguf;
pub mod idefics3;
pub mod internvl;
pub mod llava;
pub mod llava_onevision;
pub mod llava_original;
mod origin;
mod pair_id;
mod pretokenizer;
pub(crate) mod processor;
pub mod qwen_vl;
mod renamed;
pub mod rotated;
mod sentencepiece;
mod sentencepiece_model;
mod source;
#[cfg(test)]
pub(crate) mod testing;
mod tower;
pub mod vocabulary;

pub use card::{Card, FrontMatter, ModelName};
pub use config::ConfigError;
pub use find::{FoundModel, families};
pub use general::General;
pub use origin::{Origin, OriginFile};
pub(crate) use renamed::{Renamed, Row};
pub use source::{Source, TensorSpec, Tensors};

/// The two files of a model.
pub struct Pair<'a> {
    pub text: Source<'a>,
    /// Tower and projector; none: a text model.
    pub mmproj: Option<Source<'a>>,
    pub name: ModelName,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Why a model is not let in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrontError {
    #[error("{file}: tensor `{name}` {problem}")]
    Tensor { file: std::path::PathBuf, name: String, problem: String },
    #[error("{file}: {problem}")]
    File { file: std::path::PathBuf, problem: String },
}
