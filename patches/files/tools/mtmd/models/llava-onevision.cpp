#include "llava-onevision.h"
#include "../llava-anyres.h"

#include <algorithm>
#include <cmath>

// The tower's activation, from exact operations: the CPU's ggml_gelu and ggml_gelu_quick read a
// table indexed by the fp16 rounding of x, which alone moved embeddings by 4e-5 to 1.2e-4
// (relative L2); with these they are within 1.1e-6 of the reference.
//   tanh GELU: x * sigmoid(2 * sqrt(2/pi) * (x + 0.044715 x^3)) = silu(x * v) / v
//              with v = 2 * sqrt(2/pi) * (1 + 0.044715 x^2) > 0
//   quick:     x * sigmoid(1.702 x) = silu(1.702 x) / 1.702
// GPUs have no table, and with an f16 mmproj their own operation is exact enough: one pass over memory, or none.
ggml_tensor * clip_graph_llava_onevision::build_act(ggml_tensor * x) {
    if (!on_cpu && model.layers[0].ff_up_w->type == GGML_TYPE_F16) {
        return hparams.ffn_op == FFN_GELU_QUICK ? ggml_gelu_quick(ctx0, x) : ggml_gelu(ctx0, x);
    }
    if (hparams.ffn_op == FFN_GELU_QUICK) {
        const float k = 1.702f;
        return ggml_scale(ctx0, ggml_silu(ctx0, ggml_scale(ctx0, x, k)), 1.0f / k);
    }
    GGML_ASSERT(hparams.ffn_op == FFN_GELU);
    const float k = 1.5957691216057308f; // 2 * sqrt(2/pi)
    ggml_tensor * v = ggml_scale_bias(ctx0, ggml_sqr(ctx0, x), 0.044715f * k, k);
    return ggml_div(ctx0, ggml_silu(ctx0, ggml_mul(ctx0, x, v)), v);
}

// pixels [tile, tile, 3, n] -> projected tokens [n_mmproj_embd, tile_side^2, n]
ggml_tensor * clip_graph_llava_onevision::build_tiles(ggml_tensor * pixels) {
    const int64_t n        = pixels->ne[3];
    const int64_t n_patch  = (int64_t) tile_side * tile_side;
    const bool    has_cls  = model.class_embedding != nullptr;
    const int64_t n_pos    = n_patch + (has_cls ? 1 : 0);

    // not ggml_conv_2d: it rounds the pixels to fp16, which moved embeddings by 1e-4 to 4e-4
    ggml_tensor * kernel = model.patch_embeddings_0;
    ggml_tensor * x = ggml_im2col(ctx0, kernel, pixels, patch_size, patch_size, 0, 0, 1, 1, true, GGML_TYPE_F32);
    x = ggml_reshape_2d(ctx0, x, x->ne[0], n_patch * n);
    x = build_mm(ggml_reshape_2d(ctx0, kernel, x->ne[0], n_embd), x);
    x = ggml_reshape_3d(ctx0, x, n_embd, n_patch, n);
    if (model.patch_bias) {
        x = ggml_add(ctx0, x, model.patch_bias);
    }
    if (has_cls) {
        x = ggml_concat(ctx0, ggml_repeat_4d(ctx0, model.class_embedding, n_embd, 1, n, 1), x, 1);
    }
    x = ggml_add(ctx0, x, model.position_embeddings);
    x = ggml_reshape_2d(ctx0, x, n_embd, n_pos * n);

    if (model.pre_ln_w) {
        x = build_norm(x, model.pre_ln_w, model.pre_ln_b, NORM_TYPE_NORMAL, eps, -1);
    }

    auto linear = [&](ggml_tensor * w, ggml_tensor * b, ggml_tensor * in) {
        ggml_tensor * out = build_mm(w, in);
        return b ? ggml_add(ctx0, out, b) : out;
    };

    for (int il = 0; il < n_layer; il++) {
        const auto & layer = model.layers[il];

        ggml_tensor * cur = build_norm(x, layer.ln_1_w, layer.ln_1_b, NORM_TYPE_NORMAL, eps, il);
        ggml_tensor * q = linear(layer.q_w, layer.q_b, cur);
        ggml_tensor * k = linear(layer.k_w, layer.k_b, cur);
        ggml_tensor * v = linear(layer.v_w, layer.v_b, cur);
        q = ggml_reshape_4d(ctx0, q, d_head, n_head, n_pos, n);
        k = ggml_reshape_4d(ctx0, k, d_head, n_head, n_pos, n);
        v = ggml_reshape_4d(ctx0, v, d_head, n_head, n_pos, n);
        cur = build_attn(layer.o_w, layer.o_b, q, k, v, nullptr, kq_scale, il);
        x = ggml_add(ctx0, x, cur);

        cur = build_norm(x, layer.ln_2_w, layer.ln_2_b, NORM_TYPE_NORMAL, eps, il);
        cur = build_act(linear(layer.ff_up_w, layer.ff_up_b, cur));
        x = ggml_add(ctx0, x, linear(layer.ff_down_w, layer.ff_down_b, cur));
        cb(x, "layer_out", il);
    }

    if (has_cls) {
        x = ggml_reshape_3d(ctx0, x, n_embd, n_pos, n);
        x = ggml_cont(ctx0, ggml_view_3d(ctx0, x, n_embd, n_patch, n, x->nb[1], x->nb[2], x->nb[1]));
        x = ggml_reshape_2d(ctx0, x, n_embd, n_patch * n);
    }

    x = ggml_gelu_erf(ctx0, linear(model.mm_0_w, model.mm_0_b, x));
    x = linear(model.mm_2_w, model.mm_2_b, x);
    return ggml_reshape_3d(ctx0, x, x->ne[0], n_patch, n);
}

// tiles [n_dim, tile_side^2, 1 + grid_x * grid_y] -> tokens [n_dim, n]: the overview's, then the
// rows of the re-assembled grid, without padding, down-sampled if there are too many, each row
// followed by the newline embedding
ggml_tensor * clip_graph_llava_onevision::build_assembly(ggml_tensor * tiles) {
    const int64_t n_dim   = tiles->ne[0];
    const int64_t n_patch = tiles->ne[1];
    const int64_t gx      = anyres.grid_x;
    const int64_t gy      = anyres.grid_y;
    GGML_ASSERT(tiles->ne[2] == 1 + gx * gy);

    const llava_anyres_layout l = llava_anyres_plan(gx, gy, tile_side, anyres.orig_nx, anyres.orig_ny,
                                                    hparams.llava_anyres_max);

    ggml_tensor * out = ggml_view_2d(ctx0, tiles, n_dim, n_patch, tiles->nb[1], 0);
    if (l.out_h == 0) {
        return ggml_cont(ctx0, out); // a picture so wide that no row of the grid is left
    }

    ggml_tensor * rows = ggml_repeat_4d(ctx0, model.image_newline, n_dim, 1, l.out_h, 1);
    if (l.out_w > 0) {
        // (n_dim * side, side, gx, gy) -> (n_dim * side, gx, side, gy) = the picture's rows
        ggml_tensor * grid = ggml_view_3d(ctx0, tiles, n_dim, n_patch, gx * gy, tiles->nb[1], tiles->nb[2], tiles->nb[2]);
        grid = ggml_reshape_4d(ctx0, grid, n_dim * tile_side, tile_side, gx, gy);
        grid = ggml_cont(ctx0, ggml_permute(ctx0, grid, 0, 2, 1, 3));
        grid = ggml_reshape_3d(ctx0, grid, n_dim, gx * tile_side, gy * tile_side);
        grid = ggml_cont(ctx0, ggml_view_3d(ctx0, grid, n_dim, l.w, l.h, grid->nb[1], grid->nb[2],
                                            l.off_x * grid->nb[1] + l.off_y * grid->nb[2]));
        if (l.is_downsampled()) {
            grid = ggml_cont(ctx0, ggml_permute(ctx0, grid, 2, 0, 1, 3)); // [w, h, n_dim]
            grid = ggml_interpolate(ctx0, grid, l.out_w, l.out_h, n_dim, 1, GGML_SCALE_MODE_BILINEAR);
            grid = ggml_cont(ctx0, ggml_permute(ctx0, grid, 1, 2, 0, 3));
        }
        rows = ggml_concat(ctx0, grid, rows, 1);
    }
    rows = ggml_reshape_2d(ctx0, rows, n_dim, l.n_tokens());
    return ggml_concat(ctx0, out, rows, 1);
}

ggml_cgraph * clip_graph_llava_onevision::build() {
    const int     px      = img.nx();
    const int64_t n_pos   = (int64_t) tile_side * tile_side + (model.class_embedding ? 1 : 0);
    ggml_tensor * inp     = build_inp_raw();

    // stacked on Y -> batch
    if (n_tiles > 1) {
        inp = ggml_reshape_3d(ctx0, inp, px * px, n_tiles, 3);
        inp = ggml_cont(ctx0, ggml_permute(ctx0, inp, 0, 2, 1, 3));
    }
    inp = ggml_reshape_4d(ctx0, inp, px, px, 3, n_tiles);

    // Tiles run in groups that bound the memory of the activations, in so few groups that the
    // graph's nodes suffice (about 45 per layer and group).
    const int64_t max_groups = std::max<int64_t>(1, 8000 / (45 * (n_layer + 2)));
    const int64_t per_group  = std::max<int64_t>({1, 6144 / n_pos, (n_tiles + max_groups - 1) / max_groups});
    ggml_tensor * tiles = nullptr;
    for (int64_t i = 0; i < n_tiles; i += per_group) {
        ggml_tensor * part = ggml_view_4d(ctx0, inp, px, px, 3, std::min<int64_t>(per_group, n_tiles - i),
                                          inp->nb[1], inp->nb[2], inp->nb[3], i * inp->nb[3]);
        part  = build_tiles(part);
        tiles = tiles ? ggml_concat(ctx0, tiles, part, 2) : part;
    }

    ggml_tensor * out = anyres.is_tiled()
        ? build_assembly(tiles)
        : ggml_reshape_2d(ctx0, tiles, tiles->ne[0], tiles->ne[1] * tiles->ne[2]);
    if (img.add_newline) { // one of several pictures
        out = ggml_concat(ctx0, out, ggml_reshape_2d(ctx0, model.image_newline, out->ne[0], 1), 1);
    }
    ggml_build_forward_expand(gf, out);
    return gf;
}
