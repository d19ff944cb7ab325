#include "mbq3.h"
#include "mbq3-kernel.h"

#include "ggml-cpu-impl.h"
#include "ggml-mbq3.h"

#include <assert.h>

void ggml_mbq3_quantize_weights(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_mbq3_ref(x, y, k);
}

void ggml_mbq3_quantize_activations(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    mbq3_quantize_activations(x, y, k);
}

void ggml_vec_dot_mbq3_mbq8(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx,
                            const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(n % QK_MBQ3 == 0);
    assert(nrc == 1);
    GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);
    *s = mbq3_dot(n, vx, vy);
}

size_t ggml_mbq3_wdata_size(int n_tasks, const struct ggml_tensor * dst) {
    GGML_UNUSED(n_tasks); GGML_UNUSED(dst);
    return 0;
}

bool ggml_compute_forward_mul_mat_mbq3(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    GGML_UNUSED(params); GGML_UNUSED(dst);
    return false;
}
