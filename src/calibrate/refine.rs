//! What is left to gain once every column is rounded: with all other columns fixed, a block's levels have a best choice
//! by least squares, and so has each code. Going over the columns again and again lessens `E H E^T` (E = W - V) each
//! time (coordinate descent, as QuantEase has it for codes, arXiv 2309.01885).
use super::feedback::Coded;
use crate::quant::levels::{Format, Levels};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Columns whose sums over all errors are made in one product.
const BLOCK: usize = 128;

/// Goes `passes` times over the columns of `coded`, which stands for `w` `[rows, n]`. `h` `[n, n]` with its damping.
///
/// # Errors
/// The arithmetic fails.
pub fn refine(w: &Tensor, h: &Tensor, coded: &mut Coded, passes: usize) -> Result<()> {
    let (rows, n) = w.dims2()?;
    let format = coded.format;
    let group = format.group();
    let errors = (w - coded.weight(w.device())?)?.contiguous()?;
    for _ in 0..passes {
        for start in (0..n).step_by(BLOCK) {
            let len = BLOCK.min(n - start);
            let h = h.narrow(1, start, len)?.contiguous()?;
            let mut pull: Vec<f32> = errors.matmul(&h)?.flatten_all()?.to_vec1()?;
            let mut e: Vec<f32> = errors.narrow(1, start, len)?.flatten_all()?.to_vec1()?;
            let corner: Vec<f32> = h.narrow(0, start, len)?.flatten_all()?.to_vec1()?;
            let block = Corner { format, len, h: &corner, sums: sums(&corner, len, group) };
            pull.par_chunks_mut(len)
                .zip(e.par_chunks_mut(len))
                .zip(coded.codes.par_chunks_mut(n).zip(coded.levels.par_chunks_mut(n / group)))
                .with_min_len(8)
                .for_each(|((pull, e), (codes, levels))| {
                    let codes = &mut codes[start..start + len];
                    let levels = &mut levels[start / group..(start + len) / group];
                    for (g, levels) in levels.iter_mut().enumerate() {
                        block.levels(g, levels, codes, e, pull);
                    }
                    block.codes(levels, codes, e, pull);
                });
            errors.slice_set(&Tensor::from_vec(e, (rows, len), w.device())?, 1, start)?;
        }
    }
    Ok(())
}

/// Per group of the corner, the sum of its rows.
fn sums(h: &[f32], len: usize, group: usize) -> Vec<f32> {
    let mut sums = vec![0.0; len / group * len];
    for (k, row) in h.chunks(len).enumerate() {
        let sum = &mut sums[k / group * len..][..len];
        sum.iter_mut().zip(row).for_each(|(s, v)| *s += v);
    }
    sums
}

/// The part of H that a block of columns shares with itself.
struct Corner<'a> {
    format: Format,
    len: usize,
    h: &'a [f32],
    sums: Vec<f32>,
}

impl Corner<'_> {
    /// The best levels of group `g` for its codes. `pull` is E H at the block's columns; it follows the errors `e`.
    fn levels(&self, g: usize, levels: &mut Levels, codes: &[u8], e: &mut [f32], pull: &mut [f32]) {
        let group = self.format.group();
        let range = g * group..(g + 1) * group;
        let sum = &self.sums[g * self.len..(g + 1) * self.len];
        let zero = self.format.middle().unwrap_or(0.0);
        // y = c H, c the group's codes (counted from 0's).
        let mut y = vec![0f32; self.len];
        for k in range.clone() {
            let c = f32::from(codes[k]) - zero;
            y.iter_mut().zip(&self.h[k * self.len..]).for_each(|(y, h)| *y += c * h);
        }
        let dot = |v: &[f32]| -> f64 {
            let product = |k: usize| f64::from(f32::from(codes[k]) - zero) * f64::from(v[k]);
            range.clone().map(product).sum()
        };
        let total = |v: &[f32]| -> f64 { range.clone().map(|k| f64::from(v[k])).sum() };
        let (chc, ch1, hh, cp, p) = (dot(&y), total(&y), total(sum), dot(pull), total(pull));
        let (d, m) = match self.format.middle() {
            Some(_) => (cp / chc, 0.0),
            None => {
                let determinant = chc * hh - ch1 * ch1;
                // The codes say little about two numbers when they are nearly all alike.
                if determinant.is_nan() || determinant <= 1e-6 * chc * hh {
                    return;
                }
                ((cp * hh - p * ch1) / determinant, (p * chc - cp * ch1) / determinant)
            }
        };
        let next = self.format.stored(levels.d + d as f32, levels.m + m as f32);
        let (d, m) = (f64::from(next.d) - f64::from(levels.d), f64::from(next.m) - f64::from(levels.m));
        // In types without an m of their own it moves with d, which counting codes from 0's has covered.
        let m = if self.format.middle().is_some() { 0.0 } else { m };
        let change = d * d * chc + 2.0 * d * m * ch1 + m * m * hh - 2.0 * (d * cp + m * p);
        // Rounding to halfs may have undone the gain; NaN is no gain.
        if change.is_nan() || change >= 0.0 || !next.d.is_finite() || !next.m.is_finite() {
            return;
        }
        *levels = next;
        let (d, m) = (d as f32, m as f32);
        range.for_each(|k| e[k] -= d * (f32::from(codes[k]) - zero) + m);
        pull.iter_mut().zip(y.iter().zip(sum)).for_each(|(p, (y, s))| *p -= d * y + m * s);
    }

    /// The best code of each column, all others fixed.
    fn codes(&self, levels: &[Levels], codes: &mut [u8], e: &mut [f32], pull: &mut [f32]) {
        for (k, row) in self.h.chunks(self.len).enumerate() {
            let levels = levels[k / self.format.group()];
            let old = levels.value(codes[k]);
            let code = self.format.nearest(levels, old + pull[k] / row[k]);
            if code != codes[k] {
                codes[k] = code;
                let step = levels.value(code) - old;
                e[k] -= step;
                pull.iter_mut().zip(row).for_each(|(p, h)| *p -= step * h);
            }
        }
    }
}
