#pragma once

// MBQ3 on the CPU: what ggml-cpu.c calls

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// f32 -> block_mbq3 (for CPY and SET_ROWS) and f32 -> block_mbq8
void ggml_mbq3_quantize_weights    (const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void ggml_mbq3_quantize_activations(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

void ggml_vec_dot_mbq3_mbq8(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx,
                            const void * GGML_RESTRICT vy, size_t by, int nrc);

// Matrix product for several columns (prefill): true if it was computed here. Needs no more of
// wdata than the converted activations, which ggml_graph_plan has planned for.
bool ggml_compute_forward_mul_mat_mbq3(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
