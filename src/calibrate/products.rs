//! Products of matrices that are parts of larger ones, added where they belong. candle multiplies whole matrices on a GPU and
//! adds afterwards; where a side is narrow, copying the operands and going through the sum costs more than the product.
#[cfg(feature = "cuda")]
pub(super) mod cublas;

use candle_core::{Result, Tensor};

/// Rows of a sum that a product is added to at once: what lies left of the diagonal's parts of so many rows is left out of a
/// symmetric sum.
const ROWS: usize = 2048;

/// `c + a b`: `[m, n]`, `[m, k]` and `[k, n]`.
///
/// # Errors
/// The shapes do not fit.
pub(super) fn plus(c: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if c.device().is_cpu() { c + a.matmul(b)? } else { moved(c, a, b, 1.0) }
}

/// `c - a b`.
///
/// # Errors
/// As [`plus`].
pub(super) fn minus(c: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if c.device().is_cpu() { c - a.matmul(b)? } else { moved(c, a, b, -1.0) }
}

fn moved(c: &Tensor, a: &Tensor, b: &Tensor, by: f64) -> Result<Tensor> {
    let c = c.force_contiguous()?;
    add_to(&c, a, b, by)?;
    Ok(c)
}

#[cfg(feature = "cuda")]
fn add_to(c: &Tensor, a: &Tensor, b: &Tensor, by: f64) -> Result<()> {
    c.inplace_op3(a, b, &cublas::AddProduct { by })
}

#[cfg(not(feature = "cuda"))]
fn add_to(c: &Tensor, _: &Tensor, _: &Tensor, _: f64) -> Result<()> {
    candle_core::bail!("a tensor on {:?} in a program without CUDA", c.device().location())
}

/// Adds `left^T right`, of `[k, m]` and `[k, n]`, to a sum `[m, n]`.
///
/// # Errors
/// The shapes do not fit.
pub(super) fn add(sum: &mut Option<Tensor>, left: &Tensor, right: &Tensor) -> Result<()> {
    add_rows(sum, left, right, false)
}

/// Adds `x^T x` to a sum that is symmetric. On a GPU its lower triangle stays zero, but for squares along the diagonal:
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
    if left.device().is_cpu() {
        let product = left.matmul(right)?;
        *sum = Some(match sum {
            Some(sum) => (&*sum + product)?,
            None => product,
        });
        return Ok(());
    }
    let sum = match sum {
        Some(sum) => &*sum,
        None => sum.insert(Tensor::zeros((m, n), left.dtype(), left.device())?),
    };
    for start in (0..m).step_by(ROWS) {
        let (len, from) = (ROWS.min(m - start), if symmetric { start } else { 0 });
        let of = |t: &Tensor| t.narrow(1, from, n - from);
        add_to(&of(&sum.narrow(0, start, len)?)?, &left.narrow(0, start, len)?, &of(right)?, 1.0)?;
    }
    Ok(())
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use crate::random::Rng;
    use candle_core::{DType, Device};

    /// What a GPU adds where it belongs is what the CPU's whole products say, for parts of matrices that lie either way round.
    #[test]
    fn parts_are_the_cpus() {
        let Ok(device) = Device::new_cuda(0) else { return eprintln!("skipped: no CUDA device here") };
        let mut dice = Rng::new(7);
        let mut drawn = |rows: usize, cols: usize, dtype: DType| -> Tensor {
            let values: Vec<f32> = (0..rows * cols).map(|_| dice.uniform()).collect();
            Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        let on = |t: &Tensor| t.to_device(&device).unwrap();
        let same = |a: &Tensor, b: &Tensor, what: &str| {
            let off = (a.to_device(&Device::Cpu).unwrap() - b).unwrap().abs().unwrap().max_all().unwrap();
            let off: f64 = off.to_dtype(DType::F64).unwrap().to_scalar().unwrap();
            // Up to 100 products of numbers below 1: some halves of an f32's last place at 64, which is 8e-6, and of an f64's.
            assert!(off < if a.dtype() == DType::F32 { 3e-5 } else { 1e-13 }, "{what}: {off}");
        };
        for dtype in [DType::F32, DType::F64] {
            let (c, a, b) = (drawn(70, 60, dtype), drawn(70, 90, dtype), drawn(90, 60, dtype));
            let part = |t: &Tensor, rows: usize, cols: usize| t.narrow(0, 3, rows).unwrap().narrow(1, 5, cols).unwrap();
            let want = |sign: f64| {
                (part(&c, 40, 30) + (part(&a, 40, 50).matmul(&part(&b, 50, 30)).unwrap() * sign).unwrap()).unwrap()
            };
            for turned in [false, true] {
                let turn = |t: &Tensor, rows: usize, cols: usize| match turned {
                    false => part(&on(t), rows, cols),
                    true => on(t)
                        .t()
                        .unwrap()
                        .contiguous()
                        .unwrap()
                        .narrow(0, 5, cols)
                        .unwrap()
                        .narrow(1, 3, rows)
                        .unwrap()
                        .t()
                        .unwrap(),
                };
                let (c, a, b) = (part(&on(&c), 40, 30), turn(&a, 40, 50), turn(&b, 50, 30));
                same(&plus(&c, &a, &b).unwrap(), &want(1.0), "plus");
                same(&minus(&c, &a, &b).unwrap(), &want(-1.0), "minus");
            }
        }
        let (left, right) = (drawn(50, 2100, DType::F32), drawn(50, 40, DType::F32));
        let (mut sum, mut square) = (None, None);
        for _ in 0..2 {
            add(&mut sum, &on(&left), &on(&right)).unwrap();
            add_square(&mut square, &on(&left)).unwrap();
        }
        let twice = |t: &Tensor| (left.t().unwrap().matmul(t).unwrap() * 2.0).unwrap();
        same(&sum.unwrap(), &twice(&right), "add");
        let (square, want) = (square.unwrap(), twice(&left));
        for (row, col, rows, cols) in [(0, 0, 2048, 2100), (2048, 2048, 52, 52)] {
            let of = |t: &Tensor| t.narrow(0, row, rows).unwrap().narrow(1, col, cols).unwrap();
            same(&of(&square), &of(&want), "add_square");
        }
        let below = square.narrow(0, 2048, 52).unwrap().narrow(1, 0, 2048).unwrap();
        same(&below, &Tensor::zeros((52, 2048), DType::F32, &Device::Cpu).unwrap(), "below the diagonal");
    }
}
