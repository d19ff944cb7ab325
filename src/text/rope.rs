//! Rotary positions: plain, scaled, in sections, and whichever way the pairs lie.
use super::Error;
use super::arch::{Pairs, Sections};
use super::config::{RopeScaling, Rotary, TextConfig};
use super::ops::rotate;
use super::sample::Span;
use super::tensors::{ROPE_FACTORS, Weights};
use candle_core::{Device, Result, Tensor, bail};
use std::sync::Arc;

/// Cosines and sines of every position, `[positions, head_dim / 2]`.
#[derive(Debug, Clone)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
    pairs: Pairs,
    /// Where tokens have several positions: the one that each pair turns by, and the tables' rows in host memory.
    sections: Option<Arc<SectionTables>>,
}

#[derive(Debug)]
struct SectionTables {
    column: Vec<usize>,
    cos: Vec<Vec<f32>>,
    sin: Vec<Vec<f32>>,
}

/// Angles of some rows.
pub(super) struct Turn {
    cos: Tensor,
    sin: Tensor,
    pairs: Pairs,
}

/// Angles per position of each pair, and what cosines and sines are multiplied by. In f32, as transformers has them.
fn frequencies(dim: usize, rotary: &Rotary, factors: Option<&[f32]>) -> (Vec<f32>, f32) {
    let plain = |i: usize| {
        let f = 1.0 / (rotary.base as f32).powf((2 * i) as f32 / dim as f32);
        factors.map_or(f, |by| f / by[i])
    };
    let plain = (0..dim / 2).map(plain);
    match rotary.scaling {
        RopeScaling::None => (plain.collect(), 1.0),
        RopeScaling::Linear(factor) => (plain.map(|f| f / factor as f32).collect(), 1.0),
        RopeScaling::Yarn { factor, original_context } => {
            // Pairs that turn more than 32 times within the original context stay; those that turn less than once are
            // scaled; between them the share changes linearly (arXiv 2309.00071).
            let pair = |turns: f64| {
                dim as f64 * (original_context as f64 / (turns * 2.0 * std::f64::consts::PI)).ln()
                    / (2.0 * rotary.base.ln())
            };
            let (low, high) = (pair(32.0).floor().max(0.0), pair(1.0).ceil().min(dim as f64 - 1.0));
            let scaled = |i: usize| ((i as f64 - low) / (high - low).max(1e-3)).clamp(0.0, 1.0) as f32;
            let all = plain.enumerate().map(|(i, f)| f / factor as f32 * scaled(i) + f * (1.0 - scaled(i)));
            (all.collect(), (1.0 + 0.1 * factor.ln()) as f32)
        }
    }
}

/// The position that each pair turns by.
fn columns(sections: Sections, [time, height, width]: [usize; 3]) -> Vec<usize> {
    let of = |i: usize| match sections {
        Sections::None => 0,
        Sections::Contiguous => usize::from(i >= time) + usize::from(i >= time + height),
        // Pairs behind a used up section turn by the fourth position in ggml, by time in transformers.
        Sections::Interleaved => match i % 3 {
            n if i < 3 * [time, height, width][n] => n,
            _ => 3,
        },
    };
    (0..time + height + width).map(of).collect()
}

impl Rope {
    /// Tables of the positions below `positions`. `factors` divide the pairs' angles (`rope_freqs.weight`).
    ///
    /// # Errors
    /// The tables do not fit the device.
    pub fn new(
        config: &TextConfig,
        rotary: &Rotary,
        factors: Option<&[f32]>,
        positions: usize,
        device: &Device,
    ) -> Result<Self> {
        let half = config.head_dim / 2;
        let (frequencies, magnitude) = frequencies(config.head_dim, rotary, factors);
        let angles: Vec<f32> = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f)).collect();
        let angles = Tensor::from_vec(angles, (positions, half), device)?;
        let scaled = |t: Tensor| if magnitude == 1.0 { Ok(t) } else { t * f64::from(magnitude) };
        let (cos, sin) = (scaled(angles.cos()?)?, scaled(angles.sin()?)?);
        let sections = match config.arch.sections {
            Sections::None => None,
            kind => {
                let column = columns(kind, config.rope_sections);
                Some(Arc::new(SectionTables { column, cos: cos.to_vec2()?, sin: sin.to_vec2()? }))
            }
        };
        Ok(Rope { cos, sin, pairs: config.arch.pairs, sections })
    }

    /// Those of blocks that see everything, and of blocks with a window.
    ///
    /// # Errors
    /// As [`Rope::new`]; the factors are not what they should be.
    pub fn of_model(
        weights: &dyn Weights,
        config: &TextConfig,
        positions: usize,
        device: &Device,
    ) -> std::result::Result<[Self; 2], Error> {
        let factors = match weights.contains(ROPE_FACTORS) {
            true => Some(weights.f32(ROPE_FACTORS, &[config.head_dim / 2])?),
            false => None,
        };
        let new = |rotary| Rope::new(config, rotary, factors.as_deref(), positions, device);
        let all = new(&config.rotary)?;
        let local = if config.local_rotary == config.rotary { all.clone() } else { new(&config.local_rotary)? };
        Ok([all, local])
    }

    /// The angles of a sample's rows.
    pub(super) fn of(&self, span: &Span) -> Result<Turn> {
        let Some(positions) = span.layout.as_ref().and_then(|layout| layout.positions.as_ref()) else {
            let (cos, sin) = (self.cos.narrow(0, 0, span.len)?, self.sin.narrow(0, 0, span.len)?);
            return Ok(Turn { cos, sin, pairs: self.pairs });
        };
        if positions.tokens() != span.len {
            bail!("a sample of {} tokens has positions of {}", span.len, positions.tokens());
        }
        let (n, half) = self.cos.dims2()?;
        if let Some(beyond) = positions.rows().flatten().find(|&p| p as usize >= n) {
            bail!("position {beyond} is beyond the {n} that the rotary tables hold");
        }
        let Some(SectionTables { column, cos, sin }) = self.sections.as_deref() else {
            let at: Vec<u32> = positions.rows().map(|row| row[0]).collect();
            let at = Tensor::new(at, self.cos.device())?;
            let (cos, sin) = (self.cos.index_select(&at, 0)?, self.sin.index_select(&at, 0)?);
            return Ok(Turn { cos, sin, pairs: self.pairs });
        };
        let gather = |table: &[Vec<f32>]| {
            let rows = positions.rows().flat_map(|row| column.iter().enumerate().map(move |(i, &c)| (row[c], i)));
            let values: Vec<f32> = rows.map(|(p, i)| table[p as usize][i]).collect();
            Tensor::from_vec(values, (span.len, half), self.cos.device())
        };
        Ok(Turn { cos: gather(cos)?, sin: gather(sin)?, pairs: self.pairs })
    }
}

impl Turn {
    /// `x` `[heads, rows, d]`, turned, or turned back.
    pub fn apply(&self, x: &Tensor, backward: bool) -> Result<Tensor> {
        rotate(x, &self.cos, &self.sin, self.pairs, backward)
    }

    /// The angles of some of the rows.
    pub fn rows(&self, rows: &[usize]) -> Result<Turn> {
        let at: Vec<u32> = rows.iter().map(|&p| p as u32).collect();
        let at = Tensor::new(at, self.cos.device())?;
        Ok(Turn { cos: self.cos.index_select(&at, 0)?, sin: self.sin.index_select(&at, 0)?, pairs: self.pairs })
    }
}
