#pragma once

#include "common.cuh"

// dst = src0 * src1 for src0 of type MBQ3 and up to eight columns, with the fused bias and gate of mul_mat_vec_q.
// False, with nothing done, for what the generic kernels of mmvq.cu have to take: other types, a fused shared expert,
// other makers' GPUs.
bool ggml_cuda_mbq3_mul_mat_vec(
    ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * ids, ggml_tensor * dst,
    const ggml_cuda_mm_fusion_args_host * fusion);

// A norm with weights whose result is one column for products with MBQ3: computed together with the quantised column.
// False, with nothing done, where the nodes i and i + 1 (RMS_NORM, MUL) are something else.
bool ggml_cuda_mbq3_rms_norm_mul(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);

// To be told of every node that was computed: forgets the quantised column if its activations were overwritten.
void ggml_cuda_mbq3_written(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int first, int last);
