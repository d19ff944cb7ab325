#include "linear-f16.cuh"
#include "convert.cuh"
#include "unary.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

int ggml_cuda_linear_f16(ggml_backend_cuda_context &, const ggml_cgraph *, int) {
    return 0;
}

#else

#include "ggml-impl.h"

#include <cublasLt.h>

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

static constexpr int64_t LINEAR_F16_MIN_COLUMNS = 64;

// One row to a block: (x - mean) / sqrt(variance + eps) * weight + bias.
template <typename T>
static __global__ void layer_norm(const float * x, const float * weight, const float * bias, T * dst, const int ncols, const float eps) {
    constexpr int block_size = 256;
    __shared__ float s_sum[32];

    x   += (int64_t) blockIdx.x * ncols;
    dst += (int64_t) blockIdx.x * ncols;

    float sum = 0.0f;
    for (int i = threadIdx.x; i < ncols; i += block_size) {
        sum += x[i];
    }
    const float mean = block_reduce<block_reduce_method::SUM, block_size>(sum, s_sum) / ncols;
    __syncthreads();

    sum = 0.0f;
    for (int i = threadIdx.x; i < ncols; i += block_size) {
        sum += (x[i] - mean) * (x[i] - mean);
    }
    const float scale = rsqrtf(block_reduce<block_reduce_method::SUM, block_size>(sum, s_sum) / ncols + eps);

    for (int i = threadIdx.x; i < ncols; i += block_size) {
        dst[i] = ggml_cuda_cast<T>((x[i] - mean) * scale * weight[i] + bias[i]);
    }
}

static __device__ __forceinline__ float activation(const float x, const ggml_unary_op op) {
    switch (op) {
        case GGML_UNARY_OP_GELU:       return x / (1.0f + expf(-1.5957691216057308f * x * (1.0f + 0.044715f * x * x)));
        case GGML_UNARY_OP_GELU_ERF:   return 0.5f * x * (1.0f + erff(x * 0.70710678118654752440f));
        case GGML_UNARY_OP_GELU_QUICK: return x / (1.0f + expf(-1.702f * x));
        case GGML_UNARY_OP_SILU:       return x / (1.0f + expf(-x));
        default:                       return x;
    }
}

// dst = act(x + bias) + residual, of rows to a column; bias and residual may be null
template <typename T>
static __global__ void finish(const float * x, const float * bias, const float * residual, T * dst, const int rows, const int64_t n, const ggml_unary_op op) {
    const int64_t i = (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        const float y = activation(x[i] + (bias ? bias[i % rows] : 0.0f), op);
        dst[i] = ggml_cuda_cast<T>(y + (residual ? residual[i] : 0.0f));
    }
}

// Products: out[rows, columns] = act(weight[depth, rows]^T in[depth, columns] + bias) + residual

struct product_shape {
    int64_t        rows, columns, depth;
    cudaDataType_t out; // and the bias
    bool           gelu;
    bool           residual;

    auto key() const { return std::make_tuple(rows, columns, depth, out, gelu, residual); }
};

struct product_plan {
    cublasLtMatmulDesc_t   desc   = nullptr;
    cublasLtMatrixLayout_t weight = nullptr;
    cublasLtMatrixLayout_t in     = nullptr;
    cublasLtMatrixLayout_t out    = nullptr;
    cublasLtMatmulAlgo_t   algo;
    bool                   works  = false; // it was run
};

static constexpr size_t LINEAR_F16_WORKSPACE = 32 * 1024 * 1024;
static constexpr size_t LINEAR_F16_ALIGNMENT = 16;  // of matrices
static constexpr size_t WORKSPACE_ALIGNMENT  = 256; // cublasLt refuses less; the pool gives 128

static std::mutex plans_mutex; // for plans, and for the bias's address in them

struct workspace {
    ggml_cuda_pool_alloc<char> memory;

    explicit workspace(ggml_backend_cuda_context & ctx) : memory(ctx.pool(), LINEAR_F16_WORKSPACE + WORKSPACE_ALIGNMENT) {}

    void * get() const { return (void *) GGML_PAD((uintptr_t) memory.ptr, WORKSPACE_ALIGNMENT); }
};

static bool is_aligned(const void * p) {
    return (uintptr_t) p % LINEAR_F16_ALIGNMENT == 0;
}

// what describes the product to cublasLt; whether it takes it
static bool describe(const product_shape & s, product_plan & plan) {
    const cublasOperation_t  trans    = CUBLAS_OP_T;
    const cublasLtEpilogue_t epilogue = s.gelu ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_BIAS;
    for (const cublasStatus_t status : {
            cublasLtMatmulDescCreate(&plan.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F),
            cublasLtMatmulDescSetAttribute(plan.desc, CUBLASLT_MATMUL_DESC_TRANSA, &trans, sizeof(trans)),
            cublasLtMatmulDescSetAttribute(plan.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof(epilogue)),
            cublasLtMatmulDescSetAttribute(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &s.out, sizeof(s.out)),
            cublasLtMatrixLayoutCreate(&plan.weight, CUDA_R_16F, s.depth, s.rows, s.depth),
            cublasLtMatrixLayoutCreate(&plan.in, CUDA_R_16F, s.depth, s.columns, s.depth),
            cublasLtMatrixLayoutCreate(&plan.out, s.out, s.rows, s.columns, s.rows) }) {
        if (status != CUBLAS_STATUS_SUCCESS) {
            return false;
        }
    }
    return true;
}

static std::vector<cublasLtMatmulAlgo_t> find_algorithms(cublasLtHandle_t handle, const product_plan & plan) {
    constexpr int n_max = 8;
    std::vector<cublasLtMatmulAlgo_t> algorithms;
    cublasLtMatmulPreference_t preference;
    if (cublasLtMatmulPreferenceCreate(&preference) != CUBLAS_STATUS_SUCCESS) {
        return algorithms;
    }
    const uint32_t aligned = LINEAR_F16_ALIGNMENT;
    bool ok = cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &LINEAR_F16_WORKSPACE, sizeof(size_t)) ==
        CUBLAS_STATUS_SUCCESS;
    for (cublasLtMatmulPreferenceAttributes_t attribute : { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES }) {
        ok = ok && cublasLtMatmulPreferenceSetAttribute(preference, attribute, &aligned, sizeof(aligned)) == CUBLAS_STATUS_SUCCESS;
    }
    std::vector<cublasLtMatmulHeuristicResult_t> results(n_max);
    int n = 0;
    ok = ok && cublasLtMatmulAlgoGetHeuristic(handle, plan.desc, plan.weight, plan.in, plan.out, plan.out, preference, n_max, results.data(), &n) ==
        CUBLAS_STATUS_SUCCESS;
    cublasLtMatmulPreferenceDestroy(preference);
    for (int i = 0; ok && i < n; ++i) {
        if (results[i].state == CUBLAS_STATUS_SUCCESS && results[i].workspaceSize <= LINEAR_F16_WORKSPACE) {
            algorithms.push_back(results[i].algo);
        }
    }
    return algorithms;
}

static cublasStatus_t run_plan(ggml_backend_cuda_context & ctx, const product_plan & plan, const cublasLtMatmulAlgo_t & algo, const bool residual,
        const void * weight, const void * in, const void * bias, const void * c, void * out, const workspace & work) {
    const float one  = 1.0f;
    const float beta = residual ? 1.0f : 0.0f;
    const cublasStatus_t status = cublasLtMatmulDescSetAttribute(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof(bias));
    return status != CUBLAS_STATUS_SUCCESS ? status : cublasLtMatmul((cublasLtHandle_t) ctx.cublas_handle(), plan.desc, &one, weight, plan.weight, in, plan.in,
        &beta, residual ? c : out, plan.out, out, plan.out, &algo, work.get(), LINEAR_F16_WORKSPACE, ctx.stream());
}

// Keeps the first algorithm, in cublasLt's order, that it does run on scratch memory. They are not timed: the choice, and with it
// the result's last bits, would vary between runs.
static void try_plan(ggml_backend_cuda_context & ctx, const product_shape & s, const void * weight, product_plan & plan) {
    const size_t size = s.out == CUDA_R_16F ? sizeof(half) : sizeof(float);
    ggml_cuda_pool_alloc<half> in(ctx.pool(), s.depth * s.columns);
    ggml_cuda_pool_alloc<char> bias(ctx.pool(), s.rows * size);
    ggml_cuda_pool_alloc<char> out(ctx.pool(), s.rows * s.columns * size);
    const workspace work(ctx);
    for (const cublasLtMatmulAlgo_t & algo : find_algorithms((cublasLtHandle_t) ctx.cublas_handle(), plan)) {
        if (run_plan(ctx, plan, algo, s.residual, weight, in.get(), bias.get(), out.get(), out.get(), work) == CUBLAS_STATUS_SUCCESS) {
            plan.algo  = algo;
            plan.works = true;
            return;
        }
    }
    GGML_LOG_DEBUG("%s: cublasLt has nothing for %d x %d x %d\n", __func__, (int) s.rows, (int) s.columns, (int) s.depth);
}

// A plan that works, or null: cublasLt has none, or there is none yet and a graph is being captured, when nothing can be tried.
static const product_plan * get_plan(ggml_backend_cuda_context & ctx, const product_shape & s, const void * weight) {
    static std::map<std::pair<int, decltype(s.key())>, product_plan> plans;
    const auto key = std::make_pair(ctx.device, s.key());
    auto entry = plans.find(key);
    if (entry == plans.end()) {
        cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
        CUDA_CHECK(cudaStreamIsCapturing(ctx.stream(), &capture));
        if (capture != cudaStreamCaptureStatusNone) {
            return nullptr;
        }
        entry = plans.emplace(key, product_plan()).first;
        if (describe(s, entry->second)) {
            try_plan(ctx, s, weight, entry->second);
        }
    }
    return entry->second.works ? &entry->second : nullptr;
}

// MUL_MAT, ADD of a bias, and what follows them at once
struct linear {
    const ggml_tensor * weight   = nullptr;
    const ggml_tensor * in       = nullptr;
    const ggml_tensor * bias     = nullptr;
    const ggml_tensor * act      = nullptr; // node, or none
    const ggml_tensor * residual = nullptr;
    const ggml_tensor * out      = nullptr; // last node; its type may be f16
    int                 end      = 0;       // and its index
    bool                chained  = false;   // only the next product reads out, which is then f16 and not in its place

    cudaDataType_t out_type() const { return chained || out->type == GGML_TYPE_F16 ? CUDA_R_16F : CUDA_R_32F; }
    bool act_apart() const { return act && ggml_get_unary_op(act) != GGML_UNARY_OP_GELU; }

    product_shape shape() const {
        return { weight->ne[1], ggml_nrows(in), weight->ne[0], act_apart() ? CUDA_R_32F : out_type(), act && !act_apart(), residual != nullptr };
    }
};

static bool is_plain(const ggml_tensor * t, const ggml_type type) {
    return t->type == type && ggml_is_contiguous(t);
}

static bool is_row(const ggml_tensor * t, const int64_t n) {
    return is_plain(t, GGML_TYPE_F32) && t->ne[0] == n && ggml_nrows(t) == 1;
}

static bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * pa = (const char *) a->data;
    const char * pb = (const char *) b->data;
    return pa < pb + ggml_nbytes(b) && pb < pa + ggml_nbytes(a);
}

// the node at i, if it is to be computed and has this operation
static const ggml_tensor * node_at(const ggml_cgraph * cgraph, const int i, const ggml_op op) {
    const ggml_tensor * node = i < cgraph->n_nodes ? cgraph->nodes[i] : nullptr;
    return node && node->op == op && (node->flags & GGML_TENSOR_FLAG_COMPUTE) ? node : nullptr;
}

static bool is_inner(const ggml_cgraph * cgraph, const int i) { // one reader
    return ggml_node_has_n_uses(cgraph, i, 1);
}

// t, or what it is reshaped to from the node at i on and nothing else reads; i goes behind
static const ggml_tensor * reshaped(const ggml_cgraph * cgraph, const ggml_tensor * t, int & i) {
    while (i < cgraph->n_nodes && cgraph->nodes[i]->op == GGML_OP_RESHAPE && cgraph->nodes[i]->src[0] == t &&
           ggml_node_get_use_count(cgraph, i) == 1) {
        t = cgraph->nodes[i++];
    }
    return t;
}

// what follows the bias: an activation, a residual, or a copy to f16
static void match_end(const ggml_cgraph * cgraph, linear & l) {
    const ggml_tensor * sum = l.out;
    const int           i   = l.end + 1;
    if (!is_inner(cgraph, l.end)) {
        return;
    }
    if (const ggml_tensor * act = node_at(cgraph, i, GGML_OP_UNARY)) {
        const ggml_unary_op op = ggml_get_unary_op(act);
        if (act->src[0] == sum && is_plain(act, GGML_TYPE_F32) && (op == GGML_UNARY_OP_GELU || op == GGML_UNARY_OP_GELU_ERF ||
                op == GGML_UNARY_OP_GELU_QUICK || op == GGML_UNARY_OP_SILU)) {
            l.act = l.out = act;
            l.end = i;
        }
        return;
    }
    if (const ggml_tensor * add = node_at(cgraph, i, GGML_OP_ADD)) {
        const ggml_tensor * other = add->src[0] == sum ? add->src[1] : add->src[0];
        if ((add->src[0] == sum) != (add->src[1] == sum) && is_plain(add, GGML_TYPE_F32) && is_plain(other, GGML_TYPE_F32) &&
                ggml_are_same_shape(other, sum) && (other->data == add->data || !overlap(other, add))) {
            l.residual = other;
            l.out      = add;
            l.end      = i;
        }
        return;
    }
    int                 j   = i;
    const ggml_tensor * src = reshaped(cgraph, sum, j);
    const ggml_tensor * copy = node_at(cgraph, j, GGML_OP_CPY);
    if (copy && copy->src[0] == src && is_plain(copy, GGML_TYPE_F16)) {
        l.out = copy;
        l.end = j;
    }
}

static bool match(const ggml_cgraph * cgraph, const int i, linear & l) {
    const ggml_tensor * product = node_at(cgraph, i, GGML_OP_MUL_MAT);
    if (!product || !is_inner(cgraph, i)) {
        return false;
    }
    int                 end = i + 1;
    const ggml_tensor * src = reshaped(cgraph, product, end);
    const ggml_tensor * sum = node_at(cgraph, end, GGML_OP_ADD);
    if (!sum || sum->src[0] != src || !is_plain(sum, GGML_TYPE_F32) || !is_plain(product, GGML_TYPE_F32)) {
        return false;
    }
    l.weight = product->src[0];
    l.in     = product->src[1];
    l.bias   = sum->src[1];
    l.out    = sum;
    l.end    = end;
    if (!is_plain(l.weight, GGML_TYPE_F16) || ggml_nrows(l.weight) != l.weight->ne[1] || !is_plain(l.in, GGML_TYPE_F32) ||
            ggml_nrows(l.in) < LINEAR_F16_MIN_COLUMNS || l.weight->ne[0] % 4 != 0 || l.weight->ne[1] % 8 != 0 ||
            !is_row(l.bias, l.weight->ne[1]) || !is_aligned(l.weight->data) || !is_aligned(l.bias->data) || ggml_get_op_params_i32(product, 0) != GGML_PREC_DEFAULT ||
            ggml_get_op_params_i32(product, 1) != GGML_HINT_NONE) {
        return false;
    }
    match_end(cgraph, l);
    return true;
}

// The linear at i and those that read nothing but the result of the one before.
static std::vector<linear> match_chain(const ggml_cgraph * cgraph, const int i) {
    std::vector<linear> chain;
    for (int j = i;; j = chain.back().end + 1) {
        linear l;
        if (!match(cgraph, j, l)) {
            return chain;
        }
        if (!chain.empty()) {
            if (l.in != chain.back().out || !chain.back().act || !is_inner(cgraph, chain.back().end)) {
                return chain;
            }
            chain.back().chained = true;
        }
        chain.push_back(l);
    }
}

static bool has_plans(ggml_backend_cuda_context & ctx, const std::vector<linear> & chain) {
    std::lock_guard<std::mutex> lock(plans_mutex);
    for (const linear & l : chain) {
        if (!is_aligned(l.out->data) || (l.residual && !is_aligned(l.residual->data)) || !get_plan(ctx, l.shape(), l.weight->data)) {
            return false;
        }
    }
    return true;
}

static bool multiply(ggml_backend_cuda_context & ctx, const linear & l, const half * in, void * out) {
    const product_shape s = l.shape();
    ggml_cuda_pool_alloc<half> bias_f16(ctx.pool());
    const void * bias = l.bias->data;
    if (s.out == CUDA_R_16F) {
        ggml_get_to_fp16_cuda(GGML_TYPE_F32)(bias, bias_f16.alloc(s.rows), s.rows, ctx.stream());
        bias = bias_f16.get();
    }
    const workspace work(ctx);
    std::lock_guard<std::mutex> lock(plans_mutex);
    const product_plan * plan = get_plan(ctx, s, l.weight->data);
    return plan && run_plan(ctx, *plan, plan->algo, s.residual, l.weight->data, in, bias, s.residual ? l.residual->data : nullptr, out, work) ==
        CUBLAS_STATUS_SUCCESS;
}

static void finish_product(ggml_backend_cuda_context & ctx, const linear & l, const float * sums, const ggml_tensor * bias, void * out) {
    const float *       b      = bias ? (const float *) bias->data : nullptr;
    const float *       r      = l.residual ? (const float *) l.residual->data : nullptr;
    const ggml_unary_op op     = l.act ? ggml_get_unary_op(l.act) : GGML_UNARY_OP_COUNT; // none
    const int64_t       n      = ggml_nelements(l.out);
    const int           blocks = (n + 255) / 256;
    if (l.out_type() == CUDA_R_16F) {
        finish<<<blocks, 256, 0, ctx.stream()>>>(sums, b, r, (half *) out, l.weight->ne[1], n, op);
    } else {
        finish<<<blocks, 256, 0, ctx.stream()>>>(sums, b, r, (float *) out, l.weight->ne[1], n, op);
    }
    CUDA_CHECK(cudaGetLastError());
}

// What cublasLt refuses although it ran its like: cuBLAS's product, and the rest apart.
static void multiply_apart(ggml_backend_cuda_context & ctx, const linear & l, const half * in, void * out) {
    const product_shape s = l.shape();
    ggml_cuda_pool_alloc<float> sums(ctx.pool(), s.rows * s.columns);
    const float one  = 1.0f;
    const float zero = 0.0f;
    CUBLAS_CHECK(cublasSetStream(ctx.cublas_handle(), ctx.stream()));
    CUBLAS_CHECK(cublasGemmEx(ctx.cublas_handle(), CUBLAS_OP_T, CUBLAS_OP_N, s.rows, s.columns, s.depth, &one, l.weight->data, CUDA_R_16F, s.depth,
        in, CUDA_R_16F, s.depth, &zero, sums.get(), CUDA_R_32F, s.rows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT_TENSOR_OP));
    finish_product(ctx, l, sums.get(), l.bias, out);
}

static void compute(ggml_backend_cuda_context & ctx, const linear * l, const half * in) {
    const int64_t n = ggml_nelements(l->out);
    ggml_cuda_pool_alloc<half> out_f16(ctx.pool());
    void * out = l->chained ? out_f16.alloc(n) : l->out->data;
    if (l->act_apart()) {
        ggml_cuda_pool_alloc<float> sums(ctx.pool(), n);
        if (multiply(ctx, *l, in, sums.get())) {
            finish_product(ctx, *l, sums.get(), nullptr, out);
        } else {
            multiply_apart(ctx, *l, in, out);
        }
    } else if (!multiply(ctx, *l, in, out)) {
        multiply_apart(ctx, *l, in, out);
    }
    if (l->chained) {
        compute(ctx, l + 1, out_f16.get());
    }
}

static int compute_linear(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, const int i) {
    const std::vector<linear> chain = match_chain(cgraph, i);
    if (chain.empty() || !has_plans(ctx, chain)) {
        return 0;
    }
    const ggml_tensor * in = chain[0].in;
    ggml_cuda_pool_alloc<half> in_f16(ctx.pool(), ggml_nelements(in));
    ggml_get_to_fp16_cuda(GGML_TYPE_F32)(in->data, in_f16.get(), ggml_nelements(in), ctx.stream());
    compute(ctx, chain.data(), in_f16.get());
    return chain.back().end - i;
}

// NORM, MUL, ADD, and all products that read the result
static int compute_norm(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, const int i) {
    const ggml_tensor * norm  = node_at(cgraph, i, GGML_OP_NORM);
    const ggml_tensor * scale = node_at(cgraph, i + 1, GGML_OP_MUL);
    const ggml_tensor * shift = node_at(cgraph, i + 2, GGML_OP_ADD);
    if (!norm || !scale || !shift || !is_inner(cgraph, i) || !is_inner(cgraph, i + 1) || scale->src[0] != norm || shift->src[0] != scale ||
            !is_plain(norm->src[0], GGML_TYPE_F32) || !is_plain(shift, GGML_TYPE_F32) || !is_row(scale->src[1], norm->ne[0]) ||
            !is_row(shift->src[1], norm->ne[0])) {
        return 0;
    }
    std::vector<std::vector<linear>> readers;
    for (int j = i + 3; j < cgraph->n_nodes;) {
        if (cgraph->nodes[j]->op == GGML_OP_RESHAPE && !readers.empty()) {
            j++;
            continue;
        }
        std::vector<linear> chain = match_chain(cgraph, j);
        if (chain.empty() || chain[0].in != shift || !has_plans(ctx, chain)) {
            break;
        }
        j = chain.back().end + 1;
        readers.push_back(std::move(chain));
    }
    const bool all = !readers.empty() && ggml_node_has_n_uses(cgraph, i + 2, readers.size());

    const float * x      = (const float *) norm->src[0]->data;
    const float * weight = (const float *) scale->src[1]->data;
    const float * bias   = (const float *) shift->src[1]->data;
    const float   eps    = ggml_get_op_params_f32(norm, 0);
    const int64_t rows   = ggml_nrows(norm);
    if (!all) {
        if (norm->src[0]->data != shift->data && overlap(norm->src[0], shift)) {
            return 0;
        }
        layer_norm<<<rows, 256, 0, ctx.stream()>>>(x, weight, bias, (float *) shift->data, norm->ne[0], eps);
        CUDA_CHECK(cudaGetLastError());
        return 2;
    }
    ggml_cuda_pool_alloc<half> out(ctx.pool(), ggml_nelements(norm));
    layer_norm<<<rows, 256, 0, ctx.stream()>>>(x, weight, bias, out.get(), norm->ne[0], eps);
    CUDA_CHECK(cudaGetLastError());
    for (const std::vector<linear> & chain : readers) {
        compute(ctx, chain.data(), out.get());
    }
    return readers.back().back().end - i;
}

int ggml_cuda_linear_f16(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, const int i) {
    const ggml_op op = cgraph->nodes[i]->op;
    if (!ggml_cuda_tower_f16() || (op != GGML_OP_MUL_MAT && op != GGML_OP_NORM) || ggml_cuda_info().devices[ctx.device].cc < GGML_CUDA_CC_AMPERE) {
        return 0;
    }
    return op == GGML_OP_NORM ? compute_norm(ctx, cgraph, i) : compute_linear(ctx, cgraph, i);
}

#endif // !GGML_USE_HIP && !GGML_USE_MUSA
