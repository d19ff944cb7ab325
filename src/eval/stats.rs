//! The numbers of a report: Kullback-Leibler divergence, order statistics, intervals and tests. All in f64.

use crate::random::Rng;

/// A row of logits as log-probabilities: `out[i] = x[i] - log(sum(exp(x)))`, in f64.
pub fn log_softmax(logits: &[f32], out: &mut Vec<f64>) {
    let max = logits.iter().fold(f64::NEG_INFINITY, |m, x| m.max(f64::from(*x)));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - max).exp()).sum();
    let log_z = max + sum.ln();
    out.clear();
    out.extend(logits.iter().map(|x| f64::from(*x) - log_z));
}

/// KL(P || Q) in nats, from log-probabilities over the same vocabulary. Where P is 0 the term is 0.
/// Rounding can leave a sum just below 0; that is returned as 0.
pub fn kl(log_p: &[f64], log_q: &[f64]) -> f64 {
    debug_assert_eq!(log_p.len(), log_q.len());
    let sum: f64 = log_p.iter().zip(log_q).map(|(p, q)| if p.is_finite() { p.exp() * (p - q) } else { 0.0 }).sum();
    sum.max(0.0)
}

/// Position of the first largest value.
pub fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best
}

/// Mean, or NaN of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Quantile `q` in 0..=1 of sorted values with linear interpolation (numpy's default), or NaN of nothing.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = q.clamp(0.0, 1.0) * last as f64;
    let low = at.floor() as usize;
    let high = (low + 1).min(last);
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

/// A value with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Interval {
    #[serde(deserialize_with = "number")]
    pub value: f64,
    #[serde(deserialize_with = "number")]
    pub low: f64,
    #[serde(deserialize_with = "number")]
    pub high: f64,
}

/// A number that was none: JSON has neither NaN nor infinity, and null stands there.
pub(super) fn number<'de, D: serde::Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    Ok(<Option<f64> as serde::Deserialize>::deserialize(d)?.unwrap_or(f64::NAN))
}

/// What one question adds to a ratio of sums: the sum of a quantity over its positions, and their number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cluster {
    pub sum: f64,
    pub count: f64,
}

/// sum / count over all clusters with a 95 % percentile bootstrap interval that draws whole questions
/// (positions of one answer depend on each other). NaN of nothing.
pub fn bootstrap(clusters: &[Cluster], resamples: usize, seed: u64) -> Interval {
    let ratio = |sum: f64, count: f64| sum / count;
    let all = clusters.iter().fold((0.0, 0.0), |a, c| (a.0 + c.sum, a.1 + c.count));
    let value = ratio(all.0, all.1);
    if clusters.is_empty() {
        return Interval { value, low: f64::NAN, high: f64::NAN };
    }
    let mut rng = Rng::new(seed);
    let mut draws: Vec<f64> = (0..resamples)
        .map(|_| {
            let (mut sum, mut count) = (0.0, 0.0);
            for _ in 0..clusters.len() {
                let c = clusters[rng.below(clusters.len())];
                sum += c.sum;
                count += c.count;
            }
            ratio(sum, count)
        })
        .collect();
    draws.retain(|d| d.is_finite());
    draws.sort_by(f64::total_cmp);
    Interval { value, low: quantile(&draws, 0.025), high: quantile(&draws, 0.975) }
}

/// Exact two-sided McNemar test: `b` and `c` are the questions that only the one and only the other got right.
/// The binomial probability at 1/2 of a split at least as uneven.
pub fn mcnemar(b: usize, c: usize) -> f64 {
    let n = b + c;
    let k = b.min(c);
    // Sum of C(n, i) / 2^n for i <= k, in logarithms: 2^-n underflows for n > 1074.
    let mut log_term = -(n as f64) * std::f64::consts::LN_2;
    let mut sum = log_term.exp();
    for i in 1..=k {
        log_term += ((n - i + 1) as f64).ln() - (i as f64).ln();
        sum += log_term.exp();
    }
    (2.0 * sum).min(1.0)
}

/// Two-sided paired sign-flip test that the mean of `differences` is 0: all 2^n sign patterns up to n = 16,
/// otherwise `rounds` random patterns, where the observed one counts as one more.
pub fn sign_flip(differences: &[f64], rounds: usize, seed: u64) -> f64 {
    let n = differences.len();
    if n == 0 {
        return 1.0;
    }
    // A flipped sum as large as the observed one, up to the rounding of a sum in another order.
    let scale: f64 = differences.iter().map(|d| d.abs()).sum();
    let observed = differences.iter().sum::<f64>().abs() - 1e-12 * scale;
    let extreme = |bit: &mut dyn FnMut(usize) -> bool| {
        let sum: f64 = differences.iter().enumerate().map(|(i, d)| if bit(i) { -d } else { *d }).sum();
        sum.abs() >= observed
    };
    if n <= 16 {
        let all = 1u32 << n;
        let count = (0..all).filter(|p| extreme(&mut |i| p >> i & 1 == 1)).count();
        return count as f64 / f64::from(all);
    }
    let mut rng = Rng::new(seed);
    let mut word = 0;
    let count = (0..rounds)
        .filter(|_| {
            extreme(&mut |i| {
                if i % 64 == 0 {
                    word = rng.next_u64();
                }
                word >> (i % 64) & 1 == 1
            })
        })
        .count();
    (count + 1) as f64 / (rounds + 1) as f64
}

/// Holm's step-down adjustment of p-values, in the order given.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*a].total_cmp(&p[*b]));
    let mut adjusted = vec![0.0; p.len()];
    let mut floor = 0f64;
    for (rank, index) in order.into_iter().enumerate() {
        floor = floor.max(p[index] * (p.len() - rank) as f64).min(1.0);
        adjusted[index] = floor;
    }
    adjusted
}
