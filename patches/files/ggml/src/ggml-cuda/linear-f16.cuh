#pragma once

#include "common.cuh"

// Towers: the norm's scale and shift, an f16 weight's product with bias, activation and residual, each in one kernel, on
// GPUs from Ampere on. Sums are f32, and what passes from one product to the next is f16 and goes through memory once.
// Computes nodes from i on; returns how many beyond i, 0 if it does not know them. GGML_CUDA_LINEAR_F16=0 turns it off.
int ggml_cuda_linear_f16(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);
