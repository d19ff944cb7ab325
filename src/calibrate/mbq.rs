//! Modality-balanced quantization (MBQ, arXiv 2412.19509), and AWQ's search (arXiv 2306.00978) as its special case
//! without weights: the method itself. How its candidates are scored without all the work is in [`super::search`], the
//! gradients are in [`super::sensitivity`]; the numbers of the authors' code and of this are compared in `tests.rs`.
//!
//! A group of linears that share an input x, and what produces x, can be scaled without changing the function: the
//! columns of W by s, the producer's output by 1/s. Per group, s = x_max^a is searched over 20 exponents a; the
//! winner loses least against the full-precision output when W is quantised, where errors at vision tokens weigh r
//! times those at answer tokens. r is how much less the model's loss minds them.
use super::batch::{Batch, Kind};
use super::grid::{Activations, WeightGrid};
use super::sensitivity::BlockSensitivity;
pub use crate::text::Group;
use crate::text::ops::{over_row, times_row};
use crate::text::{Block, Linear};
use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

/// Exponents a = i / 20.
pub const GRID: usize = 20;

/// The ratios r of a block's two parts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ratios {
    pub attn: f64,
    pub mlp: f64,
}

/// r = vision / answer, each replaced by max(r, median over the blocks): `numpy.median`, which for an even count is
/// the mean of the two middle ones.
pub fn ratios(blocks: &[BlockSensitivity]) -> Vec<Ratios> {
    let clamped = |raw: Vec<f64>| {
        let mut sorted = raw.clone();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let median = if n == 0 { 0.0 } else { (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0 };
        raw.into_iter().map(move |r| r.max(median))
    };
    let attn = clamped(blocks.iter().map(|b| b.attn.vision / b.attn.answer).collect());
    let mlp = clamped(blocks.iter().map(|b| b.mlp.vision / b.mlp.answer).collect());
    attn.zip(mlp).map(|(attn, mlp)| Ratios { attn, mlp }).collect()
}

impl Group {
    /// The weight of vision errors at the output that the group's errors are measured on: the whole attention's, or o's,
    /// for q, k, v and o; the whole MLP's, or down's, for gate, up and down.
    pub(super) fn ratio(self, r: Ratios) -> f64 {
        match self {
            Group::Qkv | Group::O => r.attn,
            Group::GateUp | Group::Down => r.mlp,
        }
    }
}

/// How errors are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    Mae,
    Mse,
}

/// The weight of a token's summed error in the loss. mae: (sum over answer |D| + r sum over vision |D|) /
/// ((N_answer + N_vision) C); mse: mean over answer D^2 + r mean over vision D^2; without r: the mean over everything.
pub(super) fn token_weight(kind: Kind, batch: &Batch, channels: usize, loss: Loss, ratio: Option<f64>) -> f64 {
    let (n_answer, n_vision, c) = (batch.answer as f64, batch.vision as f64, channels as f64);
    match (ratio, loss, kind) {
        (None, ..) => 1.0 / (batch.tokens as f64 * c),
        (Some(_), _, Kind::Other) => 0.0,
        (Some(_), Loss::Mae, Kind::Answer) => 1.0 / ((n_answer + n_vision) * c),
        (Some(r), Loss::Mae, Kind::Vision) => r / ((n_answer + n_vision) * c),
        (Some(_), Loss::Mse, Kind::Answer) => 1.0 / (n_answer * c),
        (Some(r), Loss::Mse, Kind::Vision) => r / (n_vision * c),
    }
}

/// s = max(x_max^a, 1e-4), divided by sqrt(max s * min s).
pub fn scales(x_max: &[f32], a: f32) -> Vec<f32> {
    let s: Vec<f32> = x_max.iter().map(|x| x.powf(a).max(1e-4)).collect();
    let (low, high) = s.iter().fold((f32::INFINITY, 0f32), |(l, h), &v| (l.min(v), h.max(v)));
    let middle = (high * low).sqrt();
    s.into_iter().map(|s| s / middle).collect()
}

/// A group's linears as a candidate s has them: W' = Q(W s) / s, or Q(W s) where activations are divided by s instead.
pub(super) fn candidate(
    block: &Block,
    group: Group,
    s: &Tensor,
    weights: &dyn WeightGrid,
    activations: Activations,
) -> Result<Vec<Linear>> {
    let quantised = group.linears().iter().map(|&name| {
        let linear = block.linear(name);
        let weight = weights.round_trip(&times_row(&linear.weight, s)?)?;
        let weight = if activations == Activations::Float { over_row(weight, s)? } else { weight };
        Ok(Linear { weight, bias: linear.bias.clone() })
    });
    quantised.collect()
}

/// What was found for a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FoundScales {
    pub group: Group,
    /// The weight of vision errors; none when the search is not balanced.
    pub ratio: Option<f64>,
    /// a = best / 20.
    pub best: usize,
    pub best_loss: f64,
    /// How far the second best is above the best, relative.
    pub margin: f64,
    /// Of each candidate; none where it was dropped before it was scored on all tokens.
    pub losses: Vec<Option<f64>>,
    pub x_max: Vec<f32>,
    pub scales: Vec<f32>,
}

impl FoundScales {
    /// What a reader of the record wants of it.
    pub(super) fn record(&self) -> serde_json::Value {
        serde_json::json!({"group": self.group, "ratio": self.ratio, "exponent": self.best as f64 / 20.0,
            "loss": self.best_loss, "margin": self.margin, "losses": self.losses})
    }
}

impl FoundScales {
    /// The candidate of least loss, the first of equals; `losses` has none for candidates that were dropped.
    ///
    /// # Errors
    /// No loss is finite.
    pub(super) fn least(
        group: Group,
        ratio: Option<f64>,
        losses: Vec<Option<f64>>,
        x_max: Vec<f32>,
        candidates: &[Vec<f32>],
    ) -> Result<Self> {
        let mut best = None;
        for (i, loss) in losses.iter().enumerate() {
            if let Some(loss) = *loss
                && best.is_none_or(|(_, least)| loss < least)
            {
                best = Some((i, loss));
            }
        }
        let Some((best, best_loss)) = best.filter(|(_, l)| l.is_finite()) else {
            candle_core::bail!("every candidate of group {group:?} has a loss that is not finite");
        };
        let others = losses.iter().enumerate().filter(|(i, _)| *i != best).filter_map(|(_, l)| *l);
        let second = others.fold(f64::INFINITY, f64::min);
        let margin = if second.is_finite() { (second - best_loss) / best_loss.max(f64::MIN_POSITIVE) } else { 1.0 };
        Ok(FoundScales { group, ratio, best, best_loss, margin, losses, x_max, scales: candidates[best].clone() })
    }
}
