//! The door: a model on disk, of whatever make, becomes a [`Source`], metadata and tensors as GGUF names them. Behind it
//! nothing knows where a model came from.
mod find;
pub mod gguf;
pub mod llava_onevision;
mod renamed;

pub use find::Found;
pub use renamed::Renamed;

use crate::Error;
use crate::ggml::GgmlType;
use crate::gguf::{Metadata, Name};
use std::ops::Range;
use std::path::Path;

/// A tensor of a [`Source`].
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// GGUF's name, `blk.3.attn_q.weight`.
    pub name: String,
    /// Outermost dimension first; the last one is the row's length. GGUF lists it the other way round.
    pub shape: Vec<usize>,
    /// Its type in a file that quantises nothing.
    pub stored: GgmlType,
}

impl TensorSpec {
    pub fn new(name: impl Into<String>, shape: &[usize], stored: GgmlType) -> Self {
        TensorSpec { name: name.into(), shape: shape.to_vec(), stored }
    }

    /// Number of values.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Where a source's tensors come from. Names are those of the source's list.
pub trait Tensors: Sync {
    /// Elements `range` of a tensor, row-major.
    ///
    /// # Errors
    /// No such tensor; a type that cannot be read as f32; a value that is NaN or infinite.
    fn values(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>, Error>;

    /// The tensor as it lies on disk (little-endian, row-major) and its type there, where its rows lie in order.
    fn bytes(&self, name: &str) -> Option<(GgmlType, &[u8])>;

    /// Says that the tensor will not be read again soon. Reading it again is allowed.
    fn release(&self, name: &str);

    /// The file that holds the tensor, or the model's folder, for messages.
    fn path(&self, name: &str) -> &Path;
}

/// What goes into one GGUF file: its keys, its tensors in order, and where their values come from.
pub struct Source<'a> {
    pub metadata: Metadata,
    pub tensors: Vec<TensorSpec>,
    pub values: Box<dyn Tensors + 'a>,
}

impl Source<'_> {
    /// The tensor named `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorSpec> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// Number of values in all tensors.
    pub fn elements(&self) -> usize {
        self.tensors.iter().map(TensorSpec::elements).sum()
    }

    /// A whole tensor, which must have the shape given.
    ///
    /// # Errors
    /// No such tensor, another shape, and as [`Tensors::values`].
    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let fail = |problem: String| FrontError::Tensor { file: self.values.path(name).into(), name: name.into(), problem };
        match self.tensor(name) {
            Some(t) if t.shape == shape => self.values.values(name, 0..t.elements()),
            Some(t) => Err(fail(format!("has shape {:?}, expected {shape:?}", t.shape)).into()),
            None => Err(fail("is missing".into()).into()),
        }
    }
}

/// The two files of a model.
pub struct Pair<'a> {
    pub text: Source<'a>,
    /// Tower and projector; none: a text model.
    pub mmproj: Option<Source<'a>>,
    pub name: Name,
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
