#pragma once

#include "models.h"

// LLaVA-OneVision: SigLIP (or CLIP) tower, two-layer projector, any-res assembly, in one graph.
struct clip_graph_llava_onevision : clip_graph {
    clip_graph_llava_onevision(clip_ctx * ctx, const clip_image_f32 & img)
        : clip_graph(ctx, img),
          anyres(img.anyres),
          n_tiles(img.ny() / img.nx()),
          tile_side(img.nx() / patch_size) {}

    ggml_cgraph * build() override;

private:
    // the input is a stack of tiles on the Y axis: overview, tile (0,0), tile (1,0), ...
    const clip_image_f32::anyres_info anyres;
    const int n_tiles;
    const int tile_side; // patches along an edge of a tile

    ggml_tensor * build_tiles(ggml_tensor * pixels);
    ggml_tensor * build_act(ggml_tensor * x);
    ggml_tensor * build_assembly(ggml_tensor * tiles);
};
