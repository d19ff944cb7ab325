//! Fake quantisers: weights and activations rounded to what the output type will hold, and back to f32.
use crate::model::ops::with_cpu;
use candle_core::{D, Result, Tensor, bail};
use rayon::prelude::*;

/// Rounds a weight matrix `[out, in]` to the values its quantised form stands for.
pub trait WeightGrid: Sync {
    /// # Errors
    /// The row length does not fit, or the arithmetic fails.
    fn round_trip(&self, weight: &Tensor) -> Result<Tensor>;
    /// For the record.
    fn name(&self) -> String;
}

/// The paper's weight-only grid: asymmetric per `group` inputs, `bits` bits, with an integer zero point
/// (`pseudo_quantize_tensor` with `zero_point`).
#[derive(Debug, Clone, Copy)]
pub struct Asymmetric {
    pub bits: u32,
    pub group: usize,
}

impl WeightGrid for Asymmetric {
    fn round_trip(&self, weight: &Tensor) -> Result<Tensor> {
        let top = ((1u32 << self.bits) - 1) as f32;
        by_group(weight, self.group, |w| {
            let (low, high) = w.iter().fold((w[0], w[0]), |(l, h), &v| (l.min(v), h.max(v)));
            let step = (high - low).max(1e-5) / top;
            let zero = (-(low / step).round_ties_even()).clamp(0.0, top);
            w.iter_mut().for_each(|v| *v = (((*v / step).round_ties_even() + zero).clamp(0.0, top) - zero) * step);
        })
    }
    fn name(&self) -> String {
        format!("asymmetric {} bit, groups of {}", self.bits, self.group)
    }
}

/// The paper's W4A8 weight grid: symmetric, one step per output channel.
#[derive(Debug, Clone, Copy)]
pub struct PerChannel {
    pub bits: u32,
}

impl WeightGrid for PerChannel {
    fn round_trip(&self, weight: &Tensor) -> Result<Tensor> {
        let top = ((1u32 << (self.bits - 1)) - 1) as f32;
        by_group(weight, weight.dim(D::Minus1)?, |w| symmetric(w, top))
    }
    fn name(&self) -> String {
        format!("symmetric {} bit per output channel", self.bits)
    }
}

/// A stored type's own round trip: quantise, dequantise.
pub struct Stored<F> {
    pub name: String,
    /// Rounds whole rows of `cols` weights in place, or says why not.
    pub rows: F,
}

impl<F: Fn(&mut [f32], usize) -> std::result::Result<(), String> + Sync> WeightGrid for Stored<F> {
    fn round_trip(&self, weight: &Tensor) -> Result<Tensor> {
        let (out, cols) = weight.dims2()?;
        let mut data: Vec<f32> = weight.flatten_all()?.to_vec1()?;
        let rows = (out / 64).max(1);
        let faults: Vec<String> =
            data.par_chunks_mut(rows * cols).filter_map(|part| (self.rows)(part, cols).err()).collect();
        match faults.into_iter().next() {
            Some(fault) => bail!("{fault}"),
            None => Tensor::from_vec(data, (out, cols), weight.device()),
        }
    }
    fn name(&self) -> String {
        self.name.clone()
    }
}

/// What happens to the activations that enter a linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    Float,
    /// The paper's: symmetric int8, one step per token.
    PerToken,
    /// ggml's int8 path: symmetric int8 per block of 32 channels, the step in fp16 (q8_0).
    Blocks,
}

impl Activations {
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Activations::Float => Ok(x.clone()),
            Activations::PerToken => by_group(x, x.dim(D::Minus1)?, |v| symmetric(v, 127.0)),
            Activations::Blocks => by_group(x, 32, |v| {
                let max = v.iter().fold(0f32, |m, v| m.max(v.abs()));
                let d = max / 127.0;
                let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
                let stored = half::f16::from_f32(d).to_f32();
                // ggml rounds halves away from zero here.
                v.iter_mut().for_each(|v| *v = (*v * inverse).round() * stored);
            }),
        }
    }
}

fn symmetric(v: &mut [f32], top: f32) {
    let step = v.iter().fold(0f32, |m, v| m.max(v.abs())).max(1e-5) / top;
    v.iter_mut().for_each(|v| *v = (*v / step).round_ties_even().clamp(-top, top) * step);
}

/// Applies `f` to every `group` neighbours of the last dimension.
fn by_group(x: &Tensor, group: usize, f: impl Fn(&mut [f32]) + Sync) -> Result<Tensor> {
    let cols = x.dim(D::Minus1)?;
    if group == 0 || cols % group != 0 {
        bail!("groups of {group} do not divide rows of {cols} weights");
    }
    let mut data: Vec<f32> =
        if x.device().is_cpu() { with_cpu(x, <[f32]>::to_vec)? } else { x.flatten_all()?.to_vec1()? };
    data.par_chunks_mut(cols).with_min_len(8).for_each(|row| row.chunks_mut(group).for_each(&f));
    Tensor::from_vec(data, x.shape(), x.device())
}
