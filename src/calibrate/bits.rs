//! Bits where they pay: which parts of the decoder get a wider type, for a given mean of bits per weight.
//!
//! A part is the linears with a common input, of one block. Each is rounded alone, once to the narrow and once to the
//! wide type, the rest of the model in full precision, and the divergence of the answers' distributions from the
//! model's own is measured. Parts are widened in the order of divergence saved per bit, as far as the bits go.
use super::batch::{Chunk, Kind};
use super::compensate::nearest;
use super::grid::Activations;
use super::mbq::Group;
use super::run::advance;
use super::stream::Stream;
use super::{CalibrateError, TextModel};
use crate::Error;
use crate::events::{Event, Observer};
use crate::ggml::GgmlType;
use crate::text::Block;
use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Linears with a common input, and what rounding them alone does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlockPart {
    pub layer: usize,
    pub group: Group,
    pub weights: usize,
    /// Mean divergence over the answers' tokens in nats, rounded to the narrow and to the wide type.
    pub kl: [f64; 2],
}

impl BlockPart {
    /// The part's linears, by tensor name.
    pub fn linears(&self) -> impl Iterator<Item = String> + '_ {
        self.group.linears().iter().map(|name| name.weight(self.layer))
    }
}

/// Where the answers' tokens are predicted.
fn answers(chunk: &Chunk) -> Vec<u32> {
    let starts = |i: usize| chunk.spans.iter().any(|s| s.start == i);
    let rows = (1..chunk.tokens()).filter(|&i| chunk.kinds[i] == Kind::Answer && !starts(i));
    rows.map(|i| i as u32 - 1).collect()
}

/// Sum over rows of the divergence of log-probabilities `q` from `p`.
fn divergence(p: &Tensor, q: &Tensor) -> Result<f64> {
    let kl: Vec<f32> = (p.exp()? * (p - q)?)?.sum(1)?.to_vec1()?;
    Ok(kl.into_iter().map(f64::from).sum())
}

/// `block` with one part rounded to `ty`.
fn rounded(block: &Block, group: Group, ty: GgmlType) -> Result<Block> {
    let mut out = block.clone();
    for &name in group.linears() {
        out.linear_mut(name).weight = nearest(&block.linear(name).weight, ty)?;
    }
    Ok(out)
}

/// Rounds every part alone, on the first `chunks` of `inputs`. All of them go through the model together, so that each block
/// is loaded once; what waits is kept where `inputs` keeps its chunks.
///
/// # Errors
/// A block cannot be loaded; a divergence is not finite.
pub fn measure(
    model: &TextModel,
    chunks: &[Chunk],
    inputs: &Stream,
    types: [GgmlType; 2],
    observer: &dyn Observer,
) -> std::result::Result<Vec<BlockPart>, Error> {
    let layers = model.text.num_layers;
    observer.event(Event::PhaseStart { name: "parts".into(), total: layers as u64, unit: "blocks" });
    let positions: usize = chunks.iter().map(|c| answers(c).len()).sum();
    let mut parts = Vec::new();
    let mut exact = inputs.room().stream();
    (0..chunks.len()).try_for_each(|i| exact.push(inputs.get(i)?))?;
    // Of each part so far, its outputs by type.
    let mut streams: Vec<[Stream; 2]> = Vec::new();
    for layer in 0..layers {
        let block = model.block(layer)?;
        let step = |block: &Block, x: &mut Stream| advance(block, layer, chunks, x, Activations::Float);
        streams.iter_mut().flatten().try_for_each(|x| step(&block, x))?;
        for group in Group::ALL {
            let run = |ty| {
                let mut x = exact.copy()?;
                step(&rounded(&block, group, ty)?, &mut x).map(|()| x)
            };
            streams.push([run(types[0])?, run(types[1])?]);
            let weights = group.linears().iter().map(|&n| block.linear(n).weight.elem_count()).sum();
            parts.push(BlockPart { layer, group, weights, kl: [0.0; 2] });
        }
        step(&block, &mut exact)?;
        observer.event(Event::Advance { n: 1, detail: format!("block {layer}") });
    }
    let head = model.head()?;
    for (i, chunk) in chunks.iter().enumerate() {
        let rows = Tensor::new(answers(chunk), &model.device)?;
        let after = |x: &Stream| head.log_probabilities(&x.get(i)?.index_select(&rows, 0)?);
        let p = after(&exact)?;
        for (part, stream) in parts.iter_mut().zip(&streams) {
            for (kl, y) in part.kl.iter_mut().zip(stream) {
                *kl += divergence(&p, &after(y)?)? / positions as f64;
            }
        }
    }
    if let Some(part) = parts.iter().find(|p| p.kl.iter().any(|kl| !kl.is_finite())) {
        return Err(CalibrateError::Divergence { layer: part.layer }.into());
    }
    observer.event(Event::PhaseEnd);
    Ok(parts)
}

/// The parts to be widened from `bits[0]` to `bits[1]` bits per weight, so that all parts together have `mean` at most.
///
/// # Errors
/// `mean` is below `bits[0]`.
pub fn widened(parts: &[BlockPart], bits: [f64; 2], mean: f64) -> std::result::Result<Vec<usize>, CalibrateError> {
    if mean < bits[0] {
        return Err(CalibrateError::Budget { mean, least: bits[0] });
    }
    let total: usize = parts.iter().map(|p| p.weights).sum();
    let mut left = (mean - bits[0]) * total as f64;
    let saved = |p: &BlockPart| (p.kl[0] - p.kl[1]) / p.weights as f64;
    let mut order: Vec<usize> = (0..parts.len()).filter(|&i| saved(&parts[i]) > 0.0).collect();
    order.sort_by(|&a, &b| saved(&parts[b]).total_cmp(&saved(&parts[a])));
    order.retain(|&i| {
        let cost = (bits[1] - bits[0]) * parts[i].weights as f64;
        // What does not fit is passed over: a smaller part further on may.
        let fits = cost <= left;
        left -= if fits { cost } else { 0.0 };
        fits
    });
    order.sort_unstable();
    Ok(order)
}

/// The widened parts' linears with their type.
pub fn types(parts: &[BlockPart], widened: &[usize], ty: GgmlType) -> BTreeMap<String, GgmlType> {
    widened.iter().flat_map(|&i| parts[i].linears()).map(|name| (name, ty)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(weights: usize, kl: [f64; 2]) -> BlockPart {
        BlockPart { layer: 0, group: Group::Down, weights, kl }
    }

    #[test]
    fn bits_go_where_most_is_saved_per_bit() {
        // Saved per weight: .010, .016, .040, none.
        let parts = [part(100, [1.0, 0.0]), part(50, [0.9, 0.1]), part(10, [0.5, 0.1]), part(40, [0.2, 0.2])];
        let take = |mean: f64| widened(&parts, [3.25, 4.5], mean).unwrap();
        assert!(take(3.25).is_empty());
        // 200 weights: a mean of 3.25 + 1.25 * 60/200 pays for the two best.
        assert_eq!(take(3.25 + 1.25 * 60.0 / 200.0), [1, 2]);
        // One weight short of the second: the first of all does not fit either.
        assert_eq!(take(3.25 + 1.25 * 59.0 / 200.0), [2]);
        // However many bits there are, none go where nothing is saved.
        assert_eq!(take(8.0), [0, 1, 2]);
        assert!(matches!(widened(&parts, [3.25, 4.5], 3.0), Err(CalibrateError::Budget { .. })));
    }
}
