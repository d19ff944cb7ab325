// mbq3_ops DEVICE [small | quick]: the tests of mbq3_ops.hpp on one device, by ggml's name of it ("CPU", "Vulkan0", "CUDA0").

#include "mbq3_ops.hpp"

int main(int argc, char ** argv) {
    ggml_backend_load_all(); // those that are libraries of their own, from the program's folder
    backend = argc > 1 ? ggml_backend_init_by_name(argv[1], nullptr) : nullptr;
    if (!backend) {
        fprintf(stderr, "usage: mbq3_ops DEVICE [small | quick], with one of these devices:\n");
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            ggml_backend_dev_t device = ggml_backend_dev_get(i);
            fprintf(stderr, "  %s (%s)\n", ggml_backend_dev_name(device), ggml_backend_dev_description(device));
        }
        return 2;
    }
    const std::string level = argc > 2 ? argv[2] : "";
    const int status = level == "quick" ? run_quick() : run_tests(level == "small");
    ggml_backend_free(backend);
    return status;
}
