//! Log-probabilities of the reference in 16 bits a token.
//!
//! A row holds `lowest`, `step` (f32) and one u16 for each token: 0 for probability 0, code c >= 1
//! for `lowest + step * (c - 1)`. Codes span the row's own range, at most [`RANGE`] nats below its
//! top; what lies deeper (probability below e^-64 of the top's) is raised to that floor. Within the
//! range a log-probability is off by at most step / 2 <= 64 / 65534 / 2 = 4.9e-4 nats. A decoded
//! row is normalised again, so for the divergence of the original from itself Hoeffding's lemma
//! bounds what quantisation adds by step^2 / 8 <= [`SELF_KL_BOUND`].

/// Nats below the top that a row keeps.
pub const RANGE: f64 = 64.0;
/// Largest error of one log-probability within the range, in nats.
pub const LOG_PROB_ERROR: f64 = RANGE / 65534.0 / 2.0;
/// Upper bound of KL(decoded row || its original).
pub const SELF_KL_BOUND: f64 = (2.0 * LOG_PROB_ERROR) * (2.0 * LOG_PROB_ERROR) / 8.0;

const STEPS: f64 = 65534.0;

/// Bytes of a row of `vocab` tokens.
pub fn row_bytes(vocab: usize) -> usize {
    8 + 2 * vocab
}

/// Appends the row of `log_p` (natural logarithms of probabilities; negative infinity for 0).
pub fn encode(log_p: &[f64], out: &mut Vec<u8>) {
    let top = log_p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let floor = top - RANGE;
    let lowest = log_p.iter().copied().filter(|l| l.is_finite()).fold(top, f64::min).max(floor);
    // Rounded outwards, so that every code stays in range after the rounding to f32.
    let low32 = (lowest as f32).next_down();
    let step32 = (((top - f64::from(low32)) / STEPS) as f32).next_up();
    let (low, step) = (f64::from(low32), f64::from(step32));
    out.extend(low32.to_le_bytes());
    out.extend(step32.to_le_bytes());
    for l in log_p {
        let code = if *l == f64::NEG_INFINITY { 0 } else { 1 + ((l - low) / step).round().clamp(0.0, STEPS) as u16 };
        out.extend(code.to_le_bytes());
    }
}

/// Reads a row back, normalised so that probabilities sum to 1. `None` where `row` has another length.
pub fn decode(row: &[u8], vocab: usize, out: &mut Vec<f64>) -> Option<()> {
    if row.len() != row_bytes(vocab) {
        return None;
    }
    let float = |at: usize| f64::from(f32::from_le_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]]));
    let (low, step) = (float(0), float(4));
    out.clear();
    out.extend(row[8..].chunks_exact(2).map(|b| match u16::from_le_bytes([b[0], b[1]]) {
        0 => f64::NEG_INFINITY,
        code => low + step * f64::from(code - 1),
    }));
    let log_z = out.iter().map(|l| l.exp()).sum::<f64>().ln();
    out.iter_mut().for_each(|l| *l -= log_z);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::stats::{kl, log_softmax};
    use crate::random::Rng;

    #[test]
    fn errors_stay_within_the_stated_bounds() {
        let mut rng = Rng::new(1);
        let mut log_p = Vec::new();
        let mut back = Vec::new();
        for spread in [0.0, 1.0, 10.0, 60.0, 300.0] {
            let logits: Vec<f32> =
                (0..5000).map(|_| (spread * (rng.next_u64() as f64 / u64::MAX as f64 - 0.5)) as f32).collect();
            log_softmax(&logits, &mut log_p);
            let mut row = Vec::new();
            encode(&log_p, &mut row);
            decode(&row, logits.len(), &mut back).unwrap();
            let top = log_p.iter().copied().fold(f64::MIN, f64::max);
            for (a, b) in log_p.iter().zip(&back) {
                // Normalising shifts all by at most the error itself; f32 ends of the row add 1e-5.
                let bound = 2.0 * LOG_PROB_ERROR + 1e-5;
                assert!((a - b).abs() <= bound || *a < top - RANGE + 1e-3, "{a} {b}");
            }
            assert!((back.iter().map(|l| l.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
            assert!(kl(&log_p, &back) <= SELF_KL_BOUND && kl(&back, &log_p) <= SELF_KL_BOUND);
        }
    }

    #[test]
    fn probability_zero_stays_zero() {
        let mut log_p = vec![f64::NEG_INFINITY, -0.5f64.ln().abs(), 0.5f64.ln()];
        log_p[1] = 0.5f64.ln();
        let mut row = Vec::new();
        encode(&log_p, &mut row);
        let mut back = Vec::new();
        decode(&row, 3, &mut back).unwrap();
        assert_eq!(back[0], f64::NEG_INFINITY);
        assert!((back[1] - log_p[1]).abs() < 1e-12);
        assert!(decode(&row, 4, &mut back).is_none());
    }
}
