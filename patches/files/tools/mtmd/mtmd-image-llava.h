#pragma once

// Included by mtmd-image.cpp, whose img_tool holds the Pillow-exact resampling.

#include "llava-anyres.h"

// Counterpart of LlavaOnevisionImageProcessor (transformers 4.45.2, slow, bicubic), and of LlavaNextImageProcessor
// (transformers 5), whose files have no anyres_max.
//
// The output is one image: the overview and the tiles of the grid in raster order, stacked on the
// Y axis, so that the whole picture goes through one graph. The overview is the picture stretched
// to a square. The grid is always there, also where one tile holds the whole picture.
mtmd_image_preproc_out mtmd_image_preprocessor_llava_anyres::preprocess(const clip_image_u8 & img) const {
    const clip_image_size orig = img.get_size();
    const int             tile = hparams.image_size;

    const llava_anyres_size target = llava_anyres_select(orig.width, orig.height, hparams.image_res_candidates);
    const int grid_x = target.w / tile;
    const int grid_y = target.h / tile;

    clip_image_u8 stacked;
    stacked.set_size({tile, tile * (1 + grid_x * grid_y)}, img.is_placeholder());

    if (!img.is_placeholder()) {
        auto resize = [](const clip_image_u8 & src, int w, int h) {
            clip_image_u8 dst;
            img_tool::resize(src, dst, {w, h}, RESIZE_ALGO_BICUBIC, PAD_NONE);
            return dst;
        };
        img_tool::composite(stacked, resize(img, tile, tile), 0, 0);

        const llava_anyres_size fit = llava_anyres_fit(orig.width, orig.height, target);
        // The reference pads both sides by the same amount. Where an odd number of pixels is
        // missing, the padded picture stays one short of the target, and so do the tiles of its
        // last column or row: the reference stretches those to the tile size, and so do we.
        const int pad_x = (target.w - fit.w) / 2;
        const int pad_y = (target.h - fit.h) / 2;
        clip_image_u8 padded;
        // LLaVA-NeXT, as transformers 5 has it, pads that pixel behind.
        const bool next = hparams.llava_anyres_max == 0;
        padded.set_size({next ? target.w : fit.w + 2 * pad_x, next ? target.h : fit.h + 2 * pad_y}, false);
        img_tool::fill(padded, {0, 0, 0});
        img_tool::composite(padded, resize(img, fit.w, fit.h), pad_x, pad_y);

        for (int ty = 0; ty < grid_y; ty++) {
            for (int tx = 0; tx < grid_x; tx++) {
                clip_image_u8 part;
                img_tool::crop(padded, part, tx * tile, ty * tile,
                               std::min(tile, padded.get_size().width  - tx * tile),
                               std::min(tile, padded.get_size().height - ty * tile));
                img_tool::composite(stacked, resize(part, tile, tile), 0, (1 + ty * grid_x + tx) * tile);
            }
        }
    }

    mtmd_image_preproc_out output;
    output.append(hparams, stacked, true);
    auto & anyres = output.entries.back().anyres;
    anyres.grid_x  = grid_x;
    anyres.grid_y  = grid_y;
    anyres.orig_nx = orig.width;
    anyres.orig_ny = orig.height;
    return output;
}

// The picture centred on a square of the mean colour, the odd pixel to the right or bottom, and that as a tile.
static clip_image_u8 llava_square(const clip_image_u8 & img, const clip_hparams & hparams) {
    const clip_image_size orig = img.get_size();
    const int             tile = hparams.image_size;
    const int             side = std::max(orig.width, orig.height);
    if (side > 16384) {
        throw std::runtime_error(string_format("a picture of %d x %d pixels is too long to be squared", orig.width, orig.height));
    }

    std::array<uint8_t, 3> mean;
    for (int i = 0; i < 3; i++) {
        mean[i] = (uint8_t) (hparams.image_mean[i] * 255.0f);
    }
    clip_image_u8 square;
    square.set_size({side, side}, img.is_placeholder());
    img_tool::fill(square, mean);
    img_tool::composite(square, img, (side - orig.width) / 2, (side - orig.height) / 2);
    clip_image_u8 resized;
    img_tool::resize(square, resized, {tile, tile}, RESIZE_ALGO_BICUBIC, PAD_NONE);
    return resized;
}

// Where a prompt has several pictures, the reference shows the tower each of them once, on a square, and one newline
// token behind. LLaVA-NeXT, which has no limit on its grids either, cuts every picture into tiles.
mtmd_image_preproc_out mtmd_image_preprocessor_llava_anyres::preprocess_one_of_several(const clip_image_u8 & img) const {
    if (hparams.llava_anyres_max == 0) {
        return preprocess(img);
    }
    mtmd_image_preproc_out output;
    output.append(hparams, llava_square(img, hparams), true);
    output.entries.back().add_newline = true;
    return output;
}

// Counterpart of LlavaImageProcessor with do_pad, and of what LLaVA's own code does.
mtmd_image_preproc_out mtmd_image_preprocessor_pad_to_square::preprocess(const clip_image_u8 & img) const {
    mtmd_image_preproc_out output;
    output.append(hparams, llava_square(img, hparams), true);
    return output;
}

// Counterpart of CLIPImageProcessor: the shorter side becomes image_size, the middle of the longer one is kept.
mtmd_image_preproc_out mtmd_image_preprocessor_center_crop::preprocess(const clip_image_u8 & img) const {
    const clip_image_size orig    = img.get_size();
    const int             side    = hparams.image_size;
    const int             shorter = std::min(orig.width, orig.height);
    const int64_t         longer  = (int64_t) side * std::max(orig.width, orig.height) / shorter;
    if (longer > 65536) {
        throw std::runtime_error(string_format("a picture of %d x %d pixels is too long to be cropped", orig.width, orig.height));
    }

    const bool    wide = orig.width > orig.height;
    clip_image_u8 resized;
    clip_image_u8 cropped;
    img_tool::resize(img, resized, {wide ? (int) longer : side, wide ? side : (int) longer}, RESIZE_ALGO_BICUBIC, PAD_NONE);
    const int off = ((int) longer - side) / 2;
    img_tool::crop(resized, cropped, wide ? off : 0, wide ? 0 : off, side, side);

    mtmd_image_preproc_out output;
    output.append(hparams, cropped, true);
    return output;
}
