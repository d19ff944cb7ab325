//! Finding the best of a group's candidates without scoring all of them on all the data.
//!
//! Every sample's tokens are dealt into [`STRATA`] strata. Candidates are scored on a growing number of strata; after
//! each round those are dropped whose loss is above the leader's by several standard errors of the paired difference
//! over the samples. The rest go on and finish on all tokens, so the winner's loss is exact.
use super::batch::{Batch, Kind};
use candle_core::Result;
use std::ops::Range;

/// Into how many parts each sample's tokens are dealt.
pub const STRATA: usize = 32;

/// Strata that are scored after each round, where a token's error stands alone (all groups but q, k, v).
pub const BY_TOKEN: &[usize] = &[1, 2, 4, 8, 16, 24, STRATA];

/// For q, k, v where samples are few: each round may compute all keys and values again.
pub const BY_QUERY: &[usize] = &[4, 12, STRATA];

/// The same for [`deal_samples`]: a quarter of the tokens of one quarter of the samples, of two; half of the tokens of
/// two, of three, of all; the rest.
pub const BY_SAMPLE: &[usize] = &[2, 4, 8, 12, 16, 24, STRATA];

/// By how much a candidate must be able to beat the leader to stay, relative.
const TIE: f64 = 1e-3;

/// Standard errors that a difference needs before a candidate is dropped: Student's t for about 3 in 1000, one-sided,
/// with one degree of freedom less than there are samples. What is dropped wrongly at that rate is a candidate as
/// good as the leader; one that is better by the margins that matter is so more rarely.
fn needed(samples: usize) -> f64 {
    match samples {
        0..=2 => f64::INFINITY,
        3 => 15.0,
        4 => 7.0,
        5..=6 => 5.0,
        7..=11 => 4.0,
        12..=23 => 3.3,
        _ => 3.0,
    }
}

/// The stratum of each token, by chunk. Tokens of a kind are dealt in turn, so that every stratum sees the whole of
/// every sample: its vision tokens, its answer, its prompt.
pub fn deal(batch: &Batch) -> Vec<Vec<usize>> {
    let mut samples = 0;
    let mut of_chunk = |kinds: &[Kind], spans: &[crate::text::Span]| {
        let mut strata = vec![0; kinds.len()];
        for span in spans {
            // Where dealing starts differs by sample, else the first strata would get all the short answers' tokens.
            let mut next = [samples * 11; 3];
            for at in span.start..span.start + span.len {
                let n = &mut next[kinds[at] as usize];
                strata[at] = ((*n % STRATA) as u32).reverse_bits() as usize >> (u32::BITS - STRATA.trailing_zeros());
                *n += 1;
            }
            samples += 1;
        }
        strata
    };
    batch.chunks.iter().map(|c| of_chunk(&c.kinds, &c.spans)).collect()
}

/// As [`deal`], but strata 0 to 15 are of one quarter of the samples each, those after them of all in turn: few keys and
/// values for the first rounds. After each round of [`BY_SAMPLE`] the samples that were seen were seen alike.
pub fn deal_samples(batch: &Batch) -> Vec<Vec<usize>> {
    const OF: [[usize; 8]; 4] = [
        [0, 1, 4, 5, 16, 20, 24, 28],
        [2, 3, 6, 7, 17, 21, 25, 29],
        [8, 9, 10, 11, 18, 22, 26, 30],
        [12, 13, 14, 15, 19, 23, 27, 31],
    ];
    let mut strata = deal(batch);
    let mut sample = 0u32;
    for (chunk, strata) in batch.chunks.iter().zip(&mut strata) {
        for span in &chunk.spans {
            // Spread evenly whatever the samples' order.
            let quarter = &OF[(sample.wrapping_mul(0x9e37_79b9) >> 30) as usize];
            strata[span.start..span.start + span.len].iter_mut().for_each(|s| *s = quarter[*s / 4]);
            sample += 1;
        }
    }
    strata
}

/// Drops those that lose to the leader after `done` strata.
fn prune(alive: &mut Vec<usize>, shares: &[Vec<f64>], done: usize) {
    let total = |i: usize| shares[i].iter().sum::<f64>();
    let Some(leader) = alive.iter().copied().min_by(|&a, &b| total(a).total_cmp(&total(b))) else { return };
    let scored: Vec<usize> = (0..shares[leader].len()).filter(|&s| shares[leader][s] != 0.0).collect();
    let n = scored.len();
    if done == STRATA || n < 3 {
        return;
    }
    let left = 1.0 - done as f64 / STRATA as f64;
    let tie = TIE * total(leader) / n as f64;
    alive.retain(|&i| {
        let d: Vec<f64> = scored.iter().map(|&s| shares[i][s] - shares[leader][s]).collect();
        let mean = d.iter().sum::<f64>() / n as f64;
        let variance = d.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
        // A NaN is kept, to be seen at the end.
        !(i != leader && mean + tie > needed(n) * (variance / n as f64 * left).sqrt())
    });
}

/// Losses of `candidates` candidates, none for those that were dropped.
///
/// `score(wanted, strata)` gives, for each wanted candidate, every sample's share of the loss at those strata, 0 for
/// samples that have no token there.
pub fn race(
    candidates: usize,
    rounds: &[usize],
    mut score: impl FnMut(&[usize], Range<usize>) -> Result<Vec<Vec<f64>>>,
) -> Result<Vec<Option<f64>>> {
    // Every other candidate first, where some can be dropped; of the rest those that are beside one that is left.
    let (mut alive, mut rest): (Vec<usize>, Vec<usize>) = (0..candidates).partition(|i| rounds.len() < 2 || i % 2 == 0);
    let mut shares: Vec<Vec<f64>> = vec![Vec::new(); candidates];
    let mut done = 0;
    for &end in rounds {
        let mut add = |wanted: &[usize], shares: &mut [Vec<f64>]| -> Result<()> {
            for (&i, new) in wanted.iter().zip(score(wanted, done..end)?) {
                shares[i].resize(new.len(), 0.0);
                shares[i].iter_mut().zip(new).for_each(|(sum, v)| *sum += v);
            }
            Ok(())
        };
        add(&alive, &mut shares)?;
        prune(&mut alive, &shares, end);
        rest.retain(|&i| alive.contains(&(i - 1)) || alive.contains(&(i + 1)));
        if !rest.is_empty() {
            add(&rest, &mut shares)?;
            alive.append(&mut rest);
            alive.sort_unstable();
            prune(&mut alive, &shares, end);
        }
        done = end;
    }
    Ok((0..candidates).map(|i| alive.contains(&i).then(|| shares[i].iter().sum())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::batch::Chunk;
    use crate::text::Span;

    /// Every stratum gets its part of every kind, to within one token of a sample.
    #[test]
    fn strata_are_even() {
        let kinds =
            (0..330).map(|i| [Kind::Other, Kind::Vision, Kind::Answer][usize::from(i >= 10) + usize::from(i >= 266)]);
        let kinds: Vec<Kind> = kinds.collect();
        let spans = vec![Span::new(0, 330)];
        let chunk = Chunk::new(spans, kinds.clone(), vec![0; 330]);
        let chunks = vec![chunk.clone(), chunk];
        let batch = Batch { chunks, samples: 2, vision: 512, answer: 128, tokens: 660, longest: 330 };
        for strata in deal(&batch) {
            for s in 0..STRATA {
                let of = |kind: Kind| (0..330).filter(|&i| strata[i] == s && kinds[i] == kind).count();
                assert_eq!((of(Kind::Vision), of(Kind::Answer)), (8, 2));
                assert!(of(Kind::Other) <= 1);
            }
        }
    }

    /// Candidate 3 is best; the race must finish it exactly and score fewer shares than 20 x 32.
    #[test]
    fn finds_the_minimum_with_less_work() {
        let share = |i: usize, sample: usize, stratum: usize| {
            let noise = ((sample * 7919 + stratum * 31 + i * 104729) % 97) as f64 / 97.0;
            (sample % 5) as f64 + 0.3 * (i as f64 - 3.0).abs() + 0.2 * noise
        };
        let of = |i: usize, c: usize, strata: Range<usize>| strata.map(|s| share(i, c, s)).sum::<f64>();
        let mut work = 0;
        let losses = race(20, BY_TOKEN, |wanted, strata| {
            work += wanted.len() * strata.len();
            Ok(wanted.iter().map(|&i| (0..24).map(|c| of(i, c, strata.clone())).collect()).collect())
        })
        .unwrap();
        let exact: f64 = (0..24).map(|c| of(3, c, 0..STRATA)).sum();
        assert!((losses[3].unwrap() - exact).abs() < 1e-9, "{losses:?}");
        assert!(losses.iter().flatten().all(|&l| l >= losses[3].unwrap()));
        assert!(work < 20 * STRATA / 2, "{work}");
    }
}
