// MBQ3 on a backend of ggml: every operation and shape that models use, against a float64 product of the dequantised weights.
// Only the public ggml API is used, so what runs is what a model runs: its dispatch, its fusions.

#pragma once

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

static ggml_backend_t backend;
static std::mt19937   rng(20240607);

static std::vector<float> random_floats(size_t n, float lo, float hi) {
    std::uniform_real_distribution<float> u(lo, hi);
    std::vector<float> v(n);
    for (float & x : v) {
        x = u(rng);
    }
    return v;
}

static void parallel(int64_t n, const std::function<void(int64_t)> & f) {
    const int nt = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> threads;
    for (int t = 0; t < nt; ++t) {
        threads.emplace_back([=, &f] {
            for (int64_t i = t; i < n; i += nt) {
                f(i);
            }
        });
    }
    for (std::thread & t : threads) {
        t.join();
    }
}

// ---- correctness ---------------------------------------------------------------------------------------------------

static int n_tests  = 0;
static int n_failed = 0;
static double worst = 0.0, worst_bf16 = 0.0;
static bool   tensor_cores; // products of up to 16 columns have bf16 operands, but for the fewest
static bool   many_on_bf16; // and those of many

// Normalised mean-square error, below the 5e-4 that ggml's own tests allow a quantised product: int8 activations
// leave about 5e-5, bf16 operands 2e-6 to 5e-6.
static const double limit_int8 = 5e-4, limit_bf16 = 1e-5;

// The limit of a plain product of m rows of k with n columns (mbq3_few_columns in mbq3-mma.cu).
static double limit_of(int64_t k, int64_t m, int64_t n) {
    const int64_t few = m < 2048 ? 5 : k > 4096 ? 4 : 2;
    return tensor_cores && ((n >= few && n <= 16) || (n >= 512 && many_on_bf16)) ? limit_bf16 : limit_int8;
}

//
// `power` is the expected sum of squares: one or two outputs may happen to lie near zero, and their own squares are
// then no measure of the numbers that were added up.
static void judge(const std::string & name, const std::vector<float> & got, const std::vector<double> & want, double power, double limit = limit_int8) {
    double err = 0.0, ref = 0.0;
    bool finite = got.size() == want.size();
    for (size_t i = 0; i < got.size() && finite; ++i) {
        finite = std::isfinite(got[i]);
        err += (got[i] - want[i])*(got[i] - want[i]);
        ref += want[i]*want[i];
    }
    const double nmse = finite ? err/std::max(ref, power) : NAN;
    ++n_tests;
    if (!(nmse < limit)) {
        ++n_failed;
        printf("FAILED %-70s nmse %.3g\n", name.c_str(), nmse);
    } else {
        (limit == limit_bf16 ? worst_bf16 : worst) = std::max(limit == limit_bf16 ? worst_bf16 : worst, nmse);
    }
}

// A tensor of random weights together with their dequantised values.
struct weights {
    ggml_tensor        * tensor;
    std::vector<float>   values;
};

struct bench_ctx {
    ggml_context          * ctx;
    ggml_backend_buffer_t   buffer = nullptr;
    std::vector<std::function<void()>> fill;

    bench_ctx() {
        ctx = ggml_init({ 4096*ggml_tensor_overhead() + 2*ggml_graph_overhead_custom(4096, false), nullptr, true });
    }
    ~bench_ctx() {
        ggml_free(ctx);
        ggml_backend_buffer_free(buffer);
    }
    void alloc(ggml_backend_buffer_usage usage) {
        buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        if (!buffer) {
            fprintf(stderr, "out of device memory\n");
            exit(2);
        }
        ggml_backend_buffer_set_usage(buffer, usage);
        for (auto & f : fill) {
            f();
        }
    }
};

static void set_weights(weights & w, float lo, float hi) {
    ggml_tensor * t = w.tensor;
    const int64_t n = ggml_nelements(t), k = t->ne[0];
    const std::vector<float> x = random_floats(n, lo, hi);
    std::vector<uint8_t> q(ggml_nbytes(t));
    ggml_quantize_chunk(t->type, x.data(), q.data(), 0, n/k, k, nullptr);
    w.values.resize(n);
    ggml_get_type_traits(t->type)->to_float(q.data(), w.values.data(), n);
    ggml_backend_tensor_set(t, q.data(), 0, q.size());
}

static std::vector<float> set_floats(ggml_tensor * t, float lo, float hi) {
    std::vector<float> x = random_floats(ggml_nelements(t), lo, hi);
    ggml_backend_tensor_set(t, x.data(), 0, x.size()*sizeof(float));
    return x;
}

static std::vector<float> get_floats(const ggml_tensor * t) {
    std::vector<float> x(ggml_nelements(t));
    ggml_backend_tensor_get(t, x.data(), 0, x.size()*sizeof(float));
    return x;
}

static void poison(ggml_tensor * t) {
    std::vector<float> x(ggml_nelements(t), NAN);
    ggml_backend_tensor_set(t, x.data(), 0, x.size()*sizeof(float));
}

static void compute(ggml_context * ctx, std::vector<ggml_tensor *> outputs) {
    ggml_cgraph * g = ggml_new_graph_custom(ctx, 4096, false);
    for (ggml_tensor * o : outputs) {
        ggml_build_forward_expand(g, o);
    }
    for (int i = 0; i < ggml_graph_n_nodes(g); ++i) {
        if (!ggml_backend_supports_op(backend, ggml_graph_node(g, i))) {
            printf("FAILED not supported by the backend: %s\n", ggml_op_desc(ggml_graph_node(g, i)));
            ++n_failed;
            return;
        }
    }
    if (ggml_backend_graph_compute(backend, g) != GGML_STATUS_SUCCESS) {
        fprintf(stderr, "graph failed\n");
        exit(2);
    }
}

// Products over the two outer dimensions, src0 repeated as ggml_mul_mat does. x(i1, i2, i3) points to a column.
static std::vector<double> product(const weights & w, const std::vector<int64_t> & nw, const std::vector<float> & x, const std::vector<int64_t> & nx) {
    const int64_t k = nw[0], m = nw[1];
    std::vector<double> out(m*nx[1]*nx[2]*nx[3]);
    parallel(nx[1]*nx[2]*nx[3], [&](int64_t c) {
        const int64_t i2 = c/nx[1]%nx[2], i3 = c/nx[1]/nx[2];
        const float * a = w.values.data() + ((i3/(nx[3]/nw[3]))*nw[2] + i2/(nx[2]/nw[2]))*m*k;
        const float * b = x.data() + c*k;
        for (int64_t r = 0; r < m; ++r) {
            double s = 0.0;
            for (int64_t i = 0; i < k; ++i) {
                s += (double) a[r*k + i]*b[i];
            }
            out[c*m + r] = s;
        }
    });
    return out;
}

static double mean_square(const std::vector<float> & v) {
    double s = 0.0;
    for (float x : v) {
        s += (double) x*x;
    }
    return s/v.size();
}

// Expected square of a dot product of k independent terms with weights of mean zero.
static double expected(int64_t k, const weights & w, const std::vector<float> & x) {
    return k*mean_square(w.values)*mean_square(x);
}

static void test_mul_mat(int64_t k, int64_t m, int64_t n, int64_t w2, int64_t w3, int64_t x2, int64_t x3, int layout, float lo, float hi) {
    const double limit = w2*w3*x2*x3 == 1 && layout != 3 && (layout == 0 || n <= 16) ? limit_of(k, m, n) : limit_int8;
    char name[160];
    snprintf(name, sizeof name, "mul_mat k %d rows %d cols %d w[%d,%d] x[%d,%d] layout %d values %g..%g",
        (int) k, (int) m, (int) n, (int) w2, (int) w3, (int) x2, (int) x3, layout, lo, hi);
    bench_ctx W, X;
    weights w;
    w.tensor = ggml_new_tensor_4d(W.ctx, GGML_TYPE_MBQ3, k, m, w2, w3);
    W.alloc(layout == 3 ? GGML_BACKEND_BUFFER_USAGE_COMPUTE : GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    set_weights(w, -1.0f, 1.0f);

    // layout 0: contiguous; 1: columns are parts of longer rows; 2: dimensions 1 and 2 permuted;
    // 3: the weights are a view in a compute buffer (cuBLAS path where rows are padded)
    ggml_tensor * base, * x = nullptr;
    if (layout == 1) {
        base = ggml_new_tensor_4d(X.ctx, GGML_TYPE_F32, k + 64, n, x2, x3);
        x = ggml_view_4d(X.ctx, base, k, n, x2, x3, base->nb[1], base->nb[2], base->nb[3], 32*sizeof(float));
    } else if (layout == 2) {
        base = ggml_new_tensor_4d(X.ctx, GGML_TYPE_F32, k, x2, n, x3);
        x = ggml_permute(X.ctx, base, 0, 2, 1, 3);
    } else {
        x = base = ggml_new_tensor_4d(X.ctx, GGML_TYPE_F32, k, n, x2, x3);
    }
    ggml_tensor * a = layout == 3 ? ggml_view_tensor(X.ctx, w.tensor) : w.tensor;
    ggml_tensor * y = ggml_mul_mat(X.ctx, a, x);
    X.alloc(GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    const std::vector<float> all = set_floats(base, lo, hi);
    poison(y);

    std::vector<float> cols(k*n*x2*x3);
    for (int64_t i3 = 0; i3 < x3; ++i3) for (int64_t i2 = 0; i2 < x2; ++i2) for (int64_t i1 = 0; i1 < n; ++i1) {
        const int64_t from = layout == 1 ? ((i3*x2 + i2)*n + i1)*(k + 64) + 32 : layout == 2 ? ((i3*n + i1)*x2 + i2)*k : ((i3*x2 + i2)*n + i1)*k;
        std::copy_n(all.begin() + from, k, cols.begin() + ((i3*x2 + i2)*n + i1)*k);
    }
    compute(X.ctx, { y });
    judge(name, get_floats(y), product(w, { k, m, w2, w3 }, cols, { k, n, x2, x3 }), m*n*x2*x3*expected(k, w, cols), limit);
}

// Weights that take more than 256 MiB as bf16 and are multiplied in parts: 67 rows, repeated.
static void test_parts(int64_t k, int64_t m, int64_t n) {
    char name[96];
    snprintf(name, sizeof name, "mul_mat in parts k %d rows %d cols %d", (int) k, (int) m, (int) n);
    const int64_t some = 67;
    const size_t  row  = ggml_row_size(GGML_TYPE_MBQ3, k);
    bench_ctx W, X;
    weights w;
    w.tensor = ggml_new_tensor_2d(W.ctx, GGML_TYPE_MBQ3, k, m);
    W.alloc(GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    const std::vector<float> f = random_floats(some*k, -1.0f, 1.0f);
    std::vector<uint8_t> q(some*row), all(m*row);
    ggml_quantize_chunk(GGML_TYPE_MBQ3, f.data(), q.data(), 0, some, k, nullptr);
    w.values.resize(some*k);
    ggml_get_type_traits(GGML_TYPE_MBQ3)->to_float(q.data(), w.values.data(), some*k);
    for (int64_t r = 0; r < m; ++r) {
        memcpy(all.data() + r*row, q.data() + r%some*row, row);
    }
    ggml_backend_tensor_set(w.tensor, all.data(), 0, all.size());
    ggml_tensor * x = ggml_new_tensor_2d(X.ctx, GGML_TYPE_F32, k, n);
    ggml_tensor * y = ggml_mul_mat(X.ctx, w.tensor, x);
    X.alloc(GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    const std::vector<float> xv = set_floats(x, -1.0f, 1.0f);
    poison(y);
    compute(X.ctx, { y });
    const std::vector<double> part = product(w, { k, some, 1, 1 }, xv, { k, n, 1, 1 });
    std::vector<double> want(m*n);
    for (int64_t i = 0; i < m*n; ++i) {
        want[i] = part[i/m*some + i%m%some];
    }
    judge(name, get_floats(y), want, 0.0, limit_of(k, m, n));
}

static void test_mul_mat_id(int64_t k, int64_t m, int experts, int used, int tokens, bool shared_x) {
    char name[160];
    snprintf(name, sizeof name, "mul_mat_id k %d rows %d experts %d of %d tokens %d %s", (int) k, (int) m, used, experts, tokens, shared_x ? "one x" : "x each");
    bench_ctx W, X;
    weights w;
    w.tensor = ggml_new_tensor_3d(W.ctx, GGML_TYPE_MBQ3, k, m, experts);
    W.alloc(GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    set_weights(w, -1.0f, 1.0f);
    const int nx = shared_x ? 1 : used;
    ggml_tensor * x   = ggml_new_tensor_3d(X.ctx, GGML_TYPE_F32, k, nx, tokens);
    ggml_tensor * ids = ggml_new_tensor_2d(X.ctx, GGML_TYPE_I32, used, tokens);
    ggml_tensor * y   = ggml_mul_mat_id(X.ctx, w.tensor, x, ids);
    X.alloc(GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    const std::vector<float> xv = set_floats(x, -1.0f, 1.0f);
    std::vector<int32_t> id(used*tokens);
    for (int t = 0; t < tokens; ++t) {
        std::vector<int32_t> order(experts);
        for (int e = 0; e < experts; ++e) order[e] = e;
        std::shuffle(order.begin(), order.end(), rng);
        std::copy_n(order.begin(), used, id.begin() + t*used);
    }
    ggml_backend_tensor_set(ids, id.data(), 0, id.size()*sizeof(int32_t));
    poison(y);
    compute(X.ctx, { y });
    std::vector<double> want(m*used*tokens);
    parallel(used*tokens, [&](int64_t c) {
        const float * a = w.values.data() + id[c]*m*k;
        const float * b = xv.data() + (c/used*nx + (shared_x ? 0 : c%used))*k;
        for (int64_t r = 0; r < m; ++r) {
            double s = 0.0;
            for (int64_t i = 0; i < k; ++i) s += (double) a[r*k + i]*b[i];
            want[c*m + r] = s;
        }
    });
    judge(name, get_floats(y), want, want.size()*expected(k, w, xv));
}

static void test_get_rows(int64_t k, int64_t m, int n) {
    char name[96];
    snprintf(name, sizeof name, "get_rows k %d rows %d n %d", (int) k, (int) m, n);
    bench_ctx W, X;
    weights w;
    w.tensor = ggml_new_tensor_2d(W.ctx, GGML_TYPE_MBQ3, k, m);
    W.alloc(GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    set_weights(w, -1.0f, 1.0f);
    ggml_tensor * ids = ggml_new_tensor_1d(X.ctx, GGML_TYPE_I32, n);
    ggml_tensor * y   = ggml_get_rows(X.ctx, w.tensor, ids);
    X.alloc(GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    std::vector<int32_t> id(n);
    for (int32_t & i : id) i = rng()%m;
    ggml_backend_tensor_set(ids, id.data(), 0, n*sizeof(int32_t));
    poison(y);
    compute(X.ctx, { y });
    std::vector<double> want(k*n);
    for (int i = 0; i < n; ++i) for (int64_t j = 0; j < k; ++j) want[i*k + j] = w.values[id[i]*k + j];
    judge(name, get_floats(y), want, 0.0, 1e-12); // the same fp32 operations: at most the rounding of a fused multiply-add
}

// gate and up with SwiGLU, and a product with bias: one column runs fused, two columns do not.
static void test_fusion(int64_t k, int64_t m, int n, bool bias) {
    char name[96];
    snprintf(name, sizeof name, "swiglu(gate, up) k %d rows %d cols %d bias %d", (int) k, (int) m, n, bias);
    bench_ctx W, X;
    weights g, u;
    g.tensor = ggml_new_tensor_2d(W.ctx, GGML_TYPE_MBQ3, k, m);
    u.tensor = ggml_new_tensor_2d(W.ctx, GGML_TYPE_MBQ3, k, m);
    ggml_tensor * gb = ggml_new_tensor_1d(W.ctx, GGML_TYPE_F32, m);
    ggml_tensor * ub = ggml_new_tensor_1d(W.ctx, GGML_TYPE_F32, m);
    W.alloc(GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    set_weights(g, -0.1f, 0.1f);
    set_weights(u, -0.1f, 0.1f);
    const std::vector<float> gbv = set_floats(gb, -1.0f, 1.0f), ubv = set_floats(ub, -1.0f, 1.0f);
    ggml_tensor * x  = ggml_new_tensor_2d(X.ctx, GGML_TYPE_F32, k, n);
    ggml_tensor * yu = ggml_mul_mat(X.ctx, u.tensor, x);
    if (bias) yu = ggml_add(X.ctx, yu, ub);
    ggml_tensor * yg = ggml_mul_mat(X.ctx, g.tensor, x);
    if (bias) yg = ggml_add(X.ctx, yg, gb);
    ggml_tensor * y  = ggml_swiglu_split(X.ctx, yg, yu);
    X.alloc(GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    const std::vector<float> xv = set_floats(x, -1.0f, 1.0f);
    poison(y);
    compute(X.ctx, { y });
    std::vector<double> a = product(g, { k, m, 1, 1 }, xv, { k, n, 1, 1 });
    const std::vector<double> b = product(u, { k, m, 1, 1 }, xv, { k, n, 1, 1 });
    for (size_t i = 0; i < a.size(); ++i) {
        const double ga = a[i] + (bias ? gbv[i%m] : 0.0), up = b[i] + (bias ? ubv[i%m] : 0.0);
        a[i] = ga/(1.0 + exp(-ga))*up;
    }
    judge(name, get_floats(y), a, 0.25*a.size()*expected(k, g, xv)*expected(k, u, xv)); // silu(g)^2 is about g^2/2 for half of all g
}

static void test_bias(int64_t k, int64_t m, int n) {
    char name[96];
    snprintf(name, sizeof name, "mul_mat + bias k %d rows %d cols %d", (int) k, (int) m, n);
    bench_ctx W, X;
    weights w;
    w.tensor = ggml_new_tensor_2d(W.ctx, GGML_TYPE_MBQ3, k, m);
    ggml_tensor * b = ggml_new_tensor_1d(W.ctx, GGML_TYPE_F32, m);
    W.alloc(GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    set_weights(w, -1.0f, 1.0f);
    const std::vector<float> bv = set_floats(b, -100.0f, 100.0f);
    ggml_tensor * x = ggml_new_tensor_2d(X.ctx, GGML_TYPE_F32, k, n);
    ggml_tensor * y = ggml_add(X.ctx, ggml_mul_mat(X.ctx, w.tensor, x), b);
    X.alloc(GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    const std::vector<float> xv = set_floats(x, -1.0f, 1.0f);
    poison(y);
    compute(X.ctx, { y });
    std::vector<double> want = product(w, { k, m, 1, 1 }, xv, { k, n, 1, 1 });
    for (size_t i = 0; i < want.size(); ++i) want[i] += bv[i%m];
    judge(name, get_floats(y), want, want.size()*expected(k, w, xv));
}

// A norm with weights and three products of its result, with biases as in Qwen2: the quantised column is made once, by the norm.
// `between`: the result is doubled in place before the last product, which must not see the old column.
static void test_norm(int64_t k, int64_t m, int n, bool between) {
    char name[96];
    snprintf(name, sizeof name, "norm, three products k %d rows %d cols %d overwritten %d", (int) k, (int) m, n, between);
    bench_ctx W, X;
    weights w[3];
    for (weights & v : w) {
        v.tensor = ggml_new_tensor_2d(W.ctx, GGML_TYPE_MBQ3, k, m);
    }
    ggml_tensor * nw = ggml_new_tensor_1d(W.ctx, GGML_TYPE_F32, k);
    W.alloc(GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (weights & v : w) {
        set_weights(v, -1.0f, 1.0f);
    }
    const std::vector<float> nwv = set_floats(nw, 0.5f, 2.0f);
    ggml_tensor * x = ggml_new_tensor_2d(X.ctx, GGML_TYPE_F32, k, n);
    ggml_tensor * h = ggml_mul(X.ctx, ggml_rms_norm(X.ctx, x, 1e-6f), nw);
    std::vector<ggml_tensor *> y = { ggml_mul_mat(X.ctx, w[0].tensor, h), ggml_mul_mat(X.ctx, w[1].tensor, h) };
    if (between) {
        y.push_back(ggml_scale_inplace(X.ctx, h, 2.0f));
    }
    y.push_back(ggml_mul_mat(X.ctx, w[2].tensor, h));
    X.alloc(GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    const std::vector<float> xv = set_floats(x, -3.0f, 3.0f);
    for (ggml_tensor * t : { y[0], y[1], y.back() }) poison(t);
    compute(X.ctx, y);
    std::vector<float> hv(k*n);
    for (int c = 0; c < n; ++c) {
        double s = 0.0;
        for (int64_t i = 0; i < k; ++i) s += (double) xv[c*k + i]*xv[c*k + i];
        for (int64_t i = 0; i < k; ++i) hv[c*k + i] = xv[c*k + i]/sqrt(s/k + 1e-6)*nwv[i];
    }
    for (int i = 0; i < 3; ++i) {
        if (i == 2 && between) for (float & v : hv) v *= 2.0f;
        judge(name, get_floats(i < 2 ? y[i] : y.back()), product(w[i], { k, m, 1, 1 }, hv, { k, n, 1, 1 }), m*n*expected(k, w[i], hv), limit_of(k, m, n));
    }
}

static int report() {
    printf("%d tests, %d failed, worst normalised mean-square error %.3g, of products with bf16 operands %.3g\n", n_tests, n_failed, worst, worst_bf16);
    return n_failed != 0;
}

// Every operation once or twice: for drivers that take seconds to compile a shader. Columns that lie apart are left out: they
// corrupt the memory of lavapipe in Mesa 22.3 (Debian 12), with Q4_0 as well.
static int run_quick() {
    for (int64_t k : { 128, 896 }) for (int64_t n : { 1, 3, 8, 9, 40 }) {
        test_mul_mat(k, 131, n, 1, 1, 1, 1, 0, -1.0f, 1.0f);
    }
    for (int64_t n : { 1, 8, 40 }) {
        test_mul_mat(384, 67, n, 2, 1, 4, 3, 0, -1.0f, 1.0f);
        test_mul_mat(896, 67, n, 1, 1, 1, 1, 0, 2.0e4f, 3.0e4f);
    }
    for (int tokens : { 1, 9 }) {
        test_mul_mat_id(384, 67, 8, 2, tokens, false);
    }
    for (int64_t k : { 128, 1152 }) {
        test_get_rows(k, 77, 5);
    }
    test_fusion(896, 67, 1, true);
    test_norm(896, 67, 1, true);
    return report();
}

static int run_tests(bool small) {
    const std::vector<int64_t> ks    = small ? std::vector<int64_t>{ 128, 896 } : std::vector<int64_t>{ 128, 256, 384, 512, 896, 1152, 3584, 4992, 18944 };
    const std::vector<int64_t> rows  = small ? std::vector<int64_t>{ 1, 131 } : std::vector<int64_t>{ 1, 2, 3, 5, 31, 64, 127, 128, 257 };
    const std::vector<int64_t> few   = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17 };
    for (int64_t k : ks) for (int64_t m : rows) for (int64_t n : few) {
        test_mul_mat(k, m, n, 1, 1, 1, 1, 0, -1.0f, 1.0f);
    }
    for (int64_t k : small ? std::vector<int64_t>{ 384 } : std::vector<int64_t>{ 128, 896, 3584 }) {
        for (int64_t n : { 64, 512, 2048 }) for (int64_t m : { 1, 127, 128, 384 }) {
            if (!small || n == 64) {
                test_mul_mat(k, m, n, 1, 1, 1, 1, 0, -1.0f, 1.0f);
            }
        }
    }
    for (int64_t n : { 129, 191, 192, 255, 256, 257, 383, 384 }) { // about where cuBLAS takes over
        test_mul_mat(896, 130, n, 1, 1, 1, 1, 0, -1.0f, 1.0f);
    }
    for (int64_t n : { 2, 3, 4 }) {
        test_mul_mat(384, 2049, n, 1, 1, 1, 1, 0, -1.0f, 1.0f);
    }
    if (!small) {
        test_parts(8192, 16641, 512);
    }
    test_mul_mat(896, 67, 640, 1, 1, 1, 1, 0, -3.0e4f, 3.0e4f);
    test_mul_mat(896, 67, 640, 1, 1, 1, 1, 0, 2.0e4f, 3.0e4f);
    test_mul_mat(896, 67, 160, 1, 1, 4, 1, 0, -1.0f, 1.0f);       // repeated weights, contiguous columns
    test_mul_mat(384, 67, 600, 1, 1, 1, 1, 1, -1.0f, 1.0f);       // columns apart: MMQ
    for (int64_t n : { 1, 2, 7, 8, 9, 16, 33 }) {
        for (int layout : { 0, 1, 2, 3 }) {
            test_mul_mat(384, 67, n, 1, 1, 1, 1, layout, -1.0f, 1.0f);
            test_mul_mat(384, 67, n, 2, 1, 4, 3, layout, -1.0f, 1.0f); // repeated over dimensions 2 and 3
            test_mul_mat(896, 128, n, 3, 2, 3, 2, layout, -1.0f, 1.0f);
        }
        test_mul_mat(896, 67, n, 1, 1, 1, 1, 0, 2.0e4f, 3.0e4f);  // the sum of 32 such values overflows fp16
        test_mul_mat(896, 67, n, 1, 1, 1, 1, 0, -3.0e4f, 3.0e4f);
        test_mul_mat(896, 67, n, 1, 1, 1, 1, 0, -1.0e-2f, 1.0e-2f);
    }
    for (int tokens : { 1, 2, 3, 8, 9, 32, 128 }) for (bool shared : { true, false }) {
        test_mul_mat_id(384, 67, 8, 2, tokens, shared);
        if (!small) {
            test_mul_mat_id(896, 128, 16, 4, tokens, shared);
            test_mul_mat_id(1152, 1, 4, 4, tokens, shared);
        }
    }
    for (int64_t k : { 128, 896, 1152 }) for (int n : { 1, 5, 100 }) {
        test_get_rows(k, 77, n);
    }
    for (int n : { 1, 2 }) for (int64_t m : { 1, 67, 512 }) for (int64_t k : { 128, 896, 3584, 18944 }) {
        test_fusion(k, m, n, false);
        test_fusion(k, m, n, true);
        test_bias(k, m, n);
    }
    for (int64_t k : { 128, 896, 3584, 4224, 8192, 16384, 18944 }) for (int n : { 1, 2 }) for (bool between : { false, true }) {
        if (!small || k < 4000) {
            test_norm(k, 67, n, between);
        }
    }
    return report();
}
