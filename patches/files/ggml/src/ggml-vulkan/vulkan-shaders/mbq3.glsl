// MBQ3 in the shaders: 128 weights in 52 bytes, w = d*code + m with codes of 3 bits (ggml-mbq3.h has the order of the bits).
//
// Element 32*t + 4*w + l of a block is byte l of word w of chunk t. A chunk owns the words q[t], q[4 + t] and q[8 + t]: words
// 0 to 5 are two to each, at bits 0 and 3 of every byte; words 6 and 7 have their low bits in the first two, above those, and
// their high bits in the third.

#if !defined(MBQ3_GLSL)
#define MBQ3_GLSL

#define QUANT_K_MBQ3 128

struct block_mbq3
{
    f16vec2 dm;
    uint32_t q[QUANT_K_MBQ3*3/32];
};

#if defined(DATA_A_MBQ3)
#define QUANT_K QUANT_K_MBQ3
#define QUANT_R 1
#define A_TYPE block_mbq3
#endif

// Where the codes of word w of chunk t begin, and (words 6 and 7) where they end.
uint mbq3_low(const uint t, const uint w) {
    return t + 4u * (w < 6u ? w / 2u : w - 6u);
}
uint mbq3_high(const uint t) {
    return t + 8u;
}

// Four codes, one to a byte, of word w; `low` and `high` are the block's q[mbq3_low(t, w)] and q[mbq3_high(t)].
uint mbq3_codes(const uint low, const uint high, const uint w) {
    return w < 6u ? (low >> (3u * (w & 1u))) & 0x07070707u
                  : ((low >> 6u) & 0x03030303u) | ((high >> (w - 2u)) & 0x04040404u);
}

#endif
