//! Types whose blocks are evenly spaced levels, `w = d*code + m`.
use super::{Fit, LANES, Levels};
use crate::ggml::GgmlType;
use crate::quant::mbq3::{self, Grid};
use half::f16;
use pulp::NullaryFnOnce;

/// Shares of the plain range that [`Fit::Search`] begins with.
const SHARES: [f32; 9] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6];

/// A type without sub-blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Simple {
    Mbq3,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
}

impl Simple {
    /// How often [`Simple::candidates`] are asked for.
    pub const PASSES: usize = 4;

    pub const ALL: [Simple; 6] = [Simple::Mbq3, Simple::Q4_0, Simple::Q4_1, Simple::Q5_0, Simple::Q5_1, Simple::Q8_0];

    pub fn ty(self) -> GgmlType {
        match self {
            Simple::Mbq3 => GgmlType::MBQ3,
            Simple::Q4_0 => GgmlType::Q4_0,
            Simple::Q4_1 => GgmlType::Q4_1,
            Simple::Q5_0 => GgmlType::Q5_0,
            Simple::Q5_1 => GgmlType::Q5_1,
            Simple::Q8_0 => GgmlType::Q8_0,
        }
    }

    /// Weights in a block.
    pub fn group(self) -> usize {
        if self == Simple::Mbq3 { mbq3::GROUP } else { 32 }
    }

    /// The smallest and the largest code. q8_0's codes are its bytes plus 128; -128 is left out, as ggml does.
    #[inline(always)]
    fn codes(self) -> (f32, f32) {
        match self {
            Simple::Mbq3 => (0.0, 7.0),
            Simple::Q4_0 | Simple::Q4_1 => (0.0, 15.0),
            Simple::Q5_0 | Simple::Q5_1 => (0.0, 31.0),
            Simple::Q8_0 => (1.0, 255.0),
        }
    }

    /// The code that means 0, in types without an m of their own.
    #[inline(always)]
    pub fn middle(self) -> Option<f32> {
        match self {
            Simple::Q4_0 => Some(8.0),
            Simple::Q5_0 => Some(16.0),
            Simple::Q8_0 => Some(128.0),
            _ => None,
        }
    }

    /// The code whose level is nearest to `w`.
    ///
    /// Codes are chosen against the levels as stored, not against those before their rounding to halfs: the error
    /// that is handed on to later columns is then the file's error.
    #[inline(always)]
    pub fn nearest(self, levels: Levels, w: f32) -> u8 {
        self.code(levels, w) as u8
    }

    #[inline(always)]
    fn code(self, levels: Levels, w: f32) -> f32 {
        let (low, high) = self.codes();
        let code = (w - levels.m) / levels.d;
        // A d of zero gives infinity or NaN, which becomes some code; all codes mean m then.
        let code = if code > low { code } else { low };
        even(if code < high { code } else { high })
    }

    /// Rounds levels to what the file can hold.
    #[inline(always)]
    pub fn stored(self, d: f32, m: f32) -> Levels {
        let d = f16::from_f32(d).to_f32();
        match self.middle() {
            // Exact: a half times a small whole number has at most 19 significant bits.
            Some(middle) => Levels { d, m: 0.0 - middle * d },
            None => Levels { d, m: f16::from_f32(m).to_f32() },
        }
    }

    /// Levels around `best`, itself among them at first: in pass 0 up to 15 % smaller or larger and, in types with an m,
    /// up to .6 levels aside, evenly spread; half as far in each pass after it.
    #[inline(always)]
    pub fn candidates(self, best: Levels, pass: usize) -> [Levels; LANES] {
        // Multiples of these fill the square evenly (the R2 sequence, of the powers of the plastic ratio).
        const STEP: [f32; 2] = [0.754_877_7, 0.569_840_3];
        let far = 0.5f32.powi(pass as i32);
        let middle = best.m + best.d * self.codes().1 / 2.0;
        std::array::from_fn(|i| {
            if pass == 0 && i == 0 {
                return best;
            }
            let at = |step: f32| 2.0 * (0.5 + (pass * LANES + i) as f32 * step).fract() - 1.0;
            let d = best.d * (1.0 + 0.15 * far * at(STEP[0]));
            self.stored(d, middle - d * self.codes().1 / 2.0 + best.d * 0.6 * far * at(STEP[1]))
        })
    }

    /// The levels for the weights `w` of a block; `importance` weighs their squared errors.
    /// Not finite where the weights are too large for halfs.
    pub fn fit(self, w: &[f32], importance: &[f64], fit: Fit) -> Levels {
        let plain = self.plain(w);
        if fit == Fit::Plain {
            return plain;
        }
        // Compiled for the widest vectors that the processor has; the arithmetic is the same with any.
        pulp::Arch::new().dispatch(Search { simple: self, w, importance, plain })
    }

    #[inline(always)]
    fn search(self, w: &[f32], importance: &[f64], plain: Levels) -> Levels {
        let mut best = (plain, self.measure(w, importance, plain).error);
        let total = w.iter().zip(importance).fold((0.0, 0.0), |(n, y), (&w, &h)| (n + h, y + h * f64::from(w)));
        let (low, high) = range(w);
        for share in SHARES {
            let (_, top) = self.codes();
            let mut levels = match self.middle() {
                Some(_) => self.stored(plain.d * share, 0.0),
                // Shrunk towards the centre.
                None => {
                    let cut = (high - low) * (1.0 - share) / 2.0;
                    self.stored((high - low) * share / top, low + cut)
                }
            };
            for improved in 0..3 {
                if !(levels.d.is_finite() && levels.m.is_finite()) {
                    break;
                }
                let sums = self.measure(w, importance, levels);
                if sums.error < best.1 {
                    best = (levels, sums.error);
                }
                match self.least_squares(total, &sums) {
                    Some(next) if improved < 2 && next != levels => levels = next,
                    _ => break,
                }
            }
        }
        best.0
    }

    /// The type's own rule.
    fn plain(self, w: &[f32]) -> Levels {
        match self {
            Simple::Mbq3 => {
                // invariant: callers pass whole blocks.
                let mut group = [0.0; mbq3::GROUP];
                group.copy_from_slice(w);
                let block = mbq3::Mbq3Group::nearest(&group, Grid::Paper).block();
                Levels { d: block.d.to_f32(), m: block.m.to_f32() }
            }
            Simple::Q4_0 | Simple::Q5_0 => {
                let extreme = w.iter().fold(0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
                self.stored(extreme / if self == Simple::Q4_0 { -8.0 } else { -16.0 }, 0.0)
            }
            Simple::Q4_1 | Simple::Q5_1 => {
                let (low, high) = range(w);
                self.stored((high - low) / self.codes().1, low)
            }
            Simple::Q8_0 => self.stored(w.iter().fold(0f32, |a, b| a.max(b.abs())) / 127.0, 0.0),
        }
    }

    /// How far `levels` are from `w`, and what least squares need of the codes that they give.
    #[inline(always)]
    fn measure(self, w: &[f32], importance: &[f64], levels: Levels) -> FitSums {
        // Eight sums of each: none waits for the addition before.
        const LANES: usize = 8;
        let zero = self.middle().unwrap_or(0.0);
        let (mut error, mut c1, mut c2, mut cy) = ([0.0; LANES], [0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for (w, h) in w.as_chunks::<LANES>().0.iter().zip(importance.as_chunks::<LANES>().0) {
            for i in 0..LANES {
                let code = self.code(levels, w[i]);
                let e = f64::from(w[i] - (levels.d * code + levels.m));
                let c = f64::from(code - zero);
                error[i] += h[i] * e * e;
                c1[i] += h[i] * c;
                c2[i] += h[i] * c * c;
                cy[i] += h[i] * c * f64::from(w[i]);
            }
        }
        let [error, c1, c2, cy] = [error, c1, c2, cy].map(|lanes| lanes.iter().sum());
        FitSums { error, c1, c2, cy }
    }

    /// The levels of least weighted squared error for codes of these sums; `n` and `y` are those of the weights'
    /// importance, and of it times the weights. None where the codes do not determine them (all alike, or without
    /// weight).
    #[inline(always)]
    fn least_squares(self, (n, y): (f64, f64), sums: &FitSums) -> Option<Levels> {
        let FitSums { c1, c2, cy, .. } = *sums;
        let (d, m) = if self.middle().is_some() {
            (cy / c2, 0.0)
        } else {
            let determinant = n * c2 - c1 * c1;
            // Relative to its first term, the codes' variance over their mean square.
            if determinant <= 1e-6 * n * c2 {
                return None;
            }
            ((n * cy - c1 * y) / determinant, (c2 * y - c1 * cy) / determinant)
        };
        let next = self.stored(d as f32, m as f32);
        (next.d.is_finite() && next.m.is_finite()).then_some(next)
    }
}

/// [`Simple::search`], inlined into what is compiled for those vectors; a closure may not be.
struct Search<'a> {
    simple: Simple,
    w: &'a [f32],
    importance: &'a [f64],
    plain: Levels,
}

impl NullaryFnOnce for Search<'_> {
    type Output = Levels;

    #[inline(always)]
    fn call(self) -> Levels {
        self.simple.search(self.w, self.importance, self.plain)
    }
}

/// FitSums over a block's weights, each times its importance: the squared error, the codes (less the one that means 0), their
/// squares, codes times weights.
struct FitSums {
    error: f64,
    c1: f64,
    c2: f64,
    cy: f64,
}

/// Rounds to the nearest integer, halves to even, where |v| < 2^22; beyond it errs by less than |v| / 2^22, which clamps
/// take away. Unlike `round_ties_even` it is no call on processors without SSE4.1.
#[inline(always)]
pub(crate) fn even(v: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (v + SHIFT) - SHIFT
}

#[inline(always)]
fn range(w: &[f32]) -> (f32, f32) {
    w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)))
}
