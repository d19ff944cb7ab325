//! Finding the best of a group's candidates without scoring all of them on all the data.
//!
//! Candidates are scored on a growing part of the samples. After each part, those are dropped whose loss is above
//! the leader's by several standard errors of the paired difference; the rest go on, and finish on all samples.
use candle_core::Result;

/// Samples after which candidates may first be dropped.
const FIRST: usize = 4;

/// Standard errors that a difference needs before a candidate is dropped: small samples are trusted less
/// (Student's t at about 1e-3, one-sided, for 3, 7, 15 and more degrees of freedom).
fn needed(samples: usize) -> f64 {
    match samples {
        0..=5 => 10.0,
        6..=11 => 5.0,
        12..=23 => 4.0,
        _ => 3.5,
    }
}

/// Losses of `candidates` candidates, none for those that were dropped.
///
/// `score(wanted, chunks)` gives, for each wanted candidate, the loss shares of the chunks' samples, in order.
pub fn race(
    candidates: usize,
    chunks: usize,
    exhaustive: bool,
    mut score: impl FnMut(&[usize], &[usize]) -> Result<Vec<Vec<f64>>>,
) -> Result<Vec<Option<f64>>> {
    // Neighbours in the file may be alike: take chunks in an order that spreads.
    let order = spread(chunks);
    let mut alive: Vec<usize> = (0..candidates).collect();
    let mut shares: Vec<Vec<f64>> = vec![Vec::new(); candidates];
    let mut done = 0;
    let mut next = if exhaustive { chunks } else { (chunks / 16).max(FIRST.min(chunks)).max(1) };
    while done < chunks {
        let part = &order[done..next];
        for (&i, new) in alive.iter().zip(score(&alive, part)?) {
            shares[i].extend(new);
        }
        done = next;
        next = (2 * next).min(chunks);
        if done == chunks {
            break;
        }
        let total = |i: usize| shares[i].iter().sum::<f64>();
        let Some(leader) = alive.iter().copied().min_by(|&a, &b| total(a).total_cmp(&total(b))) else { break };
        let n = shares[leader].len();
        if n < FIRST {
            continue;
        }
        let left = 1.0 - done as f64 / chunks as f64;
        alive.retain(|&i| {
            let d: Vec<f64> = shares[i].iter().zip(&shares[leader]).map(|(a, b)| a - b).collect();
            let mean = d.iter().sum::<f64>() / n as f64;
            let variance = d.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
            // A NaN is kept, to be seen at the end.
            !(i != leader && mean > needed(n) * (variance / n as f64 * left).sqrt())
        });
    }
    Ok((0..candidates).map(|i| alive.contains(&i).then(|| shares[i].iter().sum())).collect())
}

/// 0..n so that every prefix is spread over the whole.
fn spread(n: usize) -> Vec<usize> {
    let bits = n.next_power_of_two().trailing_zeros();
    let reversed = (0..1usize << bits).map(|i| if bits == 0 { 0 } else { i.reverse_bits() >> (usize::BITS - bits) });
    reversed.filter(|&i| i < n).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_a_permutation() {
        for n in [1, 2, 3, 7, 24] {
            let mut order = spread(n);
            order.sort_unstable();
            assert_eq!(order, (0..n).collect::<Vec<_>>());
        }
    }

    /// Candidate 3 is best; the race must finish it exactly and score fewer shares than 20 x 64.
    #[test]
    fn finds_the_minimum_with_less_work() {
        let share = |i: usize, c: usize| {
            let noise = ((c * 7919 + i * 104729) % 97) as f64 / 97.0;
            (c % 5) as f64 + 0.3 * (i as f64 - 3.0).abs() + 0.2 * noise
        };
        let mut work = 0;
        let losses = race(20, 64, false, |wanted, chunks| {
            work += wanted.len() * chunks.len();
            Ok(wanted.iter().map(|&i| chunks.iter().map(|&c| share(i, c)).collect()).collect())
        })
        .unwrap();
        let exact: f64 = (0..64).map(|c| share(3, c)).sum();
        assert!((losses[3].unwrap() - exact).abs() < 1e-9, "{losses:?}");
        assert!(losses.iter().flatten().all(|&l| l >= losses[3].unwrap()));
        assert!(work < 20 * 64 / 2, "{work}");
    }
}
