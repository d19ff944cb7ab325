//! Sixteen candidates for a sub-block's levels, side by side in the lanes of vectors.
use super::simple::even;
use crate::ggml::{GgmlType, dequantize};
use half::f16;
use std::sync::LazyLock;

/// Candidates that are measured at once: the lanes of a vector, or of two.
pub const LANES: usize = 16;
/// A number of each candidate.
pub type Lanes = [f32; LANES];

/// What codes stand for before they are scaled.
pub trait Codebook: Copy {
    /// The places of the smallest and of the largest code.
    fn ends(self) -> (f32, f32);
    /// The place that is nearest to `x`; some place for what is not a number.
    fn nearest(self, x: f32) -> f32;
    /// The code of a place.
    fn code(self, place: f32) -> u8;
}

/// Whole numbers from LOW to HIGH.
#[derive(Clone, Copy)]
pub struct Even<const LOW: i16, const HIGH: i16>;

impl<const LOW: i16, const HIGH: i16> Codebook for Even<LOW, HIGH> {
    #[inline(always)]
    fn ends(self) -> (f32, f32) {
        (f32::from(LOW), f32::from(HIGH))
    }

    #[inline(always)]
    fn nearest(self, x: f32) -> f32 {
        let (low, high) = self.ends();
        let x = if x > low { x } else { low };
        even(if x < high { x } else { high })
    }

    #[inline(always)]
    fn code(self, place: f32) -> u8 {
        (place - f32::from(LOW)) as u8
    }
}

/// The 16 values of iq4_nl and iq4_xs, ascending.
pub(super) static UNEVEN: LazyLock<[f32; 16]> = LazyLock::new(|| {
    // A block of d = 1 and all codes: ggml says itself what they stand for.
    let mut block = f16::ONE.to_le_bytes().to_vec();
    block.extend(0..16);
    let mut values = [0.0; 16];
    let read = dequantize(GgmlType::IQ4_NL, &block).unwrap_or_default();
    values.iter_mut().zip(read).for_each(|(value, read)| *value = read);
    values
});

/// Values at uneven distances.
#[derive(Clone, Copy)]
pub struct Uneven {
    values: [f32; 16],
    /// Half-way between a value and the next.
    middles: [f32; 15],
    steps: [f32; 15],
}

impl Uneven {
    pub fn new() -> Self {
        let values = *UNEVEN;
        let of = |f: fn(f32, f32) -> f32| std::array::from_fn(|i| f(values[i], values[i + 1]));
        Uneven { values, middles: of(|a, b| (a + b) / 2.0), steps: of(|a, b| b - a) }
    }
}

impl Default for Uneven {
    fn default() -> Self {
        Self::new()
    }
}

impl Codebook for Uneven {
    #[inline(always)]
    fn ends(self) -> (f32, f32) {
        (self.values[0], self.values[15])
    }

    #[inline(always)]
    fn nearest(self, x: f32) -> f32 {
        let mut place = self.values[0];
        for (middle, step) in self.middles.iter().zip(self.steps) {
            // Whole numbers: exact.
            place += if x > *middle { step } else { 0.0 };
        }
        place
    }

    #[inline(always)]
    fn code(self, place: f32) -> u8 {
        self.middles.iter().filter(|&&middle| place > middle).count() as u8
    }
}

/// Sums over weights, each times its importance, for every candidate: the squared error; places, their squares, places
/// times weights.
pub(super) struct Sums {
    pub error: Lanes,
    pub x1: Lanes,
    pub x2: Lanes,
    pub xw: Lanes,
}

/// How far the levels `d`, `m` of each candidate are from the weights `w` of importance `h`.
#[inline(always)]
pub(super) fn measure(book: impl Codebook, w: &[f32], h: &[f32], d: &Lanes, m: &Lanes) -> Sums {
    let per_d = d.map(|d| 1.0 / d);
    let zero = [0.0; LANES];
    let mut sums = Sums { error: zero, x1: zero, x2: zero, xw: zero };
    for (&w, &h) in w.iter().zip(h) {
        for i in 0..LANES {
            let x = book.nearest((w - m[i]) * per_d[i]);
            let e = w - (d[i] * x + m[i]);
            sums.error[i] += h * e * e;
            sums.x1[i] += h * x;
            sums.x2[i] += h * x * x;
            sums.xw[i] += h * x * w;
        }
    }
    sums
}
