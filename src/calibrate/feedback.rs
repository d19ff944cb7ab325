//! Rounding with feedback: each column's rounding error is made up for by the columns that are not rounded yet, so
//! that the layer's output changes least (OBQ and GPTQ, arXiv 2210.17323, in the form of LDLQ, arXiv 2307.13304).
//!
//! The error of a row w rounded to v is `(w - v) H (w - v)^T` with H = sum over tokens of x x^T. Write H = M D M^T with M
//! unit upper triangular and D diagonal. Then the error is the sum over columns k of D_k (t_k - v_k)^2 where
//! `t_k = w_k + sum_{j<k} (w_j - v_j) M_jk`: rounding t_k, column by column, minimises each term in turn. Nothing is
//! inverted, and what blocks of columns owe to those before them is one matrix product.
#[cfg(feature = "cuda")]
mod on_device;

use super::columns::{Columns, RowPart};
use super::products::{minus, plus};
use crate::quant::levels::{Fit, Format, Halfs, Multiples};
use candle_core::{DType, Device, Result, Tensor, bail};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Columns that are rounded before their errors are handed on in one product.
const BLOCK: usize = 128;

/// How many times the median of H's diagonal its mean may be where damping is concerned. Single channels can hold nearly
/// all of the activity (down_proj of one of the testbed's blocks: 99.7 % in eight of 1536); a share of such a mean drowns
/// the others. Elsewhere the mean is below this.
const OUTLIERS: f64 = 10.0;

/// H = M D M^T.
pub struct Factor {
    /// M, `[n, n]`, f32.
    m: Tensor,
    /// D.
    d: Vec<f64>,
    /// What was added to H's diagonal.
    lift: Vec<f64>,
    /// M's corners along its diagonal, of CORNER columns each, row-major, on the host: rows ask for them again and again.
    corners: Vec<Vec<f32>>,
}

/// Columns of a kept corner: a multiple of what is rounded at once.
const CORNER: usize = 256;

/// Factors `h` `[n, n]`, symmetric, of which the upper triangle is read. `damping` times the mean of its diagonal (or ten times its median, if that is less) is added
/// to the diagonal, ten times more where that is too little; channels that are never active count as ones of mean activity.
///
/// # Errors
/// `h` is not finite.
pub fn factor(h: &Tensor, damping: f64) -> Result<Factor> {
    let n = h.dim(0)?;
    let diagonal = diagonal(h)?;
    let mean = diagonal.iter().sum::<f64>() / n as f64;
    if !mean.is_finite() {
        bail!("activations are not finite: check the checkpoint's weights");
    }
    // Without any activity every error weighs alike.
    let mean = if mean > 0.0 { mean } else { 1.0 };
    let mut damp = damping * mean.min(OUTLIERS * median(&diagonal));
    for _ in 0..4 {
        let lift: Vec<f64> = diagonal.iter().map(|&d| if d > 0.0 { damp } else { mean }).collect();
        if let Some((m, d)) = upper(h, &lift)? {
            let corner = |start: usize| {
                let len = CORNER.min(n - start);
                m.narrow(0, start, len)?.narrow(1, start, len)?.flatten_all()?.to_vec1()
            };
            let corners = (0..n).step_by(CORNER).map(corner).collect::<Result<_>>()?;
            return Ok(Factor { m, d, lift, corners });
        }
        damp = (10.0 * damp).max(1e-3 * mean);
    }
    bail!("the activations' second moments are not positive definite")
}

/// Of the positive ones of `values`; infinite if there are none.
fn median(values: &[f64]) -> f64 {
    let mut active: Vec<f64> = values.iter().copied().filter(|&v| v > 0.0).collect();
    active.sort_by(f64::total_cmp);
    active.get(active.len() / 2).copied().unwrap_or(f64::INFINITY)
}

fn diagonal(h: &Tensor) -> Result<Vec<f64>> {
    let n = h.dim(0)?;
    let index: Vec<u32> = (0..n as u32).collect();
    h.gather(&Tensor::from_vec(index, (n, 1), h.device())?, 1)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

/// H + diag(lift) = M D M^T, block column by block column from the last; M in f32; none if it is not positive definite.
fn upper(h: &Tensor, lift: &[f64]) -> Result<Option<(Tensor, Vec<f64>)>> {
    let n = lift.len();
    // R with H = R R^T, column by column in the place of H: the columns before are H's still.
    let r = if h.dtype() == DType::F64 { h.copy()? } else { h.to_dtype(DType::F64)? };
    let m = Tensor::zeros((n, n), DType::F32, h.device())?;
    let mut pivots = vec![0.0; n];
    for start in (0..n).step_by(BLOCK).rev() {
        let (len, end) = (BLOCK.min(n - start), (start + BLOCK).min(n));
        let mut s = r.narrow(0, 0, end)?.narrow(1, start, len)?;
        if end < n {
            let right = r.narrow(1, end, n - end)?;
            s = minus(&s, &right.narrow(0, 0, end)?, &right.narrow(0, start, len)?.t()?)?;
        }
        let mut corner: Vec<f64> = s.narrow(0, start, len)?.flatten_all()?.to_vec1()?;
        (0..len).for_each(|i| corner[i * len + i] += lift[start + i]);
        let Some(corner) = upper_corner(corner, len) else { return Ok(None) };
        (0..len).for_each(|i| pivots[start + i] = corner[i * len + i]);
        let block = if start > 0 {
            let inverse = Tensor::from_vec(invert_upper(&corner, len), (len, len), h.device())?;
            let above = s.narrow(0, 0, start)?.contiguous()?.matmul(&inverse.t()?)?;
            Tensor::cat(&[above, Tensor::from_vec(corner, (len, len), h.device())?], 0)?
        } else {
            Tensor::from_vec(corner, (len, len), h.device())?
        };
        let by = Tensor::new(&pivots[start..start + len], h.device())?;
        m.narrow(0, 0, end)?.slice_set(&block.broadcast_div(&by)?.to_dtype(DType::F32)?, 1, start)?;
        r.narrow(0, 0, end)?.slice_set(&block, 1, start)?;
    }
    Ok(Some((m, pivots.into_iter().map(|p| p * p).collect())))
}

/// R upper triangular with R R^T = a, of which only the upper triangle is read, row-major `[n, n]`; none if a is not positive
/// definite.
fn upper_corner(mut a: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    for k in (0..n).rev() {
        let pivot = a[k * n + k];
        if pivot.is_nan() || pivot <= 0.0 {
            return None;
        }
        let pivot = pivot.sqrt();
        let column: Vec<f64> = (0..k).map(|i| a[i * n + k] / pivot).collect();
        for (i, &c) in column.iter().enumerate() {
            a[i * n + k] = c;
            a[i * n + i..i * n + k].iter_mut().zip(&column[i..]).for_each(|(a, b)| *a -= c * b);
        }
        a[k * n + k] = pivot;
        a[k * n..k * n + k].fill(0.0);
    }
    Some(a)
}

/// The inverse of an upper triangular matrix, row-major `[n, n]`.
fn invert_upper(r: &[f64], n: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; n * n];
    for i in (0..n).rev() {
        inverse[i * n + i] = 1.0 / r[i * n + i];
        // Row i = (e_i - sum_{k>i} r_ik row_k) / r_ii.
        for k in i + 1..n {
            let f = r[i * n + k] / r[i * n + i];
            let (head, tail) = inverse.split_at_mut(k * n);
            head[i * n + k..(i + 1) * n].iter_mut().zip(&tail[k..n]).for_each(|(a, b)| *a -= f * b);
        }
    }
    inverse
}

impl Factor {
    /// `B H^-1` for B `[rows, n]`.
    pub fn solve(&self, b: &Tensor) -> Result<Tensor> {
        let n = self.d.len();
        let device = b.device();
        let b = b.contiguous()?;
        let m = self.m.to_device(device)?;
        let x = Tensor::zeros(b.shape(), b.dtype(), device)?;
        let starts: Vec<usize> = (0..n).step_by(BLOCK).collect();
        let inverse = |&start: &usize| -> Vec<f32> {
            let len = BLOCK.min(n - start);
            let corner: Vec<f64> = self.corner(start, len).into_iter().map(f64::from).collect();
            invert_upper(&corner, len).into_iter().map(|v| v as f32).collect()
        };
        let inverses: Vec<Vec<f32>> = starts.par_iter().map(inverse).collect();
        let corner = |start: usize, len: usize| Tensor::from_slice(&inverses[start / BLOCK], (len, len), device);
        // Y M^T = B, from the last block; then Y D^-1 -> Y; then X M = Y, from the first.
        for start in (0..n).step_by(BLOCK).rev() {
            let (len, end) = (BLOCK.min(n - start), (start + BLOCK).min(n));
            let mut s = b.narrow(1, start, len)?;
            if end < n {
                let m = m.narrow(0, start, len)?.narrow(1, end, n - end)?;
                s = minus(&s, &x.narrow(1, end, n - end)?, &m.t()?)?;
            }
            x.slice_set(&s.contiguous()?.matmul(&corner(start, len)?.t()?)?, 1, start)?;
        }
        let d: Vec<f32> = self.d.iter().map(|d| (1.0 / d) as f32).collect();
        let y = x.broadcast_mul(&Tensor::new(d, device)?)?;
        for start in (0..n).step_by(BLOCK) {
            let len = BLOCK.min(n - start);
            let mut s = y.narrow(1, start, len)?;
            if start > 0 {
                let m = m.narrow(0, 0, start)?.narrow(1, start, len)?;
                s = minus(&s, &x.narrow(1, 0, start)?, &m)?;
            }
            x.slice_set(&s.contiguous()?.matmul(&corner(start, len)?)?, 1, start)?;
        }
        Ok(x)
    }

    /// M made block unit: its blocks of `size` columns times the inverse of their corner, so that H = M D M^T with blocks in
    /// D.
    pub fn block_unit(&self, size: usize) -> Result<Tensor> {
        let n = self.d.len();
        let mut parts = Vec::new();
        for start in (0..n).step_by(size) {
            let len = size.min(n - start);
            let columns = self.m.narrow(1, start, len)?;
            let corner = columns.narrow(0, start, len)?.to_dtype(DType::F64)?;
            let inverse = invert_upper(&corner.flatten_all()?.to_vec1::<f64>()?, len);
            let inverse = Tensor::from_vec(inverse, (len, len), self.m.device())?.to_dtype(DType::F32)?;
            parts.push(columns.contiguous()?.matmul(&inverse)?);
        }
        Tensor::cat(&parts, 1)
    }

    /// M's corner of `len` columns from `start` on, which are among one kept corner's.
    fn corner(&self, start: usize, len: usize) -> Vec<f32> {
        let (kept, at) = (&self.corners[start / CORNER], start % CORNER);
        let width = CORNER.min(self.d.len() - (start - at));
        kept.chunks(width).skip(at).take(len).flat_map(|row| &row[at..at + len]).copied().collect()
    }

    /// What was added to H's diagonal.
    pub fn added(&self) -> &[f64] {
        &self.lift
    }

    /// `(w - v) H (w - v)^T`, summed over rows, of H with its damping.
    pub fn error(&self, w: &Tensor, v: &Tensor) -> Result<f64> {
        let t = (w - v)?.matmul(&self.m)?;
        let columns: Vec<f32> = t.sqr()?.sum(0)?.to_vec1()?;
        Ok(columns.iter().zip(&self.d).map(|(&c, d)| f64::from(c) * d).sum())
    }
}

/// A weight matrix as codes and what they stand for.
pub struct Coded {
    pub format: Format,
    pub rows: usize,
    /// Row by row, one per weight.
    pub codes: Vec<u8>,
    /// Row by row, one per block.
    pub halfs: Vec<Halfs>,
    /// Row by row, one per sub-block; of no meaning in simple types.
    pub multiples: Vec<Multiples>,
    /// What it stands for, `[rows, n]`, where codes were found on a GPU.
    pub values: Option<Tensor>,
}

impl Coded {
    /// What it stands for, `[rows, n]`, f32: the very values that ggml reads from the bytes.
    pub fn weight(&self, device: &Device) -> Result<Tensor> {
        if let Some(values) = self.values.as_ref().filter(|values| values.device().same_device(device)) {
            return Ok(values.clone());
        }
        let (format, size) = (self.format, self.format.sub_group());
        let subs = format.group() / size;
        let mut values = vec![0.0; self.codes.len()];
        let blocks = values.par_chunks_mut(size).zip(self.codes.par_chunks(size)).zip(&self.multiples).enumerate();
        blocks.with_min_len(64).for_each(|(i, ((values, codes), &multiples))| {
            let levels = format.levels(self.halfs[i / subs], multiples);
            values.iter_mut().zip(codes).for_each(|(v, &c)| *v = levels.value(format.place(c)));
        });
        Tensor::from_vec(values, (self.rows, self.codes.len() / self.rows.max(1)), device)
    }

    /// The bytes that a file holds.
    ///
    /// # Errors
    /// The weights were too large for halfs.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        if self.halfs.iter().any(|l| !l.d.is_finite() || !l.m.is_finite()) {
            bail!("weights too large for {}'s halfs: check the checkpoint", self.format.ty());
        }
        const BLOCKS: usize = 4096;
        let (group, subs) = (self.format.group(), self.format.group() / self.format.sub_group());
        let parts = (self.halfs.par_chunks(BLOCKS))
            .zip(self.multiples.par_chunks(BLOCKS * subs))
            .zip(self.codes.par_chunks(BLOCKS * group));
        let pack = |((halfs, multiples), codes): ((&[Halfs], &[Multiples]), &[u8])| {
            let mut bytes = Vec::new();
            let blocks = halfs.iter().zip(multiples.chunks(subs)).zip(codes.chunks(group));
            blocks.for_each(|((&halfs, multiples), codes)| self.format.pack(halfs, multiples, codes, &mut bytes));
            bytes
        };
        Ok(parts.map(pack).collect::<Vec<_>>().concat())
    }
}

/// How many of `count` rows are rounded side by side before their errors are handed on to the rows after them: a 24th, by 32.
/// Among themselves they do not make up for each other; fewer at once would leave the processor's cores and a GPU idle.
fn side_by_side(count: usize) -> usize {
    (count / 24).next_multiple_of(32).max(32)
}

/// As [`round`], with feedback over rows, too: what errors of some rows cost at the output, the rows after them make up
/// for. `rows` factors F, the output's metric, so that `tr(F E H E^T)`, E the errors, is what is made small.
///
/// With F = M D M^T, M block unit upper triangular, that is the sum over blocks b of rows of `tr(D_b E_b' H E_b'^T)` where
/// `E_b' = E_b + sum_{a<b} M_ab^T E_a` (as in YAQA, arXiv 2505.22988): a block's rows are rounded as their weights plus
/// that sum.
///
/// # Errors
/// The shapes do not fit.
pub fn round_rows(w: &Tensor, factor: &Factor, rows: &Factor, format: Format, fit: Fit) -> Result<Coded> {
    let count = w.dim(0)?;
    if count != rows.d.len() {
        bail!("{count} rows for a metric of {} outputs", rows.d.len());
    }
    let w = w.contiguous()?;
    #[cfg(feature = "cuda")]
    if on_device::rounds(format, fit, w.device()) {
        return on_device::round_rows(&w, factor, rows);
    }
    let mut all =
        Coded { format, rows: count, codes: Vec::new(), halfs: Vec::new(), multiples: Vec::new(), values: None };
    row_by_row(&w, rows, |target| {
        let coded = round(target, factor, format, fit)?;
        let values = coded.weight(w.device())?;
        all.codes.extend(coded.codes);
        all.halfs.extend(coded.halfs);
        all.multiples.extend(coded.multiples);
        Ok(values)
    })?;
    Ok(all)
}

/// Has `round` turn targets into values, some rows at a time, and hands their errors on to the rows after them.
fn row_by_row(w: &Tensor, rows: &Factor, mut round: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<()> {
    let (count, size) = (w.dim(0)?, side_by_side(w.dim(0)?));
    let m = rows.block_unit(size)?.to_device(w.device())?;
    let errors = Tensor::zeros(w.shape(), DType::F32, w.device())?;
    for start in (0..count).step_by(size) {
        let own = w.narrow(0, start, size.min(count - start))?;
        let target = if start > 0 {
            let m = m.narrow(0, 0, start)?.narrow(1, start, own.dim(0)?)?.t()?;
            plus(&own, &m, &errors.narrow(0, 0, start)?)?
        } else {
            own.clone()
        };
        errors.slice_set(&(own - round(&target)?)?, 0, start)?;
    }
    Ok(())
}

/// Rounds `w` `[rows, n]` with feedback. Rows must be whole blocks of `format`. The numbers of a block follow from its
/// weights as they are when its first column is reached, moved to where they make up best for the columns before; those
/// of a sub-block likewise, given its block's.
///
/// # Errors
/// The shapes do not fit.
pub fn round(w: &Tensor, factor: &Factor, format: Format, fit: Fit) -> Result<Coded> {
    let (rows, n) = w.dims2()?;
    let (group, size) = (format.group(), format.sub_group());
    if n != factor.d.len() || !n.is_multiple_of(group) {
        bail!("rows of {n} weights for second moments of {} channels, in blocks of {group}", factor.d.len());
    }
    let w = w.contiguous()?;
    #[cfg(feature = "cuda")]
    if on_device::rounds(format, fit, w.device()) {
        return on_device::round(&w, factor);
    }
    let errors = Tensor::zeros((rows, n), DType::F32, w.device())?;
    let mut codes = vec![0u8; rows * n];
    let mut halfs = vec![Halfs::default(); rows * n / group];
    let mut multiples = vec![Multiples::default(); rows * n / size];
    let block = BLOCK.max(group);
    for start in (0..n).step_by(block) {
        let len = block.min(n - start);
        let original = w.narrow(1, start, len)?;
        let mut t = original.clone();
        if start > 0 {
            let m = factor.m.narrow(1, start, len)?.narrow(0, 0, start)?;
            t = plus(&t, &errors.narrow(1, 0, start)?, &m)?;
        }
        // Together: what waits for a GPU here is the transfer's beginning, not its length.
        let mut both: Vec<f32> = Tensor::cat(&[t, original], 0)?.flatten_all()?.to_vec1()?;
        let (t, original) = both.split_at_mut(rows * len);
        let m = factor.corner(start, len);
        let columns = Columns::new(format, fit, &m, &factor.d[start..start + len]);
        // Each row on its own, for the widest vectors that the processor has; `t` becomes the row's errors.
        t.par_chunks_mut(len)
            .zip(original.par_chunks(len))
            .zip(codes.par_chunks_mut(n))
            .zip(halfs.par_chunks_mut(n / group).zip(multiples.par_chunks_mut(n / size)))
            .with_min_len(2)
            .for_each(|(((t, original), codes), (halfs, multiples))| {
                let part = RowPart {
                    codes: &mut codes[start..start + len],
                    halfs: &mut halfs[start / group..(start + len) / group],
                    multiples: &mut multiples[start / size..(start + len) / size],
                };
                pulp::Arch::new().dispatch(RoundRow { columns: &columns, t, original, part });
            });
        errors.slice_set(&Tensor::from_slice(t, (rows, len), w.device())?, 1, start)?;
    }
    Ok(Coded { format, rows, codes, halfs, multiples, values: None })
}

/// [`Columns::round`] for the widest vectors that the processor has.
struct RoundRow<'a> {
    columns: &'a Columns<'a>,
    t: &'a mut [f32],
    original: &'a [f32],
    part: RowPart<'a>,
}

impl WithSimd for RoundRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.columns.round(simd, self.t, self.original, self.part);
    }
}
