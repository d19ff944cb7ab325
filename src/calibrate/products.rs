//! Products of matrices that are parts of larger ones, added where they belong. candle's own want whole matrices on a GPU, and
//! add afterwards: where a side is narrow, copying the operands and going through the sum costs more than the product.
#[cfg(feature = "cuda")]
pub(super) mod cublas;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor, bail};
use rayon::prelude::*;
use std::ops::{AddAssign, Mul};

/// Rows of a sum that a product is added to at once: what lies left of the diagonal's squares of so many rows is left out of
/// a symmetric sum.
const ROWS: usize = if cfg!(test) { 16 } else { 512 };
/// The same on a GPU, which smaller products would not fill.
const ROWS_ON_GPU: usize = 2048;

/// `c + a b`: `[m, n]`, `[m, k]` and `[k, n]`.
///
/// # Errors
/// The shapes do not fit.
pub(super) fn plus(c: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    moved(c, a, b, 1.0)
}

/// `c - a b`.
///
/// # Errors
/// As [`plus`].
pub(super) fn minus(c: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    moved(c, a, b, -1.0)
}

fn moved(c: &Tensor, a: &Tensor, b: &Tensor, by: f64) -> Result<Tensor> {
    let c = c.force_contiguous()?;
    c.inplace_op3(a, b, &AddProduct { by })?;
    Ok(c)
}

/// Adds `left^T right`, of `[k, m]` and `[k, n]`, to a sum `[m, n]`.
///
/// # Errors
/// The shapes do not fit.
pub(super) fn add(sum: &mut Option<Tensor>, left: &Tensor, right: &Tensor) -> Result<()> {
    add_rows(sum, left, right, false)
}

/// Adds `x^T x` to a sum that is symmetric. Its lower triangle stays zero, but for squares along the diagonal:
/// [`super::feedback::factor`] reads the upper one.
///
/// # Errors
/// The shapes do not fit.
pub(super) fn add_square(sum: &mut Option<Tensor>, x: &Tensor) -> Result<()> {
    add_rows(sum, x, x, true)
}

fn add_rows(sum: &mut Option<Tensor>, left: &Tensor, right: &Tensor, symmetric: bool) -> Result<()> {
    let left = left.t()?;
    let (m, n) = (left.dim(0)?, right.dim(1)?);
    let sum = match sum {
        Some(sum) => &*sum,
        None => sum.insert(Tensor::zeros((m, n), left.dtype(), left.device())?),
    };
    let step = if left.device().is_cpu() { ROWS } else { ROWS_ON_GPU };
    for start in (0..m).step_by(step) {
        let (len, from) = (step.min(m - start), if symmetric { start } else { 0 });
        let of = |t: &Tensor| t.narrow(1, from, n - from);
        let part = of(&sum.narrow(0, start, len)?)?;
        part.inplace_op3(&left.narrow(0, start, len)?, &of(right)?, &AddProduct { by: 1.0 })?;
    }
    Ok(())
}

/// `c += by a b`, each of them perhaps a part of a larger matrix.
struct AddProduct {
    by: f64,
}

impl AddProduct {
    /// m, n and k, where the shapes fit and a row of `c` lies in one piece, and how far apart these rows are.
    fn sizes(&self, c: &Layout, a: &Layout, b: &Layout) -> Result<([usize; 3], usize)> {
        let ((m, n), (rows, k), (inner, columns)) = (c.shape().dims2()?, a.shape().dims2()?, b.shape().dims2()?);
        match c.stride() {
            &[apart, 1] if (m, n, k) == (rows, columns, inner) => Ok(([m, n, k], apart)),
            _ => bail!("{}: {a:?} and {b:?} for {c:?}", self.name()),
        }
    }
}

impl InplaceOp3 for AddProduct {
    fn name(&self) -> &'static str {
        "add_product"
    }

    fn cpu_fwd(
        &self,
        c: &mut CpuStorage,
        c_l: &Layout,
        a: &CpuStorage,
        a_l: &Layout,
        b: &CpuStorage,
        b_l: &Layout,
    ) -> Result<()> {
        let ([m, n, k], apart) = self.sizes(c_l, a_l, b_l)?;
        let product = a.matmul(b, (1, m, n, k), a_l, b_l)?;
        match (c, product) {
            (CpuStorage::F32(c), CpuStorage::F32(product)) => {
                add_part(&mut c[c_l.start_offset()..], &product, [m, n, apart], self.by as f32);
            }
            (CpuStorage::F64(c), CpuStorage::F64(product)) => {
                add_part(&mut c[c_l.start_offset()..], &product, [m, n, apart], self.by);
            }
            _ => bail!("{}: neither f32 nor f64", self.name()),
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        c: &mut CudaStorage,
        c_l: &Layout,
        a: &CudaStorage,
        a_l: &Layout,
        b: &CudaStorage,
        b_l: &Layout,
    ) -> Result<()> {
        let (sizes, apart) = self.sizes(c_l, a_l, b_l)?;
        cublas::add_product((c, c_l), (a, a_l), (b, b_l), (sizes, apart), self.by)
    }
}

/// Adds `by` times `part`, `[m, n]`, to rows of `c` that are `apart`.
fn add_part<T>(c: &mut [T], part: &[T], [m, n, apart]: [usize; 3], by: T)
where
    T: Copy + Send + Sync + AddAssign + Mul<Output = T>,
{
    let rows = c.par_chunks_mut(apart.max(1)).zip(part.par_chunks(n.max(1))).take(m);
    rows.with_min_len(16).for_each(|(c, part)| c.iter_mut().zip(part).for_each(|(c, &p)| *c += by * p));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Rng;
    use candle_core::{DType, Device};

    /// The CPU, and a GPU where there is one.
    fn devices() -> Vec<Device> {
        let gpu = if cfg!(feature = "cuda") { Device::new_cuda(0).ok() } else { None };
        [Device::Cpu].into_iter().chain(gpu).collect()
    }

    fn drawn(dice: &mut Rng, rows: usize, cols: usize, dtype: DType) -> Tensor {
        let values: Vec<f32> = (0..rows * cols).map(|_| dice.uniform()).collect();
        Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    }

    fn same(a: &Tensor, b: &Tensor, what: &str) {
        let off = (a.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap())
            .unwrap();
        let off: f64 = off.abs().unwrap().max_all().unwrap().to_scalar().unwrap();
        // Up to 100 products of numbers below 1: some halves of an f32's last place at 64, which is 8e-6, and of an f64's.
        let most = if a.dtype() == DType::F32 { 3e-5 } else { 1e-13 };
        assert!(off < most, "{what} on {:?}: {off}", a.device());
    }

    /// Parts of matrices that lie either way round.
    #[test]
    fn parts_are_those_of_whole_products() {
        let mut dice = Rng::new(7);
        for (device, dtype) in devices().iter().flat_map(|d| [(d, DType::F32), (d, DType::F64)]) {
            let mut drawn = |rows: usize, cols: usize| drawn(&mut dice, rows, cols, dtype);
            let (c, a, b) = (drawn(70, 60), drawn(70, 90), drawn(90, 60));
            let part = |t: &Tensor, rows: usize, cols: usize| t.narrow(0, 3, rows).unwrap().narrow(1, 5, cols).unwrap();
            let product = |rows: usize, col: usize| -> f64 {
                let at = |t: &Tensor, r: usize, c: usize| -> f64 {
                    let one = t.narrow(0, 3 + r, 1).unwrap().narrow(1, 5 + c, 1).unwrap().to_dtype(DType::F64).unwrap();
                    one.flatten_all().unwrap().to_vec1::<f64>().unwrap()[0]
                };
                (0..50).map(|k| at(&a, rows, k) * at(&b, k, col)).sum()
            };
            let whole: Vec<f64> = (0..40 * 30).map(|i| product(i / 30, i % 30)).collect();
            let whole = Tensor::from_vec(whole, (40, 30), &Device::Cpu).unwrap();
            let own = part(&c, 40, 30).to_dtype(DType::F64).unwrap();
            for turned in [false, true] {
                let turn = |t: &Tensor, rows: usize, cols: usize| {
                    let t = t.to_device(device).unwrap();
                    let over =
                        || t.t().unwrap().contiguous().unwrap().narrow(0, 5, cols).unwrap().narrow(1, 3, rows).unwrap();
                    if turned { over().t().unwrap() } else { part(&t, rows, cols) }
                };
                let (c, a, b) = (part(&c.to_device(device).unwrap(), 40, 30), turn(&a, 40, 50), turn(&b, 50, 30));
                same(&plus(&c, &a, &b).unwrap(), &(&own + &whole).unwrap(), "plus");
                same(&minus(&c, &a, &b).unwrap(), &(&own - &whole).unwrap(), "minus");
                same(&c, &own, "what it is added to");
            }
        }
    }

    /// Sums of two products; of a symmetric one the triangle that is read, and nothing below its squares.
    #[test]
    fn sums_are_those_of_whole_products() {
        let mut dice = Rng::new(8);
        for device in devices() {
            let step = if device.is_cpu() { ROWS } else { ROWS_ON_GPU };
            let (m, n) = (2 * step + 5, 40);
            let (left, right) = (drawn(&mut dice, 50, m, DType::F32), drawn(&mut dice, 50, n, DType::F32));
            let on = |t: &Tensor| t.to_device(&device).unwrap();
            let (mut sum, mut square) = (None, None);
            for _ in 0..2 {
                add(&mut sum, &on(&left), &on(&right)).unwrap();
                add_square(&mut square, &on(&left)).unwrap();
            }
            let twice = |t: &Tensor| (left.t().unwrap().matmul(t).unwrap() * 2.0).unwrap();
            same(&sum.unwrap(), &twice(&right), "add");
            let (square, want) = (square.unwrap(), twice(&left));
            for start in (0..m).step_by(step) {
                let len = step.min(m - start);
                let of = |t: &Tensor| t.narrow(0, start, len).unwrap().narrow(1, start, m - start).unwrap();
                same(&of(&square), &of(&want), "add_square");
                if start > 0 {
                    let below = square.narrow(0, start, len).unwrap().narrow(1, 0, start).unwrap();
                    same(&below, &below.zeros_like().unwrap().to_device(&Device::Cpu).unwrap(), "below the diagonal");
                }
            }
        }
    }
}
