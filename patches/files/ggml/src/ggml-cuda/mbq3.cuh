// MBQ3 on CUDA: the block's algebra, shared by every kernel that reads it.
//
// A block holds 128 weights w = d*c + m in 13 words: word 0 is the pair (d, m) of fp16, words 1..12 are q[0..11].
// A chunk is 32 weights, the granule of every product with int8 activations. Chunk t reads A = q[t], B = q[4+t],
// C = q[8+t]; byte l of each carries the codes of lane l in the chunk's eight words (element 4*w + l):
//
//     A = c0 | c1 << 3 | (c6 & 3) << 6      B = c2 | c3 << 3 | (c7 & 3) << 6
//     C = c4 | c5 << 3 | (c6 >> 2) << 6 | (c7 >> 2) << 7
//
// so that six words of four codes come out with one shift at most and one mask, the last two with two shifts and
// two masked ors. With activations x = d8*u (int8 u, one d8 per chunk) the chunk contributes
//
//     d * d8 * sum(c*u) + m * d8 * sum(u)
//
// Both sums are of the quantised u: then the rounding error of u meets c - zero, whose mean square is about a third of
// that of c alone, which is what it would meet if sum(u) were replaced by the exact sum of x.
// No kernel here stores sum(x) in fp16: 32 activations of 3e4 would already overflow it.

#pragma once

#define QI_MBQ3 4 // threads of mul_mat_vec_q per block: one chunk each
#define QR_MBQ3 1

#define VDR_MBQ3_Q8_1_MMVQ 1
#define VDR_MBQ3_Q8_1_MMQ  8

#define MBQ3_WORDS ((int) (sizeof(block_mbq3)/sizeof(uint32_t))) // 13

template<>
struct ggml_cuda_type_traits<GGML_TYPE_MBQ3> {
    static constexpr int qk = QK_MBQ3;
    static constexpr int qr = QR_MBQ3;
    static constexpr int qi = QI_MBQ3;
    static constexpr int bs = sizeof(block_mbq3);
};

// The eight words of codes of a chunk, four codes of 0..7 in the bytes of each.
static __device__ __forceinline__ void mbq3_unpack(const uint32_t a, const uint32_t b, const uint32_t c, int * v) {
    v[0] =  (a >> 0) & 0x07070707;
    v[1] =  (a >> 3) & 0x07070707;
    v[2] =  (b >> 0) & 0x07070707;
    v[3] =  (b >> 3) & 0x07070707;
    v[4] =  (c >> 0) & 0x07070707;
    v[5] =  (c >> 3) & 0x07070707;
    v[6] = ((a >> 6) & 0x03030303) | ((c >> 4) & 0x04040404);
    v[7] = ((b >> 6) & 0x03030303) | ((c >> 5) & 0x04040404);
}

// One chunk of a block against one q8_1 block, for the kernels of mmvq.cu (a fused shared expert, weights split
// among devices). Plain products of up to eight columns take the kernels of mbq3-mmvq.cu.
static __device__ __forceinline__ float vec_dot_mbq3_q8_1(
        const void * __restrict__ vbq, const block_q8_1 * __restrict__ bq8_1, const int & kbx, const int & iqs) {
    const block_mbq3 * bq = (const block_mbq3 *) vbq + kbx;
    const int        * u  = (const int *) bq8_1[iqs].qs;

    int v[8];
    mbq3_unpack(bq->q[iqs], bq->q[4 + iqs], bq->q[8 + iqs], v);

    int sumcu = 0;
    int sumu  = 0;
#pragma unroll
    for (int w = 0; w < 8; ++w) {
        sumcu = ggml_cuda_dp4a(v[w],       u[w], sumcu);
        sumu  = ggml_cuda_dp4a(0x01010101, u[w], sumu);
    }

    const float2 dm = __half22float2(bq->dm);
    return __low2float(bq8_1[iqs].ds) * (dm.x*sumcu + dm.y*sumu);
}

// Elements iqs and iqs + 1 of block ib (iqs even): get_rows, and the conversions to f16, bf16 and f32.
static __device__ __forceinline__ void dequantize_mbq3(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    const block_mbq3 * x = (const block_mbq3 *) vx + ib;

    const int t = iqs / 32;
    const int w = iqs % 32 / 4;

    uint32_t codes;
    if (w < 6) {
        codes = x->q[4*(w/2) + t] >> 3*(w%2);
    } else {
        codes = ((x->q[4*(w - 6) + t] >> 6) & 0x03030303) | ((x->q[8 + t] >> (w - 2)) & 0x04040404);
    }
    codes >>= 8*(iqs % 4);

    const float2 dm = __half22float2(x->dm);
    v.x = dm.x*((codes >> 0) & 7) + dm.y;
    v.y = dm.x*((codes >> 8) & 7) + dm.y;
}
