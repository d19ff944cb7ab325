//! A Hugging Face checkpoint's tensors under GGUF's names.
use super::{FrontError, TensorSpec, Tensors};
use crate::Error;
use crate::checkpoint::{Checkpoint, Dtype};
use crate::ggml::GgmlType;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// A row of a family's table: GGUF's tensor, and which one of the checkpoint's it is.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub tensor: TensorSpec,
    /// The checkpoint's canonical name.
    pub from: String,
    /// Heads so wide have their rows in another order: i and i + d/2 become 2i and 2i + 1.
    neighbours: Option<usize>,
}

impl Row {
    /// A vector, or a small table: f32 in files that quantise nothing.
    pub fn vector(name: impl Into<String>, from: impl Into<String>, shape: &[usize]) -> Self {
        Row { tensor: TensorSpec::new(name, shape, GgmlType::F32), from: from.into(), neighbours: None }
    }

    /// A matrix or a convolution: f16 there.
    pub fn matrix(name: impl Into<String>, from: impl Into<String>, shape: &[usize]) -> Self {
        Row { tensor: TensorSpec::new(name, shape, GgmlType::F16), from: from.into(), neighbours: None }
    }

    /// The same with the rows of heads of `head_dim` reordered.
    pub fn neighbours(self, head_dim: usize) -> Self {
        Row { neighbours: Some(head_dim), ..self }
    }

    /// The checkpoint's row that becomes row `r`.
    fn source_row(&self, r: usize) -> usize {
        self.neighbours.map_or(r, |d| r / d * d + r % d / 2 + r % 2 * (d / 2))
    }
}

/// Tensors of a checkpoint, each under the name that a family's table gives it.
pub(crate) struct Renamed<'a> {
    checkpoint: &'a Checkpoint,
    rows: BTreeMap<String, Row>,
}

impl<'a> Renamed<'a> {
    /// # Errors
    /// A tensor is missing, has another shape or no floating-point type.
    pub fn new(checkpoint: &'a Checkpoint, rows: &[Row]) -> Result<Self, Error> {
        rows.iter().try_for_each(|row| checkpoint.check(&row.from, &row.tensor.shape))?;
        Ok(Renamed { checkpoint, rows: rows.iter().map(|row| (row.tensor.name.clone(), row.clone())).collect() })
    }

    fn row(&self, name: &str) -> Result<&Row, Error> {
        let missing = || FrontError::Tensor {
            file: self.checkpoint.dir().into(),
            name: name.into(),
            problem: "is not in the family's table".into(),
        };
        Ok(self.rows.get(name).ok_or_else(missing)?)
    }
}

impl Tensors for Renamed<'_> {
    fn values(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>, Error> {
        let row = self.row(name)?;
        let shape = &row.tensor.shape;
        if row.neighbours.is_none() {
            return Ok(self.checkpoint.f32_range(&row.from, shape, range)?);
        }
        let cols: usize = shape[1..].iter().product();
        let mut values = Vec::with_capacity(range.len());
        let mut at = range.start;
        while at < range.end {
            let (r, c) = (at / cols, at % cols);
            let from = row.source_row(r) * cols;
            let n = (cols - c).min(range.end - at);
            values.extend(self.checkpoint.f32_range(&row.from, shape, from + c..from + c + n)?);
            at += n;
        }
        Ok(values)
    }

    fn bytes(&self, name: &str) -> Option<(GgmlType, &[u8])> {
        let row = self.rows.get(name).filter(|row| row.neighbours.is_none())?;
        let view = self.checkpoint.tensor(&row.from).ok()?;
        let ty = match view.dtype {
            Dtype::F32 => GgmlType::F32,
            Dtype::F16 => GgmlType::F16,
            Dtype::BF16 => GgmlType::BF16,
            _ => return None,
        };
        Some((ty, view.bytes))
    }

    fn release(&self, name: &str) {
        if let Some(row) = self.rows.get(name) {
            self.checkpoint.release(&row.from);
        }
    }

    fn path(&self, _: &str) -> &Path {
        self.checkpoint.dir()
    }

    fn origin<'n>(&'n self, name: &'n str) -> &'n str {
        self.rows.get(name).map_or(name, |row| &row.from)
    }

    fn fingerprint(&self) -> String {
        self.checkpoint.fingerprint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `reshape(heads, 2, d/2, cols).swapaxes(1, 2)`, two heads of four rows.
    #[test]
    fn halves_become_neighbours() {
        let row = Row::vector("blk.0.attn_q.bias", "", &[8]).neighbours(4);
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(|r| row.source_row(r)), [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
