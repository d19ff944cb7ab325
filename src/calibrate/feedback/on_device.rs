//! MBQ3's levels and codes chosen on a CUDA device (`mbq3_levels.cu`): nothing is fetched before all columns are done. On the
//! CPU, and of other types, [`super::super::columns`] chooses them; a test holds both to the same errors.
#![allow(unsafe_code)]
use super::super::columns::shares;
use super::{BLOCK, Coded, Factor, product, side_by_side};
use crate::quant::levels::{Fit, Format, Halfs, Multiples, Simple};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute;
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaStorage, WrapErr};
use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

mod ptx {
    include!(concat!(env!("OUT_DIR"), "/cuda_kernels.rs"));
}

/// Columns of a block of MBQ3, and of a launch.
const N: usize = BLOCK;
/// What is to be fetched of a block of a row: codes, four in the bits of a float, then d and m.
const NUMBERS: usize = N / 4 + 2;
/// Rows of a thread block, and threads of a row (`ROWS` and `LANES` there).
const ROWS: usize = 4;
const LANES: usize = 16;

/// Whether `device` can round to `format`.
pub(super) fn rounds(format: Format, fit: Fit, device: &Device) -> bool {
    format == Format::Simple(Simple::Mbq3) && fit == Fit::Search && device.is_cuda()
}

/// As [`super::round`].
///
/// # Errors
/// The device's.
pub(super) fn round(w: &Tensor, factor: &Factor) -> Result<Coded> {
    let (_, numbers) = Corners::new(factor, w.device())?.round(w)?;
    coded(&numbers)
}

/// As [`super::round_rows`].
///
/// # Errors
/// The device's.
pub(super) fn round_rows(w: &Tensor, factor: &Factor, rows: &Factor) -> Result<Coded> {
    let (count, n) = w.dims2()?;
    let size = side_by_side(count);
    let m = rows.block_unit(size)?.to_device(w.device())?;
    let errors = Tensor::zeros((count, n), DType::F32, w.device())?;
    let corners = Corners::new(factor, w.device())?;
    let mut numbers = Vec::new();
    for start in (0..count).step_by(size) {
        let len = size.min(count - start);
        let own = w.narrow(0, start, len)?;
        let target = match start {
            0 => own.clone(),
            _ => {
                let m = m.narrow(0, 0, start)?.narrow(1, start, len)?.t()?;
                (&own + product(&m, &errors.narrow(0, 0, start)?)?)?
            }
        };
        let (left, found) = corners.round(&target)?;
        // Of the weights, not of the targets.
        errors.slice_set(&(left - (target - own)?)?, 0, start)?;
        numbers.push(found);
    }
    coded(&Tensor::cat(&numbers, 0)?)
}

/// M's corners along its diagonal, with a row of D's shares under each, `[N + 1, N]`.
struct Corners<'f> {
    factor: &'f Factor,
    corners: Vec<Tensor>,
}

impl<'f> Corners<'f> {
    fn new(factor: &'f Factor, device: &Device) -> Result<Self> {
        let corner = |(i, d): (usize, &[f64])| {
            let m = factor.m.narrow(0, i * N, N)?.narrow(1, i * N, N)?.contiguous()?.to_device(device)?;
            Tensor::cat(&[m, Tensor::from_vec(shares(d), (1, N), device)?], 0)
        };
        let corners = factor.d.chunks(N).enumerate().map(corner).collect::<Result<_>>()?;
        Ok(Corners { factor, corners })
    }

    /// Errors of `w` `[rows, n]` once it is rounded, and all blocks' numbers side by side.
    fn round(&self, w: &Tensor) -> Result<(Tensor, Tensor)> {
        let (rows, n) = w.dims2()?;
        let errors = Tensor::zeros((rows, n), DType::F32, w.device())?;
        let mut numbers = Vec::new();
        for (start, corner) in (0..n).step_by(N).zip(&self.corners) {
            let original = w.narrow(1, start, N)?.contiguous()?;
            let t = match start {
                0 => original.clone(),
                _ => {
                    let m = self.factor.m.narrow(1, start, N)?.narrow(0, 0, start)?;
                    (&original + product(&errors.narrow(1, 0, start)?, &m)?)?
                }
            };
            let out = t.apply_op3_no_bwd(&original, corner, &Levels)?;
            errors.slice_set(&out.narrow(1, 0, N)?.contiguous()?, 1, start)?;
            numbers.push(out.narrow(1, N, NUMBERS)?.contiguous()?);
        }
        Ok((errors, Tensor::cat(&numbers, 1)?))
    }
}

/// What the device found, fetched.
fn coded(numbers: &Tensor) -> Result<Coded> {
    let rows = numbers.dim(0)?;
    let found: Vec<f32> = numbers.flatten_all()?.to_vec1()?;
    let blocks = found.par_chunks_exact(NUMBERS);
    let halfs: Vec<Halfs> = blocks.clone().map(|b| Halfs { d: b[N / 4], m: b[N / 4 + 1] }).collect();
    let mut codes = vec![0; halfs.len() * N];
    codes.par_chunks_exact_mut(N).zip(blocks).for_each(|(codes, block)| {
        codes.as_chunks_mut().0.iter_mut().zip(block).for_each(|(four, bits)| *four = bits.to_bits().to_le_bytes());
    });
    let multiples = vec![Multiples::default(); halfs.len()];
    Ok(Coded { format: Format::Simple(Simple::Mbq3), rows, codes, halfs, multiples })
}

/// Targets and weights `[rows, N]` and a corner become errors and numbers `[rows, N + NUMBERS]`.
struct Levels;

impl CustomOp3 for Levels {
    fn name(&self) -> &'static str {
        "mbq3_levels"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("{} is for CUDA", self.name())
    }

    fn cuda_fwd(
        &self,
        t: &CudaStorage,
        t_layout: &Layout,
        original: &CudaStorage,
        original_layout: &Layout,
        corner: &CudaStorage,
        corner_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let rows = t_layout.shape().dims2()?.0;
        for (layout, shape) in [(t_layout, (rows, N)), (original_layout, (rows, N)), (corner_layout, (N + 1, N))] {
            if layout.shape().dims2()? != shape || !layout.is_contiguous() {
                bail!("{}: {:?} for {shape:?}", self.name(), layout.shape());
            }
        }
        let device = t.device().clone();
        let t = t.as_cuda_slice::<f32>()?.slice(t_layout.start_offset()..);
        let original = original.as_cuda_slice::<f32>()?.slice(original_layout.start_offset()..);
        let corner = corner.as_cuda_slice::<f32>()?.slice(corner_layout.start_offset()..);
        let shape = Shape::from((rows, N + NUMBERS));
        // SAFETY: the kernel writes every element.
        let mut out = unsafe { device.alloc::<f32>(shape.elem_count()) }?;
        let kernel = device.get_or_load_custom_func(self.name(), self.name(), ptx::MBQ3_LEVELS)?;
        // Every row reads all of the corner, 64 KiB: half of an SM's memory is left to the cache that holds it.
        let carveout = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        kernel.set_attribute(carveout, 50).w()?;
        let grid = (rows.div_ceil(ROWS) as u32, 1, 1);
        let launch = LaunchConfig { grid_dim: grid, block_dim: ((ROWS * LANES) as u32, 1, 1), shared_mem_bytes: 0 };
        let count = rows as i32;
        let mut call = kernel.builder();
        call.arg(&t).arg(&original).arg(&corner).arg(&mut out).arg(&count);
        // SAFETY: the kernel's parameters; it reads and writes inside the shapes checked above.
        unsafe { call.launch(launch) }.w()?;
        Ok((CudaStorage::wrap_cuda_slice(out, device), shape))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{factor, round as on_any, round_rows as rows_on_any};
    use super::*;
    use crate::random::Rng;

    /// Weights `[rows, n]`, and second moments of as many channels, some of them large and all of them dependent.
    fn drawn(rows: usize, n: usize) -> (Tensor, Tensor) {
        let mut dice = Rng::new(3);
        let mut normal = |count: usize| -> Vec<f32> {
            (0..count).map(|_| (0..12).map(|_| dice.uniform()).sum::<f32>() / 2.0).collect()
        };
        let w = Tensor::from_vec(normal(rows * n), (rows, n), &Device::Cpu).unwrap();
        let x = Tensor::from_vec(normal(2 * n * n), (2 * n, n), &Device::Cpu).unwrap();
        let mix = Tensor::from_vec(normal(n * n), (n, n), &Device::Cpu).unwrap();
        let size: Vec<f32> = (0..n).map(|i| if i % 37 == 0 { 20.0 } else { 1.0 }).collect();
        let x = ((&x + (x.matmul(&mix).unwrap() * (0.5 / (n as f64).sqrt())).unwrap()).unwrap())
            .broadcast_mul(&Tensor::new(size, &Device::Cpu).unwrap())
            .unwrap();
        (w, x.t().unwrap().matmul(&x).unwrap())
    }

    /// Codes and levels of two rows of two blocks, as the kernel leaves them.
    #[test]
    fn numbers_are_taken_apart() {
        let four = |r: usize, block: usize, i: usize| -> [u8; 4] {
            std::array::from_fn(|j| ((r + block + 4 * i + j) % 8) as u8)
        };
        let block = |r: usize, block: usize| -> Vec<f32> {
            let codes = (0..N / 4).map(|i| f32::from_bits(u32::from_le_bytes(four(r, block, i))));
            codes.chain([0.5 + r as f32, -1.0 - block as f32]).collect()
        };
        let all: Vec<f32> = (0..4).flat_map(|i| block(i / 2, i % 2)).collect();
        let coded = coded(&Tensor::from_vec(all, (2, 2 * NUMBERS), &Device::Cpu).unwrap()).unwrap();
        assert_eq!((coded.rows, coded.codes.len(), coded.halfs.len()), (2, 4 * N, 4));
        for (at, &code) in coded.codes.iter().enumerate() {
            assert_eq!(usize::from(code), (at / (2 * N) + at / N % 2 + at % N) % 8, "{at}");
        }
        assert_eq!(coded.halfs[2], Halfs { d: 1.5, m: -1.0 });
    }

    /// The device's errors are those of the CPU's search, over columns and over rows, and codes and levels are what they come
    /// from. Single codes differ where two candidates are as good.
    #[test]
    fn errors_are_the_cpus() {
        let Ok(device) = Device::new_cuda(0) else { return eprintln!("skipped: no CUDA device here") };
        // An odd number of rows; several blocks of columns.
        let (rows, n) = (101, 384);
        let (w, h) = drawn(rows, n);
        let (_, f) = drawn(1, rows);
        let on = |device: &Device| -> (Coded, Coded, f64, f64) {
            let (w, h, f) = (w.to_device(device).unwrap(), h.to_device(device).unwrap(), f.to_device(device).unwrap());
            let (h, f) = (factor(&h, 0.01).unwrap(), factor(&f, 0.5).unwrap());
            let format = Format::Simple(Simple::Mbq3);
            let columns = on_any(&w, &h, format, Fit::Search).unwrap();
            let both = rows_on_any(&w, &h, &f, format, Fit::Search).unwrap();
            let error = h.error(&w, &columns.weight(device).unwrap()).unwrap();
            // tr(F E H E^T): F's factor on the other side.
            let left = ((&w - both.weight(device).unwrap()).unwrap().t().unwrap().matmul(&f.m).unwrap().t()).unwrap();
            let by = Tensor::from_vec(f.d.iter().map(|&d| d.sqrt() as f32).collect(), (rows, 1), device).unwrap();
            let left = left.broadcast_mul(&by).unwrap();
            let two_sided = h.error(&left, &left.zeros_like().unwrap()).unwrap();
            (columns, both, error, two_sided)
        };
        let (cpu, cpu_both, cpu_error, cpu_two_sided) = on(&Device::Cpu);
        let (gpu, gpu_both, gpu_error, gpu_two_sided) = on(&device);
        println!("errors {cpu_error} {gpu_error}, two-sided {cpu_two_sided} {gpu_two_sided}");
        // 303 blocks whose errors differ by some per cent either way; a wrong search loses far more.
        assert!((gpu_error / cpu_error - 1.0).abs() < 0.01, "{cpu_error} {gpu_error}");
        assert!((gpu_two_sided / cpu_two_sided - 1.0).abs() < 0.02, "{cpu_two_sided} {gpu_two_sided}");
        for (coded, other) in [(&gpu, &cpu), (&gpu_both, &cpu_both)] {
            assert!(coded.codes.iter().all(|&c| c < 8) && coded.codes.len() == rows * n);
            let same = coded.codes.iter().zip(&other.codes).filter(|(a, b)| a == b).count();
            println!("{same} of {} codes are the same", rows * n);
        }
        // The first block of a row depends on nothing before it: most are the same, levels too.
        let first = |c: &Coded| -> Vec<(Halfs, Vec<u8>)> {
            (0..rows).map(|r| (c.halfs[r * n / N], c.codes[r * n..r * n + N].to_vec())).collect()
        };
        let same = first(&cpu).iter().zip(&first(&gpu)).filter(|(a, b)| a == b).count();
        assert!(same * 10 > rows * 7, "{same} of {rows} first blocks");
    }
}
