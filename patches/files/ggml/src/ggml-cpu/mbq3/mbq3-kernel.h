#pragma once

// MBQ3 arithmetic, free of ggml's runtime so that a test can compile it once per instruction set

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// the instruction set this file was compiled for
const char * mbq3_kernel_name(void);

// k activations (a multiple of 128) to k/128 blocks. d = max|x|/127 per 32, quants rounded half to
// even. A chunk with a NaN or an infinity gets d = s = NaN, so that the fault reaches the result.
void mbq3_quantize_activations(const float * x, block_mbq8 * y, int64_t k);

// dot product of n weights with n activations, n a multiple of 128
float mbq3_dot(int64_t n, const block_mbq3 * x, const block_mbq8 * y);

// out[j*out_stride + i] = dot product of row i of x with row j of y, both of n elements;
// x_stride and y_stride count blocks
void mbq3_gemm(int64_t rows, int64_t cols, int64_t n, const block_mbq3 * x, int64_t x_stride,
               const block_mbq8 * y, int64_t y_stride, float * out, int64_t out_stride);

#ifdef __cplusplus
}
#endif
