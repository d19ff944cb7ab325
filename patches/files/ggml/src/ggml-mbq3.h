#pragma once

// MBQ3: 128 weights in 52 bytes, w = d*code + m with codes of 3 bits.
//
// A block is cut into four chunks t of 32 weights; element 32*t + 4*w + l is lane l of word w.
// Chunk t owns the 32-bit words A = q[t], B = q[4 + t], C = q[8 + t]. Byte l of each holds, with
// c0..c7 the codes of lane l in words 0..7:
//
//     bit   0-2   3-5   6-7
//     A     c0    c1    low two bits of c6
//     B     c2    c3    low two bits of c7
//     C     c4    c5    bit 6: high bit of c6, bit 7: high bit of c7
//
// Six of the eight words of a chunk thus fall out with one shift and one mask, and none needs a
// correction of the dot product afterwards.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// codes[128], each 0..7, in the order of the weights
GGML_API void ggml_mbq3_pack_codes  (const uint8_t * GGML_RESTRICT codes, uint32_t * GGML_RESTRICT q);
GGML_API void ggml_mbq3_unpack_codes(const uint32_t * GGML_RESTRICT q, uint8_t * GGML_RESTRICT codes);

// Round to nearest on the grid of the MBQ paper: step = max(max - min, 1e-5)/7 in f32,
// zero = clamp(-round(min/step), 0, 7), code = clamp(round(w/step) + zero, 0, 7), halves to even;
// then d = fp16(step), m = fp16(-d*zero). Weights that are not finite, or too large for fp16,
// leave a d or m that ggml_validate_row_data refuses.
GGML_API void quantize_row_mbq3_ref(const float * GGML_RESTRICT x, block_mbq3 * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_mbq3(const block_mbq3 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

// quant_weights (an importance matrix) is not used
GGML_API size_t quantize_mbq3(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * quant_weights);

#ifdef __cplusplus
}
#endif
