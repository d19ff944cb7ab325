#pragma once

#include "common.cuh"

#include <cstdlib>

// GGML_CUDA_TOWER_F16=0 turns off what follows, and padded heads of 72 (fattn.cu)
static inline bool ggml_cuda_tower_f16() {
    static const bool on = getenv("GGML_CUDA_TOWER_F16") == nullptr || atoi(getenv("GGML_CUDA_TOWER_F16")) != 0;
    return on;
}

// Towers with f16 weights, on NVIDIA GPUs from Ampere on: NORM with its scale and shift is one kernel with an f16 result, and
// MUL_MAT with the bias and one of GELU, a residual, a copy to f16, or nothing is one cublasLt product with f32 sums. What passes
// from one product to the next is f16 and goes through memory once. Other activations are a kernel behind the product.
// Computes nodes from i on; returns how many beyond i. 0 if it does not know them, if there are less than 64 columns, or if
// cublasLt has no algorithm that runs: they are then computed one by one, with f16 sums.
int ggml_cuda_linear_f16(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);
