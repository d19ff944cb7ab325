//! MBQ3's levels and codes chosen on a CUDA device (`mbq3_levels.cu`): nothing is fetched before all columns are done. On the
//! CPU, and of other types, [`super::super::columns`] chooses them; a test holds both to the same errors.
#![allow(unsafe_code)]
use super::super::columns::shares;
use super::super::products::cublas::{Part, multiply};
use super::{BLOCK, Coded, Factor, row_by_row};
use crate::cuda_kernels::MBQ3_LEVELS;
use crate::quant::levels::{Fit, Format, Halfs, Multiples, Simple};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Columns of a block of MBQ3, and of a launch.
const N: usize = BLOCK;
/// What is to be fetched of a block of a row: codes, four in the bits of a float, then d and m.
const NUMBERS: usize = N / 4 + 2;
/// Threads of a row (`THREADS` there), rows of a thread block, and thread blocks that an SM of an H100 has room for.
const THREADS: usize = 64;
const ROWS: usize = 2;
const BLOCKS: usize = 3;

/// Bytes of shared memory that a thread block takes: M's corner, room for each warp, and of each row targets, weights, shares
/// and twice both warps' finds (`Row` there).
const SHARED: usize = 4 * (N * N + ROWS * (2 * N + 3 * N + 4 * (N / 4 + 2)));

/// Whether `device` can round to `format`. GPUs older than Ampere have no thread blocks with so much memory.
pub(super) fn rounds(format: Format, fit: Fit, device: &Device) -> bool {
    let most = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    format == Format::Simple(Simple::Mbq3)
        && fit == Fit::Search
        && device.as_cuda_device().is_ok_and(|device| attribute(device, most).is_ok_and(|most| most >= SHARED))
}

fn attribute(device: &CudaDevice, which: CUdevice_attribute) -> Result<usize> {
    Ok(device.cuda_stream().context().attribute(which).w()?.try_into()?)
}

/// As [`super::round`].
///
/// # Errors
/// The device's.
pub(super) fn round(w: &Tensor, factor: &Factor) -> Result<Coded> {
    let (values, numbers) = Rounding::new(factor, w.device())?.round(w)?;
    // Apart from the numbers, behind which they stand: those are not kept.
    coded(values.force_contiguous()?, &numbers)
}

/// As [`super::round_rows`].
///
/// # Errors
/// The device's.
pub(super) fn round_rows(w: &Tensor, factor: &Factor, rows: &Factor) -> Result<Coded> {
    let rounding = Rounding::new(factor, w.device())?;
    let (mut values, mut numbers) = (Vec::new(), Vec::new());
    row_by_row(w, rows, |target| {
        let found = rounding.round(target)?;
        values.push(found.0.clone());
        numbers.push(found.1);
        Ok(found.0)
    })?;
    coded(Tensor::cat(&values, 0)?, &Tensor::cat(&numbers, 0)?)
}

/// M, and D over its largest in each block, on the device.
struct Rounding {
    m: Tensor,
    shares: Tensor,
}

impl Rounding {
    fn new(factor: &Factor, device: &Device) -> Result<Self> {
        let shares: Vec<f32> = factor.d.chunks(N).flat_map(shares).collect();
        Ok(Rounding { m: factor.m.to_device(device)?, shares: Tensor::new(shares, device)? })
    }

    /// What `w` `[rows, n]` is once it is rounded, and of each row all blocks' numbers.
    fn round(&self, w: &Tensor) -> Result<(Tensor, Tensor)> {
        let (rows, n) = w.dims2()?;
        let found = w.contiguous()?.apply_op3_no_bwd(&self.m, &self.shares, &Levels)?;
        let part = |from: usize, width: usize| found.narrow(0, from, rows * width)?.reshape((rows, width));
        Ok((part(0, n)?, part(rows * n, n / N * NUMBERS)?))
    }
}

/// What the device found, fetched.
fn coded(values: Tensor, numbers: &Tensor) -> Result<Coded> {
    let rows = numbers.dim(0)?;
    let found: Vec<f32> = numbers.flatten_all()?.to_vec1()?;
    let blocks = found.par_chunks_exact(NUMBERS);
    let halfs: Vec<Halfs> = blocks.clone().map(|b| Halfs { d: b[N / 4], m: b[N / 4 + 1] }).collect();
    let mut codes = vec![0; halfs.len() * N];
    codes.par_chunks_exact_mut(N).zip(blocks).for_each(|(codes, block)| {
        codes.as_chunks_mut().0.iter_mut().zip(block).for_each(|(four, bits)| *four = bits.to_bits().to_le_bytes());
    });
    let multiples = vec![Multiples::default(); halfs.len()];
    Ok(Coded { format: Format::Simple(Simple::Mbq3), rows, codes, halfs, multiples, values: Some(values) })
}

/// Weights `[rows, n]`, M `[n, n]` and shares `[n]` become values `[rows, n]` and, behind them, numbers `[rows, n / N * NUMBERS]`.
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
        w: &CudaStorage,
        w_l: &Layout,
        m: &CudaStorage,
        m_l: &Layout,
        shares: &CudaStorage,
        shares_l: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (rows, n) = w_l.shape().dims2()?;
        for (layout, shape) in [(w_l, vec![rows, n]), (m_l, vec![n, n]), (shares_l, vec![n])] {
            if layout.dims() != shape || !layout.is_contiguous() || n % N != 0 {
                bail!("{}: {:?} for {shape:?}", self.name(), layout.shape());
            }
        }
        let device = w.device().clone();
        let w = w.as_cuda_slice::<f32>()?.slice(w_l.start_offset()..);
        let m = m.as_cuda_slice::<f32>()?.slice(m_l.start_offset()..);
        let shares = shares.as_cuda_slice::<f32>()?.slice(shares_l.start_offset()..);
        let fetched = n / N * NUMBERS;
        // SAFETY: the kernel writes every element of what is returned, and of the others before they are read.
        let (mut out, mut errors, mut product) = unsafe {
            (device.alloc::<f32>(rows * (n + fetched))?, device.alloc::<f32>(rows * n)?, device.alloc::<f32>(rows * N)?)
        };
        let kernel = device.get_or_load_custom_func(self.name(), self.name(), MBQ3_LEVELS)?;
        let size = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        kernel.set_attribute(size, SHARED as i32).w()?;
        let room = BLOCKS * attribute(&device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let launch = LaunchConfig {
            grid_dim: (rows.div_ceil(ROWS).min(room) as u32, 1, 1),
            block_dim: ((ROWS * THREADS) as u32, 1, 1),
            shared_mem_bytes: SHARED as u32,
        };
        for start in (0..n).step_by(N) {
            if start > 0 {
                let before = Part { at: errors.slice(..), strides: [n, 1] };
                let columns = Part { at: m.slice(start..), strides: [n, 1] };
                // SAFETY: `start` columns of the errors, and as many rows of M and N columns.
                unsafe {
                    multiply(
                        &device,
                        [rows, N, start],
                        (1.0, 0.0),
                        (&before, &columns),
                        (&mut product.slice_mut(..), N),
                    )?;
                }
            }
            let (w, m, shares) = (w.slice(start..), m.slice(start * n + start..), shares.slice(start..));
            let mut errors = errors.slice_mut(start..);
            let (mut values, mut numbers) = out.split_at_mut(rows * n);
            let (mut values, mut numbers) = (values.slice_mut(start..), numbers.slice_mut(start / N * NUMBERS..));
            let [count, apart, fetched, first] = [rows as i32, n as i32, fetched as i32, i32::from(start == 0)];
            let mut call = kernel.builder();
            call.arg(&w).arg(&product).arg(&m).arg(&shares).arg(&mut errors).arg(&mut values).arg(&mut numbers);
            call.arg(&count).arg(&apart).arg(&fetched).arg(&first);
            // SAFETY: the kernel's parameters; of each row it reads and writes N columns from where these parts begin.
            unsafe { call.launch(launch) }.w()?;
        }
        Ok((CudaStorage::wrap_cuda_slice(out, device), Shape::from(rows * (n + fetched))))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{factor, round as on_any, round_rows as rows_on_any};
    use super::*;
    use crate::random::Rng;
    use candle_core::DType;

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
        let values = Tensor::zeros((2, 2 * N), DType::F32, &Device::Cpu).unwrap();
        let coded = coded(values, &Tensor::from_vec(all, (2, 2 * NUMBERS), &Device::Cpu).unwrap()).unwrap();
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
