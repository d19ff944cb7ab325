// The two orders of bit_order.c as CUDA: one thread, 32 weights, one chunk of q8_1 activations. Only
// compiled; run.sh counts the instructions of each kernel and subtracts those of `frame`, which
// loads and stores the same without unpacking.
#include <stdint.h>

static __device__ __forceinline__ void mbq3(const uint32_t * q, int * v) {
    const uint32_t a = q[0], b = q[4], c = q[8];
    v[0] = a & 0x07070707; v[1] = (a >> 3) & 0x07070707;
    v[2] = b & 0x07070707; v[3] = (b >> 3) & 0x07070707;
    v[4] = c & 0x07070707; v[5] = (c >> 3) & 0x07070707;
    v[6] = ((a >> 6) & 0x03030303) | ((c >> 4) & 0x04040404);
    v[7] = ((b >> 6) & 0x03030303) | ((c >> 5) & 0x04040404);
}

static __device__ __forceinline__ void planes(const uint32_t * q, int * v) {
    const uint32_t low[2] = { q[0], q[4] }, high = q[8];
#pragma unroll
    for (int w = 0; w < 8; ++w) {
        const uint32_t h = w < 2 ? high << (2 - w) : high >> (w - 2);
        v[w] = ((low[w/4] >> 2*(w%4)) & 0x03030303) | (h & 0x04040404);
    }
}

static __device__ __forceinline__ void bare(const uint32_t * q, int * v) {
    for (int w = 0; w < 8; ++w) { v[w] = q[4*(w%3)]; }
}

#define KERNEL(name, unpack)                                                                       \
extern "C" __global__ void name(const uint32_t * q, const int * u, const float * s, float * out) { \
    int v[8], sum = 0;                                                                             \
    unpack(q, v);                                                                                  \
    _Pragma("unroll") for (int w = 0; w < 8; ++w) { sum = __dp4a(v[w], u[w], sum); }               \
    *out = s[0]*s[1]*sum + s[2]*s[3];                                                              \
}

KERNEL(dot_mbq3, mbq3)
KERNEL(dot_planes, planes)
KERNEL(frame, bare)
