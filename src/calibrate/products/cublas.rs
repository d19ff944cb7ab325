//! cuBLAS on parts of matrices (`cublasGemmEx`, <https://docs.nvidia.com/cuda/cublas/#cublasgemmex>).
#![allow(unsafe_code)]
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t,
};
use candle_core::cuda_backend::cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage, WrapErr, gemm_reduced_precision_f32};
use candle_core::{DType, Layout, Result, WithDType, bail};

/// Types that cuBLAS has products of.
pub(in crate::calibrate) trait Float: CudaDType + DeviceRepr + WithDType {
    const TYPE: cudaDataType_t;
    fn compute() -> cublasComputeType_t;
}

impl Float for f32 {
    const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_32F;

    /// As candle's own products.
    fn compute() -> cublasComputeType_t {
        match gemm_reduced_precision_f32() {
            true => cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            false => cublasComputeType_t::CUBLAS_COMPUTE_32F,
        }
    }
}

impl Float for f64 {
    const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_64F;

    fn compute() -> cublasComputeType_t {
        cublasComputeType_t::CUBLAS_COMPUTE_64F
    }
}

/// A matrix' first element and those after it, and how far apart rows are, and columns; one of both is 1.
pub(in crate::calibrate) struct Part<'a, T> {
    pub at: CudaView<'a, T>,
    pub strides: [usize; 2],
}

impl<'a, T: Float> Part<'a, T> {
    fn of(storage: &'a CudaStorage, layout: &Layout) -> Result<Self> {
        let [rows, columns] = layout.stride()[..] else { bail!("{:?} is no matrix", layout.shape()) };
        Ok(Part { at: storage.as_cuda_slice()?.slice(layout.start_offset()..), strides: [rows, columns] })
    }

    /// How cuBLAS reads it where it is to be transposed: it has columns where others have rows.
    fn turned(&self) -> Result<(i32, cublasOperation_t)> {
        match self.strides {
            [rows, 1] => Ok((i32::try_from(rows)?, cublasOperation_t::CUBLAS_OP_N)),
            [1, columns] => Ok((i32::try_from(columns)?, cublasOperation_t::CUBLAS_OP_T)),
            strides => bail!("a product of a matrix with strides {strides:?}"),
        }
    }
}

/// `c = by a b + keep c` of `[m, k]` and `[k, n]`; rows of `c` are `apart`.
///
/// # Safety
/// The matrices lie within what they are parts of.
///
/// # Errors
/// No dimension of a matrix is dense, or cuBLAS'.
pub(in crate::calibrate) unsafe fn multiply<T: Float>(
    device: &CudaDevice,
    [m, n, k]: [usize; 3],
    (by, keep): (T, T),
    (a, b): (&Part<T>, &Part<T>),
    (c, apart): (&mut CudaViewMut<T>, usize),
) -> Result<()> {
    // (a b)^T = b^T a^T.
    let ((lda, a_op), (ldb, b_op)) = (a.turned()?, b.turned()?);
    let [m, n, k, ldc] = [i32::try_from(m)?, i32::try_from(n)?, i32::try_from(k)?, i32::try_from(apart)?];
    let (stream, blas) = (device.cuda_stream(), device.cublas_handle());
    let ((a, _a), (b, _b)) = (a.at.device_ptr(&stream), b.at.device_ptr(&stream));
    let (c, _c) = c.device_ptr_mut(&stream);
    let of = |x: &T| std::ptr::from_ref(x).cast();
    let algorithm = cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT;
    // SAFETY: pointers on the handle's own device, matrices inside what they point to as the caller says; the factors are on
    // the host, as the handle has them by default, and live until the call returns.
    unsafe {
        gemm_ex(
            *blas.handle(),
            b_op,
            a_op,
            n,
            m,
            k,
            of(&by),
            b as *const _,
            T::TYPE,
            ldb,
            a as *const _,
            T::TYPE,
            lda,
            of(&keep),
            c as *mut _,
            T::TYPE,
            ldc,
            T::compute(),
            algorithm,
        )
    }
    .w()
}

/// `c += by a b` of m, n and k, rows of `c` being `apart`, which the layouts were compared with.
pub(super) fn add_product(
    (c, c_l): (&mut CudaStorage, &Layout),
    (a, a_l): (&CudaStorage, &Layout),
    (b, b_l): (&CudaStorage, &Layout),
    sizes: ([usize; 3], usize),
    by: f64,
) -> Result<()> {
    match c.dtype() {
        DType::F32 => add::<f32>((c, c_l), (a, a_l), (b, b_l), sizes, by),
        DType::F64 => add::<f64>((c, c_l), (a, a_l), (b, b_l), sizes, by),
        other => bail!("a sum of products in {other:?}"),
    }
}

fn add<T: Float>(
    (c, c_l): (&mut CudaStorage, &Layout),
    (a, a_l): (&CudaStorage, &Layout),
    (b, b_l): (&CudaStorage, &Layout),
    (sizes, apart): ([usize; 3], usize),
    by: f64,
) -> Result<()> {
    let device = c.device().clone();
    let (a, b) = (Part::of(a, a_l)?, Part::of(b, b_l)?);
    let mut c = c.as_cuda_slice_mut::<T>()?.slice_mut(c_l.start_offset()..);
    // SAFETY: layouts of tensors are inside their storages, and these have the sizes.
    unsafe { multiply(&device, sizes, (T::from_f64(by), T::from_f64(1.0)), (&a, &b), (&mut c, apart)) }
}
