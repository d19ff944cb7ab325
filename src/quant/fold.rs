//! Per-channel scales folded into weights: what calibration hands to the writer (MBQ's `W*s` and `norm / s`).
use std::collections::BTreeMap;

/// How one tensor changes before it is quantised. Its function composed with its neighbours' stays the same.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fold {
    /// Divides row i (or, in a 1-D tensor, element i): a norm's gain, a predecessor's output rows and bias.
    pub divide_rows: Option<Vec<f32>>,
    /// Multiplies column j: a linear's input channels.
    pub multiply_cols: Option<Vec<f32>>,
}

/// Folds by canonical tensor name.
pub type Folds = BTreeMap<String, Fold>;

#[derive(Debug, thiserror::Error, PartialEq)]
#[error("tensor `{tensor}`: {given} fold scales for {want} {axis}")]
pub struct FoldError {
    pub tensor: String,
    pub given: usize,
    pub want: usize,
    pub axis: &'static str,
}

impl Fold {
    /// Checks the scales' lengths against a tensor of `rows` x `cols` (1-D: `rows` x 1).
    ///
    /// # Errors
    /// A length differs.
    pub fn check(&self, tensor: &str, rows: usize, cols: usize) -> Result<(), FoldError> {
        for (scales, want, axis) in [(&self.divide_rows, rows, "rows"), (&self.multiply_cols, cols, "columns")] {
            if let Some(s) = scales
                && s.len() != want
            {
                return Err(FoldError { tensor: tensor.into(), given: s.len(), want, axis });
            }
        }
        Ok(())
    }

    /// Applies the fold to `data`, whole rows of `cols` values of which the first is row `first_row`, in f32.
    /// Lengths have been checked with [`Fold::check`].
    pub fn apply(&self, data: &mut [f32], first_row: usize, cols: usize) {
        for (i, row) in data.chunks_mut(cols).enumerate() {
            if let Some(s) = &self.divide_rows {
                row.iter_mut().for_each(|v| *v /= s[first_row + i]);
            }
            if let Some(s) = &self.multiply_cols {
                row.iter_mut().zip(s).for_each(|(v, s)| *v *= s);
            }
        }
    }
}
