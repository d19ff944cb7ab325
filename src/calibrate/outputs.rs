//! What errors at the outputs of `o` and `down` cost the model's answers, for the feedback over rows
//! ([`super::feedback::round_rows`]).
//!
//! To second order, an error e at a linear's output costs `e^T F e / 2` of KL divergence, F the Fisher information there:
//! the mean of g g^T with g the gradient of the log-probability of tokens drawn from the model's own distribution
//! (Kronecker-factored by tokens as in YAQA, arXiv 2505.22988, sketch A). Only its strongest directions matter to the
//! feedback, so a few samples are enough.
use super::batch::{Batch, Chunk, Kind};
use super::budget::trim;
use super::mbq::Group;
use super::model::TextModel;
use super::products::add_square;
use super::sensitivity;
use super::stream::Stream;
use crate::Error;
use crate::events::{Event, Observer};
use crate::random::Rng;
use crate::text::head::Head;
use crate::text::ops::{Fast, each};
use candle_core::{Result, Tensor};

/// Samples that gradients are taken of, at most (their chunks whole).
const SAMPLES: usize = 32;

/// Sums over tokens of g g^T at the outputs of every block's `o` and `down`, `[hidden, hidden]`, f32; their upper triangles,
/// which [`super::feedback::factor`] reads.
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
            // Directions of so few tokens are noisier than TF32's rounding.
            let _fast = Fast::on(&block.norm1);
            let (mut down, mut o) = (None, None);
            for from in (0..chunks.len()).step_by(at_once) {
                let count = at_once.min(chunks.len() - from);
                let x = |i: usize| xs.as_ref().unwrap_or(inputs).get(i);
                let pairs: Vec<_> =
                    (from..from + count).map(|i| Ok((x(i)?, gradients.take(i)?))).collect::<Result<_>>()?;
                let back = each(count, at_once, |i| block.backward(&pairs[i].0, &chunks[from + i].spans, &pairs[i].1))?;
                for (i, back) in back.into_iter().enumerate() {
                    add_square(&mut down, &back.mlp_out)?;
                    add_square(&mut o, &back.attn_out)?;
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
        let _fast = Fast::on(&block.norm1);
        stored.push(sensitivity::forward(&block, layer, chunks, (stored.last().unwrap_or(inputs), 0), at_once)?);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::batch::{Sample, pack};
    use crate::calibrate::stream::Room;
    use crate::events::Silent;
    use crate::front::FoundModel;
    use crate::hub::Hub;
    use crate::text::LinearName;
    use candle_core::Device;

    /// Log-probability of `drawn` after the first token of `x`, `name`'s output in block `layer` moved by `by`.
    fn log_p(model: &TextModel, x: &Tensor, (layer, name): (usize, LinearName), by: &Tensor, drawn: u32) -> f64 {
        let span = [crate::text::Span::new(0, 2)];
        let mut x = x.clone();
        for at in 0..model.text.num_layers {
            let mut block = model.block(at).unwrap();
            if at == layer {
                let linear = block.linear_mut(name);
                assert!(linear.bias.is_none());
                linear.bias = Some(by.clone());
            }
            x = block.forward(&x, &span).unwrap();
        }
        let row = model.head().unwrap().log_probabilities(&x.narrow(0, 0, 1).unwrap()).unwrap();
        f64::from(row.flatten_all().unwrap().to_vec1::<f32>().unwrap()[drawn as usize])
    }

    /// Samples of two tokens: only the first one's outputs matter, so that F is the sum over samples of a gradient with
    /// itself, and differences of log-probabilities give that gradient.
    #[test]
    fn moments_are_those_of_differences() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/model");
        let found = FoundModel::find(demo, None, &Hub::from_env(true), &Silent).unwrap();
        let pair = found.pair().unwrap();
        let model = TextModel::new(&pair.text, 64, Device::Cpu).unwrap();
        let (hidden, layers) = (model.text.hidden_size, model.text.num_layers);
        let mut dice = Rng::new(5);
        let mut random = |n: usize| (0..n).map(|_| dice.uniform()).collect::<Vec<f32>>();
        let inputs: Vec<Tensor> =
            (0..3).map(|_| Tensor::from_vec(random(2 * hidden), (2, hidden), &Device::Cpu).unwrap()).collect();
        let along = Tensor::from_vec(random(hidden), hidden, &Device::Cpu).unwrap();
        let samples: Vec<Sample> =
            inputs.iter().map(|x| Sample::new(x.clone(), vec![Kind::Other, Kind::Answer], vec![0, 0])).collect();
        let (batch, x) = pack(&samples, 2, &Room::new(&Device::Cpu, usize::MAX, &std::env::temp_dir())).unwrap();
        let moments = OutputMoments::gather(&model, &batch, &x, 2, &Silent).unwrap();

        let last = forward(&model, &batch.chunks, &x, 2, &Silent).unwrap().pop().unwrap();
        let mut dice = Rng::new(0);
        let head = model.head().unwrap();
        let drawn: Vec<u32> =
            (0..3).map(|i| head.draw(&last.get(i).unwrap().narrow(0, 0, 1).unwrap(), &mut dice).unwrap()[0]).collect();
        for layer in [0, layers - 1] {
            for (group, name) in [(Group::O, LinearName::O), (Group::Down, LinearName::Down)] {
                let by = |step: f64| (&along * step).unwrap();
                let gradient = |i: usize| {
                    let at = |step: f64| log_p(&model, &inputs[i], (layer, name), &by(step), drawn[i]);
                    (at(STEP) - at(-STEP)) / (2.0 * STEP)
                };
                const STEP: f64 = 1e-2;
                let want: f64 = (0..3).map(|i| gradient(i).powi(2)).sum();
                let f = moments.get(layer, group).unwrap().unwrap();
                let (f, d): (Vec<Vec<f32>>, Vec<f32>) = (f.to_vec2().unwrap(), along.to_vec1().unwrap());
                // Only the upper triangle is there.
                let term = |i: usize, j: usize| f64::from(f[i.min(j)][i.max(j)]) * f64::from(d[i]) * f64::from(d[j]);
                let got: f64 = (0..hidden).map(|i| (0..hidden).map(|j| term(i, j)).sum::<f64>()).sum();
                // Log-probabilities in f32 are off by 1e-6, their differences by 2e-4 of a gradient of 1.
                assert!(want > 1e-4 && (got / want - 1.0).abs() < 1e-2, "{layer} {name:?}: {got}, {want}");
            }
        }
        assert!(moments.get(0, Group::Qkv).unwrap().is_none());
    }

    /// Drawn tokens come as often as their probabilities say.
    #[test]
    fn tokens_are_drawn_from_the_distribution() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/model");
        let found = FoundModel::find(demo, None, &Hub::from_env(true), &Silent).unwrap();
        let pair = found.pair().unwrap();
        let model = TextModel::new(&pair.text, 64, Device::Cpu).unwrap();
        let (head, hidden) = (model.head().unwrap(), model.text.hidden_size);
        let mut dice = Rng::new(9);
        let x: Vec<f32> = (0..hidden).map(|_| dice.uniform()).collect();
        let x = Tensor::from_vec(x, (1, hidden), &Device::Cpu).unwrap();
        let p: Vec<f32> = head.log_probabilities(&x).unwrap().exp().unwrap().flatten_all().unwrap().to_vec1().unwrap();
        const DRAWS: usize = 2000;
        let drawn = head.draw(&x.broadcast_as((DRAWS, hidden)).unwrap().contiguous().unwrap(), &mut dice).unwrap();
        // Eighths of the vocabulary.
        let eighth = p.len().div_ceil(8);
        for (i, p) in p.chunks(eighth).enumerate() {
            let count = drawn.iter().filter(|&&d| d as usize / eighth == i).count() as f64;
            let p = f64::from(p.iter().sum::<f32>());
            let (mean, spread) = (DRAWS as f64 * p, (DRAWS as f64 * p * (1.0 - p)).sqrt());
            // Four standard deviations, of fixed dice.
            assert!((count - mean).abs() < 4.0 * spread, "{i}: {count} of {mean}");
        }
        assert!(p.chunks(eighth).all(|p| p.iter().sum::<f32>() < 0.9), "all in one");
    }
}
