// Digests of the runtime's any-res geometry, a line for each height up to 800, over widths up to 800.
// Arguments: side of a tile in pixels, in tokens, pinpoints each way. See tests/anyres.rs.
#include "llava-anyres.h"

#include <cstdio>
#include <cstdlib>

struct size {
    int width, height;
};

int main(int argc, char ** argv) {
    if (argc != 4) {
        return 1;
    }
    const int side = atoi(argv[1]), grid = atoi(argv[2]), n = atoi(argv[3]);
    std::vector<size> pinpoints;
    for (int a = 1; a <= n; a++) {
        for (int b = 1; b <= n; b++) {
            pinpoints.push_back({ side * b, side * a });
        }
    }
    for (int h = 1; h <= 800; h++) {
        uint64_t digest = 0xCBF29CE484222325;
        for (int w = 1; w <= 800; w++) {
            const llava_anyres_size best = llava_anyres_select(w, h, pinpoints);
            const int gx = best.w / side, gy = best.h / side;
            const llava_anyres_layout l = llava_anyres_plan(gx, gy, grid, w, h, 9);
            const bool none = l.w == 0 || l.h == 0;
            const int numbers[] = { gy, gx, none ? 0 : l.off_y, l.h, none ? 0 : l.off_x, l.w, grid * grid + l.n_tokens() };
            for (const int number : numbers) {
                for (int shift = 0; shift < 32; shift += 8) {
                    digest = (digest ^ ((uint32_t) number >> shift & 255)) * 0x100000001B3;
                }
            }
        }
        printf("%016llx\n", (unsigned long long) digest);
    }
}
