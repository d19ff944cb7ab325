#pragma once

// Included by mtmd-image.cpp.

// Counterpart of dynamic_preprocess in InternVL's model cards and of transformers' GotOcr2ImageProcessor.
//
// Every picture, however small, is stretched to the grid whose aspect ratio is the nearest to its own. Of grids that are
// equally near, one with more tiles is taken while the picture has more than half of its pixels. There is a thumbnail
// beside several tiles; one tile is the whole picture, which the base class calls the overview.
mtmd_image_preprocessor_llava_uhd::slice_instructions mtmd_image_preprocessor_internvl::get_slice_instructions(const clip_image_size & original_size) const {
    const int    tile   = hparams.image_size;
    const double aspect = (double) original_size.width / original_size.height;
    const double area   = (double) original_size.width * original_size.height;

    clip_image_size grid = { 1, 1 };
    double          best = std::numeric_limits<double>::infinity();
    for (int n = std::max(1, hparams.preproc_min_tiles); n <= hparams.preproc_max_tiles; n++) {
        for (int w = 1; w <= n; w++) {
            if (n % w != 0) {
                continue;
            }
            const int    h    = n / w;
            const double diff = std::abs(aspect - (double) w / h);
            if (diff < best || (diff == best && area > 0.5 * tile * tile * n)) {
                best = diff;
                grid = { w, h };
            }
        }
    }

    slice_instructions inst;
    inst.overview_size = { tile, tile };
    inst.refined_size  = { tile * grid.width, tile * grid.height };
    inst.grid_size     = grid;
    if (grid.width * grid.height > 1) {
        for (int y = 0; y < grid.height; y++) {
            for (int x = 0; x < grid.width; x++) {
                inst.slices.push_back({ x * tile, y * tile, { tile, tile } });
            }
        }
    }
    return inst;
}
