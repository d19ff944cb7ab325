//! Modality-balanced quantization (MBQ, arXiv 2412.19509), and AWQ's search (arXiv 2306.00978) as its special case
//! without weights. This file follows the authors' code; the numbers of both are compared in `tests.rs`.
//!
//! A group of linears that share an input x, and what produces x, can be scaled without changing the function: the
//! columns of W by s, the producer's output by 1/s. Per group, s = x_max^a is searched over 20 exponents a; the
//! winner loses least against the full-precision output when W is quantised, where errors at vision tokens weigh r
//! times those at answer tokens. r is how much less the model's loss minds them (see [`super::sensitivity`]).
use super::batch::{Batch, Kind};
use super::grid::{Activations, WeightGrid};
use super::race::{BY_QUERY, BY_TOKEN, STRATA, deal, race};
use super::sensitivity::Ratios;
use crate::model::decoder::{Block, Linear, Name, Span, Trace};
use crate::model::ops::{column_abs, row_errors, silu_mul};
use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

/// Exponents a = i / 20.
pub const GRID: usize = 20;

/// What is scaled together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Group {
    /// input_layernorm -> q, k, v; error at the attention's output.
    Qkv,
    /// v -> o; error at o's output. Only where v has as many outputs as o has inputs, or with `share_heads`.
    O,
    /// post_attention_layernorm -> gate, up; error at the MLP's output.
    GateUp,
    /// up -> down; error at down's output.
    Down,
}

impl Group {
    /// In the order of the search.
    pub const ALL: [Group; 4] = [Group::Qkv, Group::O, Group::GateUp, Group::Down];

    pub fn linears(self) -> &'static [Name] {
        match self {
            Group::Qkv => &[Name::Q, Name::K, Name::V],
            Group::O => &[Name::O],
            Group::GateUp => &[Name::Gate, Name::Up],
            Group::Down => &[Name::Down],
        }
    }

    /// The input x of the group's linears.
    fn input(self, t: &Trace) -> &Tensor {
        match self {
            Group::Qkv => &t.attn_in,
            Group::O => &t.o_in,
            Group::GateUp => &t.mlp_in,
            Group::Down => &t.down_in,
        }
    }

    /// The output on which errors are measured.
    fn target(self, t: &Trace) -> &Tensor {
        match self {
            Group::Qkv | Group::O => &t.attn_out,
            Group::GateUp | Group::Down => &t.mlp_out,
        }
    }

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
    /// For attention: the chunk's whole input, its samples, and which of its rows are in `x`.
    context: Tensor,
    spans: Vec<Span>,
    rows: Vec<u32>,
}

/// A piece in the making.
#[derive(Default)]
struct Gather {
    x: Vec<Tensor>,
    target: Vec<Tensor>,
    owners: Vec<(usize, f64)>,
}

/// Rows `rows` of `x`, in order; not copied when they are all of them.
fn pick(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    if rows.len() == x.dim(0)? { Ok(x.clone()) } else { x.index_select(&Tensor::new(rows, x.device())?, 0) }
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

/// Mean |x| per channel over all tokens, padding and prompt included.
fn x_max<'a>(inputs: impl Iterator<Item = Result<&'a Tensor>>) -> Result<Vec<f32>> {
    let (mut sum, mut rows) = (Vec::new(), 0);
    for x in inputs {
        let x = x?;
        rows += x.dim(0)?;
        let (part, _) = column_abs(x)?;
        sum.resize(part.len(), 0.0);
        sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
    }
    Ok(sum.into_iter().map(|s| (s / rows as f64) as f32).collect())
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
    /// A group's linears with W' = Q(W s) / s, or Q(W s) where activations are divided by s instead.
    fn candidate(&self, block: &Block, group: Group, s: &Tensor) -> Result<Vec<Linear>> {
        let quantised = group.linears().iter().map(|&name| {
            let linear = block.linear(name);
            let weight = self.weights.round_trip(&linear.weight.broadcast_mul(s)?)?;
            let weight = if self.activations == Activations::Float { weight.broadcast_div(s)? } else { weight };
            Ok(Linear { weight, bias: linear.bias.clone() })
        });
        quantised.collect()
    }

    /// The group's output at the piece's rows, with candidate linears `q`; all others are in full precision.
    fn output(&self, block: &Block, group: Group, q: &[Linear], s: &Tensor, piece: &Piece) -> Result<Tensor> {
        let scaled = |x: &Tensor| match self.activations {
            Activations::Float => Ok(x.clone()),
            quantiser => quantiser.apply(&x.broadcast_div(s)?),
        };
        let x = scaled(&piece.x)?;
        match group {
            Group::Qkv => {
                // Keys and values of all tokens, queries of the rows alone.
                let all = scaled(&piece.context)?;
                let (k, v) = (q[1].forward(&all)?, q[2].forward(&all)?);
                let o_in = block.attend_at(&q[0].forward(&x)?, &k, &v, &piece.spans, Some(&piece.rows))?;
                block.linear(Name::O).forward(&o_in)
            }
            Group::GateUp => block.linear(Name::Down).forward(&silu_mul(q[0].forward(&x)?, &q[1].forward(&x)?)?),
            Group::O | Group::Down => q[0].forward(&x),
        }
    }

    /// The rows that strata `part` of the batch put into `group`'s loss, gathered.
    fn pieces(
        &self,
        group: Group,
        batch: &Batch,
        (traces, seen): (&[Trace], &[Trace]),
        strata: &[Vec<usize>],
        part: &Range<usize>,
        weight: &dyn Fn(Kind) -> f64,
    ) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let (mut first, mut open) = (0, Gather::default());
        for (c, chunk) in batch.chunks.iter().enumerate() {
            let wanted = |t: &usize| part.contains(&strata[c][*t]) && weight(chunk.kinds[*t]) != 0.0;
            let rows: Vec<u32> = (0..chunk.tokens()).filter(wanted).map(|t| t as u32).collect();
            for (i, span) in chunk.spans.iter().enumerate() {
                let of_span = rows.iter().filter(|&&t| (span.start..span.start + span.len).contains(&(t as usize)));
                open.owners.extend(of_span.map(|&t| (first + i, weight(chunk.kinds[t as usize]))));
            }
            first += chunk.spans.len();
            open.x.push(pick(group.input(&seen[c]), &rows)?);
            open.target.push(pick(group.target(&traces[c]), &rows)?);
            // Attention needs its own chunk's keys; elsewhere small parts of chunks are multiplied together.
            let context = (group == Group::Qkv).then(|| group.input(&seen[c]).clone());
            if context.is_some() || open.owners.len() >= ROWS || c + 1 == batch.chunks.len() {
                let done = std::mem::take(&mut open);
                if !done.owners.is_empty() {
                    let x = Tensor::cat(&done.x, 0)?;
                    pieces.push(Piece {
                        context: context.unwrap_or_else(|| x.clone()),
                        x,
                        target: Tensor::cat(&done.target, 0)?,
                        owners: done.owners,
                        spans: chunk.spans.clone(),
                        rows,
                    });
                }
            }
        }
        Ok(pieces)
    }

    /// The finished block: every linear quantised.
    pub fn quantise(&self, block: &Block) -> Result<Block> {
        let mut q = block.clone();
        for name in Name::ALL {
            q.linear_mut(name).weight = self.weights.round_trip(&block.linear(name).weight)?;
        }
        Ok(q)
    }

    /// Searches the block's groups. `x` holds the chunks' inputs, `x_q` those of the quantised stream (with
    /// `distort`). `traces` are the full-precision passes over x.
    pub fn block(
        &self,
        block: &Block,
        batch: &Batch,
        traces: &[Trace],
        x_q: Option<&[Tensor]>,
        ratios: Option<Ratios>,
    ) -> Result<Vec<Found>> {
        let mut found: Vec<Found> = Vec::new();
        for group in Group::ALL {
            if group == Group::O && !folds(block, self.share_heads)? {
                continue;
            }
            // Later groups see the scales found so far, all linears quantised.
            let distorted = match x_q {
                None => None,
                Some(x_q) => {
                    let mut scaled = block.clone();
                    found.iter().try_for_each(|f| apply(&mut scaled, f.group, &f.scales))?;
                    let q = self.quantise(&scaled)?;
                    let pass = batch.chunks.iter().zip(x_q);
                    let pass = pass.map(|(c, x)| q.trace(x, &c.spans, &|x| self.activations.apply(x)));
                    Some(pass.collect::<Result<Vec<Trace>>>()?)
                }
            };
            let seen: &[Trace] = distorted.as_deref().unwrap_or(traces);
            let ratio = ratios.map(|r| group.ratio(r));
            found.push(self.group(block, batch, group, traces, seen, ratio)?);
        }
        Ok(found)
    }

    fn group(
        &self,
        block: &Block,
        batch: &Batch,
        group: Group,
        traces: &[Trace],
        seen: &[Trace],
        ratio: Option<f64>,
    ) -> Result<Found> {
        let x_max = x_max(seen.iter().map(|t| Ok(group.input(t))))?;
        let shared = if group == Group::O { share(block, &x_max)? } else { x_max.clone() };
        let candidates: Vec<Vec<f32>> = (0..GRID).map(|i| scales(&shared, i as f32 / GRID as f32)).collect();
        let channels = group.target(&traces[0]).dim(1)?;
        let weight = |kind: Kind| token_weight(kind, batch, channels, self.loss, ratio);

        let strata = deal(batch);
        let rounds = match group {
            _ if self.exhaustive => &[STRATA][..],
            Group::Qkv => BY_QUERY,
            _ => BY_TOKEN,
        };
        // Quantised weights of candidates that race on, as far as they fit.
        let mut kept: BTreeMap<usize, Vec<Linear>> = BTreeMap::new();
        let floats: usize = group.linears().iter().map(|&n| block.linear(n).weight.elem_count()).sum();
        let room = if self.exhaustive { 0 } else { self.memory / (4 * floats).max(1) };
        let score = |wanted: &[usize], part: Range<usize>| -> Result<Vec<Vec<f64>>> {
            let pieces = self.pieces(group, batch, (traces, seen), &strata, &part, &weight)?;
            kept.retain(|i, _| wanted.contains(i));
            let mut scores = Vec::new();
            for &i in wanted {
                let s = Tensor::from_slice(&candidates[i], candidates[i].len(), block.norm1.device())?;
                let q = match kept.get(&i) {
                    Some(q) => q.clone(),
                    None => self.candidate(block, group, &s)?,
                };
                if kept.len() < room {
                    kept.insert(i, q.clone());
                }
                let mut shares = vec![0.0; batch.samples];
                for piece in &pieces {
                    let out = self.output(block, group, &q, &s, piece)?;
                    let errors = row_errors(&piece.target, &out, self.loss == Loss::Mse)?;
                    piece.owners.iter().zip(errors).for_each(|(&(sample, weight), e)| shares[sample] += weight * e);
                }
                scores.push(shares);
            }
            Ok(scores)
        };
        let losses = race(GRID, rounds, score)?;

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

/// Whether v's outputs are o's inputs one to one, or can be made so by sharing.
fn folds(block: &Block, share_heads: bool) -> Result<bool> {
    Ok(share_heads || block.linear(Name::V).weight.dim(0)? == block.linear(Name::O).weight.dim(1)?)
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
    let producer = match group {
        Group::Qkv => {
            block.norm1 = (&block.norm1 / &s)?;
            return Ok(());
        }
        Group::GateUp => {
            block.norm2 = (&block.norm2 / &s)?;
            return Ok(());
        }
        Group::O => Name::V,
        Group::Down => Name::Up,
    };
    let s = if group == Group::O {
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
