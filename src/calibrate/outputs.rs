//! What errors at the outputs of `o` and `down` cost the model's answers, for the feedback over rows
//! ([`super::feedback::round_rows`]).
//!
//! To second order, an error e at a linear's output costs `e^T F e / 2` of KL divergence, F the Fisher information there:
//! the mean of g g^T with g the gradient of the log-probability of tokens drawn from the model's own distribution
//! (Kronecker-factored by tokens as in YAQA, arXiv 2505.22988, sketch A). Only its strongest directions matter to the
//! feedback, so a few samples are enough.
use super::batch::{Batch, Chunk, Kind};
use super::budget::trim;
use super::compensate::add;
use super::mbq::Group;
use super::model::TextModel;
use super::stream::Stream;
use crate::Error;
use crate::events::{Event, Observer};
use crate::random::Rng;
use crate::text::head::Head;
use crate::text::ops::each;
use candle_core::{Result, Tensor};

/// Samples that gradients are taken of, at most (their chunks whole).
const SAMPLES: usize = 32;

/// Sums over tokens of g g^T at the outputs of every block's `o` and `down`, `[hidden, hidden]`, f32.
pub struct OutputMoments {
    /// `down`, then `o`, of the last block, of the one before, and so on.
    moments: Stream,
    layers: usize,
}

impl OutputMoments {
    /// Those of `group`'s output in block `layer`; none for groups that do not write to the residual stream.
    ///
    /// # Errors
    /// They cannot be read back.
    pub fn get(&self, layer: usize, group: Group) -> Result<Option<Tensor>> {
        let from_last = 2 * (self.layers - 1 - layer);
        match group {
            Group::Down => self.moments.get(from_last).map(Some),
            Group::O => self.moments.get(from_last + 1).map(Some),
            _ => Ok(None),
        }
    }

    /// Takes the gradients of the first samples of `batch`, whose embeddings are `inputs`: forward through all blocks and
    /// back, one block's weights at a time, `at_once` chunks side by side.
    ///
    /// # Errors
    /// A block cannot be loaded, or a gradient is not finite.
    pub fn gather(
        model: &TextModel,
        batch: &Batch,
        inputs: &Stream,
        at_once: usize,
        observer: &dyn Observer,
    ) -> std::result::Result<Self, Error> {
        let layers = model.text.num_layers;
        observer.event(Event::PhaseStart { name: "outputs".into(), total: 2 * layers as u64, unit: "blocks" });
        let chunks = first(batch);
        let mut stored = forward(model, chunks, inputs, at_once, observer)?;
        let mut gradients = inputs.room().stream();
        let head = model.head()?;
        let mut dice = Rng::new(0);
        if let Some(outputs) = stored.pop() {
            for (i, chunk) in chunks.iter().enumerate() {
                gradients.push(drawn_gradient(&head, chunk, &outputs.get(i)?, &mut dice)?)?;
            }
        }
        drop(head);
        trim(&model.device)?;
        let mut moments = inputs.room().stream();
        for layer in (0..layers).rev() {
            let block = model.block(layer)?;
            let xs = stored.pop();
            let (mut down, mut o) = (None, None);
            for from in (0..chunks.len()).step_by(at_once) {
                let count = at_once.min(chunks.len() - from);
                let x = |i: usize| xs.as_ref().unwrap_or(inputs).get(i);
                let pairs: Vec<_> =
                    (from..from + count).map(|i| Ok((x(i)?, gradients.take(i)?))).collect::<Result<_>>()?;
                let back = each(count, at_once, |i| {
                    block.backward(&pairs[i].0, &chunks[from + i].spans, &pairs[i].1)
                })?;
                for (i, back) in back.into_iter().enumerate() {
                    add(&mut down, &back.mlp_out, &back.mlp_out)?;
                    add(&mut o, &back.attn_out, &back.attn_out)?;
                    gradients.set(from + i, back.input)?;
                }
            }
            down.into_iter().chain(o).try_for_each(|sum| moments.push(sum))?;
            observer.event(Event::Advance { n: 1, detail: format!("block {layer} backward") });
        }
        observer.event(Event::PhaseEnd);
        Ok(OutputMoments { moments, layers })
    }
}

/// The chunks of the first [`SAMPLES`] samples.
fn first(batch: &Batch) -> &[Chunk] {
    let mut samples = 0;
    let enough = batch.chunks.iter().position(|chunk| {
        samples += chunk.spans.len();
        samples >= SAMPLES
    });
    &batch.chunks[..enough.map_or(batch.chunks.len(), |last| last + 1)]
}

/// The inputs of every block but the first, then the last one's outputs.
fn forward(
    model: &TextModel,
    chunks: &[Chunk],
    inputs: &Stream,
    at_once: usize,
    observer: &dyn Observer,
) -> std::result::Result<Vec<Stream>, Error> {
    let mut stored: Vec<Stream> = Vec::new();
    for layer in 0..model.text.num_layers {
        let block = model.block(layer)?;
        let mut next = inputs.room().stream();
        for from in (0..chunks.len()).step_by(at_once) {
            let outputs = each(at_once.min(chunks.len() - from), at_once, |i| {
                let x = stored.last().unwrap_or(inputs).get(from + i)?;
                chunks[from + i].inject(layer, block.forward(&x, &chunks[from + i].spans)?)
            })?;
            outputs.into_iter().try_for_each(|y| next.push(y))?;
        }
        stored.push(next);
        observer.event(Event::Advance { n: 1, detail: format!("block {layer} forward") });
    }
    Ok(stored)
}

/// Gradient at the last block's output `y` of the summed cross-entropy of drawn tokens, where the chunk has answers.
fn drawn_gradient(head: &Head, chunk: &Chunk, y: &Tensor, dice: &mut Rng) -> Result<Tensor> {
    // The token before an answer token predicts it.
    let answers = chunk.spans.iter().flat_map(|span| span.start + 1..span.start + span.len);
    let rows: Vec<u32> = answers.filter(|&i| chunk.kinds[i] == Kind::Answer).map(|i| i as u32 - 1).collect();
    if rows.is_empty() {
        return y.zeros_like();
    }
    let k = rows.len();
    let rows = Tensor::new(rows, y.device())?;
    let x = y.index_select(&rows, 0)?;
    let drawn = head.draw(&x, dice)?;
    let (_, g) = head.loss(&x, &drawn, k as f64)?;
    y.zeros_like()?.index_add(&rows, &g, 0)
}
