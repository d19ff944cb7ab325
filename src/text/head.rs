//! Final norm and output head, which every supported text model ends in.
use super::Error;
use super::config::TextConfig;
use super::ops::{rms_backward, rms_norm};
use super::tensors::{EMBEDDING, OUTPUT, OUTPUT_NORM, Weights};
use crate::random::Rng;
use candle_core::{D, Device, Result, Tensor};

/// Final norm and output head.
pub struct Head {
    norm: Tensor,
    weight: Tensor,
    eps: f64,
}

impl Head {
    /// # Errors
    /// A tensor is missing, has another shape, or holds NaN or infinity; the message names it.
    pub fn load(weights: &dyn Weights, config: &TextConfig, device: &Device) -> std::result::Result<Self, Error> {
        let name = if weights.contains(OUTPUT) { OUTPUT } else { EMBEDDING };
        let shape = [config.vocab_size, config.hidden_size];
        Ok(Head {
            norm: weights.tensor(OUTPUT_NORM, &shape[1..], device)?,
            weight: weights.tensor(name, &shape, device)?,
            eps: config.rms_norm_eps,
        })
    }

    /// Log-probabilities `[k, vocabulary]` of what comes after the rows `x` `[k, hidden]`.
    pub fn log_probabilities(&self, x: &Tensor) -> Result<Tensor> {
        let logits = rms_norm(x, &self.norm, self.eps)?.matmul(&self.weight.t()?)?;
        let logits = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
        logits.broadcast_sub(&logits.exp()?.sum_keepdim(D::Minus1)?.log()?)
    }

    /// For each of the rows `x` `[k, hidden]` a token, drawn from the distribution of what comes after it.
    pub fn draw(&self, x: &Tensor, dice: &mut Rng) -> Result<Vec<u32>> {
        let rows: Vec<Vec<f32>> = self.log_probabilities(x)?.to_vec2()?;
        let draw = |row: &Vec<f32>| {
            let mut left = (f64::from(dice.uniform()) + 1.0) / 2.0;
            let taken = row.iter().position(|log_p| {
                left -= f64::from(*log_p).exp();
                left < 0.0
            });
            // Sums of f32 may stay just below 1.
            taken.unwrap_or(row.len() - 1) as u32
        };
        Ok(rows.iter().map(draw).collect())
    }

    /// Mean cross-entropy of `targets` given the rows `x` `[k, hidden]` that predict them, and `scale` times its
    /// gradient at x.
    pub fn loss(&self, x: &Tensor, targets: &[u32], scale: f64) -> Result<(f64, Tensor)> {
        let k = targets.len();
        let logits = rms_norm(x, &self.norm, self.eps)?.matmul(&self.weight.t()?)?;
        let e = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
        let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
        let index = Tensor::from_slice(targets, (k, 1), x.device())?;
        let chosen: Vec<f32> = p.gather(&index, 1)?.flatten_all()?.to_vec1()?;
        let loss = chosen.iter().map(|&p| -f64::from(p.max(f32::MIN_POSITIVE)).ln()).sum::<f64>() / k as f64;
        // (p - onehot) W = p W - W[targets].
        let rows = self.weight.index_select(&index.flatten_all()?, 0)?;
        let g = ((p.matmul(&self.weight)? - rows)? * (scale / k as f64))?;
        Ok((loss, rms_backward(x, &self.norm, self.eps, &g)?))
    }
}
