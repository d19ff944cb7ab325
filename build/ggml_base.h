// What src/ggml/sys.rs binds.
#include "ggml.h"
#include "gguf.h"
