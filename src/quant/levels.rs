//! Storage types whose blocks are evenly spaced levels, `w = d*code + m`, taken apart so that codes can be chosen one
//! column after the other: how a block's levels follow from its weights, and how levels and codes become bytes.
use super::mbq3::{self, Block, Grid};
use crate::ggml::GgmlType;
use half::f16;

/// A type of evenly spaced levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Mbq3,
    Q4_0,
    Q4_1,
    Q8_0,
}

/// A block's levels. Both numbers are what the file holds: halfs, or a whole multiple of one.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Levels {
    /// Distance of two levels; q4_0's may be negative.
    pub d: f32,
    /// Value of code 0.
    pub m: f32,
}

impl Levels {
    pub fn value(self, code: u8) -> f32 {
        self.d * f32::from(code) + self.m
    }
}

/// How a block's levels are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// By the type's own rule: the paper's for MBQ3, ggml's for the others.
    Plain,
    /// The least weighted squared error over clipped ranges, each improved by least squares.
    Search,
}

/// Shares of the plain range that [`Fit::Search`] begins with.
const SHARES: [f32; 9] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6];

impl Format {
    /// The type `ty`, if it is one of these.
    pub fn of(ty: GgmlType) -> Option<Self> {
        match ty {
            GgmlType::MBQ3 => Some(Format::Mbq3),
            GgmlType::Q4_0 => Some(Format::Q4_0),
            GgmlType::Q4_1 => Some(Format::Q4_1),
            GgmlType::Q8_0 => Some(Format::Q8_0),
            _ => None,
        }
    }

    pub fn ty(self) -> GgmlType {
        match self {
            Format::Mbq3 => GgmlType::MBQ3,
            Format::Q4_0 => GgmlType::Q4_0,
            Format::Q4_1 => GgmlType::Q4_1,
            Format::Q8_0 => GgmlType::Q8_0,
        }
    }

    /// Weights in a block.
    pub fn group(self) -> usize {
        if self == Format::Mbq3 { mbq3::GROUP } else { 32 }
    }

    /// The smallest and the largest code. q8_0's codes are its bytes plus 128; -128 is left out, as ggml does.
    fn codes(self) -> (f32, f32) {
        match self {
            Format::Mbq3 => (0.0, 7.0),
            Format::Q4_0 | Format::Q4_1 => (0.0, 15.0),
            Format::Q8_0 => (1.0, 255.0),
        }
    }

    /// The code that means 0, in types without an m of their own.
    fn middle(self) -> Option<f32> {
        match self {
            Format::Q4_0 => Some(8.0),
            Format::Q8_0 => Some(128.0),
            _ => None,
        }
    }

    /// The code whose level is nearest to `w`.
    ///
    /// Codes are chosen against the levels as stored, not against those before their rounding to halfs: the error
    /// that is handed on to later columns is then the file's error.
    pub fn nearest(self, levels: Levels, w: f32) -> u8 {
        let (low, high) = self.codes();
        // A d of zero gives infinity or NaN; `clamp` and the cast then give some code, and all codes mean m.
        ((w - levels.m) / levels.d).round_ties_even().clamp(low, high) as u8
    }

    /// Rounds levels to what the file can hold.
    fn stored(self, d: f32, m: f32) -> Levels {
        let d = f16::from_f32(d).to_f32();
        match self.middle() {
            // Exact: a half times a small whole number has at most 19 significant bits.
            Some(middle) => Levels { d, m: 0.0 - middle * d },
            None => Levels { d, m: f16::from_f32(m).to_f32() },
        }
    }

    /// The levels for the weights `w` of a block; `importance` weighs their squared errors.
    /// Not finite where the weights are too large for halfs.
    pub fn fit(self, w: &[f32], importance: &[f64], fit: Fit) -> Levels {
        let plain = self.plain(w);
        if fit == Fit::Plain {
            return plain;
        }
        let error = |l: Levels| -> f64 {
            let square = |(&w, &h): (&f32, &f64)| f64::from(w - l.value(self.nearest(l, w))).powi(2) * h;
            w.iter().zip(importance).map(square).sum()
        };
        let mut best = (plain, error(plain));
        let mut consider = |l: Levels| {
            if l.d.is_finite() && l.m.is_finite() {
                let e = error(l);
                if e < best.1 {
                    best = (l, e);
                }
            }
        };
        let (low, high) = range(w);
        for share in SHARES {
            let (_, top) = self.codes();
            let begin = match self.middle() {
                Some(_) => self.stored(plain.d * share, 0.0),
                // Shrunk towards the centre.
                None => {
                    let cut = (high - low) * (1.0 - share) / 2.0;
                    self.stored((high - low) * share / top, low + cut)
                }
            };
            consider(begin);
            let mut levels = begin;
            for _ in 0..2 {
                let Some(next) = self.least_squares(w, importance, levels) else { break };
                consider(next);
                levels = next;
            }
        }
        best.0
    }

    /// The type's own rule.
    fn plain(self, w: &[f32]) -> Levels {
        match self {
            Format::Mbq3 => {
                // invariant: callers pass whole blocks.
                let mut group = [0.0; mbq3::GROUP];
                group.copy_from_slice(w);
                let block = mbq3::Group::nearest(&group, Grid::Paper).block();
                Levels { d: block.d.to_f32(), m: block.m.to_f32() }
            }
            Format::Q4_0 => {
                let extreme = w.iter().fold(0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
                self.stored(extreme / -8.0, 0.0)
            }
            Format::Q4_1 => {
                let (low, high) = range(w);
                self.stored((high - low) / 15.0, low)
            }
            Format::Q8_0 => self.stored(w.iter().fold(0f32, |a, b| a.max(b.abs())) / 127.0, 0.0),
        }
    }

    /// The levels of least weighted squared error for the codes that `levels` gives; none where the codes do not
    /// determine them (all alike, or without weight).
    fn least_squares(self, w: &[f32], importance: &[f64], levels: Levels) -> Option<Levels> {
        let zero = f64::from(self.middle().unwrap_or(0.0));
        let (mut n, mut c1, mut c2, mut y, mut cy) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (&w, &h) in w.iter().zip(importance) {
            let (c, w) = (f64::from(self.nearest(levels, w)) - zero, f64::from(w));
            (n, c1, c2, y, cy) = (n + h, c1 + h * c, c2 + h * c * c, y + h * w, cy + h * c * w);
        }
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

    /// Appends a block's bytes, ggml's layout.
    pub fn pack(self, levels: Levels, codes: &[u8], out: &mut Vec<u8>) {
        // invariant: both are halfs already, so that this loses nothing.
        let (d, m) = (f16::from_f32(levels.d), f16::from_f32(levels.m));
        match self {
            Format::Mbq3 => {
                let mut all = [0; mbq3::GROUP];
                all.copy_from_slice(codes);
                out.extend(Block { d, m, codes: all }.pack());
            }
            Format::Q4_0 | Format::Q4_1 => {
                out.extend(d.to_le_bytes());
                if self == Format::Q4_1 {
                    out.extend(m.to_le_bytes());
                }
                let (low, high) = codes.split_at(16);
                out.extend(low.iter().zip(high).map(|(l, h)| l | h << 4));
            }
            Format::Q8_0 => {
                out.extend(d.to_le_bytes());
                out.extend(codes.iter().map(|c| c.wrapping_sub(128)));
            }
        }
    }
}

fn range(w: &[f32]) -> (f32, f32) {
    w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)))
}
