//! Modality-balanced quantization (MBQ, arXiv 2412.19509), and AWQ's search (arXiv 2306.00978) as its special case
//! without weights. This file follows the authors' code; the numbers of both are compared in `tests.rs`.
//!
//! A group of linears that share an input x, and what produces x, can be scaled without changing the function: the
//! columns of W by s, the producer's output by 1/s. Per group, s = x_max^a is searched over 20 exponents a; the
//! winner loses least against the full-precision output when W is quantised, where errors at vision tokens weigh r
//! times those at answer tokens. r is how much less the model's loss minds them (see [`super::sensitivity`]).
use super::batch::{Batch, Kind};
use super::grid::{Activations, WeightGrid};
use super::keys::Keys;
use super::pass::{Keep, Pass};
use super::race::{BY_QUERY, BY_SAMPLE, BY_TOKEN, STRATA, deal, deal_samples, race};
use super::sensitivity::Ratios;
use super::stream::Stream;
pub use crate::text::Group;
use crate::text::ops::{Fast, each, over_row, row_errors, select_rows, times_row};
use crate::text::{Block, Linear, Name, Producer, Span};
use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

/// Exponents a = i / 20.
pub const GRID: usize = 20;

impl Group {
    /// The weight of vision errors at the output that the group's errors are measured on.
    pub(super) fn ratio(self, r: Ratios) -> f64 {
        match self {
            Group::Qkv | Group::O => r.attn,
            Group::GateUp | Group::Down => r.mlp,
        }
    }
}

/// How errors are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Loss {
    Mae,
    Mse,
}

/// The search's settings.
pub struct Search<'a> {
    pub weights: &'a dyn WeightGrid,
    pub activations: Activations,
    pub loss: Loss,
    /// Whether activations enter as quantised by the blocks before.
    pub distort: bool,
    /// Score all 20 candidates on all tokens.
    pub exhaustive: bool,
    /// Bytes that candidates' quantised weights may take, to be used again.
    pub memory: usize,
    /// Bytes that candidates' keys and values may take, to be used again.
    pub keys: usize,
    /// Bytes of a group's inputs and targets that are gathered at once, at least one piece of them.
    pub gather: usize,
    /// Candidates and chunks that are worked on at a time.
    pub at_once: usize,
    /// With grouped queries, one s per key head, so that v -> o folds too (not in the authors' code).
    pub share_heads: bool,
}

/// Rows that are multiplied at once, at least, where there are as many.
const ROWS: usize = 1024;

/// Rows of a group's input and target, of one chunk or of several.
struct Piece {
    x: Tensor,
    target: Tensor,
    /// Of each row: its sample, and its weight in the loss.
    owners: Vec<(usize, f64)>,
    attention: Option<Attention>,
}

/// What attention needs beside a piece's rows.
pub(super) struct Attention {
    /// The whole input of the rows' samples.
    pub all: Tensor,
    /// These samples: where they are in it, and their numbers in the batch.
    pub spans: Vec<Span>,
    pub samples: Vec<usize>,
    /// Which of its rows are the piece's.
    rows: Vec<u32>,
}

impl Piece {
    fn bytes(&self) -> usize {
        let whole = self.attention.as_ref().map_or(0, |a| a.all.elem_count());
        4 * (self.x.elem_count() + self.target.elem_count() + whole)
    }
}

/// A piece in the making.
#[derive(Default)]
struct Gather {
    source: Vec<Tensor>,
    target: Vec<Tensor>,
    owners: Vec<(usize, f64)>,
    /// Rows of the source; for attention their samples, and which rows have owners.
    len: usize,
    spans: Vec<Span>,
    samples: Vec<usize>,
    rows: Vec<u32>,
}

/// What was found for a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Found {
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

impl Found {
    /// What a reader of the record wants of it.
    pub(super) fn record(&self) -> serde_json::Value {
        serde_json::json!({"group": self.group, "ratio": self.ratio, "exponent": self.best as f64 / 20.0,
            "loss": self.best_loss, "margin": self.margin, "losses": self.losses})
    }
}

/// s = max(x_max^a, 1e-4), divided by sqrt(max s * min s).
pub fn scales(x_max: &[f32], a: f32) -> Vec<f32> {
    let s: Vec<f32> = x_max.iter().map(|x| x.powf(a).max(1e-4)).collect();
    let (low, high) = s.iter().fold((f32::INFINITY, 0f32), |(l, h), &v| (l.min(v), h.max(v)));
    let middle = (high * low).sqrt();
    s.into_iter().map(|s| s / middle).collect()
}

/// The weight of a token's summed error in the loss. mae: (sum over answer |D| + r sum over vision |D|) /
/// ((N_answer + N_vision) C); mse: mean over answer D^2 + r mean over vision D^2; without r: the mean over everything.
fn token_weight(kind: Kind, batch: &Batch, channels: usize, loss: Loss, ratio: Option<f64>) -> f64 {
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

impl Search<'_> {
    /// Whether v's outputs are o's inputs one to one, or can be made so by sharing.
    fn folds(&self, block: &Block) -> Result<bool> {
        Ok(self.share_heads || block.linear(Name::V).weight.dim(0)? == block.linear(Name::O).weight.dim(1)?)
    }

    /// A group's linears with W' = Q(W s) / s, or Q(W s) where activations are divided by s instead.
    fn candidate(&self, block: &Block, group: Group, s: &Tensor) -> Result<Vec<Linear>> {
        let quantised = group.linears().iter().map(|&name| {
            let linear = block.linear(name);
            let weight = self.weights.round_trip(&times_row(&linear.weight, s)?)?;
            let weight = if self.activations == Activations::Float { over_row(weight, s)? } else { weight };
            Ok(Linear { weight, bias: linear.bias.clone() })
        });
        quantised.collect()
    }

    /// The group's output at the piece's rows, with candidate linears `q`; all others are in full precision.
    fn output(
        &self,
        block: &Block,
        group: Group,
        (candidate, q, s): (usize, &[Linear], &Tensor),
        piece: &Piece,
        keys: &Keys,
    ) -> Result<Tensor> {
        let scaled = |x: &Tensor| match self.activations {
            Activations::Float => Ok(x.clone()),
            quantiser => quantiser.apply(&over_row(x.copy()?, s)?),
        };
        let x = scaled(&piece.x)?;
        if let Some(of) = &piece.attention {
            // Keys and values of all tokens, queries of the rows alone.
            let make = |all: &Tensor| {
                let all = scaled(all)?;
                Ok((q[1].forward(&all)?, q[2].forward(&all)?))
            };
            let keys = keys.get(candidate, of, make)?;
            let o_in = block.attend_at(&q[0].forward(&x)?, &keys, &of.spans, Some(&of.rows))?;
            return block.linear(Name::O).forward(&o_in);
        }
        match group {
            Group::GateUp => block.linear(Name::Down).forward(&block.activate(q[0].forward(&x)?, &q[1].forward(&x)?)?),
            Group::Qkv | Group::O | Group::Down => q[0].forward(&x),
        }
    }

    /// Gathers the rows that strata `part` of the batch put into `group`'s loss, piece by piece; `done` gets as many
    /// pieces at once as there is room for.
    #[allow(clippy::too_many_arguments)]
    fn pieces(
        &self,
        group: Group,
        batch: &Batch,
        (full, seen): (&Pass, &Pass),
        strata: &[Vec<usize>],
        part: &Range<usize>,
        weight: &dyn Fn(Kind) -> f64,
        mut done: impl FnMut(&[Piece]) -> Result<()>,
    ) -> Result<()> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut bytes = 0;
        let (mut first, mut open) = (0, Gather::default());
        for (c, chunk) in batch.chunks.iter().enumerate() {
            let wanted = |t: &usize| part.contains(&strata[c][*t]) && weight(chunk.kinds[*t]) != 0.0;
            let rows: Vec<u32> = (0..chunk.tokens()).filter(wanted).map(|t| t as u32).collect();
            for (i, span) in chunk.spans.iter().enumerate() {
                let of_span = rows.iter().filter(|&&t| (span.start..span.start + span.len).contains(&(t as usize)));
                open.owners.extend(of_span.map(|&t| (first + i, weight(chunk.kinds[t as usize]))));
            }
            // Devices have no tensors without elements.
            if !rows.is_empty() {
                open.target.push(full.target(group, c, &rows)?);
                // Attention needs the keys of whole samples.
                let whole = match group {
                    Group::Qkv => {
                        let (whole, spans, rows) = samples_of(&chunk.spans, &rows, open.len);
                        open.samples.extend(spans.iter().map(|(i, _)| first + i));
                        open.spans.extend(spans.into_iter().map(|(_, span)| span));
                        open.rows.extend(rows);
                        whole
                    }
                    _ => rows,
                };
                open.len += whole.len();
                open.source.push(seen.source(group, c, &whole)?);
            }
            first += chunk.spans.len();
            // Small parts of chunks are multiplied together.
            let last = c + 1 == batch.chunks.len();
            if (open.len >= ROWS || last) && !open.owners.is_empty() {
                let Gather { source, target, owners, spans, samples, rows, .. } = std::mem::take(&mut open);
                let all = seen.input(group, &Tensor::cat(&source, 0)?)?;
                let (x, attention) = match group {
                    Group::Qkv => (select_rows(&all, &rows)?, Some(Attention { all, spans, samples, rows })),
                    _ => (all, None),
                };
                let piece = Piece { x, target: Tensor::cat(&target, 0)?, owners, attention };
                bytes += piece.bytes();
                pieces.push(piece);
            }
            if !pieces.is_empty() && (bytes >= self.gather || last) {
                done(&pieces)?;
                pieces.clear();
                bytes = 0;
            }
        }
        Ok(())
    }

    /// The finished block: every linear quantised.
    pub fn quantise(&self, block: &Block) -> Result<Block> {
        let mut q = block.clone();
        for name in Name::ALL {
            q.linear_mut(name).weight = self.weights.round_trip(&block.linear(name).weight)?;
        }
        Ok(q)
    }

    /// Searches the block's groups. `full` is its full-precision pass, outputs and sums kept; `x_q` holds the chunks'
    /// inputs as the quantised stream has them (with `distort`).
    pub fn block(
        &self,
        block: &Block,
        batch: &Batch,
        full: &Pass,
        x_q: Option<&Stream>,
        ratios: Option<Ratios>,
    ) -> Result<Vec<Found>> {
        let mut found: Vec<Found> = Vec::new();
        for group in Group::ALL {
            if group == Group::O && !self.folds(block)? {
                continue;
            }
            let ratio = ratios.map(|r| group.ratio(r));
            let Some(x_q) = x_q else {
                found.push(self.group(block, batch, group, full, full, ratio)?);
                continue;
            };
            // Later groups see the scales found so far, all linears quantised.
            let mut scaled = block.clone();
            found.iter().try_for_each(|f| apply(&mut scaled, f.group, &f.scales))?;
            let q = self.quantise(&scaled)?;
            let seen = Pass::run(&q, batch, x_q, self.activations, self.keep(block)?, self.at_once, |_, _| Ok(()))?;
            found.push(self.group(block, batch, group, full, &seen, ratio)?);
        }
        Ok(found)
    }

    /// What the search needs of a pass.
    pub fn keep(&self, block: &Block) -> Result<Keep> {
        let down_in = block.norm1.device().is_cpu();
        Ok(Keep { o_in: self.folds(block)?, outputs: true, sums: true, down_in, ..Keep::default() })
    }

    fn group(
        &self,
        block: &Block,
        batch: &Batch,
        group: Group,
        full: &Pass,
        seen: &Pass,
        ratio: Option<f64>,
    ) -> Result<Found> {
        let x_max = seen.mean(group);
        let shared = if group == Group::O { share(block, &x_max)? } else { x_max.clone() };
        let candidates: Vec<Vec<f32>> = (0..GRID).map(|i| scales(&shared, i as f32 / GRID as f32)).collect();
        let channels = block.norm1.elem_count();
        let weight = |kind: Kind| token_weight(kind, batch, channels, self.loss, ratio);

        let (strata, rounds) = match group {
            _ if self.exhaustive => (deal(batch), &[STRATA][..]),
            Group::Qkv if batch.samples >= 12 => (deal_samples(batch), BY_SAMPLE),
            Group::Qkv => (deal(batch), BY_QUERY),
            _ => (deal(batch), BY_TOKEN),
        };
        // Quantised weights of candidates that race on, as far as they fit.
        let mut kept: BTreeMap<usize, Vec<Linear>> = BTreeMap::new();
        let floats: usize = group.linears().iter().map(|&n| block.linear(n).weight.elem_count()).sum();
        let room = if self.exhaustive { 0 } else { self.memory / (4 * floats).max(1) };
        let keys = Keys::new(if self.exhaustive { 0 } else { self.keys });
        let mut score = |wanted: &[usize], part: Range<usize>| -> Result<Vec<Vec<f64>>> {
            kept.retain(|i, _| wanted.contains(i));
            keys.retain(wanted);
            let mut shares = vec![vec![0.0; batch.samples]; wanted.len()];
            self.pieces(group, batch, (full, seen), &strata, &part, &weight, |pieces| {
                let parts = wanted.chunks(room.max(self.at_once)).zip(shares.chunks_mut(room.max(self.at_once)));
                for (wanted, shares) in parts {
                    let q = each(wanted.len(), self.at_once, |i| {
                        let s = &candidates[wanted[i]];
                        let s = Tensor::from_slice(s, s.len(), block.norm1.device())?;
                        let q = match kept.get(&wanted[i]) {
                            Some(q) => q.clone(),
                            None => self.candidate(block, group, &s)?,
                        };
                        Ok((q, s))
                    })?;
                    for (&i, (q, _)) in wanted.iter().zip(&q) {
                        if kept.len() < room {
                            kept.insert(i, q.clone());
                        }
                    }
                    let n = pieces.len();
                    let errors = each(wanted.len() * n, self.at_once, |i| {
                        let ((q, s), piece) = (&q[i / n], &pieces[i % n]);
                        let out = self.output(block, group, (wanted[i / n], q, s), piece, &keys)?;
                        row_errors(&piece.target, &out, self.loss == Loss::Mse)
                    })?;
                    for (i, errors) in errors.into_iter().enumerate() {
                        let owners = pieces[i % n].owners.iter().zip(errors.values()?);
                        owners.for_each(|(&(sample, weight), e)| shares[i / n][sample] += weight * e);
                    }
                }
                Ok(())
            })?;
            Ok(shares)
        };
        // In TF32 a product is off by 3e-4, the rounding of weights by 1e-1: errors add up in squares, so candidates
        // differ in the sixth digit. Those that are nearer to each other than a thousandth are scored again in f32.
        let fast = Fast::on(&block.norm1).filter(|_| !self.exhaustive);
        let mut losses = race(GRID, rounds, &mut score)?;
        if fast.is_some() {
            drop(fast);
            let least = losses.iter().flatten().copied().fold(f64::INFINITY, f64::min);
            let near: Vec<usize> = (0..GRID).filter(|&i| losses[i].is_some_and(|l| l <= least * 1.001)).collect();
            if near.len() > 1 {
                for (&i, shares) in near.iter().zip(score(&near, 0..STRATA)?) {
                    losses[i] = Some(shares.iter().sum());
                }
            }
        }

        // The first strict minimum wins.
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
        let second = losses.iter().enumerate().filter(|(i, _)| *i != best).filter_map(|(_, l)| *l);
        let second = second.fold(f64::INFINITY, f64::min);
        let margin = if second.is_finite() { (second - best_loss) / best_loss.max(f64::MIN_POSITIVE) } else { 1.0 };
        let scales = candidates[best].clone();
        Ok(Found { group, ratio, best, best_loss, margin, losses, x_max, scales })
    }
}

/// The samples that `rows` belong to: all of their rows, and where they and `rows` lie when these follow `before` others.
fn samples_of(spans: &[Span], rows: &[u32], before: usize) -> (Vec<u32>, Vec<(usize, Span)>, Vec<u32>) {
    let (mut whole, mut kept, mut moved) = (Vec::new(), Vec::new(), Vec::new());
    for (i, span) in spans.iter().enumerate() {
        let inside = span.start as u32..(span.start + span.len) as u32;
        let (start, n) = (before + whole.len(), moved.len());
        moved.extend(rows.iter().filter(|t| inside.contains(t)).map(|t| t - inside.start + start as u32));
        if moved.len() > n {
            whole.extend(inside);
            kept.push((i, Span { start, ..span.clone() }));
        }
    }
    (whole, kept, moved)
}

/// Where several query heads read one value head: the mean of x_max over them, for each of them.
fn share(block: &Block, x_max: &[f32]) -> Result<Vec<f32>> {
    let (repeats, dim) = block.head_shape();
    let mut out = x_max.to_vec();
    for part in out.chunks_mut(repeats * dim) {
        for j in 0..dim {
            let mean = (0..repeats).map(|r| part[r * dim + j]).sum::<f32>() / repeats as f32;
            (0..repeats).for_each(|r| part[r * dim + j] = mean);
        }
    }
    Ok(out)
}

/// o's input scales, as v's outputs take them.
pub fn unshare(scales: &[f32], repeats: usize, dim: usize) -> Vec<f32> {
    scales.chunks(repeats * dim).flat_map(|part| part[..dim].to_vec()).collect()
}

/// Folds a group's scales into the block: what produces x is divided, the group's columns are multiplied.
pub fn apply(block: &mut Block, group: Group, scales: &[f32]) -> Result<()> {
    let device = block.norm1.device().clone();
    let s = Tensor::from_slice(scales, scales.len(), &device)?;
    for &name in group.linears() {
        let weight = block.linear(name).weight.broadcast_mul(&s)?;
        block.linear_mut(name).weight = weight;
    }
    let producer = match group.producer() {
        Producer::AttnNorm => {
            block.norm1 = (&block.norm1 / &s)?;
            return Ok(());
        }
        Producer::MlpNorm => {
            block.norm2 = (&block.norm2 / &s)?;
            return Ok(());
        }
        Producer::Linear(name) => name,
    };
    let s = if producer == Name::V {
        let (repeats, dim) = block.head_shape();
        let s = unshare(scales, repeats, dim);
        Tensor::from_slice(&s, s.len(), &device)?
    } else {
        s
    };
    let linear = block.linear_mut(producer);
    linear.weight = linear.weight.broadcast_div(&s.unsqueeze(1)?)?;
    if let Some(bias) = &linear.bias {
        linear.bias = Some((bias / &s)?);
    }
    Ok(())
}
