#include "mbq3-kernel.h"

#include <math.h>
#include <string.h>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

static inline float half_to_float(ggml_half h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#elif defined(__ARM_NEON) && defined(__ARM_FP16_FORMAT_IEEE)
    __fp16 f;
    memcpy(&f, &h, sizeof(f));
    return (float) f;
#else
    // Shift the 15 bits of exponent and mantissa to their place in a float and mend the exponent's
    // bias with a multiplication, which treats subnormals right; infinities need one more step.
    const uint32_t magnitude = (uint32_t) (h & 0x7fff) << 13;
    uint32_t bits = magnitude;
    float f;
    memcpy(&f, &bits, sizeof(f));
    f *= 0x1p+112f;
    memcpy(&bits, &f, sizeof(f));
    if (magnitude >= 0x7c00u << 13) {
        bits = magnitude | 0x7f800000u;
    }
    bits |= (uint32_t) (h & 0x8000) << 16;
    memcpy(&f, &bits, sizeof(f));
    return f;
#endif
}

const char * mbq3_kernel_name(void) {
    return "portable";
}

void mbq3_quantize_activations(const float * x, block_mbq8 * y, int64_t k) {
    for (int64_t ib = 0; ib < k/QK_MBQ3; ++ib, ++y) {
        for (int t = 0; t < 4; ++t, x += 32) {
            float amax  = 0.0f;
            float taint = 0.0f; // NaN as soon as one activation is not finite
            for (int j = 0; j < 32; ++j) {
                const float a = fabsf(x[j]);
                amax   = a > amax ? a : amax;
                taint += x[j]*0.0f;
            }
            // a chunk too small for its inverse scale to be finite counts as zero
            const float d  = (amax > 1e-30f ? amax/127.0f : 0.0f) + taint;
            const float id = d > 0.0f ? 127.0f/amax : 0.0f;

            int sum = 0;
            for (int j = 0; j < 32; ++j) {
                const int v = id > 0.0f ? (int) rintf(x[j]*id) : 0;
                y->qs[16*(j/4) + 4*t + j%4] = (int8_t) v;
                sum += v;
            }
            y->d[t] = d;
            y->s[t] = d*(float) sum;
        }
    }
}

float mbq3_dot(int64_t n, const block_mbq3 * x, const block_mbq8 * y) {
    float sum = 0.0f;
    for (int64_t ib = 0; ib < n/QK_MBQ3; ++ib) {
        const float d = half_to_float(x[ib].d);
        const float m = half_to_float(x[ib].m);
        for (int t = 0; t < 4; ++t) {
            const int8_t * q = y[ib].qs + 4*t;
            int dot = 0;
            for (int l = 0; l < 4; ++l) {
                const uint32_t a = x[ib].q[t]     >> 8*l;
                const uint32_t b = x[ib].q[4 + t] >> 8*l;
                const uint32_t c = x[ib].q[8 + t] >> 8*l;
                dot += (int) (a & 7)        * q[l];
                dot += (int) ((a >> 3) & 7) * q[16 + l];
                dot += (int) (b & 7)        * q[32 + l];
                dot += (int) ((b >> 3) & 7) * q[48 + l];
                dot += (int) (c & 7)        * q[64 + l];
                dot += (int) ((c >> 3) & 7) * q[80 + l];
                dot += (int) (((a >> 6) & 3) | ((c >> 4) & 4)) * q[96 + l];
                dot += (int) (((b >> 6) & 3) | ((c >> 5) & 4)) * q[112 + l];
            }
            sum += d*y[ib].d[t]*(float) dot + m*y[ib].s[t];
        }
    }
    return sum;
}
