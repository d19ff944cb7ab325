// Checks one build of mbq3-kernel.c (see tests/mbq3_kernels.rs); prints the build's name.
//
// Two references in double: the product with the activations as given, to which the answer may
// differ by their rounding to 8 bits, and the product with the rounded activations, to which it may
// differ by f32 rounding only. Codes are taken from their bits one by one, as docs/format.md says.
#include "mbq3-kernel.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state = 42;

static uint64_t next(void) { // SplitMix64
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30))*0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27))*0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static double uniform(void) { return (double) (next() >> 11)/(double) (1ull << 53); }

static double half_value(ggml_half h) {
    const int exponent = (h >> 10) & 31;
    const int mantissa = h & 1023;
    const double v = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
    return h & 0x8000 ? -v : v;
}

static int bit(const block_mbq3 * b, int word, int lane, int at) { return b->q[word] >> (8*lane + at) & 1; }

static int code(const block_mbq3 * b, int e) {
    const int t = e/32, w = e%32/4, l = e%4;
    if (w < 6) {
        const int word = 4*(w/2) + t, at = 3*(w%2);
        return bit(b, word, l, at) | bit(b, word, l, at + 1) << 1 | bit(b, word, l, at + 2) << 2;
    }
    const int word = 4*(w - 6) + t;
    return bit(b, word, l, 6) | bit(b, word, l, 7) << 1 | bit(b, 8 + t, l, w) << 2;
}

static int failures = 0;

static void check(int good, const char * what, int64_t n, int64_t rows, int64_t cols, double v) {
    if (!good) {
        printf("FAILED %s: n %d rows %d cols %d: %g\n", what, (int) n, (int) rows, (int) cols, v);
        failures++;
    }
}

enum { GAUSS, LARGE, ONE_SIDED_LARGE, OUTLIERS, KINDS };

static float activation(int kind) {
    const double g = uniform() + uniform() + uniform() + uniform() - 2.0;
    switch (kind) {
        case GAUSS:           return (float) g;
        case LARGE:           return (float) (3e4*(2.0*uniform() - 1.0));
        case ONE_SIDED_LARGE: return (float) (3e4*(0.5 + 0.5*uniform())); // sums of 32 reach 9e5, past fp16
        default:              return (float) (next()%97 == 0 ? 3e4*g : g);
    }
}

static void product(int64_t n, int64_t rows, int64_t cols, int kind) {
    const int64_t blocks = n/128;
    const int64_t x_stride = blocks + 1, y_stride = blocks + 2, out_stride = rows + 3;
    block_mbq3 * x = malloc(sizeof(*x)*x_stride*rows);
    block_mbq8 * y = malloc(sizeof(*y)*y_stride*cols);
    float * a = malloc(sizeof(float)*n*cols);
    float * out = malloc(sizeof(float)*out_stride*cols);
    double * w = malloc(sizeof(double)*n*rows);

    for (int64_t i = 0; i < x_stride*rows; ++i) {
        for (int j = 0; j < 12; ++j) { x[i].q[j] = (uint32_t) next(); }
        // steps of about 0.01, one in 16 subnormal; m about the middle of the codes, of either sign
        x[i].d = (ggml_half) (next()%16 == 0 ? next() & 0x3ff : 0x2000 + (next() & 0x3ff));
        x[i].m = (ggml_half) (0x2800 + (next() & 0x83ff));
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < n; ++k) {
            const block_mbq3 * b = x + i*x_stride + k/128;
            w[i*n + k] = half_value(b->d)*code(b, (int) (k%128)) + half_value(b->m);
        }
    }
    for (int64_t i = 0; i < n*cols; ++i) { a[i] = activation(kind); }
    for (int64_t j = 0; j < cols; ++j) { mbq3_quantize_activations(a + j*n, y + j*y_stride, n); }
    for (int64_t i = 0; i < out_stride*cols; ++i) { out[i] = 12345.0f; }
    mbq3_gemm(rows, cols, n, x, x_stride, y, y_stride, out, out_stride);

    double err = 0.0, power = 0.0, dot_err = 0.0;
    for (int64_t j = 0; j < cols; ++j) {
        for (int64_t i = 0; i < rows; ++i) {
            double exact = 0.0, rounded = 0.0, size = 0.0;
            for (int64_t k = 0; k < n; ++k) {
                const block_mbq8 * b = y + j*y_stride + k/128;
                const int e = (int) (k%128), t = e/32, word = e%32/4, l = e%4;
                const double q = (double) b->d[t]*b->qs[16*word + 4*t + l];
                exact   += w[i*n + k]*a[j*n + k];
                rounded += w[i*n + k]*q;
                const block_mbq3 * wb = x + i*x_stride + k/128;
                size    += (half_value(wb->d)*7.0 + fabs(half_value(wb->m)))*fabs(q);
            }
            const double got = out[j*out_stride + i];
            const double dot = mbq3_dot(n, x + i*x_stride, y + j*y_stride);
            err += (got - exact)*(got - exact);
            power += exact*exact;
            dot_err += (dot - exact)*(dot - exact);
            // f32 sums of about n/8 terms in any order: a few 1e-6 of the sum of magnitudes
            check(fabs(got - rounded) <= 4e-6*size, "gemm against rounded activations", n, rows, cols, (got - rounded)/size);
            check(fabs(dot - rounded) <= 4e-6*size, "dot against rounded activations", n, rows, cols, (dot - rounded)/size);
        }
        for (int64_t i = rows; i < out_stride; ++i) {
            check(out[j*out_stride + i] == 12345.0f, "wrote outside its rows", n, rows, cols, (double) i);
        }
    }
    // few products are too small a sample for a mean
    if (rows*cols >= 16) {
        check(err < 5e-4*power, "gemm, normalised mean square error", n, rows, cols, err/power);
        check(dot_err < 5e-4*power, "dot, normalised mean square error", n, rows, cols, dot_err/power);
    }
    free(x); free(y); free(a); free(out); free(w);
}

static void extremes(void) {
    block_mbq3 x;
    block_mbq8 y;
    float a[128], out;
    for (int j = 0; j < 12; ++j) { x.q[j] = 0xffffffffu; }
    x.d = 0x7bff; // 65504, every code 7
    x.m = 0x7bff;
    for (int i = 0; i < 128; ++i) { a[i] = 3e4f; }
    mbq3_quantize_activations(a, &y, 128);
    const double full = 65504.0*8*3e4*128;
    check(fabs(mbq3_dot(128, &x, &y) - full) < 1e-5*full, "largest block", 128, 1, 1, mbq3_dot(128, &x, &y));

    memset(a, 0, sizeof(a));
    mbq3_quantize_activations(a, &y, 128);
    check(mbq3_dot(128, &x, &y) == 0.0f, "zeros", 128, 1, 1, mbq3_dot(128, &x, &y));
    for (int i = 0; i < 128; ++i) { a[i] = 1e-40f; } // the inverse scale would be infinite
    mbq3_quantize_activations(a, &y, 128);
    check(mbq3_dot(128, &x, &y) == 0.0f, "subnormals", 128, 1, 1, mbq3_dot(128, &x, &y));

    const float bad[3] = { NAN, INFINITY, -INFINITY };
    for (int b = 0; b < 3; ++b) {
        for (int at = 0; at < 128; at += 37) {
            for (int i = 0; i < 128; ++i) { a[i] = 1.0f; }
            a[at] = bad[b];
            mbq3_quantize_activations(a, &y, 128);
            check(!isfinite(mbq3_dot(128, &x, &y)), "hid a NaN or infinity", 128, 1, 1, at);
            mbq3_gemm(1, 1, 128, &x, 1, &y, 1, &out, 1);
            check(!isfinite(out), "gemm hid a NaN or infinity", 128, 1, 1, at);
        }
    }
    // halves go to even: amax 127 makes the scale 1
    for (int i = 0; i < 128; ++i) { a[i] = (float) (i%8) - 3.5f; }
    a[0] = a[32] = a[64] = a[96] = 127.0f;
    mbq3_quantize_activations(a, &y, 128);
    for (int e = 1; e < 32; ++e) {
        check(y.qs[16*(e/4) + e%4] == (int) nearbyint(a[e]), "rounding", 128, 1, 1, e);
    }
}

int main(void) {
    static const int64_t lengths[] = { 128, 256, 384, 896, 2176, 4992 }; // 17 and 39 blocks: past one panel
    static const int64_t sizes[][2] = { { 1, 1 }, { 3, 2 }, { 4, 2 }, { 5, 3 }, { 7, 5 }, { 66, 9 }, { 5, 131 } };
    for (int kind = 0; kind < KINDS; ++kind) {
        for (size_t i = 0; i < sizeof(lengths)/sizeof(*lengths); ++i) {
            for (size_t j = 0; j < sizeof(sizes)/sizeof(*sizes); ++j) {
                product(lengths[i], sizes[j][0], sizes[j][1], kind);
            }
        }
    }
    extremes();
    printf("%s\n", mbq3_kernel_name());
    return failures != 0;
}
