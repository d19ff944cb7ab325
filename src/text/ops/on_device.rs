//! Operations on a CUDA device that candle's own would need many passes for.
#![allow(unsafe_code)]
use crate::cuda_kernels::MASKED_SOFTMAX;
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaStorage, WrapErr};
use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};
use std::ops::Range;

/// As [`super::masked_softmax`]; `scores` are overwritten.
///
/// # Errors
/// The device's.
pub(super) fn masked_softmax(scores: Tensor, scale: f64, seen: &[Range<usize>]) -> Result<Tensor> {
    let scores = scores.contiguous()?;
    let ends: Vec<u32> = seen.iter().flat_map(|seen| [seen.start as u32, seen.end as u32]).collect();
    scores.inplace_op2(&Tensor::new(ends, scores.device())?, &MaskedSoftmax { scale: scale as f32 })?;
    Ok(scores)
}

/// Scores `[batch, repeats * rows, n]` and where each of `rows` begins and ends to see, `[2 * rows]`.
struct MaskedSoftmax {
    scale: f32,
}

/// Threads of a row (`THREADS` there).
const THREADS: u32 = 256;

impl InplaceOp2 for MaskedSoftmax {
    fn name(&self) -> &'static str {
        "masked_softmax"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<()> {
        bail!("{} is for CUDA", self.name())
    }

    fn cuda_fwd(&self, scores: &mut CudaStorage, scores_l: &Layout, seen: &CudaStorage, seen_l: &Layout) -> Result<()> {
        let ((batch, all, n), rows) = (scores_l.shape().dims3()?, seen_l.shape().dims1()? / 2);
        if !scores_l.is_contiguous() || !seen_l.is_contiguous() || rows == 0 || all % rows != 0 {
            bail!("{}: {scores_l:?} and {seen_l:?}", self.name());
        }
        let device = scores.device.clone();
        let mut scores = scores.as_cuda_slice_mut::<f32>()?.slice_mut(scores_l.start_offset()..);
        let seen = seen.as_cuda_slice::<u32>()?.slice(seen_l.start_offset()..);
        let kernel = device.get_or_load_custom_func(self.name(), self.name(), MASKED_SOFTMAX)?;
        let grid_dim = ((batch * all) as u32, 1, 1);
        let launch = LaunchConfig { grid_dim, block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        let (rows, columns) = (rows as i32, n as i32);
        let mut call = kernel.builder();
        call.arg(&mut scores).arg(&seen).arg(&rows).arg(&columns).arg(&self.scale);
        // SAFETY: the kernel's parameters. It writes `batch * all` rows of n, and reads ends of `rows`; ends are among the
        // columns, or the slices of the CPU's form would not be.
        unsafe { call.launch(launch) }.w()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::masked_softmax;
    use crate::random::Rng;
    use candle_core::{Device, Tensor};

    /// The CPU's, of rows that see all, some and one of the columns.
    #[test]
    fn softmax_is_the_cpus() {
        let Ok(device) = Device::new_cuda(0) else { return eprintln!("skipped: no CUDA device here") };
        let (rows, n) = (5, 700);
        let mut dice = Rng::new(5);
        let scores: Vec<f32> = (0..6 * rows * n).map(|_| 20.0 * dice.uniform()).collect();
        let scores = Tensor::from_vec(scores, (2, 3 * rows, n), &Device::Cpu).unwrap();
        let seen = [0..700, 0..1, 30..600, 699..700, 256..512];
        let on =
            |device: &Device| masked_softmax(scores.copy().unwrap().to_device(device).unwrap(), 0.3, &seen).unwrap();
        let (want, got) = (on(&Device::Cpu), on(&device).to_device(&Device::Cpu).unwrap());
        let off = (want - got).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        // Of probabilities up to 1; exponentials of numbers up to 12 are good to 1e-6.
        assert!(off < 3e-6, "{off}");
    }
}
