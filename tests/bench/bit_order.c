// MBQ3's order of bits against a plane of low bits and a plane of high bits, on AVX2: time to turn
// 48 bytes into codes and meet them with 128 activations. Built and run by run.sh.
//
// The planes are the best we found for this width: 32 bytes with two bits of four codes each, so
// that a 256-bit shift and mask gives 32 of them; 16 bytes with the high bits. Both orders use the
// same order of activations, so that the sums can be compared.
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BLOCKS = 512 }; // 24 KB of codes: first-level cache, so that arithmetic is what is timed

static inline void unpack_mbq3(const uint8_t * p, __m256i * v) {
    const __m256i a = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p));
    const __m256i b = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (p + 16)));
    const __m256i c = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (p + 32)));
    const __m256i ab = _mm256_loadu_si256((const __m256i *) p);
    const __m256i by3 = _mm256_setr_epi32(0, 0, 0, 0, 3, 3, 3, 3);
    const __m256i by4 = _mm256_setr_epi32(4, 4, 4, 4, 5, 5, 5, 5);
    const __m256i seven = _mm256_set1_epi8(7);
    v[0] = _mm256_and_si256(_mm256_srlv_epi32(a, by3), seven);
    v[1] = _mm256_and_si256(_mm256_srlv_epi32(b, by3), seven);
    v[2] = _mm256_and_si256(_mm256_srlv_epi32(c, by3), seven);
    v[3] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(ab, 6), _mm256_set1_epi8(3)),
                           _mm256_and_si256(_mm256_srlv_epi32(c, by4), _mm256_set1_epi8(4)));
}

static inline void unpack_planes(const uint8_t * p, __m256i * v) {
    const __m256i low  = _mm256_loadu_si256((const __m256i *) p);
    const __m256i high = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (p + 32))),
                                           _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    const __m256i three = _mm256_set1_epi8(3), four = _mm256_set1_epi8(4);
    v[0] = _mm256_or_si256(_mm256_and_si256(low, three),                        _mm256_and_si256(_mm256_slli_epi32(high, 2), four));
    v[1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(low, 2), three), _mm256_and_si256(_mm256_slli_epi32(high, 1), four));
    v[2] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(low, 4), three), _mm256_and_si256(high, four));
    v[3] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(low, 6), three), _mm256_and_si256(_mm256_srli_epi32(high, 1), four));
}

static void pack_mbq3(const uint8_t * codes, uint8_t * p) { // codes[32*k + byte], the order of unpack
    for (int j = 0; j < 16; ++j) {
        uint8_t c[8];
        for (int w = 0; w < 8; ++w) { c[w] = codes[16*w + j]; }
        p[j]      = (uint8_t) (c[0] | c[1] << 3 | (c[6] & 3) << 6);
        p[16 + j] = (uint8_t) (c[2] | c[3] << 3 | (c[7] & 3) << 6);
        p[32 + j] = (uint8_t) (c[4] | c[5] << 3 | (c[6] >> 2) << 6 | (c[7] >> 2) << 7);
    }
}

static void pack_planes(const uint8_t * codes, uint8_t * p) {
    memset(p, 0, 48);
    for (int k = 0; k < 4; ++k) {
        for (int j = 0; j < 32; ++j) {
            p[j]           |= (uint8_t) ((codes[32*k + j] & 3) << 2*k);
            p[32 + j % 16] |= (uint8_t) ((codes[32*k + j] >> 2) << (k + 4*(j/16)));
        }
    }
}

#define DOT(name, unpack)                                                                          \
static __attribute__((noinline)) int name(const uint8_t * p, const int8_t * y) {                  \
    __m256i sum = _mm256_setzero_si256();                                                          \
    for (int b = 0; b < BLOCKS; ++b, p += 48) {                                                    \
        __m256i v[4], s[4];                                                                        \
        unpack(p, v);                                                                              \
        for (int k = 0; k < 4; ++k) {                                                              \
            s[k] = _mm256_maddubs_epi16(v[k], _mm256_loadu_si256((const __m256i *) y + k));        \
        }                                                                                          \
        const __m256i s16 = _mm256_add_epi16(_mm256_add_epi16(s[0], s[1]), _mm256_add_epi16(s[2], s[3])); \
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(s16, _mm256_set1_epi16(1)));                 \
    }                                                                                              \
    int out[8], total = 0;                                                                         \
    _mm256_storeu_si256((__m256i *) out, sum);                                                     \
    for (int i = 0; i < 8; ++i) { total += out[i]; }                                               \
    return total;                                                                                  \
}

DOT(dot_mbq3, unpack_mbq3)
DOT(dot_planes, unpack_planes)

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double) t.tv_sec + 1e-9*(double) t.tv_nsec;
}

int main(void) {
    static uint8_t codes[BLOCKS][128], a[BLOCKS*48], b[BLOCKS*48];
    static int8_t y[128];
    for (int i = 0; i < 128; ++i) { y[i] = (int8_t) (rand()%255 - 127); }
    for (int n = 0; n < BLOCKS; ++n) {
        for (int i = 0; i < 128; ++i) { codes[n][i] = (uint8_t) (rand() >> 8 & 7); }
        pack_mbq3(codes[n], a + 48*n);
        pack_planes(codes[n], b + 48*n);
    }
    int expected = 0;
    for (int n = 0; n < BLOCKS; ++n) {
        for (int i = 0; i < 128; ++i) { expected += codes[n][i]*y[i]; }
    }
    if (dot_mbq3(a, y) != expected || dot_planes(b, y) != expected) {
        printf("sums differ: %d %d, not %d\n", dot_mbq3(a, y), dot_planes(b, y), expected);
        return 1;
    }
    double best[2] = { 1e9, 1e9 };
    volatile int sink = 0;
    for (int round = 0; round < 200; ++round) {
        for (int which = 0; which < 2; ++which) {
            const double t = now();
            for (int i = 0; i < 200; ++i) { sink += which ? dot_planes(b, y) : dot_mbq3(a, y); }
            const double s = (now() - t)/200/BLOCKS;
            best[which] = s < best[which] ? s : best[which];
        }
    }
    printf("ns for 128 weights, best of 200 rounds: mbq3 %.2f, planes %.2f\n", best[0]*1e9, best[1]*1e9);
    return 0;
}
