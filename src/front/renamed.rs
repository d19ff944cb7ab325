//! A Hugging Face checkpoint's tensors under GGUF's names.
use super::{FrontError, Tensors};
use crate::Error;
use crate::checkpoint::{Checkpoint, Dtype};
use crate::ggml::GgmlType;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Tensors of `checkpoint`, each under the name that a family's table gives it.
pub struct Renamed<'a> {
    checkpoint: &'a Checkpoint,
    /// GGUF's name to the checkpoint's canonical one and the shape.
    names: BTreeMap<String, (String, Vec<usize>)>,
}

impl<'a> Renamed<'a> {
    /// `names`: GGUF's name, the checkpoint's canonical name, the shape there.
    ///
    /// # Errors
    /// A tensor is missing, has another shape or no floating-point type.
    pub fn new(
        checkpoint: &'a Checkpoint,
        names: impl IntoIterator<Item = (String, String, Vec<usize>)>,
    ) -> Result<Self, Error> {
        let names: BTreeMap<_, _> = names.into_iter().map(|(to, from, shape)| (to, (from, shape))).collect();
        names.values().try_for_each(|(from, shape)| checkpoint.check(from, shape))?;
        Ok(Renamed { checkpoint, names })
    }

    fn entry(&self, name: &str) -> Result<&(String, Vec<usize>), Error> {
        let missing = || FrontError::Tensor {
            file: self.checkpoint.dir().into(),
            name: name.into(),
            problem: "is not in the family's table".into(),
        };
        Ok(self.names.get(name).ok_or_else(missing)?)
    }
}

impl Tensors for Renamed<'_> {
    fn values(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>, Error> {
        let (from, shape) = self.entry(name)?;
        Ok(self.checkpoint.f32_range(from, shape, range)?)
    }

    fn bytes(&self, name: &str) -> Option<(GgmlType, &[u8])> {
        let view = self.checkpoint.tensor(&self.names.get(name)?.0).ok()?;
        let ty = match view.dtype {
            Dtype::F32 => GgmlType::F32,
            Dtype::F16 => GgmlType::F16,
            Dtype::BF16 => GgmlType::BF16,
            _ => return None,
        };
        Some((ty, view.bytes))
    }

    fn release(&self, name: &str) {
        if let Some((from, _)) = self.names.get(name) {
            self.checkpoint.release(from);
        }
    }

    fn path(&self, _: &str) -> &Path {
        self.checkpoint.dir()
    }
}
