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

// rows of weights that a thread takes at a time; a multiple of the kernel's four
#define CHUNK_ROWS 64

bool ggml_compute_forward_mul_mat_mbq3(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];

    // One column is ggml_vec_dot_mbq3_mbq8's; a stack of weight matrices (or of columns) is rare
    // and goes there too.
    const int64_t cols = src1->ne[1];
    if (src0->type != GGML_TYPE_MBQ3 || src1->type != GGML_TYPE_F32 || params->use_ref ||
        cols < 2 || ggml_nrows(src0) != src0->ne[1] || ggml_nrows(src1) != cols) {
        return false;
    }
    GGML_ASSERT(src1->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float));

    const int64_t n       = src0->ne[0];
    const int64_t rows    = src0->ne[1];
    const int64_t blocks  = n/QK_MBQ3;
    block_mbq8 *  columns = params->wdata;

    // A column is cut at block borders, so that every thread has work even where columns are few.
    const int64_t first = blocks*params->ith/params->nth;
    const int64_t last  = blocks*(params->ith + 1)/params->nth;
    for (int64_t j = 0; j < cols; ++j) {
        const float * x = (const float *) ((const char *) src1->data + j*src1->nb[1]);
        mbq3_quantize_activations(x + first*QK_MBQ3, columns + j*blocks + first, (last - first)*QK_MBQ3);
    }

    if (params->ith == 0) {
        // the first chunks are dealt out by thread number
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t chunks = (rows + CHUNK_ROWS - 1)/CHUNK_ROWS;
    for (int64_t chunk = params->ith; chunk < chunks; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t row = chunk*CHUNK_ROWS;
        mbq3_gemm(MIN(CHUNK_ROWS, rows - row), cols, n,
                  (const block_mbq3 *) ((const char *) src0->data + row*src0->nb[1]), src0->nb[1]/sizeof(block_mbq3),
                  columns, blocks, (float *) dst->data + row, dst->nb[1]/sizeof(float));
    }
    return true;
}
