//! Samples packed one below another in a matrix `[tokens, hidden]`, and what attention has to know of their tokens.
use candle_core::{Result, bail};
use std::ops::Range;
use std::sync::Arc;

/// The positions by which a sample's tokens turn, `[tokens, columns]`: one, or time, height and width, or these and the
/// other that llama.cpp hands to ggml.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Positions {
    columns: usize,
    values: Vec<u32>,
}

impl Positions {
    /// # Errors
    /// Not 1, 3 or 4 columns, or a row that is not whole.
    pub fn new(columns: usize, values: Vec<u32>) -> Result<Self> {
        if !matches!(columns, 1 | 3 | 4) || !values.len().is_multiple_of(columns) {
            bail!("{} positions in rows of {columns}; expected rows of 1, 3 or 4", values.len());
        }
        Ok(Positions { columns, values })
    }

    pub fn tokens(&self) -> usize {
        self.values.len() / self.columns
    }

    /// Row by row. A column that there is not is the first: transformers has one position for a text's token, and
    /// three for a picture's.
    pub(super) fn rows(&self) -> impl Iterator<Item = [u32; 4]> + '_ {
        let columns = self.columns;
        self.values.chunks_exact(columns).map(move |row| std::array::from_fn(|i| row[if i < columns { i } else { 0 }]))
    }
}

/// What attention has to know of a sample's tokens beside their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SampleLayout {
    /// Of every token of the sample; none: 0, 1, 2, …
    pub positions: Option<Positions>,
    /// Tokens that see one another in both directions, counted from the sample's start (Gemma's pictures).
    pub runs: Vec<Range<usize>>,
}

/// One sample's rows in a packed matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub start: usize,
    /// Rows, padding included.
    pub len: usize,
    /// Rows that are tokens; later ones are padding, which no row attends to.
    pub real: usize,
    /// None: plain text, or pictures that are like text to the decoder.
    pub layout: Option<Arc<SampleLayout>>,
}

impl Span {
    /// `len` tokens, plain.
    pub fn new(start: usize, len: usize) -> Self {
        Span { start, len, real: len, layout: None }
    }

    /// The keys that the token `t` of the sample may see, padding not yet left out: the last `window`, or all, up to itself
    /// or to the end of the run that it is in. A window holds inside a run too, as transformers and llama.cpp have it.
    pub(super) fn seen(&self, t: usize, window: Option<usize>) -> Range<usize> {
        let runs = self.layout.as_ref().map_or(&[][..], |layout| &layout.runs);
        let end = runs.iter().find(|run| run.contains(&t)).map_or(t + 1, |run| run.end.min(self.len));
        window.map_or(0, |window| (t + 1).saturating_sub(window))..end
    }
}
