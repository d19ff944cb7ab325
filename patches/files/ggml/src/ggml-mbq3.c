#include "ggml-mbq3.h"
#include "ggml-impl.h"

#include <assert.h>
#include <math.h>
#include <string.h>

void ggml_mbq3_pack_codes(const uint8_t * GGML_RESTRICT codes, uint32_t * GGML_RESTRICT q) {
    for (int t = 0; t < QK_MBQ3/32; ++t) {
        uint32_t a = 0, b = 0, c = 0;
        for (int l = 0; l < 4; ++l) {
            uint32_t v[8];
            for (int w = 0; w < 8; ++w) {
                v[w] = codes[32*t + 4*w + l] & 7u;
            }
            a |= (v[0] | v[1] << 3 | (v[6] & 3u) << 6) << 8*l;
            b |= (v[2] | v[3] << 3 | (v[7] & 3u) << 6) << 8*l;
            c |= (v[4] | v[5] << 3 | (v[6] >> 2) << 6 | (v[7] >> 2) << 7) << 8*l;
        }
        q[t]     = a;
        q[4 + t] = b;
        q[8 + t] = c;
    }
}

void ggml_mbq3_unpack_codes(const uint32_t * GGML_RESTRICT q, uint8_t * GGML_RESTRICT codes) {
    for (int t = 0; t < QK_MBQ3/32; ++t) {
        for (int l = 0; l < 4; ++l) {
            const uint32_t a = q[t]     >> 8*l;
            const uint32_t b = q[4 + t] >> 8*l;
            const uint32_t c = q[8 + t] >> 8*l;
            uint8_t * out = codes + 32*t + l;
            out[ 0] = a & 7;
            out[ 4] = (a >> 3) & 7;
            out[ 8] = b & 7;
            out[12] = (b >> 3) & 7;
            out[16] = c & 7;
            out[20] = (c >> 3) & 7;
            out[24] = ((a >> 6) & 3) | ((c >> 4) & 4);
            out[28] = ((b >> 6) & 3) | ((c >> 5) & 4);
        }
    }
}

// A comparison with NaN is false, so min(max(NaN, 0), 7) is 0: every code stays in range.
static float clamp_code(float v) {
    v = v > 0.0f ? v : 0.0f;
    return v < 7.0f ? v : 7.0f;
}

void quantize_row_mbq3_ref(const float * GGML_RESTRICT x, block_mbq3 * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_MBQ3 == 0);

    for (int64_t ib = 0; ib < k/QK_MBQ3; ++ib) {
        const float * w = x + ib*QK_MBQ3;

        float lo   = w[0];
        float hi   = w[0];
        float taint = 0.0f; // NaN as soon as one weight is not finite
        for (int j = 0; j < QK_MBQ3; ++j) {
            lo = w[j] < lo ? w[j] : lo;
            hi = w[j] > hi ? w[j] : hi;
            taint += w[j]*0.0f;
        }

        const float range = hi - lo;
        const float step  = (range > 1e-5f ? range : 1e-5f)/7.0f;
        const float zero  = clamp_code(-rintf(lo/step));

        uint8_t codes[QK_MBQ3];
        for (int j = 0; j < QK_MBQ3; ++j) {
            codes[j] = (uint8_t) clamp_code(rintf(w[j]/step) + zero);
        }

        const ggml_fp16_t d = GGML_FP32_TO_FP16(step + taint);
        y[ib].d = d;
        // 0 - x rather than -x, so that a zero of 0 gives m = +0
        y[ib].m = GGML_FP32_TO_FP16(0.0f - GGML_FP16_TO_FP32(d)*zero);
        ggml_mbq3_pack_codes(codes, y[ib].q);
    }
}

void dequantize_row_mbq3(const block_mbq3 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_MBQ3 == 0);

    for (int64_t ib = 0; ib < k/QK_MBQ3; ++ib) {
        const float d = GGML_FP16_TO_FP32(x[ib].d);
        const float m = GGML_FP16_TO_FP32(x[ib].m);

        uint8_t codes[QK_MBQ3];
        ggml_mbq3_unpack_codes(x[ib].q, codes);
        for (int j = 0; j < QK_MBQ3; ++j) {
            y[ib*QK_MBQ3 + j] = d*codes[j] + m; // d*code is exact in f32, so a fused multiply-add changes nothing
        }
    }
}

size_t quantize_mbq3(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * quant_weights) {
    GGML_UNUSED(quant_weights);
    quantize_row_mbq3_ref(src, dst, nrows*n_per_row);
    return nrows * ggml_row_size(GGML_TYPE_MBQ3, n_per_row);
}
