//! How much the loss minds changes at vision and at answer tokens, per block: mean |gradient| at the outputs of
//! o_proj and down_proj (the paper's eq. 6), from which the balance ratios follow.
use super::CalibrateError;
use super::batch::{Batch, Chunk, Kind};
use super::budget::trim;
use super::grid::Activations;
use super::pass::{Keep, Kept};
use super::search::Search;
use super::stream::Stream;
use crate::events::{Event, Observer};
use crate::text::head::Head;
use crate::text::ops::{each, row_abs};
use crate::text::{Block, LinearName, Made, Trace};
use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Mean |gradient| over tokens and channels, then over samples that have such tokens; 0 where none has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    pub vision: f64,
    pub answer: f64,
}

/// Of one block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct BlockSensitivity {
    /// At o_proj's output.
    pub attn: Sensitivity,
    /// At down_proj's output.
    pub mlp: Sensitivity,
}

/// Gradient of the mean over samples of each sample's loss, at the last block's output `y`; adds the losses.
fn head_gradient(head: &Head, chunk: &Chunk, y: &Tensor, samples: usize, loss: &mut f64) -> Result<Tensor> {
    let mut parts = Vec::new();
    for span in &chunk.spans {
        // The token before an answer token predicts it.
        let (rows, targets): (Vec<u32>, Vec<u32>) = (span.start + 1..span.start + span.len)
            .filter(|&i| chunk.kinds[i] == Kind::Answer)
            .map(|i| ((i - 1 - span.start) as u32, chunk.ids[i]))
            .unzip();
        let rows = Tensor::new(rows, y.device())?;
        let x = y.narrow(0, span.start, span.len)?;
        let (l, g) = head.loss(&x.index_select(&rows, 0)?, &targets, 1.0 / samples as f64)?;
        *loss += l / samples as f64;
        parts.push(x.zeros_like()?.index_add(&rows, &g, 0)?);
    }
    Tensor::cat(&parts, 0)
}

/// Per sample, mean |g| over one kind's tokens and the channels, from each token's sum; added to `sum`.
fn add_means(rows: &[f64], channels: usize, chunk: &Chunk, sum: &mut Sensitivity) {
    for span in &chunk.spans {
        let mean = |kind: Kind| {
            let of_kind = (span.start..span.start + span.len).filter(|&i| chunk.kinds[i] == kind).map(|i| rows[i]);
            let (n, total) = of_kind.fold((0usize, 0.0), |(n, t), v| (n + 1, t + v));
            total / (n.max(1) * channels) as f64
        };
        sum.vision += mean(Kind::Vision);
        sum.answer += mean(Kind::Answer);
    }
}

/// Tokens whose block inputs are held at least, in the file if need be: the blocks are loaded anew for each part.
const PART: usize = if cfg!(test) { 600 } else { 8192 };

/// Sensitivities of every block, and the calibration loss.
///
/// The inputs of every block are held for as many chunks at a time as there is room for; the blocks are loaded again
/// for each such part, forward and backward, `at_once` chunks at a time. What a search needs of the first blocks' passes
/// is kept `ahead`, in so many bytes at most, where there is but one part, and of as many blocks what the way back
/// would make again.
///
/// # Errors
/// A block cannot be loaded, or its gradient is zero at the answer tokens or not finite.
pub fn sensitivities(
    model: &super::TextModel,
    batch: &Batch,
    inputs: &Stream,
    at_once: usize,
    ahead: Option<(Search, usize)>,
    observer: &dyn Observer,
) -> std::result::Result<(Vec<BlockSensitivity>, f64, Vec<Kept>), crate::Error> {
    let layers = model.text.num_layers;
    let parts = parts(model, batch, inputs);
    let total = (2 * layers * parts.len()) as u64;
    observer.event(Event::PhaseStart { name: "sensitivity".into(), total, unit: "blocks" });
    let ahead = ahead.filter(|_| parts.len() == 1);
    let sums = vec![BlockSensitivity::default(); layers];
    let mut all =
        WayBack { model, batch, inputs, at_once, ahead, observer, sums, loss: 0.0, kept: Vec::new(), made: Vec::new() };
    for part in parts {
        trim(&model.device)?;
        let mut stored = all.forward(&part)?;
        let Some(mut gradients) = stored.pop() else { continue };
        let head = model.head()?;
        for (i, chunk) in batch.chunks[part.clone()].iter().enumerate() {
            let y = gradients.take(i)?;
            gradients.set(i, head_gradient(&head, chunk, &y, batch.samples, &mut all.loss)?)?;
        }
        drop(head);
        all.backward(&part, stored, gradients)?;
    }
    observer.event(Event::PhaseEnd);
    let WayBack { mut sums, loss, kept, .. } = all;
    for (layer, sum) in sums.iter_mut().enumerate() {
        for part in [&mut sum.attn, &mut sum.mlp] {
            part.vision /= batch.pictures().max(1) as f64;
            part.answer /= batch.samples as f64;
            if !(part.answer > 0.0 && part.answer.is_finite() && part.vision.is_finite()) {
                return Err(CalibrateError::NoGradient { layer, vision: part.vision, answer: part.answer }.into());
            }
        }
    }
    Ok((sums, loss, kept))
}

/// The outputs of `block` for `chunks`, whose inputs are in `x` from its entry `first` on, `at_once` of them side by side.
///
/// # Errors
/// An input cannot be read back, or an output not be kept.
pub(super) fn forward(
    block: &Block,
    layer: usize,
    chunks: &[Chunk],
    (x, first): (&Stream, usize),
    at_once: usize,
) -> Result<Stream> {
    let mut next = x.room().stream();
    for from in (0..chunks.len()).step_by(at_once) {
        let outputs = each(at_once.min(chunks.len() - from), at_once, |i| {
            let chunk = &chunks[from + i];
            chunk.inject(layer, block.forward(&x.get(first + from + i)?, &chunk.spans)?)
        })?;
        outputs.into_iter().try_for_each(|y| next.push(y))?;
    }
    Ok(next)
}

/// Chunks whose inputs of all blocks there is room for at a time.
fn parts(model: &super::TextModel, batch: &Batch, inputs: &Stream) -> Vec<Range<usize>> {
    // Between two blocks there are a gradient and a next input as well.
    let bytes_per_token = (model.text.num_layers + 1) * model.text.hidden_size * 4;
    let part_tokens = (inputs.room().left() / bytes_per_token).max(PART);
    let mut parts = Vec::new();
    let mut start = 0;
    while start < inputs.len() {
        let (mut end, mut tokens) = (start, 0);
        while end < inputs.len() && (end == start || tokens + batch.chunks[end].tokens() <= part_tokens) {
            tokens += batch.chunks[end].tokens();
            end += 1;
        }
        parts.push(start..end);
        start = end;
    }
    parts
}

/// The way there and back through all blocks.
struct WayBack<'g> {
    model: &'g super::TextModel<'g>,
    batch: &'g Batch,
    inputs: &'g Stream,
    at_once: usize,
    ahead: Option<(Search<'g>, usize)>,
    observer: &'g dyn Observer,
    sums: Vec<BlockSensitivity>,
    loss: f64,
    /// Of the first blocks, for the search; and what the way back would make again.
    kept: Vec<Kept>,
    made: Vec<[Stream; 5]>,
}

impl WayBack<'_> {
    /// The inputs of each block but the first, then the last one's outputs, of the chunks `part`.
    fn forward(&mut self, part: &Range<usize>) -> std::result::Result<Vec<Stream>, crate::Error> {
        let mut stored: Vec<Stream> = Vec::new();
        for layer in 0..self.model.text.num_layers {
            let block = self.model.block(layer)?;
            let next = match self.ahead.filter(|(_, most)| self.fits(&block, layer, *most)) {
                Some((search, _)) => self.forward_kept(&block, layer, search, stored.last().unwrap_or(self.inputs))?,
                None => self.forward_plain(&block, layer, part, stored.last())?,
            };
            stored.push(next);
            self.observer.event(Event::Advance { n: 1, detail: format!("block {layer} forward") });
        }
        Ok(stored)
    }

    /// Bytes of what the blocks from `layer` on will store.
    fn later(&self, layer: usize) -> usize {
        let text = &self.model.text;
        (text.num_layers + 1 - layer) * 4 * text.hidden_size * self.batch.tokens
    }

    /// Whether there is room to keep what a search needs of the block's pass.
    fn fits(&self, block: &Block, layer: usize, most: usize) -> bool {
        let each = Kept::bytes(block, self.batch);
        let room = self.inputs.room().left() >= each + self.later(layer);
        self.kept.len() == layer && (layer + 1) * each <= most && room
    }

    fn forward_kept(&mut self, block: &Block, layer: usize, search: Search, x: &Stream) -> Result<Stream> {
        let room = self.inputs.room();
        let mut next = room.stream();
        let wide = [LinearName::Q, LinearName::K, LinearName::V, LinearName::Gate, LinearName::Up]
            .map(|n| block.linear(n).weight.elem_count());
        let wide = 4 * self.batch.tokens * wide.iter().sum::<usize>() / self.model.text.hidden_size;
        let needs = Kept::bytes(block, self.batch) + self.later(layer) + wide;
        let all = self.made.len() == layer && room.left() >= needs;
        let mut of_layer = [(); 5].map(|()| room.stream());
        let push = |chunk: &Chunk, t: &Trace| {
            if let Some(Made { q, k, v, gate, up }) = &t.made {
                let each = of_layer.iter_mut().zip([q, k, v, gate, up]);
                each.into_iter().try_for_each(|(stream, t)| stream.push(t.clone()))?;
            }
            next.push(chunk.inject(layer, block.output(t)?)?)
        };
        let keep = Keep { made: all, ..search.keep(block)? };
        self.kept.push(Kept::run(block, self.batch, x, Activations::Float, keep, self.at_once, push)?);
        if all {
            self.made.push(of_layer);
        }
        Ok(next)
    }

    fn forward_plain(&self, block: &Block, layer: usize, part: &Range<usize>, last: Option<&Stream>) -> Result<Stream> {
        let (x, first) = last.map_or((self.inputs, part.start), |last| (last, 0));
        forward(block, layer, &self.batch.chunks[part.clone()], (x, first), self.at_once)
    }

    /// Carries the gradients at the last block's outputs back through all blocks, and adds up what they are on the way.
    fn backward(
        &mut self,
        part: &Range<usize>,
        mut stored: Vec<Stream>,
        mut gradients: Stream,
    ) -> std::result::Result<(), crate::Error> {
        let chunks = &self.batch.chunks[part.clone()];
        for layer in (0..self.model.text.num_layers).rev() {
            let block = self.model.block(layer)?;
            let mut xs = stored.pop();
            let mut made = if self.made.len() > layer { self.made.pop() } else { None };
            for from in (0..chunks.len()).step_by(self.at_once) {
                let mut pairs = Vec::new();
                for i in from..chunks.len().min(from + self.at_once) {
                    let x = match &mut xs {
                        Some(xs) => xs.take(i)?,
                        None => self.inputs.get(part.start + i)?,
                    };
                    let made = match (&mut made, self.kept.get(layer)) {
                        (Some(made), Some(kept)) => Some((kept.attn_out(i)?, taken(made, i)?)),
                        _ => None,
                    };
                    pairs.push((x, gradients.take(i)?, made));
                }
                let back = each(pairs.len(), self.at_once, |i| {
                    let ((x, g, made), spans) = (&pairs[i], &chunks[from + i].spans);
                    let back = match made {
                        Some((attn_out, made)) => block.backward_from(x, attn_out, made, spans, g)?,
                        None => block.backward(x, spans, g)?,
                    };
                    Ok((row_abs(&back.mlp_out)?, row_abs(&back.attn_out)?, back.input))
                })?;
                for (i, (mlp, attn, input)) in back.into_iter().enumerate() {
                    let (chunk, channels) = (&chunks[from + i], input.dim(1)?);
                    add_means(&mlp, channels, chunk, &mut self.sums[layer].mlp);
                    add_means(&attn, channels, chunk, &mut self.sums[layer].attn);
                    gradients.set(from + i, input)?;
                }
            }
            self.observer.event(Event::Advance { n: 1, detail: format!("block {layer} backward") });
        }
        Ok(())
    }
}

/// What a chunk's pass has made.
fn taken([q, k, v, gate, up]: &mut [Stream; 5], i: usize) -> Result<Made> {
    Ok(Made { q: q.take(i)?, k: k.take(i)?, v: v.take(i)?, gate: gate.take(i)?, up: up.take(i)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Span;

    #[test]
    fn a_sample_without_a_picture_adds_nothing_to_vision() {
        let kinds = vec![Kind::Vision, Kind::Answer, Kind::Answer];
        let chunk = Chunk::new(vec![Span::new(0, 2), Span::new(2, 1)], kinds, vec![0; 3]);
        let mut sum = Sensitivity::default();
        add_means(&[4.0, 4.0, 10.0], 2, &chunk, &mut sum);
        assert_eq!(sum, Sensitivity { vision: 2.0, answer: 7.0 });
    }
}
