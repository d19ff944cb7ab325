// The pixels of the runtime's resampling and of its tiles: their number in a line, then the bytes, for each request on stdin:
// "resize W H TO_W TO_H FILTER" (2 bilinear, 3 bicubic: Pillow's numbers) or "tiles W H". See tests/tiles.rs.
#include "mtmd-image.cpp"

#include <cstdio>
#include <iostream>

static clip_hparams shape;

// What the preprocessors ask of a loaded projector.
const clip_hparams * clip_get_hparams(const clip_ctx *) {
    return &shape;
}

static clip_image_u8 picture(int width, int height) {
    clip_image_u8 img;
    img.set_size({ width, height }, false);
    for (int y = 0; y < height; y++) {
        for (int x = 0; x < width; x++) {
            std::array<uint8_t, 3> p;
            for (int c = 0; c < 3; c++) {
                p[c] = (uint8_t) ((x * x * 7 + y * y * 3 + x * y * 5 + c * 91 + (x / 9 + y / 7) % 2 * 120) % 256);
            }
            img.set_pixel(x, y, p);
        }
    }
    return img;
}

int main() {
    shape.image_size = 112;
    // LLaVA-OneVision: its odd pixels are padded as transformers 4.45 pads them.
    shape.llava_anyres_max = 9;
    for (int c = 0; c < 3; c++) {
        shape.image_mean[c] = 0.0f;
        shape.image_std[c]  = 1.0f;
    }
    for (int a = 1; a <= 3; a++) {
        for (int b = 1; b <= 3; b++) {
            shape.image_res_candidates.push_back({ 112 * b, 112 * a });
        }
    }
    std::string what;
    while (std::cin >> what) {
        int w, h;
        std::cin >> w >> h;
        std::vector<uint8_t> bytes;
        if (what == "resize") {
            int to_w, to_h, filter;
            std::cin >> to_w >> to_h >> filter;
            clip_image_u8 out;
            img_tool::resize(picture(w, h), out, { to_w, to_h }, filter == 2 ? RESIZE_ALGO_BILINEAR : RESIZE_ALGO_BICUBIC, PAD_NONE);
            for (int y = 0; y < to_h; y++) {
                for (int x = 0; x < to_w; x++) {
                    const auto p = out.get_pixel(x, y);
                    bytes.insert(bytes.end(), p.begin(), p.end());
                }
            }
        } else {
            const auto out = mtmd_image_preprocessor_llava_anyres(nullptr).preprocess(picture(w, h));
            // Mean 0 and deviation 1: the bytes over 255.
            for (const float v : out.entries.back().get_ro_buf()) {
                bytes.push_back((uint8_t) std::lround(v * 255.0f));
            }
        }
        printf("%zu\n", bytes.size());
        fwrite(bytes.data(), 1, bytes.size(), stdout);
    }
}
