#pragma once

#include "common.cuh"

// dst = src0 * src1 for src0 of type MBQ3 and up to eight columns, with the fused bias and gate of mul_mat_vec_q.
// False, with nothing done, for what the generic kernels of mmvq.cu have to take: other types, a fused shared expert,
// other makers' GPUs.
bool ggml_cuda_mbq3_mul_mat_vec(
    ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * ids, ggml_tensor * dst,
    const ggml_cuda_mm_fusion_args_host * fusion);
