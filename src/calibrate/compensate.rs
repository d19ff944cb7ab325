//! Error compensation of a whole model: block by block, each linear is rounded with feedback ([`super::feedback`]) for
//! the inputs that the blocks and linears before it give once they are rounded themselves.
//!
//! H of a linear is the sum over tokens of `weight(token) x x^T`. VisionWeight tokens are many, and the model's loss minds
//! errors there less: they weigh `vision` times a token of text. Linears with a common input share H.
use super::CalibrateError;
use super::batch::{Batch, Chunk, Kind};
use super::feedback::{Factor, factor, round, round_rows};
use super::grid::{Activations, Mbq3, WeightGrid};
use super::mbq::Group;
use super::mbq::Ratios;
use super::outputs::OutputMoments;
use super::products::{add, add_square};
use super::store::Store;
use super::stream::{Room, Stream};
use crate::Error;
use crate::ggml::{GgmlType, dequantize, quantize_rows};
use crate::gguf::Encoder;
use crate::quant::levels::{Fit, Format};
use crate::text::ops::{Fast, row_errors};
use crate::text::{Block, LinearName};
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a vision token weighs, beside a text token's 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum VisionWeight {
    Fixed(f64),
    /// The ratio of gradients that MBQ's search has for the linear's part of the block.
    Ratio,
}

/// CompensationSettings of the compensation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CompensationSettings {
    pub vision: VisionWeight,
    /// Share of H's mean diagonal that is added to its diagonal.
    pub damping: f64,
    /// Search a block's levels instead of taking the type's own rule.
    pub search_levels: bool,
    /// How much of the way a linear goes from its own output on rounded inputs towards its full-precision output on
    /// full-precision inputs: 0 to 1.
    pub target: f64,
    /// Whether `o` and `down` also aim at what the residual stream has lost so far, as far as `target` goes.
    pub residual: bool,
    /// Whether the rows of `o` and `down` make up for each other's errors, as far as these cost the model's answers.
    #[serde(default)]
    pub two_sided: bool,
}

impl CompensationSettings {
    /// GPTQ as its paper has it: every token alike, the type's own levels, the layer's own output as the target.
    pub const GPTQ: CompensationSettings = CompensationSettings {
        vision: VisionWeight::Fixed(1.0),
        damping: 0.01,
        search_levels: false,
        target: 0.0,
        residual: false,
        two_sided: false,
    };
}

/// The compensation of one model.
pub struct Compensation {
    pub settings: CompensationSettings,
    /// The decoder linears' types, by tensor name.
    pub types: BTreeMap<String, GgmlType>,
    pub store: Store,
}

impl Encoder for Compensation {
    /// A linear that was compensated has its bytes in the store: that they are gone is an error, not a reason to round
    /// it to nearest.
    fn encode(&self, source: &str, _: &[usize], ty: GgmlType) -> std::result::Result<Option<Vec<u8>>, Error> {
        match self.types.get(source).copied().and_then(Format::of) {
            Some(_) => self.store.get(source, ty).map(Some),
            None => Ok(None),
        }
    }
}

/// What compensation gained at a linear: its weighted squared output error over that of a rounding to nearest, both of 64
/// rows where the type's own quantiser is slow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gain {
    pub linear: String,
    pub gain: f64,
    /// The error over the output's weighted square.
    pub error: f64,
}

/// What compensation found in a block.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Compensated {
    pub linears: Vec<Gain>,
    /// Squared error of the block's output over its square, at vision and at text tokens.
    pub vision: f64,
    pub text: f64,
}

/// Second moments of a group's inputs.
#[derive(Default)]
struct Moments {
    /// Sum of w x x^T, x on the rounded stream: its upper triangle.
    h: Option<Tensor>,
    /// Sum of w lost x^T: of `o` and `down`, what their outputs and the stream that these are added to have lost,
    /// W (x_exact - x) + s_exact - s; of linears with a common input what that has, x_exact - x.
    owed: Option<Tensor>,
}

impl Moments {
    /// What a linear's weights owe to inputs and residual stream being off, to be divided by H.
    fn pull(&self, group: Group, weight: &Tensor) -> Result<Option<Tensor>> {
        let through_weight = |owed: &Tensor| match group.writer() {
            Some(_) => Ok(owed.clone()),
            None => weight.matmul(owed),
        };
        self.owed.as_ref().map(through_weight).transpose()
    }
}

/// Share of its mean diagonal that is added to the diagonal of F, the outputs' Fisher information. Three times as much as is
/// there: of gradients of so few tokens only the strongest directions carry over to other questions
/// (docs/notes/two-sided.md).
const ROW_DAMPING: f64 = 3.0;

/// Tokens whose products are added up at once on an accelerator: a sum of n x n costs as much as a product of 1000 tokens.
pub(super) const GATHER: usize = 4096;

/// The inputs of `o` or `down` on both streams, kept from gathering the moments until the streams move on, where there is
/// room for all of them.
struct KeptInputs {
    keep: bool,
    exact: Stream,
    rounded: Stream,
}

impl KeptInputs {
    fn new(block: &Block, group: Group, batch: &Batch, room: &Room) -> Self {
        let tokens: usize = batch.chunks.iter().map(Chunk::tokens).sum();
        let fit = |name| room.near() > 2 * 4 * block.linear(name).weight.dims()[1] * tokens;
        let keep = group.writer().is_some_and(fit);
        KeptInputs { keep, exact: room.stream(), rounded: room.stream() }
    }

    fn exact(&mut self, input: Tensor) -> Result<()> {
        if self.keep { self.exact.push(input) } else { Ok(()) }
    }

    fn rounded(&mut self, input: Tensor) -> Result<()> {
        if self.keep { self.rounded.push(input) } else { Ok(()) }
    }
}

/// The parts below one another; none are left.
fn joined(parts: &mut Vec<Tensor>) -> Result<Tensor> {
    match &parts[..] {
        [_] => Ok(parts.remove(0)),
        _ => Tensor::cat(&std::mem::take(parts), 0),
    }
}

/// What enters the linears of `group`, before the activations' quantiser, from the residual stream `s` as the block
/// has it there: its input for q, k, v and o, what the attention has been added to for the others.
fn inputs(block: &Block, group: Group, s: &Tensor, chunk: &Chunk, activations: Activations) -> Result<Tensor> {
    let run = |name: LinearName, x: &Tensor| block.linear(name).forward(x);
    match group {
        Group::Qkv => block.attn_norm(s),
        Group::O => {
            let a = activations.apply(&block.attn_norm(s)?)?;
            block.attend(&run(LinearName::Q, &a)?, &run(LinearName::K, &a)?, &run(LinearName::V, &a)?, &chunk.spans)
        }
        Group::GateUp => block.mlp_norm(s),
        Group::Down => {
            let m = activations.apply(&block.mlp_norm(s)?)?;
            block.activate(run(LinearName::Gate, &m)?, &run(LinearName::Up, &m)?)
        }
    }
}

/// The stream once the output of `o` or of `down` is added to it.
fn added(block: &Block, group: Group, layer: usize, chunk: &Chunk, s: &Tensor, output: &Tensor) -> Result<Tensor> {
    match group {
        Group::O => block.after_attention(s, output),
        _ => chunk.inject(layer, block.after_mlp(s, output)?),
    }
}

/// Moves both streams on through `o` or `down`.
fn move_on(
    (exact, rounded): (&Block, &Block),
    name: LinearName,
    layer: usize,
    batch: &Batch,
    activations: Activations,
    (x, x_q): (&mut Stream, &mut Stream),
    mut kept: KeptInputs,
) -> Result<()> {
    let group = Group::of(name);
    let _fast = Fast::on(&exact.norm1);
    for (c, chunk) in batch.chunks.iter().enumerate() {
        let s = x.get(c)?;
        let i = match kept.exact.len() > c {
            true => kept.exact.take(c)?,
            false => inputs(exact, group, &s, chunk, Activations::Float)?,
        };
        x.set(c, added(exact, group, layer, chunk, &s, &exact.linear(name).forward(&i)?)?)?;
        let s = x_q.get(c)?;
        let i = match kept.rounded.len() > c {
            true => kept.rounded.take(c)?,
            false => activations.apply(&inputs(rounded, group, &s, chunk, activations)?)?,
        };
        x_q.set(c, added(rounded, group, layer, chunk, &s, &rounded.linear(name).forward(&i)?)?)?;
    }
    Ok(())
}

impl Compensation {
    /// Rounds the linears of `exact`, whose scales are folded already. `x` holds the chunks' inputs in full precision,
    /// `x_q` as the rounded blocks before give them; both are moved on to the block's outputs. With `done`, the
    /// linears are read from the store instead.
    ///
    /// # Errors
    /// Activations that are not finite; the store cannot be written.
    #[allow(clippy::too_many_arguments)]
    pub fn block(
        &self,
        layer: usize,
        exact: &Block,
        batch: &Batch,
        activations: Activations,
        (ratios, outputs): (Option<Ratios>, Option<&OutputMoments>),
        (x, x_q): (&mut Stream, &mut Stream),
        done: bool,
    ) -> std::result::Result<Compensated, Error> {
        let mut rounded = exact.clone();
        let mut found = Compensated::default();
        for group in Group::ALL {
            let mut kept = KeptInputs::new(exact, group, batch, x.room());
            let mut moments = if done {
                Moments::default()
            } else {
                self.moments(exact, &rounded, group, batch, activations, ratios, (x, x_q), &mut kept)?
            };
            // What is owed is large and no more needed once it met the weights.
            let mut pulls = Vec::new();
            for &name in group.linears() {
                pulls.push(moments.pull(group, &exact.linear(name).weight)?);
            }
            moments.owed = None;
            // Linears with a common input share it.
            let mut shared: Option<Factor> = None;
            let rows = match outputs {
                Some(outputs) if !done => outputs.get(layer, group)?,
                _ => None,
            };
            let rows = rows.map(|f| factor(&f, ROW_DAMPING)).transpose()?;
            for (&name, pull) in group.linears().iter().zip(pulls) {
                let source = name.weight(layer);
                let ty = self.types.get(&source).copied().unwrap_or(GgmlType::F32);
                let weight = match Format::of(ty) {
                    Some(_) if done => self.stored(&source, ty, &exact.linear(name).weight)?,
                    Some(format) => {
                        let gain =
                            self.linear(name, &source, format, exact, &moments, pull, (&mut shared, rows.as_ref()))?;
                        found.linears.push(gain.0);
                        gain.1
                    }
                    None => nearest(&exact.linear(name).weight, ty)?,
                };
                rounded.linear_mut(name).weight = weight;
            }
            if let Some(name) = group.writer() {
                move_on((exact, &rounded), name, layer, batch, activations, (x, x_q), kept)?;
            }
        }
        (found.vision, found.text) = lost(batch, x, x_q)?;
        Ok(found)
    }

    #[allow(clippy::too_many_arguments)]
    fn moments(
        &self,
        exact: &Block,
        rounded: &Block,
        group: Group,
        batch: &Batch,
        activations: Activations,
        ratios: Option<Ratios>,
        (x, x_q): (&Stream, &Stream),
        kept: &mut KeptInputs,
    ) -> std::result::Result<Moments, Error> {
        let vision = match (self.settings.vision, ratios) {
            (VisionWeight::Fixed(weight), _) => weight,
            (VisionWeight::Ratio, Some(ratios)) => group.ratio(ratios),
            (VisionWeight::Ratio, None) => 1.0,
        };
        let _fast = Fast::on(&exact.norm1);
        let gather = if exact.norm1.device().is_cpu() { 0 } else { GATHER };
        // Behind a norm an output cannot make up for what the stream has lost.
        let aims_at_stream = self.settings.residual && exact.post_norms.is_none();
        // What a linear with inputs of its own owes goes through its outputs, which are fewer.
        let alone = group.writer().map(|name| &exact.linear(name).weight);
        let mut moments = Moments::default();
        let (mut weighted, mut owed) = (Vec::new(), Vec::new());
        for (c, chunk) in batch.chunks.iter().enumerate() {
            let x_q = x_q.get(c)?;
            let input = activations.apply(&inputs(rounded, group, &x_q, chunk, activations)?)?;
            // Roots on both sides: H stays symmetric where products are rounded.
            let roots = token_weights(chunk, vision).into_iter().map(f32::sqrt).collect();
            let roots = Tensor::from_vec(roots, (chunk.tokens(), 1), input.device())?;
            let rooted = |t: &Tensor| t.broadcast_mul(&roots);
            if self.settings.target > 0.0 {
                let x = x.get(c)?;
                let exact = inputs(exact, group, &x, chunk, Activations::Float)?;
                let mut lost = (&exact - &input)?;
                if let Some(weight) = alone {
                    lost = lost.matmul(&weight.t()?)?;
                    if aims_at_stream {
                        lost = (lost + (x - x_q)?)?;
                    }
                }
                owed.push(rooted(&lost)?);
                kept.exact(exact)?;
            }
            weighted.push(rooted(&input)?);
            kept.rounded(input)?;
            let rows: usize = weighted.iter().map(|t: &Tensor| t.dims()[0]).sum();
            if rows >= gather || c + 1 == batch.chunks.len() {
                let weighted = joined(&mut weighted)?;
                add_square(&mut moments.h, &weighted)?;
                if !owed.is_empty() {
                    add(&mut moments.owed, &joined(&mut owed)?, &weighted)?;
                }
            }
        }
        Ok(moments)
    }

    /// Rounds one linear and stores it.
    #[allow(clippy::too_many_arguments)]
    fn linear(
        &self,
        name: LinearName,
        source: &str,
        format: Format,
        exact: &Block,
        moments: &Moments,
        pull: Option<Tensor>,
        (shared, rows): (&mut Option<Factor>, Option<&Factor>),
    ) -> std::result::Result<(Gain, Tensor), Error> {
        let (s, weight) = (&self.settings, &exact.linear(name).weight);
        let Some(h) = &moments.h else { return Err(CalibrateError::NoSamples.into()) };
        let factor = match shared {
            Some(factor) => &*factor,
            None => shared.insert(factor(h, s.damping)?),
        };
        let mut target = weight.clone();
        if let Some(pull) = pull {
            target = (target + (factor.solve(&pull)? * s.target)?)?;
        }
        let fit = if s.search_levels { Fit::Search } else { Fit::Plain };
        let coded = match rows {
            Some(rows) => round_rows(&target, factor, rows, format, fit)?,
            None => round(&target, factor, format, fit)?,
        };
        self.store.put(source, format.ty(), &coded.bytes()?)?;
        let rounded = coded.weight(weight.device())?;
        // What is only reported needs no more than TF32's three digits.
        let _fast = Fast::on(weight);
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        let square = factor.error(&target, &target.zeros_like()?)?;
        let lost = factor.error(&target, &rounded)?;
        let gain = match few_rows(format, weight)? {
            None => ratio(lost, factor.error(&target, &nearest(weight, format.ty())?)?),
            Some(rows) => {
                let few = |t: &Tensor| t.index_select(&rows, 0);
                let plain = factor.error(&few(&target)?, &nearest(&few(weight)?, format.ty())?)?;
                ratio(factor.error(&few(&target)?, &few(&rounded)?)?, plain)
            }
        };
        let error = ratio(lost, square);
        Ok((Gain { linear: name.part().into(), gain, error }, rounded))
    }

    /// A finished linear's weights.
    fn stored(&self, source: &str, ty: GgmlType, like: &Tensor) -> std::result::Result<Tensor, Error> {
        let path = self.store.path(source, ty);
        let problem = |problem: String| CalibrateError::File { path: path.clone(), problem };
        let bytes = self.store.get(source, ty)?;
        let values = dequantize(ty, &bytes).map_err(|e| problem(e.to_string()))?;
        if values.len() != like.elem_count() {
            return Err(problem("has another size than the tensor: start without --resume".into()).into());
        }
        Ok(Tensor::from_vec(values, like.shape(), like.device())?)
    }
}

/// The rows that a gain is measured on, evenly spread, where the type's own quantiser is slower than the feedback.
fn few_rows(format: Format, weight: &Tensor) -> Result<Option<Tensor>> {
    const FEW: usize = 64;
    if matches!(format, Format::Simple(_)) {
        return Ok(None);
    }
    let rows = weight.dim(0)?;
    let step = rows.div_ceil(FEW).max(1);
    Ok(Some(Tensor::new((0..rows as u32).step_by(step).collect::<Vec<u32>>(), weight.device())?))
}

/// Weights rounded as the writer rounds them.
pub(super) fn nearest(weight: &Tensor, ty: GgmlType) -> Result<Tensor> {
    if !ty.is_quantized() {
        return Ok(weight.clone());
    }
    if ty == GgmlType::MBQ3 {
        return Mbq3.round_trip(weight);
    }
    let mut values: Vec<f32> = weight.flatten_all()?.to_vec1()?;
    let cols = weight.dim(1)?;
    let round = |rows: &mut [f32]| -> std::result::Result<(), crate::ggml::GgmlError> {
        let bytes = quantize_rows(ty, rows, cols, None)?;
        rows.copy_from_slice(&dequantize(ty, &bytes)?);
        Ok(())
    };
    let done: std::result::Result<(), _> = values.par_chunks_mut(cols * 64).try_for_each(round);
    done.map_err(|e| candle_core::Error::Msg(e.to_string()))?;
    Tensor::from_vec(values, weight.shape(), weight.device())
}

/// Padding weighs nothing.
fn token_weights(chunk: &Chunk, vision: f64) -> Vec<f32> {
    let mut weights: Vec<f32> =
        chunk.kinds.iter().map(|&k| if k == Kind::Vision { vision as f32 } else { 1.0 }).collect();
    for span in &chunk.spans {
        weights[span.start + span.real..span.start + span.len].fill(0.0);
    }
    weights
}

/// Squared error over squared output, at vision and at text tokens.
fn lost(batch: &Batch, x: &Stream, x_q: &Stream) -> Result<(f64, f64)> {
    let mut sums = [[0.0; 2]; 2];
    for (c, chunk) in batch.chunks.iter().enumerate() {
        let (x, x_q) = (x.get(c)?, x_q.get(c)?);
        let of = |a: &Tensor, b: &Tensor| row_errors(a, b, true)?.values();
        let (errors, squares) = (of(&x, &x_q)?, of(&x, &x.zeros_like()?)?);
        let real = token_weights(chunk, 1.0);
        for (t, kind) in chunk.kinds.iter().enumerate().filter(|(t, _)| real[*t] > 0.0) {
            let sum = &mut sums[usize::from(*kind != Kind::Vision)];
            *sum = [sum[0] + errors[t], sum[1] + squares[t]];
        }
    }
    let [vision, text] = sums.map(|[e, s]| if s > 0.0 { e / s } else { 0.0 });
    Ok((vision, text))
}
