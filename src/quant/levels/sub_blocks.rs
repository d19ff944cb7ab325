//! Types whose blocks have sub-blocks: the halfs of a block, and candidates for the multiples of a sub-block.
//!
//! Each sub-block is fitted freely first. The halfs are then those whose multiples come closest to the free levels, an
//! error in a sub-block's level counting what it costs there, and are improved by least squares over the whole block.
use super::lanes::{Codebook, LANES, Lanes, measure};
use super::simple::even;
use super::{Fit, Format, Halfs, Multiples};
use half::f16;

/// Numbers that a sub-block may get.
pub type Candidate = (Halfs, Multiples);

/// What a type's multiples may be.
struct Bounds {
    d: (f32, f32),
    /// The largest multiple of a minimum, in types that have them.
    m: Option<f32>,
}

/// A sub-block's best levels, whatever the file can hold, with the sums of [`measure`] at them.
#[derive(Clone, Copy)]
struct Free {
    d: f32,
    error: f32,
    x1: f32,
    x2: f32,
    xw: f32,
    /// Sums of the importance, and of it times the weights.
    n: f32,
    w: f32,
}

/// On which side of zero the minima of a block are: its weights begin at, or above, them.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Below,
    Above,
}

impl Side {
    #[inline(always)]
    fn clamp(self, m: f32) -> f32 {
        match self {
            Side::Below => m.min(0.0),
            Side::Above => m.max(0.0),
        }
    }
}

impl Format {
    fn bounds(self) -> Bounds {
        let bounds = |low, high, m| Bounds { d: (low, high), m };
        match self {
            Format::Q2K => bounds(0.0, 15.0, Some(15.0)),
            Format::Q4K | Format::Q5K => bounds(0.0, 63.0, Some(63.0)),
            Format::Q6K => bounds(-128.0, 127.0, None),
            Format::Q3K | Format::Iq4Xs => bounds(-32.0, 31.0, None),
            _ => bounds(1.0, 1.0, None),
        }
    }

    /// The halfs for the weights `w` of a block; `h` weighs their squared errors.
    /// Not finite where the weights are too large for halfs.
    #[inline(always)]
    pub fn fit_block(self, book: impl Codebook, w: &[f32], h: &[f32]) -> Halfs {
        let (bounds, size) = (self.bounds(), self.sub_group());
        let above = w.chunks(size).filter(|w| w.iter().all(|&w| w > 0.0)).count();
        let side = bounds.m.map(|_| if 2 * above * size > w.len() { Side::Above } else { Side::Below });
        // At most 256 / 16.
        let mut all = [Free::NONE; 16];
        let subs = &mut all[..w.len() / size];
        for ((free, w), h) in subs.iter_mut().zip(w.chunks(size)).zip(h.chunks(size)) {
            *free = Free::of(book, side, w, h);
        }
        halfs(subs, &bounds)
    }

    /// Candidates for the numbers of a sub-block of weights `w` in a block with these `halfs`.
    #[inline(always)]
    pub fn candidates(
        self,
        book: impl Codebook,
        halfs: Halfs,
        (w, h): (&[f32], &[f32]),
        fit: Fit,
    ) -> [Candidate; LANES] {
        let bounds = self.bounds();
        let side = bounds.m.map(|_| if halfs.m > 0.0 { Side::Above } else { Side::Below });
        let free = Free::of(book, side, w, h);
        if self.group() == self.sub_group() {
            return std::array::from_fn(|i| {
                (Halfs { d: half(free.d * nudge(i, fit)), m: 0.0 }, Multiples { d: 1, m: 0 })
            });
        }
        let (low, high) = bounds.d;
        let wanted = even((free.d / halfs.d).clamp(low, high));
        // Small multiples are far apart already.
        let step = 1.0f32.max(even(wanted.abs() / 24.0));
        std::array::from_fn(|i| {
            let d = match (fit, bounds.m) {
                (Fit::Plain, _) => wanted,
                // Two minima to each.
                (_, Some(_)) => wanted + step * ((i / 2) as f32 - 4.0),
                // Codebooks that reach further on one side of zero: the other way round, too.
                _ if i >= LANES / 2 && low > -100.0 => -wanted + step * ((i - LANES / 2) as f32 - 4.0),
                _ if low > -100.0 => wanted + step * (i as f32 - 4.0),
                _ => wanted + step * (i as f32 - 8.0),
            };
            let d = d.clamp(low, high);
            let m = match bounds.m {
                Some(most) => {
                    let m = (free.w - d * halfs.d * free.x1) / free.n / halfs.m;
                    let m = if fit == Fit::Plain { m.round() } else { m.floor() + (i % 2) as f32 };
                    m.clamp(0.0, most)
                }
                None => 0.0,
            };
            (halfs, Multiples { d: d as i8, m: m as u8 })
        })
    }
}

/// Where candidates for a lone d are, as a share of the free one.
fn nudge(i: usize, fit: Fit) -> f32 {
    let share = |i: usize| 1.0 + 0.015 * (i as f32 - 4.0);
    match fit {
        Fit::Plain => 1.0,
        Fit::Search if i < LANES / 2 => share(i),
        Fit::Search => -share(i - LANES / 2),
    }
}

impl Free {
    const NONE: Free = Free { d: 0.0, error: f32::INFINITY, x1: 0.0, x2: 0.0, xw: 0.0, n: 0.0, w: 0.0 };

    #[inline(always)]
    fn of(book: impl Codebook, side: Option<Side>, w: &[f32], h: &[f32]) -> Free {
        let mut n = 0.0;
        let mut hw = 0.0;
        w.iter().zip(h).for_each(|(&w, &h)| (n, hw) = (n + h, hw + h * w));
        let mut best = Free { n, w: hw, ..Free::NONE };
        let (mut d, mut m) = first(book, side, w);
        for step in 0..4 {
            let sums = measure(book, w, h, &d, &m);
            for (i, &d) in d.iter().enumerate() {
                if sums.error[i] < best.error {
                    let (error, x1, x2, xw) = (sums.error[i], sums.x1[i], sums.x2[i], sums.xw[i]);
                    best = Free { d, error, x1, x2, xw, ..best };
                }
            }
            if step == 1 {
                // Around the best so far.
                let (low, high) = book.ends();
                for i in 0..LANES {
                    d[i] = best.d * (1.0 + (i as f32 - 7.5) * 0.3 / (high - low));
                    m[i] = side.map_or(0.0, |side| side.clamp((hw - d[i] * best.x1) / n));
                }
                continue;
            }
            for i in 0..LANES {
                (d[i], m[i]) = least_squares(side, (n, hw), (sums.x1[i], sums.x2[i], sums.xw[i]));
            }
        }
        best
    }
}

/// Levels to begin with: of the whole range of `w`, and of shares of it.
#[inline(always)]
fn first(book: impl Codebook, side: Option<Side>, w: &[f32]) -> (Lanes, Lanes) {
    let (low, high) = book.ends();
    let (least, most) = w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
    const SHARES: [f32; 8] = [1.0, 0.93, 0.86, 0.78, 0.7, 0.62, 0.53, 0.42];
    const CUTS: [f32; 4] = [0.0, 0.05, 0.12, 0.22];
    match side {
        None => {
            let extreme = if most > -least { most } else { least };
            let end = |i: usize| if i < LANES / 2 { low } else { high };
            (std::array::from_fn(|i| extreme / end(i) * SHARES[i % 8]), [0.0; LANES])
        }
        Some(side) => {
            let least = side.clamp(least);
            let most = most.max(least);
            // Cut from either end.
            let cut = |i: usize| CUTS[i] * (most - least);
            let start: Lanes = std::array::from_fn(|i| side.clamp(least + cut(i / 4)));
            (std::array::from_fn(|i| (most - cut(i % 4) - start[i]) / high), start)
        }
    }
}

/// d and m of least squares for codes of these sums.
#[inline(always)]
fn least_squares(side: Option<Side>, (n, w): (f32, f32), (x1, x2, xw): (f32, f32, f32)) -> (f32, f32) {
    let Some(side) = side else { return (xw / x2, 0.0) };
    let determinant = n * x2 - x1 * x1;
    let m = (x2 * w - x1 * xw) / determinant;
    let clamped = side.clamp(m);
    // m at its bound: d alone.
    if clamped == m { ((n * xw - x1 * w) / determinant, m) } else { (xw / x2, clamped) }
}

/// The halfs of a block of these sub-blocks.
#[inline(always)]
fn halfs(subs: &[Free], bounds: &Bounds) -> Halfs {
    // What an error in d costs, m following it.
    let curvature = |free: &Free| match bounds.m {
        Some(_) if free.n > 0.0 => free.x2 - free.x1 * free.x1 / free.n,
        _ => free.x2,
    };
    let d = unit(subs.iter().map(|free| (free.d, curvature(free))), bounds.d);
    let multiple =
        |v: f32, unit: f32, (low, high): (f32, f32)| if unit == 0.0 { 0.0 } else { even((v / unit).clamp(low, high)) };
    let Some(most) = bounds.m else {
        let (mut xw, mut x2) = (0.0, 0.0);
        for free in subs {
            let s = multiple(free.d, d, bounds.d);
            (xw, x2) = (xw + s * free.xw, x2 + s * s * free.x2);
        }
        return Halfs { d: half(if x2 > 0.0 { xw / x2 } else { d }), m: 0.0 };
    };
    let start = |free: &Free| (free.w - multiple(free.d, d, bounds.d) * d * free.x1) / free.n;
    let m = unit(subs.iter().map(|free| (start(free), free.n)), (0.0, most));
    // Both by least squares.
    let [mut dd, mut dm, mut mm, mut dw, mut mw] = [0.0; 5];
    for free in subs {
        let s = multiple(free.d, d, bounds.d);
        let t = multiple(start(free), m, (0.0, most));
        (dd, dm, mm) = (dd + s * s * free.x2, dm + s * t * free.x1, mm + t * t * free.n);
        (dw, mw) = (dw + s * free.xw, mw + t * free.w);
    }
    let determinant = dd * mm - dm * dm;
    if determinant > 1e-5 * dd * mm {
        Halfs { d: half((mm * dw - dm * mw) / determinant), m: half((dd * mw - dm * dw) / determinant) }
    } else {
        Halfs { d: half(d), m: half(m) }
    }
}

/// The number of which `values` are best whole multiples from `low` to `high`, errors weighed as given.
#[inline(always)]
fn unit(values: impl Iterator<Item = (f32, f32)> + Clone, (low, high): (f32, f32)) -> f32 {
    let extreme = values.clone().fold(0f32, |a, (b, _)| if b.abs() > a.abs() { b } else { a });
    let mut units: Lanes = std::array::from_fn(|i| match low < 0.0 {
        true if i % 2 == 0 => extreme / (low + 0.3 * (i / 2) as f32),
        true => extreme / (high - 0.3 * (i / 2) as f32),
        false => extreme / (high + 0.25 - 0.25 * i as f32).max(0.25),
    });
    if low == high {
        units = [extreme / high; LANES];
    }
    let mut cost = [0.0; LANES];
    for (value, weight) in values {
        for i in 0..LANES {
            let e = even((value / units[i]).clamp(low, high)) * units[i] - value;
            cost[i] += weight * e * e;
        }
    }
    let mut best = 0;
    (1..LANES).for_each(|i| best = if cost[i] < cost[best] { i } else { best });
    units[best]
}

/// As the file holds it. What a half takes for zero is its smallest number: multiples of it may be of use.
#[inline(always)]
pub(super) fn half(v: f32) -> f32 {
    let stored = f16::from_f32(v).to_f32();
    const LEAST: f32 = 1.0 / 16_777_216.0;
    if stored == 0.0 && v.abs() > 1e-3 * LEAST { LEAST.copysign(v) } else { stored }
}
