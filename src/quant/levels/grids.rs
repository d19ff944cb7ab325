//! iq3_s and iq3_xxs: four weights together are a point of a grid, with a sign each. Of eight signs of iq3_xxs an even
//! number are minus. Sub-blocks of 32 have an odd multiple, 1 to 31, of their block's d.
//!
//! A code has the weight's place among the grid's eight magnitudes in its low three bits, its sign in the fourth.
use super::lanes::LANES;
use super::simple::even;
use super::sub_blocks::half;
use super::{Format, Halfs, Multiples};
use crate::ggml::dequantize;
use half::f16;
use std::sync::LazyLock;

/// Magnitudes of a grid, ascending.
const MAGNITUDES: usize = 8;
/// Roundings of four weights to magnitudes, each for itself.
const CELLS: usize = MAGNITUDES.pow(4);
const MINUS: u8 = 8;

static IQ3_S: LazyLock<Grid> = LazyLock::new(|| Grid::read(Format::Iq3S));
static IQ3_XXS: LazyLock<Grid> = LazyLock::new(|| Grid::read(Format::Iq3Xxs));

/// The points of a type, as ggml has them.
pub struct Grid {
    pub magnitudes: [f32; MAGNITUDES],
    /// Whether an even number of eight signs must be minus.
    pub even: bool,
    /// Codes of each point.
    points: Vec<[u8; 4]>,
    /// Of each cell the nearest points: twice the magnitudes, which are halves at most.
    near: Vec<[[u8; LANES]; 4]>,
    /// Of each cell that is a point, which.
    index: Vec<u16>,
}

/// Codes and values of four weights, and their error.
#[derive(Debug, Clone, Copy)]
pub struct Quad {
    pub codes: [u8; 4],
    pub values: [f32; 4],
    pub error: f32,
}

/// What errors of four neighbouring columns cost: their corner of M above the diagonal (01, 02, 12, 03, 13, 23), and of D.
#[derive(Clone, Copy)]
pub struct Metric {
    pub m: [f32; 6],
    pub d: [f32; 4],
}

fn cell(codes: &[u8]) -> usize {
    codes.iter().rev().fold(0, |cell, code| cell << 3 | usize::from(code % MINUS))
}

impl Grid {
    /// The grid of `format`, if it has one.
    pub fn of(format: Format) -> Option<&'static Grid> {
        match format {
            Format::Iq3S => Some(&IQ3_S),
            Format::Iq3Xxs => Some(&IQ3_XXS),
            _ => None,
        }
    }

    /// ggml says itself what its points are: blocks of d = 1, smallest scale, all signs plus.
    fn read(format: Format) -> Grid {
        let count: usize = if format == Format::Iq3S { 512 } else { 256 };
        let mut values = Vec::new();
        for block in 0..count / 64 {
            let mut bytes = f16::ONE.to_le_bytes().to_vec();
            bytes.extend((0..64).map(|i| (block * 64 + i) as u8));
            // The ninth bits, which only iq3_s has.
            bytes.extend([if block < 4 { 0 } else { 255 }; 8]);
            bytes.resize(format.ty().type_size(), 0);
            values.extend(dequantize(format.ty(), &bytes).unwrap_or_default());
        }
        let mut magnitudes = values.clone();
        magnitudes.sort_by(f32::total_cmp);
        magnitudes.dedup();
        magnitudes.resize(MAGNITUDES, f32::INFINITY);
        let magnitudes: [f32; MAGNITUDES] = std::array::from_fn(|i| magnitudes[i]);
        let code = |v: &f32| magnitudes.iter().position(|m| m == v).unwrap_or_default() as u8;
        let points: Vec<[u8; 4]> = values.chunks(4).map(|point| std::array::from_fn(|i| code(&point[i]))).collect();
        let mut index = vec![0; CELLS];
        points.iter().enumerate().for_each(|(i, point)| index[cell(point)] = i as u16);
        let near = (0..CELLS).map(|cell| nearest(cell, &points, &magnitudes)).collect();
        Grid { magnitudes, even: format == Format::Iq3Xxs, points, near, index }
    }

    /// Codes of each point, signs plus.
    pub fn points(&self) -> &[[u8; 4]] {
        &self.points
    }

    /// Which point four codes are.
    pub fn index(&self, codes: &[u8]) -> u16 {
        self.index[cell(codes)]
    }

    #[inline(always)]
    pub fn place(&self, code: u8) -> f32 {
        let magnitude = self.magnitudes[usize::from(code % MINUS)];
        if code & MINUS == 0 { magnitude } else { -magnitude }
    }

    /// The points times `d` nearest to the targets `t`, one with an even and one with an odd number of minus signs. Tried
    /// are the points around, with the targets' signs and with those of the two smallest turned.
    #[inline(always)]
    pub fn nearest(&self, t: &[f32; 4], metric: &Metric, d: f32) -> [Quad; 2] {
        let (x, codes) = self.one_by_one(t, metric, d);
        let (size, signs) = (x.map(f32::abs), x.map(|x| u8::from(x < 0.0)));
        let near = &self.near[cell(&codes)];
        let (mut first, mut second) = if size[1] < size[0] { (1, 0) } else { (0, 1) };
        for i in 2..4 {
            if size[i] < size[first] {
                (first, second) = (i, first);
            } else if size[i] < size[second] {
                second = i;
            }
        }
        // What is not a number has no best: any point will do.
        let mut best = [0, 1].map(|sign| (f32::INFINITY, 0, [sign, 0, 0, 0]));
        for turned in 0..4u8 {
            let mut signs = signs;
            signs[first] ^= turned & 1;
            signs[second] ^= turned >> 1;
            let (error, lane) = errors(t, metric, near, signs.map(|sign| if sign == 1 { -0.5 * d } else { 0.5 * d }));
            let parity = usize::from(signs.iter().sum::<u8>() % 2);
            if error < best[parity].0 {
                best[parity] = (error, lane, signs);
            }
        }
        best.map(|(error, lane, signs)| self.quad(near, lane, signs, d, error))
    }

    /// Four targets over `d`, each moved by the errors of those before, rounded without regard to points; and the codes,
    /// signs plus.
    #[inline(always)]
    fn one_by_one(&self, t: &[f32; 4], metric: &Metric, d: f32) -> ([f32; 4], [u8; 4]) {
        let [m01, m02, m12, m03, m13, m23] = metric.m;
        let m = [[0.0; 3], [m01, 0.0, 0.0], [m02, m12, 0.0], [m03, m13, m23]];
        let (mut x, mut codes, mut e) = (t.map(|t| t / d), [0; 4], [0.0; 4]);
        for i in 0..4 {
            let own = x[i];
            for j in 0..i {
                x[i] += e[j] * m[i][j];
            }
            codes[i] = even(((x[i].abs() - 1.0) * 0.5).clamp(0.0, 7.0)) as u8;
            e[i] = own - self.magnitudes[usize::from(codes[i])].copysign(x[i]);
        }
        (x, codes)
    }

    #[inline(always)]
    fn quad(&self, near: &[[u8; LANES]; 4], lane: usize, signs: [u8; 4], d: f32, error: f32) -> Quad {
        let codes: [u8; 4] = std::array::from_fn(|i| {
            let magnitude = 0.5 * f32::from(near[i][lane]);
            self.magnitudes.iter().filter(|&&m| m < magnitude).count() as u8 | (signs[i] * MINUS)
        });
        Quad { codes, values: codes.map(|code| d * self.place(code)), error }
    }

    /// The halfs for the weights `w` of a block; `h` weighs their squared errors.
    /// Not finite where the weights are too large for halfs.
    #[inline(always)]
    pub fn fit_block(&self, w: &[f32], h: &[f32]) -> Halfs {
        // Of each sub-block its best d, and the sums of h times squared places, and of h times places times weights.
        let mut free = [(0.0, 0.0, 0.0); 8];
        for ((free, w), h) in free.iter_mut().zip(w.chunks(32)).zip(h.chunks(32)) {
            *free = self.fit(w, h);
        }
        let most = free.iter().fold(0f32, |a, free| a.max(free.0));
        let (mut unit, mut least) = (most / 31.0, f32::INFINITY);
        for i in 0..12 {
            let d = most / (31.5 - 0.5 * i as f32);
            let cost = |&(v, xx, _): &(f32, f32, f32)| xx * (odd(v / d) * d - v).powi(2);
            let cost = free.iter().map(cost).sum::<f32>();
            (unit, least) = if cost < least { (d, cost) } else { (unit, least) };
        }
        let (mut xw, mut xx) = (0.0, 0.0);
        for free in &free {
            let s = odd(free.0 / unit);
            (xw, xx) = (xw + s * free.2, xx + s * s * free.1);
        }
        Halfs { d: half(if xx > 0.0 { xw / xx } else { unit }), m: 0.0 }
    }

    /// The best d for the weights of a sub-block, with the sums at it.
    #[inline(always)]
    fn fit(&self, w: &[f32], h: &[f32]) -> (f32, f32, f32) {
        let most = w.iter().fold(0f32, |a, &w| a.max(w.abs()));
        let mut best = (0.0, 0.0, 0.0);
        let mut gain = 0.0;
        for share in [1.08, 1.0, 0.92, 0.85, 0.78, 0.71, 0.64, 0.56, 0.47] {
            let mut d = most * share / self.magnitudes[MAGNITUDES - 1];
            for _ in 0..2 {
                let (xx, xw) = self.sums(w, h, d);
                // What least squares take off the weights' square.
                if xx > 0.0 && xw * xw / xx > gain {
                    (gain, best) = (xw * xw / xx, (xw / xx, xx, xw));
                }
                d = xw / xx;
            }
        }
        best
    }

    #[inline(always)]
    fn sums(&self, w: &[f32], h: &[f32], d: f32) -> (f32, f32) {
        let (mut xx, mut xw) = (0.0, 0.0);
        for (w, h) in w.as_chunks::<4>().0.iter().zip(h.as_chunks::<4>().0) {
            let per_d = 1.0 / d;
            let codes = w.map(|w| even(((w.abs() * per_d - 1.0) * 0.5).clamp(0.0, 7.0)) as u8);
            let near = &self.near[cell(&codes)];
            let metric = Metric { m: [0.0; 6], d: *h };
            let (_, lane) = errors(&w.map(f32::abs), &metric, near, [0.5 * d; 4]);
            for i in 0..4 {
                let x = 0.5 * f32::from(near[i][lane]);
                (xx, xw) = (xx + h[i] * x * x, xw + h[i] * x * w[i].abs());
            }
        }
        (xx, xw)
    }

    /// Multiples to be tried for the weights `w` of a sub-block in a block with these `halfs`.
    #[inline(always)]
    pub fn candidates(&self, halfs: Halfs, w: &[f32], h: &[f32], count: usize) -> impl Iterator<Item = Multiples> {
        let wanted = odd(self.fit(w, h).0 / halfs.d);
        // From the middle outwards.
        let near = [0.0, 2.0, -2.0, 4.0, -4.0, 6.0, -6.0];
        // What is not a number (a d of zero) becomes 1.
        let within = move |by: f32| (wanted + by).max(1.0).clamp(1.0, 31.0) as i8;
        near.into_iter().take(count).map(move |by| Multiples { d: within(by), m: 0 })
    }
}

/// The odd number from 1 to 31 nearest to `v`.
#[inline(always)]
fn odd(v: f32) -> f32 {
    2.0 * even(((v - 1.0) * 0.5).clamp(0.0, 15.0)) + 1.0
}

/// The least error of the points `near`, times `half_d` with its signs, for the targets `t`; and which it is.
#[inline(always)]
fn errors(t: &[f32; 4], metric: &Metric, near: &[[u8; LANES]; 4], half_d: [f32; 4]) -> (f32, usize) {
    let Metric { m: [m01, m02, m12, m03, m13, m23], d } = *metric;
    let mut error = [0.0; LANES];
    for lane in 0..LANES {
        let e: [f32; 4] = std::array::from_fn(|i| t[i] - half_d[i] * f32::from(near[i][lane]));
        let r1 = e[1] + e[0] * m01;
        let r2 = e[2] + e[0] * m02 + e[1] * m12;
        let r3 = e[3] + e[0] * m03 + e[1] * m13 + e[2] * m23;
        error[lane] = d[0] * e[0] * e[0] + d[1] * r1 * r1 + d[2] * r2 * r2 + d[3] * r3 * r3;
    }
    let mut best = 0;
    (1..LANES).for_each(|lane| best = if error[lane] < error[best] { lane } else { best });
    (error[best], best)
}

/// The points nearest to a cell, twice their magnitudes.
fn nearest(cell: usize, points: &[[u8; 4]], magnitudes: &[f32; MAGNITUDES]) -> [[u8; LANES]; 4] {
    let at = |code: u8| magnitudes[usize::from(code)];
    let centre: [f32; 4] = std::array::from_fn(|i| at((cell >> (3 * i) & 7) as u8));
    let away = |point: &[u8; 4]| (0..4).map(|i| (at(point[i]) - centre[i]).powi(2)).sum::<f32>();
    let mut all: Vec<&[u8; 4]> = points.iter().collect();
    if all.len() > LANES {
        all.select_nth_unstable_by(LANES, |a, b| away(a).total_cmp(&away(b)));
    }
    std::array::from_fn(|i| std::array::from_fn(|lane| all.get(lane).map_or(0, |point| (2.0 * at(point[i])) as u8)))
}
