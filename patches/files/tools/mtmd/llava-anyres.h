#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// Geometry of LLaVA's any-res pictures, the same in preprocessing, graph and token count.
// Follows transformers 5 (image_processing_utils.select_best_resolution, unpad_image and
// LlavaOnevisionModel.pack_image_features) down to the order of the double operations: int() of a
// quotient that falls on an integer decides about a whole row of tokens.

struct llava_anyres_size {
    int w = 0;
    int h = 0;
};

// The candidate that keeps most of the picture and, among equals, wastes least; the first of ties.
// T has width and height; `candidates` must not be empty.
template <typename T>
static inline llava_anyres_size llava_anyres_select(int orig_w, int orig_h, const std::vector<T> & candidates) {
    llava_anyres_size best;
    int64_t best_effective = 0;
    int64_t best_wasted    = std::numeric_limits<int64_t>::max();
    for (const auto & c : candidates) {
        const double  scale     = std::fmin((double) c.width / orig_w, (double) c.height / orig_h);
        const int64_t scaled_w  = (int64_t) (orig_w * scale);
        const int64_t scaled_h  = (int64_t) (orig_h * scale);
        const int64_t original  = (int64_t) orig_w * orig_h;
        const int64_t effective = scaled_w * scaled_h < original ? scaled_w * scaled_h : original;
        const int64_t wasted    = (int64_t) c.width * c.height - effective;
        if (effective > best_effective || (effective == best_effective && wasted < best_wasted)) {
            best_effective = effective;
            best_wasted    = wasted;
            best.w         = c.width;
            best.h         = c.height;
        }
    }
    return best;
}

// Size of the picture inside a target that it must fit with its aspect ratio kept.
static inline llava_anyres_size llava_anyres_fit(int orig_w, int orig_h, llava_anyres_size target) {
    const double scale_w = (double) target.w / orig_w;
    const double scale_h = (double) target.h / orig_h;
    llava_anyres_size out = target;
    if (scale_w < scale_h) {
        out.h = (int) std::fmin(std::ceil(orig_h * scale_w), (double) target.h);
    } else {
        out.w = (int) std::fmin(std::ceil(orig_w * scale_h), (double) target.w);
    }
    return out;
}

// What becomes of the re-assembled grid of tile tokens.
struct llava_anyres_layout {
    int off_x, off_y; // first token kept when the padding is dropped
    int w, h;         // tokens kept per row, rows kept; either may be 0 for extreme aspect ratios
    int out_w, out_h; // after bilinear down-sampling; equal to w, h where there is none

    // every row ends with a newline
    int n_tokens() const { return out_h * (out_w + 1); }
    bool is_downsampled() const { return out_w != w || out_h != h; }
};

// side: tokens along an edge of one tile; max_tiles: 9 for anyres_max_9, 0 for no limit
static inline llava_anyres_layout llava_anyres_plan(int grid_x, int grid_y, int side, int orig_w, int orig_h, int max_tiles) {
    const int cur_w = grid_x * side;
    const int cur_h = grid_y * side;
    llava_anyres_layout l = { 0, 0, cur_w, cur_h, cur_w, cur_h };
    // The reference truncates orig_h * (cur_w / orig_w) after rounding it to 7 decimals: the whole quotient.
    if ((int64_t) orig_w * cur_h > (int64_t) cur_w * orig_h) {
        const int new_h = (int) ((int64_t) orig_h * cur_w / orig_w);
        l.off_y = (cur_h - new_h) / 2;
        l.h     = cur_h - 2 * l.off_y;
    } else {
        const int new_w = (int) ((int64_t) orig_w * cur_h / orig_h);
        l.off_x = (cur_w - new_w) / 2;
        l.w     = cur_w - 2 * l.off_x;
    }
    l.out_w = l.w;
    l.out_h = l.h;
    if (max_tiles > 0) {
        const double ratio = std::sqrt((double) ((int64_t) l.h * l.w) / ((double) max_tiles * side * side));
        if (ratio > 1.1) {
            // Python's a // b is floor of (a - fmod(a, b)) / b
            auto floordiv = [](double a, double b) { return (int) std::floor((a - std::fmod(a, b)) / b + 0.5); };
            l.out_h = floordiv(l.h, ratio);
            l.out_w = floordiv(l.w, ratio);
        }
    }
    return l;
}
