//! The columns of one row, rounded one after the other (see [`super::feedback`]).
use crate::quant::levels::{
    Codebook, Even, Fit, Format, Grid, Halfs, LANES, Lanes, Levels, Metric, Multiples, Quad, Simple, Uneven,
};
use pulp::Simd;

/// Columns that are rounded one after the other: whole blocks of the type.
pub(super) struct Columns<'a> {
    format: Format,
    fit: Fit,
    /// Their corner of M, `[len, len]`.
    m: &'a [f32],
    /// Of D.
    d: &'a [f64],
    /// The same over its largest in each block.
    share: Vec<f32>,
}

/// A row's codes and numbers, as far as these columns go.
pub(super) struct RowPart<'a> {
    pub codes: &'a mut [u8],
    pub halfs: &'a mut [Halfs],
    pub multiples: &'a mut [Multiples],
}

/// A block's D over its largest.
pub(super) fn shares(d: &[f64]) -> Vec<f32> {
    let most = d.iter().fold(f64::MIN_POSITIVE, |a, &b| a.max(b));
    d.iter().map(|d| (d / most) as f32).collect()
}

impl<'a> Columns<'a> {
    pub fn new(format: Format, fit: Fit, m: &'a [f32], d: &'a [f64]) -> Self {
        Columns { format, fit, m, d, share: d.chunks(format.group()).flat_map(shares).collect() }
    }

    /// Rounds a row's targets `t` for the weights `original`; errors are left in `t`.
    #[inline(always)]
    pub fn round(&self, simd: impl Simd, t: &mut [f32], original: &[f32], out: RowPart) {
        match self.format {
            Format::Simple(simple) => self.simple(simd, simple, t, original, out),
            Format::Q2K => self.sub_blocks(simd, Even::<0, 3>, t, original, out),
            Format::Q3K => self.sub_blocks(simd, Even::<-4, 3>, t, original, out),
            Format::Q4K => self.sub_blocks(simd, Even::<0, 15>, t, original, out),
            Format::Q5K => self.sub_blocks(simd, Even::<0, 31>, t, original, out),
            Format::Q6K => self.sub_blocks(simd, Even::<-32, 31>, t, original, out),
            Format::Iq4Nl | Format::Iq4Xs => self.sub_blocks(simd, Uneven::new(), t, original, out),
            Format::Iq3S | Format::Iq3Xxs => {
                if let Some(grid) = Grid::of(self.format) {
                    self.points(grid, t, original, out);
                }
            }
        }
    }

    /// `t` of `len` columns from `k` on as it would be without any rounding from there on.
    #[inline(always)]
    fn ahead<'b>(&self, t: &[f32], original: &[f32], (k, len): (usize, usize), ahead: &'b mut [f32]) -> &'b mut [f32] {
        let ahead = &mut ahead[..len];
        ahead.copy_from_slice(&t[k..k + len]);
        for (j, i) in (k..k + len).enumerate() {
            let e = original[i] - ahead[j];
            let m = &self.m[i * t.len() + i + 1..i * t.len() + k + len];
            ahead[j + 1..].iter_mut().zip(m).for_each(|(t, m)| *t += e * m);
        }
        ahead
    }

    #[inline(always)]
    fn simple(&self, simd: impl Simd, simple: Simple, t: &mut [f32], original: &[f32], out: RowPart) {
        match (self.fit, simple) {
            (Fit::Plain, _) => self.plain(simple, t, original, out),
            (Fit::Search, Simple::Mbq3) => self.search::<128>(simd, simple, Even::<0, 7>, t, original, out),
            (Fit::Search, Simple::Q4_0 | Simple::Q4_1) => {
                self.search::<32>(simd, simple, Even::<0, 15>, t, original, out)
            }
            (Fit::Search, Simple::Q5_0 | Simple::Q5_1) => {
                self.search::<32>(simd, simple, Even::<0, 31>, t, original, out)
            }
            (Fit::Search, Simple::Q8_0) => self.search::<32>(simd, simple, Even::<1, 255>, t, original, out),
        }
    }

    /// The type's own levels.
    #[inline(always)]
    fn plain(&self, simple: Simple, t: &mut [f32], original: &[f32], out: RowPart) {
        let (len, group) = (t.len(), simple.group());
        let mut current = Levels::default();
        let mut room = [0.0; 128];
        for k in 0..len {
            if k % group == 0 {
                let ahead = self.ahead(t, original, (k, group), &mut room);
                current = simple.fit(ahead, &self.d[k..k + group], self.fit);
                out.halfs[k / group] = Halfs { d: current.d, m: current.m };
            }
            let code = simple.nearest(current, t[k]);
            out.codes[k] = code;
            let e = original[k] - current.value(code);
            t[k] = e;
            let m = &self.m[k * len + k + 1..(k + 1) * len];
            t[k + 1..].iter_mut().zip(m).for_each(|(t, m)| *t += e * m);
        }
    }

    /// Levels by the feedback: sixteen candidates around the best so far are rounded side by side, and the best one's
    /// levels are refitted to its codes; four times, closer each time. Blocks have N weights.
    #[inline(always)]
    fn search<const N: usize>(
        &self,
        simd: impl Simd,
        simple: Simple,
        book: impl Codebook,
        t: &mut [f32],
        original: &[f32],
        out: RowPart,
    ) {
        let mut room = [0.0; N];
        for k in (0..t.len()).step_by(N) {
            let ahead = self.ahead(t, original, (k, N), &mut room);
            let mut best = simple.fit(ahead, &self.d[k..k + N], self.fit);
            let (mut least, mut codes) = (f32::INFINITY, [0.0; N]);
            let refit = Refit::<N>::new(self, (t, k), original);
            for pass in 0..Simple::PASSES {
                let levels = simple.candidates(best, pass);
                let mut places = [[0.0; LANES]; N];
                let (lane, error) = self.race(simd, book, &levels, original, (&t[k..k + N], k), &mut places);
                if error < least || pass == 0 {
                    (best, least, codes) = (levels[lane], error, places.map(|place| place[lane]));
                }
                let (levels, error) = refit.levels(self, simple, &codes, best);
                if error < least {
                    (best, least) = (levels, error);
                }
            }
            out.halfs[k / N] = Halfs { d: best.d, m: best.m };
            for (i, place) in (k..k + N).zip(codes) {
                out.codes[i] = place as u8;
                t[i] = original[i] - best.value(place);
            }
            self.hand_on(t, (k, N), t.len());
        }
    }

    #[inline(always)]
    fn sub_blocks(&self, simd: impl Simd, book: impl Codebook, t: &mut [f32], original: &[f32], out: RowPart) {
        let (len, group, size) = (t.len(), self.format.group(), self.format.sub_group());
        let (mut room, mut halfs) = ([0.0; 256], Halfs::default());
        for k in (0..len).step_by(size) {
            if k % group == 0 && size < group {
                let ahead = self.ahead(t, original, (k, group), &mut room);
                halfs = self.format.fit_block(book, ahead, &self.share[k..k + group]);
            }
            let ahead = self.ahead(t, original, (k, size), &mut room);
            let candidates = self.format.candidates(book, halfs, (ahead, &self.share[k..k + size]), self.fit);
            let levels = candidates.map(|(halfs, multiples)| self.format.levels(halfs, multiples));
            let mut places = [[0.0; LANES]; 32];
            let (best, _) = self.race(simd, book, &levels, original, (&t[k..k + size], k), &mut places);
            (out.halfs[k / group], out.multiples[k / size]) = candidates[best];
            halfs = candidates[best].0;
            for i in k..k + size {
                let place = places[i - k][best];
                out.codes[i] = book.code(place);
                t[i] = original[i] - levels[best].value(place);
            }
            self.hand_on(t, (k, size), len);
        }
    }

    /// Adds to the columns up to `end` what the errors of `len` columns from `k` on ask of them.
    #[inline(always)]
    fn hand_on(&self, t: &mut [f32], (k, len): (usize, usize), end: usize) {
        let n = t.len();
        let (done, rest) = t[..end].split_at_mut(k + len);
        for (i, error) in done.iter().enumerate().skip(k) {
            let m = &self.m[i * n + k + len..i * n + end];
            rest.iter_mut().zip(m).for_each(|(t, m)| *t += error * m);
        }
    }

    /// Four columns at a time are a point of the grid.
    #[inline(always)]
    fn points(&self, grid: &Grid, t: &mut [f32], original: &[f32], out: RowPart) {
        const SIZE: usize = 32;
        let (len, group) = (t.len(), self.format.group());
        let (mut room, mut halfs) = ([0.0; 256], Halfs::default());
        for k in (0..len).step_by(SIZE) {
            if k % group == 0 {
                let ahead = self.ahead(t, original, (k, group), &mut room);
                halfs = grid.fit_block(ahead, &self.share[k..k + group]);
                out.halfs[k / group] = halfs;
            }
            let ahead = self.ahead(t, original, (k, SIZE), &mut room);
            let count = if self.fit == Fit::Plain { 1 } else { 5 };
            let mut best = f32::INFINITY;
            let targets: [f32; SIZE] = std::array::from_fn(|i| t[k + i]);
            for multiples in grid.candidates(halfs, ahead, &self.share[k..k + SIZE], count) {
                let d = self.format.levels(halfs, multiples).d;
                let (error, codes) = self.try_points(grid, d, (t, k), original);
                // The first whatever its error.
                if error < best || out.multiples[k / SIZE].d == 0 {
                    best = error;
                    out.multiples[k / SIZE] = multiples;
                    out.codes[k..k + SIZE].copy_from_slice(&codes);
                }
                t[k..k + SIZE].copy_from_slice(&targets);
            }
            let levels = self.format.levels(halfs, out.multiples[k / SIZE]);
            (k..k + SIZE).for_each(|i| t[i] = original[i] - levels.value(grid.place(out.codes[i])));
            self.hand_on(t, (k, SIZE), len);
        }
    }

    /// Rounds 32 columns from `k` on to points times `d`; their error and codes. Their targets are lost.
    #[inline(always)]
    fn try_points(&self, grid: &Grid, d: f32, (t, k): (&mut [f32], usize), original: &[f32]) -> (f32, [u8; 32]) {
        let (mut error, mut codes) = (0.0, [0; 32]);
        let mut take = |t: &mut [f32], i: usize, quad: &Quad, end: usize| {
            (0..4).for_each(|j| t[i + j] = original[i + j] - quad.values[j]);
            codes[i - k..i - k + 4].copy_from_slice(&quad.codes);
            self.hand_on(t, (i, 4), end);
        };
        for i in (k..k + 32).step_by(8) {
            let first = self.quads(grid, d, (t, i), original);
            let before: [f32; 4] = std::array::from_fn(|j| t[i + 4 + j]);
            let mut best: Option<(Quad, Quad)> = None;
            // After a first half of each parity; where signs are free, after the best alone.
            let better = usize::from(first[1].error < first[0].error);
            for parity in if grid.even { 0..2 } else { better..better + 1 } {
                take(t, i, &first[parity], i + 8);
                let second = self.quads(grid, d, (t, i + 4), original);
                let other = if grid.even { parity } else { usize::from(second[1].error < second[0].error) };
                let sum = first[parity].error + second[other].error;
                if best.is_none_or(|(a, b)| sum < a.error + b.error) {
                    best = Some((first[parity], second[other]));
                }
                t[i + 4..i + 8].copy_from_slice(&before);
            }
            if let Some((a, b)) = best {
                take(t, i, &a, i + 8);
                take(t, i + 4, &b, i + 8);
                error += a.error + b.error;
            }
            self.hand_on(t, (i, 8), k + 32);
        }
        (error, codes)
    }

    /// The nearest points for the columns from `i` on, by parity.
    #[inline(always)]
    fn quads(&self, grid: &Grid, d: f32, (t, i): (&[f32], usize), original: &[f32]) -> [Quad; 2] {
        let mut ahead = [0.0; 4];
        self.ahead(t, original, (i, 4), &mut ahead);
        let m = |a: usize, b: usize| self.m[(i + a) * t.len() + i + b];
        let metric = Metric {
            m: [m(0, 1), m(0, 2), m(1, 2), m(0, 3), m(1, 3), m(2, 3)],
            d: std::array::from_fn(|j| self.share[i + j]),
        };
        grid.nearest(&ahead, &metric, d)
    }

    /// Rounds the columns from `k` on, of targets `t`, with the levels of each candidate; which of them leaves the
    /// least error, counting how errors are handed on within these columns. Ties go to the first.
    ///
    /// Here columns fetch what the errors before them ask for, four at a time, so that their targets stay in registers.
    #[inline(always)]
    fn race<const N: usize, S: Simd>(
        &self,
        _: S,
        book: impl Codebook,
        levels: &[Levels; LANES],
        original: &[f32],
        (t, k): (&[f32], usize),
        places: &mut [Lanes; N],
    ) -> (usize, f32) {
        const AT_ONCE: usize = 4;
        let len = original.len();
        let (d, m): (Lanes, Lanes) = (levels.map(|l| l.d), levels.map(|l| l.m));
        let per_d = d.map(|d| 1.0 / d);
        let (mut errors, mut cost) = ([[0.0; LANES]; N], [0.0; LANES]);
        for start in (0..t.len()).step_by(AT_ONCE) {
            let mut targets: [Lanes; AT_ONCE] = std::array::from_fn(|j| [t[start + j]; LANES]);
            let corner = &self.m[k * len + k + start..];
            for (e, row) in errors[..start].iter().zip(corner.chunks(len)) {
                let row = &row[..AT_ONCE];
                targets.iter_mut().zip(row).for_each(|(target, &m)| add_product::<S>(target, e, m));
            }
            for j in 0..AT_ONCE {
                let i = start + j;
                let (now, share, original) = (targets[j], self.share[k + i], original[k + i]);
                for lane in 0..LANES {
                    let place = book.nearest((now[lane] - m[lane]) * per_d[lane]);
                    let value = d[lane] * place + m[lane];
                    places[i][lane] = place;
                    cost[lane] += share * (now[lane] - value) * (now[lane] - value);
                    errors[i][lane] = original - value;
                }
                let (e, row) = (&errors[i], &corner[i * len..][..AT_ONCE]);
                for next in j + 1..AT_ONCE {
                    add_product::<S>(&mut targets[next], e, row[next]);
                }
            }
        }
        let mut best = 0;
        (1..LANES).for_each(|lane| best = if cost[lane] < cost[best] { lane } else { best });
        (best, cost[best])
    }
}

/// Adds `e` times `m`, rounded once where the processor has an instruction for it.
#[inline(always)]
fn add_product<S: Simd>(sum: &mut Lanes, e: &Lanes, m: f32) {
    for (sum, &e) in sum.iter_mut().zip(e) {
        *sum = if S::IS_SCALAR { *sum + e * m } else { e.mul_add(m, *sum) };
    }
}

/// What the levels of a block's codes are refitted by. A block of codes c has the errors `a - d M^T c - m M^T 1` before
/// they are squared and weighed by D.
struct Refit<const N: usize> {
    /// First column of the block.
    k: usize,
    /// The targets as they are if every value is 0.
    a: [f32; N],
    /// M^T 1.
    ones: [f32; N],
}

impl<const N: usize> Refit<N> {
    #[inline(always)]
    fn new(columns: &Columns, (t, k): (&[f32], usize), original: &[f32]) -> Self {
        let mut this = Refit { k, a: [0.0; N], ones: [0.0; N] };
        let block: [f32; N] = std::array::from_fn(|i| original[k + i]);
        this.a = this.handed(columns, t.len(), &block);
        (0..N).for_each(|i| this.a[i] += t[k + i] - original[k + i]);
        this.ones = this.handed(columns, t.len(), &[1.0; N]);
        this
    }

    /// M^T x.
    #[inline(always)]
    fn handed(&self, columns: &Columns, n: usize, x: &[f32; N]) -> [f32; N] {
        let mut out = *x;
        for (i, &x) in x.iter().enumerate() {
            let m = &columns.m[(self.k + i) * n + self.k + i + 1..];
            out[i + 1..].iter_mut().zip(m).for_each(|(out, m)| *out += x * m);
        }
        out
    }

    /// The levels of least error for `codes`, as a file holds them, and that error; `now` where codes do not determine
    /// them.
    #[inline(always)]
    fn levels(&self, columns: &Columns, simple: Simple, codes: &[f32; N], now: Levels) -> (Levels, f32) {
        let n = columns.share.len();
        let mut p = self.handed(columns, n, codes);
        if let Some(middle) = simple.middle() {
            p.iter_mut().zip(self.ones).for_each(|(p, one)| *p -= middle * one);
        }
        let [mut pp, mut pq, mut qq, mut ap, mut aq] = [0.0; 5];
        let share = &columns.share[self.k..self.k + N];
        for (((&a, &p), &q), &h) in self.a.iter().zip(&p).zip(&self.ones).zip(share) {
            let [a, p, q, h] = [a, p, q, h].map(f64::from);
            (pp, pq, qq) = (pp + h * p * p, pq + h * p * q, qq + h * q * q);
            (ap, aq) = (ap + h * a * p, aq + h * a * q);
        }
        let determinant = pp * qq - pq * pq;
        let levels = match simple.middle() {
            Some(_) if pp > 0.0 => simple.stored((ap / pp) as f32, 0.0),
            None if determinant > 1e-9 * pp * qq => {
                let (d, m) = ((ap * qq - aq * pq) / determinant, (aq * pp - ap * pq) / determinant);
                simple.stored(d as f32, m as f32)
            }
            _ => now,
        };
        let m = if simple.middle().is_some() { 0.0 } else { levels.m };
        let errors = self.a.iter().zip(&p).zip(&self.ones).map(|((a, p), q)| a - levels.d * p - m * q);
        (levels, errors.zip(share).map(|(e, h)| h * e * e).sum())
    }
}
