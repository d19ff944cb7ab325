#!/bin/bash
# Leaves out of a source tree what llama-bench with heads of 128 does not run, to shorten the build: flash attention of other
# head sizes and cache types, MMQ of types other than those named. For measuring only: a product that is missing ends the program.
#
#   tests/gpu/trim.sh DIR [TYPE...]      default: mbq3 q4_0 q3_k q6_k
#
# What is missing has to be left open by the linker and stubbed: see TRIM in run.sh, which calls this.
set -eu
cd "$1/ggml/src/ggml-cuda/template-instances"; shift
sed -i '/^DECL_FATTN_MMA_F16_CASE(/{/(128, 128,/!d}' fattn-mma-f16-*.cu
sed -i '/^DECL_FATTN_VEC_CASE(/{/(128,/!d}' fattn-vec-instance-f16-f16.cu
for f in fattn-tile-*.cu fattn-vec-instance-*.cu fattn-mma-f16-*.cu; do
    grep -q "^DECL.*( *128, *\(128\|GGML_TYPE_F16, *GGML_TYPE_F16\)" "$f" || : > "$f"
done
for f in mmq-instance-*.cu; do
    [[ " ${*:-mbq3 q4_0 q3_k q6_k} " == *" $(basename "${f#mmq-instance-}" .cu) "* ]] || : > "$f"
done
