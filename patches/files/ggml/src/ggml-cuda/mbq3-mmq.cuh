// MBQ3 in MMQ: products of many columns on the int8 tensor cores.
//
// MMQ walks K in steps of 256 weights: two MBQ3 blocks per row of the weight tile. The loader unpacks each chunk of 32
// into 32 bytes, two 16-byte stores to shared memory, and keeps one (d, m) per block. The product then takes half a
// step, 128 weights, exactly one block, at a time, so that the scales of a row leave the inner loop:
//
//     sum += d * sum_t d8[t] * dot_t + m * 32 * sum_t mean8[t]        t = 0..3, the chunks of the block
//
// dot_t is the int32 result of one 16x8x32 tensor operation. For an output element that is one conversion and one fma
// per chunk and two fma per block; Q4_1, which has a (d, m) per 32 weights, needs three multiplications and additions more
// per chunk. The activations come with the pair (d8, mean8) of each chunk in fp16: mean8, the mean of the quantised
// activations, cannot exceed their greatest value, whereas the sum that Q4_1 and Q4_K are given overflows fp16 from
// activations of about 2000 on (layout MMQ_Q8_1_DS_LAYOUT_DM4).
//
// Lanes of a loading warp: four chunks times two rows within each quarter warp. The tile's stride of 76 words puts
// the eight 16-byte stores of a quarter warp in eight different groups of four banks.

#pragma once

template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_mbq3(
        const char * __restrict__ x, const char * __restrict__ x_gate, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride) {
    GGML_UNUSED(x_gate);

    constexpr int warp_size = ggml_cuda_get_physical_warp_size();
    constexpr int nthreads  = ggml_cuda_mmq_get_nthreads(type, J, fallback, GGML_PREC_Q8);
    constexpr int nwarps    = nthreads / warp_size;
    constexpr int I         = ggml_cuda_mmq_get_I(type, J, fallback, GGML_PREC_Q8);
    constexpr int nblocks   = MMQ_ITER_K / QK_MBQ3; // per row of the tile

#if defined(TURING_MMA_AVAILABLE)
    constexpr int qs_stride = ggml_cuda_mmq_get_sram_stride(type, J, fallback, GGML_PREC_Q8);
    constexpr int dm_stride = qs_stride;
    int   * x_qs = x_tile;
    half2 * x_dm = (half2 *) (x_tile + 2*MMQ_TILE_NE_K);
#else
    constexpr tile_x_sizes txs = mmq_get_dp4a_tile_x_sizes(GGML_TYPE_MBQ3, I);
    constexpr int qs_stride = 2*MMQ_TILE_NE_K + 1;
    constexpr int dm_stride = nblocks;
    int   * x_qs = x_tile;
    half2 * x_dm = (half2 *) (x_tile + txs.qs);
#endif // defined(TURING_MMA_AVAILABLE)

    const block_mbq3 * xb = (const block_mbq3 *) x + kbx0;

    constexpr int rows_per_pass = nwarps*warp_size / (4*nblocks);
    const int t   =  threadIdx.x       % 4;
    const int kbx = (threadIdx.x /  8) % 2;
    const int row = threadIdx.y*(warp_size/8) + (threadIdx.x/16)*2 + (threadIdx.x/4)%2;

#pragma unroll
    for (int i0 = 0; i0 < I; i0 += rows_per_pass) {
        int i = i0 + row;
        if (fallback) {
            i = min(i, i_max);
        }

        const block_mbq3 * b = xb + i*stride + kbx;

        int v[8];
        mbq3_unpack(b->q[t], b->q[4 + t], b->q[8 + t], v);

        int * qs = x_qs + i*qs_stride + kbx*(QK_MBQ3/4) + t*8;
#if defined(TURING_MMA_AVAILABLE)
        ((int4 *) qs)[0] = make_int4(v[0], v[1], v[2], v[3]);
        ((int4 *) qs)[1] = make_int4(v[4], v[5], v[6], v[7]);
#else
#pragma unroll
        for (int w = 0; w < 8; ++w) {
            qs[w] = v[w];
        }
#endif // defined(TURING_MMA_AVAILABLE)
        if (t == 0) {
            x_dm[i*dm_stride + kbx] = b->dm;
        }
    }
}

#if defined(TURING_MMA_AVAILABLE)
template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_vec_dot_mbq3_q8_1_mma(
        const int * __restrict__ x, const int * __restrict__ y, float * __restrict__ sum, const int k00) {
    typedef tile<16, 8, int> tile_A;
    typedef tile< 8, 8, int> tile_B;
    typedef tile<16, 8, int> tile_C;

    constexpr int stride  = ggml_cuda_mmq_get_sram_stride(type, J, fallback, GGML_PREC_Q8);
    constexpr int rows    = ggml_cuda_mmq_get_rows_per_warp(type, J, fallback, GGML_PREC_Q8);
    constexpr int ntx     = rows/tile_C::I;
    constexpr int nchunks = QK_MBQ3/32;

    const int i0 = (threadIdx.y/ntx)*rows;
    y += (threadIdx.y%ntx)*(tile_C::J*MMQ_TILE_Y_K);

    const int   * y_qs = y + 4;
    const half2 * y_dm = (const half2 *) y;
    const half2 * x_dm = (const half2 *) x + 2*MMQ_TILE_NE_K + k00/(QK_MBQ3/4);

    tile_A A[ntx][nchunks];
    float  d[ntx][tile_C::ne/2];
    float  m[ntx][tile_C::ne/2];

#pragma unroll
    for (int n = 0; n < ntx; ++n) {
#pragma unroll
        for (int t = 0; t < nchunks; ++t) {
            load_ldmatrix(A[n][t], x + (i0 + n*tile_A::I)*stride + k00 + 8*t, stride);
        }
#pragma unroll
        for (int l = 0; l < tile_C::ne/2; ++l) {
            const float2 dm = __half22float2(x_dm[(i0 + n*tile_A::I + tile_C::get_i(2*l))*stride]);
            d[n][l] = dm.x;
            m[n][l] = dm.y*32.0f; // the mean of 32 activations becomes their sum
        }
    }

#pragma unroll
    for (int j0 = 0; j0 < J; j0 += ntx*tile_C::J) {
        float dot[ntx][tile_C::ne] = {{0.0f}};
        float mean[tile_C::ne/2]   = {0.0f};

#pragma unroll
        for (int t = 0; t < nchunks; ++t) {
            tile_B B;
            load_generic(B, y_qs + j0*MMQ_TILE_Y_K + 8*t, MMQ_TILE_Y_K);

            float d8[tile_C::ne/2];
#pragma unroll
            for (int l = 0; l < tile_C::ne/2; ++l) {
                const float2 dm8 = __half22float2(y_dm[(j0 + tile_C::get_j(l))*MMQ_TILE_Y_K + t]);
                d8[l]    = dm8.x;
                mean[l] += dm8.y;
            }

#pragma unroll
            for (int n = 0; n < ntx; ++n) {
                tile_C C;
                mma(C, A[n][t], B);
#pragma unroll
                for (int l = 0; l < tile_C::ne; ++l) {
                    dot[n][l] += d8[l%2]*C.x[l];
                }
            }
        }

#pragma unroll
        for (int n = 0; n < ntx; ++n) {
#pragma unroll
            for (int l = 0; l < tile_C::ne; ++l) {
                float & s = sum[(j0/tile_C::J + n)*tile_C::ne + l];
                s += d[n][l/2]*dot[n][l];
                s += m[n][l/2]*mean[l%2];
            }
        }
    }
}
#endif // defined(TURING_MMA_AVAILABLE)

// The same product with dp4a, for GPUs before Turing.
template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_vec_dot_mbq3_q8_1_dp4a(
        const int * __restrict__ x, const int * __restrict__ y, float * __restrict__ sum, const int k00) {
    constexpr int warp_size = ggml_cuda_get_physical_warp_size();
    constexpr int nwarps    = ggml_cuda_mmq_get_nthreads(type, J, fallback, GGML_PREC_Q8) / warp_size;
    constexpr int I         = ggml_cuda_mmq_get_I(type, J, fallback, GGML_PREC_Q8);

    constexpr tile_x_sizes txs = mmq_get_dp4a_tile_x_sizes(GGML_TYPE_MBQ3, I);
    const half2 * x_dm = (const half2 *) x + txs.qs + k00/(QK_MBQ3/4);
    const int   * y_qs = y + 4;
    const half2 * y_dm = (const half2 *) y;

    for (int t = 0; t < QK_MBQ3/32; ++t) {
#pragma unroll
        for (int j0 = 0; j0 < J; j0 += nwarps) {
            const int    j   = j0 + threadIdx.y;
            const float2 dm8 = __half22float2(y_dm[j*MMQ_TILE_Y_K + t]);
#pragma unroll
            for (int i0 = 0; i0 < I; i0 += warp_size) {
                const int i = i0 + threadIdx.x;
                int dot = 0;
#pragma unroll
                for (int w = 0; w < 8; ++w) {
                    dot = ggml_cuda_dp4a(x[i*(2*MMQ_TILE_NE_K + 1) + k00 + 8*t + w], y_qs[j*MMQ_TILE_Y_K + 8*t + w], dot);
                }
                const float2 dm = __half22float2(x_dm[i*(MMQ_ITER_K/QK_MBQ3)]);
                sum[j0/nwarps*I/warp_size + i0/warp_size] += dm.x*(dm8.x*dot) + dm.y*(32.0f*dm8.y);
            }
        }
    }
}
