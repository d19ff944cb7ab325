// MBQ3 times up to eight columns: the kernel of token generation, bound by the bandwidth of device memory.
//
// Phases
// 1. mbq3_quantize_columns turns the activations to int8, one scale per chunk of 32, in a layout of its own: per 128
//    activations the first 16 bytes of the four chunks, then their last 16 bytes, then four float pairs (d8, sum).
//    A lane reads its chunk with two 16-byte loads that hit different banks in each quarter warp, and one of 8 bytes;
//    q8_1's blocks of 36 bytes take nine loads. Scale and sum are floats: no activation overflows. A single column is kept
//    for the products that follow with the same activations (q, k and v), and where it is a norm's result the norm's
//    kernel makes it: a kernel that is done in a moment still costs a token 2 us.
// 2. mbq3_mul_mat_vec: a lane takes one chunk of ROWS consecutive rows, a warp 32 neighbouring chunks, and WARPS warps
//    share the columns of those rows. The four words of a chunk (A, B, C and the block's d, m) are four 4-byte loads;
//    those of a warp cover 416 contiguous bytes of each row, so every sector fetched is used. The words of the next
//    step are requested before those of this one are multiplied: 4*ROWS loads per lane stay in flight.
// 3. The partial sums meet by shuffles, then through shared memory, and one lane per output adds bias and gate.
//
// Weights never change while a graph runs, so the first loads are issued before the wait for the preceding kernel
// (programmatic dependent launch): the latency of device memory hides behind the quantisation of the activations.
//
// Through ids (mixture of experts) a token is a sample of its own and the chosen expert a channel: blockIdx.z and .y.

#include "mbq3-mmvq.cuh"
#include "unary.cuh"

#include <cstdlib>

struct mbq3_y_block {
    int4   lo[4];
    int4   hi[4];
    float2 ds[4];
};
static_assert(sizeof(mbq3_y_block) == 160, "padding");

struct mbq3_mmv_args {
    const uint32_t     * x;
    const uint32_t     * gate;
    const mbq3_y_block * y;
    float              * dst;
    const int32_t      * ids;
    const float        * x_bias;
    const float        * gate_bias;
    ggml_glu_op          glu_op;
    float                glu_limit;
    int                  nrows;
    int                  nchunks;         // per row
    uint32_t             stride_row;      // of x, in words
    int64_t              stride_channel_x;
    int64_t              stride_sample_x;
    int64_t              stride_col_y;    // of y, in blocks
    int64_t              stride_channel_y;
    int64_t              stride_sample_y;
    int64_t              stride_col_dst;
    int64_t              stride_channel_dst;
    int64_t              stride_sample_dst;
    uint3                channel_ratio;   // fastdiv values
    uint3                sample_ratio;
    uint3                nchannels_y;
    bool                 constant_x;      // no earlier kernel of the graph writes the weights
    int64_t              ids_stride;
};

#define MBQ3_QUANTIZE_THREADS 256

// Four activations of each thread, elements i0.. of a column, as int8; eight threads share a chunk.
static __device__ __forceinline__ void mbq3_quantize(const float (&v)[4], mbq3_y_block * GGML_CUDA_RESTRICT column, const int i0) {
    float amax = 0.0f;
#pragma unroll
    for (int l = 0; l < 4; ++l) {
        amax = fmaxf(amax, fabsf(v[l]));
    }
#pragma unroll
    for (int o = 4; o > 0; o >>= 1) {
        amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFF, amax, o, WARP_SIZE));
    }

    const float d = amax/127.0f;
    int sum    = 0;
    int packed = 0;
#pragma unroll
    for (int l = 0; l < 4; ++l) {
        const int q = amax == 0.0f ? 0 : (int) roundf(v[l]/d);
        sum    += q;
        packed |= (q & 0xFF) << 8*l;
    }
#pragma unroll
    for (int o = 4; o > 0; o >>= 1) {
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, o, WARP_SIZE);
    }

    mbq3_y_block * yb = column + i0/QK_MBQ3;
    const int t = i0%QK_MBQ3/32;
    const int w = i0%32/4;
    ((int *) (w < 4 ? &yb->lo[t] : &yb->hi[t]))[w%4] = packed;
    if (w == 0) {
        yb->ds[t] = make_float2(d, d*sum);
    }
}

// One thread per four activations.
static __global__ void __launch_bounds__(MBQ3_QUANTIZE_THREADS) mbq3_quantize_columns(
        const float * x_ptr, mbq3_y_block * y_ptr, const int ne00, const int64_t s01, const int64_t s02, const int64_t s03,
        const int ne1, const uint3 ne2) {
    const float  * GGML_CUDA_RESTRICT x = x_ptr;
    mbq3_y_block * GGML_CUDA_RESTRICT y = y_ptr;

    ggml_cuda_pdl_lc();
    const int i0 = 4*(blockIdx.x*MBQ3_QUANTIZE_THREADS + threadIdx.x);
    if (i0 >= ne00) { // ne00 is a multiple of 128: whole warps leave
        return;
    }
    const uint32_t i1 = blockIdx.y;
    const uint32_t i3 = fastdiv(blockIdx.z, ne2);
    const uint32_t i2 = blockIdx.z - i3*ne2.z;

    ggml_cuda_pdl_sync();
    x += i3*s03 + i2*s02 + i1*s01 + i0;
    const float v[4] = { x[0], x[1], x[2], x[3] };
    mbq3_quantize(v, y + ((int64_t) blockIdx.z*ne1 + i1)*(ne00/QK_MBQ3), i0);
}

#define MBQ3_NORM_THREADS 1024

// x/rms(x)*weights of one row, and the same quantised: a kernel less between the norm and the products that follow.
template <int VPT>
static __global__ void __launch_bounds__(MBQ3_NORM_THREADS) mbq3_rms_norm_mul(
        const float4 * x_ptr, const float4 * weights_ptr, float4 * dst_ptr, mbq3_y_block * y_ptr, const int n, const float eps) {
    const float4 * GGML_CUDA_RESTRICT x       = x_ptr;
    const float4 * GGML_CUDA_RESTRICT weights = weights_ptr;
    float4       * GGML_CUDA_RESTRICT dst     = dst_ptr;
    __shared__ float sums[WARP_SIZE];

    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    float4 v[VPT];
    float4 w[VPT];
    float  sum = 0.0f;
#pragma unroll
    for (int k = 0; k < VPT; ++k) {
        const int i = threadIdx.x + k*MBQ3_NORM_THREADS;
        if (4*i < n) {
            v[k] = x[i];
            w[k] = weights[i];
            sum += v[k].x*v[k].x + v[k].y*v[k].y + v[k].z*v[k].z + v[k].w*v[k].w;
        }
    }
    sum = block_reduce<block_reduce_method::SUM, MBQ3_NORM_THREADS>(sum, sums);
    const float scale = rsqrtf(sum/n + eps);
#pragma unroll
    for (int k = 0; k < VPT; ++k) {
        const int i = threadIdx.x + k*MBQ3_NORM_THREADS;
        if (4*i < n) { // n is a multiple of 128: whole warps
            const float r[4] = { scale*v[k].x*w[k].x, scale*v[k].y*w[k].y, scale*v[k].z*w[k].z, scale*v[k].w*w[k].w };
            dst[i] = make_float4(r[0], r[1], r[2], r[3]);
            mbq3_quantize(r, y_ptr, 4*i);
        }
    }
}

template <int rows>
static __device__ __forceinline__ void mbq3_load(
        const uint32_t * GGML_CUDA_RESTRICT x, const uint32_t (&off)[rows], const int c, uint32_t (&q)[rows][4]) {
    const uint32_t * p = x + (c/4)*MBQ3_WORDS;
    const int        t = c%4;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
        q[r][0] = p[off[r]];
        q[r][1] = p[off[r] + 1 + t];
        q[r][2] = p[off[r] + 5 + t];
        q[r][3] = p[off[r] + 9 + t];
    }
}

// One chunk of `rows` rows against the same chunk of `ncols` columns.
template <int ncols, int rows>
static __device__ __forceinline__ void mbq3_dot(
        const uint32_t (&q)[rows][4], const int (&u)[ncols][8], const float2 (&ds)[ncols], float (&acc)[ncols][rows]) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
        int v[8];
        mbq3_unpack(q[r][1], q[r][2], q[r][3], v);
        const float2 dm = __half22float2(*(const half2 *) &q[r][0]);
#pragma unroll
        for (int j = 0; j < ncols; ++j) {
            int sumi = 0;
#pragma unroll
            for (int w = 0; w < 8; ++w) {
                sumi = ggml_cuda_dp4a(v[w], u[j][w], sumi);
            }
            acc[j][r] += dm.x*(ds[j].x*sumi) + dm.y*ds[j].y;
        }
    }
}

// Sums n values over the lanes of a warp, n a power of two: while several are left, each half of the lanes hands the
// other half's values over and keeps its own, 6 shuffles for n = 4 instead of 20. Value i ends in lanes i*32/n...
template <int n>
static __device__ __forceinline__ float mbq3_warp_sums(float (&v)[n], const int lane) {
    static_assert(n >= 1 && n <= WARP_SIZE && (n & (n - 1)) == 0, "a power of two");
#pragma unroll
    for (int half = n/2, o = WARP_SIZE/2; half > 0; half /= 2, o /= 2) {
        const bool upper = lane & o;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float keep = upper ? v[i + half] : v[i];
            const float give = upper ? v[i] : v[i + half];
            v[i] = keep + __shfl_xor_sync(0xFFFFFFFF, give, o, WARP_SIZE);
        }
    }
#pragma unroll
    for (int o = WARP_SIZE/n/2; o > 0; o /= 2) {
        v[0] += __shfl_xor_sync(0xFFFFFFFF, v[0], o, WARP_SIZE);
    }
    return v[0];
}

static constexpr __host__ __device__ int mbq3_next_power_of_two(const int n) {
    return n <= 1 ? 1 : 2*mbq3_next_power_of_two((n + 1)/2);
}

// Warps to fit on a multiprocessor: bounds the registers so that what is in flight covers the latency of memory.
static constexpr __host__ __device__ int mbq3_resident_warps(const int ncols, const int rows, const bool has_gate) {
    return ncols > 4 ? 28 : ncols > 1 ? 24 : rows*(has_gate ? 2 : 1) <= 2 ? 48 : 32;
}

// A block is four warps, or `warps` if that is more: four/warps groups, each `rows` rows.
template <int ncols, int rows, int warps, bool has_gate>
static __global__ void __launch_bounds__(32*(warps > 4 ? warps : 4), mbq3_resident_warps(ncols, rows, has_gate)/(warps > 4 ? warps : 4))
mbq3_mul_mat_vec(const mbq3_mmv_args args) {
    constexpr int nwarps = warps > 4 ? warps : 4;
    constexpr int groups = nwarps/warps;
    constexpr int nout   = ncols*rows;
    static_assert(nout <= WARP_SIZE, "one lane per output");

    const int lane  = threadIdx.x;
    const int group = threadIdx.y/warps;
    const int row0  = (blockIdx.x*groups + group)*rows;

    const uint32_t channel_dst = blockIdx.y;
    const uint32_t sample_dst  = blockIdx.z;
    const uint32_t sample_x    = args.ids ? 0 : fastdiv(sample_dst, args.sample_ratio);

    uint32_t channel_x = 0;
    if (!args.ids) {
        channel_x = fastdiv(channel_dst, args.channel_ratio);
    } else {
        ggml_cuda_pdl_sync();
        channel_x = args.ids[sample_dst*args.ids_stride + channel_dst];
    }
    const uint32_t channel_y = args.ids ? fastmodulo(channel_dst, args.nchannels_y) : channel_dst;

    const int64_t off_x = sample_x*args.stride_sample_x + channel_x*args.stride_channel_x;
    const uint32_t     * GGML_CUDA_RESTRICT x    = args.x + off_x;
    const uint32_t     * GGML_CUDA_RESTRICT gate = has_gate ? args.gate + off_x : nullptr;
    const mbq3_y_block * GGML_CUDA_RESTRICT y    = args.y + sample_dst*args.stride_sample_y + channel_y*args.stride_channel_y;

    uint32_t off[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
        off[r] = min(row0 + r, args.nrows - 1)*args.stride_row; // rows past the end repeat the last and are not written
    }

    float acc     [ncols][rows] = {{0.0f}};
    float acc_gate[ncols][rows] = {{0.0f}};

    int c = (threadIdx.y%warps)*WARP_SIZE + lane;
    uint32_t q     [rows][4];
    uint32_t q_gate[rows][4];

    if (!args.ids && !args.constant_x) {
        ggml_cuda_pdl_sync();
    }
    if (c < args.nchunks) {
        mbq3_load(x, off, c, q);
        if constexpr (has_gate) {
            mbq3_load(gate, off, c, q_gate);
        }
    }
    if (!args.ids && args.constant_x) {
        ggml_cuda_pdl_sync();
    }
    ggml_cuda_pdl_lc();

    while (c < args.nchunks) {
        const int cn = c + warps*WARP_SIZE;

        uint32_t qn     [rows][4];
        uint32_t qn_gate[rows][4];
        if (cn < args.nchunks) {
            mbq3_load(x, off, cn, qn);
            if constexpr (has_gate) {
                mbq3_load(gate, off, cn, qn_gate);
            }
        }

        int    u [ncols][8];
        float2 ds[ncols];
#pragma unroll
        for (int j = 0; j < ncols; ++j) {
            const mbq3_y_block * yb = y + j*args.stride_col_y + c/4;
            const int4 lo = yb->lo[c%4];
            const int4 hi = yb->hi[c%4];
            ds[j] = yb->ds[c%4];
            u[j][0] = lo.x; u[j][1] = lo.y; u[j][2] = lo.z; u[j][3] = lo.w;
            u[j][4] = hi.x; u[j][5] = hi.y; u[j][6] = hi.z; u[j][7] = hi.w;
        }

        mbq3_dot<ncols, rows>(q, u, ds, acc);
        if constexpr (has_gate) {
            mbq3_dot<ncols, rows>(q_gate, u, ds, acc_gate);
        }

#pragma unroll
        for (int r = 0; r < rows; ++r) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                q[r][k] = qn[r][k];
                if constexpr (has_gate) {
                    q_gate[r][k] = qn_gate[r][k];
                }
            }
        }
        c = cn;
    }

    // lanes lanes_per_out*i... of each warp get output i = rows*column + row
    constexpr int nsums         = mbq3_next_power_of_two(nout);
    constexpr int lanes_per_out = WARP_SIZE/nsums;
    float sums     [nsums] = {0.0f};
    float sums_gate[nsums] = {0.0f};
#pragma unroll
    for (int j = 0; j < ncols; ++j) {
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            sums[j*rows + r] = acc[j][r];
            if constexpr (has_gate) {
                sums_gate[j*rows + r] = acc_gate[j][r];
            }
        }
    }
    int   out         = lane%lanes_per_out == 0 ? lane/lanes_per_out : nout;
    float result      = mbq3_warp_sums(sums, lane);
    float result_gate = 0.0f;
    if constexpr (has_gate) {
        result_gate = mbq3_warp_sums(sums_gate, lane);
    }

    if constexpr (warps > 1) {
        __shared__ float partial[has_gate ? 2 : 1][nwarps][nout];
        if (out < nout) {
            partial[0][threadIdx.y][out] = result;
            if constexpr (has_gate) {
                partial[1][threadIdx.y][out] = result_gate;
            }
        }
        __syncthreads();
        if (threadIdx.y%warps != 0) {
            return;
        }
        if (out < nout) {
#pragma unroll
            for (int k = 1; k < warps; ++k) {
                result += partial[0][threadIdx.y + k][out];
                if constexpr (has_gate) {
                    result_gate += partial[1][threadIdx.y + k][out];
                }
            }
        }
    }

    const int row = row0 + out%rows;
    const int col = out/rows;
    if (out >= nout || row >= args.nrows) {
        return;
    }

    if constexpr (ncols == 1) {
        const int64_t off_bias = (args.ids ? channel_x*args.stride_channel_dst : sample_dst*args.stride_sample_dst + channel_dst*args.stride_channel_dst) + row;
        if (args.x_bias) {
            result += args.x_bias[off_bias];
        }
        if constexpr (has_gate) {
            if (args.gate_bias) {
                result_gate += args.gate_bias[off_bias];
            }
            switch (args.glu_op) {
                case GGML_GLU_OP_SWIGLU:
                    result *= ggml_cuda_op_silu_single(result_gate);
                    break;
                case GGML_GLU_OP_GEGLU:
                    result *= ggml_cuda_op_gelu_single(result_gate);
                    break;
                case GGML_GLU_OP_SWIGLU_OAI:
                    result = ggml_cuda_op_swiglu_oai_single(result_gate, result);
                    break;
                case GGML_GLU_OP_SWIGLU_CLAMP:
                    result = ggml_cuda_op_swiglu_clamp_single(result_gate, result, args.glu_limit);
                    break;
                default:
                    result *= result_gate;
                    break;
            }
        }
    }

    args.dst[sample_dst*args.stride_sample_dst + channel_dst*args.stride_channel_dst + col*args.stride_col_dst + row] = result;
}

template <int ncols, int rows, int warps, bool has_gate>
static void mbq3_launch(const mbq3_mmv_args & args, const int nchannels, const int nsamples, cudaStream_t stream) {
    constexpr int nwarps = warps > 4 ? warps : 4;
    constexpr int rows_per_block = rows*(nwarps/warps);
    const dim3 grid((args.nrows + rows_per_block - 1)/rows_per_block, nchannels, nsamples);
    const ggml_cuda_kernel_launch_params params(grid, dim3(WARP_SIZE, nwarps, 1), 0, stream);
    ggml_cuda_kernel_launch(mbq3_mul_mat_vec<ncols, rows, warps, has_gate>, params, args);
}

template <int ncols, bool has_gate>
static void mbq3_choose(const mbq3_mmv_args & args, const int nchannels, const int nsamples, cudaStream_t stream) {
#ifdef MBQ3_TUNE
    if constexpr (ncols == 1) {
        if (const char * s = getenv(has_gate ? "MBQ3_TUNE_GATE" : "MBQ3_TUNE")) {
            switch (atoi(s)) {
#define MBQ3_CASE(r, w) case 10*r + w: mbq3_launch<ncols, r, w, has_gate>(args, nchannels, nsamples, stream); return;
                MBQ3_CASE(1, 1) MBQ3_CASE(1, 2) MBQ3_CASE(1, 4) MBQ3_CASE(1, 8)
                MBQ3_CASE(2, 1) MBQ3_CASE(2, 2) MBQ3_CASE(2, 4) MBQ3_CASE(2, 8)
                MBQ3_CASE(4, 1) MBQ3_CASE(4, 2) MBQ3_CASE(4, 4) MBQ3_CASE(4, 8)
                default: break;
            }
        }
    }
#endif // MBQ3_TUNE
    if constexpr (ncols == 1) {
        // Measured on an H100, see docs/kernels.md. With a gate a lane works on twice the rows it is given.
        constexpr int r = has_gate ? 2 : 4;
        if (args.nchunks <= 32) {
            mbq3_launch<ncols, 2, 1, has_gate>(args, nchannels, nsamples, stream);
        } else if (args.nchunks <= 128 && args.nrows > 4096) {
            mbq3_launch<ncols, r, 2, has_gate>(args, nchannels, nsamples, stream);
        } else if (args.nchunks <= 256) {
            mbq3_launch<ncols, r, 4, has_gate>(args, nchannels, nsamples, stream);
        } else if (args.nrows <= 4096) {
            mbq3_launch<ncols, r, 8, has_gate>(args, nchannels, nsamples, stream);
        } else {
            mbq3_launch<ncols, 2, 4, has_gate>(args, nchannels, nsamples, stream);
        }
    } else {
        mbq3_launch<ncols, 2, 4, has_gate>(args, nchannels, nsamples, stream);
    }
}

#define MBQ3_COLUMN_BYTES (128*1024) // rows of 104,832

// Where the quantised column of src will lie for those that come after; null where it is for one product only.
static mbq3_y_block * mbq3_keep_column(ggml_backend_cuda_context & ctx, const ggml_tensor * src) {
    if (ctx.curr_stream_no != 0 || ggml_nrows(src) != 1 || src->ne[0]/QK_MBQ3*sizeof(mbq3_y_block) > MBQ3_COLUMN_BYTES) {
        return nullptr;
    }
    if (ctx.column.data == nullptr) {
        CUDA_CHECK(cudaMalloc(&ctx.column.data, MBQ3_COLUMN_BYTES));
    }
    ctx.column.src  = src;
    ctx.column.made = true;
    return (mbq3_y_block *) ctx.column.data;
}

void ggml_cuda_mbq3_written(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, const int first, const int last) {
    const ggml_tensor * src = ctx.column.src;
    if (src == nullptr || ctx.column.made) {
        ctx.column.made = false;
        return;
    }
    const char * begin = (const char *) src->data;
    const char * end   = begin + ggml_nbytes(src);
    for (int i = first; i <= last; ++i) {
        const char * data = (const char *) cgraph->nodes[i]->data;
        if (data < end && data + ggml_nbytes(cgraph->nodes[i]) > begin) {
            ctx.column.src = nullptr;
        }
    }
}

bool ggml_cuda_mbq3_rms_norm_mul(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, const int i) {
    const ggml_tensor * norm    = cgraph->nodes[i];
    const ggml_tensor * mul     = cgraph->nodes[i + 1];
    const ggml_tensor * x       = norm->src[0];
    const ggml_tensor * weights = mul->src[0] == norm ? mul->src[1] : mul->src[0];

    bool used = false;
    for (int j = i + 2; j < std::min(i + 5, cgraph->n_nodes); ++j) {
        const ggml_tensor * node = cgraph->nodes[j];
        used = used || (node->op == GGML_OP_MUL_MAT && node->src[1] == mul && node->src[0]->type == GGML_TYPE_MBQ3);
    }
    const int64_t n = x->ne[0];
    if (!used || !GGML_CUDA_CC_IS_NVIDIA(ggml_cuda_info().devices[ctx.device].cc) || n % QK_MBQ3 != 0 || n > 4*4*MBQ3_NORM_THREADS) {
        return false;
    }
    for (const ggml_tensor * t : { x, weights, mul }) {
        if (t->type != GGML_TYPE_F32 || ggml_nelements(t) != n || t->ne[0] != n || t->nb[0] != sizeof(float) || (uintptr_t) t->data % sizeof(float4) != 0) {
            return false;
        }
    }
    mbq3_y_block * y = mbq3_keep_column(ctx, mul);
    if (y == nullptr) {
        return false;
    }
    float eps;
    memcpy(&eps, norm->op_params, sizeof(float));
    const auto kernel = n <= 4*MBQ3_NORM_THREADS ? mbq3_rms_norm_mul<1> : n <= 8*MBQ3_NORM_THREADS ? mbq3_rms_norm_mul<2> : mbq3_rms_norm_mul<4>;
    const ggml_cuda_kernel_launch_params params(dim3(1, 1, 1), dim3(MBQ3_NORM_THREADS, 1, 1), 0, ctx.stream());
    ggml_cuda_kernel_launch(kernel, params, (const float4 *) x->data, (const float4 *) weights->data, (float4 *) mul->data, y, (int) n, eps);
    return true;
}

bool ggml_cuda_mbq3_mul_mat_vec(
        ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * ids, ggml_tensor * dst,
        const ggml_cuda_mm_fusion_args_host * fusion) {
    if (src0->type != GGML_TYPE_MBQ3 || (fusion && fusion->shared_up)) {
        return false;
    }
    if (!GGML_CUDA_CC_IS_NVIDIA(ggml_cuda_info().devices[ggml_cuda_get_device()].cc)) {
        return false;
    }

    GGML_TENSOR_BINARY_OP_LOCALS;

    const int64_t ncols_dst = ids ? 1 : ne1;
    if (ncols_dst > 8) {
        return false;
    }
    GGML_ASSERT(!ids || (ne03 == 1 && ne13 == 1 && ne3 == 1));

    GGML_ASSERT(src1->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32);
    GGML_ASSERT(nb00 == sizeof(block_mbq3) && nb10 == sizeof(float) && nb0 == sizeof(float));
    GGML_ASSERT(ne00 == ne10 && ne00 % QK_MBQ3 == 0);
    GGML_ASSERT(nb01 % sizeof(uint32_t) == 0 && ne01*nb01 <= (size_t) 4*UINT32_MAX);
    GGML_ASSERT(!fusion || (!fusion->x_scale && !fusion->gate_scale && ncols_dst == 1));

    cudaStream_t stream = ctx.stream();

    const int64_t ny = ne10/QK_MBQ3;
    ggml_cuda_pool_alloc<mbq3_y_block> from_pool(ctx.pool());
    const bool     known = ctx.curr_stream_no == 0 && ctx.column.src == src1;
    mbq3_y_block * y     = known ? (mbq3_y_block *) ctx.column.data : mbq3_keep_column(ctx, src1);
    if (y == nullptr) {
        y = from_pool.alloc(ne13*ne12*ne11*ny);
    }
#ifdef MBQ3_TUNE
    if (!getenv("MBQ3_SKIP_QUANTIZE")) // the product alone, of whatever the buffer holds
#endif // MBQ3_TUNE
    if (!known) {
        const int nblocks = (ne10 + 4*MBQ3_QUANTIZE_THREADS - 1)/(4*MBQ3_QUANTIZE_THREADS);
        const ggml_cuda_kernel_launch_params params(dim3(nblocks, ne11, ne12*ne13), dim3(MBQ3_QUANTIZE_THREADS, 1, 1), 0, stream);
        ggml_cuda_kernel_launch(mbq3_quantize_columns, params, (const float *) src1->data, y, (int) ne10,
            (int64_t) (nb11/sizeof(float)), (int64_t) (nb12/sizeof(float)), (int64_t) (nb13/sizeof(float)), (int) ne11, init_fastdiv_values(ne12));
    }

    mbq3_mmv_args args = {};
    args.x       = (const uint32_t *) src0->data;
    args.y       = y;
    args.dst     = (float *) dst->data;
    args.ids     = ids ? (const int32_t *) ids->data : nullptr;
    args.nrows   = ne01;
    args.nchunks = ne00/32;
    args.stride_row         = nb01/sizeof(uint32_t);
    args.stride_channel_x   = nb02/sizeof(uint32_t);
    args.stride_sample_x    = nb03/sizeof(uint32_t);
    args.stride_col_y       = ny;
    args.stride_channel_y   = ids ? ny      : ny*ne11;
    args.stride_sample_y    = ids ? ny*ne11 : ny*ne11*ne12;
    args.stride_col_dst     = nb1/sizeof(float);
    args.stride_channel_dst = (ids ? nb1 : nb2)/sizeof(float);
    args.stride_sample_dst  = (ids ? nb2 : nb3)/sizeof(float);
    args.ids_stride         = ids ? ids->nb[1]/sizeof(int32_t) : 0;
    args.channel_ratio = ids ? make_uint3(0, 0, 0) : init_fastdiv_values(ne2/ne02);
    args.nchannels_y   = ids ? init_fastdiv_values(ne11) : make_uint3(0, 0, 0);
    args.sample_ratio  = init_fastdiv_values(ne3/ne03);
    args.constant_x    = ggml_backend_buffer_get_usage(src0->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
    if (fusion) {
        args.x_bias    = fusion->x_bias    ? (const float    *) fusion->x_bias->data    : nullptr;
        args.gate      = fusion->gate      ? (const uint32_t *) fusion->gate->data      : nullptr;
        args.gate_bias = fusion->gate_bias ? (const float    *) fusion->gate_bias->data : nullptr;
        args.glu_op    = fusion->glu_op;
        args.glu_limit = fusion->glu_limit;
        if (fusion->gate) {
            GGML_ASSERT(fusion->gate->type == src0->type && ggml_are_same_stride(fusion->gate, src0));
            args.constant_x = args.constant_x && ggml_backend_buffer_get_usage(fusion->gate->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
        }
    }

    const int nchannels = ids ? ne1 : ne2;
    const int nsamples  = ids ? ne2 : ne3;
    switch (ncols_dst) {
        case 1:
            if (args.gate) {
                mbq3_choose<1, true>(args, nchannels, nsamples, stream);
            } else {
                mbq3_choose<1, false>(args, nchannels, nsamples, stream);
            }
            break;
        case 2: mbq3_choose<2, false>(args, nchannels, nsamples, stream); break;
        case 3: mbq3_choose<3, false>(args, nchannels, nsamples, stream); break;
        case 4: mbq3_choose<4, false>(args, nchannels, nsamples, stream); break;
        case 5: mbq3_choose<5, false>(args, nchannels, nsamples, stream); break;
        case 6: mbq3_choose<6, false>(args, nchannels, nsamples, stream); break;
        case 7: mbq3_choose<7, false>(args, nchannels, nsamples, stream); break;
        case 8: mbq3_choose<8, false>(args, nchannels, nsamples, stream); break;
        default: GGML_ABORT("fatal error");
    }
    return true;
}
