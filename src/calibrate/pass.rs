//! A block's pass over the whole batch, chunk by chunk: what the search and the statistics need of it is kept, the rest
//! is gone with its chunk, and made again from the kept for the rows that are asked for.
use super::batch::{Batch, Chunk};
use super::grid::Activations;
use super::stream::Stream;
use crate::text::ops::{column_abs, column_max, each};
use crate::text::{Block, Group, LinearName, Trace};
use candle_core::{Result, Tensor};

/// What a pass keeps.
#[derive(Debug, Clone, Copy, Default)]
pub struct Keep {
    /// The input of o, for a search of [`Group::O`].
    pub o_in: bool,
    /// The outputs of o and of down.
    pub outputs: bool,
    /// Sums of |x| of each group's input.
    pub sums: bool,
    /// The largest |x| of each group's input.
    pub maxima: bool,
    /// The input of down, if there is room for it.
    pub down_in: bool,
    /// Lets what the way back needs be seen; activations are as they are then.
    pub made: bool,
}

/// What a pass has kept.
#[derive(Debug)]
pub struct Kept {
    attn_out: Stream,
    mlp_out: Stream,
    o_in: Stream,
    down_in: Stream,
    rows: usize,
    /// By group, each channel's sum and maximum of |x|.
    sums: [Vec<f64>; 4],
    maxima: [Vec<f32>; 4],
}

/// A block's pass over `x`.
pub struct Pass<'a> {
    block: &'a Block,
    x: &'a Stream,
    activations: Activations,
    kept: Kept,
}

impl Kept {
    /// Bytes of a block's pass over `batch`, all but its maxima kept.
    pub fn bytes(block: &Block, batch: &Batch) -> usize {
        let widths =
            [LinearName::O, LinearName::Down].map(|n| block.linear(n).weight.elem_count() / block.norm1.elem_count());
        4 * batch.tokens * (2 * block.norm1.elem_count() + widths[0] + widths[1])
    }

    /// The output of o, of a chunk.
    pub fn attn_out(&self, chunk: usize) -> Result<Tensor> {
        self.attn_out.get(chunk)
    }

    /// Runs `block` on `x`, `activations` applied to what enters a linear, `at_once` chunks at a time; `seen` gets every
    /// chunk's trace, in order.
    ///
    /// # Errors
    /// The arithmetic, or there is no room for what is kept.
    pub fn run(
        block: &Block,
        batch: &Batch,
        x: &Stream,
        activations: Activations,
        keep: Keep,
        at_once: usize,
        mut seen: impl FnMut(&Chunk, &Trace) -> Result<()>,
    ) -> Result<Self> {
        let new = || x.room().stream();
        let (sums, maxima) = Default::default();
        let keep = Keep { down_in: keep.down_in && x.room().left() >= Kept::bytes(block, batch), ..keep };
        let mut pass = Kept { attn_out: new(), mlp_out: new(), o_in: new(), down_in: new(), rows: 0, sums, maxima };
        for (part, chunks) in batch.chunks.chunks(at_once).enumerate() {
            let traces = each(chunks.len(), at_once, |i| {
                let (c, spans) = (part * at_once + i, &chunks[i].spans);
                let x = x.get(c)?;
                let t = match keep.made {
                    true => block.trace_all(&x, spans)?,
                    false => block.trace(&x, spans, &|x| activations.apply(x))?,
                };
                let inputs = Group::ALL.map(|group| t.input(group));
                let sums = inputs.iter().take(if keep.sums { 4 } else { 0 }).map(|t| column_abs(t));
                let maxima = inputs.iter().take(if keep.maxima { 4 } else { 0 }).map(|t| column_max(t));
                Ok((sums.collect::<Result<Vec<_>>>()?, maxima.collect::<Result<Vec<_>>>()?, t))
            })?;
            for (chunk, (sums, maxima, t)) in chunks.iter().zip(traces) {
                seen(chunk, &t)?;
                pass.rows += chunk.tokens();
                for (sums, part) in pass.sums.iter_mut().zip(sums) {
                    sums.resize(part.len(), 0.0);
                    sums.iter_mut().zip(part).for_each(|(s, p)| *s += p);
                }
                for (maxima, part) in pass.maxima.iter_mut().zip(maxima) {
                    maxima.resize(part.len(), 0.0);
                    maxima.iter_mut().zip(part).for_each(|(m, p)| *m = m.max(p));
                }
                if keep.o_in {
                    pass.o_in.push(t.o_in)?;
                }
                if keep.down_in {
                    pass.down_in.push(t.down_in)?;
                }
                if keep.outputs {
                    pass.attn_out.push(t.attn_out)?;
                    pass.mlp_out.push(t.mlp_out)?;
                }
            }
        }
        Ok(pass)
    }
}

impl<'a> Pass<'a> {
    /// As [`Kept::run`].
    ///
    /// # Errors
    /// As [`Kept::run`].
    pub fn run(
        block: &'a Block,
        batch: &Batch,
        x: &'a Stream,
        activations: Activations,
        keep: Keep,
        at_once: usize,
        seen: impl FnMut(&Chunk, &Trace) -> Result<()>,
    ) -> Result<Self> {
        Ok(Pass { block, x, activations, kept: Kept::run(block, batch, x, activations, keep, at_once, seen)? })
    }

    /// What was kept of `block`'s pass over `x` before, in full precision.
    pub fn of(block: &'a Block, x: &'a Stream, kept: Kept) -> Self {
        Pass { block, x, activations: Activations::Float, kept }
    }

    /// Mean |x| per channel of what enters `group`, over all tokens, padding and prompt included.
    pub fn mean(&self, group: Group) -> Vec<f32> {
        self.kept.sums[group as usize].iter().map(|s| (s / self.kept.rows as f64) as f32).collect()
    }

    /// Largest |x| per channel of what enters `group`.
    pub fn maxima(&self, group: Group) -> &[f32] {
        &self.kept.maxima[group as usize]
    }

    /// That from which [`Pass::input`] makes what enters `group`, at some rows of a chunk.
    pub fn source(&self, group: Group, chunk: usize, rows: &[u32]) -> Result<Tensor> {
        match group {
            Group::Qkv => self.x.rows(chunk, rows),
            Group::O => self.kept.o_in.rows(chunk, rows),
            Group::Down if !self.kept.down_in.is_empty() => self.kept.down_in.rows(chunk, rows),
            Group::GateUp | Group::Down => {
                self.block.after_attention(&self.x.rows(chunk, rows)?, &self.kept.attn_out.rows(chunk, rows)?)
            }
        }
    }

    /// What enters the linears of `group`, from rows of [`Pass::source`].
    pub fn input(&self, group: Group, source: &Tensor) -> Result<Tensor> {
        let run = |name: LinearName, x: &Tensor| self.block.linear(name).forward(x);
        match group {
            Group::Qkv => self.block.attn_norm(source),
            Group::O => Ok(source.clone()),
            Group::Down if !self.kept.down_in.is_empty() => Ok(source.clone()),
            Group::GateUp => self.block.mlp_norm(source),
            Group::Down => {
                let m = self.activations.apply(&self.block.mlp_norm(source)?)?;
                self.block.activate(run(LinearName::Gate, &m)?, &run(LinearName::Up, &m)?)
            }
        }
    }

    /// The outputs of o and of down.
    pub fn outputs(self) -> (Stream, Stream) {
        (self.kept.attn_out, self.kept.mlp_out)
    }

    /// The output that errors of `group` are measured on.
    pub fn target(&self, group: Group, chunk: usize, rows: &[u32]) -> Result<Tensor> {
        match group {
            Group::Qkv | Group::O => self.kept.attn_out.rows(chunk, rows),
            Group::GateUp | Group::Down => self.kept.mlp_out.rows(chunk, rows),
        }
    }
}
