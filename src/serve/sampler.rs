//! The choice of the next token.
use crate::eval::stats::argmax;
use crate::random::Rng;
use crate::runtime::engine::Token;
use std::collections::HashMap;

/// How tokens are chosen. What a request does not say is as in `chat` and llama-server.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0: always the likeliest.
    pub temperature: f32,
    /// Only so many of the likeliest; 0: all.
    pub top_k: usize,
    /// Only the likeliest that have this share of the probability together.
    pub top_p: f32,
    /// Only those with this share of the likeliest one's probability.
    pub min_p: f32,
    /// Taken off the logit of a token that the answer holds.
    pub presence_penalty: f32,
    /// The same for each time that the answer holds it.
    pub frequency_penalty: f32,
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        let seed = 0;
        let (presence_penalty, frequency_penalty) = (0.0, 0.0);
        Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, presence_penalty, frequency_penalty, seed }
    }
}

/// Chooses the tokens of one answer.
pub struct Sampler {
    sampling: Sampling,
    rng: Rng,
    /// How often the answer holds a token.
    counts: HashMap<Token, u32>,
    logits: Vec<f32>,
}

impl Sampler {
    pub fn new(sampling: Sampling) -> Self {
        let rng = Rng::new(sampling.seed);
        Sampler { sampling, rng, counts: HashMap::new(), logits: Vec::new() }
    }

    /// The next token, or none where the logits are no numbers: the model is broken.
    pub fn next(&mut self, logits: &[f32]) -> Option<Token> {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        for (token, count) in &self.counts {
            let Some(logit) = self.logits.get_mut(*token as usize) else { continue };
            *logit -= self.sampling.presence_penalty + self.sampling.frequency_penalty * *count as f32;
        }
        let best = argmax(&self.logits);
        if !self.logits.get(best)?.is_finite() || self.logits.iter().any(|l| l.is_nan()) {
            return None;
        }
        let token = if self.sampling.temperature > 0.0 { self.draw(best) } else { best as Token };
        if self.sampling.presence_penalty != 0.0 || self.sampling.frequency_penalty != 0.0 {
            *self.counts.entry(token).or_default() += 1;
        }
        Some(token)
    }

    fn draw(&mut self, best: usize) -> Token {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let top = self.logits[best];
        let mut choice: Vec<(f32, Token)> = (0..).zip(&self.logits).map(|(token, logit)| (*logit, token)).collect();
        let falling = |a: &(f32, Token), b: &(f32, Token)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if top_k > 0 && top_k < choice.len() {
            choice.select_nth_unstable_by(top_k - 1, falling);
            choice.truncate(top_k);
        }
        let all: f64 = choice.iter().map(|(logit, _)| f64::from(logit - top).exp()).sum();
        // Both cuts are made in falling order, so that the cheap one may come first.
        choice.retain(|(logit, _)| (logit - top).exp() >= min_p);
        choice.sort_unstable_by(falling);
        let mut sum = 0.0;
        let kept = choice.iter().take_while(|(logit, _)| {
            let before = sum;
            sum += f64::from(logit - top).exp() / all;
            before < f64::from(top_p)
        });
        let weights: Vec<(f64, Token)> =
            kept.map(|(logit, token)| (f64::from((logit - top) / temperature).exp(), *token)).collect();
        let total: f64 = weights.iter().map(|(weight, _)| weight).sum();
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        for (weight, token) in &weights {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        best as Token
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 3.0 - 1e-3];

    fn shares(sampling: Sampling) -> [f64; 5] {
        let mut sampler = Sampler::new(sampling);
        let mut shares = [0.0; 5];
        (0..20_000).for_each(|_| shares[sampler.next(&LOGITS).unwrap() as usize] += 1.0 / 20_000.0);
        shares
    }

    fn plain() -> Sampling {
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Sampling::default() }
    }

    #[test]
    fn tokens_come_as_often_as_they_are_likely() {
        for temperature in [0.5, 1.0, 2.0] {
            let weights = LOGITS.map(|l| f64::from(l / temperature).exp());
            let total: f64 = weights.iter().sum();
            let found = shares(Sampling { temperature, ..plain() });
            for (weight, share) in weights.iter().zip(found) {
                assert!((weight / total - share).abs() < 0.015, "{temperature}: {found:?}");
            }
        }
    }

    #[test]
    fn cuts_keep_the_likeliest() {
        let used = |sampling| shares(sampling).map(|share| share > 0.0);
        assert_eq!(used(Sampling { top_k: 2, ..plain() }), [false, true, false, false, true]);
        assert_eq!(used(Sampling { top_k: 1, ..plain() }), [false, true, false, false, false]);
        // The two likeliest have .80 of the probability, three .94, four .995.
        assert_eq!(used(Sampling { top_p: 0.79, ..plain() }), [false, true, false, false, true]);
        assert_eq!(used(Sampling { top_p: 0.9, ..plain() }), [false, true, true, false, true]);
        assert_eq!(used(Sampling { min_p: 0.3, ..plain() }), [false, true, true, false, true]);
        assert_eq!(used(Sampling { temperature: 0.0, ..plain() }), [false, true, false, false, false]);
    }

    #[test]
    fn a_seed_repeats_an_answer() {
        let run = |seed| {
            let mut sampler = Sampler::new(Sampling { seed, ..plain() });
            (0..50).map(|_| sampler.next(&LOGITS).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn penalties_count_the_answers_tokens() {
        let greedy = Sampling { temperature: 0.0, ..plain() };
        let run = |sampling| {
            let mut sampler = Sampler::new(sampling);
            (0..4).map(|_| sampler.next(&[2.0, 1.5, 0.0]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(greedy.clone()), [0, 0, 0, 0]);
        assert_eq!(run(Sampling { presence_penalty: 0.6, ..greedy.clone() }), [0, 1, 0, 0]);
        assert_eq!(run(Sampling { frequency_penalty: 0.6, ..greedy }), [0, 1, 0, 1]);
    }

    #[test]
    fn what_is_no_number_is_not_chosen_from() {
        let mut sampler = Sampler::new(Sampling::default());
        assert_eq!(sampler.next(&[f32::NAN, 1.0]), None);
        assert_eq!(sampler.next(&[1.0, f32::NAN]), None);
        assert_eq!(sampler.next(&[]), None);
        assert_eq!(sampler.next(&[f32::NEG_INFINITY, 1.0]), Some(1));
    }
}
