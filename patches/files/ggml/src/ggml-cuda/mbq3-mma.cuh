#pragma once

#include "common.cuh"

// dst = src0 * src1 for src0 of type MBQ3 and more than one column, on the bf16 tensor cores: a kernel of its own for few
// columns, cuBLAS for many. False, with nothing done, for what MMVQ and MMQ have to take: other types, GPUs before Ampere,
// repeated weights, and column counts at which they are faster.
bool ggml_cuda_mbq3_mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst);
