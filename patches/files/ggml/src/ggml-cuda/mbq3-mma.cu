// MBQ3 times more than one column, on the bf16 tensor cores. Codes of 0..7 are exact in bf16, activations keep 8 bits of mantissa each
// (int8 keeps 7 bits of the greatest of 32), sums are f32: nothing overflows that f32 holds.
//
// Few columns (2 to 16): bound by the bandwidth of device memory, like mbq3-mmvq.cu, which multiplies each weight once per
// column in the integer units and is bound by those from four columns on.
// 1. mbq3_bf16_columns rounds the activations and stores them as the tensor operation wants them: per block of 128, tile of
//    eight columns and pair of words i, 16 bytes for lane 4*g + t: chunk t of column g. And the sum of each block.
// 2. mbq3_mul_mat_mma: a block of the grid takes 16*MT rows, its warps share their columns, four MBQ3 blocks at a time.
//    Each warp copies its part of the weights to shared memory (cp.async, two stages of its own: no barrier in the loop).
//    A row's part is 52 words: rows of a tile start in banks 0, 20, 8, 28, 16, 4, 24, 12, and a quad's chunks follow one
//    another, so every load of a fragment is free of conflicts.
//    The order of summation is free as long as both operands agree: lane (g, t) multiplies chunk t of rows g and g + 8, one word
//    of four codes per operation. bf16 has 7 bits of mantissa, so that 0x4300 | f*c is 128 + f*c: a code becomes an operand
//    where it lies, with one logical operation. The activations of word w come divided by its f, and with
//    S = sum((128/f + c)*x) over a block the product is d*S + m*sum(x) - d*sum(128/f*x).
// 3. The warps' sums meet in shared memory.
//
// Many columns: the weights are written out as bf16 at the bandwidth of a copy, and cuBLAS does the rest.

#include "mbq3-mma.cuh"
#include "convert.cuh"

#include <cstdlib>

#define MBQ3_MMA_MAX_COLUMNS 16
#define MBQ3_GROUP           4                        // blocks in a stage
#define MBQ3_GROUP_WORDS     (MBQ3_GROUP*MBQ3_WORDS)  // 52, per row

struct mbq3_mma_args {
    const uint32_t * x;
    const uint4    * y;
    const float2   * y_sum;
    float          * dst;
    int              nrows;
    int              ncols;
    int              nblocks;    // per row
    int              stages;     // 1 where no warp has more than one group
    int64_t          stride_row; // of x, in words
    int64_t          stride_col_dst;
    bool             constant_x; // no earlier kernel of the graph writes the weights
    uint32_t         one;        // 128.0 twice in bf16; known to the compiler, it would cost each pair an operation more
};

// The factor f of word w: where its codes lie in the low byte of a half.
static constexpr __host__ __device__ int mbq3_bf16_factor(const int w) {
    return w == 7 ? 16 : w == 6 || w%2 == 1 ? 8 : 1;
}

// One thread per eight activations, words 2*i and 2*i + 1 of a chunk; NT: tiles of eight columns.
template <int NT>
static __global__ void __launch_bounds__(256) mbq3_bf16_columns(
        const float * x_ptr, uint4 * y_ptr, float2 * y_sum, const int nblocks, const int64_t stride_col) {
    const float * GGML_CUDA_RESTRICT x = x_ptr;
    uint4       * GGML_CUDA_RESTRICT y = y_ptr;

    ggml_cuda_pdl_lc();
    const int block = (blockIdx.x*256 + threadIdx.x)/16;
    const int col   = blockIdx.y;
    const int t     = threadIdx.x%16/4;
    const int i     = threadIdx.x%4;

    ggml_cuda_pdl_sync();
    float v[8] = {0.0f};
    if (block < nblocks) {
        const float4 * p = (const float4 *) (x + col*stride_col + block*QK_MBQ3 + t*32 + i*8);
        const float4 a = p[0];
        const float4 b = p[1];
        v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w;
        v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
    }

    float    sum    = 0.0f;
    float    offset = 0.0f; // sum(128/f*x)
    uint32_t packed[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) { // elements 0 and 2, 1 and 3 of a word, as the codes come out
        const int   l = 4*(k/2) + k%2;
        const float f = 1.0f/mbq3_bf16_factor(2*i + k/2);
        const nv_bfloat162 pair = __floats2bfloat162_rn(f*v[l], f*v[l + 2]);
        const float x01 = __low2float(pair) + __high2float(pair);
        sum    += x01/f;
        offset += x01*128.0f;
        packed[k] = *(const uint32_t *) &pair;
    }
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) {
        sum    += __shfl_xor_sync(0xFFFFFFFF, sum,    o, WARP_SIZE);
        offset += __shfl_xor_sync(0xFFFFFFFF, offset, o, WARP_SIZE);
    }
    if (block >= nblocks) {
        return;
    }
    y[((block*NT + col/8)*4 + i)*WARP_SIZE + col%8*4 + t] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    if (t == 0 && i == 0) {
        y_sum[block*(8*NT) + col] = make_float2(sum, offset);
    }
}

static __device__ __forceinline__ void mbq3_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
#ifdef AMPERE_MMA_AVAILABLE
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    GGML_UNUSED_VARS(c, a, b0, b1);
    NO_DEVICE_CODE;
#endif // AMPERE_MMA_AVAILABLE
}

template <int words>
static __device__ __forceinline__ void mbq3_copy_async(uint32_t * to, const uint32_t * from) {
#ifdef CP_ASYNC_AVAILABLE
    const uint32_t s = (uint32_t) __cvta_generic_to_shared(to);
    if constexpr (words == 4) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(s), "l"(from) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(s), "l"(from) : "memory");
    }
#else
    GGML_UNUSED_VARS(to, from);
    NO_DEVICE_CODE;
#endif // CP_ASYNC_AVAILABLE
}

static __device__ __forceinline__ void mbq3_copy_commit() {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif // CP_ASYNC_AVAILABLE
}

template <int pending>
static __device__ __forceinline__ void mbq3_copy_wait() {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.wait_group %0;" : : "n"(pending) : "memory");
#endif // CP_ASYNC_AVAILABLE
}

// The words of a chunk ready for their codes to be cut out: as they are for the elements 0 and 2 of each word, a byte
// further for 1 and 3.
struct mbq3_chunk {
    uint32_t a[2], b[2], c[2];
    uint32_t a3[2], b2[2], c1[2];

    __device__ __forceinline__ mbq3_chunk() {}

    __device__ __forceinline__ mbq3_chunk(const uint32_t q0, const uint32_t q1, const uint32_t q2) :
        a{q0, q0 >> 8}, b{q1, q1 >> 8}, c{q2, q2 >> 8}, a3{q0 >> 3, q0 >> 11}, b2{q1 >> 2, q1 >> 10}, c1{q2 >> 1, q2 >> 9} {}

    // The pair of 128 + f*c: elements h and h + 2 of word w; one: 128.0 twice.
    template <int w>
    __device__ __forceinline__ uint32_t pair(const int h, const uint32_t one) const {
        if constexpr (w == 6) {
            return (c1[h] & 0x00200020) | ((a3[h] & 0x00180018) | one);
        } else if constexpr (w == 7) {
            return (c1[h] & 0x00400040) | ((b2[h] & 0x00300030) | one);
        } else {
            return ((w < 2 ? a : w < 4 ? b : c)[h] & (w%2 == 0 ? 0x00070007 : 0x00380038)) | one;
        }
    }
};

// All words of a block's chunk. Two sums in turn where there is but one tile: the operations of one wait for each other.
template <int MT, int NT, int w>
static __device__ __forceinline__ void mbq3_mma_words(
        float (&acc)[2][MT][NT][4], const mbq3_chunk (&lo)[MT], const mbq3_chunk (&hi)[MT], const uint4 (&b)[NT][4], const uint32_t one) {
    if constexpr (w < 8) {
        constexpr int k = MT*NT == 1 ? w%2 : 0;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            const uint32_t a[4] = {
                lo[mt].template pair<w>(0, one), hi[mt].template pair<w>(0, one), lo[mt].template pair<w>(1, one), hi[mt].template pair<w>(1, one) };
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                const uint4 & p = b[nt][w/2];
                mbq3_mma(acc[k][mt][nt], a, w%2 == 0 ? p.x : p.z, w%2 == 0 ? p.y : p.w);
            }
        }
        mbq3_mma_words<MT, NT, w + 1>(acc, lo, hi, b, one);
    }
}

// The part of a warp: rows row0.. of group `group`, to shared memory. WORDS: words per copy, 4 where rows are multiples of
// 16 bytes and of whole groups.
template <int MT, int WORDS>
static __device__ __forceinline__ void mbq3_load_group(const mbq3_mma_args & args, uint32_t * to, const int row0, const int group, const int lane) {
    const uint32_t * from = args.x + (int64_t) group*MBQ3_GROUP_WORDS;
    if constexpr (WORDS == 4) { // 13 lanes per row, two rows at a time
        const int c = lane%16*4;
        if (c < MBQ3_GROUP_WORDS) {
#pragma unroll 4
            for (int r = lane/16; r < 16*MT; r += 2) {
                mbq3_copy_async<4>(to + r*MBQ3_GROUP_WORDS + c, from + min(row0 + r, args.nrows - 1)*args.stride_row + c);
            }
        }
    } else {
        const int left = min(args.nblocks*MBQ3_WORDS - group*MBQ3_GROUP_WORDS, MBQ3_GROUP_WORDS);
#pragma unroll 4
        for (int r = 0; r < 16*MT; ++r) {
            const uint32_t * row = from + min(row0 + r, args.nrows - 1)*args.stride_row;
            if (lane < left) {
                mbq3_copy_async<1>(to + r*MBQ3_GROUP_WORDS + lane, row + lane);
            }
            if (lane + WARP_SIZE < left) {
                mbq3_copy_async<1>(to + r*MBQ3_GROUP_WORDS + lane + WARP_SIZE, row + lane + WARP_SIZE);
            }
        }
    }
}

// The activations of a block: 64 bytes of one chunk per tile of columns, and the sums of this lane's two columns of the result.
// Lanes of columns that are not there repeat the first of the tile, and nothing becomes of it.
template <int NT>
struct mbq3_columns {
    uint4  b[NT][4];
    float4 sum[NT];

    __device__ __forceinline__ void load(const mbq3_mma_args & args, const int block, const int lane) {
        const uint4  * y = args.y + (int64_t) block*NT*4*WARP_SIZE;
        const float4 * s = (const float4 *) (args.y_sum + block*(8*NT)) + lane%4;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const int from = 8*nt + lane/4 < args.ncols ? lane : lane%4;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                b[nt][i] = y[(nt*4 + i)*WARP_SIZE + from];
            }
            sum[nt] = s[nt*4];
        }
    }
};

// Block k of a group against its columns, added to the total.
template <int MT, int NT>
static __device__ __forceinline__ void mbq3_mma_block(
        float (&total)[MT][NT][4], const uint32_t * tile, const int k, const int lane, const mbq3_columns<NT> & y, const uint32_t one) {
    const uint32_t * p = tile + lane/4*MBQ3_GROUP_WORDS + k*MBQ3_WORDS;
    const int        t = lane%4;

    float2     dm[MT][2];
    mbq3_chunk lo[MT], hi[MT];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt, p += 16*MBQ3_GROUP_WORDS) {
        constexpr int half = 8*MBQ3_GROUP_WORDS;
        dm[mt][0] = __half22float2(*(const half2 *) p);
        dm[mt][1] = __half22float2(*(const half2 *) (p + half));
        lo[mt] = mbq3_chunk(p[       1 + t], p[       5 + t], p[       9 + t]);
        hi[mt] = mbq3_chunk(p[half + 1 + t], p[half + 5 + t], p[half + 9 + t]);
    }

    float acc[2][MT][NT][4] = {{{{0.0f}}}};
    mbq3_mma_words<MT, NT, 0>(acc, lo, hi, y.b, one);

#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int l = 0; l < 4; ++l) {
                const float2 w      = dm[mt][l/2];
                const float  sum    = l%2 == 0 ? y.sum[nt].x : y.sum[nt].z;
                const float  offset = l%2 == 0 ? y.sum[nt].y : y.sum[nt].w;
                const float  dot    = MT*NT == 1 ? acc[0][mt][nt][l] + acc[1][mt][nt][l] : acc[0][mt][nt][l];
                total[mt][nt][l] += w.x*(dot - offset) + w.y*sum;
            }
        }
    }
}

static constexpr __host__ __device__ int mbq3_max_warps(const int MT) {
    return MT == 1 ? 16 : 8;
}

template <int MT, int NT, int WORDS>
static __global__ void __launch_bounds__(32*mbq3_max_warps(MT), MT*NT == 1 ? 2 : MT == 1 ? 1 : 2) mbq3_mul_mat_mma(const mbq3_mma_args args) {
    extern __shared__ __align__(16) uint32_t mbq3_shared[];

    constexpr int stage_words = 16*MT*MBQ3_GROUP_WORDS;
    const int lane   = threadIdx.x;
    const int warp   = threadIdx.y;
    const int nwarps = blockDim.y;
    const int g      = lane/4;
    const int t      = lane%4;
    const int row0   = blockIdx.x*16*MT;
    const int groups = (args.nblocks + MBQ3_GROUP - 1)/MBQ3_GROUP;

    uint32_t * shared = mbq3_shared + warp*args.stages*stage_words;

    if (!args.constant_x) {
        ggml_cuda_pdl_sync();
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        if (warp + s*nwarps < groups) {
            mbq3_load_group<MT, WORDS>(args, shared + s*stage_words, row0, warp + s*nwarps, lane);
        }
        mbq3_copy_commit();
    }
    if (args.constant_x) {
        ggml_cuda_pdl_sync();
    }
    ggml_cuda_pdl_lc();

    const uint32_t one = args.one;

    float total[MT][NT][4] = {{{0.0f}}};
    int   stage = 0;
    for (int group = warp; group < groups; group += nwarps) {
        const int block0 = group*MBQ3_GROUP;
        uint32_t * tile  = shared + stage*stage_words;

        mbq3_columns<NT> y[2];
        y[0].load(args, block0, lane);
        mbq3_copy_wait<1>();
        __syncwarp();

        if (block0 + MBQ3_GROUP <= args.nblocks) {
#pragma unroll
            for (int k = 0; k < MBQ3_GROUP; ++k) {
                if (k + 1 < MBQ3_GROUP) {
                    y[(k + 1)%2].load(args, block0 + k + 1, lane);
                }
                mbq3_mma_block<MT, NT>(total, tile, k, lane, y[k%2], one);
            }
        } else {
#pragma unroll 1
            for (int k = 0; block0 + k < args.nblocks; ++k) {
                y[0].load(args, block0 + k, lane);
                mbq3_mma_block<MT, NT>(total, tile, k, lane, y[0], one);
            }
        }
        __syncwarp();
        if (group + 2*nwarps < groups) {
            mbq3_load_group<MT, WORDS>(args, tile, row0, group + 2*nwarps, lane);
        }
        mbq3_copy_commit();
        stage ^= 1;
    }

    mbq3_copy_wait<0>();
    __syncthreads();
    float * sums = (float *) mbq3_shared; // [warp][column][row]
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
            for (int l = 0; l < 4; ++l) {
                sums[(warp*8*NT + 8*nt + 2*t + l%2)*(16*MT) + 16*mt + 8*(l/2) + g] = total[mt][nt][l];
            }
        }
    }
    __syncthreads();
    for (int i = warp*WARP_SIZE + lane; i < args.ncols*16*MT; i += nwarps*WARP_SIZE) {
        const int col = i/(16*MT);
        const int row = row0 + i%(16*MT);
        if (row < args.nrows) {
            float sum = 0.0f;
            for (int k = 0; k < nwarps; ++k) {
                sum += sums[k*(8*NT*16*MT) + i];
            }
            args.dst[col*args.stride_col_dst + row] = sum;
        }
    }
}

template <int MT, int NT, int WORDS>
static void mbq3_mma_launch(mbq3_mma_args args, const int max_warps, cudaStream_t stream) {
    const int groups = (args.nblocks + MBQ3_GROUP - 1)/MBQ3_GROUP;
    const int rounds = (groups + max_warps - 1)/max_warps;
    const int nwarps = (groups + rounds - 1)/rounds; // as few as need no round more
    args.stages = groups > nwarps ? 2 : 1;
    // the sums of the warps, 512*MT*NT bytes each, take the place of the weights, 3328*MT
    const int shared = nwarps*args.stages*16*MT*MBQ3_GROUP_WORDS*sizeof(uint32_t);
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq3_mul_mat_mma<MT, NT, WORDS>), mbq3_max_warps(MT)*2*16*MT*MBQ3_GROUP_WORDS*sizeof(uint32_t));
    const ggml_cuda_kernel_launch_params params(dim3((args.nrows + 16*MT - 1)/(16*MT), 1, 1), dim3(WARP_SIZE, nwarps, 1), shared, stream);
    ggml_cuda_kernel_launch(mbq3_mul_mat_mma<MT, NT, WORDS>, params, args);
}

template <int NT, int WORDS>
static void mbq3_mma_choose(const mbq3_mma_args & args, cudaStream_t stream) {
#ifdef MBQ3_TUNE
    if (const char * s = getenv("MBQ3_TUNE_MMA")) {
        const int warps = atoi(s)%100;
        switch (atoi(s)/100) {
            case 1: mbq3_mma_launch<1, NT, WORDS>(args, warps, stream); return;
            case 2: mbq3_mma_launch<2, NT, WORDS>(args, warps, stream); return;
            default: break;
        }
    }
#endif // MBQ3_TUNE
    // Measured on an H100, see docs/kernels.md. Few rows: rather more blocks of the grid, and for long rows more warps to each.
    const bool few_rows = args.nrows <= 4096;
    if (NT == 1 && few_rows && args.nblocks > 8*MBQ3_GROUP) {
        mbq3_mma_launch<1, NT, WORDS>(args, 16, stream);
    } else if (NT == 2 && few_rows) {
        mbq3_mma_launch<1, NT, WORDS>(args, 8, stream);
    } else {
        mbq3_mma_launch<2, NT, WORDS>(args, 8, stream);
    }
}

template <int NT>
static void mbq3_mul_mat_few(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst) {
    cudaStream_t stream = ctx.stream();

    const int nblocks = src0->ne[0]/QK_MBQ3;
    const int ncols   = src1->ne[1];

    ggml_cuda_pool_alloc<uint4>  y    (ctx.pool(), (size_t) nblocks*NT*4*WARP_SIZE);
    ggml_cuda_pool_alloc<float2> y_sum(ctx.pool(), (size_t) nblocks*NT*8);
    {
        const ggml_cuda_kernel_launch_params params(dim3((nblocks + 15)/16, ncols, 1), dim3(256, 1, 1), 0, stream);
        ggml_cuda_kernel_launch(mbq3_bf16_columns<NT>, params, (const float *) src1->data, y.get(), y_sum.get(), nblocks, (int64_t) (src1->nb[1]/sizeof(float)));
    }

    mbq3_mma_args args = {};
    args.x              = (const uint32_t *) src0->data;
    args.y              = y.get();
    args.y_sum          = y_sum.get();
    args.dst            = (float *) dst->data;
    args.nrows          = src0->ne[1];
    args.ncols          = ncols;
    args.nblocks        = nblocks;
    args.stride_row     = src0->nb[1]/sizeof(uint32_t);
    args.stride_col_dst = dst->nb[1]/sizeof(float);
    args.one            = 0x43004300;
    args.constant_x     = ggml_backend_buffer_get_usage(src0->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;

    if (nblocks%MBQ3_GROUP == 0 && src0->nb[1]%16 == 0 && (uintptr_t) src0->data%16 == 0) {
        mbq3_mma_choose<NT, 4>(args, stream);
    } else {
        mbq3_mma_choose<NT, 1>(args, stream);
    }
}

// ---- many columns --------------------------------------------------------------------------------------------------

// Eight weights per thread: words 2*j and 2*j + 1 of a chunk, 16 bytes of bf16. A warp writes 512 bytes in a row.
// For j = 3 the low bits come from A and B, the high bits from C; for all others both come from one word.
#define MBQ3_EXPAND_ROUNDS 4
static __global__ void __launch_bounds__(256) mbq3_expand(const uint32_t * __restrict__ x, uint4 * __restrict__ y, const int64_t n8) {
    const int64_t i0 = (int64_t) blockIdx.x*(256*MBQ3_EXPAND_ROUNDS) + threadIdx.x;
    const int     t  = threadIdx.x%16/4;
    const int     j  = threadIdx.x%4;

    uint32_t q[MBQ3_EXPAND_ROUNDS][3];
    uint32_t s[MBQ3_EXPAND_ROUNDS];
#pragma unroll
    for (int k = 0; k < MBQ3_EXPAND_ROUNDS; ++k) {
        const int64_t i = i0 + 256*k;
        if (i < n8) {
            const uint32_t * p = x + i/16*MBQ3_WORDS;
            s[k]    = p[0];
            q[k][0] = p[1 + 4*(j == 3 ? 0 : j) + t];
            q[k][1] = j == 3 ? p[5 + t] : q[k][0];
            q[k][2] = j == 3 ? p[9 + t] : q[k][0];
        }
    }
#pragma unroll
    for (int k = 0; k < MBQ3_EXPAND_ROUNDS; ++k) {
        const int64_t i = i0 + 256*k;
        if (i >= n8) {
            return;
        }
        const float2   dm = __half22float2(*(const half2 *) &s[k]);
        const uint32_t v[2] = {
            ((q[k][0] >> (j == 3 ? 6 : 0)) & 0x03030303) | ((q[k][2] >> (j == 3 ? 4 : 0)) & 0x04040404),
            ((q[k][1] >> (j == 3 ? 6 : 3)) & 0x03030303) | ((q[k][2] >> (j == 3 ? 5 : 3)) & 0x04040404),
        };
        uint32_t out[4];
#pragma unroll
        for (int l = 0; l < 4; ++l) {
            const uint32_t c = v[l/2] >> 16*(l%2);
            const nv_bfloat162 pair = __floats2bfloat162_rn(dm.x*(c & 0xFF) + dm.y, dm.x*((c >> 8) & 0xFF) + dm.y);
            out[l] = *(const uint32_t *) &pair;
        }
        y[i] = make_uint4(out[0], out[1], out[2], out[3]);
    }
}

// Bounds what the weights take as bf16; of a 7B model no tensor but the output matrix exceeds it.
#define MBQ3_EXPAND_BYTES (256ll*1024*1024)

static void mbq3_mul_mat_many(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst, const int64_t ncols) {
    cudaStream_t stream = ctx.stream();

    const int64_t k     = src0->ne[0];
    const int64_t nrows = src0->ne[1];
    const int64_t parts = (nrows*k*(int64_t) sizeof(nv_bfloat16) + MBQ3_EXPAND_BYTES - 1)/MBQ3_EXPAND_BYTES;
    const int64_t step  = GGML_PAD((nrows + parts - 1)/parts, 256);

    ggml_cuda_pool_alloc<nv_bfloat16> x(ctx.pool(), std::min(step, nrows)*k);
    ggml_cuda_pool_alloc<nv_bfloat16> y(ctx.pool(), ncols*k);
    ggml_get_to_bf16_cuda(GGML_TYPE_F32)(src1->data, y.get(), ncols*k, stream);

    const float one = 1.0f, zero = 0.0f;
    for (int64_t row = 0; row < nrows; row += step) {
        const int64_t n  = std::min(step, nrows - row);
        const int64_t n8 = n*k/8;
        mbq3_expand<<<(n8 + 256*MBQ3_EXPAND_ROUNDS - 1)/(256*MBQ3_EXPAND_ROUNDS), 256, 0, stream>>>(
            (const uint32_t *) ((const char *) src0->data + row*src0->nb[1]), (uint4 *) x.get(), n8);
        CUDA_CHECK(cudaGetLastError());
        CUBLAS_CHECK(cublasGemmEx(ctx.cublas_handle(), CUBLAS_OP_T, CUBLAS_OP_N, n, ncols, k,
            &one, x.get(), CUDA_R_16BF, k, y.get(), CUDA_R_16BF, k, &zero, (float *) dst->data + row, CUDA_R_32F, nrows,
            CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT_TENSOR_OP));
    }
}

// From how many columns on the kernel for few columns is faster than that of mbq3-mmvq.cu: us on an H100, that kernel's first.
//   3584 x 512     4:  3.6,  3.7   6:  4.3,  3.8
//   3584 x 3584    2:  5.0,  4.8   4:  7.5,  4.9   8: 11.5,  5.0
//   3584 x 18944   2: 17.6, 16.9   4: 23.5, 17.2   8: 40.3, 18.0
//   8960 x 1536    4:  6.2,  7.5   6:  9.4,  7.6
//   18944 x 3584   2: 16.2, 19.8   4: 21.9, 19.2   8: 38.6, 20.1
//   8192 x 29568   2: 44.2, 47.2   4: 59.0, 49.6   8:  103, 51.6
static int64_t mbq3_few_columns(const ggml_tensor * src0) {
    return src0->ne[1] < 2048 ? 5 : src0->ne[0] > 4096 ? 4 : 2;
}

// From how many columns on cuBLAS is faster than MMQ: us on an H100, MMQ first.
//   3584 x 512 (1.8 M weights)     32: 13.9, 11.1     64: 17.6, 11.3
//   8192 x 1024 (8.4 M)            32: 17.8, 15.6     64: 22.2, 16.3
//   3584 x 3584 (13 M)             32: 17.2, 20.7     64: 22.0, 21.1     96: 27.8, 22.0
//   3584 x 18944, 18944 x 3584    128:  101, 119-126 192:  146, 127-133
//   8192 x 29568 (242 M)          128:  285, 401     192:  453, 405
// cuBLAS uses wgmma, which datacenter GPUs from Hopper on have; MMQ's mma does not reach its rate. Before, mma is what both
// use, and GPUs for graphics multiply bf16 with f32 sums at a quarter of int8's rate by their data sheets: there MMQ stays,
// unmeasured, until GGML_CUDA_MBQ3_CUBLAS_COLUMNS, the number of columns for any weights, says otherwise.
static int64_t mbq3_many_columns(const ggml_tensor * src0, const int cc) {
    if (const char * s = getenv("GGML_CUDA_MBQ3_CUBLAS_COLUMNS")) {
        return std::max(1ll, atoll(s));
    }
    if (cc != GGML_CUDA_CC_HOPPER && cc/100 != 10) {
        return INT64_MAX;
    }
    const int64_t n = ggml_nelements(src0);
    return n <= 10*1000*1000 ? 32 : n <= 20*1000*1000 ? 64 : n <= 100*1000*1000 ? 160 : 192;
}

bool ggml_cuda_mbq3_mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst) {
    const int cc = ggml_cuda_info().devices[ctx.device].cc;
    if (src0->type != GGML_TYPE_MBQ3 || !ampere_mma_available(cc) || cc < GGML_CUDA_CC_AMPERE) {
        return false;
    }
    if (src0->ne[2] != 1 || src0->ne[3] != 1 || !ggml_is_contiguous(src0) || src1->nb[0] != sizeof(float) || dst->nb[0] != sizeof(float)) {
        return false;
    }
    GGML_ASSERT(src1->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 && src0->ne[0] % QK_MBQ3 == 0);

    const int64_t ncols = ggml_nrows(src1);
    if (ncols >= mbq3_few_columns(src0) && ncols <= MBQ3_MMA_MAX_COLUMNS) {
#ifdef MBQ3_TUNE
        if (getenv("MBQ3_TUNE_OLD")) {
            return false;
        }
#endif // MBQ3_TUNE
        if (src1->ne[1] != ncols || src1->nb[1]%sizeof(float4) != 0 || (uintptr_t) src1->data%sizeof(float4) != 0) {
            return false;
        }
        if (ncols <= 8) {
            mbq3_mul_mat_few<1>(ctx, src0, src1, dst);
        } else {
            mbq3_mul_mat_few<2>(ctx, src0, src1, dst);
        }
        return true;
    }
    if (ncols > MBQ3_MMA_MAX_COLUMNS && ncols >= mbq3_many_columns(src0, cc) && ggml_is_contiguous(src1) && ggml_is_contiguous(dst)) {
        mbq3_mul_mat_many(ctx, src0, src1, dst, ncols);
        return true;
    }
    return false;
}
