#include "mbq3-kernel.h"

// The algebra. A block of weights is d*c + m with codes c in 0..7; a chunk t of 32 activations is
// e_t*q with |q| <= 127. Their dot product is
//
//     sum over t of  d*e_t * sum(c*q)  +  m * s_t,        s_t = e_t*sum(q),
//
// with s_t computed once per activation. The quants of the activations are stored in the order in
// which codes fall out of a block: 16 bytes of word 0 of the four chunks, then of word 1, and so on.
// So a vector of codes meets its vector of quants without a shuffle, every group of four products
// belongs to one chunk, and 32-bit lane t (mod 4) ends up with chunk t's sum.
//
// Sizes: |sum(c*q)| <= 32*7*127 fits 16 bits; in the pairwise 16-bit sums below four products of
// pairs add up to at most 4*2*7*127 = 7112. All sums over chunks are f32.

#include <math.h>
#include <string.h>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define CHUNKS (QK_MBQ3/32)

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#else
#define ALWAYS_INLINE inline
#define UNROLL
#endif

static inline float half_to_float(ggml_half h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    // Put exponent and mantissa in their place in a float and mend the exponent's bias with a
    // multiplication, which treats subnormals right; infinities and NaN need one more step.
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

// ---------------------------------------------------------------------------------------------
// One implementation per instruction set of
//   codes_t, unpack(block)              the 128 codes of a block in registers
//   store_codes, load_codes             the same from and to 128 bytes
//   vec_t, zero, dot_scaled, add_mins   sums over chunks, in lanes
//   reduce(vec_t)                       the sum of the lanes

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#define KERNEL_NAME "avx512vnni"

typedef struct { __m512i v[2]; } codes_t;
typedef __m512 vec_t;

static inline codes_t unpack(const block_mbq3 * x) {
    const __m512i q = _mm512_maskz_loadu_epi32(0x0fff, x->q);
    // words 0-3 of the chunks: A, A >> 3, B, B >> 3
    const __m512i aabb = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7), q);
    const __m512i ccab = _mm512_permutexvar_epi32(_mm512_setr_epi32(8, 9, 10, 11, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7), q);
    const __m512i cc   = _mm512_permutexvar_epi32(_mm512_setr_epi32(8, 9, 10, 11, 8, 9, 10, 11, 8, 9, 10, 11, 8, 9, 10, 11), q);
    const __m512i seven = _mm512_set1_epi8(7);
    codes_t c;
    c.v[0] = _mm512_and_si512(_mm512_srlv_epi32(aabb, _mm512_setr_epi32(0, 0, 0, 0, 3, 3, 3, 3, 0, 0, 0, 0, 3, 3, 3, 3)), seven);
    // words 4-7: C, C >> 3, and low bits from A and B with the high bit from C
    const __m512i low  = _mm512_and_si512(_mm512_srlv_epi32(ccab, _mm512_setr_epi32(0, 0, 0, 0, 3, 3, 3, 3, 6, 6, 6, 6, 6, 6, 6, 6)),
                                          _mm512_setr_epi32(0x07070707, 0x07070707, 0x07070707, 0x07070707, 0x07070707, 0x07070707, 0x07070707, 0x07070707,
                                                            0x03030303, 0x03030303, 0x03030303, 0x03030303, 0x03030303, 0x03030303, 0x03030303, 0x03030303));
    const __m512i high = _mm512_and_si512(_mm512_srlv_epi32(cc, _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 5, 5, 5, 5)),
                                          _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0,
                                                            0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x04040404));
    c.v[1] = _mm512_or_si512(low, high);
    return c;
}

static inline void store_codes(uint8_t * p, codes_t c) {
    _mm512_storeu_si512(p, c.v[0]);
    _mm512_storeu_si512(p + 64, c.v[1]);
}

static inline codes_t load_codes(const uint8_t * p) {
    return (codes_t) {{ _mm512_loadu_si512(p), _mm512_loadu_si512(p + 64) }};
}

static inline vec_t zero(void) { return _mm512_setzero_ps(); }

static inline vec_t dot_scaled(vec_t acc, codes_t c, const block_mbq8 * y, float d) {
    __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), c.v[0], _mm512_loadu_si512(y->qs));
    sum = _mm512_dpbusd_epi32(sum, c.v[1], _mm512_loadu_si512(y->qs + 64));
    const __m512 scale = _mm512_mul_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(y->d)), _mm512_set1_ps(d));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc);
}

static inline __m128 add_mins(__m128 acc, const block_mbq8 * y, float m) {
    return _mm_fmadd_ps(_mm_set1_ps(m), _mm_loadu_ps(y->s), acc);
}

typedef __m128 min_t;
static inline min_t zero_min(void) { return _mm_setzero_ps(); }

static inline float reduce(vec_t acc, min_t mins) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(acc), _mm512_extractf32x8_ps(acc, 1));
    __m128 s = _mm_add_ps(_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)), mins);
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#elif defined(__AVX2__) && defined(__FMA__)

typedef struct { __m256i v[4]; } codes_t;
typedef __m256 vec_t;
typedef __m128 min_t;

static inline codes_t unpack(const block_mbq3 * x) {
    const __m256i a = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) x->q));
    const __m256i b = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (x->q + 4)));
    const __m256i c = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (x->q + 8)));
    const __m256i ab = _mm256_loadu_si256((const __m256i *) x->q);
    const __m256i by3 = _mm256_setr_epi32(0, 0, 0, 0, 3, 3, 3, 3);
    const __m256i by4 = _mm256_setr_epi32(4, 4, 4, 4, 5, 5, 5, 5);
    const __m256i seven = _mm256_set1_epi8(7);
    codes_t r;
    r.v[0] = _mm256_and_si256(_mm256_srlv_epi32(a, by3), seven);
    r.v[1] = _mm256_and_si256(_mm256_srlv_epi32(b, by3), seven);
    r.v[2] = _mm256_and_si256(_mm256_srlv_epi32(c, by3), seven);
    r.v[3] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(ab, 6), _mm256_set1_epi8(3)),
                             _mm256_and_si256(_mm256_srlv_epi32(c, by4), _mm256_set1_epi8(4)));
    return r;
}

static inline void store_codes(uint8_t * p, codes_t c) {
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_si256((__m256i *) (p + 32*i), c.v[i]);
    }
}

static inline codes_t load_codes(const uint8_t * p) {
    codes_t c;
    for (int i = 0; i < 4; ++i) {
        c.v[i] = _mm256_loadu_si256((const __m256i *) (p + 32*i));
    }
    return c;
}

static inline vec_t zero(void)     { return _mm256_setzero_ps(); }
static inline min_t zero_min(void) { return _mm_setzero_ps(); }

static inline vec_t dot_scaled(vec_t acc, codes_t c, const block_mbq8 * y, float d) {
    const __m256i * q = (const __m256i *) y->qs;
#if defined(__AVXVNNI__)
#define KERNEL_NAME "avxvnni"
    __m256i sum = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), c.v[0], _mm256_loadu_si256(q));
    sum = _mm256_dpbusd_avx_epi32(sum, c.v[1], _mm256_loadu_si256(q + 1));
    sum = _mm256_dpbusd_avx_epi32(sum, c.v[2], _mm256_loadu_si256(q + 2));
    sum = _mm256_dpbusd_avx_epi32(sum, c.v[3], _mm256_loadu_si256(q + 3));
#else
#define KERNEL_NAME "avx2"
    const __m256i p01 = _mm256_add_epi16(_mm256_maddubs_epi16(c.v[0], _mm256_loadu_si256(q)),
                                         _mm256_maddubs_epi16(c.v[1], _mm256_loadu_si256(q + 1)));
    const __m256i p23 = _mm256_add_epi16(_mm256_maddubs_epi16(c.v[2], _mm256_loadu_si256(q + 2)),
                                         _mm256_maddubs_epi16(c.v[3], _mm256_loadu_si256(q + 3)));
    const __m256i sum = _mm256_madd_epi16(_mm256_add_epi16(p01, p23), _mm256_set1_epi16(1));
#endif
    const __m256 scale = _mm256_mul_ps(_mm256_broadcast_ps((const __m128 *) y->d), _mm256_set1_ps(d));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc);
}

static inline min_t add_mins(min_t acc, const block_mbq8 * y, float m) {
    return _mm_fmadd_ps(_mm_set1_ps(m), _mm_loadu_ps(y->s), acc);
}

static inline float reduce(vec_t acc, min_t mins) {
    __m128 s = _mm_add_ps(_mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1)), mins);
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

#if defined(__ARM_FEATURE_DOTPROD)
#define KERNEL_NAME "neon-dotprod"
#else
#define KERNEL_NAME "neon"
#endif

typedef struct { uint8x16_t v[8]; } codes_t;
typedef float32x4_t vec_t;
typedef float32x4_t min_t;

static inline codes_t unpack(const block_mbq3 * x) {
    const uint8x16_t a = vreinterpretq_u8_u32(vld1q_u32(x->q));
    const uint8x16_t b = vreinterpretq_u8_u32(vld1q_u32(x->q + 4));
    const uint8x16_t c = vreinterpretq_u8_u32(vld1q_u32(x->q + 8));
    const uint8x16_t seven = vdupq_n_u8(7);
    const uint8x16_t four  = vdupq_n_u8(4);
    codes_t r;
    r.v[0] = vandq_u8(a, seven);
    r.v[1] = vandq_u8(vshrq_n_u8(a, 3), seven);
    r.v[2] = vandq_u8(b, seven);
    r.v[3] = vandq_u8(vshrq_n_u8(b, 3), seven);
    r.v[4] = vandq_u8(c, seven);
    r.v[5] = vandq_u8(vshrq_n_u8(c, 3), seven);
    // a byte shift by 6 leaves the two low bits alone
    r.v[6] = vorrq_u8(vshrq_n_u8(a, 6), vandq_u8(vshrq_n_u8(c, 4), four));
    r.v[7] = vorrq_u8(vshrq_n_u8(b, 6), vandq_u8(vshrq_n_u8(c, 5), four));
    return r;
}

static inline void store_codes(uint8_t * p, codes_t c) {
    for (int i = 0; i < 8; ++i) {
        vst1q_u8(p + 16*i, c.v[i]);
    }
}

static inline codes_t load_codes(const uint8_t * p) {
    codes_t c;
    for (int i = 0; i < 8; ++i) {
        c.v[i] = vld1q_u8(p + 16*i);
    }
    return c;
}

static inline vec_t zero(void)     { return vdupq_n_f32(0.0f); }
static inline min_t zero_min(void) { return vdupq_n_f32(0.0f); }

static inline vec_t dot_scaled(vec_t acc, codes_t c, const block_mbq8 * y, float d) {
#if defined(__ARM_FEATURE_DOTPROD)
    int32x4_t even = vdupq_n_s32(0);
    int32x4_t odd  = vdupq_n_s32(0);
    for (int i = 0; i < 8; i += 2) {
        even = vdotq_s32(even, vreinterpretq_s8_u8(c.v[i]),     vld1q_s8(y->qs + 16*i));
        odd  = vdotq_s32(odd,  vreinterpretq_s8_u8(c.v[i + 1]), vld1q_s8(y->qs + 16*i + 16));
    }
    const int32x4_t sum = vaddq_s32(even, odd);
#else
    int16x8_t low  = vdupq_n_s16(0); // bytes 0-7: chunks 0 and 1
    int16x8_t high = vdupq_n_s16(0); // bytes 8-15: chunks 2 and 3
    for (int i = 0; i < 8; ++i) {
        const int8x16_t w = vreinterpretq_s8_u8(c.v[i]);
        const int8x16_t q = vld1q_s8(y->qs + 16*i);
        low  = vmlal_s8(low, vget_low_s8(w), vget_low_s8(q));
        high = vmlal_high_s8(high, w, q);
    }
    const int32x4_t sum = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#endif
    return vfmaq_f32(acc, vcvtq_f32_s32(sum), vmulq_n_f32(vld1q_f32(y->d), d));
}

static inline min_t add_mins(min_t acc, const block_mbq8 * y, float m) {
    return vfmaq_n_f32(acc, vld1q_f32(y->s), m);
}

static inline float reduce(vec_t acc, min_t mins) {
    return vaddvq_f32(vaddq_f32(acc, mins));
}

#else

#define KERNEL_NAME "portable"

typedef struct { uint8_t v[QK_MBQ3]; } codes_t;
typedef struct { float v[CHUNKS]; } vec_t;
typedef float min_t;

static inline codes_t unpack(const block_mbq3 * x) {
    codes_t r;
    for (int t = 0; t < CHUNKS; ++t) {
        const uint32_t a = x->q[t], b = x->q[4 + t], c = x->q[8 + t];
        const uint32_t words[8] = {
            a & 0x07070707, (a >> 3) & 0x07070707,
            b & 0x07070707, (b >> 3) & 0x07070707,
            c & 0x07070707, (c >> 3) & 0x07070707,
            ((a >> 6) & 0x03030303) | ((c >> 4) & 0x04040404),
            ((b >> 6) & 0x03030303) | ((c >> 5) & 0x04040404),
        };
        for (int w = 0; w < 8; ++w) {
            for (int l = 0; l < 4; ++l) {
                r.v[16*w + 4*t + l] = (uint8_t) (words[w] >> 8*l);
            }
        }
    }
    return r;
}

static inline void store_codes(uint8_t * p, codes_t c) { memcpy(p, c.v, sizeof(c.v)); }

static inline codes_t load_codes(const uint8_t * p) {
    codes_t c;
    memcpy(c.v, p, sizeof(c.v));
    return c;
}

static inline vec_t zero(void)     { return (vec_t) {{ 0.0f }}; }
static inline min_t zero_min(void) { return 0.0f; }

static inline vec_t dot_scaled(vec_t acc, codes_t c, const block_mbq8 * y, float d) {
    for (int t = 0; t < CHUNKS; ++t) {
        int sum = 0;
        for (int w = 0; w < 8; ++w) {
            for (int l = 0; l < 4; ++l) {
                sum += c.v[16*w + 4*t + l]*y->qs[16*w + 4*t + l];
            }
        }
        acc.v[t] += d*y->d[t]*(float) sum;
    }
    return acc;
}

static inline min_t add_mins(min_t acc, const block_mbq8 * y, float m) {
    return acc + m*(y->s[0] + y->s[1] + y->s[2] + y->s[3]);
}

static inline float reduce(vec_t acc, min_t mins) {
    return (acc.v[0] + acc.v[1]) + (acc.v[2] + acc.v[3]) + mins;
}

#endif

const char * mbq3_kernel_name(void) {
    return KERNEL_NAME;
}

// ---------------------------------------------------------------------------------------------

// One chunk; portable, because converting activations is a small part of a product, except that
// AVX2 has it done by the function below.
static inline void quantize_chunk(const float * x, block_mbq8 * y, int t) {
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

void mbq3_quantize_activations(const float * x, block_mbq8 * y, int64_t k) {
    for (int64_t ib = 0; ib < k/QK_MBQ3; ++ib) {
        for (int t = 0; t < CHUNKS; ++t) {
            quantize_chunk(x + ib*QK_MBQ3 + 32*t, y + ib, t);
        }
    }
}

float mbq3_dot(int64_t n, const block_mbq3 * x, const block_mbq8 * y) {
    vec_t acc  = zero();
    min_t mins = zero_min();
    for (int64_t ib = 0; ib < n/QK_MBQ3; ++ib) {
        acc  = dot_scaled(acc, unpack(x + ib), y + ib, half_to_float(x[ib].d));
        mins = add_mins(mins, y + ib, half_to_float(x[ib].m));
    }
    return reduce(acc, mins);
}

// ---------------------------------------------------------------------------------------------
// Several columns: ROWS rows of weights are unpacked once for DEPTH blocks and meet COLS columns at
// a time. The unpacked codes stay in the first-level cache (8 KB), the activations of BAND columns
// in the second (DEPTH*BAND*160 bytes).

enum { ROWS = 4, COLS = 2, DEPTH = 16, BAND = 128 };

typedef struct {
    uint8_t codes[ROWS][DEPTH][QK_MBQ3];
    float   d[ROWS][DEPTH];
    float   m[ROWS][DEPTH];
} panel_t;

// The first `rows` rows of the panel with `cols` columns; cols is a constant wherever this is
// inlined and all rows are computed, so that the sums stay in registers.
static ALWAYS_INLINE void micro(const panel_t * p, int rows, const int cols, int depth, const block_mbq8 * y,
                                int64_t y_stride, float * out, int64_t out_stride, int first) {
    vec_t acc[ROWS][COLS];
    UNROLL for (int i = 0; i < ROWS; ++i) {
        UNROLL for (int j = 0; j < cols; ++j) {
            acc[i][j] = zero();
        }
    }
    for (int b = 0; b < depth; ++b) {
        UNROLL for (int i = 0; i < ROWS; ++i) {
            const codes_t c = load_codes(p->codes[i][b]);
            UNROLL for (int j = 0; j < cols; ++j) {
                acc[i][j] = dot_scaled(acc[i][j], c, y + j*y_stride + b, p->d[i][b]);
            }
        }
    }
    min_t mins[ROWS][COLS];
    UNROLL for (int i = 0; i < ROWS; ++i) {
        UNROLL for (int j = 0; j < cols; ++j) {
            mins[i][j] = zero_min();
        }
    }
    for (int b = 0; b < depth; ++b) {
        UNROLL for (int i = 0; i < ROWS; ++i) {
            UNROLL for (int j = 0; j < cols; ++j) {
                mins[i][j] = add_mins(mins[i][j], y + j*y_stride + b, p->m[i][b]);
            }
        }
    }
    UNROLL for (int i = 0; i < ROWS; ++i) {
        if (i < rows) {
            UNROLL for (int j = 0; j < cols; ++j) {
                float * o = out + j*out_stride + i;
                *o = reduce(acc[i][j], mins[i][j]) + (first ? 0.0f : *o);
            }
        }
    }
}

void mbq3_gemm(int64_t rows, int64_t cols, int64_t n, const block_mbq3 * x, int64_t x_stride,
               const block_mbq8 * y, int64_t y_stride, float * out, int64_t out_stride) {
    const int64_t blocks = n/QK_MBQ3;
    panel_t p;
    memset(&p, 0, sizeof(p)); // where rows run out, the kernel still reads all of them

    for (int64_t k0 = 0; k0 < blocks; k0 += DEPTH) {
        const int depth = (int) (blocks - k0 < DEPTH ? blocks - k0 : DEPTH);
        for (int64_t j0 = 0; j0 < cols; j0 += BAND) {
            const int64_t j1 = j0 + BAND < cols ? j0 + BAND : cols;
            for (int64_t i0 = 0; i0 < rows; i0 += ROWS) {
                const int r = (int) (rows - i0 < ROWS ? rows - i0 : ROWS);
                for (int i = 0; i < r; ++i) {
                    const block_mbq3 * xb = x + (i0 + i)*x_stride + k0;
                    for (int b = 0; b < depth; ++b) {
                        store_codes(p.codes[i][b], unpack(xb + b));
                        p.d[i][b] = half_to_float(xb[b].d);
                        p.m[i][b] = half_to_float(xb[b].m);
                    }
                }
                int64_t j = j0;
                for (; j + COLS <= j1; j += COLS) {
                    micro(&p, r, COLS, depth, y + j*y_stride + k0, y_stride, out + j*out_stride + i0, out_stride, k0 == 0);
                }
                for (; j < j1; ++j) {
                    micro(&p, r, 1, depth, y + j*y_stride + k0, y_stride, out + j*out_stride + i0, out_stride, k0 == 0);
                }
            }
        }
    }
}
