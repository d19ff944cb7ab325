// Times vision towers through libmtmd, as chat, eval and serve run them: from resampled pixels in the host's memory to f32
// embeddings there.
//
//   towers MODEL.gguf MMPROJ.gguf CALLS WIDTHxHEIGHT...
//
// Tiles go together as libmtmd lets them; TOWERS_TOKENS are as many tokens as it takes at once (its default is 1024). Pictures
// are noise. Prints picture, tiles (chunks), tokens, median and least milliseconds of CALLS calls, and a sum over the
// embeddings, by which two builds are told apart.
#include "llama.h"
#include "mtmd.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

static double milliseconds() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int main(int argc, char ** argv) {
    if (argc < 5) {
        fprintf(stderr, "usage: towers MODEL MMPROJ CALLS WIDTHxHEIGHT...\n");
        return 2;
    }
    llama_backend_init();
    llama_log_set([](ggml_log_level level, const char * text, void *) { if (level >= GGML_LOG_LEVEL_WARN) fputs(text, stderr); }, nullptr);
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    llama_model * model = llama_model_load_from_file(argv[1], params);
    mtmd_context_params settings = mtmd_context_params_default();
    settings.use_gpu = getenv("TOWERS_CPU") == nullptr;
    settings.print_timings = false;
    if (const char * tokens = getenv("TOWERS_TOKENS")) settings.batch_max_tokens = atoi(tokens);
    mtmd_context * context = model ? mtmd_init_from_file(argv[2], model, settings) : nullptr;
    if (!context) {
        fprintf(stderr, "%s, %s: not loaded\n", argv[1], argv[2]);
        return 1;
    }
    const int calls = atoi(argv[3]);
    for (int i = 4; i < argc; i++) {
        int width = 0, height = 0;
        if (sscanf(argv[i], "%dx%d", &width, &height) != 2) return 2;
        std::vector<unsigned char> pixels(size_t(width) * height * 3);
        unsigned state = 1;
        for (auto & pixel : pixels) pixel = (state = state * 1664525u + 1013904223u) >> 24;
        mtmd_bitmap * bitmap = mtmd_bitmap_init(width, height, pixels.data());
        mtmd_input_chunks * chunks = mtmd_input_chunks_init();
        const std::string marker = mtmd_get_marker(context);
        const mtmd_input_text text = { marker.c_str(), marker.size(), false, true };
        const mtmd_bitmap * bitmaps[] = { bitmap };
        if (mtmd_tokenize(context, chunks, &text, bitmaps, 1) != 0) return 1;
        std::vector<double> times;
        size_t tiles = 0, tokens = 0;
        double sum = 0;
        for (int call = 0; call < calls + 2; call++) {
            tiles = tokens = 0, sum = 0;
            const double start = milliseconds();
            std::vector<const mtmd_input_chunk *> images;
            for (size_t c = 0; c < mtmd_input_chunks_size(chunks); c++) {
                const mtmd_input_chunk * chunk = mtmd_input_chunks_get(chunks, c);
                if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_IMAGE) images.push_back(chunk);
            }
            while (tiles < images.size()) {
                mtmd::batch_ptr batch(mtmd_batch_init(context));
                const size_t first = tiles;
                while (tiles < images.size() && mtmd_batch_add_chunk(batch.get(), images[tiles]) == 0) tiles++;
                if (tiles == first || mtmd_batch_encode(batch.get()) != 0) return 1;
                for (size_t i = first; i < tiles; i++) {
                    tokens += mtmd_input_chunk_get_n_tokens(images[i]);
                    sum += mtmd_batch_get_output_embd(batch.get(), images[i])[0];
                }
            }
            if (call >= 2) times.push_back(milliseconds() - start); // two to warm up
        }
        std::sort(times.begin(), times.end());
        printf("%s | %zu | %zu | %.1f | %.1f | %.6g\n", argv[i], tiles, tokens, times[times.size() / 2], times[0], sum);
        fflush(stdout);
        mtmd_input_chunks_free(chunks);
        mtmd_bitmap_free(bitmap);
    }
    mtmd_free(context);
    llama_model_free(model);
}
