//! What a model needs to be published: a card (README.md) for the hub, and a look at the folder before it is uploaded.
mod card;
mod check;
mod name;
mod quality;
mod yaml;

pub use card::{CardOptions, ModelCard, card};
pub use check::{Checked, Problem, check};
pub use name::GgufName;

use crate::gguf::{GgufError, ReadError};
use crate::record::RecordError;
use crate::runtime::RuntimeError;
use std::path::PathBuf;

/// Why there is no card.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    #[error(transparent)]
    Unreadable(#[from] ReadError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Pair(#[from] GgufError),
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
    #[error("{path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
}

impl PublishError {
    fn file(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        PublishError::File { path: path.into(), problem: problem.into() }
    }
}
