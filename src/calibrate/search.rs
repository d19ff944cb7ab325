//! The search for a block's scales ([`super::mbq`]): which groups, on which inputs, and how candidates are scored.
use super::CalibrateOptions;
use super::batch::{Batch, Kind};
use super::budget::Budget;
use super::gather::{ScoredRows, Wanted, pieces};
use super::grid::Activations;
use super::keys::Keys;
use super::mbq::{FoundScales, GRID, Loss, Ratios, candidate, scales, token_weight};
use super::pass::{Keep, Pass};
use super::race::{BY_QUERY, BY_SAMPLE, BY_TOKEN, STRATA, deal, deal_samples, race};
use super::scaling::{apply, share};
use super::stream::Stream;
use crate::text::ops::{Fast, each, over_row, row_errors};
use crate::text::{Block, Group, Linear, LinearName};
use candle_core::{Result, Tensor};
use std::collections::BTreeMap;
use std::ops::Range;

/// The search, as a run's options and budget have it.
#[derive(Clone, Copy)]
pub struct Search<'a> {
    pub options: &'a CalibrateOptions<'a>,
    pub(super) budget: &'a Budget,
}

impl Search<'_> {
    /// Whether v's outputs are o's inputs one to one, or can be made so by sharing.
    fn folds(&self, block: &Block) -> Result<bool> {
        Ok(self.options.share_heads
            || block.linear(LinearName::V).weight.dim(0)? == block.linear(LinearName::O).weight.dim(1)?)
    }

    /// The group's output at the piece's rows, with candidate linears `q`; all others are in full precision.
    fn output(
        &self,
        block: &Block,
        group: Group,
        (candidate, q, s): (usize, &[Linear], &Tensor),
        piece: &ScoredRows,
        keys: &Keys,
    ) -> Result<Tensor> {
        let scaled = |x: &Tensor| match self.options.activations {
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
            return block.linear(LinearName::O).forward(&o_in);
        }
        match group {
            Group::GateUp => {
                block.linear(LinearName::Down).forward(&block.activate(q[0].forward(&x)?, &q[1].forward(&x)?)?)
            }
            Group::Qkv | Group::O | Group::Down => q[0].forward(&x),
        }
    }

    /// The finished block: every linear quantised.
    pub fn quantise(&self, block: &Block) -> Result<Block> {
        let mut q = block.clone();
        for name in LinearName::ALL {
            q.linear_mut(name).weight = self.options.weights.round_trip(&block.linear(name).weight)?;
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
    ) -> Result<Vec<FoundScales>> {
        let mut found: Vec<FoundScales> = Vec::new();
        for group in Group::ALL {
            if group == Group::O && !self.folds(block)? {
                continue;
            }
            let ratio = ratios.map(|r| group.ratio(r));
            let Some(x_q) = x_q else {
                found.push(self.group(block, batch, group, (full, full), ratio)?);
                continue;
            };
            // Later groups see the scales found so far, all linears quantised.
            let mut scaled = block.clone();
            found.iter().try_for_each(|f| apply(&mut scaled, f.group, &f.scales))?;
            let q = self.quantise(&scaled)?;
            let seen =
                Pass::run(&q, batch, x_q, self.options.activations, self.keep(block)?, self.budget.at_once, |_, _| {
                    Ok(())
                })?;
            found.push(self.group(block, batch, group, (full, &seen), ratio)?);
        }
        Ok(found)
    }

    /// What the search needs of a pass.
    pub fn keep(&self, block: &Block) -> Result<Keep> {
        let down_in = block.norm1.device().is_cpu();
        Ok(Keep { o_in: self.folds(block)?, outputs: true, sums: true, down_in, ..Keep::default() })
    }

    /// Scores the candidates of one group: `full` is the pass whose outputs are the targets, `seen` the one whose inputs
    /// candidates get.
    fn group(
        &self,
        block: &Block,
        batch: &Batch,
        group: Group,
        (full, seen): (&Pass, &Pass),
        ratio: Option<f64>,
    ) -> Result<FoundScales> {
        let x_max = seen.mean(group);
        let shared = if group == Group::O { share(block, &x_max)? } else { x_max.clone() };
        let candidates: Vec<Vec<f32>> = (0..GRID).map(|i| scales(&shared, i as f32 / GRID as f32)).collect();
        let (strata, rounds) = match group {
            _ if self.options.exhaustive => (deal(batch), &[STRATA][..]),
            Group::Qkv if batch.samples >= 12 => (deal_samples(batch), BY_SAMPLE),
            Group::Qkv => (deal(batch), BY_QUERY),
            _ => (deal(batch), BY_TOKEN),
        };
        let floats: usize = group.linears().iter().map(|&n| block.linear(n).weight.elem_count()).sum();
        let mut scorer = Scorer {
            search: self,
            block,
            batch,
            group,
            passes: (full, seen),
            ratio,
            candidates: &candidates,
            strata,
            kept: BTreeMap::new(),
            room: if self.options.exhaustive { 0 } else { self.budget.kept / (4 * floats).max(1) },
            keys: Keys::new(if self.options.exhaustive { 0 } else { self.budget.keys }),
        };
        // In TF32 a product is off by 3e-4, the rounding of weights by 1e-1: errors add up in squares, so candidates
        // differ in the sixth digit. Those that are nearer to each other than a thousandth are scored again in f32.
        let fast = Fast::on(&block.norm1).filter(|_| !self.options.exhaustive);
        let mut losses = race(GRID, rounds, |wanted, part| scorer.score(wanted, part))?;
        if fast.is_some() {
            drop(fast);
            let least = losses.iter().flatten().copied().fold(f64::INFINITY, f64::min);
            let near: Vec<usize> = (0..GRID).filter(|&i| losses[i].is_some_and(|l| l <= least * 1.001)).collect();
            if near.len() > 1 {
                for (&i, shares) in near.iter().zip(scorer.score(&near, 0..STRATA)?) {
                    losses[i] = Some(shares.iter().sum());
                }
            }
        }
        FoundScales::least(group, ratio, losses, x_max, &candidates)
    }
}

/// The candidates of one group and what of them is kept from round to round.
struct Scorer<'s, 'a> {
    search: &'s Search<'a>,
    block: &'s Block,
    batch: &'s Batch,
    group: Group,
    passes: (&'s Pass<'s>, &'s Pass<'s>),
    ratio: Option<f64>,
    candidates: &'s [Vec<f32>],
    strata: Vec<Vec<usize>>,
    /// Quantised weights of candidates that race on, so many at most.
    kept: BTreeMap<usize, Vec<Linear>>,
    room: usize,
    keys: Keys,
}

impl Scorer<'_, '_> {
    /// Each wanted candidate's loss at strata `part`, by sample.
    fn score(&mut self, wanted: &[usize], part: Range<usize>) -> Result<Vec<Vec<f64>>> {
        self.kept.retain(|i, _| wanted.contains(i));
        self.keys.retain(wanted);
        let (batch, group, strata) = (self.batch, self.group, std::mem::take(&mut self.strata));
        let channels = self.block.norm1.elem_count();
        let (loss, ratio) = (self.search.options.loss, self.ratio);
        let weight = |kind: Kind| token_weight(kind, batch, channels, loss, ratio);
        let rows = Wanted { group, strata: &strata, part, weight: &weight };
        let mut shares = vec![vec![0.0; batch.samples]; wanted.len()];
        let at_once = self.room.max(self.search.budget.at_once);
        pieces(&rows, batch, self.passes, self.search.budget.gather, |pieces| {
            let parts = wanted.chunks(at_once).zip(shares.chunks_mut(at_once));
            parts.into_iter().try_for_each(|(wanted, shares)| self.add(wanted, pieces, shares))
        })?;
        self.strata = strata;
        Ok(shares)
    }

    /// Adds the pieces' errors.
    fn add(&mut self, wanted: &[usize], pieces: &[ScoredRows], shares: &mut [Vec<f64>]) -> Result<()> {
        let (options, at_once) = (self.search.options, self.search.budget.at_once);
        let q = each(wanted.len(), at_once, |i| {
            let s = &self.candidates[wanted[i]];
            let s = Tensor::from_slice(s, s.len(), self.block.norm1.device())?;
            let q = match self.kept.get(&wanted[i]) {
                Some(q) => q.clone(),
                None => candidate(self.block, self.group, &s, options.weights, options.activations)?,
            };
            Ok((q, s))
        })?;
        for (&i, (q, _)) in wanted.iter().zip(&q) {
            if self.kept.len() < self.room {
                self.kept.insert(i, q.clone());
            }
        }
        let n = pieces.len();
        let errors = each(wanted.len() * n, at_once, |i| {
            let ((q, s), piece) = (&q[i / n], &pieces[i % n]);
            let out = self.search.output(self.block, self.group, (wanted[i / n], q, s), piece, &self.keys)?;
            row_errors(&piece.target, &out, self.search.options.loss == Loss::Mse)
        })?;
        for (i, errors) in errors.into_iter().enumerate() {
            let owners = pieces[i % n].owners.iter().zip(errors.values()?);
            owners.for_each(|(&(sample, weight), e)| shares[i / n][sample] += weight * e);
        }
        Ok(())
    }
}
