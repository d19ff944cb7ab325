//! The rows of a pass that a group's loss is made of, gathered into pieces that are worth multiplying.
use super::batch::{Batch, Kind};
use super::pass::Pass;
use crate::text::ops::select_rows;
use crate::text::{Group, Span};
use candle_core::{Result, Tensor};
use std::ops::Range;

/// Rows that are multiplied at once, at least, where there are as many.
const ROWS: usize = 1024;

/// Rows of a group's input and target, of one chunk or of several.
pub(super) struct ScoredRows {
    pub x: Tensor,
    pub target: Tensor,
    /// Of each row: its sample, and its weight in the loss.
    pub owners: Vec<(usize, f64)>,
    pub attention: Option<AttentionRows>,
}

/// What attention needs beside a piece's rows.
pub(super) struct AttentionRows {
    /// The whole input of the rows' samples.
    pub all: Tensor,
    /// These samples: where they are in it, and their numbers in the batch.
    pub spans: Vec<Span>,
    pub samples: Vec<usize>,
    /// Which of its rows are the piece's.
    pub rows: Vec<u32>,
}

impl ScoredRows {
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

/// Which rows are gathered.
pub(super) struct Wanted<'w> {
    pub group: Group,
    /// The stratum of each token, by chunk, and those that are wanted.
    pub strata: &'w [Vec<usize>],
    pub part: Range<usize>,
    /// Of a token in the loss.
    pub weight: &'w dyn Fn(Kind) -> f64,
}

impl Gather {
    /// Adds chunk `c`, whose first sample is number `first` of the batch.
    fn add(
        &mut self,
        wanted: &Wanted,
        batch: &Batch,
        c: usize,
        first: usize,
        (full, seen): (&Pass, &Pass),
    ) -> Result<()> {
        let chunk = &batch.chunks[c];
        let weight = |t: usize| (wanted.weight)(chunk.kinds[t]);
        let takes = |t: &usize| wanted.part.contains(&wanted.strata[c][*t]) && weight(*t) != 0.0;
        let rows: Vec<u32> = (0..chunk.tokens()).filter(takes).map(|t| t as u32).collect();
        for (i, span) in chunk.spans.iter().enumerate() {
            let of_span = rows.iter().filter(|&&t| (span.start..span.start + span.len).contains(&(t as usize)));
            self.owners.extend(of_span.map(|&t| (first + i, weight(t as usize))));
        }
        // Devices have no tensors without elements.
        if rows.is_empty() {
            return Ok(());
        }
        self.target.push(full.target(wanted.group, c, &rows)?);
        // Attention needs the keys of whole samples.
        let whole = match wanted.group {
            Group::Qkv => {
                let (whole, spans, rows) = samples_of(&chunk.spans, &rows, self.len);
                self.samples.extend(spans.iter().map(|(i, _)| first + i));
                self.spans.extend(spans.into_iter().map(|(_, span)| span));
                self.rows.extend(rows);
                whole
            }
            _ => rows,
        };
        self.len += whole.len();
        self.source.push(seen.source(wanted.group, c, &whole)?);
        Ok(())
    }

    fn piece(self, group: Group, seen: &Pass) -> Result<ScoredRows> {
        let Gather { source, target, owners, spans, samples, rows, .. } = self;
        let all = seen.input(group, &Tensor::cat(&source, 0)?)?;
        let (x, attention) = match group {
            Group::Qkv => (select_rows(&all, &rows)?, Some(AttentionRows { all, spans, samples, rows })),
            _ => (all, None),
        };
        Ok(ScoredRows { x, target: Tensor::cat(&target, 0)?, owners, attention })
    }
}

/// Gathers the wanted rows piece by piece: targets of the pass `full`, inputs of the pass `seen`. `done` gets as many
/// pieces at once as fit in `room` bytes, one at least.
pub(super) fn pieces(
    wanted: &Wanted,
    batch: &Batch,
    (full, seen): (&Pass, &Pass),
    room: usize,
    mut done: impl FnMut(&[ScoredRows]) -> Result<()>,
) -> Result<()> {
    let mut pieces: Vec<ScoredRows> = Vec::new();
    let mut bytes = 0;
    let (mut first, mut open) = (0, Gather::default());
    for (c, chunk) in batch.chunks.iter().enumerate() {
        open.add(wanted, batch, c, first, (full, seen))?;
        first += chunk.spans.len();
        // Small parts of chunks are multiplied together.
        let last = c + 1 == batch.chunks.len();
        if (open.len >= ROWS || last) && !open.owners.is_empty() {
            let piece = std::mem::take(&mut open).piece(wanted.group, seen)?;
            bytes += piece.bytes();
            pieces.push(piece);
        }
        if !pieces.is_empty() && (bytes >= room || last) {
            done(&pieces)?;
            pieces.clear();
            bytes = 0;
        }
    }
    Ok(())
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
