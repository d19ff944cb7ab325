#include "../mmq.cuh"

DECL_MMQ_CASE(GGML_TYPE_MBQ3);
