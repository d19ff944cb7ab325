//! Row-wise operations that candle has no fast CPU form of: fused and parallel on the CPU, composed of candle's own
//! operations, or a kernel (`on_device`), on others. None of them keeps a graph; gradients are written by hand in `super::block`.
#[cfg(feature = "cuda")]
mod on_device;

use super::arch::{Activation, Pairs};
use candle_core::{CpuStorage, D, DType, InplaceOp1, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;
use std::ops::Range;

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("operand is not contiguous"),
    }
}

fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(v), Some((start, end))) => Ok(&mut v[start..end]),
        _ => bail!("operand is not contiguous f32"),
    }
}

/// Applies a closure to a tensor's contiguous f32 data in place (CPU).
struct Update<F>(F);

impl<F: Fn(&mut [f32])> InplaceOp1 for Update<F> {
    fn name(&self) -> &'static str {
        "update"
    }
    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        (self.0)(slice_mut(storage, layout)?);
        Ok(())
    }
}

/// The same with a second, read-only operand.
struct Update2<F>(F);

impl<F: Fn(&mut [f32], &[f32])> InplaceOp2 for Update2<F> {
    fn name(&self) -> &'static str {
        "update2"
    }
    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        (self.0)(slice_mut(s1, l1)?, slice(s2, l2)?);
        Ok(())
    }
}

/// Runs `f` over the f32 data of a contiguous CPU tensor.
pub(crate) fn with_cpu<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(storage) => Ok(f(slice(storage, layout)?)),
        _ => bail!("a CPU tensor was expected"),
    }
}

/// Rows `rows` of `x`, in order; not copied when they are all of them.
pub(crate) fn select_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    if rows.len() == x.dim(0)? { Ok(x.clone()) } else { x.index_select(&Tensor::new(rows, x.device())?, 0) }
}

/// `f(0)` to `f(n - 1)`, `at_once` of them at a time (1 on an accelerator). Work that is divided here need not be divided
/// within a product, where threads wait for one another.
pub(crate) fn each<T: Send>(n: usize, at_once: usize, f: impl Fn(usize) -> Result<T> + Sync + Send) -> Result<Vec<T>> {
    if at_once < 2 {
        return (0..n).map(f).collect();
    }
    let step = if at_once < rayon::current_num_threads() { at_once } else { n.max(1) };
    let mut out = Vec::with_capacity(n);
    for from in (0..n).step_by(step) {
        let part = (from..n.min(from + step)).into_par_iter().with_max_len(1);
        out.extend(part.map(&f).collect::<Result<Vec<T>>>()?);
    }
    Ok(out)
}

/// `a + b`, `a` overwritten on the CPU: candle's own operators wait for a thread of candle's there, which is slow where
/// all cores are busy.
pub(crate) fn add_to(a: Tensor, b: &Tensor) -> Result<Tensor> {
    if !a.device().is_cpu() {
        return a + b;
    }
    let a = a.contiguous()?;
    let add = |a: &mut [f32], b: &[f32]| {
        a.par_chunks_mut(1 << 14).zip(b.par_chunks(1 << 14)).for_each(|(a, b)| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        });
    };
    a.inplace_op2(&b.contiguous()?, &Update2(add))?;
    Ok(a)
}

/// `a + b`.
pub(crate) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() { add_to(a.copy()?, b) } else { a + b }
}

/// `f(x, b)` for each x of `a` and the b of its column; `a` is overwritten.
fn by_row(a: Tensor, b: &Tensor, f: impl Fn(&mut f32, f32) + Sync) -> Result<Tensor> {
    let cols = b.elem_count();
    let update = |a: &mut [f32], b: &[f32]| {
        a.par_chunks_mut(cols).with_min_len(16).for_each(|a| a.iter_mut().zip(b).for_each(|(a, b)| f(a, *b)));
    };
    a.inplace_op2(&b.contiguous()?, &Update2(update))?;
    Ok(a)
}

/// `a` with `b` added to every row; `a` may be overwritten.
pub(crate) fn add_row(a: Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() { by_row(a.contiguous()?, b, |a, b| *a += b) } else { a.broadcast_add(b) }
}

/// `a` with every row multiplied by `b`.
pub(crate) fn times_row(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() { by_row(a.copy()?.contiguous()?, b, |a, b| *a *= b) } else { a.broadcast_mul(b) }
}

/// `a` with every row divided by `b`; `a` may be overwritten.
pub(crate) fn over_row(a: Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() { by_row(a.contiguous()?, b, |a, b| *a /= b) } else { a.broadcast_div(b) }
}

/// Row-wise root-mean-square scale, `1 / sqrt(mean x^2 + eps)`: `[n, c]` to `[n, 1]`.
pub(crate) fn rms_scale(x: &Tensor, eps: f64) -> Result<Tensor> {
    (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()
}

/// RMS norm with gain `w`.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return candle_nn::ops::rms_norm(&x.contiguous()?, w, eps as f32);
    }
    let cols = w.elem_count();
    let w: Vec<f32> = w.to_vec1()?;
    let out = x.copy()?.contiguous()?;
    out.inplace_op1(&Update(|data: &mut [f32]| {
        data.par_chunks_mut(cols).for_each(|row| {
            let sum: f64 = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            let scale = 1.0 / ((sum / cols as f64) as f32 + eps as f32).sqrt();
            row.iter_mut().zip(&w).for_each(|(v, w)| *v = *v * scale * w);
        });
    }))?;
    Ok(out)
}

/// Softmax of `scale` times attention scores `[batch, repeats * rows, n]` where row i (modulo rows) sees the columns
/// `seen[i]`, one or more. `scores` may be overwritten.
pub(crate) fn masked_softmax(scores: Tensor, scale: f64, seen: &[Range<usize>]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if scores.device().is_cuda() {
        return on_device::masked_softmax(scores, scale, seen);
    }
    let n = scores.dim(D::Minus1)?;
    let scores = scores.contiguous()?;
    scores.inplace_op1(&Update(|data: &mut [f32]| {
        data.par_chunks_mut(n).with_min_len(16).enumerate().for_each(|(i, row)| {
            let seen = &seen[i % seen.len()];
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            let row = &mut row[seen.clone()];
            row.iter_mut().for_each(|v| *v *= scale as f32);
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0f64;
            for v in row.iter_mut() {
                *v = (*v - max).exp();
                sum += f64::from(*v);
            }
            let sum = sum as f32;
            row.iter_mut().for_each(|v| *v /= sum);
        });
    }))?;
    Ok(scores)
}

/// `f(gate) * up`. `gate` may be overwritten.
pub(crate) fn activate(gate: Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if !gate.device().is_cpu() {
        return match activation {
            Activation::Silu => gate.silu()? * up,
            Activation::GeluTanh => gate.gelu()? * up,
        };
    }
    match activation {
        Activation::Silu => by_element(gate, up, |g, u| *g / (1.0 + (-*g).exp()) * u),
        Activation::GeluTanh => by_element(gate, up, |g, u| 0.5 * *g * (1.0 + gelu_inner(*g).tanh()) * u),
    }
}

/// `f(a, b)`, element by element; `a` is overwritten (CPU).
fn by_element(a: Tensor, b: &Tensor, f: impl Fn(&f32, f32) -> f32 + Sync + Send) -> Result<Tensor> {
    let update = |a: &mut [f32], b: &[f32]| a.par_iter_mut().with_min_len(4096).zip(b).for_each(|(a, b)| *a = f(a, *b));
    a.inplace_op2(b, &Update2(update))?;
    Ok(a)
}

/// sqrt(2 / pi) and the cubic's weight, of GELU's tanh form.
const GELU: (f32, f32) = (0.797_884_6, 0.044_715);

fn gelu_inner(x: f32) -> f32 {
    GELU.0 * (x + GELU.1 * x * x * x)
}

/// A number per row; on an accelerator it may still be in the making.
pub(crate) enum Rows {
    Host(Vec<f64>),
    Device(Tensor),
}

impl Rows {
    /// The numbers, waited for.
    pub(crate) fn values(self) -> Result<Vec<f64>> {
        match self {
            Rows::Host(values) => Ok(values),
            Rows::Device(t) => Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect()),
        }
    }
}

/// Per row, the sum of `|a - b|` (`squared`: of `(a - b)^2`).
pub(crate) fn row_errors(a: &Tensor, b: &Tensor, squared: bool) -> Result<Rows> {
    let cols = a.dim(D::Minus1)?;
    if !a.device().is_cpu() {
        let d = (a - b)?;
        let d = if squared { d.sqr()? } else { d.abs()? };
        return Ok(Rows::Device(d.sum(D::Minus1)?));
    }
    let rows = with_cpu(a, |a| {
        with_cpu(b, |b| {
            a.par_chunks(cols)
                .zip(b.par_chunks(cols))
                .map(|(a, b)| {
                    // Eight running sums, so that the compiler may use vectors.
                    let mut sums = [0f32; 8];
                    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
                        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                            let d = a - b;
                            *sum += if squared { d * d } else { d.abs() };
                        }
                    }
                    sums.iter().map(|&s| f64::from(s)).sum()
                })
                .collect()
        })
    })??;
    Ok(Rows::Host(rows))
}

/// Per row, the sum of `|x|`.
pub(crate) fn row_abs(x: &Tensor) -> Result<Vec<f64>> {
    if x.device().is_cpu() {
        let cols = x.dim(D::Minus1)?;
        let sum = |row: &[f32]| row.iter().map(|v| f64::from(v.abs())).sum();
        return with_cpu(x, |x| x.par_chunks(cols).with_min_len(16).map(sum).collect());
    }
    let rows: Vec<f32> = x.abs()?.sum(D::Minus1)?.flatten_all()?.to_vec1()?;
    Ok(rows.into_iter().map(f64::from).collect())
}

/// Per column, the sum of `|x|` of `[n, c]`.
pub(crate) fn column_abs(x: &Tensor) -> Result<Vec<f64>> {
    if !x.device().is_cpu() {
        // As a product: reductions over rows are slow there.
        let ones = Tensor::ones((1, x.dim(0)?), DType::F32, x.device())?;
        let sums: Vec<f32> = ones.matmul(&x.abs()?)?.flatten_all()?.to_vec1()?;
        return Ok(sums.into_iter().map(f64::from).collect());
    }
    by_column(x, 0f64, |s, v| *s += f64::from(v.abs()), |s, v| *s += v)
}

/// Per column, the maximum of `|x|` of `[n, c]`.
pub(crate) fn column_max(x: &Tensor) -> Result<Vec<f32>> {
    if !x.device().is_cpu() {
        return x.abs()?.max(0)?.to_vec1();
    }
    by_column(x, 0f32, |m, v| *m = m.max(v.abs()), |m, v| *m = m.max(v))
}

/// Folds each column of a CPU tensor, in 16 parts of the rows.
fn by_column<S: Copy + Send + Sync>(
    x: &Tensor,
    zero: S,
    add: impl Fn(&mut S, f32) + Sync,
    join: impl Fn(&mut S, S),
) -> Result<Vec<S>> {
    let cols = x.dim(D::Minus1)?;
    with_cpu(x, |data| {
        let rows = data.len() / cols;
        let parts: Vec<Vec<S>> = data
            .par_chunks(cols * rows.div_ceil(16).max(1))
            .map(|part| {
                let mut out = vec![zero; cols];
                part.chunks(cols).for_each(|row| out.iter_mut().zip(row).for_each(|(s, &v)| add(s, v)));
                out
            })
            .collect();
        parts.into_iter().fold(vec![zero; cols], |mut all, part| {
            all.iter_mut().zip(part).for_each(|(a, b)| join(a, b));
            all
        })
    })
}

/// Rotates the pairs of the last dimension of `[heads, n, d]` by the rows' angles; `backward` by their opposites.
pub(crate) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, pairs: Pairs, backward: bool) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed_rotate(x, cos, sin, pairs, backward);
    }
    let half = x.dim(D::Minus1)? / 2;
    let (n, out) = (x.dim(1)?, x.copy()?.contiguous()?);
    let sign = if backward { -1.0 } else { 1.0 };
    let turn = |a: &mut f32, b: &mut f32, cos: &f32, sin: &f32| {
        let sin = sign * sin;
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    };
    let all = |x: &mut [f32], cos: &[f32], sin: &[f32]| {
        x.par_chunks_mut(2 * half).with_min_len(64).enumerate().for_each(|(i, row)| {
            let at = i % n * half;
            let angles = cos[at..at + half].iter().zip(&sin[at..at + half]);
            match pairs {
                Pairs::Halves => {
                    let (first, second) = row.split_at_mut(half);
                    first.iter_mut().zip(second).zip(angles).for_each(|((a, b), (cos, sin))| turn(a, b, cos, sin));
                }
                Pairs::Neighbours => row.as_chunks_mut().0.iter_mut().zip(angles).for_each(|([a, b], (cos, sin))| {
                    turn(a, b, cos, sin);
                }),
            }
        });
    };
    with_cpu(cos, |cos| with_cpu(sin, |sin| out.inplace_op1(&Update(|x: &mut [f32]| all(x, cos, sin)))))???;
    Ok(out)
}

fn composed_rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, pairs: Pairs, backward: bool) -> Result<Tensor> {
    let (heads, n, d) = x.dims3()?;
    let sin = if backward { sin.neg()? } else { sin.clone() };
    let (a, b) = match pairs {
        Pairs::Halves => (x.narrow(2, 0, d / 2)?, x.narrow(2, d / 2, d / 2)?),
        Pairs::Neighbours => {
            let x = x.reshape((heads, n, d / 2, 2))?;
            (x.narrow(3, 0, 1)?.squeeze(3)?, x.narrow(3, 1, 1)?.squeeze(3)?)
        }
    };
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(&sin)?)?;
    match pairs {
        Pairs::Halves => Tensor::cat(&[first, second], 2),
        Pairs::Neighbours => Tensor::stack(&[first, second], 3)?.reshape((heads, n, d)),
    }
}

/// Lets products of f32 matrices run in TF32 on an accelerator, while it lives.
pub(crate) struct Fast(());

impl Fast {
    pub(crate) fn new() -> Self {
        candle_core::cuda::set_gemm_reduced_precision_f32(true);
        Fast(())
    }

    /// Where `t` is not on the CPU.
    pub(crate) fn on(t: &Tensor) -> Option<Self> {
        (!t.device().is_cpu()).then(Fast::new)
    }
}

impl Drop for Fast {
    fn drop(&mut self) {
        candle_core::cuda::set_gemm_reduced_precision_f32(false);
    }
}

/// Gradients of `f(gate) * up` at gate and up.
pub(crate) fn activate_backward(
    gate: &Tensor,
    up: &Tensor,
    g: &Tensor,
    activation: Activation,
) -> Result<(Tensor, Tensor)> {
    if !gate.device().is_cpu() {
        let (value, slope) = match activation {
            Activation::Silu => silu_slope(gate)?,
            Activation::GeluTanh => gelu_slope(gate)?,
        };
        return Ok(((g * up)?.mul(&slope)?, (g * value)?));
    }
    match activation {
        Activation::Silu => products(gate, up, g, |gate| {
            let sigmoid = 1.0 / ((-gate).exp() + 1.0);
            let silu = gate * sigmoid;
            (silu, sigmoid + silu * (1.0 - sigmoid))
        }),
        Activation::GeluTanh => products(gate, up, g, |x| {
            let tanh = gelu_inner(x).tanh();
            let inner = GELU.0 * (1.0 + 3.0 * GELU.1 * x * x);
            (0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner)
        }),
    }
}

/// `g * up * f'(gate)` and `g * f(gate)`, from `f` and its slope at a value (CPU).
fn products(gate: &Tensor, up: &Tensor, g: &Tensor, f: impl Fn(f32) -> (f32, f32) + Sync) -> Result<(Tensor, Tensor)> {
    const PART: usize = 1 << 12;
    let both = |gate: &[f32], up: &[f32], g: &[f32]| {
        let (mut g_gate, mut g_up) = (g.to_vec(), g.to_vec());
        let out = g_gate.par_chunks_mut(PART).zip(g_up.par_chunks_mut(PART));
        out.zip(gate.par_chunks(PART).zip(up.par_chunks(PART))).for_each(|((g_gate, g_up), (gate, up))| {
            for ((a, b), (gate, up)) in g_gate.iter_mut().zip(g_up).zip(gate.iter().zip(up)) {
                let (value, slope) = f(*gate);
                *a *= up * slope;
                *b *= value;
            }
        });
        (g_gate, g_up)
    };
    let (a, b) = with_cpu(gate, |gate| with_cpu(up, |up| with_cpu(g, |g| both(gate, up, g))))???;
    Ok((Tensor::from_vec(a, g.shape(), g.device())?, Tensor::from_vec(b, g.shape(), g.device())?))
}

/// SiLU and its slope, of candle's own operations.
fn silu_slope(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let sigmoid = (x.neg()?.exp()? + 1.0)?.recip()?;
    let silu = (x * &sigmoid)?;
    let slope = (&sigmoid + (&silu * (1.0 - &sigmoid)?)?)?;
    Ok((silu, slope))
}

/// GELU's tanh form and its slope, of candle's own operations.
fn gelu_slope(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let (root, cubic) = (f64::from(GELU.0), f64::from(GELU.1));
    let square = x.sqr()?;
    let tanh = ((x * ((&square * cubic)? + 1.0)?)? * root)?.tanh()?;
    let gate = ((&tanh + 1.0)? * 0.5)?;
    let steep = (x * ((1.0 - tanh.sqr()?)? * ((square * (3.0 * cubic))? + 1.0)?)?)?;
    Ok(((x * &gate)?, (gate + (steep * (0.5 * root))?)?))
}

/// Gradient of softmax `p` of `scale` times scores: `scale * p * (g - sum(g * p))`. `g` may be overwritten.
pub(crate) fn softmax_backward(p: &Tensor, g: Tensor, scale: f64) -> Result<Tensor> {
    if p.device().is_cpu() {
        let cols = p.dim(D::Minus1)?;
        let update = |g: &mut [f32], p: &[f32]| {
            g.par_chunks_mut(cols).with_min_len(16).zip(p.par_chunks(cols)).for_each(|(g, p)| {
                let sum = g.iter().zip(p).map(|(g, p)| f64::from(g * p)).sum::<f64>() as f32;
                g.iter_mut().zip(p).for_each(|(g, p)| *g = p * (*g - sum) * scale as f32);
            });
        };
        g.inplace_op2(p, &Update2(update))?;
        return Ok(g);
    }
    let pg = (p * g)?;
    (&pg - p.broadcast_mul(&pg.sum_keepdim(D::Minus1)?)?)? * scale
}

/// Gradient of RMS norm with gain `w` at its input: with n = x * r and u = g * w, `r * (u - n * mean(u * n))`.
pub(crate) fn rms_backward(x: &Tensor, w: &Tensor, eps: f64, g: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() {
        let (w, out): (Vec<f32>, _) = (w.to_vec1()?, g.copy()?.contiguous()?);
        let (cols, mean) = (w.len(), |sum: f64| (sum / w.len() as f64) as f32);
        let update = |g: &mut [f32], x: &[f32]| {
            g.par_chunks_mut(cols).with_min_len(16).zip(x.par_chunks(cols)).for_each(|(g, x)| {
                let r = 1.0 / (mean(x.iter().map(|&v| f64::from(v) * f64::from(v)).sum()) + eps as f32).sqrt();
                g.iter_mut().zip(&w).for_each(|(g, w)| *g *= w);
                let mean = mean(g.iter().zip(x).map(|(u, x)| f64::from(u * (x * r))).sum());
                g.iter_mut().zip(x).for_each(|(g, x)| *g = (*g - x * r * mean) * r);
            });
        };
        out.inplace_op2(&x.contiguous()?, &Update2(update))?;
        return Ok(out);
    }
    let r = rms_scale(x, eps)?;
    let n = x.broadcast_mul(&r)?;
    let u = g.broadcast_mul(w)?;
    let mean = (&u * &n)?.mean_keepdim(D::Minus1)?;
    (u - n.broadcast_mul(&mean)?)?.broadcast_mul(&r)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn random(shape: &[usize], seed: usize) -> Tensor {
        let n: usize = shape.iter().product();
        let data: Vec<f32> = (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 250.0 - 2.0).collect();
        Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
    }

    fn same(a: &Tensor, b: &Tensor, what: &str) {
        let off = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        // Values of about 1, the same operations in another order.
        assert!(off < 2e-6, "{what}: {off}");
    }

    /// What accelerators run, of candle's own operations, is what the CPU runs.
    #[test]
    fn composed_forms_are_the_fused_ones() {
        let (scores, seen) = (random(&[3, 8, 6], 1), [0..1, 0..6, 2..4, 5..6]);
        let fused = masked_softmax(scores.copy().unwrap(), 0.7, &seen).unwrap();
        let plain = scores.to_vec3::<f32>().unwrap().into_iter().flatten().enumerate().flat_map(|(i, row)| {
            let seen = &seen[i % seen.len()];
            let of = |c: usize| if seen.contains(&c) { (0.7 * row[c]).exp() } else { 0.0 };
            let sum: f32 = (0..row.len()).map(of).sum();
            (0..row.len()).map(|c| of(c) / sum).collect::<Vec<f32>>()
        });
        same(&Tensor::from_iter(plain, &Device::Cpu).unwrap().reshape((3, 8, 6)).unwrap(), &fused, "softmax");
        assert_eq!(fused.to_vec3::<f32>().unwrap()[1][6][..2], [0.0, 0.0]);

        let (x, cos, sin) = (random(&[3, 5, 8], 2), random(&[5, 4], 3), random(&[5, 4], 4));
        for (pairs, backward) in [(Pairs::Halves, false), (Pairs::Neighbours, false), (Pairs::Neighbours, true)] {
            let fused = rotate(&x, &cos, &sin, pairs, backward).unwrap();
            same(&composed_rotate(&x, &cos, &sin, pairs, backward).unwrap(), &fused, "rotation");
        }

        let (gate, up, g) = (random(&[5, 8], 5), random(&[5, 8], 6), random(&[5, 8], 7));
        for (activation, (value, slope)) in
            [(Activation::Silu, silu_slope(&gate).unwrap()), (Activation::GeluTanh, gelu_slope(&gate).unwrap())]
        {
            let fused = activate(gate.copy().unwrap(), &up, activation).unwrap();
            same(&(&value * &up).unwrap(), &fused, "activation");
            let (g_gate, g_up) = activate_backward(&gate, &up, &g, activation).unwrap();
            same(&((&g * &up).unwrap() * &slope).unwrap(), &g_gate, "gradient at gate");
            same(&(&g * &value).unwrap(), &g_up, "gradient at up");
        }
    }
}
