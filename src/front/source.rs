//! Metadata and tensors of one file, under GGUF's names, wherever they lie.
use super::{FrontError, Renamed, Row};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::ggml::GgmlType;
use crate::gguf::Metadata;
use crate::text::{self, TextConfig};
use candle_core::{D, DType, Device, Tensor};
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

    /// Makes what every element needs, for [`Self::values`] on many threads.
    ///
    /// # Errors
    /// As [`Self::values`]'.
    fn prepare(&self, _name: &str) -> Result<(), Error> {
        Ok(())
    }

    /// The tensor as it lies on disk (little-endian, row-major) and its type there, where its rows lie in order.
    fn bytes(&self, name: &str) -> Option<(GgmlType, &[u8])>;

    /// The whole tensor on `device`, f32, where it can be made there of halfs: half of the bytes on the way. Whether its
    /// values are finite is not looked at.
    ///
    /// # Errors
    /// It does not fit the device.
    fn on_device(&self, name: &str, shape: &[usize], device: &Device) -> Result<Option<Tensor>, Error> {
        let (dtype, bytes) = match self.bytes(name) {
            Some((GgmlType::F16, bytes)) => (DType::F16, bytes),
            Some((GgmlType::BF16, bytes)) => (DType::BF16, bytes),
            _ => return Ok(None),
        };
        Ok(Some(Tensor::from_raw_buffer(bytes, dtype, shape, device)?.to_dtype(DType::F32)?))
    }

    /// Says that the tensor will not be read again soon. Reading it again is allowed.
    fn release(&self, name: &str);

    /// The file that holds the tensor, or the model's folder, for messages.
    fn path(&self, name: &str) -> &Path;

    /// What the tensor is called there.
    fn origin<'n>(&'n self, name: &'n str) -> &'n str;

    /// A digest by which a changed model is noticed, 64 hexadecimal digits.
    fn fingerprint(&self) -> String;
}

/// What goes into one GGUF file: its keys, its tensors in order, and where their values come from.
pub struct Source<'a> {
    pub metadata: Metadata,
    pub tensors: Vec<TensorSpec>,
    pub values: Box<dyn Tensors + 'a>,
}

impl<'a> Source<'a> {
    /// A checkpoint's tensors as `rows` name them.
    pub(crate) fn renamed(checkpoint: &'a Checkpoint, metadata: Metadata, rows: Vec<Row>) -> Result<Self, Error> {
        let values = Box::new(Renamed::new(checkpoint, &rows)?);
        Ok(Source { metadata, tensors: rows.into_iter().map(|row| row.tensor).collect(), values })
    }
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

    /// What the decoder computes.
    ///
    /// # Errors
    /// As [`TextConfig::read`].
    pub fn text_config(&self) -> Result<TextConfig, Error> {
        Ok(TextConfig::read(self.values.path(""), &self.metadata)?)
    }

    fn fail(&self, name: &str, problem: String) -> Error {
        FrontError::Tensor { file: self.values.path(name).into(), name: name.into(), problem }.into()
    }

    /// The tensor, which must have the shape given.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<&TensorSpec, Error> {
        match self.tensor(name) {
            Some(t) if t.shape == shape => Ok(t),
            Some(t) => Err(self.fail(name, format!("has shape {:?}, expected {shape:?}", t.shape))),
            None => Err(self.fail(name, "is missing".into())),
        }
    }
}

impl text::Weights for Source<'_> {
    fn contains(&self, name: &str) -> bool {
        self.tensor(name).is_some()
    }

    fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let values = self.values.values(name, 0..self.checked(name, shape)?.elements())?;
        self.values.release(name);
        Ok(values)
    }

    /// On an accelerator halfs are widened there.
    fn tensor(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor, Error> {
        self.checked(name, shape)?;
        if !device.is_cpu()
            && let Some(t) = self.values.on_device(name, shape, device)?
        {
            // Zero times a number that is not finite is none.
            let finite = (&t * 0.0)?.sum(D::Minus1)?.sum_all()?.to_scalar::<f32>()? == 0.0;
            self.values.release(name);
            if finite {
                return Ok(t);
            }
            // Else the same again on the CPU says which number it is.
        }
        Ok(Tensor::from_vec(text::Weights::f32(self, name, shape)?, shape, device)?)
    }
}
