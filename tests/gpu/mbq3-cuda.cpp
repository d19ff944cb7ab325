// MBQ3 on a GPU: is it right, and how fast is it?
//
//   mbq3-cuda test            every operation and shape against a float64 product of the dequantised weights
//   mbq3-cuda bench [alone]   matrix-vector products of the paper's shapes beside the stock types
//   mbq3-cuda profile [few]   one call of each main kernel, for a profiler; or of eight columns
//   mbq3-cuda few             2 to 16 columns beside Q4_0 (with a library built with -DMBQ3_TUNE: the candidate shapes of the kernel)
//   mbq3-cuda many            from 17 columns on: MMQ and cuBLAS, beside F16 and Q4_0
//   mbq3-cuda tune            the candidate shapes of the matrix-vector kernel (library built with -DMBQ3_TUNE)
//
// Only the public ggml API is used, so what runs is what a model runs: its dispatch, its fusions, its CUDA graphs.

#include "../kernels/mbq3_ops.hpp"

#include "ggml-cuda.h"

#include <cuda_runtime.h>

static void check_cuda(cudaError_t e) {
    if (e != cudaSuccess) {
        fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(e));
        exit(2);
    }
}

// ---- speed ---------------------------------------------------------------------------------------------------------

static double seconds(const std::function<void()> & f, double budget) {
    for (int i = 0; i < 4; ++i) f(); // warm up; the backend captures its CUDA graph meanwhile
    ggml_backend_synchronize(backend);
    cudaEvent_t e0, e1;
    check_cuda(cudaEventCreate(&e0));
    check_cuda(cudaEventCreate(&e1));
    std::vector<double> t;
    double total = 0.0;
    while (total < budget || t.size() < 5) {
        const int64_t t0 = ggml_time_us();
        f();
        ggml_backend_synchronize(backend);
        t.push_back((ggml_time_us() - t0)*1e-6);
        total += t.back();
    }
    check_cuda(cudaEventDestroy(e0));
    check_cuda(cudaEventDestroy(e1));
    std::sort(t.begin(), t.end());
    return t[t.size()/2];
}

static double copy_bandwidth() {
    const size_t n = 1ull << 30;
    void * a, * b;
    check_cuda(cudaMalloc(&a, n));
    check_cuda(cudaMalloc(&b, n));
    check_cuda(cudaMemset(a, 0x5a, n));
    cudaEvent_t e0, e1;
    check_cuda(cudaEventCreate(&e0));
    check_cuda(cudaEventCreate(&e1));
    std::vector<float> t;
    for (int i = 0; i < 25; ++i) {
        float ms;
        check_cuda(cudaEventRecord(e0));
        check_cuda(cudaMemcpyAsync(b, a, n, cudaMemcpyDeviceToDevice));
        check_cuda(cudaEventRecord(e1));
        check_cuda(cudaEventSynchronize(e1));
        check_cuda(cudaEventElapsedTime(&ms, e0, e1));
        t.push_back(ms);
    }
    check_cuda(cudaFree(a));
    check_cuda(cudaFree(b));
    std::sort(t.begin(), t.end());
    return 2.0*n/(t[t.size()/2]*1e-3);
}

struct shape { int64_t k, m; };
static const std::vector<shape> paper = { { 3584, 3584 }, { 3584, 10752 }, { 3584, 18944 }, { 18944, 3584 }, { 8192, 28672 }, { 28672, 8192 }, { 3584, 152064 } };

// One valid pattern of a few rows per type and row length, repeated: no kernel's time depends on the values.
static void fill_pattern(ggml_tensor * t) {
    static ggml_type last_type = GGML_TYPE_COUNT;
    static int64_t   last_k    = 0;
    static std::vector<uint8_t> rows;
    const int64_t k = t->ne[0], n = 4;
    const size_t row = ggml_row_size(t->type, k);
    if (t->type != last_type || k != last_k) {
        const std::vector<float> x = random_floats(n*k, -1.0f, 1.0f);
        rows.resize(n*row);
        parallel(n, [&](int64_t i) {
            ggml_quantize_chunk(t->type, x.data() + i*k, rows.data() + i*row, 0, 1, k, nullptr);
        });
        last_type = t->type;
        last_k    = k;
    }
    std::vector<uint8_t> all(ggml_nbytes(t));
    for (size_t i = 0; i < all.size(); i += rows.size()) {
        memcpy(all.data() + i, rows.data(), std::min(rows.size(), all.size() - i));
    }
    ggml_backend_tensor_set(t, all.data(), 0, all.size());
}

// As many weight tensors of one shape as exceed the L2 cache several times.
struct rotation {
    shape s;
    bench_ctx W;
    std::vector<ggml_tensor *> w;

    rotation(ggml_type type, shape s) : s(s) {
        const size_t bytes  = ggml_row_size(type, s.k)*s.m;
        const int    copies = std::min<size_t>(200, std::max<size_t>(2, (400u << 20)/bytes + 1));
        for (int i = 0; i < copies; ++i) {
            w.push_back(ggml_new_tensor_2d(W.ctx, type, s.k, s.m));
        }
        W.alloc(GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        for (ggml_tensor * t : w) {
            fill_pattern(t);
        }
    }

    // Seconds per product with n columns.
    double time(int64_t n, double budget) {
        // The backend knows a CUDA graph again by addresses and shapes: another number of products makes sure that what the
        // environment asks for now is what runs.
        static int calls;
        bench_ctx X;
        // in turn, so that each product has to quantise its activations
        ggml_tensor * x[2] = { ggml_new_tensor_2d(X.ctx, GGML_TYPE_F32, s.k, n), ggml_new_tensor_2d(X.ctx, GGML_TYPE_F32, s.k, n) };
        std::vector<ggml_tensor *> y;
        for (size_t i = 0; i < w.size() + calls%2; ++i) {
            y.push_back(ggml_mul_mat(X.ctx, w[i%w.size()], x[i%2]));
        }
        ++calls;
        X.alloc(GGML_BACKEND_BUFFER_USAGE_COMPUTE);
        set_floats(x[0], -1.0f, 1.0f);
        set_floats(x[1], -1.0f, 1.0f);
        ggml_cgraph * g = ggml_new_graph_custom(X.ctx, 4096, false);
        for (ggml_tensor * t : y) {
            ggml_build_forward_expand(g, t);
        }
        return seconds([&] { ggml_backend_graph_compute(backend, g); }, budget)/y.size();
    }
};

static double time_mul_mat(ggml_type type, shape s, int64_t n, double budget) {
    return rotation(type, s).time(n, budget);
}

static const std::vector<ggml_type> types = {
    GGML_TYPE_MBQ3, GGML_TYPE_F16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q3_K, GGML_TYPE_IQ3_S, GGML_TYPE_IQ3_XXS, GGML_TYPE_Q2_K,
};

// `alone`: the library is built with MBQ3_TUNE and can leave the quantisation of the activations out
static int run_bench(bool alone) {
    cudaDeviceProp p;
    int driver = 0;
    check_cuda(cudaGetDeviceProperties(&p, 0));
    check_cuda(cudaDriverGetVersion(&driver));
    const double copy = copy_bandwidth();
    printf("%s, CUDA driver API %d, device copy of 1 GiB %.0f GB/s (read + write)\n", p.name, driver, copy*1e-9);
    printf("one column; each product includes the quantisation of its activations; 'overhead' is the same call with 16 rows\n\n");
    printf("| K x rows | type | MB | us | overhead us | GB/s | of copy |\n|---|---|---:|---:|---:|---:|---:|\n");
    for (shape s : paper) {
        for (ggml_type t : types) {
            const double us   = 1e6*time_mul_mat(t, s, 1, 0.05);
            const double over = 1e6*time_mul_mat(t, { s.k, 16 }, 1, 0.02);
            const double mb   = 1e-6*ggml_row_size(t, s.k)*s.m;
            printf("| %d x %d | %s | %.1f | %.2f | %.2f | %.0f | %.3f |\n", (int) s.k, (int) s.m, ggml_type_name(t), mb, us, over, mb/us*1e3, mb/us*1e12/copy);
            if (t == GGML_TYPE_MBQ3 && alone) {
                setenv("MBQ3_SKIP_QUANTIZE", "1", 1);
                const double us1 = 1e6*time_mul_mat(t, s, 1, 0.05);
                unsetenv("MBQ3_SKIP_QUANTIZE");
                printf("| %d x %d | mbq3, product alone | %.1f | %.2f | | %.0f | %.3f |\n", (int) s.k, (int) s.m, mb, us1, mb/us1*1e3, mb/us1*1e12/copy);
            }
            fflush(stdout);
        }
    }
    printf("\nseveral columns, us\n\n| K x rows | type | 2 | 4 | 8 | 16 | 64 | 512 | 2048 |\n|---|---|---:|---:|---:|---:|---:|---:|---:|\n");
    for (shape s : { paper[2], paper[3] }) {
        for (ggml_type t : types) {
            printf("| %d x %d | %s |", (int) s.k, (int) s.m, ggml_type_name(t));
            for (int64_t n : { 2, 4, 8, 16, 64, 512, 2048 }) {
                printf(" %.1f |", 1e6*time_mul_mat(t, s, n, 0.03));
            }
            printf("\n");
            fflush(stdout);
        }
    }
    return 0;
}

static int run_tune() {
    const double copy = copy_bandwidth();
    printf("rows per warp and warps per row: fraction of the copy bandwidth (%.0f GB/s)\n", copy*1e-9);
    for (shape s : paper) {
        printf("%6d x %6d ", (int) s.k, (int) s.m);
        for (const char * v : { "11", "12", "14", "18", "21", "22", "24", "28", "41", "42", "44", "48" }) {
            setenv("MBQ3_TUNE", v, 1);
            printf(" %s %.3f", v, ggml_row_size(GGML_TYPE_MBQ3, s.k)*s.m/time_mul_mat(GGML_TYPE_MBQ3, s, 1, 0.04)/copy);
            fflush(stdout);
        }
        printf("\n");
    }
    unsetenv("MBQ3_TUNE");
    return 0;
}

// The same call under other values of an environment variable; null: as it comes.
static double time_with(rotation & r, int64_t n, const char * name, const char * value) {
    if (value) {
        setenv(name, value, 1);
    }
    const double us = 1e6*r.time(n, 0.015);
    if (value) {
        unsetenv(name);
    }
    return us;
}

static const std::vector<shape> decoder_shapes = {
    { 3584, 512 }, { 3584, 3584 }, { 3584, 18944 }, { 18944, 3584 }, { 8192, 1024 }, { 8192, 8192 }, { 8192, 29568 }, { 29568, 8192 }, { 896, 4864 }, { 8960, 1536 },
};

static int run_few() {
    const std::vector<int64_t> columns = { 1, 2, 3, 4, 6, 8, 9, 12, 16 };
    printf("us per call\n| K x rows | |");
    for (int64_t n : columns) printf(" %d |", (int) n);
    printf("\n");
    for (shape s : decoder_shapes) {
        const auto row = [&](rotation & r, const char * name, const char * variable, const char * value) {
            printf("| %d x %d | %s |", (int) s.k, (int) s.m, name);
            for (int64_t n : columns) {
                printf(" %.1f |", time_with(r, n, variable, value));
            }
            printf("\n");
            fflush(stdout);
        };
        {
            rotation r(GGML_TYPE_Q4_0, s);
            row(r, "q4_0", "", nullptr);
        }
        rotation r(GGML_TYPE_MBQ3, s);
        row(r, "mbq3", "", nullptr);
        if (getenv("MBQ3_CANDIDATES")) {
            row(r, "mbq3, int8", "MBQ3_TUNE_OLD", "1");
            for (const char * v : { "104", "107", "108", "110", "113", "116", "204", "207", "208" }) {
                row(r, v, "MBQ3_TUNE_MMA", v);
            }
        }
    }
    return 0;
}

static int run_many() {
    const char * variable = "GGML_CUDA_MBQ3_CUBLAS_COLUMNS";
    const std::vector<int64_t> columns = { 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048 };
    printf("us per call\n| K x rows | |");
    for (int64_t n : columns) printf(" %d |", (int) n);
    printf("\n");
    for (shape s : decoder_shapes) {
        const auto row = [&](ggml_type type, const char * name, const char * value) {
            rotation r(type, s);
            printf("| %d x %d | %s |", (int) s.k, (int) s.m, name);
            for (int64_t n : columns) {
                printf(" %.1f |", time_with(r, n, variable, value));
            }
            printf("\n");
            fflush(stdout);
        };
        row(GGML_TYPE_F16,  "f16", nullptr);
        row(GGML_TYPE_MBQ3, "mbq3, MMQ", "1000000");
        row(GGML_TYPE_MBQ3, "mbq3, cuBLAS", "17");
        row(GGML_TYPE_MBQ3, "mbq3", nullptr);
    }
    return 0;
}

static int run_profile(bool few) {
    if (few) {
        for (shape s : { paper[3], paper[4] }) {
            time_mul_mat(GGML_TYPE_MBQ3, s, 8, 0.0);
        }
        return 0;
    }
    for (shape s : { paper[4], paper[5], paper[3] }) {
        time_mul_mat(GGML_TYPE_MBQ3, s, 1, 0.0);
    }
    time_mul_mat(GGML_TYPE_MBQ3, { 3584, 18944 }, 512, 0.0);
    return 0;
}

int main(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    ggml_time_init();
    backend = ggml_backend_cuda_init(0);
    if (!backend) {
        fprintf(stderr, "no CUDA device\n");
        return 2;
    }
    cudaDeviceProp properties;
    check_cuda(cudaGetDeviceProperties(&properties, 0));
    tensor_cores = properties.major >= 8;
    many_on_bf16 = properties.major == 9 || properties.major == 10;
    if (mode == "test")    return run_tests(argc > 2 && std::string(argv[2]) == "small");
    if (mode == "bench")   return run_bench(argc > 2 && std::string(argv[2]) == "alone");
    if (mode == "few")     return run_few();
    if (mode == "many")    return run_many();
    if (mode == "tune")    return run_tune();
    if (mode == "profile") return run_profile(argc > 2 && std::string(argv[2]) == "few");
    fprintf(stderr, "usage: mbq3-cuda test [small] | bench [alone] | few | many | tune | profile [few]\n");
    return 2;
}
